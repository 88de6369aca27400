"""The parity gate: an exported graph must compute what the official implementation computes, row by row.

The graph runs at batch 1, 2 and the largest, with different pixels, sizes, captions and boxes in every row. Each row is
compared with the official module at batch 1, and with the graph's result for that row alone: a graph can agree on average
and still leak one row into its neighbor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ..engines.engine import Engine
from ..errors import ParityError
from ..spec import Parity, ParityRow
from .family import Feeds, Graph, Tolerance

SEED = 20_240_510
"""Seed of the gate's inputs; tracing uses another."""


Progress = Callable[[int, int], None]
"""Called with the number of rows that were compared, and of all."""


def gate(
    graph: Graph,
    engine: Engine,
    *,
    engine_name: str,
    reference_name: str,
    where: str,
    progress: Progress = lambda done, of: None,
) -> Parity:
    """Compare ``engine`` with the official computation of ``graph``.

    Returns:
        The worst row for each output, batch size and kind of comparison.

    Raises:
        ParityError: a row is outside its tolerance or not finite; says which output, which row, and the error.
    """
    rows = graph.axes[graph.row_axis]
    sizes = sorted({rows.min, min(2, rows.max), rows.max})
    return Parity(
        engine=engine_name,
        reference=reference_name,
        tolerance={name: str(tolerance) for name, tolerance in graph.tolerance.items()},
        rows=tuple((_gate_whole if graph.whole else _gate_rows)(graph, engine, sizes, where, progress)),
    )


def _gate_rows(graph: Graph, engine: Engine, sizes: list[int], where: str, progress: Progress) -> list[ParityRow]:
    feeds = graph.sample(sizes[-1], SEED)
    references: dict[tuple[int, bytes], Feeds] = {}
    alone: dict[int, Feeds] = {}
    worst: list[ParityRow] = []
    done = 0

    def reference(row: int, row_feeds: Feeds, outputs: Feeds, batch: int) -> Feeds:
        key = (row, outputs[graph.ties].tobytes() if graph.ties else b"")
        if key not in references:
            try:
                references[key] = graph.reference(row_feeds, outputs)
            except ParityError as error:  # the graph's choice was not a near tie
                raise ParityError(f"{where}: row {row} of batch {batch}: {error.message}") from None
        return references[key]

    for batch in sizes:
        outputs = _run(engine, graph.take(feeds, range(batch)))
        rows: list[ParityRow] = []
        for row in range(batch):
            row_feeds = graph.take(feeds, [row])
            got = {name: value[row : row + 1] for name, value in outputs.items()}
            if row not in alone:
                alone[row] = got if batch == 1 else _run(engine, row_feeds)
            want, single = reference(row, row_feeds, got, batch), alone[row]
            rows += _compare(graph.tolerance, got, want, batch=batch, row=row, against="reference", where=where)
            done += 1
            progress(done, sum(sizes))
            if batch == 1:
                continue
            if graph.ties is None or np.array_equal(got[graph.ties], single[graph.ties]):
                want = {**want, **single}  # keeps the arrays that the measures of ties read
                rows += _compare(graph.tolerance, got, want, batch=batch, row=row, against="alone", where=where)
            else:  # other choices between near ties change the outputs: the single row is compared with its own reference
                want = reference(row, row_feeds, single, 1)
                _compare(graph.tolerance, single, want, batch=1, row=row, against="reference", where=where)
        worst += _worst(rows)
    return worst


def _gate_whole(graph: Graph, engine: Engine, sizes: list[int], where: str, progress: Progress) -> list[ParityRow]:
    rows = []
    for number, size in enumerate(sizes, 1):
        feeds = graph.sample(size, SEED)
        got = _run(engine, feeds)
        want = graph.reference(feeds, got)
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
