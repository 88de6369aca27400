"""SAM's mask of a box at the photograph's size, as runs, from the decoder's low-resolution logits.

The same mask as that of ``Sam.postprocess_masks``, and of SAM 2's ``SAM2Transforms``: upsampled logits above 0, which is a
probability above 0.5. The upsampled mask itself is never made. Along each axis a pixel depends on three neighboring cells of the
logits at most (`upsample_matrix`), and is between their values: where all of them have the same sign, so does the pixel. Only
pixels along the outline are computed.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ...batch import Boxes, Masks
from ...frame import Frame, upsample_matrix
from ...rle import MaskRuns


def masks_of(masks: Masks, boxes: Boxes, row: int) -> list[MaskRuns]:
    """The masks of the boxes of image ``row``, in their order; the logits must be on the host."""
    frame, mine = masks.frames[row], np.flatnonzero(boxes.image == row)
    assert frame is not None or not len(mine)
    return [mask_runs(np.asarray(masks.logits[masks.part[i]])[masks.row[i]], frame) for i in mine if frame is not None]


def mask_runs(logits: np.ndarray, frame: Frame) -> MaskRuns:
    """The mask where the upsampled logits are above 0.

    Args:
        logits: (L, L) float32, the decoder's output for one box.
        frame: the photograph's place on the decoder's canvas.
    """
    side, (height, _) = len(logits), frame.image
    (first_y, weight_y), (first_x, weight_x) = (_taps(*lengths) for lengths in frame.mask_lengths(side))
    positive = logits > 0
    top, bottom = _reached(positive, first_y, weight_y.shape[1])
    left, right = _reached(positive.T, first_x, weight_x.shape[1])
    if top == bottom or left == right:
        return MaskRuns(frame.image, np.zeros((0, 2), np.int64))
    first_y, weight_y, first_x, weight_x = first_y[top:bottom], weight_y[top:bottom], first_x[left:right], weight_x[left:right]

    # Upsampled to the photograph's columns only: (w, k), a column of the photograph in each row.
    cells = np.ascontiguousarray(logits[first_y[0] : first_y[-1] + weight_y.shape[1]].T)
    columns = sum(weight_x[:, tap, None] * cells[first_x + tap] for tap in range(weight_x.shape[1]))
    assert isinstance(columns, np.ndarray)

    # Groups of the photograph's rows that depend on the same cells: start (G,), and their number of rows.
    start = np.flatnonzero(np.diff(first_y, prepend=-1))
    count = np.diff(start, append=len(first_y))
    cell = first_y[start] - first_y[0]
    above = columns > 0
    taps = range(weight_y.shape[1])
    everywhere = np.logical_and.reduce([above[:, cell + tap] for tap in taps])  # (w, G)
    somewhere = np.logical_or.reduce([above[:, cell + tap] for tap in taps])
    x, group = np.nonzero(somewhere & ~everywhere)

    # The pixels of the mixed groups: (M, rows of the largest group), the last row of smaller ones repeated.
    values = [columns[x, cell[group] + tap] for tap in taps]
    inside = np.empty((len(x), count.max()), bool)
    for row in range(inside.shape[1]):
        weight = weight_y[start + np.minimum(row, count - 1)][group]
        inside[:, row] = sum(weight[:, tap] * values[tap] for tap in taps) > 0

    # Where the sign changes down a column: within a group, between groups, and at both ends.
    begin, end = everywhere.copy(), everywhere
    if inside.size:
        begin[x, group], end[x, group] = inside[:, 0], inside[:, -1]
    number, before = np.nonzero(inside[:, 1:] != inside[:, :-1])
    between_x, between = np.nonzero(begin[:, 1:] != end[:, :-1])
    changes = [
        x[number] * height + start[group[number]] + before + 1,
        between_x * height + start[between + 1],
        np.flatnonzero(begin[:, 0]) * height,
        np.flatnonzero(end[:, -1]) * height + len(first_y),
    ]
    places = np.sort(np.concatenate(changes)) + left * height + top
    # A run that ends with a column and goes on in the next one: the two changes are at one place.
    again = np.append(places[1:] == places[:-1], False)[: len(places)]
    places = places[~(again | np.roll(again, 1))]
    return MaskRuns(frame.image, places.reshape(-1, 2))


@lru_cache(maxsize=16)
def _taps(side: int, canvas: int, valid: int, image: int) -> tuple[np.ndarray, np.ndarray]:
    """The cells that each pixel of an axis depends on: the first one (image,), ascending, and weights (image, T) float32."""
    matrix = upsample_matrix(side, canvas, valid, image)
    used = matrix != 0
    first, last = used.argmax(axis=1), side - 1 - used[:, ::-1].argmax(axis=1)
    width = int((last - first).max()) + 1
    first = np.minimum(first, side - width)
    return first, np.take_along_axis(matrix, first[:, None] + np.arange(width), axis=1)


def _reached(cells: np.ndarray, first: np.ndarray, width: int) -> tuple[int, int]:
    """First pixel and last pixel + 1 of an axis that depend on a row of the cells (L, L) bool, or on one between such rows."""
    found = np.flatnonzero(cells.any(axis=1))
    if not len(found):
        return 0, 0
    return int(np.searchsorted(first, found[0] - width, side="right")), int(np.searchsorted(first, found[-1], side="right"))
