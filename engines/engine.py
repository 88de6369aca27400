"""The protocol of engines, which the runtime calls, and the check of their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np

from ..batch import DeviceTensor, Tensor
from ..errors import FeedError, NotANumber
from ..spec import AxisRange, GraphSpec, TensorSpec


class Engine(Protocol):
    """A loaded graph with a fixed contract; the runtime's only interface to ONNX Runtime, PyTorch and TensorRT."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]: ...
    @property
    def outputs(self) -> Mapping[str, TensorSpec]: ...
    @property
    def axes(self) -> Mapping[str, AxisRange]:
        """Range of every free axis. An engine rejects lengths outside it."""
        ...

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one batch.

        Args:
            feeds: one tensor per name in ``inputs``, of its dtype and shape; on the host, or an output of an
                engine of the same kind. TensorRT also reads tensors with ``__cuda_array_interface__``, without the host.

        Returns:
            One tensor per name in ``outputs``. The engine owns the memory and its next call may overwrite it: copy tensors
            that must live longer with `outliving`.

        Raises:
            FeedError: a name, dtype or shape does not match; says which tensor, what was expected and what was given.
            OutOfMemory: the device has no memory for this call; a smaller one may fit.
        """
        ...


@runtime_checkable
class Reused(Protocol):
    """A tensor in memory that its engine's next call overwrites."""

    def clone(self) -> DeviceTensor: ...


def outliving(tensor: Tensor) -> Tensor:
    """An engine's output that stays valid after the engine's next call: a copy on its device if that would overwrite it."""
    return tensor.clone() if isinstance(tensor, Reused) else tensor


class Resident(DeviceTensor, Protocol):
    """A tensor on an engine's device, of which adjacent rows can be fed."""

    def __getitem__(self, rows: slice, /) -> DeviceTensor: ...


@runtime_checkable
class Uploads(Protocol):
    """An engine to whose device arrays can be copied ahead of the calls that read them."""

    def upload(self, array: np.ndarray) -> np.ndarray | Resident: ...


def uploaded(engine: Engine, array: np.ndarray) -> np.ndarray | Resident:
    """An array to feed several times, or in parts: a copy on the engine's device, if it can read one there."""
    return engine.upload(array) if isinstance(engine, Uploads) else array


class Shaped(Protocol):
    """Anything with a shape and a dtype, as `check_feeds` needs."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[np.generic]: ...


def contract(spec: GraphSpec) -> tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec], Mapping[str, AxisRange]]:
    """The ``inputs``, ``outputs`` and ``axes`` of an engine for a graph."""
    return {each.name: each for each in spec.inputs}, {each.name: each for each in spec.outputs}, dict(spec.axes)


def check_numbers(values: np.ndarray, image: np.ndarray, graph: str) -> None:
    """Raise NotANumber if an output has NaN: no threshold would be reached, and the photograph would be background.

    Args:
        values: (N, ...) floating point; infinities are no fault. image: (N,) the photograph of each row. graph: ``model/graph``.
    """
    wrong = np.isnan(values).any(axis=tuple(range(1, values.ndim)))
    if wrong.any():
        numbers = ", ".join(f"{number + 1}" for number in np.unique(image[wrong]).tolist())
        raise NotANumber(
            f"{graph}: its output is NaN for photograph {numbers} of a batch",
            hint="wsss verify the bundle; one that was exported with --precision fp32 does not overflow",
        )


def check_feeds(where: str, inputs: Mapping[str, TensorSpec], axes: Mapping[str, AxisRange], feeds: Mapping[str, Shaped]) -> None:
    """Raise FeedError unless ``feeds`` match ``inputs``: same names, dtypes, fixed axes, and one length per free axis."""
    if feeds.keys() != inputs.keys():
        raise FeedError(f"{where}: expected the inputs {sorted(inputs)}, got {sorted(feeds)}")
    lengths: dict[str, tuple[int, str]] = {}
    for name, spec in inputs.items():
        shape, dtype = tuple(feeds[name].shape), _dtype_name(feeds[name].dtype)
        if dtype != spec.dtype or len(shape) != len(spec.shape):
            raise FeedError(f"{where}: expected {spec}, got {dtype}{shape}")
        for axis, length in zip(spec.shape, shape, strict=True):
            if isinstance(axis, int):
                if length != axis:
                    raise FeedError(f"{where}: expected {spec}, got {dtype}{shape}")
                continue
            expected, first = lengths.setdefault(axis, (length, name))
            if length != expected:
                raise FeedError(f"{where}: {first!r} has {axis}={expected}, but {name!r} has {axis}={length}")
            if axis in axes and not axes[axis].min <= length <= axes[axis].max:
                raise FeedError(
                    f"{where}: {name!r} has {axis}={length}, the engine takes {axes[axis].min} to {axes[axis].max}",
                    hint="feed in chunks, or export with a wider range",
                )


@lru_cache(maxsize=64)
def _dtype_name(dtype: np.dtype[np.generic]) -> str:
    return np.dtype(dtype).name  # cached: numpy builds the name on every access, which took longer than all other checks
