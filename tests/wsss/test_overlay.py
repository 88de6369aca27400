"""Pictures of label maps: right colors, and thumbnails that never grow."""

from __future__ import annotations

import numpy as np
import pytest

from wsss.classes import palette
from wsss.overlay import overlay, shrink


def test_overlay_colors_labels_and_leaves_background_clear() -> None:
    pixels = np.full((3, 5, 3), 100, np.uint8)
    label_map = np.zeros((3, 5), np.uint8)
    label_map[:, 3:] = 1
    shown = overlay(pixels, label_map, strength=0.5)
    assert (shown.shape, shown.dtype) == ((3, 5, 3), np.uint8)
    assert shown[0, 0].tolist() == [100, 100, 100]
    assert shown[0, 3].tolist() == palette()[1].tolist(), "the outline is the color itself"
    assert shown[0, 4].tolist() == [round(v) for v in (100 + palette()[1].astype(float)) / 2]


def test_the_outline_is_the_first_pixel_below_and_to_the_right_of_a_border() -> None:
    pixels = np.full((4, 3, 3), 101, np.uint8)
    label_map = np.array([[0], [0], [1], [1]], np.uint8).repeat(3, axis=1)
    shown = overlay(pixels, label_map)
    assert shown[:, 1].tolist() == [[101] * 3, [101] * 3, [128, 0, 0], [116, 45, 45]], "55 % of the color, rounded"
    assert np.array_equal(overlay(pixels.transpose(1, 0, 2), label_map.T), shown.transpose(1, 0, 2))


@pytest.mark.parametrize(("size", "thumbnail"), [((10, 20), (20, 10)), ((400, 800), (64, 32)), ((1000, 10), (1, 64))])
def test_thumbnails_never_grow(size: tuple[int, int], thumbnail: tuple[int, int]) -> None:
    assert shrink(np.zeros((*size, 3), np.uint8), 64).size == thumbnail
