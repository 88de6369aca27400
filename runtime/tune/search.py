"""Searches rules on labeled photographs.

Few photographs make the chain's mIoU a poor guide: a class that two of them show decides as much as one that all of them show.
The search takes the mean IoU over all pairs of a photograph and a class that is in its truth or in its label map, which count the
same each, and averages it over neighboring thresholds. What that gains on scenes that it was not searched on is measured by
`benchmarks/studies/quality/decision_rules.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..chain import Rules
from .outcomes import Outcomes, resamples

STEPS: tuple[tuple[str, ...], ...] = (
    ("tag_threshold", "box_threshold"),
    ("score_rule", "box_threshold"),
    ("nms",),
    ("nms_across",),
    ("enclosing",),
    ("margin",),
    ("quality_exponent",),
    ("stability_exponent",),
)
"""Rules that are changed together, in the order in which they are tried."""
NEIGHBORS = {"tag_threshold": 1, "box_threshold": 2}
"""How many values of the grid to each side are averaged, with falling weights."""
ROUNDS = 2
SAMPLES = 100
"""Bootstrap samples by which a change is judged."""
DOUBT = 0.35
"""A change is worth its gain at this quantile of the bootstrap samples: few photographs must not decide by chance."""
LEAST = 1e-3
"""IoU that a change must gain."""


def search(
    outcomes: Outcomes, photographs: np.ndarray, steps: Sequence[tuple[str, ...]] = STEPS, *, doubt: float = DOUBT
) -> Rules:
    """The best rules on some photographs, by coordinate ascent from those of the run.

    A step takes the values whose gain over the present ones is largest at the quantile ``doubt`` of bootstrap samples, if that is
    a gain at all; of equal gains, the one nearest to the run's values.

    Args:
        photographs: (K,) int64, numbers of the evidence's photographs.
    """
    weights = resamples(len(photographs), SAMPLES, 0)
    known: dict[str, np.ndarray] = {}

    def scores(rules: Rules) -> np.ndarray:
        if (key := repr(rules)) not in known:
            known[key] = resampled_iou(outcomes.matrices(rules)[photographs], weights)
        return known[key]

    best, grid = outcomes.evidence.rules, outcomes.evidence.grid
    for _ in range(ROUNDS):
        before = best
        for step in steps:
            names = [name for name in step if name != "tag_threshold" or outcomes.evidence.tags]
            axes = [getattr(grid, name) for name in names]
            tried = candidates(outcomes, best, names)
            of_all = np.array([scores(each) for each in tried]).reshape(*map(len, axes), SAMPLES)
            for axis, name in enumerate(names):
                of_all = _smoothed(of_all, axis, NEIGHBORS.get(name, 0))
            flat = of_all.reshape(len(tried), SAMPLES)
            gains = np.quantile(flat - flat[tried.index(best)], doubt, axis=1)
            if gains.max() > LEAST:
                equal = [each for each, gain in zip(tried, gains, strict=True) if gain > gains.max() - 1e-9]
                best = min(equal, key=lambda each: _distance(outcomes, each))
        if best == before:
            break
    return best


def candidates(outcomes: Outcomes, rules: Rules, names: Sequence[str]) -> list[Rules]:
    """The rules with all combinations of the grid's values of these names, the last one changing fastest."""
    values = itertools.product(*(getattr(outcomes.evidence.grid, name) for name in names))
    return [replace(rules, **dict(zip(names, each, strict=True))) for each in values]


def resampled_iou(matrices: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(B,) mean IoU over pairs of a photograph and a class that it shows or is given, without background.

    Args:
        matrices: (N, C + 1, C + 2) confusion matrices. weights: (B, N), how often each sample has each photograph.
    """
    hit = np.diagonal(matrices, axis1=1, axis2=2)[:, 1:].astype(np.float64)
    union = matrices[:, 1:].sum(axis=2) + matrices[:, :, 1:-1].sum(axis=1) - hit
    seen = union > 0
    iou = np.where(seen, hit / np.where(seen, union, 1), 0)
    return np.asarray((weights @ iou.sum(axis=1)) / np.maximum(weights @ seen.sum(axis=1), 1))


def _smoothed(values: np.ndarray, axis: int, width: int) -> np.ndarray:
    """Averages along an axis with weights that fall to 0 beyond ``width``; the ends count as repeated."""
    pad = [(width, width) if each == axis else (0, 0) for each in range(values.ndim)]
    padded, count = np.pad(values, pad, mode="edge"), values.shape[axis]
    weights = width + 1 - np.abs(np.arange(2 * width + 1) - width)
    parts = [weight * padded.take(range(at, at + count), axis) for at, weight in enumerate(weights)]
    return np.asarray(sum(parts) / weights.sum())


def _distance(outcomes: Outcomes, rules: Rules) -> tuple[int, int]:
    """How many values differ from those of the run, and by how many steps of the grid."""
    default, grid = outcomes.evidence.rules, outcomes.evidence.grid
    changed = [name for name in vars(grid) if getattr(rules, name) != getattr(default, name)]
    places = [[getattr(grid, name).index(getattr(each, name)) for each in (rules, default)] for name in changed]
    return len(changed), sum(abs(place - start) for place, start in places)
