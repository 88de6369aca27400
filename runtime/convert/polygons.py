"""Converts masks to polygons that, when filled, give exactly the same masks.

The corners are the centers of the mask's border pixels, as from OpenCV's findContours. Fillers with this convention
(`cv2.fillPoly`, with which ultralytics and supervision read YOLO-seg) paint the border as well as the inside. A region is one
polygon: a path over the region's own pixels, there and back, connects each hole to the outline, so that nothing outside of the
mask is painted.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

_EAST, _NORTH = 0, 3
"""Two of the four headings; turning right is the next one."""


def polygons_of(mask: np.ndarray) -> list[np.ndarray]:
    """The polygons of a mask, one for each region whose pixels touch (diagonals included), in reading order.

    Args:
        mask: (H, W) bool; may be empty.

    Returns:
        Each (P, 2) int64, P >= 1: x and y of pixels of the mask. Filled by the even-odd rule, with painted edges, it gives
        the region. The last corner is connected to the first; a region of one pixel has one corner.
    """
    stride = mask.shape[1] + 2
    loops, left_edges = _trace(mask)
    for number, loop in enumerate(loops):
        if not loop.outline:
            _attach_hole(number, loops, left_edges, stride)
    return [_corners(_walk(loops, number), stride) for number, loop in enumerate(loops) if loop.outline]


@dataclass(slots=True)
class _Loop:
    """A closed border with the mask on its right-hand side; pixels are indices into the flattened mask, padded by one."""

    outline: bool
    pixels: list[int]
    holes: defaultdict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    """The holes attached at a step, each with its own step where it is attached."""


def _trace(mask: np.ndarray) -> tuple[list[_Loop], dict[int, tuple[int, int]]]:
    """Trace every border: outlines clockwise, holes counterclockwise; also map pixels to the loop and step at their left edge.

    A step follows the edge between a pixel of the mask and one outside. Where two pixels of the mask touch only diagonally, the
    path crosses over, so that they are one region.
    """
    padded = np.pad(mask, 1)
    stride = padded.shape[1]
    inside = padded.tobytes()
    steps = (1, stride, -1, -stride)
    starts = np.flatnonzero(padded[1:] & ~padded[:-1]) + stride  # every loop follows the upper edge of some pixel
    seen = bytearray(len(inside))
    loops: list[_Loop] = []
    left_edges: dict[int, tuple[int, int]] = {}
    for start in starts.tolist():
        if seen[start]:
            continue
        pixel, heading, right_turns = start, _EAST, 0
        pixels: list[int] = []
        while True:
            if heading == _EAST:
                if seen[pixel]:  # each step is on one loop only, so this is the start
                    break
                seen[pixel] = 1
            elif heading == _NORTH:
                left_edges[pixel] = len(loops), len(pixels)
            pixels.append(pixel)
            ahead = pixel + steps[heading]
            ahead_left = ahead + steps[heading - 1]
            if inside[ahead_left]:
                pixel, heading, right_turns = ahead_left, (heading - 1) % 4, right_turns - 1
            elif inside[ahead]:
                pixel = ahead
            else:
                heading, right_turns = (heading + 1) % 4, right_turns + 1
        loops.append(_Loop(right_turns > 0, pixels))
    return loops, left_edges


def _attach_hole(hole: int, loops: list[_Loop], left_edges: dict[int, tuple[int, int]], stride: int) -> None:
    """Attach a hole to the loop directly to the left of its leftmost pixel.

    That loop reaches further left than the hole, so that following the attachments always ends at an outline.
    """
    pixels = loops[hole].pixels
    step = min(range(len(pixels)), key=lambda number: pixels[number] % stride)
    pixel = pixels[step]
    while pixel not in left_edges:
        pixel -= 1
    loop, place = left_edges[pixel]
    loops[loop].holes[place].append((hole, step))


def _walk(loops: list[_Loop], outline: int) -> list[int]:
    """The pixels of an outline, with a detour around each hole where it is attached."""
    walked: list[int] = []
    # Holes are attached to holes, to any depth. The stack has loop, first step, and steps done.
    stack = [(outline, 0, 0)]
    while stack:
        number, first, done = stack.pop()
        loop = loops[number]
        size = len(loop.pixels)
        # A hole ends with its first pixel again, where the path back starts. An outline is closed implicitly.
        for count in range(done, size + (number != outline)):
            step = (first + count) % size
            walked.append(loop.pixels[step])
            if count < size and (attached := loop.holes.pop(step, None)):
                stack.append((number, first, count))  # this pixel again, then the rest
                stack += [(hole, begin, 0) for hole, begin in attached]
                break
    return walked


def _corners(pixels: list[int], stride: int) -> np.ndarray:
    """Drop pixels on a straight line between their neighbors: (P, 2) int64, x and y in the mask."""
    y, x = np.divmod(np.array(pixels, np.int64), stride)
    points = np.stack([x - 1, y - 1], axis=1)
    moved = np.any(points != np.roll(points, -1, axis=0), axis=1)
    if not moved.any():
        return points[:1]
    points = points[moved]
    # Steps go to one of the eight neighbors, or along a row or column: their signs are their directions.
    arriving = np.sign(points - np.roll(points, 1, axis=0))
    leaving = np.sign(np.roll(points, -1, axis=0) - points)
    return points[np.any(arriving != leaving, axis=1)]
