"""Scores of an evaluation, as numbers for JSON and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np

from .boundary import boundary_iou
from .metrics import (
    average_precision,
    class_iou,
    class_precision,
    class_recall,
    label_scores,
    mean_iou,
    mean_of_seen,
    pixel_accuracy,
)
from .run import Counts


class ClassScores(TypedDict):
    """Scores of a class in 0..1; None if it is in neither truth nor prediction."""

    name: str
    iou: float | None
    precision: float | None
    recall: float | None
    boundary_iou: float | None
    truth_px: int
    predicted_px: int


class LabelScores(TypedDict):
    """Scores of image labels in 0..1."""

    map: float | None
    precision: float
    recall: float
    f1: float
    macro_f1: float


class Scores(TypedDict):
    """Scores in 0..1; means are over the classes that occur in truth or prediction, None if none does."""

    miou: float | None
    miou_without_background: float | None
    precision: float | None
    recall: float | None
    pixel_accuracy: float | None
    boundary_miou: float | None
    classes_seen: int
    void_share: float | None
    """Share of the counted pixels that are predicted void or not predicted; they are wrong."""
    truth_void_share: float | None
    """Share of all pixels that are void in the truth; they are not counted."""
    classes: list[ClassScores]
    labels: LabelScores | None
    confusion: list[list[int]]
    """Pixel counts: rows are the truth, columns the prediction, the last one void."""


def scores_from_counts(
    counts: Counts,
    classes: Sequence[str],
    predicted: Sequence[Mapping[str, float]] | None = None,
    truth: np.ndarray | None = None,
) -> Scores:
    """All scores of the counted images.

    Args:
        classes: the C names without background.
        predicted: for each image the scores of the classes found; other classes have the score 0.
        truth: (B, C) bool, the true classes of each image; default: those of its true label map.
    """
    matrix = counts.matrix
    iou, bands = class_iou(matrix), boundary_iou(counts.boundary)
    precision, recall = class_precision(matrix), class_recall(matrix)
    columns = (iou, precision, recall, bands, matrix.sum(axis=1), matrix[:, :-1].sum(axis=0))
    return {
        "miou": _number(mean_iou(matrix)),
        "miou_without_background": _number(mean_of_seen(iou[1:])),
        "precision": _number(mean_of_seen(precision)),
        "recall": _number(mean_of_seen(recall)),
        "pixel_accuracy": _number(pixel_accuracy(matrix)),
        "boundary_miou": _number(mean_of_seen(bands)),
        "classes_seen": int((~np.isnan(iou)).sum()),
        "void_share": float(matrix[:, -1].sum() / matrix.sum()) if matrix.any() else None,
        "truth_void_share": float(counts.pixels[1] / counts.pixels[0]) if counts.pixels[0] else None,
        "classes": [
            {
                "name": name,
                "iou": _number(row[0]),
                "precision": _number(row[1]),
                "recall": _number(row[2]),
                "boundary_iou": _number(row[3]),
                "truth_px": int(row[4]),
                "predicted_px": int(row[5]),
            }
            for name, *row in zip(("background", *classes), *columns, strict=True)
        ],
        "labels": None if predicted is None else _label_scores(predicted, classes, counts.present if truth is None else truth),
        "confusion": matrix.tolist(),
    }


def table(scores: Scores) -> str:
    """Format the scores as percentages, one class per line in the order of the list."""
    rows: list[tuple[str, ...]] = [("", "IoU %", "precision %", "recall %", "boundary IoU %", "share of truth %")]
    pixels = max(sum(row["truth_px"] for row in scores["classes"]), 1)
    for row in scores["classes"]:
        values = (row["iou"], row["precision"], row["recall"], row["boundary_iou"], row["truth_px"] / pixels)
        rows.append((row["name"], *map(_percent, values)))
    means = (scores["miou"], scores["precision"], scores["recall"], scores["boundary_miou"])
    seen, listed = scores["classes_seen"], len(scores["classes"])
    mean = f"mean of {listed}" if seen == listed else f"mean of {seen} that occur"
    rows.append((mean, *map(_percent, means), ""))
    rows.append(("without background", _percent(scores["miou_without_background"]), "", "", "", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))]).rstrip()
        for name, *cells in rows
    ]
    rule = "-" * max(map(len, lines))
    lines[1:1], lines[-2:-2] = [rule], [rule]
    lines += ["", f"pixel accuracy {_percent(scores['pixel_accuracy'])} %, void {_percent(scores['void_share'])} % of the pixels"]
    if scores["truth_void_share"]:
        lines[-1] += f"; {_percent(scores['truth_void_share'])} % of the truth is void and not scored"
    if labels := scores["labels"]:
        lines.append(
            f"image labels: mAP {_percent(labels['map'])} %, F1 {_percent(labels['f1'])} % "
            f"(mean of classes {_percent(labels['macro_f1'])} %), "
            f"precision {_percent(labels['precision'])} %, recall {_percent(labels['recall'])} %"
        )
    return "\n".join(lines)


def _label_scores(predicted: Sequence[Mapping[str, float]], classes: Sequence[str], truth: np.ndarray) -> LabelScores:
    present, score = np.zeros(truth.shape, bool), np.zeros(truth.shape)
    column = {name: number for number, name in enumerate(classes)}
    for row, found in enumerate(predicted):
        for name, value in found.items():
            present[row, column[name]], score[row, column[name]] = True, value
    scores = label_scores(truth, present)
    return {
        "map": _number(mean_of_seen(average_precision(truth, score))),
        "precision": scores["precision"],
        "recall": scores["recall"],
        "f1": scores["f1"],
        "macro_f1": scores["macro_f1"],
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
