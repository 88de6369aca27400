"""The chain: tag, detect, segment, fuse."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, ParamSpec, TypeVar

import numpy as np
from PIL import Image

from .. import __version__
from ..batch import Boxes, Images, Labels, Masks, Photograph, PseudoLabels
from ..classes import STUFF, ClassList, check_label_map, cleaned, named_list, parse_classes
from ..engines.engine import Engine
from ..engines.opening import choose, open_graph
from ..engines.openvino import checked_proof
from ..engines.plan import MODULES, plan_here
from ..errors import UsageError, WsssError, WsssWarning
from ..photographs import MAX_PIXELS, from_pillow, read_photograph
from ..spec import CONCEPT, MODELS, SCORE_RULES, Model, ScoreRule, box_thresholds
from .bundles import find_bundle
from .concept import InstanceFinder, KnownMasks
from .detect import Detector
from .device import Device, cut_to_fit
from .fuse import Fuser
from .given.names import twins_of
from .given.stages import BoxesFromFile, Given, LabelsFromFile
from .remembered import RememberedEngine
from .resize import Resizer
from .segment import MaskPredictor
from .tag import Tagger
from .trained_segmenter import SegmenterStage, classes_of, no_boxes, no_masks

P = ParamSpec("P")
R = TypeVar("R")
Q = ParamSpec("Q")
S = TypeVar("S")

AnyImage = str | Path | np.ndarray | Image.Image | Photograph
MAX_EXPONENT, MAX_LOOKS = 8, 8
USUAL_BATCH = 8
"""Images labeled together where the engines do not set a batch size."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """All thresholds between the models' outputs and the label map. Saved with each run."""

    tag_threshold: float | None = None
    """Lowest CLIP probability of a class that is present; None takes the bundle's."""
    tag_thresholds: Mapping[str, float] | None = None
    """The same of single classes, by name, in place of ``tag_threshold``; `wsss.runtime.given.thresholds` reads a file."""
    views: int | None = None
    """K: CLIP sees 1 x 1, ..., K x K overlapping views of a photograph; None takes the bundle's."""
    score_rule: ScoreRule | None = None
    """A box's score is the largest of its phrase's token scores (``max``, as Grounding-DINO's ``predict()``) or their mean
    (``mean``, as its COCO evaluation); None takes the bundle's."""
    box_threshold: float | None = None
    """Lowest score of a box under that rule; None: the bundle's for the rule, or all given boxes."""
    nms: float = 0.5
    """Boxes of one class with a larger IoU count as one object."""
    nms_across: float = 0.8
    """Boxes of two classes with a larger IoU count as one object, of the class with the better score."""
    enclosing: bool = True
    """Whether boxes stay that hold two or more better ones of their class, or nearly the whole photograph beside a better one."""
    tiles: int = 1
    """K: the detector also looks at K x K overlapping tiles of a photograph, for small objects. 1: at the whole one alone."""
    margin: float = 0.1
    """A pixel is void where another class's value is within this share of the winner's."""
    quality_exponent: float = 1.0
    """Exponent of SAM's predicted IoU in a mask's value, box score x predicted IoU x mask probability; 0 leaves it out."""
    multimask: bool = False
    """Whether SAM gives the best of its three masks of a box, by predicted IoU, in place of its one mask."""
    min_region: int = 0
    """Holes and separate parts of a mask below so many pixels of the photograph are filled and removed; 0: none."""
    stability_exponent: float = 0.0
    """Exponent of a mask's stability score (its area at logits above +1 over that above -1) in its value; 0 leaves it out."""
    gate: bool = True
    """Whether CLIP decides which classes the detector looks for; otherwise it looks for all of them in every image."""

    def __post_init__(self) -> None:
        for name in ("tag_threshold", "box_threshold", "nms", "nms_across", "margin"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                default = getattr(Rules, name)
                raise UsageError(
                    f"--{name.replace('_', '-')}: expected a number in 0..1, got {value}",
                    hint=f"the default is {'the one of the bundle' if default is None else default}",
                )
        if self.score_rule not in (None, *SCORE_RULES):
            raise UsageError(f"--score-rule: expected {' or '.join(SCORE_RULES)}, got {self.score_rule!r}")
        for name in ("views", "tiles"):
            if (count := getattr(self, name)) is not None and not 1 <= count <= MAX_LOOKS:
                raise UsageError(
                    f"--{name}: expected 1 to {MAX_LOOKS}, got {count}", hint=f"--{name} 2; the work grows with its square"
                )
        for name, most in (("quality_exponent", MAX_EXPONENT), ("stability_exponent", MAX_EXPONENT), ("min_region", MAX_PIXELS)):
            if not 0 <= (value := getattr(self, name)) <= most:
                raise UsageError(
                    f"--{name.replace('_', '-')}: expected a number in 0..{most}, got {value}",
                    hint=f"the default is {getattr(Rules, name)}",
                )
        for name, value in (self.tag_thresholds or {}).items():
            if not 0 <= value <= 1:
                raise UsageError(f"--tag-thresholds: {name!r}: expected a number in 0..1, got {value}")


class Timed(Generic[P, R]):
    """A stage and its computing time: ``seconds`` of its calls since the last reset, without waits for the device."""

    def __init__(self, stage: Callable[P, R], device: Device | None = None) -> None:
        self.stage, self._device = stage, device or Device()
        self.seconds = 0.0
        self._counting = threading.Lock()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.part(self.stage, *args, **kwargs)

    def part(self, part: Callable[Q, S], *args: Q.args, **kwargs: Q.kwargs) -> S:
        """Call a part of the stage and add its time; parts may run in several threads."""
        start = time.perf_counter() - self._device.waited()
        try:
            return cut_to_fit(part, *args, **kwargs)
        finally:
            with self._counting:
                self.seconds += time.perf_counter() - self._device.waited() - start


class Chain:
    """Photographs in, pseudo-labels out: the stages of `Labeler` and of a run. Make one with ``Chain.open``."""

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
        given: Given | None = None,
    ) -> None:
        self.classes = classes
        self.device = device or Device()
        self.tag = Timed(tag, self.device)
        self.detect = Timed(detect, self.device)
        self.segment = Timed(segment, self.device)
        self.fuse = Timed(fuse, self.device)
        self.settings = settings or {}
        """Everything that determines the result: rules, engines and their hashes. Saved in the label store."""
        self.given = given or Given()

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
        masks: bool = True,
        confidence: bool = False,
        until: Literal["tag", "detect", "fuse"] = "fuse",
    ) -> Chain:
        """Load only the engines that this run needs.

        Args:
            bundle: a folder made by ``wsss export``, ``mini``, or ``hub:OWNER/NAME``.
            classes: ``voc``, ``coco``, a file, names separated by commas, or a ClassList. A segmenter has its own.
            model: ``chain`` (CLIP, Grounding-DINO, SAM; of a bundle without the last two, its SAM 3), ``sam3`` (CLIP, SAM 3), or
                ``segmenter``, the bundle's trained segmenter. SAM 3 needs no CLIP.
            engine: ``auto``, ``ort``, ``openvino``, ``trt``, ``trt-rtx``, ``eager``.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            unverified: accept TensorRT engines whose parity gate has not run; the settings record it.
            labels: JSON of image names to class names; replaces CLIP.
            boxes: VOC XML or YOLO folder, COCO or wsss JSON file, or a label store; replaces CLIP and Grounding-DINO.
            ignore_unknown: ignore and count entries of ``labels`` and ``boxes`` with classes that are not in the list.
            masks: keep SAM's mask of each box, in results and in label stores. A segmenter has none.
            confidence: make a map of each pixel's confidence too. A segmenter always does.
            until: the last stage that will be called; the models of later ones need not be in the bundle.

        Warns:
            WsssWarning: the bundle's models are ``mini`` and know none of the classes.

        Raises:
            WsssError: the bundle lacks a model, a file is damaged, or a class list or flag is not valid.
        """
        rules = rules or Rules()
        if model not in ("chain", CONCEPT, "segmenter"):
            raise UsageError(f"--model: expected chain, {CONCEPT} or segmenter, got {model!r}")
        if rules.tiles > 1 and (boxes or model == "segmenter"):
            raise UsageError("--tiles: Grounding-DINO is not asked", hint="leave it out with --boxes and --model segmenter")
        if classes is None and model != "segmenter":
            raise UsageError("--classes is missing: the chain needs the names of the classes to look for", hint="--classes voc")
        given_classes = classes if classes is None or isinstance(classes, ClassList) else parse_classes(classes)
        if given_classes is not None and until == "fuse":
            check_label_map(given_classes)
        folder = find_bundle(bundle)
        chosen, where = choose(engine, device, (folder.model(name) for name in folder.models()))
        settings: dict[str, Any] = {
            "engine": chosen,
            "rules": vars(rules) | {},
            "models": {},
            "bundle": {"name": os.path.basename(os.path.abspath(bundle)), "variants": {}, "thresholds": {}},
            "wsss": __version__,
        }

        def resolve(name: str, threshold: float, default: object) -> None:
            """Record the threshold that a stage uses, and the bundle's own."""
            settings["rules"][name], settings["bundle"]["thresholds"][name] = threshold, float(str(default))

        if unverified:
            settings["unverified"] = True
        place = Device(at_once=1 if where == "cpu" else 2, queues=chosen != "ort")

        def opener(of: Model, graph: str) -> Engine:
            name = f"{of.manifest.family}/{graph}"
            return place.engine(open_graph(of, graph, chosen, device=where, unverified=unverified), name)

        def text_opener(of: Model) -> Engine:
            """The model's graph ``text``; on the CPU, texts of an earlier start are not computed again."""
            if where != "cpu":
                return opener(of, "text")
            if chosen == "openvino" and not unverified:  # also where the engine need not be opened
                checked_proof(of, "text")
            name = f"{chosen}, unverified" if unverified else chosen
            return RememberedEngine(of, "text", name, lambda: opener(of, "text"))

        def resizer(of: Model) -> Resizer | None:
            """Inputs are made on a GPU by engines that keep their outputs there, if the bundle has the graphs for it."""
            names = {canvas: f"resize-{canvas[0]}x{canvas[1]}" for canvas in of.manifest.preprocess.canvases}
            if chosen not in MODULES or not of.manifest.graphs.keys() >= set(names.values()):
                return None
            return Resizer(lambda canvas: opener(of, names[canvas]))

        def take(name: str) -> Model:
            opened = folder.model(name)
            settings["models"][name] = opened.manifest.identity()
            settings["bundle"]["variants"][name] = opened.manifest.variant
            for graph, spec in opened.manifest.graphs.items():
                if chosen in MODULES and (plan := plan_here(spec, chosen, int(where.partition(":")[2]))):
                    settings.setdefault("plans", {})[f"{name}/{graph}"] = plan.sha256
            return opened

        if model == "segmenter":
            if until != "fuse":
                raise UsageError(f"--stage {until}: a segmenter has no such stage", hint="leave out --model segmenter")
            if labels or boxes:
                raise UsageError("--labels and --boxes cannot be used with --model segmenter")
            segmenter = take("segmenter")
            known = classes_of(segmenter, given_classes)
            stage = SegmenterStage(segmenter, lambda canvas: opener(segmenter, f"image-{canvas[0]}x{canvas[1]}"))
            nothing = ConstantTags(known, False)
            return cls(known, tag=nothing, detect=no_boxes, segment=no_masks, fuse=stage, settings=settings, device=place)
        assert given_classes is not None
        known, models = given_classes, folder.models()
        concept = model == CONCEPT or (CONCEPT in models and not set(MODELS[1:]) <= set(models))
        if concept:
            _check_concept(rules, boxes)
        elif CONCEPT in models:
            settings["bundle"]["note"] = (
                f"{CONCEPT} is not used: --model {CONCEPT} takes it in place of {' and '.join(MODELS[1:])}"
            )

        if ignore_unknown and not labels and not boxes:
            raise UsageError("--ignore-unknown needs --labels or --boxes", hint="without them, --classes alone decides")
        given = Given.open(
            known,
            labels,
            boxes,
            ignore_unknown=ignore_unknown,
            threshold=rules.box_threshold,
            warn=lambda message: place.warn(message),
        )
        for name in ("tag_thresholds", "views"):
            if getattr(rules, name) and (given.boxes or given.labels or not rules.gate):
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag}: CLIP is not asked", hint="leave it out with --labels, --boxes and --no-gate")
        tag: Callable[[Images], Labels]
        detect: Callable[[Images, Labels], Boxes]
        if given.boxes:
            detect = given.boxes
            tag = given.labels or ConstantTags(known, False)
        else:
            if given.labels:
                tag = given.labels
            elif rules.gate and concept and "clip" not in models:
                for name in ("tag_threshold", "tag_thresholds", "views"):
                    if getattr(rules, name) is not None:
                        flag = f"--{name.replace('_', '-')}"
                        raise UsageError(f"{flag}: the bundle has no clip", hint="leave it out, or: wsss export --model clip")
                tag, settings["rules"]["gate"] = ConstantTags(known, True), False
                settings["bundle"]["note"] = (
                    f"the bundle has no clip: {CONCEPT} looks for all {len(known)} classes in every photograph, and decides "
                    "which are there"
                )
            elif rules.gate:
                clip = take("clip")
                graphs = opener(clip, "image"), text_opener(clip)
                tag = tagger = cut_to_fit(
                    Tagger,
                    clip,
                    *graphs,
                    known,
                    threshold=rules.tag_threshold,
                    thresholds=rules.tag_thresholds,
                    views=rules.views,
                    resizer=resizer(clip),
                )
                resolve("tag_threshold", tagger.threshold, clip.manifest.settings["threshold"])
            else:
                tag = ConstantTags(known, True)
        shared: dict[str, Any] = {"tag": tag, "settings": settings, "device": place, "given": given}
        if until == "tag":
            if isinstance(tag, ConstantTags):
                raise UsageError("--stage tag: CLIP is not asked", hint="leave out --no-gate and --boxes")
            _warn_of(known, settings)
            return cls(known, detect=no_boxes, segment=no_masks, fuse=_no_labels, **shared)
        segment: Callable[[Images, Boxes], Masks]
        if concept:
            sam = take(CONCEPT)
            detect = finder = cut_to_fit(
                InstanceFinder,
                sam,
                text_opener(sam),
                opener(sam, "vision"),
                opener(sam, "detector"),
                opener(sam, "outline"),
                known,
                threshold=rules.box_threshold,
                nms=rules.nms,
                nms_across=rules.nms_across,
                enclosing=rules.enclosing,
                decides=isinstance(tag, ConstantTags),
                resizer=resizer(sam),
            )
            resolve("box_threshold", finder.threshold, sam.manifest.settings["box_threshold"])
        elif not given.boxes:
            dino = take("grounding-dino")
            detect = detector = cut_to_fit(
                Detector,
                dino,
                text_opener(dino),
                lambda canvas: opener(dino, f"image-{canvas[0]}x{canvas[1]}"),
                known,
                score_rule=rules.score_rule,
                threshold=rules.box_threshold,
                resizer=resizer(dino),
                nms=rules.nms,
                nms_across=rules.nms_across,
                enclosing=rules.enclosing,
                tiles=rules.tiles,
            )
            settings["rules"]["score_rule"] = detector.score_rule
            own = box_thresholds(dino.manifest.settings)[1].get(detector.score_rule, detector.threshold)
            resolve("box_threshold", detector.threshold, own)
        _warn_of(known, settings)
        if until == "detect":
            return cls(known, detect=detect, segment=no_masks, fuse=_no_labels, **shared)
        if concept:
            segment = KnownMasks(sam)
        else:
            sam = take("sam")
            segment = MaskPredictor(
                sam,
                opener(sam, "encoder"),
                opener(sam, "decoder"),
                resizer=resizer(sam),
                multimask=rules.multimask,
                min_region=rules.min_region,
                stability=bool(rules.stability_exponent),
            )
        fuse = Fuser(
            sam,
            opener(sam, "fuse"),
            margin=rules.margin,
            quality_exponent=rules.quality_exponent,
            stability_exponent=rules.stability_exponent,
            confidence=confidence,
            keep_masks=masks,
        )
        # Absent otherwise, as in stores of versions that had none.
        settings |= {name: True for name, kept in (("masks", masks), ("confidence", confidence)) if kept}
        # Their contents are hashed in the line of each image, so that corrections do not need a new store.
        if names := {
            flag: os.path.basename(os.path.abspath(path)) for flag, path in (("labels", labels), ("boxes", boxes)) if path
        }:
            settings["given"] = names
        if ignored := {
            flag: dict(sorted(stage.ignored.items()))
            for flag, stage in (("labels", given.labels), ("boxes", given.boxes))
            if stage and stage.ignored
        }:
            settings["ignored"] = ignored
        return cls(known, detect=detect, segment=segment, fuse=fuse, **shared)

    def pseudo_label(self, images: Images) -> PseudoLabels:
        """Label maps for B photographs: (H, W) uint8 each, 0 background, 255 void."""
        labels = self.tag(images)  # which classes are in each image
        boxes = self.detect(images, labels)  # where, in pixels of the photograph
        masks = self.segment(images, boxes)  # the outline of each box
        return self.fuse(images, labels, boxes, masks)

    def label(self, images: AnyImage | Sequence[AnyImage]) -> PseudoLabels:
        """Label images given as paths, arrays (H, W, 3) uint8 RGB or PIL images, in one batch and without a store.

        Raises:
            ImageError: a file that is not a readable image.
            WsssError: an array of another shape, or an image without an entry in ``labels`` or ``boxes``.
        """
        many = images if isinstance(images, Sequence) and not isinstance(images, str) else [images]
        photos = [photograph(image, number) for number, image in enumerate(many)]
        self.check(photos)
        return self.pseudo_label(photos)

    def check(self, photos: Images, twins: Mapping[str, Sequence[str]] | None = None) -> None:
        """Check photographs before they are labeled.

        Args:
            twins: from `twins_of`, of all photographs that belong together; None: of these ones.

        Warns:
            WsssWarning: a photograph is almost blank.

        Raises:
            WsssError: an image without an entry in ``labels`` or ``boxes``.
        """
        twins = twins_of(photo.name for photo in photos) if twins is None else twins
        for photo in photos:
            if reason := self.missing(photo, twins.get(photo.name, ())):
                raise WsssError(reason)
            if photo.warning:
                warnings.warn(f"{photo.name}: {photo.warning}", WsssWarning, stacklevel=3)

    def missing(self, photo: Photograph, twins: Sequence[str] = ()) -> str | None:
        """Why this image cannot be labeled, or None: ``--labels`` or ``--boxes`` have no entry of it, or one that does not fit.

        Args:
            twins: photographs of the run with the same stem, this one included, which may share its annotation (`twins_of`).
        """
        for stage in (self.tag.stage, self.detect.stage):
            if isinstance(stage, (LabelsFromFile, BoxesFromFile)) and (error := stage.missing(photo, twins)):
                return f"{photo.name}: {error.message}" + (f"; {error.hint}" if error.hint else "")
        return None

    def canvas(self, photo: Photograph) -> tuple[int, int] | None:
        """The detector's canvas for this photograph; photographs of one canvas share calls. None without a detector."""
        detector = self.detect.stage
        return detector.frame_of(photo).canvas if isinstance(detector, Detector) else None

    def usual_batch(self) -> int:
        """Images to label together: the ``opt`` batch size of SAM's image encoder, usually the slowest engine."""
        for stage in (self.detect.stage, self.segment.stage):
            if isinstance(stage, (InstanceFinder, MaskPredictor)):
                return stage.usual_batch()
        return USUAL_BATCH

    def padding(self) -> float | None:
        """Share of the detector's canvases so far that was padding; None without a detector."""
        detector = self.detect.stage
        return detector.padding() if isinstance(detector, Detector) else None

    def take_seconds(self) -> dict[str, float]:
        """Seconds that each stage took since the last call of this method."""
        stages: dict[str, Timed[Any, Any]] = {"tag": self.tag, "detect": self.detect, "segment": self.segment, "fuse": self.fuse}
        taken = {name: stage.seconds for name, stage in stages.items()}
        for stage in stages.values():
            stage.seconds = 0.0
        return taken


def doubtful_classes(classes: ClassList, settings: Mapping[str, Any]) -> list[str]:
    """Warnings of a run: what is worth knowing about the choice of its models, and models that cannot find its classes, because
    those of ``mini`` know none of them, or because a detector is asked for regions without a shape."""
    bundle = settings.get("bundle", {})
    said = [bundle["note"]] if "note" in bundle else []
    variants = bundle.get("variants", {})
    known = named_list("mini").names
    words = {word.casefold() for words in classes.prompts for word in words}
    if "mini" in (variants.get("clip"), variants.get("grounding-dino")) and not words & {name.casefold() for name in known}:
        said.append(
            f"{classes.where}: the bundle has the small models of wsss mini, which know only {', '.join(known)}; "
            f"none of the {len(classes.names)} classes is among them: expect wrong labels. Export models for photographs: "
            "wsss export --model all --bundle bundle"
        )
    if "grounding-dino" in variants and (stuff := [name for name in classes.names if cleaned(name) in STUFF]):
        said.append(
            f"{classes.where}: {', '.join(stuff)}: regions without a shape, which a detector does not find: expect wrong boxes. "
            "docs/classes.md says what can be done"
        )
    return said


def _check_concept(rules: Rules, boxes: str | Path | None) -> None:
    """Raise UsageError for settings that have no meaning for SAM 3."""
    if boxes:
        raise UsageError(
            f"--boxes: {CONCEPT} outlines what it finds itself", hint="wsss export --model sam, whose SAM takes boxes"
        )
    if rules.score_rule is not None:
        raise UsageError(f"--score-rule: the score of {CONCEPT} is that of the whole phrase", hint="omit --score-rule")
    foreign = {
        "quality_exponent": "predicts no IoU",
        "stability_exponent": "predicts no stability score",
        "multimask": "gives one mask of each object",
        "min_region": "gives masks of whole objects, whose regions stay as they are",
        "tiles": "sees whole photographs",
    }
    for name, reason in foreign.items():
        if getattr(rules, name) != getattr(Rules, name):
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag}: {CONCEPT} {reason}", hint=f"omit {flag}")


def _warn_of(classes: ClassList, settings: Mapping[str, Any]) -> None:
    for message in doubtful_classes(classes, settings):
        warnings.warn(message, WsssWarning, stacklevel=3)


def _no_labels(images: Images, labels: Labels, boxes: Boxes, masks: Masks) -> PseudoLabels:
    """The last stage of a chain that was opened for the stages before it."""
    raise AssertionError("opened until an earlier stage")


class ConstantTags:
    """Tags every image with all classes, or with none."""

    def __init__(self, classes: ClassList, present: bool) -> None:
        self._classes, self._present = len(classes.names), present

    def __call__(self, images: Images) -> Labels:
        present = np.full((len(images), self._classes), self._present)
        return Labels(present.astype(np.float32), present)


def photograph(image: object, number: int) -> Photograph:
    """Read a path, an array (H, W, 3) uint8 RGB, a PIL image, or a `Photograph`, which is returned.

    A path has the name of its file, a PIL image that of the file it was opened from, others are called by their ``number``.

    Raises:
        ImageError: a file that is not a readable image. WsssError: another type or shape.
    """
    if isinstance(image, Photograph):
        return image
    if isinstance(image, (str, Path)):
        return read_photograph(Path(image), Path(image).name)
    if isinstance(image, Image.Image):
        return from_pillow(image, os.path.basename(getattr(image, "filename", "") or f"{number}"))
    if not isinstance(image, np.ndarray):
        raise WsssError(
            f"image {number}: expected a path, an array (H, W, 3) uint8 RGB or a PIL image, got {type(image).__name__}",
            hint="images by URL: download them first",
        )
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise WsssError(
            f"image {number}: expected (H, W, 3) uint8 RGB, got {image.shape} {image.dtype}",
            hint="values in 0..1: (255 * image).astype('uint8'); OpenCV's BGR: image[:, :, ::-1]; gray: np.stack([image] * 3, 2)",
        )
    return Photograph(name=f"{number}", pixels=image)
