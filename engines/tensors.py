"""Tensors on the GPU: outputs of TensorRT engines, and tensors of other libraries with ``__cuda_array_interface__``."""

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
    """A tensor on the GPU, in memory that its engine reuses.

    ``np.asarray`` copies it to the host and waits for that. Engines, and libraries that support
    ``__cuda_array_interface__``, read it in place. Use after its memory was overwritten raises RuntimeError.
    """

    def __init__(self, block: Block, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> None:
        self.block, self.shape, self.dtype = block, shape, dtype
        self._version = block.version

    @property
    def size_bytes(self) -> int:
        """Size of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def check(self) -> None:
        """Raise RuntimeError if its memory was overwritten."""
        if self.block.version != self._version:
            raise RuntimeError(
                f"a tensor {self.dtype}{self.shape} was used after its engine was called again or closed; "
                "clone() tensors that must live longer"
            )

    def clone(self) -> CudaTensor:
        """A copy on the GPU with its own memory. The host does not wait for it."""
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
        self.check()  # again: another thread may have called the engine in the meantime
        return clone

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
            "data": (self.block.address, False),
            "strides": None,
            "version": 3,
            "stream": LEGACY_STREAM,
        }


@dataclass(frozen=True, slots=True)
class ForeignTensor:
    """A tensor of another library, read in place."""

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
