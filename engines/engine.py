"""The seam between the runtime and whatever computes: the engine protocol and the check of what is fed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np

from ..batch import DeviceTensor, Tensor
from ..errors import FeedError
from ..spec import AxisRange, GraphSpec, TensorSpec


class Engine(Protocol):
    """A loaded graph with a fixed contract: all that the runtime knows of ONNX Runtime, PyTorch or TensorRT."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]: ...
    @property
    def outputs(self) -> Mapping[str, TensorSpec]: ...
    @property
    def axes(self) -> Mapping[str, AxisRange]:
        """Range of every free axis. An engine refuses what lies outside."""
        ...

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one batch.

        Args:
            feeds: one tensor per name in ``inputs``, of its dtype and shape; on the host, or an output of an
                engine of the same kind. TensorRT also reads, where it is, all that has ``__cuda_array_interface__``.

        Returns:
            One tensor per name in ``outputs``. The memory is the engine's and the next call may overwrite it: what must
            live longer goes through `outliving`.

        Raises:
            FeedError: a name, dtype or shape does not fit; says which tensor, what was expected and what came.
            OutOfMemory: the device has no memory for this call; a smaller one may fit.
        """
        ...


@runtime_checkable
class Reused(Protocol):
    """A tensor in memory that its engine's next call overwrites."""

    def clone(self) -> DeviceTensor: ...


def outliving(tensor: Tensor) -> Tensor:
    """An engine's output for longer than until its next call: a copy on its device where that would overwrite it."""
    return tensor.clone() if isinstance(tensor, Reused) else tensor


class Shaped(Protocol):
    """What a feed is checked by."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[np.generic]: ...


def contract(spec: GraphSpec) -> tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec], Mapping[str, AxisRange]]:
    """What every engine says of itself: its inputs and outputs by name, and the range of every free axis."""
    return {each.name: each for each in spec.inputs}, {each.name: each for each in spec.outputs}, dict(spec.axes)


def check_feeds(where: str, inputs: Mapping[str, TensorSpec], axes: Mapping[str, AxisRange], feeds: Mapping[str, Shaped]) -> None:
    """Raises FeedError unless ``feeds`` fit ``inputs``: same names, dtypes, fixed axes, and one length per free axis."""
    if feeds.keys() != inputs.keys():
        raise FeedError(f"{where}: expected the inputs {sorted(inputs)}, got {sorted(feeds)}")
    lengths: dict[str, tuple[int, str]] = {}
    for name, spec in inputs.items():
        shape, dtype = tuple(feeds[name].shape), _name_of(feeds[name].dtype)
        if dtype != spec.dtype or len(shape) != len(spec.shape):
            raise FeedError(f"{where}: expected {spec}, got {dtype}{shape}")
        for axis, length in zip(spec.shape, shape, strict=True):
            if isinstance(axis, int):
                if length != axis:
                    raise FeedError(f"{where}: expected {spec}, got {dtype}{shape}")
                continue
            known, first = lengths.setdefault(axis, (length, name))
            if length != known:
                raise FeedError(f"{where}: {first!r} has {axis}={known}, but {name!r} has {axis}={length}")
            if axis in axes and not axes[axis].min <= length <= axes[axis].max:
                raise FeedError(
                    f"{where}: {name!r} has {axis}={length}, the engine takes {axes[axis].min} to {axes[axis].max}",
                    hint="feed in chunks, or export with a wider range",
                )


@lru_cache(maxsize=64)
def _name_of(dtype: np.dtype[np.generic]) -> str:
    return np.dtype(dtype).name  # numpy puts it together anew each time, which took longer than all other checks
