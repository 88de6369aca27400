"""Find the external files of an ONNX file by parsing its bytes, because the runtime does not depend on the package ``onnx``.

An ONNX file is a protobuf message (onnx/onnx.proto). The values of any tensor, in the graph's initializers, in attributes of
nodes, in subgraphs and in functions, may be in another file, which an entry of ``TensorProto.external_data`` names. Every message
that can contain a tensor is searched; nothing else is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import BundleError

_HOLDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
"""For each message type: the fields, by number, that lead to tensors."""
_MAX_DEPTH = 100
"""Depth of nested messages, the limit of protobuf's own parsers."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Protobuf wire types."""


def external_files(path: Path) -> set[str]:
    """Names of the external files of an ONNX file, as written in it.

    Raises:
        BundleError: the file cannot be read as an ONNX file.
    """
    try:
        return set(_locations(memoryview(path.read_bytes()), "model", 0))
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}", hint="export the model again") from None
    except (ValueError, IndexError) as error:
        raise BundleError(f"{path}: expected an ONNX graph: {error}", hint="export the model again") from None


def _locations(message: memoryview, kind: str, depth: int) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        raise ValueError(f"nested more than {_MAX_DEPTH} messages deep")
    holds = _HOLDS[kind]
    for number, value in _fields(message):
        inner = holds.get(number)
        if inner == "entry":
            entry = list(_fields(value))
            if any(number == 1 and bytes(key) == b"location" for number, key in entry):
                yield from (bytes(name).decode("utf-8") for number, name in entry if number == 2)
        elif inner is not None:
            yield from _locations(value, inner, depth + 1)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and bytes of every length-delimited field. Raises ValueError or IndexError if the message is damaged."""
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        number, wire = (key & 0xFFFF_FFFF) >> 3, key & 7  # 32 bits, as in protobuf's own parsers
        if wire == _BYTES:
            length, at = _varint(message, at)
            if at + length > end:
                raise ValueError("it ends within a field")
            yield number, message[at : at + length]
            at += length
        elif wire == _VARINT:
            _, at = _varint(message, at)
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
            if at > end:
                raise ValueError("it ends within a field")
        else:  # groups, which ONNX does not use
            raise ValueError(f"a field of wire type {wire}")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    byte = message[at]
    if byte < 0x80:
        return byte, at + 1
    value, shift = byte & 0x7F, 7
    while True:
        at += 1
        byte = message[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at + 1
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 10 bytes")
