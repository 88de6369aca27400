"""Compare many pairs of label maps or masks. numpy only."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..mini.scenes import CLASSES
from ..train.evaluate.metrics import confusion_matrix

Pairs = Iterable[tuple[np.ndarray, np.ndarray]]


def total_confusion(pairs: Pairs, classes: int = len(CLASSES)) -> np.ndarray:
    """(classes + 1, classes + 2) int64: the confusion matrix of all pairs of a true and a predicted label map."""
    matrix = np.zeros((classes + 1, classes + 2), np.int64)
    for truth, predicted in pairs:
        matrix += confusion_matrix(truth, predicted, classes + 1)
    return matrix


def mask_iou(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two bool masks of one shape; 1 when both are empty."""
    union = int((one | other).sum())
    return float((one & other).sum() / union) if union else 1.0
