"""Pixels as Pillow images: the same values, and the same memory where it has Pillow's layout."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from PIL import Image

from wsss.pixels import pictures
from wsss.pixels.pictures import picture_of


def rgbx(height: int = 12, width: int = 9) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)


CASES = {
    "four bytes a pixel": rgbx()[..., :3],
    "one pixel": rgbx(1, 1)[..., :3],
    "three bytes a pixel": np.ascontiguousarray(rgbx()[..., :3]),
    "last three channels": rgbx()[..., 1:],
    "some rows": rgbx()[2:7, :, :3],
    "some columns": rgbx()[:, 2:7, :3],
    "mirrored": rgbx()[:, ::-1, :3],
    "upright": rgbx()[..., :3].transpose(1, 0, 2),
    "blue first": rgbx()[..., 2::-1],
    "of a transposed picture": np.asfortranarray(rgbx())[..., :3],
}


@pytest.mark.parametrize("pixels", CASES.values(), ids=CASES)
def test_a_picture_has_the_pixels(pixels: np.ndarray) -> None:
    picture = picture_of(pixels)
    assert (picture.mode, picture.size) == ("RGB", pixels.shape[1::-1])
    assert np.array_equal(np.asarray(picture), pixels)
    for filter in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
        want = Image.fromarray(np.ascontiguousarray(pixels)).resize((5, 7), filter)
        assert np.array_equal(np.asarray(picture.resize((5, 7), filter)), np.asarray(want))


def test_memory_of_four_bytes_a_pixel_is_shared() -> None:
    whole = rgbx()
    picture, copied = picture_of(whole[..., :3]), picture_of(np.ascontiguousarray(whole[..., :3]))
    before = copied.getpixel((3, 2))
    whole[2, 3, :3] ^= 255
    assert picture.getpixel((3, 2)) == tuple(whole[2, 3, :3].tolist())
    assert copied.getpixel((3, 2)) == before


def test_a_picture_outlives_the_array() -> None:
    kept = []
    for _ in range(20):
        pixels = rgbx(300, 200)[..., :3]
        kept.append((picture_of(pixels), pixels.copy()))
        del pixels
    gc.collect()
    other = [np.full((300, 200, 4), 7, np.uint8) for _ in range(40)]
    assert len(other) == 40
    assert all(np.array_equal(np.asarray(picture), pixels) for picture, pixels in kept)


def test_a_pillow_that_maps_no_memory_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(rgbx: np.ndarray) -> Image.Image:
        raise AttributeError("map_buffer")

    pictures._shares_memory.cache_clear()
    monkeypatch.setattr(pictures, "_mapped", missing)
    try:
        pixels = rgbx()[..., :3]
        assert np.array_equal(np.asarray(picture_of(pixels)), pixels)
    finally:
        pictures._shares_memory.cache_clear()
