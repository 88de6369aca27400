"""CUDA graphs, copies and waits of a run on a simulated GPU: ``python -m wsss.benchmarks.studies.speed.graph_replays``.

The chain of `fake_chain` runs in the engines of `engines.trt`, on the GPU that the tests simulate (`tests/engines`), with the
sizes of the published models. Photographs of PASCAL VOC have the classes and boxes of a real detector (with scores of at least
0.3), those that it did not see the boxes of their annotation, and those without one a box for each class. After a warm-up of
several passes, each in another order, ``graph-replays.json`` has, for further passes:

``replayed``
    Share of each engine's calls that were replays of a CUDA graph, which costs the host one launch instead of one a kernel.
``fuse``
    Bytes that fusing copies to and from the GPU, and how often the host waits for the GPU, for an image of PASCAL VOC in a batch,
    and for one of 12 Mpx with ten boxes.

The simulated GPU is as late as it can be, so that every wait counts.
"""

from __future__ import annotations

import importlib.util
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np

from ....batch import MAX_BOXES, Boxes, Images, Labels, Photograph
from ....classes import parse_classes
from ....engines import trt
from ....engines.fake import Script
from ....photographs import read_photograph
from ....spec import AxisRange, GraphSpec
from ..harness import RESULTS, about, read_result, study_parser, write_result
from .fake_chain import FULL, Sizes, open_fake

RESULT = RESULTS / "graph-replays.json"
TESTS = Path(__file__).parents[3] / "tests" / "engines" / "simulated_gpu.py"
BATCH, SCORE = 8, 0.3
TILE = {"height": AxisRange(1, 128, 256), "width": AxisRange(1, 512, 1024)}
"""`to_engine.TILE`, without importing PyTorch."""
CORNERS = ("xmin", "ymin", "xmax", "ymax")
Found = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""By photograph: boxes (N, 4) float32, xyxy in its pixels, and 1-based classes (N,) int64."""


def simulation() -> ModuleType:
    """The module `tests/engines/simulated_gpu.py`."""
    spec = importlib.util.spec_from_file_location("simulated_gpu", TESTS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict("sys.modules", {spec.name: module}):
        spec.loader.exec_module(module)
    return module


class Simulated:
    """Opens engines on a simulated GPU, and counts their calls and which of them were replays."""

    def __init__(self, folder: Path) -> None:
        self._sim, self._folder = simulation(), folder
        self.gpu = self._sim.Gpu(memory_bytes=1 << 40)
        self.engines: dict[str, trt.TrtEngine] = {}
        self.calls: Counter[str] = Counter()
        self.replays: Counter[str] = Counter()

    def open(self, name: str, spec: GraphSpec, script: Script) -> trt.TrtEngine:
        """An engine that computes a script; the profile of ``fuse`` is that of an engine."""
        axes = dict(spec.axes)
        if name == "fuse":
            axes |= {**TILE, "masks": AxisRange(1, 16, MAX_BOXES), "picked": AxisRange(1, 16, MAX_BOXES)}
        largest = [
            np.prod([axis if isinstance(axis, int) else axes[axis].max for axis in each.shape]) * np.dtype(each.dtype).itemsize
            for each in spec.outputs
        ]
        network = self._sim.Network(spec.inputs, spec.outputs, axes, script, activations_bytes=int(sum(largest)))
        plan = self._folder / f"{name}.plan"
        plan.write_bytes(name.encode())
        self.gpu.plans[name.encode()] = network
        contract = GraphSpec(file=spec.file, inputs=spec.inputs, outputs=spec.outputs, axes=axes, opset=spec.opset)
        with mock.patch.object(trt, "load_modules", lambda flavour: (self.gpu.tensorrt, self.gpu.runtime)):
            self.engines[name] = engine = trt.TrtEngine(plan, contract, flavour="trt")
        run = engine._contexts.run

        def counted(*args: Any) -> Any:
            before = self.gpu.calls.count("cudaGraphLaunch")
            shapes = run(*args)
            self.calls[name.split()[0]] += 1
            self.replays[name.split()[0]] += self.gpu.calls.count("cudaGraphLaunch") - before
            self.gpu.calls.clear()
            return shapes

        mock.patch.object(engine._contexts, "run", counted).start()
        return engine

    def copies_and_waits(self, name: str, work: Callable[[], object]) -> dict[str, int]:
        """Bytes that an engine copies during some work, and the host's waits."""
        copied, waits = self.engines[name].copied, self.gpu.host_waits
        before = dict(copied)
        work()
        sizes = {way: copied[way] - before.get(way, 0) for way in ("host_to_device", "device_to_host")}
        return {f"bytes_{way}": size for way, size in sizes.items()} | {"waits": self.gpu.host_waits - waits}


class KnownBoxes:
    """A detector that runs its engine, but finds the boxes that are known."""

    def __init__(self, detector: Callable[[Images, Labels], Boxes], found: Found) -> None:
        self._detector, self._found = detector, found

    def __call__(self, images: Images, labels: Labels) -> Boxes:
        self._detector(images, labels)
        parts = []
        for number, photo in enumerate(images):
            xyxy, label = self._found[photo.name]
            count = len(label)
            parts.append(Boxes(xyxy, np.full(count, 0.9, np.float32), label, np.full(count, number, np.int64)))
        return Boxes.join(parts)


class KnownTags:
    """A tagger that runs its engine, but finds the classes that are known."""

    def __init__(self, tagger: Callable[[Images], Labels], found: Found) -> None:
        self._tagger, self._found = tagger, found

    def __call__(self, images: Images) -> Labels:
        labels = self._tagger(images)
        for row, photo in enumerate(images):
            labels.present[row] = np.isin(np.arange(labels.present.shape[1]) + 1, self._found[photo.name][1])
        return labels


def known_boxes(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The boxes of the photographs in a folder as PASCAL VOC's, with a detector's boxes beside it."""
    names = parse_classes("voc").names
    classes = dict(line.split("\t")[:3:2] for line in (folder / "ORIGIN.tsv").read_text(encoding="utf-8").splitlines()[1:])
    found = {}
    for path in sorted((folder / "JPEGImages").glob("*.jpg")):
        detected, annotated = folder / f"detector_boxes_xyx2y2/{path.stem}.txt", folder / f"Annotations/{path.stem}.xml"
        if detected.is_file():
            lines = [line.split() for line in detected.read_text(encoding="ascii").splitlines()]
            rows = [(int(kind) + 1, *map(float, xyxy)) for kind, score, *xyxy in lines if float(score) >= SCORE]
        elif annotated.is_file():
            rows = [
                (names.index(str(each.findtext("name"))) + 1, *(float(str(each.findtext(f"bndbox/{c}"))) for c in CORNERS))
                for each in ElementTree.parse(annotated).iter("object")
            ]
        else:
            rows = [(int(label), 10.0, 10.0, 200.0, 200.0) for label in classes[path.stem].split()]
        table = np.array(rows, np.float64).reshape(-1, 5)
        found[path.name] = table[:, 1:].astype(np.float32), table[:, 0].astype(np.int64)
    return found


def batches(photos: Images, canvases: Mapping[str, object], seed: int) -> Iterator[Images]:
    """The photographs in random order, in batches that share a canvas of the detector, as a run makes them."""
    waiting: dict[object, list[Photograph]] = {}
    for number in np.random.default_rng(seed).permutation(len(photos)):
        batch = waiting.setdefault(canvases[photos[number].name], [])
        batch.append(photos[number])
        if len(batch) == BATCH:
            yield batch.copy()
            batch.clear()
    yield from filter(None, waiting.values())


def measure(photos: Images, found: Found, *, warm_up: int, passes: int, sizes: Sizes = FULL) -> dict[str, Any]:
    """Replays of each engine, and the copies and waits of fusing; photographs of PASCAL VOC and one of 12 Mpx."""
    with tempfile.TemporaryDirectory() as folder:
        simulated = Simulated(Path(folder))
        labeler = open_fake(sizes, queued=True, make=simulated.open)
        canvases = {photo.name: labeler.canvas(photo) for photo in photos}
        labeler.tag.stage = KnownTags(labeler.tag.stage, found)
        labeler.detect.stage = KnownBoxes(labeler.detect.stage, found)
        fusing: Counter[str] = Counter()

        def pass_over(seed: int, count: Counter[str]) -> None:
            for batch in batches(photos, canvases, seed):
                labels = labeler.tag(batch)
                boxes = labeler.detect(batch, labels)
                masks = labeler.segment(batch, boxes)
                count.update(simulated.copies_and_waits("fuse", partial(labeler.fuse, batch, labels, boxes, masks)))

        for seed in range(warm_up):
            pass_over(seed, Counter())
        simulated.calls.clear()
        simulated.replays.clear()
        for seed in range(warm_up, warm_up + passes):
            pass_over(seed, fusing)
        large = Photograph(name="large", pixels=np.zeros((3000, 4000, 3), np.uint8))
        corner = np.random.default_rng(0).uniform(0, 1500, (10, 2)).astype(np.float32)
        boxes = Boxes(np.hstack([corner, corner + 1000]), np.ones(10, np.float32), np.arange(10) + 1, np.zeros(10, np.int64))
        labels = Labels(np.zeros((1, 20), np.float32), np.zeros((1, 20), bool))
        calls, replays = dict(simulated.calls), dict(simulated.replays)
        for _ in range(2):
            masks = labeler.segment([large], boxes)
            fused = simulated.copies_and_waits("fuse", partial(labeler.fuse, [large], labels, boxes, masks))
        for engine in simulated.engines.values():
            engine.close()
    images = passes * len(photos)
    return {
        "replayed": {name: round(replays.get(name, 0) / count, 3) for name, count in calls.items()},
        "replayed_of_all": round(sum(replays.values()) / sum(calls.values()), 3),
        "calls": calls,
        "fuse": {"voc": {name: round(value / images, 2) for name, value in fusing.items()}, "12_mpx": fused},
    }


def main() -> None:
    """Run the command line of the module."""
    parser = study_parser(__spec__, __doc__, out=RESULT)
    parser.add_argument("--images", type=Path, default=Path("../shared/data/voc_pairs"), help="folder as PASCAL VOC's")
    parser.add_argument("--name", default="now", help="key of this measurement in the result file; others in it stay")
    parser.add_argument("--passes", type=int, nargs=2, default=(3, 6), help="of the warm-up, and measured")
    given = parser.parse_args()
    found = known_boxes(given.images)
    photos = [read_photograph(given.images / "JPEGImages", name) for name in found]
    warm_up, passes = given.passes
    result = read_result(given.out) | about()
    result["photographs"] = {
        "count": len(photos),
        "boxes": sum(len(label) for _, label in found.values()),
        "batch": BATCH,
        "passes": {"warm_up": warm_up, "measured": passes},
    }
    result[given.name] = measure(photos, found, warm_up=warm_up, passes=passes)
    write_result(given.out, result)


if __name__ == "__main__":
    main()
