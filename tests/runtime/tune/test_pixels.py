"""Fusing from kept pixels against the rule of the fusing graph."""

from __future__ import annotations

import numpy as np
import pytest

from wsss.frame import Frame
from wsss.runtime.tune.pixels import fused, mask_pixels

FRAME = Frame(image=(33, 47), valid=(23, 32), canvas=(32, 32))
SIDE = 8


def blobs(count: int, seed: int) -> np.ndarray:
    """(count, 8, 8) float32 logits, each a blob that overlaps others."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    center, radius = rng.uniform(1, 6, (count, 2)), rng.uniform(2, 4, count)
    far = np.hypot(y - center[:, 0, None, None], x - center[:, 1, None, None])
    return (3 * (radius[:, None, None] - far) + rng.normal(0, 0.3, (count, SIDE, SIDE))).astype(np.float32)


def by_sorting(logits: np.ndarray, label: np.ndarray, score: np.ndarray, margin: float) -> np.ndarray:
    """The rule, pixel by pixel: the largest value wins; a rival of another class within the margin makes it void."""
    z = np.stack([FRAME.mask_rows(SIDE) @ each @ FRAME.mask_columns(SIDE).T for each in logits])
    value = np.where(z > 0, score[:, None, None] / (1 + np.exp(-z)), 0).astype(np.float32)
    label_map = np.zeros(FRAME.image, np.uint8)
    for y, x in np.ndindex(*FRAME.image):
        best = int(value[:, y, x].argmax())
        if value[best, y, x] == 0:
            continue
        rival = max((v for v, other in zip(value[:, y, x], label, strict=True) if other != label[best]), default=np.float32(0))
        is_void = rival > 0 and value[best, y, x] - rival < np.float32(margin) * value[best, y, x]
        label_map[y, x] = 255 if is_void else label[best]
    return label_map


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("labels", [[1], [2, 2, 2], [1, 2, 3], [1, 2, 1, 3, 2]])
def test_any_choice_of_masks_is_fused_as_the_graph_does(labels: list[int], margin: float) -> None:
    label = np.array(labels)
    logits, score = blobs(len(label), 7), np.linspace(0.4, 0.9, len(label)).astype(np.float32)
    kept = mask_pixels(logits, [label], FRAME)
    for rows in ([0], list(range(len(label))), list(range(len(label)))[::-2]):
        found = fused([kept[row] for row in rows], label[rows], score[rows], margin, FRAME.image)
        want = by_sorting(logits[rows], label[rows], score[rows], margin)
        assert np.array_equal(found, want)
    assert not len(set(labels)) > 1 or (found != 0).any()


def test_values_are_kept_where_another_class_may_compete_under_either_rule() -> None:
    """Two masks of one class under the first rule, of two under the second."""
    logits, score = blobs(2, 3), np.float32([0.5, 0.9])
    one, two = np.array([1, 1]), np.array([1, 2])
    kept = mask_pixels(logits, [one, two], FRAME)
    assert np.array_equal(fused(kept, two, score, 0.1, FRAME.image), by_sorting(logits, two, score, 0.1))
    assert not any(len(mask.place) for mask in mask_pixels(logits, [one, one], FRAME))
    absent = mask_pixels(logits, [one, np.array([1, 0])], FRAME)
    assert not any(len(mask.place) for mask in absent), "a candidate that a rule does not have has no class there"
    apart = np.full((2, SIDE, SIDE), -9, np.float32)
    apart[0, :2], apart[1, -2:] = 9, 9
    assert not any(len(mask.place) for mask in mask_pixels(apart, [two], FRAME)), "nobody competes"


def test_no_mask_is_background() -> None:
    nothing = fused([], np.zeros(0, np.int64), np.zeros(0, np.float32), 0.1, (3, 5))
    assert nothing.shape == (3, 5) and not nothing.any()
