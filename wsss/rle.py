"""Masks as runs of pixels, and COCO's compressed RLE.

Runs go down the columns, from the left column to the right one, as in COCO: the pixel in row y and column x of an image of H rows
has the place x * H + y. COCO's *counts* are the lengths of the runs, background first. Its compressed form (pycocotools
``common/maskApi.c``, ``rleToString``) writes each count from the fourth on as the difference to the one before the last, in
groups of five bits, the lowest first: a character is 48 + the group + 32 if another one follows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_GROUP_BITS, _MORE, _SIGN, _ZERO = 5, 0x20, 0x10, 48
_MAX_GROUPS = 8
"""Most groups of a count: 40 bits hold any difference of counts of `wsss.photographs.MAX_PIXELS`."""


@dataclass(frozen=True, slots=True)
class MaskRuns:
    """A mask of an image as runs; may be empty. Takes 16 bytes a run, whatever the size of the image.

    size: (height, width) of the image in pixels.
    spans: (S, 2) int64, first place and last place + 1 of each run, ascending, with gaps between.
    """

    size: tuple[int, int]
    spans: np.ndarray

    @staticmethod
    def of(mask: np.ndarray, *, top: int = 0, left: int = 0, size: tuple[int, int] | None = None) -> MaskRuns:
        """The runs of a mask (h, w) bool whose corner is at ``top``, ``left`` of an image of ``size``; None: the mask's size."""
        size = size or (mask.shape[0], mask.shape[1])
        return MaskRuns(size, joined(spans_of(mask.T, top=left, left=top, stride=size[0])))

    @staticmethod
    def from_counts(text: str, size: tuple[int, int]) -> MaskRuns:
        """Decode COCO's compressed counts, which may come from strangers. Memory is limited by the length of the text.

        Raises:
            ValueError: they are damaged, or do not sum to the image's pixels.
        """
        counts = _decompressed(text)
        pixels = size[0] * size[1]
        if (counts[1:] <= 0).any() or counts[0] < 0:
            raise ValueError("a run has no pixel")
        edges = np.cumsum(counts)
        if counts.max() > pixels or edges[-1] != pixels:  # the sum of larger ones might overflow
            raise ValueError(f"the runs do not have the {pixels:,} pixels of the image")
        edges = edges[: len(edges) - len(edges) % 2]  # the end of the last background is no edge of a run
        return MaskRuns(size, edges.reshape(-1, 2))

    def counts(self) -> str:
        """The mask in COCO's compressed form: ``{"size": [H, W], "counts": THIS}``."""
        counts = np.diff(self.spans.ravel(), prepend=0, append=self.size[0] * self.size[1])
        return _compressed(counts if counts[-1] else counts[:-1])  # pycocotools leaves out a 0 at the end

    def area(self) -> int:
        """Number of its pixels."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())

    def bounds(self) -> tuple[int, int, int, int]:
        """(top, left, bottom, right), the last two exclusive, of a mask that is not empty."""
        height = self.size[0]
        left, right = int(self.spans[0, 0]) // height, int(self.spans[-1, 1] - 1) // height + 1
        first, last = self.spans[:, 0] % height, (self.spans[:, 1] - 1) % height
        if (first + (self.spans[:, 1] - self.spans[:, 0]) > height).any():  # a run goes on in the next column
            return 0, left, height, right
        return int(first.min()), left, int(last.max()) + 1, right

    def crop(self) -> np.ndarray:
        """(bottom - top, right - left) bool: the mask within its bounds."""
        top, left, bottom, right = self.bounds()
        return self._columns(left, right)[top:bottom]

    def mask(self) -> np.ndarray:
        """(H, W) bool."""
        return np.ascontiguousarray(self._columns(0, self.size[1]))

    def _columns(self, left: int, right: int) -> np.ndarray:
        height = self.size[0]
        flat = np.zeros((right - left) * height, bool)
        for start, stop in (self.spans - left * height).tolist():
            flat[start:stop] = True
        return flat.reshape(right - left, height).T


def joined(spans: np.ndarray) -> np.ndarray:
    """Join spans (S, 2), ascending, where one begins at the end of the one before."""
    apart = spans[1:, 0] != spans[:-1, 1]
    return np.stack([spans[np.append(True, apart)[: len(spans)], 0], spans[np.append(apart, True)[: len(spans)], 1]], axis=1)


def runs_of(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Divide an image into runs of equal pixels along the rows; no run crosses the end of a row.

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
    """Where a mask is set in the flattened image, row by row.

    Args:
        mask: (H, W) bool. top, left: its corner in the image. stride: the image's width; None: the mask's.

    Returns:
        (S, 2) int64: starts and stops (exclusive), ascending, with gaps between.
    """
    row, start, stop, value = runs_of(mask)
    offset = (top + row[value]) * (stride or mask.shape[1]) + left
    return joined(np.stack([offset + start[value], offset + stop[value]], axis=1))


def _compressed(counts: np.ndarray) -> str:
    values = counts.astype(np.int64)
    values[3:] -= counts[1:-2]
    groups, following = [], []
    while True:
        group = values & (1 << _GROUP_BITS) - 1
        values = values >> _GROUP_BITS
        more = values != np.where(group & _SIGN, -1, 0)
        groups.append(group)
        following.append(more)
        if not more.any():
            break
    more = np.logical_and.accumulate(following)  # a group is written where all before it go on
    written = np.concatenate([np.ones((1, len(counts)), bool), more[:-1]])
    characters = np.array(groups) + _ZERO + _MORE * more
    return characters.T[written.T].astype(np.uint8).tobytes().decode("ascii")


def _decompressed(text: str) -> np.ndarray:
    """Counts, (C,) int64, C at least 1, of any value. Raises ValueError."""
    groups = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int64) - _ZERO
    if not len(groups) or groups.min() < 0 or groups.max() >= 2 * _MORE or groups[-1] & _MORE:
        raise ValueError("not compressed counts")
    last = np.flatnonzero(groups & _MORE == 0)
    first = np.append(0, last[:-1] + 1)
    if (last - first).max() >= _MAX_GROUPS:
        raise ValueError("a run is too long")
    place = np.arange(len(groups)) - np.repeat(first, last - first + 1)
    values = np.add.reduceat((groups & _MORE - 1) << _GROUP_BITS * place, first)
    values -= np.where(groups[last] & _SIGN, np.int64(1) << _GROUP_BITS * (last - first + 1), 0)
    for start in (1, 2):
        np.cumsum(values[start::2], out=values[start::2])
    return values
