"""Detect invalid label maps: binary masks of 0 and 255, colors converted to arbitrary indices, truth without a class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...classes import palette, parse_classes
from ...errors import StoreError
from .files import IndexedMap

FACTS = ("maps", "binary", "one_bit", "other_colors")
"""Counts of label maps: all, with only 0 and 255, with one bit per pixel, and with VOC's colors at other labels."""
_WEB = np.array([(51 * r, 51 * g, 51 * b) for b in range(6) for g in range(6) for r in range(6)], np.uint8)
"""The 216 web colors, which Pillow's ``convert("P")`` puts at indices 10 to 225."""
_HINT = "a program converted the colors to arbitrary indices: map the RGB colors to labels instead"


def facts_of(path: Path, indexed: IndexedMap, classes: Sequence[str]) -> np.ndarray:
    """(4,) int64, the `FACTS` of one label map.

    Args:
        classes: names without background.

    Raises:
        StoreError: the palette shows that the indices are not labels.
    """
    used = np.flatnonzero(np.bincount(indexed.labels.ravel(), minlength=256))
    is_binary = used.size > 0 and used[-1] == 255 and not used[:-1].any()
    has_other_colors = indexed.colors is not None and _has_other_colors(path, indexed.colors, used, classes)
    return np.array([1, is_binary, indexed.bits == 1, has_other_colors], np.int64)


def _has_other_colors(path: Path, colors: np.ndarray, used: np.ndarray, classes: Sequence[str]) -> bool:
    """Whether all labels of a map have colors of VOC, but some of them the colors of other labels."""
    if np.array_equal(colors[10:226], _WEB):
        raise StoreError(f"{path}: expected labels as indices, got the web palette of converted RGB", hint=_HINT)
    voc = palette()
    shown = {label: int(same[0]) for label in used[used < len(colors)] if len(same := _labels_of(colors[label], voc))}
    moved = {  # not if the color is at its own label too: VOC's palette, padded
        label: meant
        for label, meant in shown.items()
        if meant != label and not (meant < len(colors) and np.array_equal(colors[meant], voc[meant]))
    }
    if not moved or len(shown) < len(used):
        return False
    label, meant = next(iter(moved.items()))
    if moved.keys() & {0, 255} or {0, 255} & set(moved.values()) or tuple(classes) == parse_classes("voc").names:
        raise StoreError(
            f"{path}: the palette contradicts the labels: label {label} has the color of VOC's label {meant} "
            f"({', '.join(map(str, voc[meant]))})",
            hint=_HINT,
        )
    return True


def _labels_of(color: np.ndarray, voc: np.ndarray) -> np.ndarray:
    return np.flatnonzero((voc == color).all(axis=1))


def check_truth(matrix: np.ndarray, facts: np.ndarray, where: Path) -> None:
    """Raises StoreError if nothing can be scored against the truth.

    Args:
        matrix: (C + 1, C + 2), see `metrics.confusion_matrix`.
        facts: (2, 4) summed `FACTS` of truth and prediction.
    """
    maps, binary = facts[0, :2]
    if not matrix.any():
        raise StoreError(f"{where}: its {maps} label maps have only void (255): nothing can be scored", hint="is this the truth?")
    if binary == maps:
        raise StoreError(
            f"{where}: its {maps} label maps have only 0 and 255: 255 is void, so no class would be scored",
            hint="in a mask of one class, write the number of the class instead of 255",
        )


def warnings_of(matrix: np.ndarray, facts: np.ndarray, pixels: np.ndarray, classes: Sequence[str]) -> list[str]:
    """Possible problems of label maps, for the user.

    Args:
        matrix, facts: as for `check_truth`. pixels: (2,) int64, all pixels of the truth, and its void pixels.
        classes: the C names without background.
    """
    found = []
    several = len(classes) > 1
    for side, (maps, binary, one_bit, other_colors) in zip(("true", "predicted"), facts.tolist(), strict=True):
        if not maps:
            continue
        if binary:
            found.append(f"{binary} of {maps} {side} label maps have only 0 and 255: 255 is void, not a class")
        if several and one_bit == maps:
            found.append(
                f"all {maps} {side} label maps have one bit per pixel, which allows only background and {classes[0]}, "
                f"of {len(classes)} classes"
            )
        if other_colors:
            found.append(
                f"{other_colors} of {maps} {side} label maps have VOC's colors at other labels: were they made from RGB?"
            )
    if not matrix[1:].any():
        found.append(f"the truth has only background, none of the {len(classes)} classes")
    if not matrix[:, 1:-1].any():
        found.append(f"no prediction has any of the {len(classes)} classes")
    if 2 * pixels[1] > pixels[0]:
        found.append(f"{pixels[1] / pixels[0]:.1%} of the truth's pixels are void (255) and not scored")
    return found
