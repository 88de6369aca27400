"""Masks at the photograph's size, kept so that fusing any choice of them takes a millisecond: bits, and values where it matters.

Outside of the pixels that masks of two classes claim, the label does not depend on the values. There it is decided as the fusing
graph does (`wsss.export.sam.fuse.vote`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...batch import VOID
from ...frame import Frame


@dataclass(frozen=True, slots=True)
class MaskPixels:
    """A mask of a photograph of P pixels, numbered row by row.

    bits: (ceil(P / 8),) uint8, the pixels inside of the outline, as ``np.packbits``.
    place: (K,) int32, ascending: those that a candidate of another class claims too. value: (K,) float32, their probability.
    """

    bits: np.ndarray
    place: np.ndarray
    value: np.ndarray


def mask_pixels(logits: np.ndarray, labels: Sequence[np.ndarray], frame: Frame) -> list[MaskPixels]:
    """The masks of one photograph's candidates.

    Args:
        logits: (N, L, L) float32, the decoder's. labels: the candidates' classes, (N,) int64, one array for each rule of scores;
            0 for a candidate that a rule does not have.
    """
    side = logits.shape[-1]
    rows, columns = frame.mask_rows(side), frame.mask_columns(side).T
    z = [(rows @ each @ columns).ravel() for each in logits.astype(np.float32, copy=False)]  # (P,) each
    by_label = [
        {name: np.logical_or.reduce([z[row] > 0 for row in np.flatnonzero(label == name)]) for name in set(label.tolist()) - {0}}
        for label in labels
    ]
    result = []
    for number, each in enumerate(z):
        inside = each > 0
        rivals = np.zeros(inside.shape, bool)
        for label, claimed in zip(labels, by_label, strict=True):
            for name, there in claimed.items():
                if label[number] not in (0, name):
                    rivals |= there
        place = np.flatnonzero(inside & rivals)
        value = 1 / (1 + np.exp(-each[place]))
        result.append(MaskPixels(np.packbits(inside), place.astype(np.int32), value.astype(np.float32)))
    return result


def fused(masks: Sequence[MaskPixels], label: np.ndarray, score: np.ndarray, margin: float, size: tuple[int, int]) -> np.ndarray:
    """The label map (H, W) uint8 of some of a photograph's masks, as `wsss.runtime.fuse` makes it.

    Args:
        label: (N,) int64, each mask's class. score: (N,) float32, from `wsss.runtime.fuse.mask_scores`.
    """
    pixels = size[0] * size[1]
    label_map = np.zeros(pixels, np.uint8)
    count = np.zeros(pixels, np.uint8)
    for name in np.unique(label):
        bits = np.bitwise_or.reduce([mask.bits for mask, own in zip(masks, label, strict=True) if own == name])
        claimed = np.unpackbits(bits, count=pixels).view(bool)
        label_map[claimed] = name
        count += claimed
    shared = np.flatnonzero(count > 1)
    if len(shared):
        label_map[shared] = _decided(masks, label, score, np.float32(margin), shared)
    return label_map.reshape(size)


def _decided(
    masks: Sequence[MaskPixels], label: np.ndarray, score: np.ndarray, margin: np.float32, pixels: np.ndarray
) -> np.ndarray:
    """The labels of pixels that several classes claim."""
    value = np.zeros((len(masks), len(pixels)), np.float32)
    for row, mask, factor in zip(value, masks, score, strict=True):
        if len(mask.place):
            at = np.minimum(np.searchsorted(mask.place, pixels), len(mask.place) - 1)
            row[:] = np.where(mask.place[at] == pixels, factor * mask.value[at], 0)
    winner = value.argmax(axis=0)
    best = value[winner, np.arange(len(pixels))]
    runner_up = np.where(label[:, None] != label[winner], value, 0).max(axis=0)
    contested = best - runner_up < margin * best
    return np.where(contested, VOID, label[winner]).astype(np.uint8)
