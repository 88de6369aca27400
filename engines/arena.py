"""Activation memory that the engines of one GPU share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from .buffers import Block, Cuda, Event, Stream

_arenas: dict[tuple[ModuleType, int], Arena] = {}
_opening = threading.RLock()  # reentrant: collecting an engine inside of it closes the engine


class Arena:
    """Memory for the activations of whichever engine computes: one for all engines of a GPU in this process.

    The rule: engines compute one after another, in the order of their calls. Each has its own stream, so copies of inputs and
    results still overlap with another engine's run; only the run itself waits for the one before, on the GPU. A large network
    fills a GPU alone, and in return a chain needs the memory of its largest call, not the sum over its engines.

    It is as large as the largest call so far needs (``update_device_memory_size_for_shapes``; an engine of the full TensorRT
    may need the memory of its largest call for every call, unless it was built with RUNTIME_ACTIVATION_RESIZE_10_10, which
    TensorRT-RTX always does). Where it must grow it moves, which makes CUDA graphs invalid that contain its address;
    ``generation`` counts that.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.generation = 0
        self._cuda, self._users = cuda, 0
        self._block: Block | None = None
        self._ended = Event(cuda)
        self._turn = threading.Lock()

    @property
    def address(self) -> int:
        """Of the memory; 0 without any."""
        return self._block.address if self._block else 0

    @property
    def size_bytes(self) -> int:
        """Of the memory."""
        return self._block.size_bytes if self._block else 0

    @contextmanager
    def turn(self, stream: Stream) -> Iterator[None]:
        """Work that is queued in ``stream`` meanwhile has the memory for itself."""
        with self._turn:
            stream.wait(self._ended)
            try:
                yield
            finally:
                self._ended.record(stream)

    def reserve(self, size_bytes: int) -> None:
        """Grow to at least this size; in a `turn`. Raises OutOfMemory, after which the memory is gone."""
        if self._block is not None and size_bytes <= self._block.size_bytes:
            return
        if self._block is not None:
            self._ended.wait_on_host()
        self.generation += 1
        self._free()  # first: both together may not fit
        self._block = Block(self._cuda, size_bytes)

    def leave(self) -> None:
        """End the use by one engine; the last one frees the memory."""
        with _opening:
            self._users -= 1
            if self._users == 0:
                del _arenas[self._cuda.runtime, self._cuda.device]
                self._free()

    def _free(self) -> None:
        block, self._block = self._block, None
        if block is not None:
            block.free()


def shared_arena(cuda: Cuda) -> Arena:
    """The arena of a GPU. Each engine that asks for it has to `Arena.leave` it."""
    with _opening:
        key = cuda.runtime, cuda.device
        arena = _arenas.get(key) or _arenas.setdefault(key, Arena(cuda))
        arena._users += 1
        return arena
