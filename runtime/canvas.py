"""Places photographs on the models' canvases: resized, padded, prepared ahead, stacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from ..batch import Photograph, Tensor
from ..engines.engine import Resident
from ..engines.tensors import joined
from ..frame import Frame
from ..pixels.pictures import picture_of

Rows = np.ndarray | Resident
"""Inputs of a stage, (N, H, W, 3) uint8, of which adjacent ones can be taken."""
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

    def resizes(self, photo: Photograph) -> bool:
        """Whether the input is made on the engine's device, by ``resized``, so that none has to be prepared ahead."""
        ...

    def resized(self, photo: Photograph) -> Rows | None:
        """The input (N, H, W, 3) uint8 on the engine's device; None if that has no memory for it."""
        ...


def input_of(photo: Photograph, name: str, stage: Prepares) -> Rows:
    """A stage's input for this photograph, with a first axis of rows: (N, H, W, 3) uint8.

    It is made on the engine's device; otherwise it is the one prepared ahead, which can be taken once, or a new one.
    """
    if stage.resizes(photo) and (made := stage.resized(photo)) is not None:
        return made
    if name in photo.ahead:
        prepared, out = photo.ahead.pop(name)
        prepared.result()
    else:
        out = stage.prepare(photo, np.zeros(stage.room(photo), np.uint8))
    return out if out.ndim == 4 else out[None]


def together(parts: Sequence[Rows]) -> Tensor:
    """Inputs (N, H, W, 3) of several photographs one behind the other, in one tensor.

    Without a copy where the parts are adjacent in one array, as those of a prepared batch are; on the device where they are.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    if len(arrays) == len(parts) and _are_adjacent(arrays):
        rows, row_bytes = sum(len(part) for part in arrays), arrays[0][0].nbytes
        strides = row_bytes, *arrays[0].strides[1:]  # of an axis of one row, numpy may say any
        return np.lib.stride_tricks.as_strided(arrays[0], (rows, *first.shape[1:]), strides, writeable=False)
    return joined(parts)


def _are_adjacent(parts: Sequence[np.ndarray]) -> bool:
    expected = parts[0].ctypes.data
    for part in parts:
        if (
            part.base is None
            or part.base is not parts[0].base
            or not part.flags.c_contiguous
            or part.ctypes.data != expected
            or part.shape[1:] != parts[0].shape[1:]
        ):
            return False
        expected += part.nbytes
    return True


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
