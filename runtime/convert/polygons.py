"""Masks as polygons that a filler turns back into the same masks.

The corners are centers of the mask's border pixels, as OpenCV's findContours gives them, and fillers of this convention
(`cv2.fillPoly`, with which ultralytics and supervision read YOLO-seg) paint the border as well as the inside. A region is
one polygon: each of its holes hangs on a path that goes there and back over the region's own pixels, so that nothing is
painted that was not in the mask.
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
        Each (P, 2) int64, P >= 1: x and y of pixels of the mask. Filled by the even-odd rule, its edges painted too, it
        is the region. The last corner is joined to the first; a region of one pixel is one corner.
    """
    stride = mask.shape[1] + 2
    loops, left_edges = _trace(mask)
    for number, loop in enumerate(loops):
        if not loop.outline:
            _hang(number, loops, left_edges, stride)
    return [_corners(_walk(loops, number), stride) for number, loop in enumerate(loops) if loop.outline]


@dataclass(slots=True)
class _Loop:
    """A border followed once round, the mask on the right hand; pixels are places in the mask padded by one."""

    outline: bool
    pixels: list[int]
    holes: defaultdict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    """At a step: the holes that hang there, and at which of their own steps."""


def _trace(mask: np.ndarray) -> tuple[list[_Loop], dict[int, tuple[int, int]]]:
    """Every border once, outlines clockwise, holes against the clock; and which loop and step pass a pixel's left edge.

    A step goes along the edge between a pixel of the mask and one outside it. At a corner where two pixels of the mask
    touch only diagonally the path crosses over, which makes them one region.
    """
    padded = np.pad(mask, 1)
    stride = padded.shape[1]
    inside = padded.tobytes()
    steps = (1, stride, -1, -stride)
    starts = np.flatnonzero(padded[1:] & ~padded[:-1]) + stride  # every loop has a pixel whose upper edge it passes
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
                if seen[pixel]:  # a step is on one loop only: this is the start
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


def _hang(hole: int, loops: list[_Loop], left_edges: dict[int, tuple[int, int]], stride: int) -> None:
    """Hangs a hole on the loop that lies straight to the left of its leftmost pixel.

    That loop reaches further left than the hole does, so that following them always ends at an outline.
    """
    pixels = loops[hole].pixels
    step = min(range(len(pixels)), key=lambda number: pixels[number] % stride)
    pixel = pixels[step]
    while pixel not in left_edges:
        pixel -= 1
    loop, place = left_edges[pixel]
    loops[loop].holes[place].append((hole, step))


def _walk(loops: list[_Loop], outline: int) -> list[int]:
    """The pixels of an outline, with a detour round each hole where it hangs."""
    walked: list[int] = []
    # Holes hang on holes to any depth: a stack of loop, first step, steps done.
    stack = [(outline, 0, 0)]
    while stack:
        number, first, done = stack.pop()
        loop = loops[number]
        size = len(loop.pixels)
        # A hole's first pixel comes again at its end: there the path back begins. An outline closes by itself.
        for count in range(done, size + (number != outline)):
            step = (first + count) % size
            walked.append(loop.pixels[step])
            if count < size and (hanging := loop.holes.pop(step, None)):
                stack.append((number, first, count))  # this pixel again, then on
                stack += [(hole, begin, 0) for hole, begin in hanging]
                break
    return walked


def _corners(pixels: list[int], stride: int) -> np.ndarray:
    """Without what lies on a straight line between its neighbors: (P, 2) int64, x and y in the mask."""
    y, x = np.divmod(np.array(pixels, np.int64), stride)
    points = np.stack([x - 1, y - 1], axis=1)
    moved = np.any(points != np.roll(points, -1, axis=0), axis=1)
    if not moved.any():
        return points[:1]
    points = points[moved]
    # Steps are to one of the eight neighbors, or level: their signs are their directions.
    come = np.sign(points - np.roll(points, 1, axis=0))
    go = np.sign(np.roll(points, -1, axis=0) - points)
    return points[np.any(come != go, axis=1)]
