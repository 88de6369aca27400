"""Finds boxes of the classes in an image: Grounding-DINO on a caption of the classes that the image contains.

A phrase's text features do not depend on its neighbors in the caption (the sub-sentence mask separates them, and positions
restart in each phrase), so the text graph runs once per phrase and run, and a caption's features are a concatenation. Each class
is scored from the tokens of its own phrases, never by matching words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..batch import MAX_BOXES, Boxes, Images, Labels, Photograph
from ..classes import ClassList
from ..engines.engine import Engine
from ..frame import Frame, frame_for
from ..spec import Model
from .canvas import Rows, input_of, on_canvas, together
from .resize import Resizer
from .text import open_tokenizer, tokenize_phrases

NEGATIVE = -1
"""The label of negatives: phrases of every caption, which take the boxes that fit them better than any class."""


@dataclass(frozen=True, slots=True)
class Phrase:
    """The features of one sub-sentence of a caption: its word pieces and the dot that ends it.

    features: (T, D) float32 or float16, as the engines exchange them. label: 1-based class; 0 for [CLS] and [SEP]; `NEGATIVE`.
    words: number of tokens that name the class, without the dot.
    """

    label: int
    features: np.ndarray
    words: int

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
    """Split phrases into captions, in order: each has at most ``budget`` tokens, with [CLS] and [SEP].

    The reference's tokenizer cuts a longer caption at 256 tokens without a warning.
    """
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
        threshold: lowest score of a box, a mean over the phrase's tokens; None takes the bundle's.
        nms: boxes of one class with a larger IoU are one object.
        nms_across: boxes of different classes with a larger IoU are one object, of the class with the best score.
        resizer: makes the canvases on the engines' device; None: the host does.
    """

    def __init__(
        self,
        model: Model,
        text: Engine,
        image: Callable[[tuple[int, int]], Engine],
        classes: ClassList,
        *,
        threshold: float | None = None,
        nms: float = 0.5,
        nms_across: float = 0.8,
        resizer: Resizer | None = None,
    ) -> None:
        settings = model.manifest.settings
        self._preprocess = model.manifest.preprocess
        self._engine_of, self._resizer = lru_cache(maxsize=None)(image), resizer
        self.threshold = float(settings["box_threshold"]) if threshold is None else threshold
        self._nms, self._nms_across = nms, nms_across
        self._pixels = self._valid = 0
        self._budget = int(settings["max_tokens"])
        self._cls, self._sep, self._phrases, self._negatives = embed_phrases(model, text, classes)

    def __call__(self, images: Images, labels: Labels) -> Boxes:
        """Find boxes of the classes in ``labels.present``; images without a class are not processed."""
        inputs: dict[int, Rows] = {}  # one for each image that is processed, shared by its captions
        jobs: dict[tuple[int, int], list[tuple[int, Frame, Caption]]] = {}
        for number, photo in enumerate(images):
            present = [phrase for label in np.flatnonzero(labels.present[number]) for phrase in self._phrases[label]]
            frame = self.frame_of(photo)
            if present:
                inputs[number] = input_of(photo, "detect", self)
            for group in split_phrases(present, self._budget - sum(map(len, self._negatives))):
                caption = join_phrases(self._cls, [*group, *self._negatives], self._sep)
                jobs.setdefault(frame.canvas, []).append((number, frame, caption))
        found: list[Boxes] = []
        for canvas, rows in jobs.items():
            engine = self._engine_of(canvas)
            step = engine.axes["batch"].max
            for start in range(0, len(rows), step):
                found += self._run(engine, inputs, rows[start : start + step])
        return suppress(Boxes.join(found), self._nms, self._nms_across)

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

    def _run(self, engine: Engine, inputs: Mapping[int, Rows], rows: list[tuple[int, Frame, Caption]]) -> list[Boxes]:
        tokens = max(engine.axes["tokens"].min, *(len(caption.text) for _, _, caption in rows))
        width = rows[0][2].text.shape[1]
        text = np.zeros((len(rows), tokens, width), rows[0][2].text.dtype)
        phrase = np.full((len(rows), tokens), -1, np.int64)
        position = np.zeros((len(rows), tokens), np.int64)
        for row, (_, _, caption) in enumerate(rows):
            count = len(caption.text)
            text[row, :count], phrase[row, :count], position[row, :count] = caption.text, caption.phrase, caption.position
        out = engine(
            {
                "pixels": together([inputs[number] for number, _, _ in rows]),
                "size": np.array([frame.valid for _, frame, _ in rows], np.int64),
                "text": text,
                "phrase": phrase,
                "position": position,
            }
        )
        self._pixels += sum(frame.canvas[0] * frame.canvas[1] for _, frame, _ in rows)
        self._valid += sum(frame.valid[0] * frame.valid[1] for _, frame, _ in rows)
        logits, boxes = np.asarray(out["logits"]), np.asarray(out["boxes"])
        return [
            boxes_from_logits(logits[row], boxes[row], caption, frame, number, self.threshold)
            for row, (number, frame, caption) in enumerate(rows)
        ]


def boxes_from_logits(
    logits: np.ndarray, cxcywh: np.ndarray, caption: Caption, frame: Frame, image: int, threshold: float
) -> Boxes:
    """One image's detections: each query takes the class whose tokens it matches best; if that is a negative, it is no box.

    Args:
        logits: (Q, T) float32. cxcywh: (Q, 4) float32 in 0..1 of the photograph.
        threshold: on the mean of the sigmoid scores of a phrase's tokens, as the reference's COCO evaluation scores
            (`PostProcessCocoGrounding`: sigmoid times a span-normalized map). Its `predict()` takes a maximum over tokens
            instead, so that its thresholds are not comparable. A class has the score of its best phrase.
    """
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    scores = np.stack([probability[:, start:stop].mean(axis=1) for _, start, stop in caption.spans], axis=1)  # (Q, phrases)
    best = scores.argmax(axis=1)
    score = scores[np.arange(len(scores)), best].astype(np.float32)
    label = np.array([label for label, _, _ in caption.spans], np.int64)[best]
    xyxy = frame.xyxy_image_from_cxcywh(cxcywh)
    solid = (xyxy[:, 2] - xyxy[:, 0] >= 1) & (xyxy[:, 3] - xyxy[:, 1] >= 1)
    rows = np.flatnonzero((score >= threshold) & solid & (label != NEGATIVE))
    return Boxes(xyxy[rows], score[rows], label[rows], np.full(len(rows), image, np.int64))


def suppress(boxes: Boxes, same: float, across: float) -> Boxes:
    """Greedy non-maximum suppression, image by image: IoU above ``same`` within a class, above ``across`` between classes.

    Grounding-DINO does not suppress duplicates itself: its 900 queries repeat objects.

    Returns:
        The remaining boxes, by image, best first, at most ``MAX_BOXES`` an image.
    """
    order = np.lexsort((-boxes.score, boxes.image))
    boxes = boxes.keep(order)
    kept: list[int] = []
    first = 0
    for row in range(len(boxes)):
        if kept and boxes.image[kept[-1]] != boxes.image[row]:
            first = len(kept)
        rivals = np.array(kept[first:], np.int64)
        overlap = box_iou(boxes.xyxy_image[row], boxes.xyxy_image[rivals])
        limit = np.where(boxes.label[rivals] == boxes.label[row], same, across)
        if len(rivals) < MAX_BOXES and not (overlap > limit).any():
            kept.append(row)
    return boxes.keep(np.array(kept, np.int64))


def box_iou(one: np.ndarray, many: np.ndarray) -> np.ndarray:
    """IoU of one box (4,) with boxes (N, 4), xyxy in one frame: (N,) float."""
    top, bottom = np.maximum(one[:2], many[:, :2]), np.minimum(one[2:], many[:, 2:])
    shared = np.clip(bottom - top, 0, None).prod(axis=1)
    return shared / ((one[2:] - one[:2]).prod() + (many[:, 2:] - many[:, :2]).prod(axis=1) - shared)


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
    phrases = [Phrase(label, feature, len(feature) - 1) for label, feature in zip(labels, features[2:], strict=True)]
    of_classes = [[phrase for phrase in phrases if phrase.label == label] for label in range(1, len(tokens_of) + 1)]
    return cls, sep, of_classes, [phrase for phrase in phrases if phrase.label == NEGATIVE]
