"""Pixels as Pillow images, without a copy where their memory has the layout that Pillow uses."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, _imaging


def picture_of(pixels: np.ndarray) -> Image.Image:
    """(H, W, 3) uint8 RGB as a Pillow image of mode RGB, for reading.

    Pillow holds an RGB image in four bytes a pixel. Pixels that are the first three channels of (H, W, 4), as those of
    `wsss.photographs.decode`, share their memory with the image; others are copied, which takes 30 ms for 12 million pixels.
    """
    rgbx = pixels.base
    if rgbx is None or not _has_layout(pixels, rgbx) or not _shares_memory():
        return Image.fromarray(pixels)
    return _mapped(rgbx)


def _mapped(rgbx: np.ndarray) -> Image.Image:
    # `Image.frombuffer` shares memory too, but makes an image of mode RGBX, of which Pillow would resize four channels.
    height, width = rgbx.shape[:2]
    picture = Image.new("RGB", (1, 1))._new(_imaging.map_buffer(rgbx, (width, height), "raw", 0, ("RGB", 0, 1)))
    picture.readonly = 1
    return picture


@lru_cache(maxsize=1)
def _shares_memory() -> bool:
    """Whether this version of Pillow maps such memory; the function is not part of its documented interface."""
    rgbx = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    try:
        picture = _mapped(rgbx)
        same = np.array_equal(np.asarray(picture), rgbx[..., :3])
    except Exception:
        return False
    return same and picture.mode == "RGB" and picture.size == (4, 3)


def _has_layout(pixels: np.ndarray, rgbx: np.ndarray) -> bool:
    return (
        isinstance(rgbx, np.ndarray)
        and rgbx.shape == (*pixels.shape[:2], 4)
        and pixels.shape == (*rgbx.shape[:2], 3)
        and pixels.dtype == rgbx.dtype == np.uint8
        and rgbx.flags.c_contiguous
        and pixels.strides == rgbx.strides
        and pixels.ctypes.data == rgbx.ctypes.data
    )
