"""Polygons that a filler turns back into the same mask."""

from __future__ import annotations

import numpy as np
import pytest

from wsss.runtime.convert import polygons as module
from wsss.runtime.convert.polygons import polygon_of, polygons_of, simplified
from wsss.runtime.convert.segments import connected_regions


def filled(polygon: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The even-odd rule at pixel centers, edges painted; edges are level, upright or diagonal only."""
    y, x = np.indices(shape)
    inside, edge = np.zeros(shape, bool), np.zeros(shape, bool)
    for (x0, y0), (x1, y1) in zip(polygon.tolist(), np.roll(polygon, -1, axis=0).tolist(), strict=True):
        steps = max(abs(x1 - x0), abs(y1 - y0))
        assert (x1 - x0) % max(steps, 1) == (y1 - y0) % max(steps, 1) == 0
        for step in range(steps + 1):
            edge[y0 + (y1 - y0) * step // max(steps, 1), x0 + (x1 - x0) * step // max(steps, 1)] = True
        if y0 != y1:
            inside ^= ((y0 <= y) != (y1 <= y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside | edge


CASES = {
    "nothing": "....",
    "a pixel": "... .#. ...",
    "a line": "####",
    "two pixels that touch at a corner": "#. .#",
    "a square": "... .## .##",
    "a ring": "### #.# ###",
    "a ring in a ring": "####### #.....# #.###.# #.#.#.# #.###.# #.....# #######",
    "holes beside each other": "####### #.#.#.# #######",
    "holes that touch at a corner": "##### #.### ##.## #####",
    "a hole that bends round": "####### #.....# #.###.# #.#.... #.##### #......",
    "a full image": "### ###",
}


@pytest.mark.parametrize("name", CASES)
def test_known_shapes(name: str) -> None:
    check(np.array([[sign == "#" for sign in line] for line in CASES[name].split()]))


@pytest.mark.parametrize("seed", range(150))
def test_random_masks(seed: int) -> None:
    random = np.random.default_rng(seed)
    mask = random.random(random.integers(1, 18, 2)) < random.choice([0.1, 0.4, 0.6, 0.8, 0.95])
    check(np.kron(mask, np.ones((1, 2), bool)) if seed % 2 else mask)


def check(mask: np.ndarray) -> None:
    regions, count = connected_regions(mask)
    polygons = polygons_of(mask)
    assert len(polygons) == count
    for number, polygon in enumerate(polygons, 1):
        assert np.array_equal(filled(polygon, mask.shape), regions == number)
        assert np.array_equal(module.filled(polygon, mask.shape), regions == number)
    if count == 0:
        return
    joined = module.filled(polygon_of(mask), mask.shape)
    assert joined[mask].all(), "what joins the regions only adds to them"
    assert np.array_equal(joined, mask) or count > 1


@pytest.mark.parametrize(
    ("text", "painted"),
    [
        ("#...#", 3),
        ("#.# ... #..", 2),
        ("##..... ##..... ....... ......#", 4),
        ("##### #...# #.#.# #...# #####", 1),
        ("#.#.#.#", 3),
    ],
)
def test_regions_are_joined_by_a_line_between_their_nearest_pixels(text: str, painted: int) -> None:
    mask = np.array([[sign == "#" for sign in line] for line in text.split()])
    found = module.filled(polygon_of(mask), mask.shape)
    assert found[mask].all()
    assert (found & ~mask).sum() == painted


def test_regions_are_joined_alike_however_many_distances_go_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.random.default_rng(2).random((40, 50)) < 0.2
    whole = polygon_of(mask)
    monkeypatch.setattr(module, "_PAIRS", 7)
    assert np.array_equal(polygon_of(mask), whole)


def test_a_simplified_outline_is_off_by_the_tolerance_at_most() -> None:
    y, x = np.indices((200, 200))
    mask = np.hypot(x - 100, y - 100) < 80
    polygon = polygon_of(mask)
    before = len(polygon)
    for tolerance in (0.5, 1.0, 3.0):
        fewer = simplified(polygon, tolerance)
        assert len(fewer) < before
        before = len(fewer)
        assert {tuple(corner) for corner in fewer.tolist()} <= {tuple(corner) for corner in polygon.tolist()}
        wrong = np.argwhere(module.filled(fewer, mask.shape) != mask)
        assert np.abs(np.hypot(*(wrong - 100).T) - 80).max(initial=0) < tolerance + 1.5
    assert np.array_equal(simplified(polygon, 0.0), polygon)
    assert simplified(np.array([[3, 4]]), 5.0).tolist() == [[3, 4]]
    assert len(simplified(polygon, 1000.0)) == 2


def test_straight_lines_have_no_corners_between() -> None:
    assert polygons_of(np.ones((4, 7), bool))[0].tolist() == [[0, 0], [6, 0], [6, 3], [0, 3]]
    assert polygons_of(np.ones((1, 5), bool))[0].tolist() == [[0, 0], [4, 0]]


def test_opencv_fills_them_alike() -> None:
    cv2 = pytest.importorskip("cv2", reason="needs opencv-python-headless")
    random = np.random.default_rng(0)
    for _ in range(100):
        mask = random.random(random.integers(1, 40, 2)) < random.choice([0.3, 0.5, 0.7, 0.9])
        canvas = np.zeros(mask.shape, np.uint8)
        for polygon in polygons_of(mask):
            cv2.fillPoly(canvas, [polygon.astype(np.int32)], 1)
        assert np.array_equal(canvas, mask)
        corners = random.integers(0, 40, (random.integers(1, 9), 2))
        canvas = cv2.fillPoly(np.zeros((40, 40), np.uint8), [corners.astype(np.int32)], 1)
        assert np.array_equal(canvas, module.filled(corners, (40, 40)))
