"""Finds the instances of each class with SAM 3: boxes and masks together, in place of a detector and SAM.

A photograph is encoded once. Each phrase of each photograph is a row of the detector's calls, in which phrases of several
photographs stand together. The score of a box is its query's probability times the presence of the phrase in the photograph.
Only the masks of boxes that reach the threshold are computed: a class that is not there costs none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..batch import Boxes, Images, Labels, Masks, Photograph, Tensor
from ..classes import ClassList
from ..engines.engine import Engine, check_numbers, outliving
from ..errors import WsssError
from ..frame import Frame, frame_for
from ..spec import Model
from .canvas import Rows, input_of, on_canvas, together
from .detect import NEGATIVE, chosen
from .resize import Resizer
from .text import open_tokenizer, tokenize_prompts


@dataclass(slots=True)
class Instances(Boxes):
    """Boxes whose masks are known: box i's is ``logits[part[i]][row[i]]``, as in `Masks`.

    logits: outputs of the outline graph, each (n, L, L) float32 or float16, 0 is the edge. part, row: (N,) int64.
    """

    logits: list[Tensor]
    part: np.ndarray
    row: np.ndarray

    def keep(self, rows: np.ndarray) -> Instances:
        """Select rows by an index or a mask, in order."""
        boxes = Boxes.keep(self, rows)
        return Instances(boxes.xyxy_image, boxes.score, boxes.label, boxes.image, self.logits, self.part[rows], self.row[rows])


@dataclass(frozen=True, slots=True)
class Phrase:
    """A wording of a class.

    label: 1-based class, or `NEGATIVE`. features: (L, D) as the engines exchange them. mask: (L,) bool, tokens that count.
    """

    label: int
    features: np.ndarray
    mask: np.ndarray


class InstanceFinder:
    """The engines of SAM 3, and the features of all phrases, which are computed once.

    Args:
        model: the bundle's ``sam3``.
        text, vision, detector, outline: its engines.
        classes: the run's class list.
        threshold: lowest score of a box; None takes the bundle's.
        nms, nms_across, enclosing: as of `wsss.runtime.detect.Detector`.
        decides: whether it also decides which classes are in a photograph, and says so in the labels that it is given.
        resizer: makes the canvases on the engines' device; None: the host does.
    """

    def __init__(
        self,
        model: Model,
        text: Engine,
        vision: Engine,
        detector: Engine,
        outline: Engine,
        classes: ClassList,
        *,
        threshold: float | None = None,
        nms: float = 0.5,
        nms_across: float = 0.8,
        enclosing: bool = True,
        decides: bool = False,
        resizer: Resizer | None = None,
    ) -> None:
        settings = model.manifest.settings
        self._preprocess = model.manifest.preprocess
        self._vision, self._detector, self._outline, self._resizer = vision, detector, outline, resizer
        self.threshold = float(settings["box_threshold"]) if threshold is None else threshold
        self._nms, self._nms_across, self._enclosing, self._decides = nms, nms_across, enclosing, decides
        self._phrases = embed_phrases(model, text, classes)

    def __call__(self, images: Images, labels: Labels) -> Boxes:
        """Find instances of the classes in ``labels.present``; images without a class are not processed.

        If SAM 3 decides about the classes, ``labels`` get the presence of each as its score, and are present where a box is.
        """
        found = _Found(labels.score.shape)
        wanted = np.flatnonzero(labels.present.any(axis=1))
        step = min(self._vision.axes["batch"].max, *(each.axes["images"].max for each in (self._detector, self._outline)))
        for start in range(0, len(wanted), step):
            self._find(images, wanted[start : start + step], labels.present, found)
        instances = found.joined()
        sizes = [photo.shape for photo in images]
        best = chosen(instances, sizes, self.threshold, nms=self._nms, nms_across=self._nms_across, enclosing=self._enclosing)
        kept = instances.keep(best)
        kept = kept.keep(kept.label != NEGATIVE)
        if self._decides:
            labels.score[:], labels.present[:] = found.presence, False
            labels.present[kept.image, kept.label - 1] = True
        return kept

    def usual_batch(self) -> int:
        """The batch size that the image encoder was built for."""
        return self._vision.axes["batch"].opt

    def room(self, photo: Photograph) -> tuple[int, ...]:
        """(S, S, 3)."""
        return (*self._frame_of(photo).canvas, 3)

    def prepare(self, photo: Photograph, out: np.ndarray) -> np.ndarray:
        """A photograph as the vision graph takes it: (S, S, 3) uint8."""
        return on_canvas(photo.pixels, self._frame_of(photo), self._preprocess.filter, out)

    def resizes(self, photo: Photograph) -> bool:
        """Whether the engine's device makes the canvas."""
        return self._resizer is not None and self._resizer.takes(photo, self._frame_of(photo).canvas)

    def resized(self, photo: Photograph) -> Rows | None:
        """The canvas (1, S, S, 3) uint8 on the engine's device; None if that has no memory for it."""
        assert self._resizer is not None
        frame = self._frame_of(photo)
        made = self._resizer(photo, [(0, frame.image[0], 0, frame.image[1])], frame.valid, frame.canvas)
        photo.on_device.clear()  # this stage is the last that reads its pixels
        return made

    def _frame_of(self, photo: Photograph) -> Frame:
        return frame_for(self._preprocess, *photo.shape)

    def _find(self, images: Images, group: np.ndarray, present: np.ndarray, found: _Found) -> None:
        """Add what is found in the images numbered in ``group``, which are encoded in one call."""
        pixels = together([input_of(images[number], "detect", self) for number in group])
        features = {name: outliving(tensor) for name, tensor in self._vision({"pixels": pixels}).items()}
        rows = [
            (place, phrase)
            for place, number in enumerate(group)
            for phrase in self._phrases
            if phrase.label == NEGATIVE or present[number, phrase.label - 1]
        ]
        step = min(each.axes["phrases"].max for each in (self._detector, self._outline))
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            place = np.array([place for place, _ in some], np.int64)
            out = self._detector(
                {
                    "embedding": features["embedding"],
                    "text": np.stack([phrase.features for _, phrase in some]),
                    "mask": np.stack([phrase.mask for _, phrase in some]),
                    "image": place,
                }
            )
            presence = _probability(np.asarray(out["presence"]))
            score = (_probability(np.asarray(out["logits"])) * presence[:, None]).astype(np.float32)  # (R, Q)
            for values in (score, np.asarray(out["boxes"])):
                check_numbers(values, group[place], "sam3/detector")
            label = np.array([phrase.label for _, phrase in some], np.int64)
            xyxy = _in_pixels(np.asarray(out["boxes"]), [images[number].shape for number in group[place]])
            solid = (xyxy[..., 2:] - xyxy[..., :2] >= 1).all(axis=2)
            row, query = np.nonzero((score >= self.threshold) & solid)
            positive = label != NEGATIVE
            np.maximum.at(found.presence, (group[place[positive]], label[positive] - 1), presence[positive])
            part, slot = self._masks(out, features, place, row, query, positive, found.logits)
            found.add(Instances(xyxy[row, query], score[row, query], label[row], group[place[row]], [], part, slot))

    def _masks(
        self,
        out: Mapping[str, Tensor],
        features: Mapping[str, Tensor],
        place: np.ndarray,
        row: np.ndarray,
        query: np.ndarray,
        positive: np.ndarray,
        logits: list[Tensor],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Add the masks of queries (N,) of rows (N,) to ``logits``; returns their parts and rows, (N,) int64 each.

        Args:
            place: (R,) the image of each row. positive: (R,) bool; rows of negatives get no masks, and part -1.
        """
        part, slot = np.full(len(row), -1, np.int64), np.zeros(len(row), np.int64)
        queries = out["queries"].shape[1]
        for entries in self._calls(row, positive):
            slots = max(map(len, entries))
            of_row = np.array([row[entry[0]] for entry in entries], np.int64)
            places = np.stack([np.resize(of * queries + query[entry], slots) for of, entry in zip(of_row, entries, strict=True)])
            pick = np.concatenate([number * slots + np.arange(len(entry)) for number, entry in enumerate(entries)])
            made = self._outline(
                {
                    **{name: out[name] for name in ("encoded", "queries")},
                    **{name: features[name] for name in ("features_2x", "features_4x")},
                    "row": of_row,
                    "image": place[of_row],
                    "query": places.astype(np.int64),
                    "pick": pick.astype(np.int64),
                }
            )
            boxes = np.concatenate(entries)
            part[boxes], slot[boxes] = len(logits), np.arange(len(boxes))
            logits.append(outliving(made["logits"]))
        return part, slot

    def _calls(self, row: np.ndarray, positive: np.ndarray) -> Iterator[list[np.ndarray]]:
        """The calls of the outline graph: for each, the boxes of some rows, those of one row together."""
        axes = self._outline.axes
        most = min(axes["slots"].max, axes["boxes"].max)
        call: list[np.ndarray] = []
        for number in np.unique(row[positive[row]]):
            boxes = np.flatnonzero(row == number)
            for start in range(0, len(boxes), most):
                entry = boxes[start : start + most]
                if len(call) == axes["outlined"].max or sum(map(len, call)) + len(entry) > axes["boxes"].max:
                    yield call
                    call = []
                call.append(entry)
        if call:
            yield call


class _Found:
    """What was found so far: ``presence`` (B, C) float32 of each class, and the parts of the instances."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.presence = np.zeros(shape, np.float32)
        self.logits: list[Tensor] = []
        self._parts: list[Instances] = []

    def add(self, part: Instances) -> None:
        self._parts.append(part)

    def joined(self) -> Instances:
        boxes = Boxes.join(self._parts)  # images ascend, so that the order stays
        nothing = [np.zeros(0, np.int64)]
        part, row = (np.concatenate([getattr(each, name) for each in self._parts] or nothing) for name in ("part", "row"))
        return Instances(boxes.xyxy_image, boxes.score, boxes.label, boxes.image, self.logits, part, row)


class KnownMasks:
    """The stage after `InstanceFinder`: the masks that its boxes come with. SAM 3 predicts no IoU; the quality of all is 1."""

    def __init__(self, model: Model) -> None:
        self._preprocess = model.manifest.preprocess

    def __call__(self, images: Images, boxes: Boxes) -> Masks:
        """The masks of the boxes. Raises WsssError for boxes that SAM 3 has not found."""
        frames: list[Frame | None] = [None] * len(images)
        if not isinstance(boxes, Instances):
            raise WsssError(
                "SAM 3 gives the masks of what it finds itself, none of given boxes", hint="wsss export --model sam, for SAM"
            )
        for number in np.unique(boxes.image):
            frames[number] = frame_for(self._preprocess, *images[number].shape)
        return Masks(boxes.logits, boxes.part, boxes.row, np.ones(len(boxes), np.float32), frames)


def embed_phrases(model: Model, text: Engine, classes: ClassList) -> list[Phrase]:
    """Compute the features of each class's phrases and of the negatives, in as few calls of the text graph as its range allows.

    Raises:
        ClassError: two classes whose phrases have the same tokens.
    """
    settings = model.manifest.settings
    length, pad, end = int(settings["context_length"]), int(settings["pad"]), int(settings["end"])
    wordings = [*classes.phrases, *((name,) for name in classes.negatives)]
    names = [*(f"the class {name!r}" for name in classes.names), *(f"the negative {name!r}" for name in classes.negatives)]
    ids_of = tokenize_prompts(open_tokenizer(model), wordings, ("{}",), length, end, names, classes.where, reader="SAM 3")
    labels = [*range(1, len(classes) + 1), *[NEGATIVE] * len(classes.negatives)]
    rows = [(label, ids) for label, phrases in zip(labels, ids_of, strict=True) for ids in phrases]
    tokens = np.full((len(rows), length), pad, np.int64)
    for line, (_, ids) in zip(tokens, rows, strict=True):
        line[: len(ids)] = ids
    mask = np.arange(length) <= (tokens == end).argmax(axis=1)[:, None]
    step = text.axes["phrases"].max
    features = [
        np.array(text({"tokens": tokens[start : start + step], "mask": mask[start : start + step]})["features"])
        for start in range(0, len(rows), step)
    ]
    return [Phrase(label, *pair) for (label, _), pair in zip(rows, zip(np.concatenate(features), mask, strict=True), strict=True)]


def _probability(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def _in_pixels(boxes: np.ndarray, sizes: list[tuple[int, int]]) -> np.ndarray:
    """Boxes (R, Q, 4) in 0..1 of images of these (height, width), in pixels and clipped: float32."""
    extent = np.array([(width, height) * 2 for height, width in sizes])[:, None]
    return np.clip(boxes.astype(np.float64) * extent, 0, extent).astype(np.float32)
