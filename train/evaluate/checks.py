"""Label maps that are not what they seem: masks of 0 and 255, colors that were made indices again, truth without a class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...classes import palette, parse_classes
from ...errors import StoreError
from .files import IndexedMap

FACTS = ("maps", "binary", "one_bit", "other_colors")
"""What is counted of each side: maps, those of 0 and 255 alone, of one bit a pixel, and with VOC's colors at other labels."""
_WEB = np.array([(51 * r, 51 * g, 51 * b) for b in range(6) for g in range(6) for r in range(6)], np.uint8)
"""The web's 216 colors, which Pillow's ``convert("P")`` puts at indices 10 to 225."""
_HINT = "the colors were made indices by a program that numbers them as it likes: map the RGB colors back to labels instead"


def facts_of(path: Path, indexed: IndexedMap, classes: Sequence[str]) -> np.ndarray:
    """(4,) int64, `FACTS` of one label map.

    Args:
        classes: names without background.

    Raises:
        StoreError: the palette proves that the indices are no labels.
    """
    used = np.flatnonzero(np.bincount(indexed.labels.ravel(), minlength=256))
    is_binary = used.size > 0 and used[-1] == 255 and not used[:-1].any()
    has_other_colors = indexed.colors is not None and _has_other_colors(path, indexed.colors, used, classes)
    return np.array([1, is_binary, indexed.bits == 1, has_other_colors], np.int64)


def _has_other_colors(path: Path, colors: np.ndarray, used: np.ndarray, classes: Sequence[str]) -> bool:
    """Whether all labels of a map have VOC's colors, but some of them those of other labels."""
    if np.array_equal(colors[10:226], _WEB):
        raise StoreError(f"{path}: expected labels as indices, got the web's palette that RGB is converted to", hint=_HINT)
    voc = palette()
    shown = {label: int(same[0]) for label in used[used < len(colors)] if len(same := _labels_of(colors[label], voc))}
    moved = {  # a palette that has the color at its own label too is VOC's, filled up
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
    """Raises StoreError where the truth cannot tell right from wrong.

    Args:
        matrix: (C + 1, C + 2), see `evaluate.confusion_matrix`.
        facts: (2, 4) `FACTS`, summed, of truth and prediction.
    """
    maps, binary = facts[0, :2]
    if not matrix.any():
        raise StoreError(
            f"{where}: no pixel of its {maps} label maps can be scored: all are void (255)", hint="is this the truth?"
        )
    if binary == maps:
        raise StoreError(
            f"{where}: its {maps} label maps hold 0 and 255 alone: 255 is void, so that no class would be scored",
            hint="in a mask of one class write the class's number in place of 255",
        )


def warnings_of(matrix: np.ndarray, facts: np.ndarray, pixels: np.ndarray, classes: Sequence[str]) -> list[str]:
    """What a user should know before a score is believed.

    Args:
        matrix, facts: as for `check_truth`. pixels: (2,) int64, of all truth, and those that are void in it.
        classes: the C names without background.
    """
    found = []
    several = len(classes) > 1
    for side, (maps, binary, one_bit, other_colors) in zip(("true", "predicted"), facts.tolist(), strict=True):
        if not maps:
            continue
        if binary:
            found.append(f"{binary} of {maps} {side} label maps hold 0 and 255 alone: 255 is void, not a class")
        if several and one_bit == maps:
            found.append(
                f"all {maps} {side} label maps have one bit a pixel, which tells only background and {classes[0]} apart, "
                f"of {len(classes)} classes"
            )
        if other_colors:
            found.append(
                f"{other_colors} of {maps} {side} label maps have VOC's colors at other labels: were they made from RGB?"
            )
    if not matrix[1:].any():
        found.append(f"the truth holds background alone, none of the {len(classes)} classes")
    if not matrix[:, 1:-1].any():
        found.append(f"no prediction holds any of the {len(classes)} classes")
    if 2 * pixels[1] > pixels[0]:
        found.append(f"{pixels[1] / pixels[0]:.1%} of the truth's pixels are void (255) and not scored")
    return found
