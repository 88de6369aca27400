"""The parity gate: an exported graph must compute what the official implementation computes, row by row.

Run at batch 1, 2 and the largest, with other pixels, sizes, captions and boxes in every row. Each row is compared with
the official module at batch 1, and with the graph's own result for that row alone: a graph can agree on average and
still leak one row into its neighbor.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..engines.engine import Engine
from ..errors import ParityError
from ..spec import Parity, ParityRow
from .family import Feeds, Graph, Tolerance

SEED = 20_240_510
"""Of the gate's inputs; another than tracing uses."""


def gate(graph: Graph, engine: Engine, *, engine_name: str, reference_name: str, where: str) -> Parity:
    """Compares ``engine`` with the official computation of ``graph``.

    Returns:
        The verdict: for each output, batch size and kind of comparison the worst row.

    Raises:
        ParityError: a row outside its tolerance, or not finite; says which output, row and how far.
    """
    largest = graph.axes[graph.row_axis]
    sizes = sorted({largest.min, min(2, largest.max), largest.max})
    verdict = _gate_whole(graph, engine, sizes, where) if graph.whole else _gate_rows(graph, engine, sizes, where)
    return Parity(
        engine=engine_name,
        reference=reference_name,
        tolerance={name: str(tolerance) for name, tolerance in graph.tolerance.items()},
        rows=tuple(verdict),
    )


def _gate_rows(graph: Graph, engine: Engine, sizes: list[int], where: str) -> list[ParityRow]:
    feeds = graph.sample(sizes[-1], SEED)
    known: dict[tuple[int, bytes], Feeds] = {}
    alone: dict[int, Feeds] = {}
    verdict: list[ParityRow] = []

    def wanted(row: int, one: Feeds, found: Feeds, batch: int) -> Feeds:
        key = (row, found[graph.ties].tobytes() if graph.ties else b"")
        if key not in known:
            try:
                known[key] = graph.reference(one, found)
            except ParityError as error:  # a choice that was no near tie
                raise ParityError(f"{where}: row {row} of batch {batch}: {error.message}") from None
        return known[key]

    for batch in sizes:
        # Copied: the memory is the engine's, and it runs again below.
        found = {name: np.array(value) for name, value in engine(graph.take(feeds, range(batch))).items()}
        rows: list[ParityRow] = []
        for row in range(batch):
            one = graph.take(feeds, [row])
            mine = {name: value[row : row + 1] for name, value in found.items()}
            if row not in alone:
                alone[row] = mine if batch == 1 else {name: np.array(value) for name, value in engine(one).items()}
            want, its = wanted(row, one, mine, batch), alone[row]
            rows += _compare(graph.tolerance, mine, want, batch=batch, row=row, against="reference", where=where)
            if batch == 1:
                continue
            if graph.ties is None or np.array_equal(mine[graph.ties], its[graph.ties]):
                want = {**want, **its}  # and what the measures of ties need
                rows += _compare(graph.tolerance, mine, want, batch=batch, row=row, against="alone", where=where)
            else:  # near ties chosen otherwise make other outputs: the row alone is held to a reference of its own
                _compare(graph.tolerance, its, wanted(row, one, its, 1), batch=1, row=row, against="reference", where=where)
        verdict += _worst(rows)
    return verdict


def _gate_whole(graph: Graph, engine: Engine, sizes: list[int], where: str) -> list[ParityRow]:
    verdict = []
    for size in sizes:
        feeds = graph.sample(size, SEED)
        found = {name: np.array(value) for name, value in engine(feeds).items()}
        want = graph.reference(feeds, found)
        verdict += _compare(graph.tolerance, found, want, batch=size, row=0, against="reference", where=where)
    return verdict


def _compare(
    tolerance: Mapping[str, Tolerance], got: Feeds, want: Feeds, *, batch: int, row: int, against: str, where: str
) -> list[ParityRow]:
    rows = []
    for name, allowed in tolerance.items():
        said = f"{where}: output {name!r}, row {row} of batch {batch}, against {against}"
        if got[name].shape != want[name].shape:
            raise ParityError(f"{said}: shape {got[name].shape}, expected {want[name].shape}")
        error, worst = allowed.measure(got, want, name)
        if not np.isfinite(worst) or not error <= allowed.relative or worst > (allowed.absolute or np.inf):
            raise ParityError(
                f"{said}: error {error:.3g}, largest difference {worst:.3g}; allowed: {allowed}",
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


def photograph(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Pixels with a photograph's falling spectrum: (height, width, 3) uint8, every call another.

    White noise would hide errors of resampling and of channel order: all its scales and channels are alike.
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
