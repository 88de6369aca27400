"""A device that several stages share: engines take turns, and calls that do not fit in its memory are made smaller."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

import numpy as np

from ..batch import Tensor
from ..engines.engine import Engine, Resident, uploaded
from ..errors import OutOfMemory
from ..spec import AxisRange, TensorSpec

P = ParamSpec("P")
R = TypeVar("R")

CUTS = ("batch", "phrases", "boxes", "height")
"""Axes along which stages split their calls; the results do not depend on the size of the parts."""


class CutSmaller(Exception):
    """An engine has lowered the range of an axis after running out of memory: the stage must split its calls again."""


class FairLock:
    """A semaphore that serves threads in the order of their requests. Python's own locks would go back to the stage that has
    just released one, and starve the stages that prepare its next input.

    Args:
        at_once: how many threads may hold it at the same time.
    """

    def __init__(self, at_once: int) -> None:
        self._mutex = threading.Lock()
        self._queue: deque[threading.Lock] = deque()
        self._free = at_once

    def __enter__(self) -> None:
        with self._mutex:
            if self._free:
                self._free -= 1
                return
            ticket = threading.Lock()
            ticket.acquire()
            self._queue.append(ticket)
        ticket.acquire()  # waits until a holder releases it

    def __exit__(self, *_: object) -> None:
        with self._mutex:
            if self._queue:
                self._queue.popleft().release()
            else:
                self._free += 1


class Device:
    """Limits how many engines compute at once: more are not faster, and each needs its memory.

    ``seconds``: the sum of all calls' times so far. ``warn``: called when calls are made smaller.

    Args:
        at_once: on a GPU two, so that one computes while the other's inputs and results are copied.
        queues: whether an engine's call returns when it is queued (TensorRT), not when it is computed (ONNX Runtime).
    """

    def __init__(self, at_once: int = 2, *, queues: bool = True) -> None:
        self.callers = 1 if queues else at_once
        """Threads that should call one engine, so that the device has the next call when one ends. An engine whose calls block
        gives each caller its own results."""
        self.seconds = 0.0
        self.warn: Callable[[str], None] = lambda message: None
        self.turn = FairLock(at_once + self.callers - 1)  # callers that wait inside an engine do not take the turn of another
        self._counting = threading.Lock()
        self._waited = threading.local()

    def engine(self, engine: Engine, name: str) -> Engine:
        """The engine, which takes turns on this device."""
        return _OnDevice(engine, name, self)

    def add_seconds(self, seconds: float) -> None:
        """Count a call's time."""
        with self._counting:
            self.seconds += seconds

    def waited(self) -> float:
        """Seconds that this thread has waited for its turn so far."""
        return getattr(self._waited, "seconds", 0.0)

    def add_wait(self, seconds: float) -> None:
        """Count a wait of this thread."""
        self._waited.seconds = self.waited() + seconds


class _OnDevice:
    def __init__(self, engine: Engine, name: str, device: Device) -> None:
        self._engine, self._name, self._device = engine, name, device
        self._limits: dict[str, int] = {}

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return self._engine.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return self._engine.outputs

    @property
    def axes(self) -> Mapping[str, AxisRange]:
        if not self._limits:
            return self._engine.axes
        return {name: self._lowered(name, axis) for name, axis in self._engine.axes.items()}

    def _lowered(self, name: str, axis: AxisRange) -> AxisRange:
        limit = self._limits.get(name, axis.max)
        return AxisRange(axis.min, min(axis.opt, limit), limit)

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        requested = time.perf_counter()
        with self._device.turn:
            started = time.perf_counter()
            self._device.add_wait(started - requested)
            try:
                return self._engine(feeds)
            except OutOfMemory:
                if not self._halve(feeds):
                    raise
            finally:
                self._device.add_seconds(time.perf_counter() - started)
        raise CutSmaller

    def upload(self, array: np.ndarray) -> np.ndarray | Resident:
        return uploaded(self._engine, array)

    def _halve(self, feeds: Mapping[str, Tensor]) -> bool:
        lengths = {
            axis: length
            for name, spec in self.inputs.items()
            for axis, length in zip(spec.shape, feeds[name].shape, strict=True)
            if isinstance(axis, str)
        }
        for axis in CUTS:
            if axis in lengths and lengths[axis] > self.axes[axis].min:
                limit = self._limits[axis] = max(lengths[axis] // 2, self.axes[axis].min)
                self._device.warn(f"{self._name}: out of memory with {axis} = {lengths[axis]}; going on with {limit}")
                return True
        return False


def cut_to_fit(stage: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a stage, and call it again whenever one of its engines requires smaller calls.

    Raises:
        OutOfMemory: even the smallest call does not fit.
    """
    while True:
        try:
            return stage(*args, **kwargs)
        except CutSmaller:
            continue
