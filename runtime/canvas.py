"""Places photographs on the models' canvases: resized, padded, prepared ahead, stacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from ..batch import Photograph
from ..frame import Frame
from ..pixels.pictures import picture_of

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

_BAND = 128
"""Rows that are copied from Pillow at a time: in one piece, the copy would take memory that is new each time, and 4 ms."""


@runtime_checkable
class Prepares(Protocol):
    """A stage that takes pixels, and whose input for a photograph can be prepared ahead."""

    def room(self, photo: Photograph) -> tuple[int, ...]:
        """Shape of the array that ``prepare`` fills."""
        ...

    def prepare(self, photo: Photograph, out: np.ndarray) -> np.ndarray:
        """Write the stage's input for this photograph into ``out``, uint8, which is black; return ``out``."""
        ...


def made_ahead(photo: Photograph, name: str, stage: Prepares) -> np.ndarray:
    """A stage's input for this photograph: the one prepared ahead, which can be taken once, or a new one."""
    if name not in photo.ahead:
        return stage.prepare(photo, np.zeros(stage.room(photo), np.uint8))
    prepared, out = photo.ahead.pop(name)
    prepared.result()
    return out


def stacked(parts: Sequence[np.ndarray]) -> np.ndarray:
    """As ``np.stack``, but without a copy where the parts are adjacent in one array, as those of a prepared batch are."""
    first = parts[0]
    if all(
        part.base is first.base is not None
        and part.flags.c_contiguous
        and part.ctypes.data == first.ctypes.data + number * first.nbytes
        and part.shape == first.shape
        for number, part in enumerate(parts)
    ):
        return np.lib.stride_tricks.as_strided(first, (len(parts), *first.shape), (first.nbytes, *first.strides), writeable=False)
    return np.stack(parts)


def on_canvas(pixels: np.ndarray, frame: Frame, filter: str, out: np.ndarray | None = None) -> np.ndarray:
    """A photograph resized to its frame, at the top left of a black canvas: (H, W, 3) uint8.

    Pillow's antialiased resize, as the reference code of CLIP, Grounding-DINO and SAM uses.

    Args:
        out: the black canvas; None makes one.
    """
    height, width = frame.valid
    canvas = np.zeros((*frame.canvas, 3), np.uint8) if out is None else out
    if pixels.shape[:2] == frame.valid:
        canvas[:height, :width] = pixels
        return canvas
    resized = resized_part(picture_of(pixels), frame.valid, filter)
    for top in range(0, height, _BAND):
        bottom = min(top + _BAND, height)
        canvas[top:bottom, :width] = np.asarray(resized.crop((0, top, width, bottom)))
    return canvas


def resized_pixels(pixels: np.ndarray, size: tuple[int, int], filter: str) -> np.ndarray:
    """The pixels resized to (height, width) with Pillow's antialiased resize: (h, w, 3) uint8; not copied if they fit."""
    return pixels if pixels.shape[:2] == size else np.asarray(resized_part(picture_of(pixels), size, filter))


def resized_part(
    picture: Image.Image, size: tuple[int, int], filter: str, box: tuple[float, float, float, float] | None = None
) -> Image.Image:
    """A picture, or its part within the edges left, top, right and bottom, resized to (height, width) as Pillow does."""
    return picture.resize(size[::-1], _FILTERS[filter], box)
