"""The text of a run's result: scores of pseudo-labels and segmenter, published scores beside them, and the run's settings."""

from __future__ import annotations

from dataclasses import dataclass

from ...train.evaluate.report import Scores
from .published_baselines import PAPER, PublishedBaseline, aligned, percent, rows_beside

TITLES = {"voc": "PASCAL VOC 2012", "coco": "MS COCO 2014"}
PROTOCOL = "mIoU in % from one confusion matrix of all images, background included; void (255) and missing predictions are wrong."


@dataclass(frozen=True, kw_only=True)
class Row:
    """One scoring."""

    what: str
    split: str
    images: int
    missing: int
    """Images that could not be labeled; they count as wrong."""
    crf: bool
    """Labels from averaged probabilities that a CRF refined."""
    scores: Scores


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a run; ``result.json`` has the same fields."""

    dataset: str
    rows: tuple[Row, ...]
    deviation: str
    """Differences of the lists from the usual ones; empty where there are none."""
    told: str
    """Supervision of the chain: ``nothing``, ``image labels``, label maps."""
    network: str
    facts: tuple[tuple[str, str], ...]
    """Facts that papers disclose, as names and values."""
    crf: str | None
    """Settings of the CRF, None where none was used."""


def as_text(result: Result) -> str:
    """The tables, for a terminal."""
    heading = ("", "on", "images", "mIoU", "precision", "recall", "boundary IoU", "void %", "missing")
    facts = (*result.facts, ("DenseCRF", result.crf or "not measured (--crf)"))
    width = max(len(name) for name, _ in facts)
    title = TITLES.get(result.dataset, result.dataset) + (f" (not the protocol: {result.deviation})" if result.deviation else "")
    parts = [
        f"{title}\n{PROTOCOL}",
        aligned([heading, *map(_cells, result.rows)]),
        _labels(result),
        _beside(result),
        "\n".join(f"{name.ljust(width)}  {value}" for name, value in facts),
    ]
    return "\n\n".join(part for part in parts if part)


def _beside(result: Result) -> str:
    """The published scores and our own; empty for a data set without published scores."""
    if result.dataset not in TITLES:
        return ""
    plain, best = _single_scale(result), _best(result)
    notes = [plain.what]
    if best is not plain:
        notes.append(f"{percent(best.scores['miou'])} by {best.what}")
    if result.deviation:
        notes.append("other lists, not comparable")
    ours = PublishedBaseline(
        method="this run",
        supervision=result.told,
        network=result.network,
        voc_val=_points(plain) if result.dataset == "voc" else None,
        voc_test=None,
        coco_val=_points(plain) if result.dataset == "coco" else None,
        source="; ".join(notes),
    )
    note = "Published numbers are those of the papers; test settings and initial weights differ."
    return f"{aligned(rows_beside(result.dataset, ours))}\n{note}\n{PAPER}"


def _cells(row: Row) -> tuple[str, ...]:
    scores = row.scores
    values = (scores["miou"], scores["precision"], scores["recall"], scores["boundary_miou"], scores["void_share"])
    return (row.what, row.split, str(row.images), *map(percent, values), str(row.missing))


def _labels(result: Result) -> str:
    """Scores of the chain's image labels against those of the true label maps."""
    rows: list[tuple[str, ...]] = [("image labels", "on", "mAP", "F1", "mean F1 of classes", "precision", "recall")]
    for row in result.rows:
        if (labels := row.scores["labels"]) is not None and row.what == "pseudo-labels":
            keys = (labels["map"], labels["f1"], labels["macro_f1"], labels["precision"], labels["recall"])
            rows.append(("of the chain", row.split, *map(percent, keys)))
    return aligned(rows) if len(rows) > 1 else ""


def _single_scale(result: Result) -> Row:
    return next(row for row in result.rows if row.split == "val" and not row.crf)


def _best(result: Result) -> Row:
    return max((row for row in result.rows if row.split == "val"), key=lambda row: row.scores["miou"] or 0.0)


def _points(row: Row) -> float | None:
    miou = row.scores["miou"]
    return None if miou is None else 100 * miou
