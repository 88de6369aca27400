"""What the models found in labeled photographs, kept for any number of settings.

CLIP's scores do not depend on the settings. The detector's answer depends on its caption, the classes that a tag threshold lets
through: for each photograph, the detector runs once for each set of classes that some setting asks for. The masks of all boxes
that some setting keeps are decoded once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from ...batch import Boxes, Labels, Masks, Photograph
from ...errors import UsageError, WsssError
from ...frame import Frame
from ...spec import SCORE_RULES, ScoreRule
from ...train.evaluate.metrics import highest_label
from ..chain import Chain, Rules
from ..concept import InstanceFinder
from ..detect import Caption, Detector, boxes_from_logits, chosen
from ..fuse import mask_scores
from ..segment import MaskPredictor
from ..tag import Tagger, tag_thresholds, tagged
from .pixels import MaskPixels, fused, mask_pixels

BATCH = 8
"""Photographs in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The values that are tried."""

    tag_threshold: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    score_rule: tuple[ScoreRule, ...] = SCORE_RULES
    box_threshold: tuple[float, ...] = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
    nms: tuple[float, ...] = (0.4, 0.5, 0.6, 0.7)
    nms_across: tuple[float, ...] = (0.5, 0.6, 0.8, 0.9)
    enclosing: tuple[bool, ...] = (True, False)
    margin: tuple[float, ...] = (0.0, 0.1, 0.3)
    quality_exponent: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0)
    stability_exponent: tuple[float, ...] = (0.0, 1.0, 2.0)

    def including(self, rules: Rules) -> Grid:
        """The grid and these rules' values, all resolved."""
        own = {name: {*getattr(self, name), getattr(rules, name)} - {None} for name in vars(self)}
        return Grid(**{name: tuple(sorted(values)) for name, values in own.items()})


@dataclass(frozen=True, slots=True)
class Found:
    """What the detector and SAM found in one photograph, for one set of classes.

    boxes: by rule of scores, the boxes (N,) above the lowest threshold of the grid. mask: (N,) int64 for each rule, the number of
    each box's mask; -1 for boxes that no setting keeps. quality, stability: (M,) float32; no stability of a bundle that has none.
    pixels: M masks.
    """

    boxes: dict[ScoreRule, Boxes]
    mask: dict[ScoreRule, np.ndarray]
    quality: np.ndarray
    stability: np.ndarray | None
    pixels: list[MaskPixels]


@dataclass(frozen=True, slots=True)
class Choice:
    """The masks of a photograph that a setting keeps: for a set of classes, numbers of masks, classes and scores (N,)."""

    present: bytes
    mask: np.ndarray
    label: np.ndarray
    score: np.ndarray


@dataclass
class Sample:
    """A labeled photograph, and what is known about it."""

    name: str
    size: tuple[int, int]
    truth: np.ndarray
    """(H, W) uint8, 255 is not scored."""
    score: np.ndarray
    """(C,) float32, CLIP's; 1 and 0 where labels are given."""
    found: dict[bytes, Found] = field(default_factory=dict)
    """By the set of classes, `_key`."""


class Evidence:
    """The models' answers about labeled photographs, and the label maps that any rules make of them.

    Args:
        chain: opened without ``boxes``.
        photos: names of the photographs. read: reads one of them. truth: its true label map (H, W) uint8.
        grid: the values that will be asked for.

    Raises:
        WsssError: a true label map of another size than its photograph or with another class, or what ``read`` raises.
    """

    def __init__(
        self,
        chain: Chain,
        photos: Sequence[str],
        read: Callable[[str], Photograph],
        truth: Callable[[str], np.ndarray],
        grid: Grid | None = None,
        *,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        detector, predictor = chain.detect.stage, chain.segment.stage
        if isinstance(detector, InstanceFinder):
            raise UsageError(
                "these settings are found for grounding-dino and sam; the bundle has sam3 in their place",
                hint="wsss label --box-threshold changes the lowest score of an instance",
            )
        assert isinstance(detector, Detector) and isinstance(predictor, MaskPredictor), "opened without boxes"
        self.chain, self._detector, self._read = chain, detector, read
        self.rules = resolved(chain)
        """The rules that the chain was opened with, with the bundle's thresholds in place of None."""
        self.grid = (grid or Grid()).including(self.rules)
        self.classes = chain.classes
        self.tags = isinstance(chain.tag.stage, Tagger)
        """Whether tag thresholds decide which classes are looked for."""
        self.samples: list[Sample] = []
        self._survivors: dict[tuple[object, ...], np.ndarray] = {}
        every = [self._thresholds(replace(self.rules, tag_threshold=value)) for value in self.grid.tag_threshold]
        for start in range(0, len(photos), BATCH):
            images = [read(name) for name in photos[start : start + BATCH]]
            chain.check(images)
            score = self._scores(images)
            for name, photo, row in zip(photos[start:], images, score, strict=False):
                label_map = truth(name)
                if label_map.shape != photo.shape:
                    raise WsssError(
                        f"{name}: is {photo.shape[1]} x {photo.shape[0]} pixels, its true label map "
                        f"{label_map.shape[1]} x {label_map.shape[0]}",
                        hint="label maps are never resized; write them in the size of the photograph",
                    )
                if (label := highest_label(label_map)) > len(self.classes):
                    raise WsssError(
                        f"{name}: its true label map has the label {label}, the class list ends at {len(self.classes)}",
                        hint="check --classes; 255 is void, other labels must be classes",
                    )
                self.samples.append(Sample(name, photo.shape, label_map, row))
            numbers = range(start, start + len(images))
            wanted = [
                (number, self._present(number, thresholds))
                for number in numbers
                for thresholds in (every if self.tags else [None])
            ]
            self._look(wanted, dict(zip(numbers, images, strict=True)))
            progress(start + len(images), len(photos))

    def __len__(self) -> int:
        return len(self.samples)

    def require(self, rules: Rules, photographs: np.ndarray) -> None:
        """Run the models on these photographs for sets of classes that were not asked for before."""
        present = self.present(rules)
        missing = [number for number in photographs.tolist() if _key(present[number]) not in self.samples[number].found]
        for start in range(0, len(missing), BATCH):
            some = missing[start : start + BATCH]
            self._look([(number, present[number]) for number in some], {n: self._read(self.samples[n].name) for n in some})

    def present(self, rules: Rules) -> np.ndarray:
        """(N, C) bool, the classes that these rules let through."""
        thresholds = self._thresholds(rules)
        return np.array([self._present(number, thresholds) for number in range(len(self))])

    def label_map(self, number: int, rules: Rules) -> np.ndarray:
        """The label map (H, W) uint8 that ``wsss label`` makes of a photograph with these rules."""
        self.require(rules, np.array([number]))
        present = _key(self._present(number, self._thresholds(rules)))
        return self.fuse(number, self.kept(number, present, rules), rules)

    def boxes(self, number: int, rules: Rules) -> Boxes:
        """The boxes (of image 0) that ``wsss label`` finds in a photograph with these rules."""
        self.require(rules, np.array([number]))
        present = _key(self._present(number, self._thresholds(rules)))
        assert rules.score_rule is not None
        return self.samples[number].found[present].boxes[rules.score_rule].keep(self._rows(number, present, rules))

    def kept(self, number: int, present: bytes, rules: Rules) -> Choice:
        """The masks that these rules keep of a photograph, of those found for a set of classes."""
        found = self.samples[number].found[present]
        assert rules.score_rule is not None
        boxes, rows = found.boxes[rules.score_rule], self._rows(number, present, rules)
        masks = found.mask[rules.score_rule][rows]
        assert (masks >= 0).all(), "a setting outside of the grid"
        return Choice(present, masks, boxes.label[rows], boxes.score[rows])

    def _rows(self, number: int, present: bytes, rules: Rules) -> np.ndarray:
        """The boxes that are kept, of those found for a set of classes."""
        assert rules.score_rule is not None and rules.box_threshold is not None
        boxes = self.samples[number].found[present].boxes[rules.score_rule]
        # A box depends on better ones only, so that the threshold may come last.
        decided = number, present, rules.score_rule, rules.nms, rules.nms_across, rules.enclosing
        if decided not in self._survivors:
            self._survivors[decided] = self._chosen(boxes, number, rules)
        rows = self._survivors[decided]
        return rows[boxes.score[rows] >= rules.box_threshold]

    def _chosen(self, boxes: Boxes, number: int, rules: Rules) -> np.ndarray:
        """The boxes that are kept at the lowest threshold of the grid."""
        return chosen(
            boxes,
            [self.samples[number].size],
            min(self.grid.box_threshold),
            nms=rules.nms,
            nms_across=rules.nms_across,
            enclosing=rules.enclosing,
        )

    def fuse(self, number: int, choice: Choice, rules: Rules) -> np.ndarray:
        """The label map (H, W) uint8 of a choice of masks."""
        sample = self.samples[number]
        found = sample.found[choice.present]
        stability = None if found.stability is None else found.stability[choice.mask]
        score = mask_scores(choice.score, found.quality[choice.mask], rules.quality_exponent, stability, rules.stability_exponent)
        pixels = [found.pixels[mask] for mask in choice.mask]
        return fused(pixels, choice.label, score, rules.margin, sample.size)

    def _scores(self, images: Sequence[Photograph]) -> np.ndarray:
        stage = self.chain.tag.stage
        if isinstance(stage, Tagger):
            return self.chain.tag.part(stage.scores, images)
        return self.chain.tag(images).score

    def _thresholds(self, rules: Rules) -> np.ndarray | None:
        """(C,), None where CLIP does not decide."""
        if not self.tags:
            return None
        assert rules.tag_threshold is not None
        return tag_thresholds(self.classes, rules.tag_threshold, rules.tag_thresholds)

    def _present(self, number: int, thresholds: np.ndarray | None) -> np.ndarray:
        score = self.samples[number].score[None]
        return score[0] > 0 if thresholds is None else tagged(score, thresholds).present[0]

    def _look(self, wanted: Iterable[tuple[int, np.ndarray]], images: dict[int, Photograph]) -> None:
        """Run the detector and SAM for photographs, by number, and sets of classes."""
        jobs = {(number, _key(present)): present for number, present in wanted}
        jobs = {job: present for job, present in jobs.items() if job[1] not in self.samples[job[0]].found}
        if not jobs:
            return
        present = np.array(list(jobs.values()))
        photos = [images[number] for number, _ in jobs]
        read = partial(_boxes_by_rule, floor=min(self.grid.box_threshold))
        answers = self.chain.detect.part(self._detector.found, photos, Labels(present.astype(np.float32), present), read)
        parts: list[dict[ScoreRule, list[Boxes]]] = [{rule: [Boxes.none()] for rule in SCORE_RULES} for _ in jobs]
        for number, by_rule in answers:
            for rule, boxes in by_rule.items():
                parts[number][rule].append(boxes)
        boxes_of = [{rule: Boxes.join(each) for rule, each in part.items()} for part in parts]
        corners = [self._corners(boxes, photo.shape) for boxes, photo in zip(boxes_of, photos, strict=True)]

        # Boxes of one photograph's jobs share its embedding: SAM sees each photograph once.
        numbers = sorted(images)
        places = [(numbers.index(number), row) for row, (number, _) in enumerate(jobs)]
        order = sorted(range(len(places)), key=lambda row: places[row])
        xyxy = np.concatenate([np.zeros((0, 4), np.float32), *(corners[row] for row in order)])
        image = np.concatenate([np.zeros(0, np.int64), *(np.full(len(corners[row]), places[row][0]) for row in order)])
        asked = Boxes(xyxy, np.ones(len(xyxy), np.float32), np.ones(len(xyxy), np.int64), image)
        masks = self.chain.segment([images[number] for number in numbers], asked)
        logits = _on_host(masks)
        start = 0
        keys = list(jobs)
        for row in order:
            number, key = keys[row]
            stop = start + len(corners[row])
            frame = masks.frames[places[row][0]]
            mine = slice(start, stop)
            self.samples[number].found[key] = _found(boxes_of[row], corners[row], logits[mine], masks, mine, frame)
            start = stop

    def _corners(self, boxes: dict[ScoreRule, Boxes], size: tuple[int, int]) -> np.ndarray:
        """(M, 4) float32, the different boxes that some setting of the grid keeps."""
        grid, floor = self.grid, min(self.grid.box_threshold)
        kept = [np.zeros((0, 4), np.float32)]
        for rule, nms, across, enclosing in itertools.product(grid.score_rule, grid.nms, grid.nms_across, grid.enclosing):
            rows = chosen(boxes[rule], [size], floor, nms=nms, nms_across=across, enclosing=enclosing)
            kept.append(boxes[rule].xyxy_image[rows])
        return np.unique(np.concatenate(kept), axis=0)


def resolved(chain: Chain) -> Rules:
    """The rules of a chain, with the bundle's values in place of None."""
    return Rules(**chain.settings["rules"])


def _key(present: np.ndarray) -> bytes:
    return np.packbits(present).tobytes()


def _boxes_by_rule(
    logits: np.ndarray, cxcywh: np.ndarray, caption: Caption, frame: Frame, image: int, *, floor: float
) -> tuple[int, dict[ScoreRule, Boxes]]:
    """The boxes above the floor under each rule, of image 0; and the number of their image."""
    return image, {rule: boxes_from_logits(logits, cxcywh, caption, frame, 0, rule=rule, threshold=floor) for rule in SCORE_RULES}


def _on_host(masks: Masks) -> np.ndarray:
    """(N, L, L) float32, the logits of all boxes in their order."""
    parts = [np.asarray(part) for part in masks.logits]
    return np.array([parts[part][row] for part, row in zip(masks.part, masks.row, strict=True)], np.float32)


def _found(
    boxes: dict[ScoreRule, Boxes], corners: np.ndarray, logits: np.ndarray, masks: Masks, mine: slice, frame: Frame | None
) -> Found:
    """Masks (M, L, L) of different boxes (M, 4), which are ``mine`` of all masks, and the number of each box's mask."""
    number = {row.tobytes(): place for place, row in enumerate(corners)}
    mask = {rule: np.array([number.get(row.tobytes(), -1) for row in each.xyxy_image], np.int64) for rule, each in boxes.items()}
    labels = []
    for rule, each in boxes.items():
        label = np.zeros(len(corners), np.int64)
        label[mask[rule][mask[rule] >= 0]] = each.label[mask[rule] >= 0]
        labels.append(label)
    assert frame is not None or not len(corners)
    pixels = mask_pixels(logits, labels, frame) if frame is not None and len(corners) else []
    stability = None if masks.stability is None else masks.stability[mine].copy()
    return Found(boxes, mask, masks.quality[mine].copy(), stability, pixels)
