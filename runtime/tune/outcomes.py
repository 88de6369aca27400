"""Confusion matrices of settings, from evidence; and their mIoU with intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...train.evaluate.metrics import pixel_counts
from ..chain import Rules
from .evidence import Choice, Evidence

RESAMPLES = 1000
"""Bootstrap samples of the photographs."""


class Outcomes:
    """Confusion matrices of the label maps of all photographs, for any rules within the evidence's grid.

    Most settings change few photographs: what is decided for a photograph is kept by all that it depends on.
    """

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self._choices: dict[tuple[object, ...], Choice] = {}
        self._matrices: dict[tuple[object, ...], np.ndarray] = {}
        self._settings: dict[str, np.ndarray] = {}

    def matrices(self, rules: Rules) -> np.ndarray:
        """(N, C + 1, C + 2) int64, see `wsss.train.evaluate.metrics.confusion_matrix`; the caller does not change it."""
        key = repr(rules)
        if key not in self._settings:
            self._settings[key] = self.some(rules, np.arange(len(self.evidence)))
        return self._settings[key]

    def some(self, rules: Rules, photographs: np.ndarray) -> np.ndarray:
        """The same of some photographs: (K, C + 1, C + 2) int64 for K numbers."""
        self.evidence.require(rules, photographs)
        present = np.packbits(self.evidence.present(rules), axis=1)
        return np.stack([self._matrix(number, present[number].tobytes(), rules) for number in photographs.tolist()])

    @property
    def settings(self) -> int:
        """Number of settings that were scored."""
        return len(self._settings)

    def miou(self, rules: Rules) -> float:
        """mIoU over all photographs."""
        return float(miou(self.matrices(rules).sum(axis=0)))

    def _matrix(self, number: int, present: bytes, rules: Rules) -> np.ndarray:
        place = number, present, rules.score_rule, rules.box_threshold, rules.nms, rules.nms_across, rules.enclosing
        if place not in self._choices:
            self._choices[place] = self.evidence.kept(number, present, rules)
        choice = self._choices[place]
        alone = len(set(choice.label.tolist())) < 2  # no pixel is contested: scores, margin and exponent do not count
        decided: tuple[object, ...] = number, present, choice.mask.tobytes(), choice.label.tobytes()
        if not alone:
            decided += choice.score.tobytes(), rules.margin, rules.quality_exponent, rules.stability_exponent
        if decided not in self._matrices:
            truth = self.evidence.samples[number].truth
            label_map = self.evidence.fuse(number, choice, rules)
            self._matrices[decided] = pixel_counts(truth, label_map, len(self.evidence.classes) + 1)
        return self._matrices[decided]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """By how much one setting is better than another, in mIoU, with the interval of a paired bootstrap over photographs."""

    value: float
    low: float
    """The 2.5th percentile."""
    high: float
    """The 97.5th percentile."""

    def __str__(self) -> str:
        return f"{self.value:+.4f} ({self.low:+.4f} to {self.high:+.4f})"


def difference(matrices: np.ndarray, others: np.ndarray, *, seed: int = 0) -> Difference:
    """mIoU of matrices (N, C + 1, C + 2) less that of others of the same photographs."""
    weights = resamples(len(matrices), RESAMPLES, seed)
    low, high = np.nanpercentile(resampled_miou(matrices, weights) - resampled_miou(others, weights), [2.5, 97.5])
    value = float(miou(matrices.sum(axis=0)) - miou(others.sum(axis=0)))
    return Difference(value=value, low=float(low), high=float(high))


def resamples(photographs: int, count: int, seed: int) -> np.ndarray:
    """(count, photographs) float64, how often each bootstrap sample has each photograph."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(photographs, np.full(photographs, 1 / photographs), count).astype(np.float64)


def resampled_miou(matrices: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(B,) mIoU of each sample (B, N) of matrices (N, C + 1, C + 2)."""
    sums = weights @ matrices.reshape(len(matrices), -1).astype(np.float64)
    return miou(sums.reshape(len(weights), *matrices.shape[1:]))


def miou(matrices: np.ndarray) -> np.ndarray:
    """mIoU (...) of confusion matrices (..., C + 1, C + 2): `mean_iou` of each, NaN where no class occurs."""
    hit = np.diagonal(matrices, axis1=-2, axis2=-1).astype(np.float64)
    union = matrices.sum(axis=-1) + matrices[..., :-1].sum(axis=-2) - hit
    seen = union > 0
    iou = np.where(seen, hit / np.where(seen, union, 1), 0)
    return np.asarray(iou.sum(axis=-1) / np.where(seen.any(axis=-1), seen.sum(axis=-1), np.nan))
