"""Finds boxes of the classes in an image: Grounding-DINO on a caption of the classes that the image contains.

A phrase's text features do not depend on its neighbors in the caption (the sub-sentence mask separates them, and positions
restart in each phrase), so the text graph runs once per phrase and run, and a caption's features are a concatenation. Each class
is scored from the tokens of its own phrases, never by matching words.

With tiles, the detector also looks at overlapping parts of a photograph, in which small objects are larger. Their boxes join
those of the whole photograph, without those that end at a seam; duplicates are suppressed as ever.

What a model finds and what is decided about it are two steps: `Detector.found` runs the graphs, and `boxes_from_logits` and
`chosen` decide. `wsss.runtime.tune` keeps the results of the first and repeats the second with other settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple, TypeVar

import numpy as np

from ..batch import MAX_BOXES, Boxes, Images, Labels, Photograph
from ..classes import ClassList
from ..engines.engine import Engine, check_numbers
from ..errors import UsageError
from ..frame import Frame, Tile, frame_for
from ..spec import Model, ScoreRule, box_thresholds
from .canvas import Rows, input_of, on_canvas, together
from .resize import Resizer
from .tag import view_windows
from .text import open_tokenizer, tokenize_phrases

NEGATIVE = -1
"""The label of negatives: phrases of every caption, which take the boxes that fit them better than any class."""
INSIDE = 0.9
"""A box holds another one if at least this share of the other's area is inside."""
WHOLE = 0.9
"""A box covers nearly the whole photograph from this share of its area on."""
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Phrase:
    """The features of one sub-sentence of a caption: its word pieces and the dot that ends it.

    features: (T, D) float32 or float16, as the engines exchange them. label: 1-based class; 0 for [CLS] and [SEP]; `NEGATIVE`.
    words: number of tokens that name the class, without the dot. ids: the tokens.
    """

    label: int
    features: np.ndarray
    words: int
    ids: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption as the image graph takes it: T tokens of [CLS] phrase . phrase . [SEP].

    text: (T, D) float32 or float16. phrase, position: (T,) int64, number of the sub-sentence and place in it.
    spans: each phrase's class, first token and end (exclusive), without the dot.
    """

    text: np.ndarray
    phrase: np.ndarray
    position: np.ndarray
    spans: tuple[tuple[int, int, int], ...]


class Job(NamedTuple):
    """A row of a call: an image's number, its frame or that of its tile, the pixels (1, H, W, 3) and a caption."""

    image: int
    frame: Frame
    pixels: Rows
    caption: Caption


def join_phrases(cls: Phrase, phrases: Sequence[Phrase], sep: Phrase) -> Caption:
    """Concatenate phrases to a caption, which equals the reference's (with its sub-sentence mask) for the same words."""
    parts = [cls, *phrases, sep]
    starts = np.cumsum([0, *(len(part) for part in parts)])
    return Caption(
        text=np.concatenate([part.features for part in parts]),
        phrase=np.concatenate([np.full(len(part), number) for number, part in enumerate(parts)]).astype(np.int64),
        position=np.concatenate([np.arange(len(part)) for part in parts]).astype(np.int64),
        spans=tuple((p.label, int(at), int(at) + p.words) for p, at in zip(parts, starts, strict=False) if p.label),
    )


def split_phrases(phrases: Sequence[Phrase], budget: int) -> list[list[Phrase]]:
    """Split phrases into captions of at most ``budget`` tokens, with [CLS] and [SEP].

    The reference's tokenizer cuts a longer caption at 256 tokens without a warning. A phrase's scores depend on those beside it
    in its caption: phrases are split in the order of their tokens, so that the order of the class list does not matter.
    """
    if 2 + sum(map(len, phrases)) > budget:
        phrases = sorted(phrases, key=lambda phrase: phrase.ids)
    groups: list[list[Phrase]] = []
    used = budget
    for phrase in phrases:
        if used + len(phrase) > budget:
            groups.append([])
            used = 2
        groups[-1].append(phrase)
        used += len(phrase)
    return groups


class Detector:
    """Grounding-DINO's image engines, one per canvas, and the text features of all phrases, which are computed once.

    Args:
        model: the bundle's ``grounding-dino``.
        text: its text engine.
        image: opens the image engine of a canvas (height, width); called at first use.
        classes: the run's class list.
        score_rule: how a box's score follows from those of its phrase's tokens; None takes the bundle's.
        threshold: lowest score of a box; None takes the bundle's for this rule.
        nms: boxes of one class with a larger IoU are one object.
        nms_across: boxes of different classes with a larger IoU are one object, of the class with the best score.
        enclosing: keep boxes that hold several better ones of their class, see `suppress`.
        tiles: K for K x K tiles beside the whole photograph, of 2 / (K + 1) of each side: an object of up to 1 / (K + 1) of each
            side is whole in one of them. 1: none.
        resizer: makes the canvases on the engines' device; None: the host does.

    Raises:
        UsageError: the bundle has no threshold for this rule, and none is given.
    """

    def __init__(
        self,
        model: Model,
        text: Engine,
        image: Callable[[tuple[int, int]], Engine],
        classes: ClassList,
        *,
        score_rule: ScoreRule | None = None,
        threshold: float | None = None,
        nms: float = 0.5,
        nms_across: float = 0.8,
        enclosing: bool = True,
        tiles: int = 1,
        resizer: Resizer | None = None,
    ) -> None:
        settings = model.manifest.settings
        self._preprocess = model.manifest.preprocess
        self._engine_of, self._resizer = lru_cache(maxsize=None)(image), resizer
        self.score_rule, self.threshold = scoring(model, score_rule, threshold)
        self._nms, self._nms_across, self._enclosing = nms, nms_across, enclosing
        self._tiles = tiles
        self._pixels = self._valid = 0
        self._budget = int(settings["max_tokens"])
        self._cls, self._sep, self._phrases, self._negatives = embed_phrases(model, text, classes)

    def __call__(self, images: Images, labels: Labels) -> Boxes:
        """Find boxes of the classes in ``labels.present``; images without a class are not processed."""
        read = partial(boxes_from_logits, rule=self.score_rule, threshold=self.threshold)
        found = Boxes.join(self.found(images, labels, read))
        sizes = [photo.shape for photo in images]
        return found.keep(
            chosen(found, sizes, self.threshold, nms=self._nms, nms_across=self._nms_across, enclosing=self._enclosing)
        )

    def found(
        self, images: Images, labels: Labels, read: Callable[[np.ndarray, np.ndarray, Caption, Frame, int], Answer]
    ) -> list[Answer]:
        """What ``read`` makes of the model's outputs: an answer for each caption and tile of each image with a class.

        Args:
            read: called with logits (Q, T) and boxes (Q, 4), the caption, the frame of the photograph or its tile, and the
                photograph's number, as `boxes_from_logits`.
        """
        jobs: dict[tuple[int, int], list[Job]] = {}
        for number, photo in enumerate(images):
            present = [phrase for label in np.flatnonzero(labels.present[number]) for phrase in self._phrases[label]]
            if not present:
                continue
            groups = split_phrases(present, self._budget - sum(map(len, self._negatives)))
            captions = [join_phrases(self._cls, [*group, *self._negatives], self._sep) for group in groups]
            for frame, pixels in self._looks(photo):
                jobs.setdefault(frame.canvas, []).extend(Job(number, frame, pixels, caption) for caption in captions)
        found: list[Answer] = []
        for canvas, rows in jobs.items():
            engine = self._engine_of(canvas)
            step = engine.axes["batch"].max
            for start in range(0, len(rows), step):
                found += self._run(engine, rows[start : start + step], read)
        return found

    def padding(self) -> float:
        """Share of all canvases so far that was padding, in 0..1."""
        return 1 - self._valid / self._pixels if self._pixels else 0.0

    def frame_of(self, photo: Photograph) -> Frame:
        """A photograph's canvas and its place on it."""
        return frame_for(self._preprocess, *photo.shape)

    def room(self, photo: Photograph) -> tuple[int, ...]:
        """(H, W, 3) of the photograph's canvas."""
        return (*self.frame_of(photo).canvas, 3)

    def prepare(self, photo: Photograph, out: np.ndarray) -> np.ndarray:
        """The input of an image engine: (H, W, 3) uint8."""
        return on_canvas(photo.pixels, self.frame_of(photo), self._preprocess.filter, out)

    def resizes(self, photo: Photograph) -> bool:
        """Whether the engine's device makes the canvas."""
        return self._resizer is not None and self._resizer.takes(photo, self.frame_of(photo).canvas)

    def resized(self, photo: Photograph) -> Rows | None:
        """The canvas (1, H, W, 3) uint8 on the engine's device; None if that has no memory for it."""
        assert self._resizer is not None
        frame = self.frame_of(photo)
        return self._resizer(photo, [(0, frame.image[0], 0, frame.image[1])], frame.valid, frame.canvas)

    def _looks(self, photo: Photograph) -> Iterator[tuple[Frame, Rows]]:
        """The inputs (1, H, W, 3) of a photograph: its own, and those of its tiles."""
        yield self.frame_of(photo), input_of(photo, "detect", self)
        windows = view_windows(*photo.shape, (self._tiles,)) if self._tiles > 1 else []
        for top, bottom, left, right in windows:
            frame = replace(frame_for(self._preprocess, bottom - top, right - left), tile=Tile(top, left, photo.shape))
            made = None
            if self._resizer is not None and self._resizer.takes(photo, frame.canvas):
                made = self._resizer(photo, [(top, bottom, left, right)], frame.valid, frame.canvas)
            if made is None:
                made = on_canvas(photo.pixels[top:bottom, left:right], frame, self._preprocess.filter)[None]
            yield frame, made

    def _run(
        self,
        engine: Engine,
        rows: list[Job],
        read: Callable[[np.ndarray, np.ndarray, Caption, Frame, int], Answer],
    ) -> list[Answer]:
        tokens = max(engine.axes["tokens"].min, *(len(job.caption.text) for job in rows))
        width = rows[0].caption.text.shape[1]
        text = np.zeros((len(rows), tokens, width), rows[0].caption.text.dtype)
        phrase = np.full((len(rows), tokens), -1, np.int64)
        position = np.zeros((len(rows), tokens), np.int64)
        for row, (_, _, _, caption) in enumerate(rows):
            count = len(caption.text)
            text[row, :count], phrase[row, :count], position[row, :count] = caption.text, caption.phrase, caption.position
        out = engine(
            {
                "pixels": together([job.pixels for job in rows]),
                "size": np.array([job.frame.valid for job in rows], np.int64),
                "text": text,
                "phrase": phrase,
                "position": position,
            }
        )
        self._pixels += sum(job.frame.canvas[0] * job.frame.canvas[1] for job in rows)
        self._valid += sum(job.frame.valid[0] * job.frame.valid[1] for job in rows)
        logits, boxes = np.asarray(out["logits"]), np.asarray(out["boxes"])
        for values in (logits, boxes):
            check_numbers(values, np.array([job.image for job in rows]), "grounding-dino/image")
        return [read(logits[row], boxes[row], job.caption, job.frame, job.image) for row, job in enumerate(rows)]


def scoring(model: Model, rule: ScoreRule | None, threshold: float | None) -> tuple[ScoreRule, float]:
    """The rule of scores and the threshold of a run: those given, or the bundle's.

    Raises:
        UsageError: the bundle has no threshold for the rule.
    """
    default, thresholds = box_thresholds(model.manifest.settings)
    rule = default if rule is None else rule
    if threshold is None and rule not in thresholds:
        raise UsageError(
            f"--score-rule {rule}: the bundle's {model.manifest.family} has a box threshold for {', '.join(thresholds)} only",
            hint="give one too, for example --box-threshold 0.3; wsss tune finds it on a few labeled photographs",
        )
    return rule, thresholds[rule] if threshold is None else threshold


def boxes_from_logits(
    logits: np.ndarray, cxcywh: np.ndarray, caption: Caption, frame: Frame, image: int, *, rule: ScoreRule, threshold: float
) -> Boxes:
    """One image's detections: each query takes the class whose tokens it matches best; if that is a negative, it is no box.
    Boxes that the seam of a tile cuts are none either.

    Args:
        logits: (Q, T) float32. cxcywh: (Q, 4) float32 in 0..1 of the photograph.
        rule: ``max``, the largest sigmoid score of a phrase's tokens, as the reference's ``predict()``, whose maximum is over
            all tokens of the caption; ``mean``, as its COCO evaluation (`PostProcessCocoGrounding`: sigmoid times a
            span-normalized map). A class has the score of its best phrase.
        threshold: lowest score under this rule.
    """
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    of_phrase = np.max if rule == "max" else np.mean
    scores = np.stack([of_phrase(probability[:, start:stop], axis=1) for _, start, stop in caption.spans], axis=1)  # (Q, phrases)
    best = scores.argmax(axis=1)
    score = scores[np.arange(len(scores)), best].astype(np.float32)
    label = np.array([label for label, _, _ in caption.spans], np.int64)[best]
    xyxy = frame.xyxy_image_from_cxcywh(cxcywh)
    solid = (xyxy[:, 2] - xyxy[:, 0] >= 1) & (xyxy[:, 3] - xyxy[:, 1] >= 1)
    rows = np.flatnonzero((score >= threshold) & solid & (label != NEGATIVE) & ~frame.is_cut(xyxy))
    return Boxes(xyxy[rows], score[rows], label[rows], np.full(len(rows), image, np.int64))


def chosen(
    boxes: Boxes, sizes: Sequence[tuple[int, int]], threshold: float, *, nms: float, nms_across: float, enclosing: bool
) -> np.ndarray:
    """The boxes that a run keeps of all that its models found: their rows, by image, best first.

    Args:
        sizes: (height, width) of each image. threshold: lowest score. Others: as of `suppress`.
    """
    rows = np.flatnonzero(boxes.score >= threshold)
    return rows[suppress(boxes.keep(rows), nms, nms_across, None if enclosing else sizes)]


def suppress(boxes: Boxes, same: float, across: float, sizes: Sequence[tuple[int, int]] | None = None) -> np.ndarray:
    """Greedy non-maximum suppression, image by image: IoU above ``same`` within a class, above ``across`` between classes.

    Grounding-DINO does not suppress duplicates itself: its 900 queries repeat objects.

    Args:
        sizes: (height, width) of each image, to drop boxes of several objects too: those that hold two or more better boxes
            of their class (`INSIDE`), and those of nearly the whole photograph beside a better one of their class (`WHOLE`).

    Returns:
        (K,) int64, the rows of the remaining boxes, by image, best first, at most ``MAX_BOXES`` an image.
    """
    order = np.lexsort((-boxes.score, boxes.image))
    image = boxes.image[order]
    starts = np.flatnonzero(np.diff(image, prepend=-1))
    kept: list[np.ndarray] = [np.zeros(0, np.int64)]
    for start, stop in zip(starts, np.append(starts, len(order))[1:], strict=True):
        rows = order[start:stop]
        size = None if sizes is None else sizes[image[start]]
        kept.append(rows[_suppress_one(boxes.xyxy_image[rows], boxes.label[rows], same, across, size)])
    return np.concatenate(kept)


def _suppress_one(xyxy: np.ndarray, label: np.ndarray, same: float, across: float, size: tuple[int, int] | None) -> list[int]:
    """`suppress` for one image's boxes (N, 4), best first. A box depends on better ones only."""
    alike = label[:, None] == label
    rivals = box_iou(xyxy, xyxy) > np.where(alike, same, across)
    inside = alike & (shared_area(xyxy, xyxy) >= INSIDE * box_area(xyxy))  # [i, j]: box i holds box j of its class
    whole = np.zeros(len(xyxy), bool) if size is None else box_area(xyxy) >= WHOLE * size[0] * size[1]
    left, kept = np.ones(len(xyxy), bool), np.zeros(len(xyxy), bool)
    for row in range(len(xyxy)):
        if not left[row]:
            continue
        if size is not None and ((inside[row] & kept).sum() >= 2 or (whole[row] and (alike[row] & kept).any())):
            continue
        kept[row] = True
        if kept.sum() == MAX_BOXES:
            break
        left &= ~rivals[row]
    return np.flatnonzero(kept).tolist()


def box_iou(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of boxes (M, 4) with boxes (N, 4), xyxy in one frame: (M, N) float."""
    shared = shared_area(some, others)
    return shared / (box_area(some)[:, None] + box_area(others) - shared)


def shared_area(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Area that boxes (M, 4) share with boxes (N, 4), xyxy in one frame: (M, N)."""
    low, high = np.maximum(some[:, None, :2], others[:, :2]), np.minimum(some[:, None, 2:], others[:, 2:])
    return np.clip(high - low, 0, None).prod(axis=2)


def box_area(xyxy: np.ndarray) -> np.ndarray:
    """Areas of boxes (N, 4): (N,)."""
    return (xyxy[:, 2:] - xyxy[:, :2]).prod(axis=1)


def embed_phrases(model: Model, text: Engine, classes: ClassList) -> tuple[Phrase, Phrase, list[list[Phrase]], list[Phrase]]:
    """Compute the features of [CLS], [SEP], each class's phrases and the negatives, in as few calls of the text graph as its
    range allows.

    Raises:
        ClassError: as `tokenize_phrases`; a phrase shares its caption with [CLS], [SEP] and its dot.
    """
    settings = model.manifest.settings
    dot = int(settings["dot"])
    tokens_of, negatives = tokenize_phrases(open_tokenizer(model), classes, int(settings["max_tokens"]) - 3)
    labels = [label for label, phrases in enumerate(tokens_of, 1) for _ in phrases] + [NEGATIVE] * len(negatives)
    ids = [[int(settings["cls"])], [int(settings["sep"])]]
    ids += [[*phrase, dot] for phrases in (*tokens_of, negatives) for phrase in phrases]
    features: list[np.ndarray] = []
    step = text.axes["phrases"].max
    for start in range(0, len(ids), step):
        chunk = ids[start : start + step]
        length = max(text.axes["length"].min, *(len(line) for line in chunk), 1)
        tokens = np.full((len(chunk), length), int(settings["pad"]), np.int64)
        mask = np.zeros((len(chunk), length), bool)
        for row, line in enumerate(chunk):
            tokens[row, : len(line)], mask[row, : len(line)] = line, True
        out = np.asarray(text({"tokens": tokens, "mask": mask})["features"])
        features += [np.array(out[row, : len(line)]) for row, line in enumerate(chunk)]
    cls, sep = Phrase(0, features[0], 1), Phrase(0, features[1], 1)
    phrases = [
        Phrase(label, feature, len(feature) - 1, tuple(tokens))
        for label, feature, tokens in zip(labels, features[2:], ids[2:], strict=True)
    ]
    of_classes = [[phrase for phrase in phrases if phrase.label == label] for label in range(1, len(tokens_of) + 1)]
    return cls, sep, of_classes, [phrase for phrase in phrases if phrase.label == NEGATIVE]
