"""The chain with engines that compute nothing, which leaves only the host's work. Used by `host_path`, `run_scale` and
`graph_replays`.

Every photograph gets three classes, three boxes and three masks, so that no stage is skipped. Sizes are those of the published
models (``FULL``), or small ones (``SMALL``).
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from unittest.mock import patch

import numpy as np

from ....batch import Images, Labels, Photograph, Tensor
from ....classes import parse_classes
from ....engines.engine import Engine
from ....engines.fake import FakeEngine, Script
from ....runtime import canvas
from ....runtime.bundles import MINI
from ....runtime.canvas import Prepares, Rows
from ....runtime.chain import Chain
from ....runtime.detect import Detector
from ....runtime.device import Device
from ....runtime.fuse import Fuser
from ....runtime.resize import Resizer
from ....runtime.segment import MaskPredictor
from ....runtime.tag import Tagger
from ....spec import AxisRange, DType, GraphSpec, Model, Preprocess, TensorSpec, open_bundle

PRESENT = 3
"""Number of classes, boxes and masks of every photograph."""
WIDTH = 8
"""Width of embeddings and features, whose values do not matter."""
Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Input sizes that the host resizes to, and output sizes that it reads back."""

    view_px: int
    sam_px: int
    mask_px: int
    short_px: int
    longest_px: int
    canvases: tuple[tuple[int, int], ...]
    queries: int


FULL = Sizes(
    view_px=224,
    sam_px=1024,
    mask_px=256,
    short_px=800,
    longest_px=1333,
    canvases=((1024, 1024), (800, 1344), (1344, 800)),
    queries=900,
)
"""CLIP ViT-B/16, Grounding-DINO and SAM as published."""
SMALL = Sizes(view_px=32, sam_px=64, mask_px=32, short_px=48, longest_px=80, canvases=((64, 64), (48, 80), (80, 48)), queries=30)


def open_fake(
    sizes: Sizes = FULL,
    *,
    encoder_seconds: float = 0.0,
    queued: bool = False,
    ends: list[float] | None = None,
    make: Callable[[str, GraphSpec, Script], Engine] | None = None,
    resizing: bool = False,
) -> Chain:
    """A labeler of VOC's classes whose engines return at once.

    Args:
        encoder_seconds: time that a call of SAM's encoder takes.
        queued: calls return before they are computed, as with TensorRT; otherwise afterwards.
        ends: gets the time (``perf_counter``) at which each encoder call was computed.
        make: opens other engines with these names, contracts and scripts.
        resizing: engines also make the inputs, from one copy of each photograph; `joined_for_free` belongs to it.
    """
    classes, device = parse_classes("voc"), Device(queues=queued)
    bundle = open_bundle(MINI)  # for its tokenizers and settings
    view, sam_px, mask = sizes.view_px, sizes.sam_px, sizes.mask_px

    def engine(
        name: str,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
        script: Script,
        axes: Mapping[str, AxisRange],
        seconds: float = 0.0,
        ends: list[float] | None = None,
    ) -> Engine:
        named = [tuple(dataclasses.replace(spec, name=key) for key, spec in specs.items()) for specs in (inputs, outputs)]
        spec = GraphSpec(file=f"{name}.onnx", inputs=named[0], outputs=named[1], axes=axes, opset=18)
        if make is not None:
            return device.engine(make(name, spec, script), name)
        fake = FakeEngine(spec, script, seconds=seconds, queued=queued)
        fake.ends = fake.ends if ends is None else ends
        fake.calls = deque(maxlen=0)  # its log of calls would add 1 kB an image to the run's memory
        return device.engine(fake, name)

    def detector(canvas: tuple[int, int]) -> Engine:
        return engine(
            f"detector {canvas[0]}x{canvas[1]}",
            {
                "pixels": _t("uint8", "batch", *canvas, 3),
                "size": _t("int64", "batch", 2),
                "text": _t("float32", "batch", "tokens", WIDTH),
                "phrase": _t("int64", "batch", "tokens"),
                "position": _t("int64", "batch", "tokens"),
            },
            {"logits": _t("float32", "batch", sizes.queries, "tokens"), "boxes": _t("float32", "batch", sizes.queries, 4)},
            lambda feeds: _detections(feeds, sizes.queries),
            {"batch": AxisRange(1, 8, 8), "tokens": AxisRange(4, 32, 256)},
        )

    resizer = Resizer(partial(_resizing_engine, device)) if resizing else None
    clip = _model(bundle.model("clip"), {"views": [1, 2]}, resize="squash", longest_px=view, canvases=((view, view),))
    context = int(clip.manifest.settings["context_length"])
    tagger = Tagger(
        clip,
        engine(
            "clip image",
            {"pixels": _t("uint8", "batch", view, view, 3)},
            {"embedding": _t("float32", "batch", WIDTH)},
            lambda feeds: {"embedding": _ones(len(feeds["pixels"]), WIDTH)},
            {"batch": AxisRange(1, 40, 40)},
        ),
        engine(
            "clip text",
            {"tokens": _t("int64", "batch", context)},
            {"embedding": _t("float32", "batch", WIDTH)},
            lambda feeds: {"embedding": _ones(len(feeds["tokens"]), WIDTH)},
            {"batch": AxisRange(1, 64, 64)},
        ),
        classes,
        resizer=resizer,
    )
    dino = _model(
        bundle.model("grounding-dino"), {}, short_px=sizes.short_px, longest_px=sizes.longest_px, canvases=sizes.canvases
    )
    text = engine(
        "text",
        {"tokens": _t("int64", "phrases", "length"), "mask": _t("bool", "phrases", "length")},
        {"features": _t("float32", "phrases", "length", WIDTH)},
        lambda feeds: {"features": _ones(*feeds["tokens"].shape, WIDTH)},
        {"phrases": AxisRange(1, 16, 64), "length": AxisRange(1, 8, 64)},
    )
    sam = _model(bundle.model("sam"), {"logits_side": mask}, longest_px=sam_px, canvases=((sam_px, sam_px),))
    encoder = engine(
        "encoder",
        {"pixels": _t("uint8", "batch", sam_px, sam_px, 3), "size": _t("int64", "batch", 2)},
        {"embedding": _t("float32", "batch", WIDTH)},
        lambda feeds: {"embedding": _ones(len(feeds["pixels"]), WIDTH)},
        {"batch": AxisRange(1, 8, 8)},
        encoder_seconds,
        ends,
    )
    decoder = engine(
        "decoder",
        {
            "embedding": _t("float32", "images", WIDTH),
            "boxes": _t("float32", "boxes", 4),
            "image": _t("int64", "boxes"),
        },
        {"logits": _t("float32", "boxes", mask, mask), "quality": _t("float32", "boxes")},
        lambda feeds: {"logits": _ones(len(feeds["boxes"]), mask, mask), "quality": _ones(len(feeds["boxes"]))},
        {"images": AxisRange(1, 8, 8), "boxes": AxisRange(1, 64, 64)},
    )
    fuse = engine(
        "fuse",
        {
            "logits": _t("float32", "masks", mask, mask),
            "pick": _t("int64", "picked"),
            "score": _t("float32", "picked"),
            "label": _t("int64", "picked"),
            "rows": _t("float32", "height", mask),
            "columns": _t("float32", "width", mask),
            "margin": _t("float32", 1),
        },
        {"label_map": _t("uint8", "height", "width"), "area": _t("int64", "picked"), "won": _t("int64", "picked")},
        _fused,
        {name: AxisRange(1, 16, 16384) for name in ("masks", "picked", "height", "width")},
    )
    return Chain(
        classes,
        tag=_FirstClasses(tagger),
        detect=Detector(dino, text, detector, classes, threshold=0.3, resizer=resizer),
        segment=MaskPredictor(sam, encoder, decoder, resizer=resizer),
        fuse=Fuser(sam, fuse),
        settings={"engine": "fake"},
        device=device,
    )


@contextmanager
def joined_for_free() -> Iterator[None]:
    """Inputs of several photographs are put together without the host, as on a GPU."""

    def joined(parts: Sequence[Rows]) -> np.ndarray:
        return np.broadcast_to(np.asarray(parts[0])[:1], (sum(part.shape[0] for part in parts), *parts[0].shape[1:]))

    with patch.object(canvas, "joined", joined):
        yield


class _Copying:
    """An engine to which arrays are copied ahead, in memory that is used again."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._memory = engine, np.zeros(1 << 26, np.uint8)
        self.inputs, self.outputs, self.axes = engine.inputs, engine.outputs, engine.axes

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._engine(feeds)

    def upload(self, array: np.ndarray) -> np.ndarray:
        copy = self._memory[: array.size].reshape(array.shape)
        copy[:] = array
        return copy


def _resizing_engine(device: Device, size: tuple[int, int]) -> Engine:
    spec = GraphSpec(
        file="resize.onnx",
        inputs=(
            TensorSpec("photo", ("photo_height", "photo_width", 4), "uint8"),
            TensorSpec("window", ("views", 4), "int64"),
            TensorSpec("size", ("views", 2), "int64"),
            TensorSpec("columns_first", ("views",), "bool"),
        ),
        outputs=(TensorSpec("pixels", ("views", *size, 3), "uint8"),),
        axes={"views": AxisRange(1, 5, 16), **dict.fromkeys(("photo_height", "photo_width"), AxisRange(1, 512, 4096))},
        opset=18,
    )
    black = np.zeros((1, *size, 3), np.uint8)
    fake = FakeEngine(spec, lambda feeds: {"pixels": np.broadcast_to(black, (len(feeds["window"]), *size, 3))})
    fake.calls = deque(maxlen=0)
    return device.engine(_Copying(fake), f"resize {size[0]}x{size[1]}")


class _FirstClasses:
    """CLIP's work on the host, but with the first ``PRESENT`` classes as the result of every image."""

    def __init__(self, tagger: Tagger) -> None:
        self._tagger = tagger
        self.room, self.prepare = tagger.room, tagger.prepare
        self.resizes, self.resized = tagger.resizes, tagger.resized

    def __call__(self, images: Images) -> Labels:
        labels = self._tagger(images)
        labels.present[:] = np.arange(labels.present.shape[1]) < PRESENT
        return labels


def bare_inputs(labeler: Chain, photo: Photograph) -> list[np.ndarray]:
    """The inputs of the three models for a photograph, made without the rest of the chain."""
    stages: tuple[object, ...] = (labeler.tag.stage, labeler.detect.stage, labeler.segment.stage)
    return [stage.prepare(photo, np.zeros(stage.room(photo), np.uint8)) for stage in stages if isinstance(stage, Prepares)]


def _model(model: Model, settings: Mapping[str, object], **preprocess: object) -> Model:
    manifest = model.manifest
    changed: Preprocess = dataclasses.replace(manifest.preprocess, **preprocess)  # type: ignore[arg-type]
    return Model(model.folder, dataclasses.replace(manifest, preprocess=changed, settings={**manifest.settings, **settings}))


def _t(dtype: DType, *shape: int | str) -> TensorSpec:
    return TensorSpec("", shape, dtype)


@lru_cache(maxsize=64)
def _ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def _detections(feeds: Feeds, queries: int) -> Feeds:
    """Query q has a high score for the q-th phrase; the boxes lie side by side."""
    rows, tokens = feeds["phrase"].shape
    logits = np.full((rows, queries, tokens), -9, np.float32)
    boxes = np.zeros((rows, queries, 4), np.float32)
    for query in range(PRESENT):
        logits[:, query][feeds["phrase"] == query + 1] = 4
        boxes[:, query] = [(query + 0.5) / PRESENT, 0.5, 0.8 / PRESENT, 0.7]
    return {"logits": logits, "boxes": boxes}


def _fused(feeds: Feeds) -> Feeds:
    count = len(feeds["pick"])
    return {
        "label_map": _drawn(len(feeds["rows"]), len(feeds["columns"])),
        "area": np.full(count, 1000),
        "won": np.full(count, 900),
    }


@lru_cache(maxsize=16)
def _drawn(height: int, width: int) -> np.ndarray:
    """A label map as fusion makes it: three round objects with a void border."""
    y, x = np.ogrid[:height, :width]
    drawn = np.zeros((height, width), np.uint8)
    for number in range(PRESENT):
        across = (x - width * (number + 0.5) / PRESENT) / (0.45 * width / PRESENT)
        distance = across**2 + ((y - height / 2) / (0.35 * height)) ** 2
        drawn[distance < 1.05 + 0.05 * np.sin(x / 5)] = 255
        drawn[distance < 1 + 0.05 * np.sin(x / 5)] = number + 1
    return drawn
