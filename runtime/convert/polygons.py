"""Converts masks to polygons, and polygons to the masks that their readers fill.

The corners are the centers of the mask's border pixels, as from OpenCV's findContours. Fillers with this convention
(`cv2.fillPoly`, with which ultralytics and supervision read YOLO-seg) paint the border as well as the inside. A region is one
polygon: a path over the region's own pixels, there and back, connects each hole to the outline, so that nothing outside of the
mask is painted. Filled, the polygons of a mask (`polygons_of`) are exactly the mask.

A format with one polygon for an object (`polygon_of`) connects regions by straight lines between their nearest border pixels,
there and back, as ultralytics' ``merge_multi_segment`` does. Readers paint these lines too. `filled` tells what they see.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

_PAIRS = 1 << 20
"""Distances between border pixels that are computed at a time."""
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
    loops = _regions(mask, stride)
    return [_corners(_walk(loops, number), stride) for number, loop in enumerate(loops) if loop.outline]


def polygon_of(mask: np.ndarray) -> np.ndarray:
    """One polygon for all regions of a mask (H, W) bool that is not empty: (P, 2) int64, as from `polygons_of`."""
    stride = mask.shape[1] + 2
    loops = _regions(mask, stride)
    return _corners(_walk(loops, _attach_regions(loops, stride)), stride)


def simplified(polygon: np.ndarray, tolerance_px: float) -> np.ndarray:
    """The polygon without corners that are nearer than the tolerance to the line between their neighbors that stay.

    Douglas and Peucker 1973, for the two halves between the first corner and the one that is farthest from it.

    Args:
        polygon: (P, 2) int64.

    Returns:
        (Q, 2) int64, Q <= P, at least two corners where the polygon has two different ones.
    """
    closed = np.append(polygon, polygon[:1], axis=0)
    far = int(((polygon - polygon[0]) ** 2).sum(axis=1).argmax())
    stays = np.zeros(len(closed), bool)
    stays[[0, far]] = True
    stack = [(0, far), (far, len(polygon))]
    while stack:
        start, stop = stack.pop()
        if stop - start < 2:
            continue
        along = closed[stop] - closed[start]
        offset = closed[start + 1 : stop] - closed[start]
        length = float(np.hypot(*along))
        if length:
            apart = np.abs(along[0] * offset[:, 1] - along[1] * offset[:, 0]) / length
        else:
            apart = np.hypot(offset[:, 0], offset[:, 1])
        middle = int(apart.argmax())
        if apart[middle] > tolerance_px:
            stays[start + 1 + middle] = True
            stack += [(start, start + 1 + middle), (start + 1 + middle, stop)]
    return polygon[stays[:-1]]


def filled(polygon: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The mask (H, W) bool that a reader fills: by the even-odd rule, with painted edges, as `cv2.fillPoly` does.

    Args:
        polygon: (P, 2) int64, x and y of pixels within ``shape``.
    """
    begin, end = polygon, np.roll(polygon, -1, axis=0)
    # Even-odd: each edge flips the pixels of its rows from its crossing on to the right. A row belongs to the upper end.
    upper = np.where((begin[:, 1] < end[:, 1])[:, None], begin, end)
    lower = np.where((begin[:, 1] < end[:, 1])[:, None], end, begin)
    edge, step = _each(lower[:, 1] - upper[:, 1])
    slope = (lower[edge, 0] - upper[edge, 0]) / (lower[edge, 1] - upper[edge, 1])
    crossing = np.ceil(upper[edge, 0] + step * slope).astype(np.int64)
    flips = np.zeros((shape[0], shape[1] + 1), np.uint8)
    np.add.at(flips, (upper[edge, 1] + step, crossing), 1)
    mask = np.bitwise_and(np.cumsum(flips, axis=1, dtype=np.uint8)[:, :-1], 1).astype(bool)
    # The painted edges: Bresenham's lines from their left ends, a pixel for each step along the longer side.
    moved = np.where((begin[:, :1] <= end[:, :1]), end - begin, begin - end)
    longest = np.maximum(np.abs(moved).max(axis=1), 1)
    edge, step = _each(longest + 1)
    # Half a pixel is rounded down.
    offset = (2 * step[:, None] * np.abs(moved[edge]) + longest[edge, None] - 1) // (2 * longest[edge, None])
    x, y = (np.where(begin[:, :1] <= end[:, :1], begin, end)[edge] + np.sign(moved[edge]) * offset).T
    mask[y, x] = True
    return mask


def _each(count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each of N things ``count`` times: its number, and 0 .. count - 1."""
    number = np.repeat(np.arange(len(count)), count)
    return number, np.arange(len(number)) - np.repeat(np.cumsum(count) - count, count)


@dataclass(slots=True)
class _Loop:
    """A closed border with the mask on its right-hand side; pixels are indices into the flattened mask, padded by one."""

    outline: bool
    pixels: list[int]
    attached: defaultdict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    """The loops attached at a step, each with its own step where it is attached: holes, and other regions."""


def _regions(mask: np.ndarray, stride: int) -> list[_Loop]:
    """The loops of a mask, with holes attached."""
    loops, left_edges = _trace(mask)
    for number, loop in enumerate(loops):
        if not loop.outline:
            _attach_hole(number, loops, left_edges, stride)
    return loops


def _attach_regions(loops: list[_Loop], stride: int) -> int:
    """Attach all outlines but the longest to the nearest region that is attached already; return the longest one's number."""
    outlines = [number for number, loop in enumerate(loops) if loop.outline]
    root = max(outlines, key=lambda number: len(loops[number].pixels))
    if len(outlines) == 1:
        return root
    size = [len(loops[number].pixels) for number in outlines]
    owner, step = _each(np.array(size))
    points = np.stack(np.divmod(np.concatenate([loops[number].pixels for number in outlines]), stride), axis=1)
    nearest, via = np.full(len(points), np.iinfo(np.int64).max), np.zeros(len(points), np.int64)
    waiting = np.ones(len(points), bool)
    place = outlines.index(root)
    for _ in outlines[1:]:  # Prim's tree
        (attached,) = np.nonzero(owner == place)
        waiting[attached] = False
        (rest,) = np.nonzero(waiting)
        for some in np.array_split(attached, min(-(-len(attached) * len(rest) // _PAIRS), len(attached))):
            distance = ((points[rest, None] - points[some]) ** 2).sum(axis=2)
            best = distance.argmin(axis=1)
            closer = distance[np.arange(len(rest)), best] < nearest[rest]
            nearest[rest[closer]] = distance[np.arange(len(rest)), best][closer]
            via[rest[closer]] = some[best[closer]]
        point = rest[nearest[rest].argmin()]
        loops[outlines[owner[via[point]]]].attached[int(step[via[point]])].append((outlines[owner[point]], int(step[point])))
        place = int(owner[point])
    return root


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
    loops[loop].attached[place].append((hole, step))


def _walk(loops: list[_Loop], outline: int) -> list[int]:
    """The pixels of an outline, with a detour around each attached loop."""
    walked: list[int] = []
    # Loops are attached to loops, to any depth. The stack has loop, first step, and steps done.
    stack = [(outline, 0, 0)]
    while stack:
        number, first, done = stack.pop()
        loop = loops[number]
        size = len(loop.pixels)
        # A detour ends with its first pixel again, where the path back starts. An outline is closed implicitly.
        for count in range(done, size + (number != outline)):
            step = (first + count) % size
            walked.append(loop.pixels[step])
            if count < size and (attached := loop.attached[step]):
                other, begin = attached.pop()
                stack += [(number, first, count), (other, begin, 0)]  # the detour, this pixel again, then the rest
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
    arriving = points - np.roll(points, 1, axis=0)
    leaving = np.roll(points, -1, axis=0) - points
    turns = arriving[:, 0] * leaving[:, 1] != arriving[:, 1] * leaving[:, 0]
    return points[turns | ((arriving * leaving).sum(axis=1) < 0)]
