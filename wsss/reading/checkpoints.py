"""Read untrusted weights: safetensors, or PyTorch's own format without running its pickle.

Files are checked for completeness: PyTorch compares no checksums, and maps the compressed bytes of a recompressed archive as
weights. Nothing is unpacked to more than the size of the file. PyTorch is imported only when a file is read.
"""

from __future__ import annotations

import io
import pickletools
import re
import stat
import warnings
import zipfile
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import WeightsError

MAX_HEADER_BYTES = 1 << 24
"""Of a safetensors file. An entry takes about 100 bytes, and the largest models have some ten thousand."""
MAX_PICKLE_BYTES = 1 << 23
"""Of the pickle with names and shapes in PyTorch's format; one of its bytes may become 64 bytes of memory."""
_DAMAGED = "the file is damaged or has no weights: fetch it again"
_OTHER = "holds more than tensors"
_PLAIN = "use the same weights as safetensors, or, if you trust the file, save only their state dict"


def read_checkpoint(path: Path, *, where: str = "", hint: str = _DAMAGED) -> Mapping[str, Any]:
    """Read a ``.safetensors`` file, or any other in PyTorch's format; only tensors and plain values are unpickled.

    Args:
        where: name of the file in messages, for a flag ``--init FILE``; default: its path.
        hint: hint of the error if the file is damaged.

    Returns:
        Tensors by name, on the CPU. In PyTorch's format they may lie below keys such as ``state_dict``, beside other values.
        Tensors of an archive are mapped from the file.

    Raises:
        WeightsError: missing, not a regular file, damaged, or with pickled objects of other types.
    """
    import torch

    where = where or str(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a named pipe would never end
            raise WeightsError(f"{where}: expected a regular file of weights", hint=hint)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            check_safetensors(path, where=where, hint=hint)
            return load_file(path)
        is_archive = _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about protocols and sparse tensors, which are refused below
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
        if not isinstance(weights, Mapping):
            raise ValueError(f"expected tensors by name, got {type(weights).__name__}")
        _check_sizes(weights, path.stat().st_size)
    except WeightsError:
        raise
    except OSError as error:
        raise WeightsError(f"{where}: cannot be read: {error.strerror or error}", hint=hint) from None
    except Exception as error:  # the unpickler may raise any exception
        problem = reason(error)
        is_other = problem.startswith(_OTHER)
        message = f"{where}: {problem}" if is_other else f"{where}: not a readable file of weights: {problem}"
        raise WeightsError(message, hint=_PLAIN if is_other else hint) from None
    return weights


def check_safetensors(path: Path, *, where: str = "", hint: str = _DAMAGED) -> None:
    """Raises WeightsError if a file is shorter than its header claims, or its header is too long."""
    where = where or str(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise WeightsError(f"{where}: cannot be read: {error.strerror or error}", hint=hint) from None
    if size < 8 or length + 8 > size:
        raise WeightsError(f"{where}: damaged: its header claims {length:,} bytes, the file has {size:,}", hint=hint)
    if length > MAX_HEADER_BYTES:
        raise WeightsError(f"{where}: expected a header of at most {MAX_HEADER_BYTES:,} bytes, got {length:,}", hint=hint)


def reason(error: Exception) -> str:
    """First line of a library's error message, without PyTorch's advice to unpickle everything."""
    text = str(error).strip()
    if "torchscript" in text.lower():
        return f"{_OTHER}: a TorchScript program"
    if "weights_only" in text or "safe_globals" in text:
        name = re.search(r"GLOBAL ([\w.]+)", text)
        return f"{_OTHER}: {name[1] if name else 'pickled objects of other kinds'}"
    return text.partition("\n")[0] or type(error).__name__


def _check_archive(path: Path) -> bool:
    """Whether the file is an archive, as PyTorch writes since 1.6. Raises ValueError or BadZipFile if it is damaged."""
    with path.open("rb") as file:
        head = file.read(MAX_PICKLE_BYTES)
    if not head.startswith(b"PK\x03\x04"):
        if len(head) == MAX_PICKLE_BYTES:
            stream = io.BytesIO(head)
            for _ in range(4):  # magic number, version, machine, object; then the values follow
                deque(pickletools.genops(stream), maxlen=0)
        return False
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise ValueError("a TorchScript archive")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise ValueError(f"{entry.filename} in it is compressed, which torch.save never does")
            if entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE_BYTES:
                raise ValueError(f"{entry.filename} in it has {entry.file_size:,} bytes, at most {MAX_PICKLE_BYTES:,} are read")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("it unpacks to more than its own size")
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} in it is wrong")
    return True


def _check_sizes(weights: Mapping[str, Any], size: int) -> None:
    """Raises ValueError if tensors take more memory than the file has bytes, or are sparse, quantized or without values."""
    import torch

    storages: dict[int, int] = {}
    seen: set[int] = set()
    waiting: list[Any] = [weights]
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise ValueError(f"a tensor of shape {tuple(value.shape)} in it is sparse, quantized or without values")
            storage = value.untyped_storage()
            if value.numel() * value.element_size() > storage.nbytes():
                raise ValueError(f"a tensor of shape {tuple(value.shape)} in it has only {storage.nbytes():,} bytes")
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, Mapping) else value)
    if sum(storages.values()) > size:
        raise ValueError("it unpacks to more than its own size")
