"""Photographs on the canvases of the models: resized, padded, prepared ahead, stacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from ..batch import Photograph
from ..frame import Frame

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@runtime_checkable
class Prepares(Protocol):
    """A stage that looks at pixels: what it takes of a photograph can be made ahead."""

    def room(self, photo: Photograph) -> tuple[int, ...]:
        """Shape of what ``prepare`` makes."""
        ...

    def prepare(self, photo: Photograph, out: np.ndarray) -> np.ndarray:
        """The stage's input of this photograph, uint8, written into ``out``, which is black."""
        ...


def made_ahead(photo: Photograph, name: str, stage: Prepares) -> np.ndarray:
    """A stage's input of this photograph: the one prepared ahead if there is one, once, otherwise made now."""
    if name not in photo.ahead:
        return stage.prepare(photo, np.zeros(stage.room(photo), np.uint8))
    made, out = photo.ahead.pop(name)
    made.result()
    return out


def stacked(parts: Sequence[np.ndarray]) -> np.ndarray:
    """``np.stack``, without a copy where the parts lie side by side in one array, as a batch prepared ahead does."""
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


def on_canvas(pixels: np.ndarray | Image.Image, frame: Frame, filter: str, out: np.ndarray | None = None) -> np.ndarray:
    """A photograph resized into its frame, top left on a black canvas: (H, W, 3) uint8.

    PIL's antialiased resize, as the references of CLIP, Grounding-DINO and SAM use on their images.

    Args:
        out: the canvas, black; None makes one.
    """
    height, width = frame.valid
    canvas = np.zeros((*frame.canvas, 3), np.uint8) if out is None else out
    canvas[:height, :width] = resized_pixels(pixels, frame.valid, filter)
    return canvas


def resized_pixels(pixels: np.ndarray | Image.Image, size: tuple[int, int], filter: str) -> np.ndarray:
    """(h, w, 3) uint8 at this (height, width) by PIL's antialiased resize; the given pixels where they have it."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    return np.asarray(image.resize(size[::-1], _FILTERS[filter]) if size[::-1] != image.size else pixels)
