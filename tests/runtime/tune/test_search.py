"""Scores of settings, their intervals, and the search."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from wsss.batch import Photograph
from wsss.errors import UsageError
from wsss.runtime.chain import Chain, Rules
from wsss.runtime.tune.evidence import Evidence
from wsss.runtime.tune.outcomes import Outcomes, difference, miou, resampled_miou, resamples
from wsss.runtime.tune.search import search
from wsss.runtime.tune.tune import tune
from wsss.train.evaluate.metrics import confusion_matrix, mean_iou

if TYPE_CHECKING:
    from ...conftest import World

COUNT = 10


def photograph(world: World, number: int) -> Photograph:
    """Red and green side by side; the detector's scripted boxes are right."""
    edge = 10 + number
    return world.photo(32, 48, f"{number}.png", red=(2, 2, edge, 28), green=(edge + 4, 4, 44, 30))


@pytest.fixture
def evidence(world: World) -> Evidence:
    """Photographs whose truth has red only: a setting that finds no green is right."""
    photos = {f"{number}.png": photograph(world, number) for number in range(COUNT)}

    def truth(name: str) -> np.ndarray:
        return (photos[name].pixels[..., 0] > 0).astype(np.uint8)

    chain = Chain.open(world.bundle, classes=world.classes)
    return Evidence(chain, list(photos), photos.__getitem__, truth)


def test_matrices_are_those_of_the_label_maps(evidence: Evidence) -> None:
    outcomes = Outcomes(evidence)
    for rules in (evidence.rules, replace(evidence.rules, margin=0.3, quality_exponent=0.0), evidence.rules):
        want = [confusion_matrix(s.truth, evidence.label_map(n, rules), 4) for n, s in enumerate(evidence.samples)]
        assert np.array_equal(outcomes.matrices(rules), want)
        assert outcomes.miou(rules) == pytest.approx(mean_iou(np.sum(want, axis=0)))
    assert outcomes.settings == 2


def test_miou_of_many_matrices_is_the_mean_iou_of_each() -> None:
    rng = np.random.default_rng(0)
    matrices = rng.integers(0, 50, (6, 4, 5))
    matrices[0, 2], matrices[0, :, 2] = 0, 0  # a class that does not occur
    matrices[1] = 0
    assert miou(matrices)[[0, *range(2, 6)]] == pytest.approx([mean_iou(matrices[n]) for n in (0, *range(2, 6))])
    assert np.isnan(miou(matrices)[1])


def test_resamples_weigh_photographs() -> None:
    weights = resamples(5, 100, 1)
    assert weights.shape == (100, 5) and (weights.sum(axis=1) == 5).all() and len(np.unique(weights, axis=0)) > 50
    matrices = np.random.default_rng(0).integers(0, 50, (5, 3, 4))
    expected = mean_iou(np.sum(np.repeat(matrices, weights[7].astype(int), axis=0), axis=0))
    assert resampled_miou(matrices, weights)[7] == pytest.approx(expected)


def test_a_difference_has_an_interval_that_holds_it() -> None:
    rng = np.random.default_rng(0)
    others = rng.integers(1, 50, (40, 3, 4))
    better = others.copy()
    better[:, [0, 1, 2], [0, 1, 2]] += 20
    found = difference(better, others)
    assert 0 < found.low < found.value < found.high
    same = difference(others, others)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_search_finds_the_threshold_that_leaves_out_what_is_not_there(evidence: Evidence) -> None:
    """Red tags score higher than green ones: a tag threshold between the two is right."""
    for sample in evidence.samples:
        sample.score[:] = 0.85, 0.55, 0.0
    outcomes = Outcomes(evidence)
    default = replace(evidence.rules, tag_threshold=0.5)
    best = search(outcomes, np.arange(COUNT))
    assert best.tag_threshold in (0.6, 0.7, 0.8)
    assert outcomes.miou(best) > outcomes.miou(default) + 0.2
    assert {name for name, value in vars(best).items() if value != getattr(default, name)} == {"tag_threshold"}


def test_search_keeps_the_defaults_where_nothing_is_better(world: World) -> None:
    photos = {f"{number}.png": photograph(world, number) for number in range(4)}

    def truth(name: str) -> np.ndarray:
        pixels = photos[name].pixels
        return (pixels[..., 0] > 0) + 2 * (pixels[..., 1] > 0).astype(np.uint8)

    evidence = Evidence(Chain.open(world.bundle, classes=world.classes), list(photos), photos.__getitem__, truth)
    assert search(Outcomes(evidence), np.arange(4)) == evidence.rules
    result = tune(evidence, folds=2)
    assert result.kept_default and result.rules == evidence.rules and result.held_out.value == 0


def test_tune_reports_what_each_choice_is_worth(evidence: Evidence) -> None:
    for sample in evidence.samples:
        sample.score[:] = 0.85, 0.55, 0.0
    result = tune(evidence, folds=5)
    assert result.photographs == COUNT and result.settings > 50
    assert result.miou > result.default_miou + 0.2 and result.held_out.low > 0.1
    assert result.held_out_miou == pytest.approx(result.default_miou + result.held_out.value)
    of = {worth.names: worth for worth in result.worth}
    tag = of["tag_threshold",]
    assert tag.changed and tag.other == (0.5,) and tag.chosen == (result.rules.tag_threshold,) and tag.difference.value > 0.2
    assert not of["margin",].changed and of["margin",].difference.value >= 0
    assert ("score_rule", "box_threshold") in of
    with pytest.raises(UsageError, match="--folds: expected 2 to 10"):
        tune(evidence, folds=11)


def test_rules_that_the_evidence_was_opened_with_are_in_its_grid(world: World) -> None:
    photo = photograph(world, 0)
    rules = Rules(nms=0.33, box_threshold=0.05, margin=0.77, tag_threshold=0.123)
    chain = Chain.open(world.bundle, classes=world.classes, rules=rules)
    evidence = Evidence(chain, ["0.png"], lambda name: photo, lambda name: np.zeros(photo.shape, np.uint8))
    assert 0.33 in evidence.grid.nms and min(evidence.grid.box_threshold) == 0.05
    assert evidence.label_map(0, evidence.rules).any()


@pytest.mark.parametrize("changed", [{"margin": 0.3}, {"quality_exponent": 0.0}])
def test_what_is_kept_of_a_photograph_depends_on_all_that_decides_its_contested_pixels(
    evidence: Evidence, monkeypatch: pytest.MonkeyPatch, changed: dict[str, float]
) -> None:
    default, other = evidence.rules, replace(evidence.rules, **changed)
    size = evidence.samples[0].size
    monkeypatch.setattr(evidence, "fuse", lambda number, choice, rules: np.full(size, 1 if rules == default else 2, np.uint8))
    outcomes = Outcomes(evidence)
    assert not outcomes.matrices(default)[:, :, 2].any()
    assert outcomes.matrices(other)[:, :, 2].any()
