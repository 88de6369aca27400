"""Boxes: flat arrays that join and filter without losing which image a row lies in."""

from __future__ import annotations

import numpy as np
import pytest

from wsss.batch import Boxes, Photograph


def boxes(*image: int) -> Boxes:
    """One box per image number; its score says where it stood."""
    count = len(image)
    score = np.arange(count, dtype=np.float32) / 100
    return Boxes(np.tile(np.float32([0, 0, 1, 1]), (count, 1)), score, np.arange(1, count + 1), np.array(image, np.int64))


def test_no_boxes_keep_the_shapes_and_dtypes() -> None:
    for none in (Boxes.none(), Boxes.join([]), Boxes.join([Boxes.none(), Boxes.none()]), Boxes.none().keep(np.zeros(0, bool))):
        assert len(none) == 0
        assert none.xyxy_image.shape == (0, 4)
        assert [field.dtype for field in (none.xyxy_image, none.score, none.label, none.image)] == ["f4", "f4", "i8", "i8"]


@pytest.mark.parametrize(
    ("parts", "image", "score"),
    [
        ([(), (0,)], [0], [0.0]),
        ([(2, 0), (1, 0)], [0, 0, 1, 2], [0.01, 0.01, 0.0, 0.0]),
        ([(1, 1), (1,)], [1, 1, 1], [0.0, 0.01, 0.0]),
    ],
)
def test_joined_by_image_in_the_order_given(parts: list[tuple[int, ...]], image: list[int], score: list[float]) -> None:
    joined = Boxes.join([boxes(*part) for part in parts])
    assert joined.image.tolist() == image
    assert joined.score.round(2).tolist() == np.float32(score).round(2).tolist()


def test_keep_by_mask_and_by_index() -> None:
    assert boxes(0, 0, 1).keep(np.array([True, False, True])).label.tolist() == [1, 3]
    assert boxes(0, 0, 1).keep(np.array([2, 0])).label.tolist() == [3, 1]


def test_a_photographs_shape_is_height_then_width() -> None:
    assert Photograph(name="x", pixels=np.zeros((3, 5, 3), np.uint8)).shape == (3, 5)
