"""Coordinate frames: the placement of a photograph on a model's canvas, and the mapping of boxes and masks back to it.

Names carry the frame: ``xyxy_image`` is in pixels of the photograph (EXIF rotation applied), ``xyxy_model`` in pixels
of the canvas. The photograph is resized and put top left; the rest of the canvas is padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .spec import Preprocess

Array = np.ndarray


SEAM = 0.01
"""Share of a tile's side within which a box touches the tile's edge."""


class Tile(NamedTuple):
    """A part of a photograph with a canvas of its own: its first row and column, and the photograph's (height, width)."""

    top: int
    left: int
    photograph: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Frame:
    """A photograph's place on a canvas. All sizes are (height, width) in pixels."""

    image: tuple[int, int]
    valid: tuple[int, int]
    """Size after resizing: the part of the canvas that the photograph covers."""
    canvas: tuple[int, int]
    squashed: bool = False
    """Whether the model resizes photographs to its canvas without keeping their aspect ratio. Mask logits are then resized to the
    photograph in one step; with padding they are first resized to the canvas, where it is cropped."""
    tile: Tile | None = None
    """The part of the photograph on the canvas, of size ``image``; None: all of it."""

    def xyxy_model_from_image(self, xyxy_image: Array) -> Array:
        """Convert boxes (N, 4) float32 from the photograph's frame to the canvas's (SAM ``ResizeLongestSide.apply_boxes``)."""
        return (np.asarray(xyxy_image, np.float64) * self._scale()).astype(np.float32)

    def xyxy_image_from_model(self, xyxy_model: Array) -> Array:
        """Convert boxes (N, 4) float32 from the canvas's frame to the photograph's."""
        return (np.asarray(xyxy_model, np.float64) / self._scale()).astype(np.float32)

    def xyxy_image_from_cxcywh(self, cxcywh: Array) -> Array:
        """Convert center and size in 0..1 of the valid part to boxes (N, 4) float32 in the photograph, clipped to it or its tile.

        Grounding-DINO's boxes are relative to the unpadded photograph (its valid ratios), so padding does not matter.
        """
        height, width = self.image
        center, size = np.asarray(cxcywh, np.float64)[:, :2], np.asarray(cxcywh, np.float64)[:, 2:]
        corners = np.concatenate([center - size / 2, center + size / 2], axis=1)
        corners = np.clip(corners * [width, height, width, height], 0, [width, height, width, height])
        if self.tile:
            corners += [self.tile.left, self.tile.top] * 2
        return corners.astype(np.float32)

    def is_cut(self, xyxy_image: Array) -> Array:
        """(N,) bool: which boxes (N, 4) end where the tile does and the photograph does not: an object may go on there."""
        if not self.tile:
            return np.zeros(len(xyxy_image), bool)
        (height, width), (top, left, whole) = self.image, self.tile
        low, high = np.array([left, top]), np.array([left + width, top + height])
        reach = SEAM * (high - low)
        before = (xyxy_image[:, :2] < low + reach) & (low > 0)
        after = (xyxy_image[:, 2:] > high - reach) & (high < whole[::-1])
        return (before | after).any(axis=1)

    def mask_rows(self, side: int) -> Array:
        """(H, side) float32: the linear map from the rows of low-resolution mask logits to the photograph's rows."""
        return upsample_matrix(*self.mask_lengths(side)[0])

    def mask_columns(self, side: int) -> Array:
        """(W, side) float32: as ``mask_rows`` for columns; upsampled = rows @ logits @ columns.T."""
        return upsample_matrix(*self.mask_lengths(side)[1])

    def mask_lengths(self, side: int) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
        """The arguments of `upsample_matrix` for the rows and the columns of mask logits."""
        canvas, valid = ((side, side), (side, side)) if self.squashed else (self.canvas, self.valid)
        rows, columns = zip(canvas, valid, self.image, strict=True)
        return (side, *rows), (side, *columns)

    def _scale(self) -> Array:
        (height, width), (valid_height, valid_width) = self.image, self.valid
        return np.array([valid_width / width, valid_height / height] * 2)


def frame_for(preprocess: Preprocess, height: int, width: int) -> Frame:
    """The frame of a photograph of this size: resized for the model, on the smallest canvas that holds it.

    A photograph that no canvas holds (smaller canvases, or an extreme aspect ratio that the model's rounding enlarges) is
    shrunk further, to fit the canvas that keeps it largest.
    """
    valid = resized(preprocess, height, width)
    if fitting := fitting_canvas(preprocess.canvases, valid):
        return Frame((height, width), valid, fitting, preprocess.resize == "squash")

    def shrink(canvas: tuple[int, int]) -> float:
        return min(canvas[0] / valid[0], canvas[1] / valid[1])

    canvas = max(preprocess.canvases, key=shrink)
    scale = shrink(canvas)
    shrunk = (min(max(round(valid[0] * scale), 1), canvas[0]), min(max(round(valid[1] * scale), 1), canvas[1]))
    return Frame((height, width), shrunk, canvas)


def fitting_canvas(canvases: Sequence[tuple[int, int]], size: tuple[int, int]) -> tuple[int, int] | None:
    """The canvas with the fewest pixels that holds ``size``; None if there is none. All are (height, width)."""
    fitting = [canvas for canvas in canvases if canvas[0] >= size[0] and canvas[1] >= size[1]]
    return min(fitting, key=lambda canvas: canvas[0] * canvas[1], default=None)


def resized(preprocess: Preprocess, height: int, width: int) -> tuple[int, int]:
    """(height, width) after the model's resize, before padding.

    ``shorter``: `wsss.train.data.working_size`. ``longest``: SAM ``ResizeLongestSide.get_preprocess_shape``.
    ``short-longest``: ``get_size_with_aspect_ratio`` of GroundingDINO ``datasets/transforms.py``.
    """
    if preprocess.resize == "squash":
        return preprocess.canvases[0]
    if preprocess.resize == "none":
        return height, width
    if preprocess.resize == "shorter":
        return scaled(height, width, shorter_factor(height, width, preprocess.short_px))
    if preprocess.resize == "longest":
        scale = preprocess.longest_px / max(height, width)
        return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)
    short, longest = float(preprocess.short_px), preprocess.longest_px
    low, high = float(min(height, width)), float(max(height, width))
    if high / low * short > longest:
        short = round(longest * low / high)
    short = max(int(short), 1)
    if min(height, width) == short:
        return height, width
    if width < height:
        return max(int(short * height / width), 1), short
    return short, max(int(short * width / height), 1)


def shorter_factor(height: int, width: int, shorter_px: int) -> float:
    """Factor that brings the shorter side to ``shorter_px``, with the longer one at most four times as long.

    This is the (2048, 512) of mmsegmentation's configurations.
    """
    return shorter_px * min(1 / min(height, width), 4 / max(height, width))


def scaled(height: int, width: int, factor: float) -> tuple[int, int]:
    """(height, width) times a factor, to the nearest pixel, at least one."""
    return max(round(height * factor), 1), max(round(width * factor), 1)


@lru_cache(maxsize=8)
def upsample_matrix(side: int, canvas: int, valid: int, image: int) -> Array:
    """SAM's mask upsampling along one axis, as one matrix.

    SAM resizes mask logits side -> canvas, crops the padding, and resizes valid -> image, both bilinear with
    ``align_corners=False`` (``Sam.postprocess_masks``). Each step is linear along each axis, hence so is the chain. SAM 2 resizes
    side -> image (``SAM2Transforms.postprocess_masks``), which is the same with canvas and valid equal to side.

    Returns:
        (image, side) float32, read-only; each row sums to 1. Composed in float64.
    """
    # The product of two matrices with two values a row: bilinear_matrix(valid, image) @ bilinear_matrix(side, canvas)[:valid].
    low, high, share = bilinear_taps(valid, image)
    inner = bilinear_matrix(side, canvas)
    matrix = ((1 - share)[:, None] * inner[low] + share[:, None] * inner[high]).astype(np.float32)
    matrix.setflags(write=False)  # shared by all photographs of this size
    return matrix


def bilinear_matrix(source: int, target: int) -> Array:
    """(target, source) float64: ``torch.nn.functional.interpolate`` bilinear, half-pixel centers, no antialiasing."""
    low, high, share = bilinear_taps(source, target)
    matrix, rows = np.zeros((target, source)), np.arange(target)
    matrix[rows, low] = 1 - share
    matrix[rows, high] += share  # at an edge both may be the same pixel: the weights add up
    return matrix


def bilinear_taps(source: int, target: int) -> tuple[Array, Array, Array]:
    """The two source pixels of each target pixel, and the second one's weight: (target,) int64, int64, float64.

    torch computes the position of a target pixel in float32. In float64, mask logits of +-20 differed by up to 9e-4 (59
    pixels of a 4000 x 3000 mask flipped). Its kernels for AVX2, AVX512 and CUDA multiply and subtract with one rounding, as
    here; those for older CPUs with two, which changes white noise of +-1 by up to 2e-5.
    """
    scale = np.float64(np.float32(source) / np.float32(target))
    # Exact in float64 until the single rounding: 24 bits times at most 15.
    center = np.maximum((scale * (np.arange(target) + 0.5) - 0.5).astype(np.float32), np.float32(0))
    low = np.minimum(center.astype(np.int64), source - 1)
    return low, np.minimum(low + 1, source - 1), center.astype(np.float64) - low
