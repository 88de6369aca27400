"""Holes and crumbs of masks, by segment_anything's rule, on the cells that show the photograph."""

from __future__ import annotations

import numpy as np
import pytest

from wsss.frame import Frame
from wsss.runtime.masks.regions import FILLED, small_regions, without_small_regions

WHOLE = Frame((8, 8), (8, 8), (8, 8))
"""A photograph whose pixels are the cells of its masks."""


def mask_of(rows: str) -> np.ndarray:
    return np.array([[4.0 if cell == "#" else -4.0 for cell in row] for row in rows.split()], np.float32)


def shown(logits: np.ndarray) -> str:
    return " ".join("".join("#" if cell > 0 else "." for cell in row) for row in logits)


@pytest.mark.parametrize(
    ("rows", "least", "want"),
    [
        pytest.param("........ " * 8, 9, "........ " * 8, id="nothing"),
        pytest.param("######.. #....#.. #.##.#.. #....#.. ######.. ........ ........ #.......", 1, None, id="1: no change"),
        pytest.param(
            "######.. #....#.. #.##.#.. #....#.. ######.. ........ ........ #.......",
            11,
            "######.. ######.. ######.. ######.. ######.. ........ ........ ........",
            id="the crumb in the hole is part of it, the crumb outside goes",
        ),
        pytest.param(
            "######.. #....#.. #.##.#.. #....#.. ######.. ........ ........ #.......",
            10,
            "######.. #....#.. #....#.. #....#.. ######.. ........ ........ ........",
            id="a hole of just so many cells stays",
        ),
        pytest.param(
            "##...... ##...... ..#..... ........ .....##. ........ ........ ........",
            4,
            "##...... ##...... ..#..... ........ ........ ........ ........ ........",
            id="corners touch",
        ),
        pytest.param(
            "##...... ........ ........ .....### ........ ........ ........ ........",
            50,
            "........ ........ ........ .....### ........ ........ ........ ........",
            id="the largest region stays",
        ),
    ],
)
def test_regions(rows: str, least: int, want: str | None) -> None:
    for dtype in (np.float32, np.float16):
        logits = mask_of(rows)[None].astype(dtype)
        before = logits.copy()
        found = without_small_regions(logits, [WHOLE], least)
        assert found is logits and found.dtype == dtype
        assert shown(found[0]) == shown(mask_of(want or rows))
        changed = found != before
        assert set(np.unique(np.abs(found[changed])).tolist()) <= {dtype(FILLED)}, "the least claim to a pixel"


def test_areas_are_in_pixels_of_the_photograph_and_padding_is_no_hole() -> None:
    """A photograph of 40 x 20 pixels on the left half of the mask: a cell is 5 x 5 pixels."""
    frame = Frame((40, 20), (8, 4), (8, 8))
    rows = "##.##### ##.##### ######## ######## ######## ######## ######## ########"
    kept = without_small_regions(mask_of(rows)[None], [frame], 50)[0]
    filled = without_small_regions(mask_of(rows)[None], [frame], 51)[0]
    assert shown(kept) == rows and shown(filled)[:8] == "########"
    padded = mask_of("####.... " * 8)
    assert shown(without_small_regions(padded[None].copy(), [frame], 10_000)[0]) == shown(padded), "the padding is not filled"


def test_small_regions_of_nothing() -> None:
    assert not small_regions(np.zeros((3, 4), bool), 5, keep_largest=True).any()
