"""Scores of label maps and image labels by the usual protocol. Needs only numpy.

All pixel scores come from ONE confusion matrix over all images, never from a mean over images (VOC 2012 devkit, VOCevalseg.m).
`run` scores folders of files.
"""

from __future__ import annotations

import numpy as np


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Count pixels by true and predicted label.

    Args:
        truth: label map, uint8 of any shape; 255 is not counted.
        predicted: label map of the same shape; 255 (void) counts as a miss, in the last column.
        classes: number of labels with background, at most 255; other labels raise ValueError.

    Returns:
        (classes, classes + 1) int64; rows are the truth.
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"truth is {truth.shape}, predicted {predicted.shape}")
    for label_map in (truth, predicted):
        label = highest_label(label_map)
        if label >= classes:
            raise ValueError(f"label {label}, there are {classes} classes")
    return pixel_counts(truth, predicted, classes)


def pixel_counts(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """As `confusion_matrix`, for label maps of one shape that are known to have no other labels."""
    # 256 x 256 cells, so that no pixel has to be selected or relabeled; unused cells are cut off.
    cells = (truth.astype(np.uint16) << 8) | predicted
    counts = np.bincount(cells.ravel(), minlength=1 << 16).reshape(256, 256)
    return np.concatenate([counts[:classes, :classes], counts[:classes, 255:]], axis=1)


def highest_label(label_map: np.ndarray) -> int:
    """The highest label of a uint8 map except 255 (void); 0 for a map with only void or without pixels."""
    labels = np.bincount(label_map.ravel(), minlength=256)[:255].nonzero()[0]
    return int(labels[-1]) if len(labels) else 0


def class_iou(matrix: np.ndarray) -> np.ndarray:
    """IoU of each class, (classes,) float64, from ONE confusion matrix over all images; NaN for a class that does not occur."""
    hit = np.diag(matrix).astype(np.float64)
    return _share(hit, matrix.sum(axis=1) + matrix[:, : len(matrix)].sum(axis=0) - hit)


def mean_iou(matrix: np.ndarray) -> float:
    """Mean of ``class_iou`` over the classes that occur, with background (PASCAL VOC); NaN if none does."""
    return mean_of_seen(class_iou(matrix))


def class_precision(matrix: np.ndarray) -> np.ndarray:
    """Share of the pixels predicted as a class that are right: (classes,) float64.

    0 for a class that is only in the truth, NaN for one in neither, so that the mean is over the same classes as mIoU.
    """
    return _of_seen(np.diag(matrix), matrix[:, : len(matrix)].sum(axis=0), matrix)


def class_recall(matrix: np.ndarray) -> np.ndarray:
    """Share of the true pixels of a class that are predicted as it: (classes,) float64; 0 and NaN as in `class_precision`."""
    return _of_seen(np.diag(matrix), matrix.sum(axis=1), matrix)


def pixel_accuracy(matrix: np.ndarray) -> float:
    """Share of the counted pixels with the right label; predicted void is wrong. NaN if no pixel is counted."""
    return float(_share(np.trace(matrix), matrix.sum()))


def mean_of_seen(values: np.ndarray) -> float:
    """Mean of the values that are not NaN; NaN if all are."""
    seen = ~np.isnan(values)
    return float(values[seen].mean()) if seen.any() else float("nan")


def label_scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Precision, recall and F1 of image labels.

    Args:
        truth, predicted: (B, C) bool.

    Returns:
        ``precision``, ``recall`` and ``f1`` over all decisions, and ``macro_f1``, the mean over classes that occur.
    """
    hit = (truth & predicted).sum(axis=0).astype(np.float64)
    predicted_count, true_count = predicted.sum(axis=0), truth.sum(axis=0)
    both = predicted_count + true_count
    seen = both > 0
    return {
        "precision": float(hit.sum() / max(predicted_count.sum(), 1)),
        "recall": float(hit.sum() / max(true_count.sum(), 1)),
        "f1": float(2 * hit.sum() / max(both.sum(), 1)),
        "macro_f1": float(np.mean(2 * hit[seen] / both[seen])) if seen.any() else 1.0,
    }


def average_precision(truth: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Average precision of image labels, the sum over thresholds of precision times the step in recall.

    Not interpolated (as scikit-learn's ``average_precision_score``; VOC's 2007 devkit interpolates at 11 points). Images with
    equal scores are counted together, so that their order has no effect.

    Args:
        truth: (B, C) bool. score: (B, C) float.

    Returns:
        (C,) float64; NaN for a class that is in no image.
    """
    result = np.full(truth.shape[1], np.nan)
    for column in np.flatnonzero(truth.any(axis=0)):
        order = np.argsort(-score[:, column], kind="stable")
        ranked = score[order, column]
        last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # last image of each group of equal scores
        hit = np.cumsum(truth[order, column])[last]
        result[column] = np.sum(np.diff(hit, prepend=0) / hit[-1] * (hit / (last + 1)))
    return result


def _of_seen(hit: np.ndarray, whole: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    share = np.nan_to_num(_share(hit, whole))
    share[np.isnan(class_iou(matrix))] = np.nan
    return share


def _share(part: np.ndarray | np.int64, whole: np.ndarray | np.int64) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(part / np.where(whole == 0, np.nan, whole))
