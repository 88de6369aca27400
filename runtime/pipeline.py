"""The chain: tag, detect, segment, fuse."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

import numpy as np

from ..batch import Boxes, Images, Labels, Masks, Photograph, PseudoLabels
from ..classes import ClassList, parse_classes
from ..engines.opening import open_graph, resolve
from ..errors import UsageError, WsssError
from ..spec import Model, open_bundle
from .detect import Detector
from .fuse import Fuser
from .given import GivenBoxes, GivenLabels
from .images import read_photograph
from .segment import Outliner
from .tag import Tagger

P = ParamSpec("P")
R = TypeVar("R")

MINI = Path(__file__).resolve().parent.parent / "mini" / "bundle"
"""The bundle shipped with the package, called ``mini``: small models of the same classes, trained on drawn scenes."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Every choice between the models' outputs and the label map. Saved with each run."""

    tag_threshold: float | None = None
    """Least CLIP probability of a class that is present; None takes the bundle's."""
    box_threshold: float | None = None
    """Least Grounding-DINO score of a box (mean over the tokens of its phrase); None takes the bundle's."""
    nms: float = 0.5
    """Boxes of one class with a larger IoU are one object."""
    nms_across: float = 0.8
    """Boxes of two classes with a larger IoU are one object: the better class keeps it."""
    margin: float = 0.1
    """A pixel is void where another class's value is within this share of the winner's."""
    gate: bool = True
    """CLIP decides which classes the detector looks for; without it, all of them in every image."""

    def __post_init__(self) -> None:
        for name in ("tag_threshold", "box_threshold", "nms", "nms_across", "margin"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UsageError(f"--{name.replace('_', '-')}: expected a number in 0..1, got {value}")


class Timed(Generic[P, R]):
    """A stage with a stopwatch: ``seconds`` is what its calls took since it was last reset."""

    def __init__(self, stage: Callable[P, R]) -> None:
        self.stage = stage
        self.seconds = 0.0

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        start = time.perf_counter()
        try:
            return self.stage(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - start


class Labeler:
    """Photographs in, pseudo-labels out. Make one with ``Labeler.open``."""

    def __init__(
        self,
        classes: ClassList,
        *,
        tag: Callable[[Images], Labels],
        detect: Callable[[Images, Labels], Boxes],
        segment: Callable[[Images, Boxes], Masks],
        fuse: Callable[[Images, Labels, Boxes, Masks], PseudoLabels],
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.classes = classes
        self.tag = Timed(tag)
        self.detect = Timed(detect)
        self.segment = Timed(segment)
        self.fuse = Timed(fuse)
        self.settings = settings or {}
        """All that decides the result: rules, engines and their hashes. A label store keeps it."""

    @classmethod
    def open(
        cls,
        bundle: str | Path = "mini",
        *,
        classes: str | ClassList,
        engine: str = "auto",
        device: str = "cpu",
        labels: str | Path | None = None,
        boxes: str | Path | None = None,
        rules: Rules | None = None,
    ) -> Labeler:
        """Loads the engines that this run needs, and no others.

        Args:
            bundle: a folder made by ``wsss export``, or ``mini``.
            classes: ``voc``, ``coco``, a file, names separated by commas, or a ClassList.
            engine: ``auto``, ``ort``, ``eager``.
            device: ``cpu`` or ``cuda``.
            labels: JSON of image names to class names; takes the place of CLIP.
            boxes: VOC XML folder, JSON file or manifest; takes the place of CLIP and Grounding-DINO.

        Raises:
            WsssError: the bundle lacks a model, a file is damaged, a class list or flag makes no sense.
        """
        rules = rules or Rules()
        known = classes if isinstance(classes, ClassList) else parse_classes(classes)
        folder = open_bundle(MINI if str(bundle) == "mini" else Path(bundle))
        opener = partial(open_graph, engine=engine, device=device)
        settings: dict[str, Any] = {"engine": resolve(engine), "rules": vars(rules) | {}, "models": {}}

        def model(name: str) -> Model:
            opened = folder.model(name)
            settings["models"][name] = opened.manifest.identity()
            return opened

        given_labels = GivenLabels(Path(labels), known) if labels else None
        tag: Callable[[Images], Labels]
        detect: Callable[[Images, Labels], Boxes]
        if boxes:
            detect = GivenBoxes(Path(boxes), known)
            tag = given_labels or _Everything(known, False)
        else:
            if given_labels:
                tag = given_labels
            elif rules.gate:
                clip = model("clip")
                tag = Tagger(clip, opener(clip, "image"), opener(clip, "text"), known, threshold=rules.tag_threshold)
            else:
                tag = _Everything(known, True)
            detect = _open_detector(model("grounding-dino"), opener, known, rules)
        sam = model("sam")
        segment = Outliner(sam, opener(sam, "encoder"), opener(sam, "decoder"))
        fuse = Fuser(sam, opener(sam, "fuse"), margin=rules.margin)
        return cls(known, tag=tag, detect=detect, segment=segment, fuse=fuse, settings=settings)

    def pseudo_label(self, images: Images) -> PseudoLabels:
        """Label maps for B photographs: (H, W) uint8 each, 0 background, 255 void."""
        labels = self.tag(images)  # which classes are in each image
        boxes = self.detect(images, labels)  # where, in pixels of the photograph
        masks = self.segment(images, boxes)  # the outline of each box
        return self.fuse(images, labels, boxes, masks)

    def label(self, images: str | Path | np.ndarray | Sequence[str | Path | np.ndarray]) -> PseudoLabels:
        """Pseudo-labels of images given as paths or arrays (H, W, 3) uint8 RGB, in one batch and without a store.

        Raises:
            ImageError: a file that is no readable image.
            WsssError: an array of another shape, or an image without an entry in ``labels`` or ``boxes``.
        """
        many = [images] if isinstance(images, (str, Path, np.ndarray)) else images
        photos = [_photograph(image, number) for number, image in enumerate(many)]
        for photo in photos:
            if reason := self.missing(photo.name):
                raise WsssError(reason)
        return self.pseudo_label(photos)

    def missing(self, name: str) -> str | None:
        """Why this image cannot be labelled (``--labels`` or ``--boxes`` have no entry for it), or None."""
        for stage in (self.tag.stage, self.detect.stage):
            if isinstance(stage, (GivenLabels, GivenBoxes)) and (reason := stage.missing(name)):
                return reason
        return None

    def take_seconds(self) -> dict[str, float]:
        """Seconds that each stage took since the last call."""
        stages: dict[str, Timed[Any, Any]] = {"tag": self.tag, "detect": self.detect, "segment": self.segment, "fuse": self.fuse}
        taken = {name: stage.seconds for name, stage in stages.items()}
        for stage in stages.values():
            stage.seconds = 0.0
        return taken


class _Everything:
    """Tags without looking: every class in every image, or none."""

    def __init__(self, classes: ClassList, present: bool) -> None:
        self._classes, self._present = len(classes.names), present

    def __call__(self, images: Images) -> Labels:
        present = np.full((len(images), self._classes), self._present)
        return Labels(present.astype(np.float32), present)


def _open_detector(model: Model, opener: Callable[..., Any], classes: ClassList, rules: Rules) -> Detector:
    return Detector(
        model,
        opener(model, "text"),
        lambda canvas: opener(model, f"image-{canvas[0]}x{canvas[1]}"),
        classes,
        threshold=rules.box_threshold,
        nms=rules.nms,
        nms_across=rules.nms_across,
    )


def _photograph(image: str | Path | np.ndarray, number: int) -> Photograph:
    if not isinstance(image, np.ndarray):
        return read_photograph(Path(image), Path(image).name)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise WsssError(f"image {number}: expected (H, W, 3) uint8 RGB, got {image.shape} {image.dtype}")
    return Photograph(name=f"{number}", pixels=image)
