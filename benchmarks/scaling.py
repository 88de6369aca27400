"""How the chain's speed depends on its load: ``wsss bench --scaling``.

A curve changes one thing and keeps the others: photographs labeled together, boxes a photograph, classes of the list, pixels of
the photographs, photographs without any class, processes. Photographs are drawn scenes; what tagger and detector find is replaced
by the load that is measured, but both still run. Values take turns, so that a change of the machine's speed meets all of them.

The report (`measure_scaling`, ``wsss bench --scaling --json``) holds a `Curve` for each.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
from PIL import Image

from .. import __version__
from ..batch import Labels
from ..classes import class_list
from ..cores import cores
from ..engines.machine import machine
from ..engines.opening import choose
from ..errors import WsssError
from ..mini.scenes import draw_scene
from ..photographs import read_photograph
from ..runtime.bundles import MINI
from ..runtime.chain import Chain
from ..runtime.run.label_folder import label_folder
from ..runtime.run.workers import Workers
from ..spec import open_bundle
from .steps import commit
from .throughput import SEED, unloaded, with_load

BATCHES = (1, 2, 4, 8, 16)
BOXES = (1, 2, 5, 10, 20, 50, 100)
CLASSES = (1, 20, 80, 300, 1203)
SIZES = ((256, 192), (512, 384), (1024, 768), (2048, 1536), (4000, 3000))
EMPTY = (0.0, 0.25, 0.5, 0.75, 1.0)
USUAL_BOXES, USUAL_CLASSES, USUAL_SIZE = 5, 20, (512, 384)
"""What the other curves keep; sizes are (width, height)."""
DRAWN_PX = 512
"""Longest side of a drawn scene; larger ones are enlarged."""
NOUNS = (
    "star heart arrow cross drop moon ring ball box cup door fork gate hat jar key lamp map nail boat pen rope saw tent urn wall",
    "bag cap desk egg fan hook jug kite leaf mug net owl pot rug shoe toy van web ant bee cat dog fox goat hen lion mole pig ram",
    "seal toad wolf apple bean corn",
)
ADJECTIVES = "red blue green yellow white black gray large small round square thin tall old new wet dry flat soft hard"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """The chain at one value of a curve."""

    value: float
    shown: str
    per_second: float
    """Images a second, the median of the rounds."""
    spread: float
    """Largest rate of the rounds over the smallest."""
    cpu_seconds: float | None
    """CPU time of an image in this process, median of the rounds; None where other processes compute."""
    start_seconds: float | None = None
    """Time to open the models and embed the names of the classes; only for the curve of classes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """Rates over one kind of load."""

    name: str
    what: str
    points: tuple[Point, ...]


Run = Callable[[], tuple[int, float]]
"""Labels the photographs once; returns their number and the seconds."""
Opener = Callable[..., Chain]
"""`_open` of the measured bundle, engine and device."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Case:
    value: float
    shown: str
    run: Run
    counts_cpu: bool = True
    start_seconds: float | None = None


def measure_scaling(
    bundle: Path,
    *,
    engine: str = "auto",
    device: str = "auto",
    curves: Sequence[str] = (),
    count: int = 16,
    rounds: int = 3,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Measure all curves of a bundle, or some.

    Args:
        engine, device: as in ``wsss label``.
        curves: names from `CURVES`; empty takes all.
        count: photographs labeled for each value in each round.
        rounds: measurements of each value, after one to warm up.

    Raises:
        WsssError: a model or engine is missing.
    """
    opened = open_bundle(bundle)
    engine, device = choose(engine, device, [opened.model(name) for name in opened.models()])
    log(f"engine {engine} on {device}")
    found: list[Curve] = []
    left_out: list[str] = []
    for name in curves or CURVES:
        what, cases_of = CURVES[name]
        with tempfile.TemporaryDirectory() as folder:
            try:
                points = _measured(cases_of(Path(folder), partial(_open, bundle, engine, device), count), rounds)
            except WsssError as error:
                left_out.append(f"{name}: {error.message}")
                continue
        found.append(Curve(name=name, what=what, points=points))
        log(f"{what}: " + ", ".join(f"{point.shown} at {point.per_second:g}/s" for point in points))
    return {
        "wsss": __version__,
        "commit": commit(),
        "machine": dataclasses.asdict(machine()),
        "bundle": "mini" if bundle == MINI else str(bundle),
        "engine": engine,
        "device": device,
        "count": count,
        "rounds": rounds,
        "curves": [dataclasses.asdict(curve) for curve in found],
        "left_out": left_out,
    }


def scaling_table(report: Mapping[str, Any]) -> Iterator[str]:
    """The report as lines of text."""
    where = f"{report['engine']} on {report['device']}"
    yield f"{report['bundle']} in {where}: {report['count']} photographs, median of {report['rounds']} rounds"
    for curve in report["curves"]:
        yield ""
        yield f"{curve['what']:34} {'images/s':>9} {'spread':>7} {'CPU s/image':>12} {'start s':>8}"
        for point in curve["points"]:
            cpu, start = ("-" if point[key] is None else f"{point[key]:.3g}" for key in ("cpu_seconds", "start_seconds"))
            yield f"{point['shown']:>34} {point['per_second']:>9.4g} {point['spread']:>7.2f} {cpu:>12} {start:>8}"
    for reason in report["left_out"]:
        yield f"left out   {reason}"


def class_names(count: int) -> tuple[str, ...]:
    """``count`` different names of one or two common words."""
    nouns = " ".join(NOUNS).split()
    pairs = (f"{adjective} {noun}" for adjective in ADJECTIVES.split() for noun in nouns)
    return tuple(itertools.islice(itertools.chain(nouns, pairs), count))


def draw(folder: Path, count: int, size: tuple[int, int] = USUAL_SIZE) -> Path:
    """Draw scenes of (width, height) pixels into a folder, as ``0000.jpg`` and so on."""
    folder.mkdir()
    shrunk = max(max(size) / DRAWN_PX, 1)
    drawn = (round(size[1] / shrunk), round(size[0] / shrunk))
    for number in range(count):
        scene = draw_scene(SEED + number, split="held-out", size=drawn)
        Image.fromarray(scene.pixels).resize(size).save(folder / f"{number:04}.jpg", quality=92)
    return folder


def _measured(cases: Sequence[_Case], rounds: int) -> tuple[Point, ...]:
    rates: list[list[float]] = [[] for _ in cases]
    cpu: list[list[float]] = [[] for _ in cases]
    for number in range(rounds + 1):  # the first warms up
        for case, rate, spent in zip(cases, rates, cpu, strict=True):
            start = time.process_time()
            count, seconds = case.run()
            if number:
                rate.append(count / seconds)
                spent.append((time.process_time() - start) / count)
    return tuple(
        Point(
            value=case.value,
            shown=case.shown,
            per_second=float(f"{statistics.median(rate):.4g}"),
            spread=round(max(rate) / min(rate), 3),
            cpu_seconds=float(f"{statistics.median(spent):.4g}") if case.counts_cpu else None,
            start_seconds=case.start_seconds,
        )
        for case, rate, spent in zip(cases, rates, cpu, strict=True)
    )


def _open(
    bundle: Path, engine: str, device: str, *, classes: int = USUAL_CLASSES, until: Literal["detect", "fuse"] = "fuse"
) -> Chain:
    """The chain under the usual load; also called in processes of their own."""
    with warnings.catch_warnings(action="ignore"):  # the models of mini know few of the names
        chain = Chain.open(bundle, classes=class_list(class_names(classes)), engine=engine, device=device, until=until)
    with_load(chain, USUAL_BOXES)
    return chain


def _labeling(opened: Callable[[], AbstractContextManager[Chain | Workers]], images: Path, batch: int | None = None) -> Run:
    def run() -> tuple[int, float]:
        with opened() as executor, tempfile.TemporaryDirectory() as store:
            summary = label_folder(executor, images, Path(store) / "store", batch=batch, warn=lambda message: None)
        return summary.labelled, summary.seconds

    return run


def _by_batch(work: Path, opener: Opener, count: int) -> list[_Case]:
    images, chain = draw(work / "images", count), nullcontext(opener())
    return [
        _Case(value=batch, shown=f"{batch}", run=_labeling(lambda: chain, images, batch)) for batch in BATCHES if batch <= count
    ]


def _by_boxes(work: Path, opener: Opener, count: int) -> list[_Case]:
    images, chain = draw(work / "images", count), opener()

    def loaded(boxes: int) -> AbstractContextManager[Chain]:
        with_load(chain, boxes)
        return nullcontext(chain)

    return [_Case(value=boxes, shown=f"{boxes}", run=_labeling(partial(loaded, boxes), images)) for boxes in BOXES]


def _by_classes(work: Path, opener: Opener, count: int) -> list[_Case]:
    """All classes are in every photograph, as they are for the detector without the tagger; tags and boxes alone."""
    photos = [read_photograph(path.parent, path.name) for path in sorted(draw(work / "images", count).iterdir())]

    def run(chain: Chain) -> tuple[int, float]:
        start, step = time.perf_counter(), chain.usual_batch()
        for at in range(0, count, step):
            some = photos[at : at + step]
            score = chain.tag(some).score
            chain.detect(some, Labels(score, np.ones(score.shape, bool)))
        return count, time.perf_counter() - start

    cases = []
    for number in CLASSES:
        with patch.dict(os.environ, WSSS_CACHE=str(work / f"cache-{number}")):  # where no names are embedded yet
            start = time.perf_counter()
            chain = opener(classes=number, until="detect")
            seconds = round(time.perf_counter() - start, 3)
        chain.tag, chain.detect = unloaded(chain.tag), unloaded(chain.detect)
        cases.append(_Case(value=number, shown=f"{number}", run=partial(run, chain), start_seconds=seconds))
    return cases


def _by_size(work: Path, opener: Opener, count: int) -> list[_Case]:
    chain = nullcontext(opener())
    return [
        _Case(
            value=width * height / 1e6,
            shown=f"{width} x {height}",
            run=_labeling(lambda: chain, draw(work / f"{width}", count, (width, height))),
        )
        for width, height in SIZES
    ]


def _by_empty(work: Path, opener: Opener, count: int) -> list[_Case]:
    images, chain = draw(work / "images", count), opener()

    def loaded(share: float) -> AbstractContextManager[Chain]:
        with_load(chain, USUAL_BOXES, is_empty=lambda photo: int(Path(photo.name).stem) % 4 < 4 * share)
        return nullcontext(chain)

    return [_Case(value=share, shown=f"{share:.0%}", run=_labeling(partial(loaded, share), images)) for share in EMPTY]


def _by_processes(work: Path, opener: Opener, count: int) -> list[_Case]:
    images = draw(work / "images", count)

    def workers(number: int) -> Workers:
        return Workers([("cpu", opener)] * number)

    numbers = [2**power for power in range(cores().bit_length()) if 2**power <= cores()]
    return [
        _Case(value=number, shown=f"{number}", run=_labeling(partial(workers, number), images), counts_cpu=False)
        for number in numbers
    ]


CURVES: dict[str, tuple[str, Callable[[Path, Opener, int], list[_Case]]]] = {
    "batch": ("photographs labeled together", _by_batch),
    "boxes": ("boxes a photograph", _by_boxes),
    "classes": ("classes in every photograph", _by_classes),
    "size": ("pixels of a photograph", _by_size),
    "empty": ("photographs without a class", _by_empty),
    "processes": ("processes on the CPU", _by_processes),
}
"""By name: what the values are, and the function that prepares them."""
