"""A scripted engine: for tests of the runtime and for measuring the host path without a model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, MutableSequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..batch import Tensor
from ..spec import GraphSpec
from .engine import check_feeds, contract

Script = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


@dataclass(frozen=True, slots=True)
class Queued:
    """An output that is computed at a moment still to come; whoever looks at its values waits for it, as with a GPU's."""

    values: np.ndarray
    at: float
    """As ``perf_counter`` tells time."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype[np.generic]:
        return self.values.dtype

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[np.generic]:
        _sleep_until(self.at)
        values = self.values if dtype is None else self.values.astype(dtype, copy=False)
        return values.copy() if copy else values


class FakeEngine:
    """Answers with ``script(feeds)``, holds both sides to the contract, and remembers what it was fed.

    Args:
        spec: the contract it plays.
        script: from host arrays by input name to host arrays by output name.
        seconds: how long every call takes, one after another.
        queued: a call returns at once and its outputs come when it is computed, as TensorRT's do (`engines.trt`).
    """

    def __init__(self, spec: GraphSpec, script: Script, *, seconds: float = 0.0, queued: bool = False) -> None:
        self.inputs, self.outputs, self.axes = contract(spec)
        self._script, self._seconds, self._queued = script, seconds, queued
        self._queueing, self._free_at = threading.Lock(), 0.0
        self.ends: list[float] = []
        """With ``seconds``: when each call was computed (``perf_counter``)."""
        self.calls: MutableSequence[dict[str, tuple[int, ...]]] = []
        """Shape of every input of every call so far."""

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        check_feeds("fake", self.inputs, self.axes, feeds)
        self.calls.append({name: tuple(tensor.shape) for name, tensor in feeds.items()})
        if self._seconds:
            with self._queueing:
                self._free_at = max(time.perf_counter(), self._free_at) + self._seconds
                self.ends.append(end := self._free_at)
            if not self._queued:
                _sleep_until(end)
        answers = dict(self._script({name: np.asarray(tensor) for name, tensor in feeds.items()}))
        free = {
            axis: length
            for spec in self.inputs.values()
            for axis, length in zip(spec.shape, feeds[spec.name].shape, strict=True)
            if isinstance(axis, str)
        }
        check_feeds("fake (its script's answer)", self.outputs, {}, answers)
        for spec in self.outputs.values():
            for axis, length in zip(spec.shape, answers[spec.name].shape, strict=True):
                assert not isinstance(axis, str) or free.get(axis, length) == length, f"script: {spec} has {axis}={length}"
        if self._seconds and self._queued:
            return {name: Queued(answers[name], end) for name in self.outputs}
        return {name: answers[name] for name in self.outputs}


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.perf_counter()))
