"""Memory, streams and events of one NVIDIA GPU.

Every engine computes in a stream of its own, so nothing is ordered by itself. The order is kept with each block of
memory: the event after which it is written, which whoever reads it waits for, and the events after which its readers are
done, which whoever writes it next waits for. These waits happen on the device; the host waits only to hand over.
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
"""Handle of CUDA's default stream, in which libraries compute that say nothing of streams (PyTorch's default, pycuda)."""
SUCCESS, MEMORY_ALLOCATION, NOT_READY = 0, 2, 600
"""Values of ``cudaError_t``."""
Direction = Literal["host_to_device", "device_to_host", "device_to_device"]
_KINDS: dict[Direction, str] = {
    "host_to_device": "cudaMemcpyHostToDevice",
    "device_to_host": "cudaMemcpyDeviceToHost",
    "device_to_device": "cudaMemcpyDeviceToDevice",
}


class CudaError(WsssError):
    """A call that CUDA refused."""


class OnDevice(Protocol):
    """A tensor in GPU memory, as `Cuda.to_host` reads it."""

    @property
    def block(self) -> Block: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[np.generic]: ...
    @property
    def size_bytes(self) -> int: ...
    def check(self) -> None:
        """Raise FeedError where a later call has overwritten it."""
        ...


class Cuda:
    """One GPU: every call to its runtime checked, its memory, and how many bytes were copied.

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
        self._given: set[Block] = set()
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
        self._landed = Event(self)
        # Copies to the host have a stream of their own: they wait for what they copy, not for what its engine does next.
        self.copies = Stream(self)
        self._landing: Pinned | None = None

    def call(self, name: str, *args: Any) -> Any:
        """Calls the CUDA runtime: the value it returns, if any.

        Raises:
            OutOfMemory: the GPU, or the pinned memory of the host, is used up.
            CudaError: any other code than success.
        """
        status, *values = getattr(self.runtime, name)(*args)
        if int(status) == SUCCESS:
            return values[0] if values else None
        self.runtime.cudaGetLastError()  # or TensorRT, which asks for the last error too, takes it for its own
        said = f"CUDA: {name}: {self._text('cudaGetErrorName', status)}, {self._text('cudaGetErrorString', status)}"
        if int(status) == MEMORY_ALLOCATION:
            raise OutOfMemory(said, hint="a smaller --batch, or a GPU that nothing else uses")
        raise CudaError(said)

    def _text(self, name: str, status: Any) -> str:
        _, text = getattr(self.runtime, name)(status)
        return text.decode() if isinstance(text, bytes) else str(text)

    def use(self) -> None:
        """Makes this the calling thread's GPU; CUDA keeps the choice for each thread apart."""
        self.call("cudaSetDevice", self.device)

    def device_of(self, address: int) -> int:
        """The number of the GPU that an address lies on, -1 for memory of the host."""
        told = self.call("cudaPointerGetAttributes", address)
        kinds = self.runtime.cudaMemoryType
        return int(told.device) if told.type in (kinds.cudaMemoryTypeDevice, kinds.cudaMemoryTypeManaged) else -1

    def take(self, size_bytes: int) -> Block:
        """Memory for a tensor that outlives its engine's calls; ``give_back`` keeps it for the next.

        It is not freed in between because ``cudaFree`` waits for all that the GPU has to do.
        """
        room = 1 << max(size_bytes - 1, 255).bit_length()
        block: Block | None = None
        with suppress(KeyError, IndexError):
            block = self._spare[room].pop()
        if block is None:
            try:
                block = Block(self, room)
            except OutOfMemory:
                self._free_spare()
                block = Block(self, room)
        self._given.add(block)
        return block

    def give_back(self, block: Block) -> None:
        """Ends the use of what ``take`` gave. Called by the garbage collector, at any moment, in any thread: takes no lock."""
        self._given.discard(block)
        self._spare.setdefault(block.size_bytes, deque()).append(block)
        if self._closed and not self._given:
            with suppress(WsssError):  # nobody is there to hear it
                self._release()

    def close(self) -> None:
        """Frees what is the GPU's own, or leaves that to the last tensor still held."""
        if not self._closed:
            self._closed = True
            if not self._given:
                self._release()

    def _release(self) -> None:
        self.use()
        self.copies.close()
        self._free_spare()
        if self._landing is not None:
            self._landing.free()

    def _free_spare(self) -> None:
        for blocks in list(self._spare.values()):
            while blocks:
                blocks.pop().free()

    def to_host(self, tensor: OnDevice) -> npt.NDArray[np.generic]:
        """A copy of a tensor on the host, through pinned memory. Waits until it is computed and copied."""
        self.use()
        with self._to_host:
            if self._landing is None or self._landing.size_bytes < tensor.size_bytes:
                if self._landing is not None:
                    self._landing.free()
                self._landing = None  # not to be used when there is no memory for a larger one
                self._landing = Pinned(self, tensor.size_bytes)
            tensor.block.before_read(self.copies)
            self.copies.copy(self._landing.address, tensor.block.address, tensor.size_bytes, "device_to_host")
            self._landed.record(self.copies)
            tensor.block.after_read(self._landed)
            tensor.check()  # again: a call in another thread may have come between
            self._landed.wait_on_host()
            return self._landing.array(tensor.shape, tensor.dtype).copy()


class Stream:
    """A queue of work on the GPU. Does not wait for the default stream, nor it for this."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.handle = cuda.call("cudaStreamCreateWithFlags", cuda.runtime.cudaStreamNonBlocking)

    def wait(self, event: Event) -> None:
        """What is queued from now on begins after ``event``."""
        self._cuda.call("cudaStreamWaitEvent", self.handle, event.handle, 0)

    def wait_for(self, other: int) -> None:
        """What is queued from now on begins after all that is queued in a stream of someone else, given by its handle."""
        event = Event(self._cuda)
        self._cuda.call("cudaEventRecord", event.handle, other)
        self.wait(event)

    def copy(self, target: int, source: int, size_bytes: int, direction: Direction) -> None:
        """Queues a copy between two addresses. Host memory must be pinned, or the host would wait for it."""
        kind = getattr(self._cuda.runtime.cudaMemcpyKind, _KINDS[direction])
        self._cuda.call("cudaMemcpyAsync", target, source, size_bytes, kind, self.handle)
        self._cuda.copied[direction] += size_bytes

    def finish(self) -> None:
        """Waits on the host until all is done."""
        self._cuda.call("cudaStreamSynchronize", self.handle)

    def close(self) -> None:
        """Finishes and frees it."""
        self.finish()
        self._cuda.call("cudaStreamDestroy", self.handle)


class Event:
    """A point in a stream that other streams, or the host, wait for. Before its first record it is passed."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        runtime = cuda.runtime
        # Blocking: a thread that waits on the host sleeps, and leaves its core to those that decode photographs.
        self.handle = cuda.call("cudaEventCreateWithFlags", runtime.cudaEventDisableTiming | runtime.cudaEventBlockingSync)
        weakref.finalize(self, runtime.cudaEventDestroy, self.handle).atexit = False

    def record(self, stream: Stream) -> None:
        """Moves it to the end of what is queued in ``stream``. Later points include earlier ones of the same stream."""
        self._cuda.call("cudaEventRecord", self.handle, stream.handle)

    def wait_on_host(self) -> None:
        """Waits until the GPU has passed it."""
        self._cuda.call("cudaEventSynchronize", self.handle)

    def passed(self) -> bool:
        """Whether the GPU has passed it; does not wait."""
        (status,) = self._cuda.runtime.cudaEventQuery(self.handle)
        if int(status) == NOT_READY:
            return False
        self._cuda.call("cudaEventQuery", self.handle)
        return True


class Block:
    """A piece of GPU memory, and who uses it."""

    def __init__(self, cuda: Cuda, size_bytes: int) -> None:
        self.cuda, self.size_bytes = cuda, size_bytes
        self.address = int(cuda.call("cudaMalloc", max(size_bytes, 1)))
        self.version = 0
        """Counts how often it was overwritten: a tensor of an earlier version is no more."""
        self._written: Event | None = None
        self._readers: set[Event] = set()
        self._lent = False

    def before_read(self, stream: Stream) -> None:
        """What is queued in ``stream`` from now on finds it written."""
        if self._written is not None:
            stream.wait(self._written)

    def after_read(self, event: Event) -> None:
        """Someone reads it until ``event``."""
        self._readers.add(event)

    def before_write(self, stream: Stream) -> None:
        """What is queued in ``stream`` from now on overwrites it, after all its readers so far.

        Nothing waits for an earlier writer: all who write a block do so in one stream.
        """
        for event in self._readers:
            stream.wait(event)
        if self._lent:  # readers that do not tell us
            stream.wait_for(LEGACY_STREAM)
        self._readers.clear()
        self._lent = False
        self.version += 1

    def after_write(self, event: Event) -> None:
        """It is written after ``event``."""
        self._written = event

    def lend(self) -> None:
        """Someone outside will read it in the default stream: that waits for it, and the next writer for that."""
        if self._written is not None:
            self.cuda.call("cudaStreamWaitEvent", LEGACY_STREAM, self._written.handle, 0)
        self._lent = True

    def overlaps(self, address: int, size_bytes: int) -> bool:
        """Whether memory given by its address is, in part, this."""
        return address < self.address + self.size_bytes and self.address < address + size_bytes

    def free(self) -> None:
        """Returns the memory, after all that the GPU has to do. Its tensors are no more."""
        self.version += 1
        self.cuda.call("cudaFree", self.address)


class Pinned:
    """Page-locked memory of the host: the GPU copies from and to it by itself."""

    def __init__(self, cuda: Cuda, size_bytes: int) -> None:
        self._cuda, self.size_bytes = cuda, max(size_bytes, 1)
        self.address = int(cuda.call("cudaHostAlloc", self.size_bytes, 0))

    def array(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> npt.NDArray[np.generic]:
        """Its first bytes as an array, which ends with it."""
        size_bytes = math.prod(shape) * dtype.itemsize
        return np.frombuffer(memoryview((ctypes.c_uint8 * size_bytes).from_address(self.address)), dtype).reshape(shape)

    def free(self) -> None:
        """Returns it."""
        self._cuda.call("cudaFreeHost", self.address)


class StagingBuffer:
    """Where an input of an engine lands that cannot be read where it is: made at the first such input, then reused.

    Args:
        size_bytes: of the largest input.
    """

    def __init__(self, cuda: Cuda, size_bytes: int) -> None:
        self._cuda, self._size_bytes = cuda, size_bytes
        self.block = Block(cuda, size_bytes)
        self._pinned: list[tuple[Pinned, Event]] = []
        self._turn = 0

    def from_host(self, array: npt.NDArray[np.generic], dtype: np.dtype[np.generic], stream: Stream) -> int:
        """Queues the copy of an array; it may be written to at once. Returns the address on the GPU.

        Two pinned pieces take turns, so that the host fills one while the GPU still copies the other.
        """
        if len(self._pinned) < 2:
            self._pinned.append((Pinned(self._cuda, self._size_bytes), Event(self._cuda)))
        self._turn = (self._turn + 1) % len(self._pinned)
        pinned, sent = self._pinned[self._turn]
        sent.wait_on_host()  # the copy of two calls ago
        np.copyto(pinned.array(array.shape, dtype), array)  # whatever its strides and byte order
        stream.copy(self.block.address, pinned.address, array.nbytes, "host_to_device")
        sent.record(stream)
        return self.block.address

    def from_device(self, address: int, size_bytes: int, stream: Stream) -> int:
        """Queues the copy of GPU memory. Returns the address of the copy."""
        stream.copy(self.block.address, address, size_bytes, "device_to_device")
        return self.block.address

    def free(self) -> None:
        """Returns its memory."""
        self.block.free()
        for pinned, _ in self._pinned:
            pinned.free()


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keeps collected objects from calling CUDA in this thread: that would end a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
