"""Scores of label maps and labels by the field's protocol. numpy only: the base install runs it."""

from __future__ import annotations

import numpy as np


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Pixels by true and predicted label.

    Args:
        truth: label map, uint8 of any shape; 255 is left out.
        predicted: label map of the same shape; 255 (void) counts as a miss, in the last column.
        classes: number of labels with background; another label is a ValueError.

    Returns:
        (classes, classes + 1) int64; rows are the truth.
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"truth is {truth.shape}, predicted {predicted.shape}")
    for label_map in (truth, predicted):
        if ((label_map >= classes) & (label_map != 255)).any():
            raise ValueError(f"label {label_map[label_map != 255].max()}, there are {classes} classes")
    counted = truth != 255
    column = np.where(predicted[counted] == 255, classes, predicted[counted]).astype(np.int64)
    cells = truth[counted].astype(np.int64) * (classes + 1) + column
    return np.bincount(cells, minlength=classes * (classes + 1)).reshape(classes, classes + 1)


def class_iou(matrix: np.ndarray) -> np.ndarray:
    """IoU of each class, (classes,) float64, from ONE confusion matrix of all images; NaN for a class never seen."""
    hit = np.diag(matrix).astype(np.float64)
    union = matrix.sum(axis=1) + matrix[:, : len(matrix)].sum(axis=0) - hit
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(hit / np.where(union == 0, np.nan, union))


def mean_iou(matrix: np.ndarray) -> float:
    """Mean of ``class_iou`` over the classes that occur, background included (PASCAL VOC); NaN when none does."""
    iou = class_iou(matrix)
    seen = ~np.isnan(iou)
    return float(iou[seen].mean()) if seen.any() else float("nan")


def label_scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Precision, recall and F1 of image labels.

    Args:
        truth, predicted: (B, C) bool.

    Returns:
        ``precision``, ``recall``, ``f1`` over all decisions together, and ``macro_f1``, the mean over classes that occur.
    """
    hit = (truth & predicted).sum(axis=0).astype(np.float64)
    said, there = predicted.sum(axis=0), truth.sum(axis=0)
    seen = (said + there) > 0
    macro = float(np.mean(2 * hit[seen] / (said + there)[seen])) if seen.any() else 1.0
    total_said, total_there = max(said.sum(), 1), max(there.sum(), 1)
    return {
        "precision": float(hit.sum() / total_said),
        "recall": float(hit.sum() / total_there),
        "f1": float(2 * hit.sum() / max(said.sum() + there.sum(), 1)),
        "macro_f1": macro,
    }
