"""Boundary IoU: the band equals what the authors' erosion leaves, and void belongs to no area."""

from __future__ import annotations

import math

import numpy as np
import pytest

from wsss.train.evaluate.boundary import boundary, boundary_counts, boundary_iou


def eroded_band(mask: np.ndarray, distance_px: int) -> np.ndarray:
    """``mask_to_boundary`` of the authors' code: the mask without what is left after eroding it with 3 x 3 ones."""
    left = np.pad(mask, 1)
    for _ in range(distance_px):
        inner = left.copy()
        for shift in [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]:
            inner &= np.roll(left, shift, axis=(0, 1))
        left = inner
    return mask & ~left[1:-1, 1:-1]


def blobs(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Rectangles of labels 0 to 3 and 255, and single pixels."""
    label_map = np.zeros((height, width), np.uint8)
    for _ in range(6):
        y, x = rng.integers(0, height), rng.integers(0, width)
        label_map[y : y + rng.integers(1, height + 1), x : x + rng.integers(1, width + 1)] = rng.choice([0, 1, 2, 3, 255])
    return label_map


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (7, 7), (8, 5), (40, 31)])
@pytest.mark.parametrize("distance_px", [1, 2, 3, 4, 7])
def test_the_band_is_what_erosion_takes_away(height: int, width: int, distance_px: int) -> None:
    rng = np.random.default_rng(height * width + distance_px)
    for _ in range(20):
        label_map = blobs(rng, height, width)
        found = boundary(label_map, distance_px)
        for label in np.unique(label_map):
            mask = label_map == label
            assert np.array_equal(found & mask, eroded_band(mask, distance_px))


@pytest.mark.parametrize(("height", "width", "distance_px"), [(3, 4, 1), (20, 30, 1), (120, 160, 4), (500, 375, 12)])
def test_counts_are_those_of_each_mask(height: int, width: int, distance_px: int) -> None:
    rng = np.random.default_rng(height)
    truth, predicted = blobs(rng, height, width), blobs(rng, height, width)
    counts = boundary_counts(truth, predicted, 4)
    for label in range(4):
        true_band = eroded_band(truth == label, distance_px)
        band = eroded_band((predicted == label) & (truth != 255), distance_px)
        assert counts[:, label].tolist() == [(true_band & band).sum(), (true_band | band).sum()]


def test_the_truth_agrees_with_itself_whatever_is_said_of_its_void() -> None:
    truth = np.zeros((60, 80), np.uint8)
    truth[20:40, 20:60] = 255
    truth[23:37, 23:57] = 1
    filled = np.where(truth == 255, np.uint8(1), truth)
    assert boundary_iou(boundary_counts(truth, filled, 2)).tolist() == [1, 1]


def test_a_shifted_outline_costs_more_than_in_iou() -> None:
    truth, predicted = np.zeros((2, 200, 200), np.uint8)
    truth[20:180, 20:180] = 1
    predicted[23:180, 20:180] = 1
    iou = boundary_iou(boundary_counts(truth, predicted, 2))[1]
    assert iou < 0.8 < 157 / 160


def test_a_class_never_seen_is_nan_and_a_prediction_of_void_is_a_miss() -> None:
    truth = np.zeros((10, 10), np.uint8)
    iou = boundary_iou(boundary_counts(truth, np.full_like(truth, 255), 2))
    assert iou[0] == 0
    assert math.isnan(iou[1])
