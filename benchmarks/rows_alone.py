"""The part of the parity gate that needs no PyTorch: each row of a batch against the graph's own result for that row alone.

It finds a graph that mixes its rows, a damaged file, and a graph that is not the one of its manifest. It does not find a graph
that computes something else than the official module. Inputs are random (`feeds`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..engines.opening import open_graph
from ..errors import ParityError
from ..spec import GraphSpec, Model
from .feeds import Feeds, feeds_for, load_of, row_axis

ROWS = 3
ALLOWED = {"fp32": 1e-3, "fp16": 3e-2}
"""Largest relative difference of a row, by the graph's precision. A kernel may add in another order for another batch size."""


@dataclass(frozen=True, kw_only=True)
class RowsAlone:
    """Result for one graph."""

    rows: int
    """Rows of the batch; 0 if its entries depend on each other, so that the graph was only run."""
    skipped: int = 0
    """Rows for which the graph chose otherwise between near-equal values, so that they cannot be compared."""
    worst: float = 0.0
    """Largest relative difference of an output of a row."""


def check_rows(model: Model, graph: str) -> RowsAlone:
    """Run a graph in ONNX Runtime on the CPU with several rows, and with each row alone.

    Raises:
        ParityError: a row differs, or is not finite. BundleError: the graph cannot be loaded, or is not that of its manifest.
    """
    spec = model.graph(graph)
    engine = open_graph(model, graph, "ort", device="cpu")
    axis = row_axis(spec, spec.axes)
    load = load_of(spec, spec.axes, min(ROWS, spec.axes[axis].max))
    feeds = _with_sizes(feeds_for(model, graph, load))
    together = _run(engine(feeds))
    where = f"{model.manifest.family}/{graph}"
    if not all(tensor.shape and tensor.shape[0] == axis for tensor in spec.outputs):
        return RowsAlone(rows=0)
    worst, skipped = 0.0, 0
    for row in range(load.rows):
        alone = _run(engine(_row(spec, axis, feeds, row)))
        got = {name: value[row : row + 1] for name, value in together.items()}
        if any(not np.array_equal(got[name], alone[name]) for name in got if got[name].dtype == np.int64):
            skipped += 1
            continue
        for name in got:
            worst = max(worst, _difference(where, spec, name, row, got[name], alone[name]))
    if skipped == load.rows:
        raise ParityError(f"{where}: chooses otherwise in every row of a batch than for the row alone", hint="export it again")
    return RowsAlone(rows=load.rows, skipped=skipped, worst=worst)


def lines_of(found: Mapping[str, RowsAlone]) -> Iterator[str]:
    """One line for each graph."""
    for name, each in found.items():
        skipped = f", {each.skipped} not comparable (near-equal scores)" if each.skipped else ""
        result = f"{each.rows} rows equal those alone within {each.worst:.1e}{skipped}" if each.rows else "runs"
        yield f"{name:28} {result}"


def _row(spec: GraphSpec, axis: str, feeds: Feeds, row: int) -> Feeds:
    shapes = {tensor.name: tensor.shape for tensor in spec.inputs}
    return {name: value[row : row + 1] if shapes[name][0] == axis else value for name, value in feeds.items()}


def _with_sizes(feeds: Feeds) -> Feeds:
    """The same with another size of the photograph in each row."""
    if "size" not in feeds:
        return feeds
    size = feeds["size"].copy()
    size[:, 0] -= np.arange(len(size)) * size[:, 0] // 5
    return {**feeds, "size": size}


def _run(outputs: Mapping[str, object]) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in outputs.items()}


def _difference(where: str, spec: GraphSpec, name: str, row: int, got: np.ndarray, alone: np.ndarray) -> float:
    finite = np.isfinite(alone)  # logits of padded tokens are minus infinity
    if not np.array_equal(got[~finite], alone[~finite]) or np.isnan(alone).any():
        raise ParityError(f"{where}: output {name!r}, row {row}: not a number", hint="export it again")
    apart = np.linalg.norm(got[finite].astype(np.float64) - alone[finite])
    error = float(apart / max(float(np.linalg.norm(alone[finite].astype(np.float64))), 1e-12))
    allowed = ALLOWED[spec.precision]
    if error > allowed:
        raise ParityError(
            f"{where}: output {name!r}, row {row} of a batch of {ROWS}: differs by {error:.2g} from the same row alone; "
            f"allowed: {allowed:g}",
            hint="the file was changed or damaged: export it again",
        )
    return error
