"""Our chain on an engine of this machine, through the stages of the runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...batch import Boxes, Images, Labels, Masks, Tensor
from ...classes import parse_classes
from ...engines.engine import Engine
from ...engines.machine import version_of
from ...engines.opening import open_graph
from ...runtime.chain import Rules
from ...runtime.detect import Detector
from ...runtime.fuse import Fuser
from ...runtime.segment import MaskPredictor
from ...runtime.tag import Tagger
from ...spec import AxisRange, TensorSpec
from .job import Caption, Job, caption_of


class Kept:
    """An engine that keeps one output of its calls, until it is taken."""

    def __init__(self, engine: Engine, output: str) -> None:
        self._engine, self._output = engine, output
        self._results: list[np.ndarray] = []

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """The engine's inputs."""
        return self._engine.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """The engine's outputs."""
        return self._engine.outputs

    @property
    def axes(self) -> Mapping[str, AxisRange]:
        """The engine's free axes."""
        return self._engine.axes

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = self._engine(feeds)
        self._results.append(np.array(out[self._output]))
        return out

    def taken(self) -> np.ndarray:
        """The output of all calls since the last time, joined along the rows."""
        results, self._results = self._results, []
        return np.concatenate(results) if results else np.zeros((0, 1, 1), np.float32)


class OurChain:
    """Tagger, detector, mask predictor and fuser of the runtime.

    Args:
        engine: ``ort`` or ``openvino``. precision: of the bundle.
    """

    def __init__(self, job: Job, engine: str, precision: str) -> None:
        clip, dino, sam = (job.model(name, precision) for name in ("clip", "grounding-dino", "sam"))
        classes = parse_classes(job.classes)
        self.batch, self._classes = job.batch, len(classes.names)
        package = "onnxruntime" if engine == "ort" else engine
        self.about: dict[str, Any] = {"precision": precision, "versions": {package: version_of(package)}}

        def opened(model: Any, graph: str) -> Engine:
            return open_graph(model, graph, engine, device="cpu", unverified=True)

        self._clip = Kept(opened(clip, "image"), "embedding")
        self._tagger = Tagger(clip, self._clip, opened(clip, "text"), classes)
        self._dino: Kept | None = None

        def image_engine(canvas: tuple[int, int]) -> Engine:
            self._dino = Kept(opened(dino, f"image-{canvas[0]}x{canvas[1]}"), "logits")  # one canvas, see `fitting`
            return self._dino

        self._caption: Caption = caption_of(dino, job.classes)
        self._detector = Detector(dino, opened(dino, "text"), image_engine, classes)
        self._segmenter = MaskPredictor(sam, opened(sam, "encoder"), opened(sam, "decoder"))
        self._fuser = Fuser(sam, opened(sam, "fuse"), margin=Rules.margin, keep_masks=True)

    def tag(self, photos: Images) -> object:
        """Score all classes in all views."""
        self._tagger(photos)
        return len(photos)

    def detect(self, photos: Images, wanted: np.ndarray) -> object:
        """Find boxes of all classes in the wanted photographs."""
        self._detector(photos, Labels(np.ones((len(photos), self._classes), np.float32), self._present(wanted)))
        return None

    def segment(self, photos: Images, boxes: Boxes) -> object:
        """A mask of each box."""
        return self._segmenter(photos, boxes)

    def fuse(self, photos: Images, boxes: Boxes, masks: Masks) -> list[np.ndarray]:
        """Label maps."""
        present = self._present(np.isin(np.arange(len(photos)), boxes.image))
        return self._fuser(photos, Labels(present.astype(np.float32), present), boxes, masks).label_maps

    def embeddings(self, tagged: Any) -> np.ndarray:
        """Of each view."""
        every = self._clip.taken()
        return every.reshape(tagged, -1, every.shape[-1])

    def scores(self, detected: Any) -> np.ndarray:
        """The best score of each class."""
        assert self._dino is not None
        return np.stack([self._caption.scores(logits).max(axis=0) for logits in self._dino.taken()]).astype(np.float32)

    def _present(self, wanted: np.ndarray) -> np.ndarray:
        return np.tile(wanted[:, None], (1, self._classes))
