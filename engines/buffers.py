"""Memory, streams and events of one NVIDIA GPU.

Every engine computes in its own stream, so the order between engines has to be enforced. Each block of memory holds the event
after which it is written, for which readers wait, and the events after which its readers are done, for which the next writer
waits. These waits happen on the device; the host only waits for copies to the host.
"""

from __future__ import annotations

import ctypes
import gc
import math
import threading
import weakref
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import OutOfMemory, WsssError

LEGACY_STREAM = 1
"""Handle of CUDA's default stream, which libraries use that do not select a stream (PyTorch's default, pycuda)."""
SUCCESS, MEMORY_ALLOCATION, NOT_READY = 0, 2, 600
"""Values of ``cudaError_t``."""
Direction = Literal["host_to_device", "device_to_host", "device_to_device"]
_KINDS: dict[Direction, str] = {
    "host_to_device": "cudaMemcpyHostToDevice",
    "device_to_host": "cudaMemcpyDeviceToHost",
    "device_to_device": "cudaMemcpyDeviceToDevice",
}


class CudaError(WsssError):
    """A failed CUDA call."""


class OnDevice(Protocol):
    """A tensor in GPU memory that `Cuda.to_host` can copy."""

    @property
    def block(self) -> Block: ...
    @property
    def address(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def stored(self) -> tuple[int, ...]:
        """Shape in memory, of which ``shape`` is the first part along each axis."""
        ...

    @property
    def dtype(self) -> np.dtype[np.generic]: ...
    @property
    def size_bytes(self) -> int: ...
    def check(self) -> None:
        """Raise RuntimeError if a later call has overwritten it."""
        ...


class Cuda:
    """One GPU: checked calls of the CUDA runtime, memory, and the number of bytes copied.

    Args:
        runtime: ``cuda.bindings.runtime``.
        device: the GPU's number.

    Raises:
        CudaError: there is no such GPU, or no driver for it.
    """

    def __init__(self, runtime: ModuleType, device: int) -> None:
        self.runtime, self.device = runtime, device
        self.copied: Counter[str] = Counter()
        """Bytes copied so far, by direction."""
        self._closed = False
        self._taken: set[Block] = set()
        self._spare: dict[int, deque[Block]] = {}
        self._to_host = threading.Lock()
        try:
            count = self.call("cudaGetDeviceCount")
        except WsssError as error:
            raise CudaError(
                f"TensorRT needs an NVIDIA GPU with a working driver; {error.message}",
                hint="wsss doctor says what this machine can run; --engine ort runs on the CPU",
            ) from None
        if device >= count:
            raise CudaError(f"--device cuda:{device}: this machine has {count} GPU{'s' * (count != 1)}", hint="they count from 0")
        self.use()
        self._copied_to_host = Event(self)
        # Copies to the host have a separate stream: they wait for the tensor, not for the engine's next call.
        self.copies = Stream(self)
        self._pinned: Pinned | None = None

    def call(self, name: str, *args: Any) -> Any:
        """Call a function of the CUDA runtime and return its value, if any.

        Raises:
            OutOfMemory: the GPU, or the host's pinned memory, is used up.
            CudaError: any other error.
        """
        status, *values = getattr(self.runtime, name)(*args)
        if int(status) == SUCCESS:
            return values[0] if values else None
        self.runtime.cudaGetLastError()  # clears it: TensorRT also reads the last error and would report it as its own
        message = f"CUDA: {name}: {self._text('cudaGetErrorName', status)}, {self._text('cudaGetErrorString', status)}"
        if int(status) == MEMORY_ALLOCATION:
            raise OutOfMemory(message, hint="a smaller --batch, or a GPU that nothing else uses")
        raise CudaError(message)

    def _text(self, name: str, status: Any) -> str:
        _, text = getattr(self.runtime, name)(status)
        return text.decode() if isinstance(text, bytes) else str(text)

    def use(self) -> None:
        """Make this the calling thread's GPU; CUDA has a current GPU for each thread."""
        self.call("cudaSetDevice", self.device)

    def device_of(self, address: int) -> int:
        """The number of the GPU of an address, -1 for host memory."""
        attributes = self.call("cudaPointerGetAttributes", address)
        kinds = self.runtime.cudaMemoryType
        return int(attributes.device) if attributes.type in (kinds.cudaMemoryTypeDevice, kinds.cudaMemoryTypeManaged) else -1

    def take(self, size_bytes: int) -> Block:
        """Memory for a tensor that outlives its engine's calls; ``give_back`` keeps it for reuse.

        Blocks are reused because ``cudaFree`` waits for all work on the GPU.
        """
        size = 1 << max(size_bytes - 1, 255).bit_length()
        block: Block | None = None
        with suppress(KeyError, IndexError):
            block = self._spare[size].pop()
        if block is None:
            try:
                block = Block(self, size)
            except OutOfMemory:
                self._free_spare()
                block = Block(self, size)
        self._taken.add(block)
        return block

    def give_back(self, block: Block) -> None:
        """Return a block for reuse. Takes no lock, because the garbage collector calls it at any time in any thread."""
        self._taken.discard(block)
        self._spare.setdefault(block.size_bytes, deque()).append(block)
        if self._closed and not self._taken:
            with suppress(WsssError):  # a finalizer has no caller to report to
                self._release()

    def close(self) -> None:
        """Free all resources, now or when the last tensor that is still in use is collected."""
        if not self._closed:
            self._closed = True
            if not self._taken:
                self._release()

    def _release(self) -> None:
        self.use()
        self.copies.close()
        self._free_spare()
        if self._pinned is not None:
            self._pinned.free()

    def _free_spare(self) -> None:
        for blocks in list(self._spare.values()):
            while blocks:
                blocks.pop().free()

    def to_host(self, tensor: OnDevice) -> npt.NDArray[np.generic]:
        """Copy a tensor to the host through pinned memory. Waits until it is computed and copied."""
        self.use()
        with self._to_host:
            if self._pinned is None or self._pinned.size_bytes < tensor.size_bytes:
                if self._pinned is not None:
                    self._pinned.free()
                self._pinned = None  # stays None if there is no memory for a larger one
                self._pinned = Pinned(self, tensor.size_bytes)
            tensor.block.before_read(self.copies)
            self.copies.copy(self._pinned.address, tensor.address, tensor.size_bytes, "device_to_host")
            self._copied_to_host.record(self.copies)
            tensor.block.after_read(self._copied_to_host)
            tensor.check()  # again: another thread may have called the engine in the meantime
            self._copied_to_host.wait_on_host()
            return self._pinned.array(tensor.stored, tensor.dtype)[tuple(map(slice, tensor.shape))].copy()


class Stream:
    """A queue of work on the GPU, independent of the default stream."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.handle = cuda.call("cudaStreamCreateWithFlags", cuda.runtime.cudaStreamNonBlocking)

    def wait(self, event: Event) -> None:
        """Make work that is queued from now on start after ``event``."""
        self._cuda.call("cudaStreamWaitEvent", self.handle, event.handle, 0)

    def wait_for(self, other: int) -> None:
        """Make work that is queued from now on start after all work queued in another library's stream, given by its handle."""
        event = Event(self._cuda)
        self._cuda.call("cudaEventRecord", event.handle, other)
        self.wait(event)

    def copy(self, target: int, source: int, size_bytes: int, direction: Direction) -> None:
        """Queue a copy between two addresses. Host memory must be pinned, or the host would wait for the copy."""
        kind = getattr(self._cuda.runtime.cudaMemcpyKind, _KINDS[direction])
        self._cuda.call("cudaMemcpyAsync", target, source, size_bytes, kind, self.handle)
        self._cuda.copied[direction] += size_bytes

    def fill(self, address: int, byte: int, size_bytes: int) -> None:
        """Queue the filling of GPU memory with a byte."""
        self._cuda.call("cudaMemsetAsync", address, byte, size_bytes, self.handle)

    def finish(self) -> None:
        """Wait on the host until all work is done."""
        self._cuda.call("cudaStreamSynchronize", self.handle)

    def close(self) -> None:
        """Wait for all work and free the stream."""
        self.finish()
        self._cuda.call("cudaStreamDestroy", self.handle)


class Event:
    """A point in a stream for which other streams or the host can wait. Counts as passed before its first record."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        runtime = cuda.runtime
        # Blocking: a thread that waits on the host sleeps, and its core is free to decode photographs.
        self.handle = cuda.call("cudaEventCreateWithFlags", runtime.cudaEventDisableTiming | runtime.cudaEventBlockingSync)
        weakref.finalize(self, runtime.cudaEventDestroy, self.handle).atexit = False

    def record(self, stream: Stream) -> None:
        """Move the event to the end of ``stream``'s queue. A later point includes all earlier ones of the same stream."""
        self._cuda.call("cudaEventRecord", self.handle, stream.handle)

    def wait_on_host(self) -> None:
        """Wait until the GPU has passed it."""
        self._cuda.call("cudaEventSynchronize", self.handle)

    def passed(self) -> bool:
        """Whether the GPU has passed it, without waiting."""
        (status,) = self._cuda.runtime.cudaEventQuery(self.handle)
        if int(status) == NOT_READY:
            return False
        self._cuda.call("cudaEventQuery", self.handle)
        return True


class Block:
    """A block of GPU memory with the events of its writers and readers."""

    def __init__(self, cuda: Cuda, size_bytes: int) -> None:
        self.cuda, self.size_bytes = cuda, size_bytes
        self.address = int(cuda.call("cudaMalloc", max(size_bytes, 1)))
        self.version = 0
        """Counts how often it was overwritten: tensors of earlier versions are invalid."""
        self._written: Event | None = None
        self._readers: set[Event] = set()
        self._lent = False
        self._lock = threading.Lock()  # readers and the writer are different threads

    def before_read(self, stream: Stream) -> None:
        """Make work that is queued in ``stream`` from now on wait until the block is written."""
        if self._written is not None:
            stream.wait(self._written)

    def after_read(self, event: Event) -> None:
        """Record that the block is read until ``event``.

        A reader that checks the version afterwards finds either that the next writer waits for it, or that it was too late.
        """
        with self._lock:
            self._readers.add(event)

    def before_write(self, stream: Stream) -> None:
        """Make work that is queued in ``stream`` from now on wait for all readers, and start a new version.

        It does not wait for earlier writers, because all writers of a block use the same stream.
        """
        with self._lock:
            readers, self._readers = self._readers, set()
            lent, self._lent = self._lent, False
            self.version += 1
        for event in readers:
            stream.wait(event)
        if lent:  # other libraries record no event
            stream.wait_for(LEGACY_STREAM)

    def after_write(self, event: Event) -> None:
        """Record that the block is written after ``event``."""
        self._written = event

    @property
    def is_lent(self) -> bool:
        """Whether another library may access the block."""
        return self._lent

    def lend(self) -> None:
        """Prepare for another library that reads the block in the default stream, which waits for it, as the next writer does
        for the default stream."""
        if self._written is not None:
            self.cuda.call("cudaStreamWaitEvent", LEGACY_STREAM, self._written.handle, 0)
        with self._lock:
            self._lent = True

    def free(self) -> None:
        """Free the memory, after all work on the GPU. Its tensors become invalid."""
        self.version += 1
        self.cuda.call("cudaFree", self.address)


class Pinned:
    """Page-locked host memory, for asynchronous copies."""

    def __init__(self, cuda: Cuda, size_bytes: int) -> None:
        self._cuda, self.size_bytes = cuda, max(size_bytes, 1)
        self.address = int(cuda.call("cudaHostAlloc", self.size_bytes, 0))

    def array(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> npt.NDArray[np.generic]:
        """View of its first bytes as an array, valid until `free`."""
        size_bytes = math.prod(shape) * dtype.itemsize
        return np.frombuffer(memoryview((ctypes.c_uint8 * size_bytes).from_address(self.address)), dtype).reshape(shape)

    def free(self) -> None:
        """Free the memory."""
        self._cuda.call("cudaFreeHost", self.address)


class PinnedRing:
    """Page-locked buffers through which arrays are copied to the GPU. They take turns, so that the host fills one while the GPU
    still copies the others.

    Args:
        count: number of buffers.
        size_bytes: of each; a larger array makes its buffer grow.
    """

    def __init__(self, cuda: Cuda, count: int, size_bytes: int) -> None:
        self._cuda, self._size_bytes = cuda, size_bytes
        self._buffers: deque[tuple[Pinned, Event]] = deque(maxlen=count)

    def send(
        self,
        array: npt.NDArray[np.generic],
        dtype: np.dtype[np.generic],
        address: int,
        stream: Stream,
        shape: tuple[int, ...] | None = None,
        fill: int = 0,
    ) -> None:
        """Queue the copy of an array, which may be overwritten at once.

        Args:
            shape: that of the array, or larger: the rest is ``fill``.
        """
        shape = shape or array.shape
        size_bytes = math.prod(shape) * dtype.itemsize
        pinned, sent = self._next(size_bytes)
        there = pinned.array(shape, dtype)
        if shape != array.shape:
            there.fill(fill)
        np.copyto(there[tuple(map(slice, array.shape))], array)  # converts strides and byte order
        stream.copy(address, pinned.address, size_bytes, "host_to_device")
        sent.record(stream)

    def _next(self, size_bytes: int) -> tuple[Pinned, Event]:
        """The buffer whose turn it is, after its last copy."""
        if len(self._buffers) == self._buffers.maxlen:
            pinned, sent = self._buffers[0]
            sent.wait_on_host()
            if pinned.size_bytes >= size_bytes:
                self._buffers.rotate(-1)
                return pinned, sent
            self._buffers.popleft()[0].free()
        self._buffers.append((Pinned(self._cuda, max(size_bytes, self._size_bytes)), Event(self._cuda)))
        return self._buffers[-1]

    def free(self) -> None:
        """Free the memory."""
        while self._buffers:
            self._buffers.pop()[0].free()


class StagingBuffer:
    """Memory for an engine's input, at an address that does not change.

    Args:
        size_bytes: of the largest input.
    """

    def __init__(self, cuda: Cuda, size_bytes: int) -> None:
        self.block = Block(cuda, size_bytes)
        self._pinned = PinnedRing(cuda, 2, size_bytes)
        self._source: object = None

    def from_host(
        self,
        array: npt.NDArray[np.generic],
        dtype: np.dtype[np.generic],
        stream: Stream,
        shape: tuple[int, ...] | None = None,
        fill: int = 0,
    ) -> None:
        """Queue the copy of an array, as `PinnedRing.send`."""
        self._source = None
        self._pinned.send(array, dtype, self.block.address, stream, shape, fill)

    def from_device(
        self, address: int, size_bytes: int, stream: Stream, padded_bytes: int = 0, fill: int = 0, source: object = None
    ) -> None:
        """Queue the copy of GPU memory, unless it is there since the last copy.

        Args:
            padded_bytes: up to these, the bytes behind it become those of an integer ``fill``, 0 or -1.
            source: equal for equal contents of the same size; None is not equal to any.
        """
        if source is not None and source == self._source:
            return
        self._source = None  # until all of it is queued
        stream.copy(self.block.address, address, size_bytes, "device_to_device")
        if padded_bytes > size_bytes:
            stream.fill(self.block.address + size_bytes, fill & 0xFF, padded_bytes - size_bytes)
        self._source = source

    def free(self) -> None:
        """Free the memory."""
        self.block.free()
        self._pinned.free()


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Disable garbage collection, because finalizers that call CUDA in this thread would end a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
