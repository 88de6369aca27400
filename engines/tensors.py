"""Tensors on the GPU: outputs of TensorRT engines, and tensors of other libraries with ``__cuda_array_interface__``."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..batch import Tensor
from ..errors import FeedError
from .buffers import LEGACY_STREAM, Block, Cuda, Event, Stream

CHUNK_BYTES = 1 << 24
"""Memory on the GPU in which `Gathered` collects outputs: the label maps of 80 photographs of PASCAL VOC, or of one of 16 Mpx."""


class CudaTensor:
    """A tensor on the GPU, in memory that its engine reuses.

    ``np.asarray`` copies it to the host and waits for that. Engines copy it on the GPU; libraries that support
    ``__cuda_array_interface__`` read it in place. Use after its memory was overwritten raises RuntimeError.

    Args:
        stored: shape in memory, of which ``shape`` is the first part along each axis; None if they are equal.
    """

    def __init__(
        self, block: Block, shape: tuple[int, ...], dtype: np.dtype[np.generic], stored: tuple[int, ...] | None = None
    ) -> None:
        self.block, self.shape, self.dtype = block, shape, dtype
        self.is_contiguous = stored is None or stored[1:] == shape[1:]
        self.stored = shape if stored is None or self.is_contiguous else stored
        self.address = block.address
        """Of its first element."""
        self.version = block.version
        """Of the block, when this was its content."""
        self._owner: CudaTensor | None = None

    @property
    def size_bytes(self) -> int:
        """Size in memory."""
        return math.prod(self.stored) * self.dtype.itemsize

    def check(self) -> None:
        """Raise RuntimeError if its memory was overwritten."""
        if self.block.version != self.version:
            raise RuntimeError(
                f"a tensor {self.dtype}{self.shape} was used after its engine was called again or closed; "
                "clone() tensors that must live longer"
            )

    def clone(self) -> CudaTensor:
        """A copy on the GPU with its own memory. The host does not wait for it."""
        self.check()
        cuda = self.block.cuda
        cuda.use()
        clone = new_tensor(cuda, cuda.copies, self.shape, self.dtype, self.stored)
        self.copy_to(clone.block, 0)
        return clone

    def copy_to(self, block: Block, offset_bytes: int) -> None:
        """Queue the copy of its memory to a place in a block of the same GPU."""
        cuda = self.block.cuda
        self.block.before_read(cuda.copies)
        cuda.copies.copy(block.address + offset_bytes, self.address, self.size_bytes, "device_to_device")
        copied = Event(cuda)
        copied.record(cuda.copies)
        self.block.after_read(copied)
        block.after_write(copied)
        self.check()  # again: another thread may have called the engine in the meantime

    def __getitem__(self, rows: slice) -> CudaTensor:
        """Adjacent rows of a contiguous tensor, in its memory."""
        start, stop, _ = rows.indices(self.shape[0])
        part = CudaTensor(self.block, (max(stop - start, 0), *self.shape[1:]), self.dtype)
        part.address = self.address + start * math.prod(self.shape[1:]) * self.dtype.itemsize
        part.version, part._owner = self.version, self
        return part

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[np.generic]:
        if copy is False:
            raise ValueError("a tensor on the GPU cannot become an array without a copy")
        self.check()
        array = self.block.cuda.to_host(self)
        return array if dtype is None else array.astype(dtype, copy=False)

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        """Version 3 (numba.readthedocs.io, CUDA Array Interface), for use in the default stream."""
        self.block.cuda.use()
        self.block.lend()
        self.check()  # after lending: from then on, the next call of the engine waits for the reader
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None if self.is_contiguous else _strides(self.stored, self.dtype.itemsize),
            "version": 3,
            "stream": LEGACY_STREAM,
        }


def new_tensor(
    cuda: Cuda, stream: Stream, shape: tuple[int, ...], dtype: np.dtype[np.generic], stored: tuple[int, ...] | None = None
) -> CudaTensor:
    """A tensor with its own memory, which ``stream`` will write; the memory is reused when the tensor is collected."""
    block = cuda.take(math.prod(stored or shape) * dtype.itemsize)
    block.before_write(stream)
    tensor = CudaTensor(block, shape, dtype, stored)
    weakref.finalize(tensor, cuda.give_back, block).atexit = False
    return tensor


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors one behind the other along their first axis: (N, ...), on the GPU where all of them are there."""
    first = parts[0]
    if not isinstance(first, CudaTensor) or not all(isinstance(part, CudaTensor) for part in parts):
        return np.concatenate([np.asarray(part) for part in parts])
    first.block.cuda.use()
    rows = sum(part.shape[0] for part in parts)
    whole = new_tensor(first.block.cuda, first.block.cuda.copies, (rows, *first.shape[1:]), first.dtype)
    start = 0
    for part in parts:
        assert isinstance(part, CudaTensor) and part.is_contiguous
        part.check()
        part.copy_to(whole.block, start)
        start += part.size_bytes
    return whole


class Gathered:
    """Outputs of several calls, which are copied to the host together.

    On a GPU they are collected in chunks of memory, each of which takes one copy and one wait.
    """

    def __init__(self) -> None:
        self._parts: list[np.ndarray | tuple[int, int, CudaTensor]] = []  # on the GPU: chunk, first byte, and what it was
        self._chunks: list[tuple[CudaTensor, int]] = []  # with the number of bytes in use

    def add(self, tensor: Tensor) -> None:
        """Add an output, before the next call of its engine."""
        if not isinstance(tensor, CudaTensor):
            self._parts.append(np.asarray(tensor))
            return
        tensor.check()
        cuda = tensor.block.cuda
        cuda.use()
        chunk, used = self._chunks.pop() if self._chunks else (None, 0)
        if chunk is not None and (chunk.block.cuda is not cuda or used + tensor.size_bytes > chunk.size_bytes):
            self._chunks.append((chunk, used))
            chunk = None
        if chunk is None:
            size = max(CHUNK_BYTES, tensor.size_bytes)
            chunk, used = new_tensor(cuda, cuda.copies, (size,), np.dtype(np.uint8)), 0
        self._parts.append((len(self._chunks), used, tensor))
        tensor.copy_to(chunk.block, used)
        self._chunks.append((chunk, used + -(-tensor.size_bytes // 8) * 8))  # aligned for every dtype

    def arrays(self) -> list[np.ndarray]:
        """The outputs on the host, in the order in which they were added."""
        chunks = [np.asarray(chunk[:used]) for chunk, used in self._chunks]
        return [part if isinstance(part, np.ndarray) else _part_of(chunks[part[0]], part[1], part[2]) for part in self._parts]


def _part_of(chunk: np.ndarray, start: int, tensor: CudaTensor) -> np.ndarray:
    stored = chunk[start : start + tensor.size_bytes].view(tensor.dtype).reshape(tensor.stored)
    return stored[tuple(map(slice, tensor.shape))]


@dataclass(frozen=True, slots=True)
class ForeignTensor:
    """A tensor of another library."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    address: int
    stream: int
    """Handle of the stream in which its owner uses it."""

    @property
    def size_bytes(self) -> int:
        """Size of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def foreign_tensor(tensor: Any, name: str) -> ForeignTensor:
    """Convert a tensor with ``__cuda_array_interface__`` (PyTorch, CuPy, pycuda), without a copy.

    Raises:
        FeedError: it is not contiguous, or has another byte order.
    """
    interface = tensor.__cuda_array_interface__
    shape, dtype = tuple(int(length) for length in interface["shape"]), np.dtype(interface["typestr"])
    if not dtype.isnative:
        raise FeedError(f"{name!r}: expected the byte order of this machine, got {dtype.str}")
    strides = interface.get("strides")
    if strides is not None and 0 not in shape and not _contiguous(shape, dtype.itemsize, tuple(strides)):
        raise FeedError(
            f"{name!r}: expected a C-contiguous tensor, got strides {tuple(strides)}", hint="make it contiguous first"
        )
    return ForeignTensor(shape, dtype, int(interface["data"][0]), _stream_of(tensor, interface.get("stream")))


def _strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _contiguous(shape: tuple[int, ...], itemsize: int, strides: tuple[int, ...]) -> bool:
    expected = itemsize
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True


def _stream_of(tensor: object, stream: int | None) -> int:
    if stream:
        return int(stream)
    # PyTorch's interface (version 2) has no stream, so ask PyTorch, which is imported if the tensor is one of its.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor):
        return int(torch.cuda.current_stream(tensor.device).cuda_stream) or LEGACY_STREAM
    # pycuda says "no wait needed" even while its kernels still run in the default stream.
    return LEGACY_STREAM
