"""An annotation of a photograph as its file has it, and the conversion of its boxes to the photograph's frame."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ...batch import Photograph
from ...errors import WsssError

Corners = tuple[float, float, float, float]

LEAST_SIDE_PX = 0.9
"""Smallest side of a box. A side of 1 pixel, written as a share with six decimals, may be read as slightly less."""
TOLERANCE = 0.1
"""Share of a box's area, or of a photograph's side, that may lie beyond the edge because of rounding."""


@dataclass(frozen=True, slots=True)
class GivenBox:
    """A box of an annotation: its class name, (x0, y0, x1, y1) in the annotation's frame, 0-based with exclusive far edges, in
    any order; score in [0, 1]."""

    name: str
    xyxy: Corners
    score: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """A file's annotation of one photograph."""

    where: str
    """What messages call the file and the photograph's entry in it."""
    boxes: Sequence[GivenBox]
    size: tuple[int, int] | None = None
    """(height, width) in pixels of the photograph that was annotated; None if unknown."""
    shares: bool = False
    """Coordinates are shares of the photograph's width and height instead of pixels."""
    upright: bool = False
    """The boxes are known to be in the frame of the photograph after EXIF rotation."""
    maybe_sides: bool = False
    """The corners come from a list of four numbers, which some tools write as x, y, width, height."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of boxes that the reader left out, by reason."""
    filename: str = ""
    folder: str = ""
    """The photograph's name and folder in the annotation."""


class Index(Protocol):
    """The keys of all annotations; may be iterated several times."""

    def __iter__(self) -> Iterator[str]: ...

    def find(self, photo: str) -> str | None:
        """The key of a photograph's annotation, or None."""
        ...

    def missing(self, photo: str) -> WsssError:
        """The error for a photograph without an annotation."""
        ...


class BoxSource(Protocol):
    """Annotations in one format."""

    @property
    def index(self) -> Index: ...

    def read(self, key: str) -> Annotation:
        """Read an annotation by its key. Raises WsssError."""
        ...


def finite(value: object) -> float | None:
    """A number of a JSON document as a finite float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def size_of(height: object, width: object, where: str) -> tuple[int, int] | None:
    """(height, width) of an annotation's frame; None where both are absent or 0, which some tools write for unknown.

    Raises:
        WsssError: not two positive whole numbers.
    """
    if height in (None, 0) and width in (None, 0):
        return None
    numbers = finite(height), finite(width)
    if not all(number is not None and number > 0 and number == int(number) for number in numbers):
        raise WsssError(
            f"{where}: expected a height and width in pixels, got {height!r} and {width!r}", hint="correct the size, or remove it"
        )
    return int(numbers[0] or 0), int(numbers[1] or 0)


def place(annotation: Annotation, photo: Photograph) -> tuple[list[GivenBox], list[str]]:
    """Convert an annotation's boxes to the photograph: (x0, y0, x1, y1) in its upright pixels, ordered, cut at its edges.

    Returns:
        The boxes that remain, and notes about what was left out, cut or assumed.

    Raises:
        WsssError: another frame, other coordinates than the format's, or no box remains.
    """
    boxes, notes = _upright(annotation, photo)
    _check_kind(annotation, boxes, photo)
    height, width = photo.shape
    kept: list[GivenBox] = []
    swapped = cut = 0
    left_out = Counter(annotation.left_out)
    for box in boxes:
        x0, y0, x1, y1 = ordered = _ordered(box.xyxy)
        swapped += ordered != box.xyxy
        inside = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
        if inside[0] >= inside[2] or inside[1] >= inside[3]:
            empty = x0 == x1 or y0 == y1
            left_out["less than a pixel wide or high" if empty else "outside the photograph"] += 1
        elif min(inside[2] - inside[0], inside[3] - inside[1]) < LEAST_SIDE_PX:
            left_out["less than a pixel wide or high"] += 1
        elif box.score == 0:
            left_out["of score 0"] += 1
        else:
            cut += _area(inside) < (1 - TOLERANCE) * _area(ordered)
            kept.append(GivenBox(box.name, inside, box.score))
    total = len(boxes) + annotation.left_out.total()
    if left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        if not kept:
            raise WsssError(
                f"{annotation.where}: no box remains of {total}: {reasons}; the photograph is {_described(photo.shape)}",
                hint="a box of score 0 counts as none: correct the scores, or leave them out"
                if set(left_out) == {"of score 0"}
                else "coordinates are pixels of the photograph: check which photograph the boxes were made for",
            )
        notes.append(f"{annotation.where}: {left_out.total()} of {total} boxes left out: {reasons}")
    if swapped:
        notes.append(f"{annotation.where}: {swapped} of {total} boxes had swapped corners, which were sorted")
    if cut:
        notes.append(
            f"{annotation.where}: {cut} of {total} boxes reach far beyond the photograph, {_described(photo.shape)}, and were cut"
        )
    return kept, notes


def looks_like_corners(sides: Sequence[Corners], size: tuple[float, float]) -> bool:
    """Whether boxes given as x, y, width, height reach far beyond ``size`` (height, width), but fit as x0, y0, x1, y1."""
    height, width = size
    beyond = any(x + w > (1 + TOLERANCE) * width or y + h > (1 + TOLERANCE) * height for x, y, w, h in sides)
    return beyond and all(x < w <= width * 1.01 and y < h <= height * 1.01 for x, y, w, h in sides)


def looks_like_sides(corners: Sequence[Corners]) -> bool:
    """Whether of boxes given as x0, y0, x1, y1 one has x1 < x0 or y1 < y0, but not both, and all fit as x, y, width, height."""
    mixed = any((x1 < x0) != (y1 < y0) for x0, y0, x1, y1 in corners)
    return mixed and all(x1 > 0 and y1 > 0 for _, _, x1, y1 in corners)


def sides_error(where: str, corners: Sequence[Corners]) -> WsssError:
    """The error for x, y, width, height instead of corners."""
    shown = ", ".join(f"{number:g}" for number in next(each for each in corners if each[2] < each[0] or each[3] < each[1]))
    return WsssError(
        f"{where}: expected corners x0, y0, x1, y1 under xyxy, got what looks like x, y, width, height: [{shown}]",
        hint="write [x, y, x + width, y + height]; in a COCO file, bbox is x, y, width, height",
    )


def _upright(annotation: Annotation, photo: Photograph) -> tuple[list[GivenBox], list[str]]:
    """The boxes in pixels of the upright photograph, and notes about what was assumed."""
    boxes, (height, width) = list(annotation.boxes), photo.shape
    if annotation.shares:
        boxes = [GivenBox(b.name, _scaled(b.xyxy, height, width), b.score) for b in boxes]
    if annotation.size is not None and annotation.size not in (photo.shape, photo.raw_shape):
        raise WsssError(
            f"{annotation.where}: annotates a photograph of {_described(annotation.size)}, this one is {_described(photo.shape)}",
            hint="boxes must be made for this photograph: scale them, correct the size, or use the photograph that was annotated",
        )
    if photo.orientation == 1 or annotation.upright or not boxes:
        return boxes, []
    if annotation.size is None or photo.raw_shape == photo.shape:
        raw_height, raw_width = photo.raw_shape
        if not annotation.shares and _fit(boxes, raw_height, raw_width) and not _fit(boxes, height, width):
            raise WsssError(
                f"{annotation.where}: boxes exceed the photograph, {_described(photo.shape)}, but fit it before EXIF rotation",
                hint=f"give the size of their frame, {_described(photo.raw_shape)}, or rotate them",
            )
        return boxes, [
            f"{annotation.where}: EXIF rotates the photograph; its boxes are assumed to be in the frame after rotation"
        ]
    if annotation.size == photo.raw_shape:
        boxes = [GivenBox(b.name, rotated(b.xyxy, photo.raw_shape, photo.orientation), b.score) for b in boxes]
    return boxes, []


def rotated(xyxy: Corners, raw_shape: tuple[int, int], orientation: int) -> Corners:
    """Convert a box from the stored frame to the upright one.

    Args:
        xyxy: pixels of the stored frame, whose (height, width) is ``raw_shape``.
        orientation: EXIF tag 0x0112 (Exif 2.32, section 4.6.4): 1 to 8.
    """
    height, width = raw_shape
    x0, y0, x1, y1 = _ordered(xyxy)
    if orientation in (2, 3, 7, 8):
        x0, x1 = width - x1, width - x0
    if orientation in (3, 4, 6, 7):
        y0, y1 = height - y1, height - y0
    return (x0, y0, x1, y1) if orientation < 5 else (y0, x0, y1, x1)


def _check_kind(annotation: Annotation, boxes: Sequence[GivenBox], photo: Photograph) -> None:
    """Raise WsssError where the numbers are not pixels or not corners."""
    height, width = photo.shape
    numbers = [number for box in boxes for number in box.xyxy]
    if numbers and not annotation.shares and min(numbers) >= 0 and max(numbers) <= 1 < max(height, width):
        raise WsssError(
            f"{annotation.where}: expected pixels, got coordinates in 0..1",
            hint=f"multiply x by the width and y by the height: this photograph is {_described(photo.shape)}",
        )
    if annotation.maybe_sides and any(x1 < x0 or y1 < y0 for x0, y0, x1, y1 in (box.xyxy for box in boxes)):
        sides = [box.xyxy for box in boxes]
        if all(w > 0 and h > 0 and x + w <= width + 1 and y + h <= height + 1 for x, y, w, h in sides):
            raise sides_error(annotation.where, sides)


def _fit(boxes: Sequence[GivenBox], height: int, width: int) -> bool:
    return all(x1 <= width + 1 and y1 <= height + 1 for _, _, x1, y1 in (_ordered(box.xyxy) for box in boxes))


def _ordered(xyxy: Corners) -> Corners:
    x0, y0, x1, y1 = xyxy
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


def _scaled(xyxy: Corners, height: int, width: int) -> Corners:
    x0, y0, x1, y1 = xyxy
    return x0 * width, y0 * height, x1 * width, y1 * height


def _area(xyxy: Corners) -> float:
    return (xyxy[2] - xyxy[0]) * (xyxy[3] - xyxy[1])


def _described(shape: tuple[int, int]) -> str:
    return f"{shape[1]} x {shape[0]} (width x height)"
