"""Finds which classes are in an image: CLIP on several views of it.

Several views, because CLIP was trained with one caption an image: a small object beside a large one loses in the softmax. Each
view is scored against a set of background prompts, which take the probability of views that show none of the classes. An
image's score is that of its best view (TagCLIP, arXiv 2312.12828, crops the image around each candidate). The bundle names one
of three rules, because a threshold fits only one of them:

- ``softmax``: one softmax over all classes and backgrounds. Classes compete; for CLIP as published, in which related classes
  have similar scores.
- ``background``: each class alone against the backgrounds, exp(c) / (exp(c) + sum of exp(b)). Several classes of one view can
  all be certain; for embeddings that were trained with this rule.
- ``sigmoid``: each class by itself, with the model's bias; for models that were trained with sigmoids (SigLIP). Negatives of the
  class list still compete, backgrounds do not: a view that shows none of the classes has low scores for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from PIL import Image

from ..batch import Images, Labels, Photograph
from ..classes import ClassList, backgrounds_for
from ..engines.engine import Engine, check_numbers
from ..errors import BundleError, UsageError
from ..pixels.pictures import picture_of
from ..spec import Model
from .canvas import Rows, input_of, resized_part, together
from .resize import Resizer
from .text import open_tokenizer, tokenize_prompts

SAMPLES = 4
"""Views of a large photograph are resized from its means over blocks of pixels, as long as the smallest view keeps this many
blocks to a pixel along each axis: at 224 pixels from 7 million pixels on. Of PASCAL VOC's photographs put together to pictures of
12 and 24 million pixels, 99.3 % of the values or more are within one gray level of Pillow's, and the mini model's embeddings have
a cosine of 0.9999 or more with those of Pillow's pixels (`benchmarks/studies/parity/large_views.py`)."""


class Tagger:
    """CLIP's image engine and the embeddings of all prompts, which are computed once.

    Args:
        model: the bundle's ``clip``.
        image, text: its engines.
        classes: the run's class list.
        threshold: lowest probability of a class that is present; None takes the bundle's.
        thresholds: of single classes, by name, in place of ``threshold``.
        views: number of levels of views, see `view_windows`; None takes the bundle's levels.
        resizer: makes the views on the engines' device; None: the host does.
    """

    def __init__(
        self,
        model: Model,
        image: Engine,
        text: Engine,
        classes: ClassList,
        *,
        threshold: float | None = None,
        thresholds: Mapping[str, float] | None = None,
        views: int | None = None,
        resizer: Resizer | None = None,
    ) -> None:
        settings = model.manifest.settings
        self._preprocess = model.manifest.preprocess
        self._image, self._resizer = image, resizer
        self._scale = float(settings["logit_scale"])
        self._bias = float(settings.get("logit_bias", 0.0))
        self._rule = settings.get("rule", "softmax")
        self._levels = tuple(int(level) for level in settings["views"]) if views is None else tuple(range(1, views + 1))
        self._count = sum(level * level for level in self._levels)
        self.threshold = float(settings["threshold"]) if threshold is None else threshold
        self._thresholds = tag_thresholds(classes, self.threshold, thresholds)
        backgrounds = () if self._rule == "sigmoid" else backgrounds_for(classes, tuple(settings["backgrounds"]))
        self._classes = len(classes.names)
        names = [f"the class {name!r}" for name in classes.names]
        names += [*("" for _ in backgrounds), *(f"the negative prompt {name!r}" for name in classes.negatives)]
        prompts = [*classes.prompts, *((name,) for name in (*backgrounds, *classes.negatives))]
        self._prompts = embed_prompts(model, text, prompts, names, classes.where)

    def __call__(self, images: Images) -> Labels:
        """Scores of B images: (B, C) float32, the best view's softmax probability of each class."""
        return tagged(self.scores(images), self._thresholds)

    def scores(self, images: Images) -> np.ndarray:
        """(B, C) float32, the best view's probability of each class."""
        views = [input_of(photo, "tag", self) for photo in images]  # each (V, S, S, 3)
        score = np.zeros((len(images), self._classes), np.float32)
        step = self._image.axes["batch"].max
        for start in range(0, len(images) * self._count, step):
            rows = np.arange(start, min(start + step, len(images) * self._count))
            pixels = together(_between(views, self._count, int(rows[0]), int(rows[-1]) + 1))
            with np.errstate(invalid="ignore"):  # NaN is refused below
                probability = self._probability(np.asarray(self._image({"pixels": pixels})["embedding"]))
            np.maximum.at(score, rows // self._count, probability)
        check_numbers(score, np.arange(len(images)), "clip/image")
        return score

    def _probability(self, embedding: np.ndarray) -> np.ndarray:
        logits = self._scale * (embedding.astype(np.float32) @ self._prompts.T) + self._bias  # (V, C + negatives)
        if self._rule == "softmax":
            exp = np.exp(logits - logits.max(axis=1, keepdims=True))
            return exp[:, : self._classes] / exp.sum(axis=1, keepdims=True)
        # Not one softmax shift for all classes: a class beside a much more certain one would fall below exp(-103), to 0.
        classes, others = logits[:, : self._classes], logits[:, self._classes :]
        against = np.logaddexp(0, np.logaddexp.reduce(others, axis=1, keepdims=True, initial=-np.inf) - classes)
        return np.exp(-against - np.logaddexp(0, -classes)) if self._rule == "sigmoid" else np.exp(-against)

    def room(self, photo: Photograph) -> tuple[int, ...]:
        """(V, S, S, 3)."""
        return (self._count, *self._preprocess.canvases[0], 3)

    def prepare(self, photo: Photograph, out: np.ndarray) -> np.ndarray:
        """The views of a photograph as the engine takes them: (V, S, S, 3) uint8."""
        windows = view_windows(*photo.shape, self._levels)
        return resized_views(picture_of(photo.pixels), windows, self._preprocess.canvases[0], self._preprocess.filter, out)

    def resizes(self, photo: Photograph) -> bool:
        """Whether the engine's device makes the views."""
        return self._resizer is not None and self._resizer.takes(photo, self._preprocess.canvases[0], self._count)

    def resized(self, photo: Photograph) -> Rows | None:
        """The views (V, S, S, 3) uint8 on the engine's device; None if that has no memory for them."""
        assert self._resizer is not None
        side = self._preprocess.canvases[0]
        return self._resizer(photo, view_windows(*photo.shape, self._levels), side, side)


def tagged(score: np.ndarray, thresholds: np.ndarray) -> Labels:
    """The classes of each image: those whose score (B, C) reaches their threshold (C,), both float32."""
    return Labels(score, score >= thresholds)


def tag_thresholds(classes: ClassList, threshold: float, by_class: Mapping[str, float] | None = None) -> np.ndarray:
    """(C,) float32, the lowest score of each class: ``threshold``, or its own.

    Raises:
        UsageError: ``by_class`` names a class that is not in the list.
    """
    thresholds = np.full(len(classes), threshold, np.float32)
    for name, value in (by_class or {}).items():
        if (label := classes.find(name)) is None:
            near = classes.nearest(name)
            raise UsageError(
                f"--tag-thresholds: {name!r} is not in --classes",
                hint=f"did you mean {near!r}?" if near else f"the list has {', '.join(classes.names)}",
            )
        thresholds[label - 1] = value
    return thresholds


def _between(parts: Sequence[Rows], each: int, start: int, stop: int) -> list[Rows]:
    """Rows ``start`` to ``stop`` of parts of ``each`` rows."""
    first = start // each
    return [
        cast(Rows, part[max(start - at, 0) : stop - at])
        for at, part in zip(range(first * each, stop, each), parts[first:], strict=False)
    ]


def view_windows(height: int, width: int, levels: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """The views of an image: (y0, y1, x0, x1) pixels; level k has k x k windows of 2 / (k + 1) of each side, evenly spaced."""
    return [(*_span(height, i, level), *_span(width, j, level)) for level in levels for i in range(level) for j in range(level)]


def resized_views(
    picture: Image.Image, windows: Sequence[tuple[int, int, int, int]], size: tuple[int, int], filter: str, out: np.ndarray
) -> np.ndarray:
    """Write the windows of a picture, resized to (height, width) without the pixels around them, into ``out`` (V, h, w, 3) uint8.

    Windows of large pictures are made of one reduced picture, see `SAMPLES`.
    """
    down, across = (
        max(int(shortest / (SAMPLES * side)), 1) for shortest, side in zip(shortest_sides(windows), size, strict=True)
    )
    reduced = picture if down == across == 1 else picture.reduce((across, down))
    for view, (y0, y1, x0, x1) in zip(out, windows, strict=True):
        top, left, bottom, right = y0 // down, x0 // across, -(-y1 // down), -(-x1 // across)
        part = reduced.crop((left, top, right, bottom))
        view[:] = resized_part(part, size, filter, (x0 / across - left, y0 / down - top, x1 / across - left, y1 / down - top))
    return out


def shortest_sides(windows: Sequence[tuple[int, int, int, int]]) -> tuple[int, int]:
    """Height of the lowest window and width of the narrowest."""
    return min(y1 - y0 for y0, y1, _, _ in windows), min(x1 - x0 for _, _, x0, x1 in windows)


def _span(length: int, number: int, level: int) -> tuple[int, int]:
    start = min(round(length * number / (level + 1)), length - 1)
    return start, length if level == 1 else max(round(length * (number + 2) / (level + 1)), start + 1)


def embed_prompts(
    model: Model, text: Engine, prompts: list[tuple[str, ...]], names: Sequence[str] = (), where: str = "--classes"
) -> np.ndarray:
    """Compute one unit vector a class: the embeddings of all its templates and prompts, normalized, averaged, normalized again.

    Args:
        prompts: one or more wordings per class.
        names: of the classes, for messages; classes with a name must differ in their tokens.
        where: what messages call the class list.

    Returns:
        (len(prompts), D) float32 (CLIP's own zero-shot recipe, openai/CLIP `notebooks/Prompt_Engineering_for_ImageNet`).
    """
    settings = model.manifest.settings
    length, pad, end = int(settings["context_length"]), int(settings["pad"]), int(settings["end"])
    ids_of = tokenize_prompts(open_tokenizer(model), prompts, settings["templates"], length, end, names, where)
    rows = [row for row, sentences in enumerate(ids_of) for _ in sentences]
    tokens = np.full((len(rows), length), pad, np.int64)
    for line, ids in zip(tokens, (ids for sentences in ids_of for ids in sentences), strict=True):
        line[: len(ids)] = ids
    step = text.axes["batch"].max
    parts = [np.array(text({"tokens": tokens[start : start + step]})["embedding"]) for start in range(0, len(tokens), step)]
    embedding = np.concatenate(parts).astype(np.float32)
    mean = np.zeros((len(prompts), embedding.shape[1]), np.float32)
    np.add.at(mean, rows, embedding)
    length_of = np.linalg.norm(mean, axis=1)
    if not (length_of > 0).all():  # nor NaN
        wording = prompts[int(np.flatnonzero(~(length_of > 0))[0])][0]
        raise BundleError(f"{model.folder}: its text graph gives no embedding for {wording!r}", hint="export the model again")
    return mean / length_of[:, None]
