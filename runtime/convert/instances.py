"""Divides a label map into objects, for the formats that need them.

A label store keeps one label map for each image and the boxes that it was made from, but not the mask of each box. An object is
therefore a part of the label map, by these rules:

- A pixel of a class belongs to the box of its class in which it is most central: the one with the smallest
  max(|x - cx| / (w / 2), |y - cy| / (h / 2)), which is below 1 inside a box and above 1 outside. Boxes whose mask won no pixel
  do not count. An object behind a pole stays one object in two parts.
- A class without such a box (as in labels of a segmenter) is divided into its connected regions, diagonals included. These have
  no score.

Every pixel of a class belongs to exactly one object; background and void to none. Where boxes of one class overlap, the border
between their objects is a guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .labeled import Box, Labeled

_BAND = 1 << 17
"""Pixels compared with all boxes at a time; limits the memory for a large image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One object: the pixels where `Instances.map` is ``number``.

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
class Instances:
    """The objects of an image.

    map: (H, W) int32, an object's number, 1..N, or 0 where there is no object.
    """

    map: np.ndarray
    objects: tuple[Instance, ...]

    def crop(self, one: Instance) -> np.ndarray:
        """(bottom - top, right - left) bool: the object's mask in its bounding box."""
        return self.map[one.top : one.bottom, one.left : one.right] == one.number


def instances_of(item: Labeled) -> Instances:
    """The objects of an image, by class, then in the store's order of the boxes or the reading order of the regions."""
    numbers = np.zeros(item.shape, np.int32)
    owners: list[tuple[int, Box | None]] = []
    for label in np.flatnonzero(item.count[1:255]) + 1:
        boxes = [box for box in item.boxes if box.label == label and box.won_px > 0]
        if boxes:
            _assign_to_boxes(item.label_map, int(label), boxes, numbers, len(owners) + 1)
            owners += [(int(label), box) for box in boxes]
        else:
            mask = item.label_map == label
            regions, count = connected_regions(mask)
            numbers[mask] = regions[mask] + len(owners)
            owners += [(int(label), None)] * count
    return _with_boxes_and_areas(numbers, owners)


def runs_of(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Divide an image into runs of equal pixels; no run crosses the end of a row.

    Args:
        values: (H, W), H and W at least 1.

    Returns:
        row, start, stop (exclusive), each (R,) int64, and value (R,), in reading order.
    """
    width = values.shape[1]
    flat = values.reshape(-1)
    breaks = np.empty(flat.size, bool)
    breaks[0] = True
    np.not_equal(flat[1:], flat[:-1], out=breaks[1:])
    breaks[::width] = True
    first = np.flatnonzero(breaks)
    length = np.diff(first, append=flat.size)
    row, start = np.divmod(first, width)
    return row, start, start + length, flat[first]


def spans_of(mask: np.ndarray, *, top: int = 0, left: int = 0, stride: int | None = None) -> np.ndarray:
    """Where a mask is set in the flattened image, for run-length encodings.

    Args:
        mask: (H, W) bool. top, left: its corner in the image. stride: the image's width; None: the mask's.

    Returns:
        (S, 2) int64: starts and stops (exclusive), ascending, with gaps between.
    """
    row, start, stop, value = runs_of(mask)
    offset = (top + row[value]) * (stride or mask.shape[1]) + left
    start, stop = offset + start[value], offset + stop[value]
    apart = start[1:] != stop[:-1]
    return np.stack([start[np.append(True, apart)[: len(start)]], stop[np.append(apart, True)[: len(stop)]]], axis=1)


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


def _with_boxes_and_areas(numbers: np.ndarray, owners: list[tuple[int, Box | None]]) -> Instances:
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
    return Instances(
        numbers,
        tuple(
            Instance(
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
