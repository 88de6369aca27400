"""Thresholds of single classes for CLIP's probabilities, from photographs whose classes are known.

A threshold does not transfer between classes (open_clip#334). The best threshold of a class is uncertain where few photographs
show it: it is drawn toward the common one, the more the fewer they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ...classes import ClassList
from ...errors import UsageError
from ...train.evaluate.metrics import label_scores
from .evidence import Evidence
from .outcomes import Difference, Outcomes, difference

PRIOR = 4.0
"""Photographs of a class that weigh as much as the common threshold."""
LOWEST, HIGHEST = 0.01, 0.99
"""Thresholds are between these."""


BETAS = (1.0, 2.0, 4.0)
"""Weights of recall that are tried where the chain's mIoU can be measured: an absent class that CLIP lets through often gets no
box, one that it does not let through is lost."""


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """Thresholds (C,) float64, and the scores of image labels before and after, on photographs that were left out."""

    thresholds: np.ndarray
    beta: float
    before: dict[str, float]
    after: dict[str, float]
    miou_before: float | None = None
    """mIoU of the chain; None where only image labels are known."""
    miou: Difference | None = None
    """What the thresholds gain, on photographs that were left out."""


def calibrate(
    score: np.ndarray, truth: np.ndarray, threshold: float, *, beta: float = 1.0, folds: int = 5, seed: int = 0
) -> Calibrated:
    """Thresholds by class, and what they gain by cross-validation.

    Args:
        score: (N, C) float32, CLIP's. truth: (N, C) bool. threshold: the common one.
        beta: recall counts this many times as much as precision, see `class_thresholds`.
    """
    fold = folds_of(len(score), folds, seed)
    return Calibrated(
        thresholds=class_thresholds(score, truth, threshold, beta=beta),
        beta=beta,
        before=label_scores(truth, score >= np.float32(threshold)),
        after=label_scores(truth, score >= held_out_thresholds(score, truth, threshold, fold, beta=beta)),
    )


def calibrate_chain(evidence: Evidence, *, folds: int = 5, seed: int = 0) -> Calibrated:
    """As `calibrate`, with the weight of recall that gives the chain the best mIoU on photographs that were left out."""
    outcomes, rules = Outcomes(evidence), evidence.rules
    assert rules.tag_threshold is not None, "opened with CLIP"
    score = np.array([sample.score for sample in evidence.samples])
    labels = np.arange(1, score.shape[1] + 1)
    truth = np.array([np.isin(labels, sample.truth) for sample in evidence.samples])
    fold = folds_of(len(score), folds, seed)
    before = outcomes.matrices(rules)
    best: Calibrated | None = None
    for beta in BETAS:
        after = np.zeros_like(before)
        for number in range(folds):
            others = fold != number
            thresholds = class_thresholds(score[others], truth[others], rules.tag_threshold, beta=beta)
            changed = replace(rules, tag_thresholds=by_name(evidence.classes, thresholds))
            after[~others] = outcomes.some(changed, np.flatnonzero(~others))
        gain = difference(after, before)
        if best is None or best.miou is None or gain.value > best.miou.value:
            found = calibrate(score, truth, rules.tag_threshold, beta=beta, folds=folds, seed=seed)
            best = replace(found, miou_before=outcomes.miou(rules), miou=gain)
    assert best is not None
    return best


def folds_of(count: int, folds: int, seed: int) -> np.ndarray:
    """(count,) int64, the part that each photograph belongs to. Raises UsageError for fewer photographs than folds."""
    if not 2 <= folds <= count:
        raise UsageError(f"--folds: expected 2 to {count}, the number of photographs, got {folds}", hint="label more photographs")
    return np.random.default_rng(seed).permutation(count) % folds


def by_name(classes: ClassList, thresholds: np.ndarray) -> dict[str, float]:
    """Thresholds (C,) by the names of their classes, as `Rules.tag_thresholds`."""
    return {name: round(float(value), 4) for name, value in zip(classes.names, thresholds, strict=True)}


def held_out_thresholds(
    score: np.ndarray, truth: np.ndarray, threshold: float, fold: np.ndarray, *, beta: float = 1.0
) -> np.ndarray:
    """(N, C) float32: for each photograph the thresholds that the other folds give.

    Args:
        fold: (N,) int64, the part that each photograph belongs to.
    """
    thresholds = np.empty(score.shape, np.float32)
    for number in np.unique(fold):
        others = fold != number
        thresholds[~others] = class_thresholds(score[others], truth[others], threshold, beta=beta)
    return thresholds


def class_thresholds(score: np.ndarray, truth: np.ndarray, threshold: float, *, beta: float = 1.0) -> np.ndarray:
    """(C,) float64: each class's threshold of the largest F-beta, drawn toward the common one.

    Both are combined as log odds, the class's with the number of photographs that show it, the common one with `PRIOR`. A class
    without a photograph keeps the common threshold.

    Args:
        score: (N, C) float32. truth: (N, C) bool. beta: as of `label_scores`' F1, in which it is 1; larger values favor recall.
    """
    result = np.full(score.shape[1], threshold, np.float64)
    common = _log_odds(threshold)
    for label in np.flatnonzero(truth.any(axis=0)):
        shown = int(truth[:, label].sum())
        own = _log_odds(_best_threshold(score[:, label], truth[:, label], beta))
        result[label] = 1 / (1 + np.exp(-(shown * own + PRIOR * common) / (shown + PRIOR)))
    return result


def _best_threshold(score: np.ndarray, truth: np.ndarray, beta: float) -> float:
    """The threshold of the largest F-beta, in the middle between two scores; of equal ones the lowest."""
    order = np.argsort(-score, kind="stable")
    ranked = score[order].astype(np.float64)
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # cuts between different scores only
    hit = np.cumsum(truth[order])[last]
    quality = (1 + beta**2) * hit / (last + 1 + beta**2 * truth.sum())
    best = int(np.flatnonzero(quality >= quality.max() - 1e-12)[-1])
    below = ranked[last[best] + 1] if last[best] + 1 < len(ranked) else 0.0
    return float((ranked[last[best]] + below) / 2)


def _log_odds(probability: float) -> float:
    clipped = min(max(probability, LOWEST), HIGHEST)
    return float(np.log(clipped / (1 - clipped)))
