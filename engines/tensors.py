"""Tensors on the GPU: our own, and those of other libraries through ``__cuda_array_interface__``."""

from __future__ import annotations

import math
import sys
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import FeedError
from .buffers import LEGACY_STREAM, Block, Event


class CudaTensor:
    """A tensor on the GPU, in memory that its owner will use again.

    ``np.asarray`` copies it to the host, and alone waits. Engines, and all that reads ``__cuda_array_interface__``, take
    it where it is. Any use after its memory was overwritten raises RuntimeError.
    """

    def __init__(self, block: Block, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> None:
        self.block, self.shape, self.dtype = block, shape, dtype
        self._version = block.version

    @property
    def size_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    def check(self) -> None:
        """Raises RuntimeError when its memory holds something else by now."""
        if self.block.version != self._version:
            raise RuntimeError(
                f"a tensor {self.dtype}{self.shape} was used after its engine was called again or closed; "
                "clone() what must live longer"
            )

    def clone(self) -> CudaTensor:
        """A copy on the GPU that lives until it is dropped. The host does not wait."""
        self.check()
        cuda = self.block.cuda
        cuda.use()
        block = cuda.take(self.size_bytes)
        block.before_write(cuda.copies)
        self.block.before_read(cuda.copies)
        cuda.copies.copy(block.address, self.block.address, self.size_bytes, "device_to_device")
        copied = Event(cuda)
        copied.record(cuda.copies)
        self.block.after_read(copied)
        block.after_write(copied)
        clone = CudaTensor(block, self.shape, self.dtype)
        weakref.finalize(clone, cuda.give_back, block).atexit = False
        return clone

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[np.generic]:
        if copy is False:
            raise ValueError("a tensor on the GPU has no array that is not a copy")
        self.check()
        array = self.block.cuda.to_host(self)
        return array if dtype is None else array.astype(dtype, copy=False)

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        """Version 3 (numba.readthedocs.io, CUDA Array Interface), for use in the default stream."""
        self.check()
        self.block.cuda.use()
        self.block.lend()
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.block.address, False),
            "strides": None,
            "version": 3,
            "stream": LEGACY_STREAM,
        }


@dataclass(frozen=True, slots=True)
class ForeignTensor:
    """A tensor of another library, read where it lies."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    address: int
    stream: int
    """Handle of the stream in which its owner uses it."""

    @property
    def size_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def foreign_tensor(tensor: Any, name: str) -> ForeignTensor:
    """Anything with ``__cuda_array_interface__`` (PyTorch, CuPy, pycuda), as a tensor that an engine reads.

    Raises:
        FeedError: it has gaps between its elements.
    """
    told = tensor.__cuda_array_interface__
    shape, dtype = tuple(int(length) for length in told["shape"]), np.dtype(told["typestr"])
    if not dtype.isnative:
        raise FeedError(f"{name!r}: expected the byte order of this machine, got {dtype.str}")
    strides = told.get("strides")
    if strides is not None and 0 not in shape and not _contiguous(shape, dtype.itemsize, tuple(strides)):
        raise FeedError(
            f"{name!r}: expected a C-contiguous tensor, got strides {tuple(strides)}", hint="make it contiguous first"
        )
    return ForeignTensor(shape, dtype, int(told["data"][0]), _stream_of(tensor, told.get("stream")))


def _contiguous(shape: tuple[int, ...], itemsize: int, strides: tuple[int, ...]) -> bool:
    expected = itemsize
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True


def _stream_of(tensor: object, told: int | None) -> int:
    if told:
        return int(told)
    # PyTorch's interface (version 2) does not say its stream, but PyTorch does, and it is there if its tensor is.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor):
        return int(torch.cuda.current_stream(tensor.device).cuda_stream) or LEGACY_STREAM
    # "No wait needed" is also what pycuda says while its kernels still run in the default stream.
    return LEGACY_STREAM
