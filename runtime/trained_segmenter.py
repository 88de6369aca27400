"""The trained segmenter as a replacement of the chain: one graph from photographs to label maps.

It is the last stage of a chain whose other stages do nothing, so that runs, stores and reports work the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from PIL import Image

from ..batch import Boxes, Images, Labels, Masks, PseudoLabels
from ..classes import ClassList, class_list
from ..engines.engine import Engine
from ..errors import UsageError
from ..frame import fitting_canvas, resized
from ..spec import Model
from .canvas import resized_pixels


@dataclass(frozen=True, slots=True)
class Tile:
    """A part of a photograph that goes on a canvas, and the part of it whose labels are kept.

    All (y0, y1, x0, x1) in pixels of the photograph: ``seen`` goes to the canvas's top left; ``owned``, inside it, is kept.
    """

    image: int
    seen: tuple[int, int, int, int]
    owned: tuple[int, int, int, int]


class SegmenterStage:
    """Computes label maps with the segmenter.

    Args:
        model: the bundle's ``segmenter``.
        engine_of: opens the engine of a canvas; called at first use.
    """

    def __init__(self, model: Model, engine_of: Callable[[tuple[int, int]], Engine]) -> None:
        self._preprocess = model.manifest.preprocess
        self._canvases = self._preprocess.canvases
        self._overlap = int(model.manifest.settings["overlap_px"])
        self._classes = len(model.manifest.settings["classes"])
        self._engine_of = lru_cache(maxsize=None)(engine_of)

    def __call__(self, images: Images, labels: Labels, boxes: Boxes, masks: Masks) -> PseudoLabels:
        """Label maps at the photographs' size, the confidence of every pixel, and each class's mean confidence as its score."""
        sizes = [resized(self._preprocess, *photo.shape) for photo in images]
        seen = [resized_pixels(photo.pixels, size, self._preprocess.filter) for photo, size in zip(images, sizes, strict=True)]
        maps = [np.empty(size, np.uint8) for size in sizes]
        confidence = [np.empty(size, np.uint8) for size in sizes]
        tiles_of: dict[tuple[int, int], list[Tile]] = {}
        for number, size in enumerate(sizes):
            canvas = canvas_for(self._canvases, size)
            tiles_of.setdefault(canvas, []).extend(tiles(number, size, canvas, self._overlap))
        for canvas, all_tiles in tiles_of.items():
            engine = self._engine_of(canvas)
            step = engine.axes["batch"].max
            for start in range(0, len(all_tiles), step):
                self._run(engine, canvas, seen, all_tiles[start : start + step], maps, confidence)
        for number, photo in enumerate(images):
            maps[number], confidence[number] = at_size(maps[number], confidence[number], photo.shape)
        labels = scores(maps, confidence, self._classes)
        nothing = np.zeros(0, np.int64)
        names = [photo.name for photo in images]
        return PseudoLabels(names, maps, labels, Boxes.none(), np.zeros(0, np.float32), nothing, nothing, confidence)

    @staticmethod
    def _run(
        engine: Engine,
        canvas: tuple[int, int],
        seen: Sequence[np.ndarray],
        batch: Sequence[Tile],
        maps: list[np.ndarray],
        confidence: list[np.ndarray],
    ) -> None:
        pixels = np.zeros((len(batch), *canvas, 3), np.uint8)
        size = np.zeros((len(batch), 2), np.int64)
        for row, tile in enumerate(batch):
            y0, y1, x0, x1 = tile.seen
            size[row] = y1 - y0, x1 - x0
            pixels[row, : y1 - y0, : x1 - x0] = seen[tile.image][y0:y1, x0:x1]
        out = engine({"pixels": pixels, "size": size})
        for found, target in ((np.asarray(out["label_map"]), maps), (np.asarray(out["confidence"]), confidence)):
            for row, tile in enumerate(batch):
                y0, y1, x0, x1 = tile.owned
                top, left = tile.seen[0], tile.seen[2]
                target[tile.image][y0:y1, x0:x1] = found[row, y0 - top : y1 - top, x0 - left : x1 - left]


def canvas_for(canvases: Sequence[tuple[int, int]], size: tuple[int, int]) -> tuple[int, int]:
    """The smallest canvas that a photograph of (height, width) fits on, else the largest one, for its tiles."""
    return fitting_canvas(canvases, size) or max(canvases, key=lambda canvas: canvas[0] * canvas[1])


def tiles(image: int, size: tuple[int, int], canvas: tuple[int, int], overlap: int) -> Iterator[Tile]:
    """Yield tiles that cover a photograph of (height, width), evenly spaced; exactly one tile owns each pixel.

    Neighbors overlap by at least ``overlap`` pixels; the border of what they own is in the middle of the overlap.
    """
    for seen_y, owned_y in spans(size[0], canvas[0], overlap):
        for seen_x, owned_x in spans(size[1], canvas[1], overlap):
            yield Tile(image, (*seen_y, *seen_x), (*owned_y, *owned_x))


def spans(length: int, window: int, overlap: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(seen, owned) spans of windows along one axis."""
    if length <= window:
        return [((0, length), (0, length))]
    count = -(-(length - overlap) // (window - overlap))
    starts = [round(number * (length - window) / (count - 1)) for number in range(count)]
    edges = [0, *((before + after + window) // 2 for before, after in pairwise(starts)), length]
    return [((start, start + window), (edges[number], edges[number + 1])) for number, start in enumerate(starts)]


def at_size(label_map: np.ndarray, confidence: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Label map and confidence (h, w) uint8 of a resized photograph, at its original (height, width).

    The graph gives only the best label and its probability. Each label's confidence is resized as a picture, bilinearly, and the
    largest wins, which gives smooth outlines; resizing the labels to the nearest pixel would leave steps.
    """
    if label_map.shape == size:
        return label_map, confidence
    best, winner = np.zeros(size, np.float32), np.zeros(size, np.uint8)
    for label in np.unique(label_map):
        picture = Image.fromarray(np.where(label_map == label, confidence, 0).astype(np.float32))
        value = np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR))
        better = value > best
        best[better], winner[better] = value[better], label
    return winner, (best + 0.5).astype(np.uint8)


def scores(maps: Sequence[np.ndarray], confidence: Sequence[np.ndarray], classes: int) -> Labels:
    """A class is present where any pixel has its label; its score is their mean confidence."""
    score = np.zeros((len(maps), classes), np.float32)
    present = np.zeros(score.shape, np.bool_)
    for row, (label_map, certainty) in enumerate(zip(maps, confidence, strict=True)):
        pixels = np.bincount(label_map.ravel(), minlength=classes + 1)[1:]
        total = np.bincount(label_map.ravel(), certainty.ravel(), classes + 1)[1:]
        score[row], present[row] = total / 255 / np.maximum(pixels, 1), pixels > 0
    return Labels(score, present)


def no_boxes(images: Images, labels: Labels) -> Boxes:
    """The detector stage of a segmenter, which has no boxes."""
    return Boxes.none()


def no_masks(images: Images, boxes: Boxes) -> Masks:
    """The mask stage of a segmenter, which has no masks."""
    nothing = np.zeros(0, np.int64)
    return Masks([], nothing, nothing, np.zeros(0, np.float32), [None] * len(images))


def classes_of(model: Model, typed: ClassList | None) -> ClassList:
    """The class list that the segmenter was trained on. Raises UsageError when another was typed."""
    names = tuple(model.manifest.settings["classes"])
    if typed is not None and typed.names != names:
        raise UsageError(
            f"{typed.where}: the segmenter in {model.folder} knows {', '.join(names)}; got {', '.join(typed.names)}",
            hint="leave out --classes: a trained segmenter has its own list",
        )
    return typed or class_list(names)
