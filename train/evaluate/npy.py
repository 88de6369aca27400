"""Read ``cls_labels.npy`` files without unpickling them.

Such a file (of AffinityNet, IRNet and most later projects) contains a pickled dict of image ids to vectors of zeros and ones. The
usual ``np.load(..., allow_pickle=True).item()`` executes the pickle, so the author of the file can run code on the reader's
machine. A restricted unpickler is not enough: numpy's ``dtype.__setstate__`` and ``scalar`` trust flags and bytes of the pickle.
So the opcodes are interpreted here as data: a stack machine supports the few opcodes that a dict of arrays needs, builds plain
values, calls nothing, and refuses everything else.
"""

from __future__ import annotations

import io
import pickletools
import tokenize
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import WsssError
from ...reading.documents import read_bytes

MAX_BYTES = 256 * 2**20
"""COCO 2014's 122,218 images with 80 classes take 60 MB."""
MAX_OPCODES = 6_000_000
"""COCO 2014 takes half as many."""
_DTYPES = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}
_ARRAYS = {f"{module}.multiarray {name}": name for module in ("numpy.core", "numpy._core") for name in ("_reconstruct", "scalar")}
_GLOBALS = _ARRAYS | {"numpy ndarray": "ndarray", "numpy dtype": "dtype", "_codecs encode": "encode"}
_MARK = object()
_HINT = 'write it as JSON where you trust the file, {"image": ["class", ...]}, or as lines: image id, then 0-based class ids'


class _Symbol(str):
    """The name of a global in a pickle; never the object itself."""


class _DType:
    """``numpy.dtype(name)``; the pickle's BUILD sets its byte order."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.order = "<"

    def numpy(self) -> np.dtype[Any]:
        if self.name not in _DTYPES:
            raise ValueError(f"an array of type {self.name!r}")
        return np.dtype((">" if self.order == ">" else "<") + self.name)


class _Array:
    """``numpy._core.multiarray._reconstruct``; the pickle's BUILD sets its value."""

    value: Any = None


def read_label_dictionary(path: Path) -> dict[str | int, np.ndarray]:
    """Read the dict of image ids to numeric vectors (C,) of a ``.npy`` file.

    Raises:
        WsssError: unreadable, not such a dict, or a pickle with anything but strings, numbers and arrays.
    """
    file = io.BytesIO(read_bytes(path, hint=_HINT, max_bytes=MAX_BYTES))
    try:
        major, _ = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        if dtype != np.dtype(object):
            raise ValueError(f"an array of {dtype} with shape {shape}, not one dict")
        labels = _values_from_pickle(file)
    except (
        *(ValueError, TypeError, IndexError, KeyError, AttributeError, UnicodeError, MemoryError, OverflowError),
        *(SyntaxError, RecursionError, tokenize.TokenError),  # numpy parses the header as Python source
    ) as error:
        raise WsssError(
            f"{path}: expected a dict of image ids to label vectors, got {error or type(error).__name__}", hint=_HINT
        ) from None
    if not isinstance(labels, dict) or not all(isinstance(vector, np.ndarray) for vector in labels.values()):
        raise WsssError(f"{path}: expected a dict of image ids to label vectors, got something else", hint=_HINT)
    return labels


def _values_from_pickle(file: io.BytesIO) -> object:
    """The content of the pickle: None, bool, int, float, str, bytes, tuple, list, dict and numeric arrays."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any

    def above_mark() -> list[Any]:
        place = len(stack) - 1 - stack[::-1].index(_MARK)
        values = stack[place + 1 :]
        del stack[place:]
        return values

    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if number >= MAX_OPCODES:  # one byte may become a list of 64 bytes
            raise ValueError(f"a pickle of more than {MAX_OPCODES:,} steps")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return _plain(stack.pop())
            case "MARK":
                stack.append(_MARK)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINBYTES" | "SHORT_BINBYTES":
                stack.append(argument)
            case "GLOBAL":
                stack.append(_symbol(argument))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_symbol(f"{module} {name}"))
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                stack.append(tuple(above_mark()))
            case "APPEND":
                value = stack.pop()
                stack[-1].append(value)
            case "APPENDS":
                values = above_mark()
                stack[-1].extend(values)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][_key(key)] = _plain(value)
            case "SETITEMS":
                values = above_mark()
                stack[-1].update(zip(map(_key, values[::2]), map(_plain, values[1::2]), strict=True))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "REDUCE":
                arguments, symbol = stack.pop(), stack.pop()
                stack.append(_reduced(symbol, arguments))
            case "BUILD":
                state = stack.pop()
                _build(stack[-1], state)
            case other:
                raise ValueError(f"the pickle opcode {other}")
    raise ValueError("a truncated pickle")


def _symbol(name: str) -> _Symbol:
    if name not in _GLOBALS:
        raise ValueError(f"a pickle that needs {name.replace(' ', '.')!r}")
    return _Symbol(_GLOBALS[name])


def _reduced(symbol: object, arguments: Any) -> object:
    """The result of one of the four calls that numpy writes."""
    if not isinstance(symbol, _Symbol):
        raise ValueError("a pickle that calls something other than a function")
    match symbol, arguments:
        case "_reconstruct", _:
            return _Array()
        case "dtype", (str(name), *_):
            return _DType(name)
        case "encode", (str(text), "latin1"):
            return text.encode("latin1")
        case "scalar", (_DType() as dtype, bytes(content)) if len(content) == dtype.numpy().itemsize:
            return np.frombuffer(content, dtype.numpy())[0].item()
    raise ValueError(f"a pickle that calls {symbol} with unexpected arguments")


def _build(target: object, state: Any) -> None:
    match target, state:
        case _DType(), (_, str(order), *_) if order in ("<", ">", "|"):
            target.order = order
        case _Array(), (_, (), _DType(name="O8" | "O"), _, [content]):  # np.save's array around the dict
            target.value = content
        case _Array(), (_, (int(length),), _DType() as dtype, _, bytes(content)) if (
            len(content) == length * dtype.numpy().itemsize
        ):
            target.value = np.frombuffer(content, dtype.numpy())
        case _:
            raise ValueError("a pickle that builds something other than vectors")


def _plain(value: object) -> object:
    return value.value if isinstance(value, _Array) else value


def _key(value: object) -> str | int:
    if isinstance(value, str) or (isinstance(value, int) and 0 <= value < 2**63):
        return value
    raise ValueError(f"a dict with a key that is not an image id: {type(value).__name__}")
