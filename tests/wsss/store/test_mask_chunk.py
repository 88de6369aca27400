"""Masks in the PNG of a label map: other readers do not see them, damaged ones are refused, deflate bombs do not go off."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsss.errors import ImageError, StoreError
from wsss.rle import MaskRuns
from wsss.store.label_png import png_of
from wsss.store.local import label_file, read_label, read_label_and_masks
from wsss.store.mask_chunk import MAX_MASKS, NAME, masks_in, with_masks

SIZE = (6, 8)
LABEL_MAP = np.zeros(SIZE, np.uint8)
LABEL_MAP[1:4, 2:7] = 1
COUNTS = [MaskRuns.of(LABEL_MAP > 0).counts(), MaskRuns.of(np.zeros(SIZE, bool)).counts()]


def file_with(data: bytes, *, times: int = 1) -> bytes:
    png = png_of(LABEL_MAP)
    chunk = len(data).to_bytes(4) + NAME + data + zlib.crc32(NAME + data).to_bytes(4)
    return png[:-12] + times * chunk + png[-12:]


def test_masks_come_back_and_the_label_map_is_untouched(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(label_file("a.png", LABEL_MAP, COUNTS))
    label_map, masks = read_label_and_masks(path, shape=SIZE, boxes=2)
    assert masks == COUNTS
    assert np.array_equal(label_map, LABEL_MAP)
    assert np.array_equal(read_label(path), LABEL_MAP)
    with Image.open(path) as image:
        image.verify()
    assert label_file("a.png", LABEL_MAP, None) == label_file("a.png", LABEL_MAP, []) == png_of(LABEL_MAP)


def test_a_label_that_another_program_wrote_has_no_masks(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(label_file("a.png", LABEL_MAP, COUNTS))
    with Image.open(path) as image:
        image.load()
        image.save(path)
    assert read_label_and_masks(path, shape=SIZE, boxes=2)[1] is None
    assert read_label_and_masks(path, shape=SIZE, boxes=0)[1] == []


def test_pillow_gives_the_chunk_to_whoever_asks() -> None:
    """As docs/formats.md shows."""
    with Image.open(io.BytesIO(label_file("a.png", LABEL_MAP, COUNTS))) as image:
        image.load()
        chunks = {chunk[0]: chunk[1] for chunk in image.private_chunks}  # type: ignore[attr-defined]
    assert zlib.decompress(chunks[b"maSK"]).decode().split("\n") == COUNTS


GOOD = zlib.compress("\n".join(COUNTS).encode())


@pytest.mark.parametrize(
    ("png", "problem"),
    [
        (file_with(b""), "damaged"),
        (file_with(b"no zlib"), "damaged"),
        (file_with(GOOD[:-3]), "damaged"),
        (file_with(GOOD + b"more"), "damaged"),
        (file_with(GOOD, times=2), "occur twice"),
        (file_with(GOOD).replace(GOOD, GOOD[:-1] + b"x"), "damaged"),
        (file_with(zlib.compress(COUNTS[0].encode())), "expected one mask for each of the 2 boxes, got 1"),
        (file_with(zlib.compress(b"0" * (MAX_MASKS + 1))), "too long"),
        (file_with(zlib.compress(b"0" * (MAX_MASKS // 2) + b"\n0")), "a mask is too long"),
    ],
)
def test_damaged_masks_are_refused(tmp_path: Path, png: bytes, problem: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png)
    with pytest.raises(StoreError, match=rf"a\.png: not a readable label: .*{problem}") as error:
        read_label_and_masks(path, shape=SIZE, boxes=2)
    assert "run wsss label again" in error.value.hint


def test_a_chunk_whose_length_leads_out_of_the_file() -> None:
    png = file_with(GOOD)
    place = png.index(NAME) - 4
    for length in (0xFFFFFFFF, len(png), 0x7FFFFFFF):
        with pytest.raises(ValueError, match="damaged"):
            masks_in(png[:place] + length.to_bytes(4) + png[place + 4 :], 2)
    assert masks_in(png[: place - 1], 2) is None
    with pytest.raises(ValueError, match="no PNG"):
        masks_in(b"GIF89a", 2)


def test_masks_that_no_reader_would_take_are_not_written() -> None:
    with pytest.raises(ImageError, match=r"^a\.png: the masks are too ragged"):
        label_file("a.png", LABEL_MAP, ["0" * (MAX_MASKS // 4 + 1)])
    with pytest.raises(ValueError, match="too ragged"):
        with_masks(png_of(LABEL_MAP), ["0" * (MAX_MASKS // 8)] * 9)
