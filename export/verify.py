"""The parity gate: an exported graph must compute what the official implementation computes, row by row.

The graph runs at batch 1, 2 and the largest. Each row is compared with the official module at batch 1, and with the graph's
result for that row alone: a graph can agree on average and still leak one row into its neighbor.

Rows differ in pixels, sizes, captions and boxes. Where a row takes seconds (`Graph.distinct`) there are only a few different
inputs, in an order (`arranged`) in which neighbors differ, and in which rows that were shifted, reversed, repeated or read with
a wrong stride change the result of some row. Two rows with equal inputs may then mix without being noticed, if no other rows do.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping

import numpy as np

from ..engines.engine import Engine
from ..errors import ParityError
from ..spec import Parity, ParityRow
from .family import Feeds, Graph, Tolerance

SEED = 20_240_510
"""Seed of the gate's inputs; tracing uses another."""


Progress = Callable[[int, int], None]
"""Called with the work that is done, and all of it, in computations of one row."""
REFERENCE_ROWS = 2
"""The official computation of a row takes about as long as two rows of a graph in ONNX Runtime (Grounding-DINO 27 and 12 CPU
seconds at 800 x 1088)."""


class References:
    """Results of a graph's official reference, each computed once: engines of one graph can share them."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._known: dict[bytes, Feeds] = {}

    def __call__(self, feeds: Feeds, outputs: Feeds) -> Feeds:
        """The reference for feeds, and for the choices between near ties in ``outputs``. Raises ParityError as the reference."""
        tied = {} if self._graph.ties is None else {self._graph.ties: outputs[self._graph.ties]}
        digest = hashlib.sha256()
        for name, value in sorted({**feeds, **tied}.items()):
            digest.update(f"{name} {value.dtype} {value.shape} ".encode())
            digest.update(np.ascontiguousarray(value).data)
        key = digest.digest()
        if key not in self._known:
            self._known[key] = self._graph.reference(feeds, outputs)
        return self._known[key]


def gate(
    graph: Graph,
    engine: Engine,
    *,
    engine_name: str,
    reference_name: str,
    where: str,
    progress: Progress = lambda done, of: None,
    references: References | None = None,
    largest: int | None = None,
) -> Parity:
    """Compare ``engine`` with the official computation of ``graph``.

    Args:
        references: results of the reference from the gate of another engine of the same graph; receives those computed here.
        largest: the largest batch; None takes that of the graph.

    Returns:
        The worst row for each output, batch size and kind of comparison.

    Raises:
        ParityError: a row is outside its tolerance or not finite; says which output, which row, and the error.
    """
    sizes = _sizes(graph, largest)
    references = references or References(graph)
    compare = _gate_whole if graph.whole else _gate_rows
    return Parity(
        engine=engine_name,
        reference=reference_name,
        tolerance={name: str(tolerance) for name, tolerance in graph.tolerance.items()},
        rows=tuple(compare(graph, engine, sizes, where, progress, references)),
    )


def _sizes(graph: Graph, largest: int | None) -> list[int]:
    rows = graph.axes[graph.row_axis]
    most = rows.max if largest is None else max(rows.min, min(largest, rows.max))
    return sorted({rows.min, max(rows.min, min(2, most)), most})


def work_of(graph: Graph, largest: int | None = None) -> tuple[int, int, int]:
    """The work of a gate: rows that the graph computes, those that the reference computes, and the rows of the largest batch."""
    sizes = _sizes(graph, largest)
    if graph.whole:
        return sum(sizes), len(sizes), sizes[-1]
    inputs = min(sizes[-1], graph.distinct or sizes[-1])
    return sum(sizes) + inputs - (sizes[0] == 1), inputs, sizes[-1]


def arranged(rows: int, inputs: int) -> list[int]:
    """The input of each row of a batch, 0 to ``inputs`` - 1, by which wrong rows are noticed.

    The first rows have different inputs, and neighbors differ. For each distance two rows that far apart differ, so that one row
    read by all, and rows that are shifted or reversed, change some result. Of random orders with these properties, the one in
    which the fewest readings of row ``a * i + b`` (modulo the number of rows) instead of row ``i`` remain unnoticed.

    Args:
        inputs: 3 or more, unless there are no more rows.
    """
    if inputs >= rows:
        return list(range(rows))
    assert inputs > 2, "of three rows with two inputs whose neighbors differ, the outer ones are equal"
    index = np.arange(rows)
    readings = np.array([(a * index + b) % rows for a in range(rows) for b in range(rows)])
    rng = np.random.default_rng(0)
    best: tuple[int, list[int]] | None = None
    for tried in itertools.count():
        steps = rng.integers(1, inputs, rows)
        steps[:inputs] = [0, *[1] * (inputs - 1)]
        order = steps.cumsum() % inputs
        shifted = all((order[:-by] != order[by:]).any() and (np.roll(order, by) != order).any() for by in range(1, rows))
        if shifted and (order[::-1] != order).any():
            unnoticed = int((order[readings] == order).all(axis=1).sum())
            if best is None or unnoticed < best[0]:
                best = unnoticed, [int(each) for each in order]
        if best is not None and (tried > 50 or best[0] == 1):  # the right reading
            return best[1]
    raise AssertionError


def _gate_rows(
    graph: Graph, engine: Engine, sizes: list[int], where: str, progress: Progress, references: References
) -> list[ParityRow]:
    computed, inputs, _ = work_of(graph, sizes[-1])
    feeds = graph.sample(inputs, SEED)
    alone: dict[int, Feeds] = {}
    referred: set[int] = set()
    worst: list[ParityRow] = []
    done, of = 0, computed + REFERENCE_ROWS * inputs

    def advance(by: int) -> None:
        nonlocal done
        done = min(done + by, of)  # near ties need more references
        progress(done, of)

    def reference(row: int, which: int, row_feeds: Feeds, outputs: Feeds, batch: int) -> Feeds:
        try:
            found = references(row_feeds, outputs)
        except ParityError as error:  # the graph's choice was not a near tie
            raise ParityError(f"{where}: row {row} of batch {batch}: {error.message}") from None
        if which not in referred:
            referred.add(which)
            advance(REFERENCE_ROWS)
        return found

    for batch in sizes:
        order = arranged(batch, min(batch, inputs))
        outputs = _run(engine, graph.take(feeds, order))
        advance(batch)
        rows: list[ParityRow] = []
        for row, which in enumerate(order):
            row_feeds = graph.take(feeds, [which])
            got = {name: value[row : row + 1] for name, value in outputs.items()}
            if which not in alone:
                alone[which] = got if batch == 1 else _run(engine, row_feeds)
                advance(batch > 1)
            want, single = reference(row, which, row_feeds, got, batch), alone[which]
            rows += _compare(graph.tolerance, got, want, batch=batch, row=row, against="reference", where=where)
            if batch == 1:
                continue
            if graph.ties is None or np.array_equal(got[graph.ties], single[graph.ties]):
                want = {**want, **single}  # keeps the arrays that the measures of ties read
                rows += _compare(graph.tolerance, got, want, batch=batch, row=row, against="alone", where=where)
            else:  # other choices between near ties change the outputs: the single row is compared with its own reference
                want = reference(row, which, row_feeds, single, 1)
                _compare(graph.tolerance, single, want, batch=1, row=row, against="reference", where=where)
        worst += _worst(rows)
    return worst


def _gate_whole(
    graph: Graph, engine: Engine, sizes: list[int], where: str, progress: Progress, references: References
) -> list[ParityRow]:
    rows = []
    for number, size in enumerate(sizes, 1):
        feeds = graph.sample(size, SEED)
        got = _run(engine, feeds)
        want = references(feeds, got)
        rows += _compare(graph.tolerance, got, want, batch=size, row=0, against="reference", where=where)
        progress(number, len(sizes))
    return rows


def _run(engine: Engine, feeds: Feeds) -> Feeds:
    """A copy of the outputs, because the engine's next call overwrites them."""
    return {name: np.array(value) for name, value in engine(feeds).items()}


def _compare(
    tolerance: Mapping[str, Tolerance], got: Feeds, want: Feeds, *, batch: int, row: int, against: str, where: str
) -> list[ParityRow]:
    rows = []
    for name, allowed in tolerance.items():
        place = f"{where}: output {name!r}, row {row} of batch {batch}, against {against}"
        if got[name].shape != want[name].shape:
            raise ParityError(f"{place}: shape {got[name].shape}, expected {want[name].shape}")
        error, worst = allowed.measure(got, want, name)
        if not np.isfinite(worst) or not error <= allowed.relative or worst > (allowed.absolute or np.inf):
            raise ParityError(
                f"{place}: error {error:.3g}, largest difference {worst:.3g}; allowed: {allowed}",
                hint="the exported graph does not compute what the official module computes and was not kept",
            )
        rows.append(ParityRow(output=name, batch=batch, row=row, against=against, error=error, worst=worst))  # type: ignore[arg-type]
    return rows


def _worst(rows: list[ParityRow]) -> list[ParityRow]:
    worst: dict[tuple[str, str], ParityRow] = {}
    for row in rows:
        key = (row.output, row.against)
        if key not in worst or row.error > worst[key].error:
            worst[key] = row
    return list(worst.values())


def padded_photographs(canvas: tuple[int, int], rows: int, seed: int) -> Feeds:
    """Feeds ``pixels`` and ``size`` of an image graph: photographs of different sizes, with noise in the padding.

    Args:
        canvas: (height, width).
    """
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (rows, *canvas, 3), dtype=np.uint8)
    size = np.full((rows, 2), canvas, dtype=np.int64)
    for row in range(rows):
        if row % 3 < 2:
            size[row, row % 3] = rng.integers(canvas[row % 3] // 2, canvas[row % 3])
        height, width = size[row]
        pixels[row, :height, :width] = photograph(rng, height, width)
    return {"pixels": pixels, "size": size}


def photograph(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Random pixels with the falling spectrum of a photograph: (height, width, 3) uint8.

    White noise would hide errors of resampling and of channel order, because all its scales and channels are alike.
    """
    scene = np.zeros((height, width, 3))
    for cells in (2, 5, 11, 23, 47):
        rows = np.linspace(0, cells - 1e-6, height)
        columns = np.linspace(0, cells - 1e-6, width)
        knots = rng.normal(size=(cells + 2, cells + 2, 3)) / cells**0.7
        r, c = rows.astype(int), columns.astype(int)
        fr, fc = (rows - r)[:, None, None], (columns - c)[None, :, None]
        top = knots[r][:, c] * (1 - fc) + knots[r][:, c + 1] * fc
        bottom = knots[r + 1][:, c] * (1 - fc) + knots[r + 1][:, c + 1] * fc
        scene += top * (1 - fr) + bottom * fr
    tint = rng.uniform(60, 190, size=3)
    return np.clip(scene * rng.uniform(50, 110) + tint + rng.normal(0, 4, scene.shape), 0, 255).astype(np.uint8)
