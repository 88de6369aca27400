"""Results of text graphs, kept in the cache folder for later starts: they depend on nothing but the graph and the class list.

CLIP's prompts of 300 classes take 16 s on two cores, and its text engine 250 MB. A file holds a mark, the sha256 of its data, and
the data. It is read only if its content fits; damaged files are computed again.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Mapping

import numpy as np

from ..batch import Tensor
from ..engines.engine import Engine, check_feeds, contract
from ..files import cache_folder, write_atomically
from ..spec import AxisRange, Model, TensorSpec

_log = logging.getLogger("wsss")
MARK = b"wsss-text1"


class RememberedEngine:
    """A graph of one output whose results are kept; its engine is opened only for feeds that are new.

    Args:
        model, graph: from the bundle, with checked files.
        name: of the engine, because each has its own rounding.
        open: opens it.
    """

    def __init__(self, model: Model, graph: str, name: str, open: Callable[[], Engine]) -> None:
        spec = model.graph(graph)
        self.inputs, self.outputs, self._axes = contract(spec)
        self._where = f"{model.folder.name}/{graph}"
        self._identity = f"{name} {spec.file} {sorted(model.manifest.files.items())}".encode()
        self._open = open
        self._engine: Engine | None = None

    @property
    def axes(self) -> Mapping[str, AxisRange]:
        """Those of the engine, which lowers them when it runs out of memory; of the graph until it is opened."""
        return self._axes if self._engine is None else self._engine.axes

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        check_feeds(self._where, self.inputs, self.axes, feeds)
        arrays = {name: np.ascontiguousarray(feeds[name]) for name in self.inputs}
        digest = hashlib.sha256(self._identity)
        for array in arrays.values():
            digest.update(f"{array.dtype} {array.shape} ".encode())
            digest.update(array.data)
        path = cache_folder() / "texts" / digest.hexdigest()
        (output,) = self.outputs.values()
        try:
            kept = _unpacked(path.read_bytes())
        except (OSError, ValueError) as error:
            if not isinstance(error, FileNotFoundError):
                _log.info("%s: computed again: %s", path, error)
        else:
            if _fits(kept, output, arrays, self.inputs):
                return {output.name: kept}
        self._engine = self._engine or self._open()
        value = np.array(self._engine(arrays)[output.name])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, _packed(value), sync=False)
        except OSError as error:
            _log.debug("%s: cannot be kept: %s", path, error)
        return {output.name: value}


def _packed(value: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, value, allow_pickle=False)
    return MARK + hashlib.sha256(file.getvalue()).digest() + file.getvalue()


def _unpacked(data: bytes) -> np.ndarray:
    """Raises ValueError if the data are damaged."""
    body = data[len(MARK) + 32 :]
    if data[: len(MARK) + 32] != MARK + hashlib.sha256(body).digest():
        raise ValueError("its content is damaged")
    value: np.ndarray = np.load(io.BytesIO(body), allow_pickle=False)
    return value


def _fits(value: np.ndarray, output: TensorSpec, feeds: Mapping[str, np.ndarray], inputs: Mapping[str, TensorSpec]) -> bool:
    """Whether a kept array has the dtype and shape of the output for these feeds."""
    lengths = {axis: length for name, spec in inputs.items() for axis, length in zip(spec.shape, feeds[name].shape, strict=True)}
    return value.dtype == output.dtype and value.shape == tuple(lengths.get(axis, axis) for axis in output.shape)
