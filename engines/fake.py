"""A scripted engine, for tests of the runtime and for measuring the host's work without a model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, MutableSequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..batch import Tensor
from ..errors import FeedError
from ..spec import GraphSpec
from .engine import check_feeds, contract

Script = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


@dataclass(frozen=True, slots=True)
class Queued:
    """An output that is computed at a later time; reading its values waits for that, as with outputs on a GPU."""

    values: np.ndarray
    at: float
    """Time of ``perf_counter`` at which it is computed."""

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
    """An engine that returns ``script(feeds)``, checks inputs and outputs against the contract, and records its calls.

    Args:
        spec: the contract.
        script: from host arrays by input name to host arrays by output name.
        seconds: duration of every call; calls run one after another.
        queued: calls return at once and their outputs are `Queued`, like those of TensorRT (`engines.trt`).
    """

    def __init__(self, spec: GraphSpec, script: Script, *, seconds: float = 0.0, queued: bool = False) -> None:
        self.inputs, self.outputs, self.axes = contract(spec)
        self.script = script
        """May be replaced between calls."""
        self._seconds, self._queued = seconds, queued
        self._queueing, self._free_at = threading.Lock(), 0.0
        self.ends: list[float] = []
        """With ``seconds``: the time at which each call was computed (``perf_counter``)."""
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
        outputs = dict(self.script({name: np.asarray(tensor) for name, tensor in feeds.items()}))
        free = {
            axis: length
            for spec in self.inputs.values()
            for axis, length in zip(spec.shape, feeds[spec.name].shape, strict=True)
            if isinstance(axis, str)
        }
        check_feeds("fake (outputs of the script)", self.outputs, {}, outputs)
        for spec in self.outputs.values():
            for axis, length in zip(spec.shape, outputs[spec.name].shape, strict=True):
                assert not isinstance(axis, str) or free.get(axis, length) == length, f"script: {spec} has {axis}={length}"
        if self._seconds and self._queued:
            return {name: Queued(outputs[name], end) for name in self.outputs}
        return {name: outputs[name] for name in self.outputs}


def without_padding(pixels: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Set the padding of a batch to black, as `export/sam/family.py` zeroes it in the graph.

    Scripts that read pixels should use this, so that a wrong ``size`` changes their result.

    Args:
        pixels: (B, H, W, 3) uint8. size: (B, 2) int64, valid (height, width) of each row, within the canvas.

    Returns:
        (B, H, W, 3) uint8, a copy.

    Raises:
        FeedError: a size that is not within the canvas.
    """
    canvas = pixels.shape[1:3]
    if ((size < 1) | (size > canvas)).any():
        raise FeedError(f"fake: expected valid sizes from 1 x 1 to {canvas[0]} x {canvas[1]}, got {size.tolist()}")
    rows = np.arange(canvas[0]) < size[:, :1]  # (B, H)
    columns = np.arange(canvas[1]) < size[:, 1:]  # (B, W)
    return np.where((rows[:, :, None] & columns[:, None, :])[..., None], pixels, np.uint8(0))


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.perf_counter()))
