"""Throughput of the chain as ``wsss label`` runs it: files are read, decoded, labeled and written by overlapping stages.

Fields of `ChainResult`, also in JSON:

``engine``, ``device``, ``batch``, ``models``
    What was measured. ``batch``: images labeled together; ``models``: variant and precision of each model.
``images``, ``failed``, ``boxes_an_image``, ``seconds``, ``per_second``
    Timed images (without those of the warm-up), failed ones, boxes found in each, time, and images a second.
``stages``
    For ``tag``, ``detect``, ``segment`` and ``fuse`` the ``seconds`` of work; for each thread (segmenting and fusing share one)
    ``waiting``: time without input, without room for the result, or without access to the device.
``engine_seconds``, ``engine_share``
    Time in which an engine computed, and its share of the whole; for the rest the device was idle.
``padding``
    Share of the detector's canvases that was padding; None without a detector.
``gmacs_an_image``, ``share_of_bound``
    Multiply-adds in 1e9 for each image, and the rate as a share of what the machine's best matrix product allows. None where
    they were not counted.
``reference``, ``agreement``, ``agreement_miou``
    Comparison with FP32 graphs of the same weights in ONNX Runtime on the CPU: share of pixels with the same label, and mIoU
    with the reference as truth. None where there are no such graphs, or where they are what was measured.
``truth_miou``
    mIoU against the truth of drawn scenes; None for photographs, and for models not trained on drawn scenes.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, ParamSpec, TypeVar, cast

import numpy as np

from ..batch import Boxes, Images, Labels, Photograph
from ..errors import BundleError, WsssError
from ..frame import frame_for
from ..mini.scenes import write_scenes
from ..photographs import path_of
from ..runtime.bundles import MINI
from ..runtime.chain import Chain, Timed
from ..runtime.run.label_folder import Summary, label_folder
from ..runtime.run.listing import Folder
from ..runtime.tag import view_windows
from ..spec import Bundle, open_bundle
from ..store.local import Record, read_label, read_records
from ..train.evaluate.metrics import mean_iou
from .ceiling import Ceiling
from .confusion import total_confusion
from .feeds import feeds_for, load_of
from .graph_work import work_of

SEED = 4_000_000
"""First of the drawn scenes; trainings and other benchmarks use other ones."""
THREADS = (("tag",), ("detect",), ("segment", "fuse"))
"""Stages by thread (`wsss.runtime.run.stream`)."""
CHAIN_MODELS = ("clip", "grounding-dino", "sam")
TAGS = 3
"""Number of classes given to each image that gets random boxes."""
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class ChainResult:
    """Throughput of the chain; the module docstring describes the fields."""

    engine: str
    device: str
    batch: int
    models: dict[str, str]
    images: int
    failed: int
    boxes_an_image: float
    seconds: float
    per_second: float
    stages: dict[str, dict[str, float]]
    engine_seconds: float
    engine_share: float
    padding: float | None
    gmacs_an_image: float | None
    share_of_bound: float | None
    reference: str | None = None
    agreement: float | None = None
    agreement_miou: float | None = None
    truth_miou: float | None = None


def measure_chain(
    bundle: Path,
    work: Path,
    *,
    engine: str,
    device: str,
    batch: int = 8,
    images: Path | None = None,
    classes: str = "mini",
    count: int = 24,
    repeat: int = 1,
    boxes: int | None = None,
    ceiling: Ceiling | None = None,
    reference: Path | None = None,
    unverified: bool = False,
) -> ChainResult:
    """Label images with a bundle, once to warm up and once for the measurement.

    Args:
        work: an empty folder for images and label stores.
        engine, device: from `wsss.engines.opening.choose`.
        images: a folder of photographs; None draws scenes.
        count: number of images, the first by name. repeat: number of copies of each.
        boxes: this number of random boxes in each image replaces what tagger and detector find; both still run. It gives
            untrained weights the work of trained ones (`with_load`).
        ceiling: of this machine, for the share of the bound.
        reference: a bundle of FP32 graphs of the same weights.
        unverified: TensorRT: accept engines whose gate has not run.

    Raises:
        WsssError: a model or engine is missing, or there are no images.
    """
    names = gather_images(work, images, count, repeat)
    labeler = Chain.open(bundle, classes=classes, engine=engine, device=device, unverified=unverified)
    if boxes is not None:
        with_load(labeler, boxes)
    # On a GPU all shapes are warmed up, or kernels would be chosen and CUDA graphs captured during the measurement.
    warm = names if device != "cpu" else names[: 2 * batch]
    _label(labeler, work, "warm", warm, batch)
    summary = _label(labeler, work, "timed", names, batch)
    records = list(read_records(work / "timed"))
    gmacs = gmacs_an_image(open_bundle(bundle), records)
    rate = summary.labelled / summary.seconds
    bound = ceiling.bound_ms(gmacs * 1e9, 0) if ceiling and gmacs else None
    result = ChainResult(
        engine=engine,
        device=device,
        batch=batch,
        models={name: _precision(open_bundle(bundle), name) for name in open_bundle(bundle).models()},
        images=summary.labelled,
        failed=summary.failed,
        boxes_an_image=round(summary.boxes / max(summary.labelled, 1), 2),
        seconds=round(summary.seconds, 3),
        per_second=float(f"{rate:.4g}"),
        stages=stages_of(summary),
        engine_seconds=round(summary.engine_seconds, 3),
        engine_share=round(summary.engine_seconds / summary.seconds, 3),
        padding=None if summary.padding is None else round(summary.padding, 3),
        gmacs_an_image=None if gmacs is None else float(f"{gmacs:.4g}"),
        share_of_bound=None if bound is None else float(f"{rate * bound * 1e-3:.4g}"),
    )
    quality: dict[str, float | str] = {}
    drawn = images is None and all(variant.startswith("mini ") for variant in result.models.values())
    if drawn and boxes is None:
        quality["truth_miou"] = round(mean_iou(total_confusion(_pairs(work / "truth", work / "timed"))), 4)
    if reference is not None:
        fp32 = Chain.open(reference, classes=classes, engine="ort", device="cpu")
        if boxes is not None:
            with_load(fp32, boxes)
        _label(fp32, work, "reference", names[:count], batch)
        quality |= agreement(work / "reference", work / "timed", len(fp32.classes.names))
        quality["reference"] = "the shipped FP32 models" if reference == MINI else str(reference)
    return ChainResult(**{**vars(result), **quality})


def gather_images(work: Path, images: Path | None, count: int, repeat: int) -> list[str]:
    """Put the images to be labeled into ``work/images``; returns their names, all first copies before the second ones.

    Raises:
        ImageError: ``images`` holds no image.
    """
    folder = work / "images"
    if images is None:
        sources = write_scenes(work, count, seed=SEED)
    else:
        folder.mkdir(parents=True)
        sources = []
        for number, found in enumerate(itertools.islice(Folder(images), count)):
            sources.append(folder / f"{number:06}{Path(found.name).suffix}")
            shutil.copyfile(path_of(images, found.name), sources[-1])
    names = [source.name for source in sources]
    for copy in range(1, repeat):
        for source in sources:
            names.append(f"{source.stem}-{copy:03}{source.suffix}")
            shutil.copyfile(source, folder / names[-1])
    return names


def reference_for(bundle: Path, engine: str, device: str) -> Path | None:
    """The shipped FP32 graphs, where they have the weights of this bundle and are not themselves what is measured."""
    try:
        measured, shipped = Bundle(bundle), Bundle(MINI)
        pairs = [(measured.model(name).manifest, shipped.model(name).manifest) for name in CHAIN_MODELS]
    except BundleError:
        return None
    same = all(one.weights["sha256"] == other.weights["sha256"] for one, other in pairs)
    itself = (engine, device) == ("ort", "cpu") and all(one.precision == "fp32" for one, _ in pairs)
    return MINI if same and not itself else None


def stages_of(summary: Summary) -> dict[str, dict[str, float]]:
    """Working seconds of each stage, and waiting seconds of each thread."""
    times = {stage: {"seconds": round(seconds, 3)} for stage, seconds in summary.stage_seconds.items()}
    for stages in THREADS:
        worked = sum(summary.stage_seconds.get(stage, 0.0) for stage in stages)
        times.setdefault(stages[0], {"seconds": 0.0})["waiting"] = round(max(summary.seconds - worked, 0.0), 3)
    return times


def gmacs_an_image(bundle: Bundle, records: Sequence[Record]) -> float | None:
    """Mean multiply-adds of an image in 1e9, from the classes and boxes of a run; None without onnx."""
    models = bundle.models()

    def of_one_row(name: str, graph: str, rows: int = 1) -> float:
        model = bundle.model(name)
        spec = model.graph(graph)
        return work_of(model.path(graph), feeds_for(model, graph, load_of(spec, spec.axes, rows))).multiply_adds / rows

    total = 0.0
    try:
        if "clip" in models:
            levels = tuple(int(level) for level in bundle.model("clip").manifest.settings["views"])
            total += len(records) * len(view_windows(1000, 1000, levels)) * of_one_row("clip", "image")
        if "grounding-dino" in models:
            preprocess = bundle.model("grounding-dino").manifest.preprocess
            tagged = [record for record in records if record.get("classes")]
            sizes = [frame_for(preprocess, record["height"], record["width"]).canvas for record in tagged]
            total += sum(sizes.count(size) * of_one_row("grounding-dino", f"image-{size[0]}x{size[1]}") for size in set(sizes))
        if "sam" in models:
            total += sum(1 for record in records if record.get("boxes")) * of_one_row("sam", "encoder")
            total += sum(len(record.get("boxes", ())) for record in records) * of_one_row("sam", "decoder", 8)
    except (ImportError, WsssError):
        return None
    return total * 1e-9 / max(len(records), 1)


def agreement(reference: Path, store: Path, classes: int) -> dict[str, float]:
    """Share of pixels with the same label in two stores, and mIoU of the second with the first as truth."""
    same = pixels = 0
    for one, other in _pairs(reference / "labels", store):
        same, pixels = same + int((one == other).sum()), pixels + one.size
    miou = mean_iou(total_confusion(_pairs(reference / "labels", store), classes))
    return {"agreement": round(same / max(pixels, 1), 6), "agreement_miou": round(miou, 5)}


class ReplacedResult(Generic[P, R]):
    """A stage that runs as before, but whose result is replaced.

    Args:
        timed: the stage with its stopwatch.
        change: (images, result of the stage) to the new result.
    """

    def __init__(self, timed: Timed[P, R], change: Callable[[Images, R], R]) -> None:
        self.timed, self._change = timed, change

    @property
    def stage(self) -> object:
        """The stage itself."""
        return self.timed.stage

    @property
    def seconds(self) -> float:
        """Seconds that the stage took since the last reset."""
        return self.timed.seconds

    @seconds.setter
    def seconds(self, value: float) -> None:
        self.timed.seconds = value

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._change(cast(Images, args[0]), self.timed(*args, **kwargs))


def with_load(labeler: Chain, boxes: int, *, is_empty: Callable[[Photograph], bool] = lambda photo: False) -> None:
    """Give a labeler the load of trained weights: `TAGS` classes and ``boxes`` boxes in each image, whatever it finds.

    Args:
        is_empty: whether a photograph gets no class and no boxes instead. A second call replaces the first one's load.
    """
    classes = len(labeler.classes.names)

    def tags(images: Images, labels: Labels) -> Labels:
        some = np.array([[not is_empty(photo)] for photo in images])
        return Labels(labels.score, some & (np.arange(classes) < TAGS))

    def drawn(images: Images, found: Boxes) -> Boxes:
        many = [0 if is_empty(photo) else boxes for photo in images]
        return Boxes.join([drawn_boxes(number, *photo.shape, many[number], classes) for number, photo in enumerate(images)])

    labeler.tag = cast("Timed[[Images], Labels]", ReplacedResult(unloaded(labeler.tag), tags))
    labeler.detect = cast("Timed[[Images, Labels], Boxes]", ReplacedResult(unloaded(labeler.detect), drawn))


def unloaded(timed: Timed[P, R]) -> Timed[P, R]:
    """A stage as it was before `with_load`."""
    return timed.timed if isinstance(timed, ReplacedResult) else timed


def drawn_boxes(number: int, height: int, width: int, count: int, classes: int) -> Boxes:
    """Random boxes in image ``number`` with 10 to 60 % of its sides; the same for every image of one size."""
    rng = np.random.default_rng([height, width])
    extent = rng.uniform(0.1, 0.6, (count, 2)) * (width, height)
    corner = rng.uniform(0, 1, extent.shape) * ((width, height) - extent)
    xyxy = np.concatenate([corner, corner + extent], axis=1).astype(np.float32)
    score = rng.uniform(0.4, 0.9, count).astype(np.float32)
    return Boxes(xyxy, score, 1 + np.arange(count) % classes, np.full(count, number))


def _label(labeler: Chain, work: Path, store: str, names: Sequence[str], batch: int) -> Summary:
    """Label some of the images into a separate store."""
    folder = work / f"{store}-images"
    folder.mkdir()
    for name in names:
        (folder / name).hardlink_to(work / "images" / name)
    return label_folder(labeler, folder, work / store, batch=batch, warn=lambda message: None)


def _pairs(truth: Path, store: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Label maps of images that are in both, without repeated images and failures."""
    for record in read_records(store):
        path = truth / str(record["label"])
        if path.is_file() and "error" not in record:
            yield read_label(path), read_label(store / "labels" / record["label"])


def _precision(bundle: Bundle, name: str) -> str:
    manifest = bundle.model(name).manifest
    return f"{manifest.variant} {manifest.precision}"
