"""Segments of a label map: every pixel of a class in one of them, split by masks, by boxes, or else by what touches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wsss.runtime.convert.labeled import Box, Labeled, count_labels
from wsss.runtime.convert.segments import Segments, connected_regions, segments_of


def labelled(label_map: np.ndarray, *boxes: Box) -> Labeled:
    return Labeled(
        path="a.jpg",
        label="a.png",
        file=Path("a.jpg"),
        size_bytes=1,
        sha256="",
        label_map=label_map,
        count=count_labels(label_map),
        boxes=boxes,
        masks=None,
        split="train",
    )


def box(label: int, *xyxy: float, score: float = 0.5, won: int = 1) -> Box:
    corners = xyxy[0], xyxy[1], xyxy[2], xyxy[3]
    return Box(number=0, label=label, score=score, quality=0.9, xyxy_image=corners, won_px=won)


def map_of(text: str) -> np.ndarray:
    return np.array([[int(sign, 36) if sign != "." else 0 for sign in line] for line in text.split()], np.uint8)


def check(segments: Segments, label_map: np.ndarray) -> None:
    """Every pixel of a class is in exactly one object of its class; boxes and areas are tight."""
    again = np.zeros(label_map.shape, np.uint8)
    for number, one in enumerate(segments.segments, 1):
        assert one.number == number
        mask = segments.map == number
        assert one.area_px == mask.sum() > 0
        y, x = np.nonzero(mask)
        assert (one.top, one.left, one.bottom, one.right) == (y.min(), x.min(), y.max() + 1, x.max() + 1)
        assert np.array_equal(segments.crop(one), mask[one.top : one.bottom, one.left : one.right])
        again[mask] = one.label
    assert np.array_equal(again, np.where(label_map == 255, 0, label_map))


def test_nothing_and_void_alone_have_no_object() -> None:
    for value in (0, 255):
        segments = segments_of(labelled(np.full((3, 4), value, np.uint8)))
        assert segments.segments == ()
        assert not segments.map.any()


def test_touching_objects_are_split_between_their_boxes() -> None:
    label_map = map_of("1111112222")
    found = segments_of(labelled(label_map, box(1, 0, 0, 4, 1, score=0.9), box(2, 6, 0, 10, 1), box(1, 2, 0, 6, 1, score=0.3)))
    check(found, label_map)
    # Columns 2 and 3 lie in both boxes of class 1: their middle is 3.
    assert found.map.tolist() == [[1, 1, 1, 2, 2, 2, 3, 3, 3, 3]]
    assert [(one.label, one.score, one.quality) for one in found.segments] == [(1, 0.9, 0.9), (1, 0.3, 0.9), (2, 0.5, 0.9)]


def test_of_two_equal_boxes_the_first_has_the_object() -> None:
    """Boxes are sorted by their scores."""
    found = segments_of(labelled(map_of("1111"), box(1, 0, 0, 4, 1, score=0.9), box(1, 0, 0, 4, 1, score=0.4)))
    assert [(one.score, one.area_px) for one in found.segments] == [(0.9, 4)]


def test_a_small_box_in_a_large_one_keeps_its_middle() -> None:
    label_map = np.ones((20, 20), np.uint8)
    found = segments_of(labelled(label_map, box(1, 0, 0, 20, 20), box(1, 2, 2, 6, 6)))
    check(found, label_map)
    assert found.map[4, 4] == 2
    assert found.map[10, 10] == found.map[19, 19] == 1


def test_two_parts_of_one_box_are_one_object_and_leaks_go_to_the_nearest() -> None:
    label_map = map_of("11.33.11.1")
    found = segments_of(labelled(label_map, box(1, 0, 0, 8, 1), box(1, 40, 0, 42, 1)))
    check(found, label_map)
    assert found.map.tolist() == [[1, 1, 0, 2, 2, 0, 1, 1, 0, 1]]
    assert [(one.label, one.score) for one in found.segments] == [(1, 0.5), (3, None)], "the far box has no pixel left"


def test_a_box_that_won_nothing_does_not_count() -> None:
    label_map = map_of("1111")
    found = segments_of(labelled(label_map, box(1, 0, 0, 2, 1, won=0), box(1, 0, 0, 4, 1, score=0.7)))
    assert found.map.tolist() == [[1, 1, 1, 1]]
    assert found.segments[0].score == 0.7


def test_without_boxes_objects_are_what_touches() -> None:
    label_map = map_of("1.1..2 .1...2 1..22.")
    found = segments_of(labelled(label_map))
    check(found, label_map)
    assert found.map.tolist() == [[1, 0, 1, 0, 0, 2], [0, 1, 0, 0, 0, 2], [1, 0, 0, 2, 2, 0]]
    assert found.segments[0].score is None


def test_the_rule_as_it_is_written() -> None:
    random = np.random.default_rng(1)
    label_map = np.ones((23, 31), np.uint8)
    corners = random.uniform((0, 0, 1, 1), (25, 17, 12, 9), (7, 4))
    boxes = [box(1, x, y, x + w, y + h) for x, y, w, h in corners]
    y, x = np.indices(label_map.shape) + 0.5
    away = [
        np.maximum(abs(x - (x0 + x1) / 2) / ((x1 - x0) / 2), abs(y - (y0 + y1) / 2) / ((y1 - y0) / 2))
        for x0, y0, x1, y1 in (each.xyxy_image for each in boxes)
    ]
    found = segments_of(labelled(label_map, *boxes))
    assert len(found.segments) == 7
    assert np.array_equal(found.map, np.argmin(away, axis=0) + 1)


def test_large_images_go_in_bands_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    label_map = random.integers(0, 3, (40, 30)).astype(np.uint8)
    boxes = [box(1, x, y, x + 9, y + 7) for x in (0, 11, 20) for y in (0, 13, 30)]
    whole = segments_of(labelled(label_map, *boxes))
    check(whole, label_map)
    monkeypatch.setattr("wsss.runtime.convert.segments._BAND", 64)
    assert np.array_equal(segments_of(labelled(label_map, *boxes)).map, whole.map)


def flooded(mask: np.ndarray) -> np.ndarray:
    """Connected regions by the plainest of ways."""
    regions, number = np.zeros(mask.shape, int), 0
    for y, x in np.argwhere(mask):
        if regions[y, x]:
            continue
        number += 1
        todo = [(y, x)]
        while todo:
            y, x = todo.pop()
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x] and not regions[y, x]:
                regions[y, x] = number
                todo += [(y + down, x + right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    return regions


@pytest.mark.parametrize("seed", range(40))
def test_regions_are_those_of_a_flood_fill(seed: int) -> None:
    random = np.random.default_rng(seed)
    mask = random.random(random.integers(1, 25, 2)) < random.choice([0.2, 0.4, 0.6, 0.9])
    regions, count = connected_regions(mask)
    assert np.array_equal(regions, flooded(mask))
    assert count == regions.max()
