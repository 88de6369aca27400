"""Read files of weights that may come from strangers: safetensors, or PyTorch's own format without running its pickle.

A file must be whole: PyTorch itself compares no checksums, and maps the compressed bytes of a recompressed archive as weights.
Nothing is unpacked to more than the file's own size. PyTorch is imported only when a file is read.
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
"""Of a safetensors file. A tensor takes about 100 bytes, and the largest models have some ten thousand."""
MAX_PICKLE_BYTES = 1 << 23
"""Of names and shapes in PyTorch's format; a byte of a pickle may become 64 bytes of memory."""
_DAMAGED = "the file is damaged or holds no weights: fetch it again"
_OTHER = "holds more than tensors"
_PLAIN = "take the same weights as safetensors, or save their state dict alone, where you trust the file"


def read_checkpoint(path: Path, *, where: str = "", hint: str = _DAMAGED) -> Mapping[str, Any]:
    """Read a ``.safetensors`` file, or any other as PyTorch's format; nothing is unpickled but tensors and plain values.

    Args:
        where: how messages name the file; its path unless given. For a flag: ``--init FILE``.
        hint: what helps when the file is damaged.

    Returns:
        Tensors by name, on the CPU; of PyTorch's format maybe below keys as ``state_dict``, beside other values. Tensors of
        an archive are mapped from the file.

    Raises:
        WeightsError: missing, not a regular file, damaged, or pickled objects of other kinds in it.
    """
    import torch

    where = where or str(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a named pipe would never end
            raise WeightsError(f"{where}: expected a file of weights, got no regular file", hint=hint)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            check_safetensors(path, where=where, hint=hint)
            return load_file(path)
        is_archive = _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of protocols and sparse tensors: refused below, or an error
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
        if not isinstance(found, Mapping):
            raise ValueError(f"expected tensors by name, got {type(found).__name__}")
        _check_sizes(found, path.stat().st_size)
    except WeightsError:
        raise
    except OSError as error:
        raise WeightsError(f"{where}: cannot be read: {error.strerror or error}", hint=hint) from None
    except Exception as error:  # a damaged pickle makes the unpickler raise nearly anything
        what = reason(error)
        is_other = what.startswith(_OTHER)
        message = f"{where}: {what}" if is_other else f"{where}: not a readable file of weights: {what}"
        raise WeightsError(message, hint=_PLAIN if is_other else hint) from None
    return found


def check_safetensors(path: Path, *, where: str = "", hint: str = _DAMAGED) -> None:
    """Raise WeightsError where a file is shorter than its header says, or its header is too long to be one."""
    where = where or str(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise WeightsError(f"{where}: cannot be read: {error.strerror or error}", hint=hint) from None
    if size < 8 or length + 8 > size:
        raise WeightsError(f"{where}: damaged: its header says {length:,} bytes, the file has {size:,}", hint=hint)
    if length > MAX_HEADER_BYTES:
        raise WeightsError(f"{where}: a header of {length:,} bytes, at most {MAX_HEADER_BYTES:,} are read", hint=hint)


def reason(error: Exception) -> str:
    """The first line of what a library says of a file, without PyTorch's advice to run what is pickled in it."""
    text = str(error).strip()
    if "torchscript" in text.lower():
        return f"{_OTHER}: a TorchScript program"
    if "weights_only" in text or "safe_globals" in text:
        name = re.search(r"GLOBAL ([\w.]+)", text)
        return f"{_OTHER}: {name[1] if name else 'pickled objects of other kinds'}"
    return text.partition("\n")[0] or type(error).__name__


def _check_archive(path: Path) -> bool:
    """Whether the file is an archive, as PyTorch writes since 1.6. Raises ValueError or BadZipFile unless it is a whole one."""
    with path.open("rb") as file:
        head = file.read(MAX_PICKLE_BYTES)
    if not head.startswith(b"PK\x03\x04"):
        if len(head) == MAX_PICKLE_BYTES:
            stream = io.BytesIO(head)
            for _ in range(4):  # a magic number, a version, the machine, the object; then come the values
                deque(pickletools.genops(stream), maxlen=0)
        return False
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise ValueError("a TorchScript archive")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise ValueError(f"{entry.filename} in it is compressed, torch.save never does that")
            if entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE_BYTES:
                raise ValueError(f"{entry.filename} in it has {entry.file_size:,} bytes, at most {MAX_PICKLE_BYTES:,} are read")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("it unpacks to more than its own size")
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} in it is wrong")
    return True


def _check_sizes(found: Mapping[str, Any], size: int) -> None:
    """Raise ValueError where tensors take more memory than the file has bytes, or are of a kind without plain values."""
    import torch

    storages: dict[int, int] = {}
    seen: set[int] = set()
    waiting: list[Any] = [found]
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
