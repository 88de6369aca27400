"""Divides a label map into segments that do not overlap, as panoptic files and CVAT's masks need them.

Every pixel of a class belongs to exactly one segment; background and void to none. The pixels of a class are divided among its
boxes by these rules:

- Where the store has masks, a pixel belongs to the smallest mask that covers it, of the boxes that are objects (`instances`).
  This is the rule by which ultralytics lets objects overlap.
- A pixel that no mask covers, and every pixel where the store has none, belongs to the box of its class in which it is most
  central: the one with the smallest max(|x - cx| / (w / 2), |y - cy| / (h / 2)), which is below 1 inside a box and above 1
  outside. Of boxes without masks, those that won no pixel do not count. An object behind a pole stays one segment in two parts.
- A class without such a box (as in labels of a segmenter) is divided into its connected regions, diagonals included. These have
  no score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...rle import runs_of
from .labeled import Box, Labeled

_BAND = 1 << 17
"""Pixels compared with all boxes at a time; limits the memory for a large image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One segment: the pixels where `Segments.map` is ``number``.

    top, left, bottom, right: its bounding box in pixels, the last two exclusive. area_px: at least 1.
    score, quality: of its box (the detector's score, the mask's predicted IoU), or None without a box.
    """

    number: int
    label: int
    score: float | None
    quality: float | None
    top: int
    left: int
    bottom: int
    right: int
    area_px: int


@dataclass(frozen=True, slots=True)
class Segments:
    """The segments of an image.

    map: (H, W) int32, a segment's number, 1..N, or 0 where there is none.
    """

    map: np.ndarray
    segments: tuple[Segment, ...]

    def crop(self, one: Segment) -> np.ndarray:
        """(bottom - top, right - left) bool: the segment's mask in its bounding box."""
        return self.map[one.top : one.bottom, one.left : one.right] == one.number


def segments_of(item: Labeled) -> Segments:
    """The segments of an image, by class, then in the store's order of the boxes or the reading order of the regions.

    Raises:
        StoreError: a mask is damaged.
    """
    numbers = np.zeros(item.shape, np.int32)
    owners: list[tuple[int, Box | None]] = []
    for label in np.flatnonzero(item.count[1:255]) + 1:
        boxes = [box for box in item.boxes if box.label == label and item.is_object(box)]
        if boxes:
            label_map = item.label_map
            if item.masks is not None:
                _assign_to_masks(item, boxes, numbers, len(owners) + 1)
                label_map = np.where(numbers == 0, label_map, 0)
            _assign_to_boxes(label_map, int(label), boxes, numbers, len(owners) + 1)
            owners += [(int(label), box) for box in boxes]
        else:
            mask = item.label_map == label
            regions, count = connected_regions(mask)
            numbers[mask] = regions[mask] + len(owners)
            owners += [(int(label), None)] * count
    return _with_boxes_and_areas(numbers, owners)


def connected_regions(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Connected regions of a mask (H, W) bool, diagonals included: a map (H, W) int32 with 0 outside, and their number.

    Joins touching runs of adjacent rows (Rosenfeld and Pfaltz 1966); a region's number is its place in reading order.
    """
    row, start, stop, value = runs_of(mask)
    row, start, stop = row[value], start[value], stop[value]
    stride = mask.shape[1] + 2  # of a row in the flattened mask, wide enough that ends of rows do not touch
    above = np.searchsorted(row * stride + stop, (row - 1) * stride + start, side="left")
    below = np.searchsorted(row * stride + start, (row - 1) * stride + stop, side="right")
    parent = list(range(len(row)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = run = parent[parent[run]]
        return run

    for run, (first, last) in enumerate(zip(above.tolist(), below.tolist(), strict=True)):
        for other in range(first, last):
            one, two = root(run), root(other)
            parent[max(one, two)] = min(one, two)
    roots = np.array([root(run) for run in range(len(row))], np.int64)
    distinct, number = np.unique(roots, return_inverse=True)
    regions = np.zeros(mask.shape, np.int32)
    regions[mask] = np.repeat(number + 1, stop - start)
    return regions, len(distinct)


def _assign_to_masks(item: Labeled, boxes: Sequence[Box], numbers: np.ndarray, first: int) -> None:
    masks = [item.mask(box) for box in boxes]
    for place in sorted(range(len(boxes)), key=lambda place: (-masks[place].area(), -place)):  # the smallest one is painted last
        top, left, bottom, right = masks[place].bounds()
        window = slice(top, bottom), slice(left, right)
        numbers[window][masks[place].crop() & (item.label_map[window] == boxes[place].label)] = first + place


def _assign_to_boxes(label_map: np.ndarray, label: int, boxes: Sequence[Box], numbers: np.ndarray, first: int) -> None:
    if len(boxes) == 1:
        numbers[label_map == label] = first
        return
    height, width = label_map.shape
    across = np.stack([_from_center(box.xyxy_image[0], box.xyxy_image[2], width) for box in boxes])  # (N, W)
    down = np.stack([_from_center(box.xyxy_image[1], box.xyxy_image[3], height) for box in boxes])  # (N, H)
    for top in range(0, height, band := max(1, _BAND // width)):
        mask = label_map[top : top + band] == label
        nearest = np.full(mask.shape, np.inf, np.float32)
        owner = np.zeros(mask.shape, np.int32)
        # A pixel inside a box is nearer to it than to any box around it: only pixels outside all boxes are compared with all.
        for number, (columns, rows) in enumerate(zip(across, down[:, top : top + band], strict=True), first):
            x, y = np.flatnonzero(columns <= 1), np.flatnonzero(rows <= 1)
            if len(x) and len(y):
                window = slice(y[0], y[-1] + 1), slice(x[0], x[-1] + 1)
                distance = np.maximum(rows[window[0], None], columns[window[1]])
                closer = distance < nearest[window]
                nearest[window][closer] = distance[closer]
                owner[window][closer] = number
        y, x = np.nonzero(mask & (owner == 0))
        owner[y, x] = np.maximum(down[:, top + y], across[:, x]).argmin(axis=0) + first
        numbers[top : top + band][mask] = owner[mask]


def _from_center(low: float, high: float, size: int) -> np.ndarray:
    """The distance of each pixel center of an axis from a box's center, in half sides of the box: (size,) float32."""
    return (np.abs(np.arange(size) + 0.5 - (low + high) / 2) / max((high - low) / 2, 0.5)).astype(np.float32)


def _with_boxes_and_areas(numbers: np.ndarray, owners: list[tuple[int, Box | None]]) -> Segments:
    """Compute bounding boxes and areas from the runs; owners without pixels are dropped and the others renumbered."""
    row, start, stop, value = runs_of(numbers)
    size = len(owners) + 1
    area = np.bincount(value, weights=stop - start, minlength=size).astype(np.int64)
    top, left = np.full(size, numbers.shape[0]), np.full(size, numbers.shape[1])
    bottom, right = np.zeros(size, np.int64), np.zeros(size, np.int64)
    np.minimum.at(top, value, row)
    np.minimum.at(left, value, start)
    np.maximum.at(bottom, value, row + 1)
    np.maximum.at(right, value, stop)
    kept = [number for number in range(1, size) if area[number]]
    if len(kept) < len(owners):
        moved = np.zeros(size, np.int32)
        moved[kept] = np.arange(1, len(kept) + 1)
        numbers = moved[numbers]
    return Segments(
        numbers,
        tuple(
            Segment(
                number=place,
                label=owners[number - 1][0],
                score=box.score if (box := owners[number - 1][1]) else None,
                quality=box.quality if box else None,
                top=int(top[number]),
                left=int(left[number]),
                bottom=int(bottom[number]),
                right=int(right[number]),
                area_px=int(area[number]),
            )
            for place, number in enumerate(kept, 1)
        ),
    )
