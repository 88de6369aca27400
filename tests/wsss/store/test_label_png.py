"""Label PNGs: read back by Pillow, not much larger than Pillow's, and the same bytes with either library."""

from __future__ import annotations

import io
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsss.classes import palette
from wsss.store import label_png
from wsss.store.label_png import deflated, png_of

MASKS = Path(os.environ.get("WSSS_TEST_DATA", Path(__file__).parents[4] / "shared" / "data")) / "voc_pairs"


def drawn(height: int, width: int) -> np.ndarray:
    """Round objects with a void border, as fusion makes them."""
    y, x = np.ogrid[:height, :width]
    label_map = np.zeros((height, width), np.uint8)
    for number in range(3):
        distance = ((x - width * (number + 0.5) / 3) / (0.15 * width)) ** 2 + ((y - height / 2) / (0.35 * height)) ** 2
        label_map[distance < 1.05 + 0.05 * np.sin(x / 5)] = 255
        label_map[distance < 1 + 0.05 * np.sin(x / 5)] = number + 1
    return label_map


def noise(height: int, width: int, labels: int = 256) -> np.ndarray:
    return np.random.default_rng(height).integers(0, labels, (height, width), dtype=np.uint8)


CASES = {
    "one pixel": noise(1, 1),
    "one row": noise(1, 70_000),
    "one column": noise(70_000, 1),
    "empty": np.zeros((375, 500), np.uint8),
    "void": np.full((375, 500), 255, np.uint8),
    "objects": drawn(375, 500),
    "large": drawn(1500, 2000),
    "noise": noise(300, 400),
    "two labels": noise(300, 400, 2),
    "not contiguous": drawn(375, 500).T,
}


def by_pillow(label_map: np.ndarray) -> bytes:
    image = Image.fromarray(np.ascontiguousarray(label_map))
    image.putpalette(palette().tobytes())
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("label_map", CASES.values(), ids=CASES)
def test_pillow_reads_what_was_written(label_map: np.ndarray) -> None:
    with Image.open(io.BytesIO(png_of(label_map)), formats=("PNG",)) as image:
        image.load()
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image), label_map)
        assert image.getpalette() == palette().ravel().tolist()


def test_labels_are_not_much_larger_than_pillows() -> None:
    """All together a quarter; a single one at most by three quarters, or by 1 kB: an empty one takes two bytes a row."""
    label_maps = [CASES[name] for name in ("empty", "void", "objects", "large")]
    label_maps += [np.asarray(Image.open(path)) for path in sorted(MASKS.glob("*/*.png"))]
    sizes = [(len(png_of(label_map)), len(by_pillow(label_map))) for label_map in label_maps]
    assert all(size <= max(1.75 * pillows, pillows + 1024) for size, pillows in sizes)
    assert sum(size for size, _ in sizes) <= 1.25 * sum(pillows for _, pillows in sizes)


@pytest.mark.parametrize("label_map", CASES.values(), ids=CASES)
def test_both_libraries_write_the_same_bytes(label_map: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("zlib_ng.zlib_ng", reason="zlib-ng is not installed")
    written = []
    for compressobj in (zlib.compressobj, library.compressobj):
        monkeypatch.setattr(label_png, "_library", lambda compressobj=compressobj: compressobj)
        written.append(png_of(label_map))
    assert written[0] == written[1]
    assert zlib.decompress(deflated(label_map.copy())) == label_map.tobytes()
