"""Thresholds of single classes."""

from __future__ import annotations

import numpy as np
import pytest

from wsss.errors import UsageError
from wsss.runtime.tune.calibrate import PRIOR, calibrate, class_thresholds, folds_of
from wsss.train.evaluate.metrics import label_scores


def scores(count: int, shift: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two classes: the first one's scores are separated at 0.5, the second one's at 0.5 + shift."""
    rng = np.random.default_rng(seed)
    truth = rng.random((count, 2)) < 0.5
    score = np.where(truth, 0.55, 0.35) + rng.uniform(0, 0.1, truth.shape)
    return (score + np.array([0, shift])).astype(np.float32), truth


def test_a_class_whose_scores_are_higher_gets_a_higher_threshold() -> None:
    score, truth = scores(400, 0.3)
    first, second = class_thresholds(score, truth, 0.5)
    assert first == pytest.approx(0.5, abs=0.03) and second == pytest.approx(0.8, abs=0.03)


def test_a_class_without_a_photograph_keeps_the_common_threshold() -> None:
    score, truth = scores(40, 0.3)
    truth[:, 1] = False
    assert class_thresholds(score, truth, 0.62)[1] == 0.62


def test_few_photographs_move_a_threshold_little() -> None:
    score, truth = np.float32([[0.9], [0.8], [0.1]]), np.array([[True], [False], [False]])
    own, common = np.log(0.85 / 0.15), np.log(0.3 / 0.7)
    want = 1 / (1 + np.exp(-(own + PRIOR * common) / (1 + PRIOR)))
    assert class_thresholds(score, truth, 0.3)[0] == pytest.approx(want, abs=1e-6)


def test_recall_may_count_more() -> None:
    rng = np.random.default_rng(1)
    truth = rng.random((500, 1)) < 0.4
    score = np.clip(rng.normal(np.where(truth, 0.6, 0.4), 0.15), 0, 1).astype(np.float32)
    lenient, even = (class_thresholds(score, truth, 0.5, beta=beta)[0] for beta in (4.0, 1.0))
    assert lenient < even - 0.05


def test_scores_are_those_of_photographs_that_were_left_out() -> None:
    """Pure noise: thresholds that fit their own photographs gain nothing on others."""
    rng = np.random.default_rng(2)
    truth, score = rng.random((60, 20)) < 0.3, rng.random((60, 20)).astype(np.float32)
    found = calibrate(score, truth, 0.5)
    own = class_thresholds(score, truth, 0.5)
    fitted = label_scores(truth, score >= own.astype(np.float32))
    assert fitted["macro_f1"] > found.after["macro_f1"] + 0.01
    assert found.before == label_scores(truth, score >= 0.5)


def test_a_shifted_class_gains() -> None:
    score, truth = scores(100, -0.3)
    found = calibrate(score, truth, 0.5)
    assert found.after["macro_f1"] > found.before["macro_f1"] + 0.3


def test_folds() -> None:
    fold = folds_of(10, 3, 0)
    assert sorted(np.bincount(fold).tolist()) == [3, 3, 4]
    with pytest.raises(UsageError, match="--folds: expected 2 to 3"):
        folds_of(3, 5, 0)
