"""One device, used by several stages at once: its engines take turns, and a call too large for its memory is made smaller."""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

from ..batch import Tensor
from ..engines.engine import Engine
from ..errors import OutOfMemory
from ..spec import AxisRange, TensorSpec

P = ParamSpec("P")
R = TypeVar("R")

CUTS = ("batch", "phrases", "boxes", "height")
"""Axes along which the stages cut their calls, whatever the size: the results are the same."""


class CutSmaller(Exception):
    """An engine lowered the range of an axis after running out of memory: whoever cut the calls must cut them again."""


class FairLock:
    """Turns are given in the order of asking. A lock of Python's would go back to the stage that has just let it go, and
    starve those that make that stage's next input.

    Args:
        at_once: how many have a turn at the same time.
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
            mine = threading.Lock()
            mine.acquire()
            self._queue.append(mine)
        mine.acquire()  # until the one before hands over

    def __exit__(self, *_: object) -> None:
        with self._mutex:
            if self._queue:
                self._queue.popleft().release()
            else:
                self._free += 1


class Device:
    """Lets few engines compute at once: more are no faster, and need the memory of all.

    ``seconds``: how long calls took so far, added up. ``warn``: told when calls are made smaller.

    Args:
        at_once: on a GPU two, so that one computes while the other's inputs and results are on their way.
        queues: an engine's call returns when it is queued (TensorRT's), not when it is computed (ONNX Runtime's).
    """

    def __init__(self, at_once: int = 2, *, queues: bool = True) -> None:
        self.callers = 1 if queues else at_once
        """Threads that should call one engine, so that the device has its next call when it ends one. An engine that holds
        its callers gives each of them results of its own."""
        self.seconds = 0.0
        self.warn: Callable[[str], None] = lambda message: None
        self.turn = FairLock(at_once + self.callers - 1)  # who waits within an engine takes no other's turn
        self._counting = threading.Lock()
        self._waited = threading.local()

    def engine(self, engine: Engine, name: str) -> Engine:
        """The engine, taking its turns on this device."""
        return _OnDevice(engine, name, self)

    def add_seconds(self, seconds: float) -> None:
        """Counts a call."""
        with self._counting:
            self.seconds += seconds

    def waited(self) -> float:
        """Seconds that this thread has waited for its turns so far."""
        return getattr(self._waited, "seconds", 0.0)

    def add_wait(self, seconds: float) -> None:
        """Counts a wait of this thread."""
        self._waited.seconds = self.waited() + seconds


class _OnDevice:
    def __init__(self, engine: Engine, name: str, device: Device) -> None:
        self._engine, self._name, self._device = engine, name, device
        self._most: dict[str, int] = {}

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return self._engine.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return self._engine.outputs

    @property
    def axes(self) -> Mapping[str, AxisRange]:
        if not self._most:
            return self._engine.axes
        return {name: self._lowered(name, axis) for name, axis in self._engine.axes.items()}

    def _lowered(self, name: str, axis: AxisRange) -> AxisRange:
        most = self._most.get(name, axis.max)
        return AxisRange(axis.min, min(axis.opt, most), most)

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        asked = time.perf_counter()
        with self._device.turn:
            begun = time.perf_counter()
            self._device.add_wait(begun - asked)
            try:
                return self._engine(feeds)
            except OutOfMemory:
                if not self._halve(feeds):
                    raise
            finally:
                self._device.add_seconds(time.perf_counter() - begun)
        raise CutSmaller

    def _halve(self, feeds: Mapping[str, Tensor]) -> bool:
        lengths = {
            axis: length
            for name, spec in self.inputs.items()
            for axis, length in zip(spec.shape, feeds[name].shape, strict=True)
            if isinstance(axis, str)
        }
        for axis in CUTS:
            if axis in lengths and lengths[axis] > self.axes[axis].min:
                self._most[axis] = max(lengths[axis] // 2, self.axes[axis].min)
                self._device.warn(f"{self._name}: out of memory with {axis} = {lengths[axis]}; going on with {self._most[axis]}")
                return True
        return False


def cut_to_fit(stage: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Calls a stage again as long as one of its engines asks for smaller calls.

    Raises:
        OutOfMemory: not even the smallest call fits.
    """
    while True:
        try:
            return stage(*args, **kwargs)
        except CutSmaller:
            continue


def free_bytes(root: Path = Path("/")) -> int:
    """Memory of the host that this process may still take: what Linux says is available, within its control group's limit.

    Files that the group's processes read count as used by it; they make room when it is asked for.

    Args:
        root: below it lie ``proc`` and ``sys``. Where neither tells, there is no limit.
    """
    told = [1 << 62]
    group = root / "sys/fs/cgroup"
    with suppress(OSError, ValueError, IndexError):
        told.append(1024 * int((root / "proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]))
    for limit, used, stat in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        with suppress(OSError, ValueError):
            files = [line.split()[1] for line in (group / stat).read_text().splitlines() if re.match("(in)?active_file ", line)]
            told.append(int((group / limit).read_text()) - int((group / used).read_text()) + sum(map(int, files)))
    return max(min(told), 0)
