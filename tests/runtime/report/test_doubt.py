"""How much an image deserves a look: each part by itself, together, and where the tags mean nothing."""

from __future__ import annotations

from typing import Any

import pytest

from wsss.runtime.report.doubt import WEIGHTS, Floors, doubt, floors_of

FLOORS = Floors(tag=0.5, box=0.4, tagged=True)
UNTAGGED = Floors(tag=0.5, box=0.4, tagged=False)


def record(
    *boxes: tuple[str, float, float], void: int = 0, tags: dict[str, float] | None = None, won: int = 30
) -> dict[str, Any]:
    """An image of 10 x 10; boxes are class, score, quality. It is tagged with what is boxed unless told otherwise."""
    found = [{"label": label, "score": score, "quality": quality, "won_px": won} for label, score, quality in boxes]
    tags = {label: 1.0 for label, _, _ in boxes} if tags is None else tags
    return {"height": 10, "width": 10, "void_px": void, "boxes": found, "classes": tags}


@pytest.mark.parametrize(
    ("of", "part", "value", "reason"),
    [
        (record(), "", 0, ""),
        (record(("dog", 1, 1)), "", 0, ""),
        (record(("dog", 0.4, 1)), "score", 1, "box “dog” scores 0.40"),
        (record(("dog", 0.7, 1), ("cat", 0.4, 1)), "score", 1, "box “cat” scores 0.40"),
        (record(("dog", 0.7, 1)), "score", 0.5, "box “dog” scores 0.70"),
        (record(("dog", 1, 1), tags={"dog": 0.75}), "score", 0.5, "tag “dog” scores 0.75"),
        (record(("dog", 0.3, 1)), "score", 1, "box “dog” scores 0.30"),  # below the floor: a run with another threshold
        (record(("dog", 1, 0.7), ("cat", 1, 0.9)), "mask", 0.3, "mask of “dog” 0.70"),
        (record(("dog", 1, 1.04)), "", 0, ""),  # a predicted IoU may pass 1
        (record(tags={"dog": 1}), "disagreement", 1, "tagged, no box: dog"),
        (record(("dog", 1, 1), tags={"dog": 1, "cat": 1}), "disagreement", 0.5, "tagged, no box: cat"),
        (record(tags=dict.fromkeys("abcde", 1)), "disagreement", 1, "tagged, no box: a, b, c and 2 more"),
        (record(("dog", 1, 1), tags={}), "disagreement", 1, "box, no tag: dog"),
        (record(("dog", 1, 1), void=10), "void", 0.25, "void 25 % of the label"),  # of 40 pixels that are not background
    ],
)
def test_one_part_alone(of: dict[str, Any], part: str, value: float, reason: str) -> None:
    result = doubt(of, FLOORS)
    assert (result.cause, result.reason) == (part, reason)
    for name in WEIGHTS:
        assert getattr(result, name) == pytest.approx(value if name == part else 0), name
    assert result.total == pytest.approx(WEIGHTS[part] * value if part else 0)


def test_parts_add_up_and_none_hides_another() -> None:
    both = doubt(record(("dog", 0.4, 0.5)), FLOORS)
    assert both.total == pytest.approx(1 - (1 - WEIGHTS["score"]) * (1 - WEIGHTS["mask"] * 0.5))
    assert both.cause == "mask"
    worst = doubt(record(("dog", 0.4, 0), void=10_000, tags={"cat": 0.5}), FLOORS)
    assert both.total < worst.total <= 1


@pytest.mark.parametrize("tags", [{}, {"dog": 1.0, "cat": 1.0}, {"dog": 0.5}])
def test_tags_that_nothing_decided_are_left_out(tags: dict[str, float]) -> None:
    assert doubt(record(("dog", 1, 1), tags=tags), UNTAGGED).total == 0


def test_a_segmenter_has_no_boxes_to_disagree_with() -> None:
    floors = floors_of({"classes": ["dog"], "models": {"segmenter": ""}}, [record(tags={"dog": 0.8}), record(tags={"dog": 0.5})])
    assert floors == Floors(tag=0.5, box=1, tagged=True, boxed=False)
    result = doubt(record(tags={"dog": 0.75}), floors)
    assert (result.cause, result.score, result.disagreement, result.void) == ("score", 0.5, 0, 0)
    assert doubt(record(tags={"dog": 1}, void=25), floors).void == 0.25


RUN: dict[str, Any] = {"classes": ["dog", "cat"], "rules": {"tag_threshold": None, "box_threshold": None}, "models": {"sam": ""}}
RECORDS = [record(("dog", 0.6, 1), tags={"dog": 0.9}), record(), record(("cat", 0.45, 1), tags={"cat": 0.7})]


def test_floors_are_the_runs_thresholds_or_else_its_lowest_scores() -> None:
    assert floors_of(RUN, RECORDS) == Floors(tag=0.7, box=0.45, tagged=True)
    run = {**RUN, "rules": {"tag_threshold": 0.5, "box_threshold": 0.0}}
    assert floors_of(run, RECORDS) == Floors(tag=0.5, box=0.0, tagged=True)
    assert floors_of({"classes": ["dog"]}, []) == Floors(tag=1, box=1, tagged=False)


def test_all_classes_or_none_in_every_image_is_not_tagging() -> None:
    everything = [record(("dog", 1, 1), tags={"dog": 1, "cat": 1}), record(tags={"dog": 1, "cat": 1})]
    assert not floors_of(RUN, everything).tagged
    assert not floors_of(RUN, [record(("dog", 1, 1), tags={})]).tagged
    assert floors_of({**RUN, "models": {"clip": ""}}, everything).tagged


def test_a_class_is_measured_by_its_own_threshold() -> None:
    """0.6 is far above a threshold of 0.1, and just above one of 0.55."""
    run = {**RUN, "rules": {"tag_threshold": 0.55, "box_threshold": 0.0, "tag_thresholds": {"dog": 0.1}}, "models": {"clip": ""}}
    floors = floors_of(run, [])
    assert floors.tags == {"dog": 0.1}
    own, common = (doubt({**RECORDS[0], "classes": {name: 0.6}, "boxes": []}, floors) for name in ("dog", "cat"))
    assert own.score == pytest.approx(1 - 0.5 / 0.9) and common.score == pytest.approx(1 - 0.05 / 0.45)
