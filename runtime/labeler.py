"""The chain: tag, detect, segment, fuse."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

import numpy as np

from .. import __version__
from ..batch import Boxes, Images, Labels, Masks, Photograph, PseudoLabels
from ..classes import ClassList, named_list, parse_classes
from ..engines.engine import Engine
from ..engines.opening import choose, open_graph
from ..errors import UsageError, WsssError, WsssWarning
from ..photographs import read_photograph
from ..spec import Model, open_bundle
from .detect import Detector
from .device import Device, cut_to_fit
from .fuse import Fuser
from .given.forms import given_hash
from .given.names import twins_of
from .given.stages import BoxesFromFile, LabelsFromFile
from .segment import MaskPredictor
from .tag import Tagger
from .trained_segmenter import SegmenterStage, classes_of, no_boxes, no_masks

P = ParamSpec("P")
R = TypeVar("R")
Q = ParamSpec("Q")
S = TypeVar("S")

USUAL_BATCH = 8
"""Images labeled together where no engine says otherwise."""
MINI = Path(__file__).resolve().parent.parent / "mini" / "bundle"
"""The bundle shipped with the package, called ``mini``: small models of the same classes, trained on drawn scenes."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Every choice between the models' outputs and the label map. Saved with each run."""

    tag_threshold: float | None = None
    """Least CLIP probability of a class that is present; None takes the bundle's."""
    box_threshold: float | None = None
    """Least Grounding-DINO score of a box (mean over the tokens of its phrase); None takes the bundle's, and all given boxes."""
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
    """A stage with a stopwatch: ``seconds`` is what its calls took since it was last reset, waits for the device left out."""

    def __init__(self, stage: Callable[P, R], device: Device | None = None) -> None:
        self.stage, self._device = stage, device or Device()
        self.seconds = 0.0
        self._counting = threading.Lock()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.part(self.stage, *args, **kwargs)

    def part(self, part: Callable[Q, S], *args: Q.args, **kwargs: Q.kwargs) -> S:
        """Calls a part of the stage on the same stopwatch; parts may run in several threads."""
        start = time.perf_counter() - self._device.waited()
        try:
            return cut_to_fit(part, *args, **kwargs)
        finally:
            with self._counting:
                self.seconds += time.perf_counter() - self._device.waited() - start


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
        device: Device | None = None,
    ) -> None:
        self.classes = classes
        self.device = device or Device()
        self.tag = Timed(tag, self.device)
        self.detect = Timed(detect, self.device)
        self.segment = Timed(segment, self.device)
        self.fuse = Timed(fuse, self.device)
        self.settings = settings or {}
        """All that decides the result: rules, engines and their hashes. A label store keeps it."""

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        *,
        classes: str | ClassList | None = None,
        model: str = "chain",
        engine: str = "auto",
        device: str = "auto",
        unverified: bool = False,
        labels: str | Path | None = None,
        boxes: str | Path | None = None,
        ignore_unknown: bool = False,
        rules: Rules | None = None,
    ) -> Labeler:
        """Loads the engines that this run needs, and no others.

        Args:
            bundle: a folder made by ``wsss export``, or ``mini``.
            classes: ``voc``, ``coco``, a file, names separated by commas, or a ClassList. A segmenter brings its own.
            model: ``chain`` (CLIP, Grounding-DINO, SAM) or ``segmenter``, the trained one of the bundle.
            engine: ``auto``, ``ort``, ``trt``, ``trt-rtx``, ``eager``.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            unverified: take TensorRT engines whose gate has not run; the settings record it.
            labels: JSON of image names to class names; takes the place of CLIP.
            boxes: VOC XML or YOLO folder, COCO or our JSON, or a label store; takes the place of CLIP and Grounding-DINO.
            ignore_unknown: leave out what ``labels`` and ``boxes`` say of classes that are not in the list, and count it.

        Warns:
            WsssWarning: the bundle's models are ``mini`` and know none of the classes.

        Raises:
            WsssError: the bundle lacks a model, a file is damaged, a class list or flag makes no sense.
        """
        rules = rules or Rules()
        if model not in ("chain", "segmenter"):
            raise UsageError(f"--model: expected chain or segmenter, got {model!r}")
        if classes is None and model == "chain":
            raise UsageError("--classes is missing: the chain finds what it is told to look for", hint="--classes voc")
        typed = classes if classes is None or isinstance(classes, ClassList) else parse_classes(classes)
        folder = open_bundle(MINI if str(bundle) == "mini" else Path(bundle))
        chosen, where = choose(engine, device, (folder.model(name) for name in folder.models()))
        settings: dict[str, Any] = {
            "engine": chosen,
            "rules": vars(rules) | {},
            "models": {},
            "bundle": {"name": os.path.basename(os.path.abspath(bundle)), "variants": {}, "thresholds": {}},
            "wsss": __version__,
        }

        def resolve(name: str, threshold: float, default: object) -> None:
            """Notes the threshold that a stage goes by, and the bundle's own."""
            settings["rules"][name], settings["bundle"]["thresholds"][name] = threshold, float(str(default))

        if unverified:
            settings["unverified"] = True
        place = Device(at_once=1 if where == "cpu" else 2, queues=chosen != "ort")

        def opener(of: Model, graph: str) -> Engine:
            name = f"{of.manifest.family}/{graph}"
            return place.engine(open_graph(of, graph, chosen, device=where, unverified=unverified), name)

        def take(name: str) -> Model:
            opened = folder.model(name)
            settings["models"][name] = opened.manifest.identity()
            settings["bundle"]["variants"][name] = opened.manifest.variant
            for graph, spec in opened.manifest.graphs.items():
                if plan := spec.plans.get(chosen):
                    settings.setdefault("plans", {})[f"{name}/{graph}"] = plan.sha256
            return opened

        if model == "segmenter":
            if labels or boxes:
                raise UsageError("--labels and --boxes go with the chain, --model segmenter needs neither")
            segmenter = take("segmenter")
            known = classes_of(segmenter, typed)
            stage = SegmenterStage(segmenter, lambda canvas: opener(segmenter, f"image-{canvas[0]}x{canvas[1]}"))
            nothing = _Everything(known, False)
            return cls(known, tag=nothing, detect=no_boxes, segment=no_masks, fuse=stage, settings=settings, device=place)
        assert typed is not None
        known = typed

        if ignore_unknown and not labels and not boxes:
            raise UsageError("--ignore-unknown goes with --labels or --boxes")
        given_labels = LabelsFromFile(Path(labels), known, ignore_unknown=ignore_unknown) if labels else None
        given_boxes = None
        tag: Callable[[Images], Labels]
        detect: Callable[[Images, Labels], Boxes]
        if boxes:
            detect = given_boxes = BoxesFromFile(
                Path(boxes),
                known,
                ignore_unknown=ignore_unknown,
                threshold=rules.box_threshold,
                warn=lambda message: place.warn(message),
            )
            tag = given_labels or _Everything(known, False)
        else:
            if given_labels:
                tag = given_labels
            elif rules.gate:
                clip = take("clip")
                graphs = opener(clip, "image"), opener(clip, "text")
                tag = tagger = cut_to_fit(Tagger, clip, *graphs, known, threshold=rules.tag_threshold)
                resolve("tag_threshold", tagger.threshold, clip.manifest.settings["threshold"])
            else:
                tag = _Everything(known, True)
            dino = take("grounding-dino")
            detect = detector = cut_to_fit(
                Detector,
                dino,
                opener(dino, "text"),
                lambda canvas: opener(dino, f"image-{canvas[0]}x{canvas[1]}"),
                known,
                threshold=rules.box_threshold,
                nms=rules.nms,
                nms_across=rules.nms_across,
            )
            resolve("box_threshold", detector.threshold, dino.manifest.settings["box_threshold"])
        sam = take("sam")
        segment = MaskPredictor(sam, opener(sam, "encoder"), opener(sam, "decoder"))
        fuse = Fuser(sam, opener(sam, "fuse"), margin=rules.margin)
        if told := {name: given_hash(Path(path)) for name, path in (("labels", labels), ("boxes", boxes)) if path}:
            settings["given"] = told
        if message := strange_to_mini(known, settings):
            warnings.warn(message, WsssWarning, stacklevel=2)
        if ignored := {
            flag: dict(sorted(given.ignored.items()))
            for flag, given in (("labels", given_labels), ("boxes", given_boxes))
            if given and given.ignored
        }:
            settings["ignored"] = ignored
        return cls(known, tag=tag, detect=detect, segment=segment, fuse=fuse, settings=settings, device=place)

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
        twins = twins_of(photo.name for photo in photos)
        for photo in photos:
            if reason := self.missing(photo, twins.get(photo.name, ())):
                raise WsssError(reason)
            if photo.warning:
                warnings.warn(f"{photo.name}: {photo.warning}", WsssWarning, stacklevel=2)
        return self.pseudo_label(photos)

    def missing(self, photo: Photograph, twins: Sequence[str] = ()) -> str | None:
        """Why this image cannot be labeled, or None: ``--labels`` or ``--boxes`` say nothing of it, or nothing that fits it.

        Args:
            twins: photographs of the run with the same stem, this one too, that might share its annotation (`twins_of`).
        """
        for stage in (self.tag.stage, self.detect.stage):
            if isinstance(stage, (LabelsFromFile, BoxesFromFile)) and (error := stage.missing(photo, twins)):
                return f"{photo.name}: {error.message}" + (f"; {error.hint}" if error.hint else "")
        return None

    def canvas(self, photo: Photograph) -> tuple[int, int] | None:
        """The detector's canvas for this photograph; those of one canvas share its calls. None without a detector."""
        detector = self.detect.stage
        return detector.frame_of(photo).canvas if isinstance(detector, Detector) else None

    def usual_batch(self) -> int:
        """Images to label together: as many as SAM's encoder, the slowest engine as a rule, was built for (``opt``)."""
        stage = self.segment.stage
        return stage.usual_batch() if isinstance(stage, MaskPredictor) else USUAL_BATCH

    def padding(self) -> float | None:
        """Share of the detector's canvases so far that was no photograph; None without a detector."""
        detector = self.detect.stage
        return detector.padding() if isinstance(detector, Detector) else None

    def take_seconds(self) -> dict[str, float]:
        """Seconds that each stage took since the last call."""
        stages: dict[str, Timed[Any, Any]] = {"tag": self.tag, "detect": self.detect, "segment": self.segment, "fuse": self.fuse}
        taken = {name: stage.seconds for name, stage in stages.items()}
        for stage in stages.values():
            stage.seconds = 0.0
        return taken


def strange_to_mini(classes: ClassList, settings: Mapping[str, Any]) -> str:
    """What to tell a user whose classes the small models of ``mini`` do not know at all; empty for any other run."""
    variants = settings.get("bundle", {}).get("variants", {})
    if "mini" not in (variants.get("clip"), variants.get("grounding-dino")):
        return ""
    known = named_list("mini").names
    if {word.casefold() for words in classes.prompts for word in words} & {name.casefold() for name in known}:
        return ""
    return (
        f"--classes: the bundle's models are the small ones of wsss mini, which know {', '.join(known)} and nothing else; "
        f"none of the {len(classes.names)} classes is among them: expect wrong labels. Export models for photographs: "
        "wsss export --model all --bundle bundle"
    )


class _Everything:
    """Tags without looking: every class in every image, or none."""

    def __init__(self, classes: ClassList, present: bool) -> None:
        self._classes, self._present = len(classes.names), present

    def __call__(self, images: Images) -> Labels:
        present = np.full((len(images), self._classes), self._present)
        return Labels(present.astype(np.float32), present)


def _photograph(image: str | Path | np.ndarray, number: int) -> Photograph:
    if not isinstance(image, np.ndarray):
        return read_photograph(Path(image), Path(image).name)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise WsssError(f"image {number}: expected (H, W, 3) uint8 RGB, got {image.shape} {image.dtype}")
    return Photograph(name=f"{number}", pixels=image)
