"""Boundary IoU: the agreement of outlines, to which the IoU of large areas is insensitive (Cheng et al., arXiv:2103.16562)."""

from __future__ import annotations

import math

import numpy as np

RATIO = 0.02
"""Width of the band along an outline relative to the image diagonal (arXiv:2103.16562, section 5; 12 px on 500 x 375)."""


def boundary(label_map: np.ndarray, distance_px: int) -> np.ndarray:
    """Mask of the pixels within ``distance_px`` of the outline of their label's area; the image border counts as outline.

    Equals, for all labels at once, the erosion of each mask by 3 x 3 ones ``distance_px`` times in the authors' code
    (boundary_iou/utils/boundary_utils.py, ``mask_to_boundary``): the square around an inner pixel has a single label.

    Args:
        label_map: (H, W) of any integer type. distance_px: at least 1.

    Returns:
        (H, W) bool.
    """
    height, width = label_map.shape
    side = 2 * distance_px + 1
    found = np.ones((height, width), bool)  # true where the square exceeds the image
    beside = label_map[:, 1:] != label_map[:, :-1]  # (H, W - 1)
    below = label_map[1:] != label_map[:-1]  # (H - 1, W)
    # A square has two labels if two neighbors in it differ.
    found[distance_px : height - distance_px, distance_px : width - distance_px] = _any_in_window(
        beside, side, side - 1
    ) | _any_in_window(below, side - 1, side)
    return found


def boundary_counts(truth: np.ndarray, predicted: np.ndarray, classes: int, *, ratio: float = RATIO) -> np.ndarray:
    """Pixels in the intersection and union of each class's true and predicted bands, to be summed over the images.

    Pixels that are 255 in the truth are ignored in the prediction too: VOC draws void along the outlines, and the true label
    map compared with itself must score 1.

    Args:
        truth, predicted: (H, W) uint8 of one shape; labels below ``classes``, or 255.
        classes: number of labels with background. ratio: see ``RATIO``; the band is at least one pixel wide.

    Returns:
        (2, classes) int64: intersections, unions.
    """
    distance_px = max(round(ratio * math.hypot(*truth.shape)), 1)
    predicted = np.where(truth == 255, np.uint8(255), predicted)
    true_band = np.where(boundary(truth, distance_px), truth, np.uint8(255))
    band = np.where(boundary(predicted, distance_px), predicted, np.uint8(255))
    both = np.where(true_band == band, band, np.uint8(255))
    true_px, px, both_px = (np.bincount(labels.ravel(), minlength=256)[:classes] for labels in (true_band, band, both))
    return np.stack([both_px, true_px + px - both_px])


def boundary_iou(counts: np.ndarray) -> np.ndarray:
    """IoU of each class, (classes,) float64, from summed `boundary_counts`; NaN for a class that does not occur."""
    return np.asarray(counts[0] / np.where(counts[1] == 0, np.nan, counts[1]))


def _any_in_window(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W) bool to (H - height + 1, W - width + 1): whether the window that starts here has a true value."""
    return _any_ahead(_any_ahead(mask, height).T, width).T


def _any_ahead(mask: np.ndarray, length: int) -> np.ndarray:
    """The same along the first axis, in log2(length) steps: a window is the union of two windows of half its length."""
    covered = 1
    while covered < length:
        step = min(covered, length - covered)
        mask = mask[:-step] | mask[step:]
        covered += step
    return mask
