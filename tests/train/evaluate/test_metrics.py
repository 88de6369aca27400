"""Scores: one confusion matrix for all images, void and ignore as the protocol has them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from wsss.train.evaluate.metrics import (
    average_precision,
    class_iou,
    class_precision,
    class_recall,
    confusion_matrix,
    label_scores,
    mean_iou,
    mean_of_seen,
    pixel_accuracy,
)


def matrix(truth: list[int], predicted: list[int], classes: int = 3) -> np.ndarray:
    return confusion_matrix(np.array(truth, np.uint8), np.array(predicted, np.uint8), classes)


@pytest.mark.parametrize(
    ("truth", "predicted", "cells"),
    [
        ([], [], {}),
        ([255, 255], [0, 255], {}),  # ignored in the truth
        ([0, 1, 2], [0, 1, 2], {(0, 0): 1, (1, 1): 1, (2, 2): 1}),
        ([1, 1, 2], [2, 2, 1], {(1, 2): 2, (2, 1): 1}),
        ([0, 2], [255, 255], {(0, 3): 1, (2, 3): 1}),  # void in the prediction: a miss in the last column
    ],
)
def test_pixels_by_truth_and_prediction(truth: list[int], predicted: list[int], cells: dict[tuple[int, int], int]) -> None:
    want = np.zeros((3, 4), np.int64)
    for cell, count in cells.items():
        want[cell] = count
    assert np.array_equal(matrix(truth, predicted), want)


def test_any_shape_and_many_classes() -> None:
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 81, (2, 40, 50)).astype(np.uint8)
    counted = confusion_matrix(truth, predicted, 81)
    assert counted.shape == (81, 82)
    assert counted.sum() == 2000
    assert counted[truth[3, 4], predicted[3, 4]] >= 1


def test_maps_of_two_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"truth is \(2, 3\), predicted \(3, 2\)"):
        confusion_matrix(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), 2)


@pytest.mark.parametrize(("truth", "predicted"), [([0, 3], [0, 0]), ([0, 0], [0, 3]), ([0, 0], [0, 254]), ([254], [255])])
def test_a_label_that_is_no_class_is_refused(truth: list[int], predicted: list[int]) -> None:
    """It would be counted in the row of another class."""
    with pytest.raises(ValueError, match=r"label (3|254), there are 3 classes"):
        matrix(truth, predicted)


@pytest.mark.parametrize(
    ("truth", "predicted", "iou", "mean"),
    [
        ([0, 0], [0, 0], [1, None, None], 1.0),
        ([0, 0, 1, 1], [0, 1, 1, 1], [1 / 2, 2 / 3, None], 7 / 12),
        ([0, 0], [0, 2], [1 / 2, None, 0], 1 / 4),  # said but never there: 0, and it counts
        ([1, 1], [255, 1], [None, 1 / 2, None], 1 / 2),  # void is a miss
        ([255, 1], [2, 1], [None, 1, None], 1.0),
    ],
)
def test_iou_of_each_class_and_their_mean(truth: list[int], predicted: list[int], iou: list[float | None], mean: float) -> None:
    found = class_iou(matrix(truth, predicted))
    assert [None if math.isnan(each) else each for each in found] == pytest.approx(iou)
    assert mean_iou(matrix(truth, predicted)) == pytest.approx(mean)


def test_255_labels_fill_the_matrix() -> None:
    every = np.arange(256, dtype=np.uint8)
    assert np.array_equal(confusion_matrix(every, every, 255), np.eye(255, 256))
    assert np.array_equal(confusion_matrix(every[:255], np.full(255, 255, np.uint8), 255).nonzero(), [range(255), [255] * 255])


@pytest.mark.parametrize(
    ("truth", "predicted", "precision", "recall", "accuracy"),
    [
        ([0, 0], [0, 0], [1, None, None], [1, None, None], 1),
        ([0, 0, 1, 1], [0, 1, 1, 1], [1, 2 / 3, None], [1 / 2, 1, None], 3 / 4),
        ([0, 1], [0, 0], [1 / 2, 0, None], [1, 0, None], 1 / 2),  # never said: 0, not left out of the mean
        ([0, 0], [0, 2], [1, None, 0], [1 / 2, None, 0], 1 / 2),  # never there
        ([0, 0, 1], [255, 0, 1], [1, 1, None], [1 / 2, 1, None], 2 / 3),  # void is a miss and no false find
        ([255, 1], [0, 1], [None, 1, None], [None, 1, None], 1),
        ([255], [1], [None] * 3, [None] * 3, None),
    ],
)
def test_precision_recall_and_accuracy(
    truth: list[int],
    predicted: list[int],
    precision: list[float | None],
    recall: list[float | None],
    accuracy: float | None,
) -> None:
    counts = matrix(truth, predicted)
    for found, want in ((class_precision(counts), precision), (class_recall(counts), recall)):
        assert [None if math.isnan(each) else each for each in found] == pytest.approx(want)
    assert (None if math.isnan(pixel_accuracy(counts)) else pixel_accuracy(counts)) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("truth", "score", "want"),
    [
        ([0, 0], [0.9, 0.1], math.nan),  # in no image
        ([1, 1], [0.9, 0.1], 1),
        ([1, 0, 1], [0.9, 0.8, 0.7], (1 + 2 / 3) / 2),
        ([0, 1], [0.9, 0.1], 1 / 2),
        ([1, 0], [0.0, 0.0], 1 / 2),  # a tie has no order that could help
        ([0, 1], [0.0, 0.0], 1 / 2),
        ([1, 0, 0, 1], [0.9, 0.5, 0.5, 0.5], 1 / 2 + 1 / 2 * 2 / 4),
    ],
)
def test_average_precision(truth: list[int], score: list[float], want: float) -> None:
    found = average_precision(np.array(truth, bool)[:, None], np.array(score)[:, None])
    assert found == pytest.approx([want], nan_ok=True)


def test_each_class_has_its_own_average_precision() -> None:
    truth = np.array([[1, 0, 0], [0, 1, 0]], bool)
    assert average_precision(truth, np.array([[0.9, 0.9, 0], [0.1, 0.1, 0]])) == pytest.approx([1, 1 / 2, math.nan], nan_ok=True)


def test_the_mean_is_of_what_is_seen() -> None:
    assert mean_of_seen(np.array([1.0, math.nan, 0.5])) == 0.75
    assert math.isnan(mean_of_seen(np.array([math.nan])))


@pytest.mark.filterwarnings("error")
def test_nothing_to_score_is_nan_without_a_warning() -> None:
    assert math.isnan(mean_iou(matrix([255], [1])))


def test_one_matrix_is_not_the_mean_over_images() -> None:
    first, second = matrix([1, 0, 0, 0], [1, 0, 0, 0], 2), matrix([1, 1, 1, 0], [0, 0, 0, 0], 2)
    assert class_iou(first + second)[1] == pytest.approx(1 / 4)


@pytest.mark.parametrize(
    ("truth", "predicted", "precision", "recall", "f1", "macro"),
    [
        ([[0, 0]], [[0, 0]], 0, 0, 0, 1),
        ([[1, 0]], [[1, 0]], 1, 1, 1, 1),
        ([[1, 0]], [[0, 1]], 0, 0, 0, 0),
        ([[1, 1], [1, 0]], [[1, 0], [1, 1]], 2 / 3, 2 / 3, 2 / 3, 1 / 2),
        ([[1, 0], [1, 0]], [[1, 0], [0, 0]], 1, 1 / 2, 2 / 3, 2 / 3),  # the second class never occurs
    ],
)
def test_label_scores(
    truth: list[list[int]], predicted: list[list[int]], precision: float, recall: float, f1: float, macro: float
) -> None:
    scores = label_scores(np.array(truth, bool), np.array(predicted, bool))
    assert scores == pytest.approx({"precision": precision, "recall": recall, "f1": f1, "macro_f1": macro})
