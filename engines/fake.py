"""A scripted engine: for tests of the runtime and for measuring the host path without a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

from ..batch import Tensor
from ..spec import GraphSpec
from .engine import check_feeds, contract

Script = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


class FakeEngine:
    """Answers with ``script(feeds)``, holds both sides to the contract, and remembers what it was fed.

    Args:
        spec: the contract it plays.
        script: from host arrays by input name to host arrays by output name.
        seconds: how long every call takes at least.
    """

    def __init__(self, spec: GraphSpec, script: Script, *, seconds: float = 0.0) -> None:
        self.inputs, self.outputs, self.axes = contract(spec)
        self._script, self._seconds = script, seconds
        self.calls: list[dict[str, tuple[int, ...]]] = []
        """Shape of every input of every call so far."""

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        check_feeds("fake", self.inputs, self.axes, feeds)
        self.calls.append({name: tuple(tensor.shape) for name, tensor in feeds.items()})
        if self._seconds:
            time.sleep(self._seconds)
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
        return {name: answers[name] for name in self.outputs}
