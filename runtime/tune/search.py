"""Searches rules by the chain's mIoU on labeled photographs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from ..chain import Rules
from .outcomes import Outcomes, resampled_miou, resamples

STEPS: tuple[tuple[str, ...], ...] = (
    ("tag_threshold", "box_threshold"),
    ("score_rule", "box_threshold"),
    ("tag_threshold",),
    ("nms",),
    ("nms_across",),
    ("enclosing",),
    ("margin",),
    ("quality_exponent",),
)
"""Rules that are changed together, in the order in which they are tried."""
ROUNDS = 3
SAMPLES = 200
"""Bootstrap samples by which a change is judged."""
DOUBT = 0.2
"""A change is worth its gain at this quantile of the bootstrap samples: few photographs must not decide by chance."""
LEAST = 1e-4
"""mIoU that a change must gain."""


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
            known[key] = resampled_miou(outcomes.matrices(rules)[photographs], weights)
        return known[key]

    best = outcomes.evidence.rules
    for _ in range(ROUNDS):
        before = best
        for step in steps:
            tried = list(candidates(outcomes, best, step))
            gains = [float(np.nanquantile(scores(each) - scores(best), doubt)) for each in tried]
            if gains and max(gains) > LEAST:
                equal = [each for each, gain in zip(tried, gains, strict=True) if gain > max(gains) - LEAST]
                best = min(equal, key=lambda each: _distance(outcomes, each))
        if best == before:
            break
    return best


def _distance(outcomes: Outcomes, rules: Rules) -> tuple[int, int]:
    """How many values differ from those of the run, and by how many steps of the grid."""
    default, grid = outcomes.evidence.rules, outcomes.evidence.grid
    changed = [name for name in vars(grid) if getattr(rules, name) != getattr(default, name)]
    steps = [
        getattr(grid, name).index(getattr(rules, name)) - getattr(grid, name).index(getattr(default, name)) for name in changed
    ]
    return len(changed), sum(map(abs, steps))


def candidates(outcomes: Outcomes, rules: Rules, names: tuple[str, ...]) -> Iterator[Rules]:
    """The rules with other values of these names, all combinations of the grid."""
    if "tag_threshold" in names and not outcomes.evidence.tags:
        names = tuple(name for name in names if name != "tag_threshold")
    for values in itertools.product(*(getattr(outcomes.evidence.grid, name) for name in names)):
        changed = replace(rules, **dict(zip(names, values, strict=True)))
        if changed != rules:
            yield changed
