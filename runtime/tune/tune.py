"""Tunes the chain's rules on labeled photographs, and says what each choice is worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from ..chain import Rules
from .calibrate import folds_of
from .evidence import Evidence, Grid
from .outcomes import Difference, Outcomes, difference
from .search import candidates, search

FOLDS = 5
TOGETHER = {"box_threshold": ("score_rule", "box_threshold")}
"""A box threshold means nothing without its rule of scores."""


@dataclass(frozen=True, kw_only=True)
class Worth:
    """What a choice is worth on all photographs: the chosen value against the default, or the default against the best other."""

    names: tuple[str, ...]
    chosen: tuple[object, ...]
    other: tuple[object, ...]
    difference: Difference
    changed: bool
    """Whether ``other`` is the default; otherwise the default was chosen."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The result of `tune`."""

    default: Rules
    rules: Rules
    """The best rules, or the defaults where those are better on photographs that were not searched on."""
    photographs: int
    settings: int
    """Number of settings whose label maps were made and scored."""
    default_miou: float
    miou: float
    """On the photographs that were searched on, and therefore too high."""
    held_out: Difference
    """Of rules that were searched on the other folds, to the defaults: an honest estimate of the gain."""
    held_out_miou: float
    worth: tuple[Worth, ...]

    @property
    def kept_default(self) -> bool:
        """Whether no other rules were found to be better."""
        return self.rules == self.default


def tune(
    evidence: Evidence, *, folds: int = FOLDS, seed: int = 0, progress: Callable[[int, int], None] = lambda done, total: None
) -> Tuned:
    """Search rules by the chain's mIoU, and estimate their gain by cross-validation over photographs.

    Args:
        folds: parts of the photographs; rules are searched on all but one and scored on that one, for each of them.
        progress: called with the number of searches done, and of all.

    Raises:
        UsageError: fewer photographs than folds.
    """
    count = len(evidence)
    outcomes = Outcomes(evidence)
    default = evidence.rules
    fold = folds_of(count, folds, seed)
    held_out = np.zeros_like(outcomes.matrices(default))
    for number in range(folds):
        rules = search(outcomes, np.flatnonzero(fold != number))
        held_out[fold == number] = outcomes.matrices(rules)[fold == number]
        progress(number + 1, folds + 1)
    best = search(outcomes, np.arange(count))
    progress(folds + 1, folds + 1)
    gain = difference(held_out, outcomes.matrices(default))
    if gain.value <= 0:
        best = default
    return Tuned(
        default=default,
        rules=best,
        photographs=count,
        settings=outcomes.settings,
        default_miou=outcomes.miou(default),
        miou=outcomes.miou(best),
        held_out=gain,
        held_out_miou=outcomes.miou(default) + gain.value,
        worth=tuple(worth(outcomes, best)),
    )


def worth(outcomes: Outcomes, best: Rules) -> list[Worth]:
    """What each choice of the best rules is worth, the other choices unchanged."""
    default, found = outcomes.evidence.rules, []
    for field in fields(Grid):
        names = TOGETHER.get(field.name, (field.name,))
        if field.name == "score_rule" or (field.name == "tag_threshold" and not outcomes.evidence.tags):
            continue
        changed = any(getattr(best, name) != getattr(default, name) for name in names)
        if changed:
            other = replace(best, **{name: getattr(default, name) for name in names})
        else:
            others = [each for each in candidates(outcomes, best, names) if each != best]
            other = max(others, key=outcomes.miou)
        found.append(
            Worth(
                names=names,
                chosen=_values(best, names),
                other=_values(other, names),
                difference=difference(outcomes.matrices(best), outcomes.matrices(other)),
                changed=changed,
            )
        )
    return found


def _values(rules: Rules, names: Sequence[str]) -> tuple[object, ...]:
    return tuple(getattr(rules, name) for name in names)
