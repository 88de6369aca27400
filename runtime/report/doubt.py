"""Ranks images for review: one number from the models' scores for an image, and the reason in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...store.local import Record

WEIGHTS = {"score": 0.3, "mask": 0.8, "disagreement": 0.8, "void": 0.6}
"""The weight of each part; see `doubt`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Floors:
    """The lowest scores that counted in a run, and whether its tags and boxes are meaningful."""

    tag: float
    box: float
    tagged: bool
    """False where tags do not depend on the image: all classes (``--no-gate``) or none (``--boxes``) everywhere."""
    boxed: bool = True
    """False for a segmenter, which has no boxes; its tags are the classes of its labels, with their mean confidence."""
    tags: Mapping[str, float] = field(default_factory=dict)
    """Of classes with a threshold of their own, in place of ``tag``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubt:
    """The total and its parts, each in [0, 1]."""

    total: float
    score: float
    mask: float
    disagreement: float
    void: float
    cause: str
    """The part with the largest weighted value, a key of ``WEIGHTS``; empty when nothing is doubtful."""
    reason: str
    """The cause in words, with classes and numbers; empty when nothing is doubtful."""


def floors_of(run: dict[str, Any], records: Iterable[Record]) -> Floors:
    """The run's thresholds; where it does not record one, the lowest score of any record.

    Args:
        run: the store's ``run.json``. records: the lines of its labeled images; streamed.
    """
    tag = box = 1.0
    rules, models = _object(run.get("rules")), _object(run.get("models"))
    tagged = "clip" in models or "segmenter" in models
    for record in records:
        tag = min([tag, *record["classes"].values()])
        box = min([box, *(detection["score"] for detection in record["boxes"])])
        tagged = tagged or 0 < len(record["classes"]) < len(run["classes"])
    tag_threshold, box_threshold = rules.get("tag_threshold"), rules.get("box_threshold")
    return Floors(
        tag=tag if tag_threshold is None else tag_threshold,
        box=box if box_threshold is None else box_threshold,
        tagged=tagged,
        boxed="segmenter" not in models,
        tags=_object(rules.get("tag_thresholds")),
    )


def doubt(record: Record, floors: Floors) -> Doubt:
    """Compute the doubt about one labeled image: ``1 - (1 - w1 p1)(1 - w2 p2)(1 - w3 p3)(1 - w4 p4)``, weights in ``WEIGHTS``.

    One bad part is enough for a high doubt, several increase it, and unlike in a mean no good part hides a bad one. On 120 drawn
    scenes the order has a rank correlation of 0.78 with the labels' true error, more than any part alone
    (``benchmarks/studies/quality/doubt_ranking.py``).

    - score: 1 - the smallest margin of a tag or box, (score - floor) / (1 - floor).
    - mask: 1 - the lowest predicted IoU of a mask (SAM, arXiv:2304.02643, appendix A).
    - disagreement: of the classes with a tag or a box, the share without the other; 0 if the run has only one of the two.
    - void: share of void in the pixels that are not background; for a segmenter, which does not record those, in all pixels.

    An image in which no class was found has a doubt of 0, because nothing was recorded that could be doubted.

    Args:
        record: the manifest line of a labeled image. floors: see `floors_of`.
    """
    tags, boxes = record["classes"] if floors.tagged else {}, record["boxes"]
    boxed = {box["label"] for box in boxes}
    margins = [
        (_margin(score, floors.tags.get(name, floors.tag)), f"tag “{name}” scores {score:.2f}") for name, score in tags.items()
    ]
    margins += [(_margin(box["score"], floors.box), f"box “{box['label']}” scores {box['score']:.2f}") for box in boxes]
    masks = [(box["quality"], f"mask of “{box['label']}” {box['quality']:.2f}") for box in boxes]
    margin, weakest = min(margins, default=(1.0, ""))
    quality, worst = min(masks, default=(1.0, ""))
    lost, extra = [name for name in tags if name not in boxed], [name for name in boxed if name not in tags]
    pixels = record["height"] * record["width"]
    labeled = sum(box["won_px"] for box in boxes) if floors.boxed else pixels - record["void_px"]
    parts = {
        "score": 1 - margin,
        "mask": 1 - min(max(quality, 0.0), 1.0),
        "disagreement": (len(lost) + len(extra)) / max(len(tags.keys() | boxed), 1) if floors.tagged and floors.boxed else 0.0,
        "void": record["void_px"] / max(record["void_px"] + labeled, 1),
    }
    total = 1 - math.prod(1 - WEIGHTS[name] * part for name, part in parts.items())
    if total <= 0:
        return Doubt(total=0.0, **parts, cause="", reason="")
    cause = max(parts, key=lambda name: WEIGHTS[name] * parts[name])
    reasons = {
        "score": weakest,
        "mask": worst,
        "disagreement": f"tagged, no box: {_few(lost)}" if lost else f"box, no tag: {_few(sorted(extra))}",
        "void": f"void {100 * parts['void']:.0f} % of the label",
    }
    return Doubt(total=total, **parts, cause=cause, reason=reasons[cause])


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _margin(score: float, floor: float) -> float:
    return 1.0 if score >= 1 else min(max((score - floor) / (1 - floor), 0.0), 1.0) if floor < 1 else 0.0


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
