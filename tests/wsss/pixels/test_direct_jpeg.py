"""JPEG files decoded directly have the pixels that Pillow gives; damaged ones end as they do with Pillow."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsss import photographs
from wsss.batch import Photograph
from wsss.errors import ImageError
from wsss.photographs import ImageFile, decode
from wsss.pixels import direct_jpeg

PHOTOGRAPHS = Path(os.environ.get("WSSS_TEST_DATA", Path(__file__).parents[4] / "shared" / "data")) / "voc_pairs" / "JPEGImages"
MODES = ("RGB", "L", "CMYK")
KINDS = [(mode, subsampling, progressive) for mode in MODES for subsampling in (0, 1, 2) for progressive in (False, True)]
ORIENTATION = 0x0112


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    pytest.importorskip("simplejpeg", reason="simplejpeg is not installed")
    direct_jpeg._decoder.cache_clear()
    yield
    direct_jpeg._decoder.cache_clear()


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each file was decoded directly."""
    found = []

    def noted(data: bytes, size: tuple[int, int]) -> np.ndarray | None:
        pixels = direct_jpeg.decode_rgbx(data, size)
        found.append(pixels is not None)
        return pixels

    monkeypatch.setattr(photographs, "decode_rgbx", noted)
    return found


def picture(mode: str = "RGB", size: tuple[int, int] = (61, 47)) -> Image.Image:
    rng = np.random.default_rng(size)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse).astype(int) + rng.integers(-20, 21, (size[1], size[0], 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


def saved(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def outcome(data: bytes) -> Photograph | str:
    try:
        return decode(ImageFile(name="x.jpg", data=data, sha256=""))
    except ImageError as error:
        return f"{error.message}\n{error.hint}"


def by_pillow(data: bytes) -> Photograph | str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photographs, "decode_rgbx", lambda *_: None)
        return outcome(data)


def assert_same(data: bytes) -> None:
    got, want = outcome(data), by_pillow(data)
    if isinstance(got, str) or isinstance(want, str):
        assert got == want
        return
    assert np.array_equal(got.pixels, want.pixels)
    assert got.pixels.dtype == want.pixels.dtype == np.uint8
    assert (got.orientation, got.warning) == (want.orientation, want.warning)


@pytest.mark.parametrize(("mode", "subsampling", "progressive"), KINDS)
def test_pixels_are_those_of_pillow(mode: str, subsampling: int, progressive: bool, direct: list[bool]) -> None:
    for size in ((1, 1), (7, 300), (61, 47), (160, 120)):
        assert_same(saved(picture(mode, size), subsampling=subsampling, progressive=progressive))
    assert direct == [mode != "CMYK"] * 4 * (mode != "CMYK")  # Pillow's own, which the decoder is not asked for


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_exif_rotation_is_that_of_pillow(mode: str, orientation: int, direct: list[bool]) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = saved(picture(mode), exif=exif)
    assert_same(data)
    assert direct == [True]
    photo = outcome(data)
    assert isinstance(photo, Photograph)
    assert photo.orientation == orientation


@pytest.mark.parametrize(
    "data",
    [
        saved(picture(), keep_rgb=True),
        saved(picture(), restart_marker_rows=1),
        saved(picture(), quality=100),
        saved(picture(), quality=5),
        saved(picture(), "MPO", save_all=True, append_images=[picture("L").convert("RGB")]),
        saved(picture()) + b"more",
    ],
    ids=["stored as RGB", "restart markers", "quality 100", "quality 5", "two pictures", "bytes behind the end"],
)
def test_odd_files_have_the_pixels_of_pillow(data: bytes, direct: list[bool]) -> None:
    assert_same(data)
    assert direct == [True]


def test_files_that_are_cut_end_as_with_pillow(direct: list[bool]) -> None:
    for progressive in (False, True):
        data = saved(picture(), progressive=progressive)
        for length in (*range(2, len(data), max(len(data) // 60, 1)), len(data) - 2, len(data) - 1):
            assert_same(data[:length])
    assert direct
    assert not any(direct)


def test_damaged_files_end_as_with_pillow(direct: list[bool]) -> None:
    rng = random.Random(0)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    files = [saved(picture(mode, (24, 16)), progressive=progressive) for mode in ("RGB", "L") for progressive in (False, True)]
    files.append(saved(picture(size=(24, 16)), exif=exif))
    for _ in range(600):
        data = bytearray(rng.choice(files))
        for _ in range(rng.choice((1, 1, 2, 5))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        assert_same(bytes(data))
    assert any(direct)
    assert not all(direct)


def test_photographs_have_the_pixels_of_pillow(direct: list[bool]) -> None:
    paths = sorted(PHOTOGRAPHS.glob("*.jpg"))
    if not paths:
        pytest.skip(f"needs real photographs in {PHOTOGRAPHS} (or $WSSS_TEST_DATA)")
    for path in paths:
        assert_same(path.read_bytes())
    assert all(direct)


class _Library:
    def __init__(self, decode: Callable[[bytes], np.ndarray]) -> None:
        self._decode = decode

    def decode_jpeg(self, data: bytes, colorspace: str, strict: bool) -> np.ndarray:
        return self._decode(data)


def one_level_off(data: bytes) -> np.ndarray:
    import simplejpeg

    pixels = simplejpeg.decode_jpeg(data, "RGBX")
    pixels[0, 0, 0] ^= 1
    return pixels


def broken(data: bytes) -> np.ndarray:
    raise RuntimeError("of another libjpeg")


@pytest.mark.parametrize("library", [one_level_off, broken, None], ids=["other pixels", "broken", "not installed"])
def test_another_decoder_is_not_used(
    library: Callable[[bytes], np.ndarray] | None, monkeypatch: pytest.MonkeyPatch, direct: list[bool]
) -> None:
    def found(name: str) -> _Library:
        if library is None:
            raise ImportError(name)
        return _Library(library)

    monkeypatch.setattr(direct_jpeg, "import_module", found)
    assert_same(saved(picture()))
    assert direct == [False]


def test_thumbnails_are_decoded_by_pillow(direct: list[bool]) -> None:
    decode(ImageFile(name="x.jpg", data=saved(picture(size=(160, 120))), sha256=""), shorter_side_px=16)
    assert not direct
