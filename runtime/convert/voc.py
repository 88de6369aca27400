"""Writes PASCAL VOC segmentation, and CVAT's "segmentation mask 1.1", which is the same with objects.

    JPEGImages/                    the photographs as they are
    SegmentationClass/NAME.png     8-bit palette, VOC's colors: 0 background, 1..C classes, 255 void
    SegmentationObject/NAME.png    CVAT only: 1..254 objects, which cannot overlap: `segments`; 255 void
    ImageSets/Segmentation/*.txt   one name a line
    labelmap.txt                   name:r,g,b:: of each label and void: CVAT and datumaro refuse undeclared colors

VOC is flat; CVAT keeps folders, because it finds an image by its path.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

import numpy as np

from ...batch import VOID
from ...classes import palette
from ...errors import ClassError
from .base import Loss, save_indexed
from .labeled import Labeled, void_name
from .segments import Segments, segments_of

MAX_OBJECTS = VOID - 1
"""Most objects of an image in SegmentationObject."""


class VocWriter:
    """Writes VOC's folders. Raises ClassError for a class name that labelmap.txt cannot represent."""

    def __init__(self, root: Path, classes: tuple[str, ...], splits: tuple[str, ...], files: ExitStack) -> None:
        self._root = root
        lists = (*splits, "trainval") if len(splits) > 1 else splits
        self._lists = {name: files.enter_context(_open_list(root, name)) for name in lists}
        self._scores = self._other = 0
        write_label_map(root / "labelmap.txt", classes)

    def add(self, item: Labeled) -> Path:
        name = item.name(flat=True)
        save_indexed(self._root / "SegmentationClass" / f"{name}.png", item.label_map)
        for split in {item.split, "trainval"} & self._lists.keys():
            self._lists[split].write(f"{name}\n")
        self._scores += len(item.boxes)
        self._other += item.ending != ".jpg"
        return Path("JPEGImages", name + item.ending)

    def finish(self) -> list[Loss]:
        return [
            Loss(self._scores, "boxes and their scores cannot be written in VOC segmentation"),
            Loss(self._other, "images do not end in .jpg, the only ending that torchvision's VOCSegmentation opens"),
        ]


class CvatWriter:
    """Writes a folder that, zipped, CVAT imports as "segmentation mask 1.1". Raises ClassError as `VocWriter` does."""

    def __init__(self, root: Path, classes: tuple[str, ...], splits: tuple[str, ...], files: ExitStack) -> None:
        self._root = root
        self._list = files.enter_context(_open_list(root, "default"))
        self._scores = self._merged = 0
        write_label_map(root / "labelmap.txt", classes)

    def add(self, item: Labeled) -> Path:
        name = item.name(flat=False)
        segments = segments_of(item)
        numbers, merged = _numbered(segments, item.label_map)
        save_indexed(self._root / "SegmentationClass" / f"{name}.png", item.label_map)
        save_indexed(self._root / "SegmentationObject" / f"{name}.png", numbers)
        self._list.write(f"{name}\n")
        self._scores += sum(one.score is not None for one in segments.segments)
        self._merged += merged
        return Path("JPEGImages", name + item.ending)

    def finish(self) -> list[Loss]:
        return [
            Loss(self._scores, "scores of objects cannot be written in CVAT masks"),
            Loss(self._merged, f"objects share a number with another of their class: an image can have at most {MAX_OBJECTS}"),
        ]


def write_label_map(path: Path, classes: tuple[str, ...]) -> None:
    """Write labelmap.txt: ``name:r,g,b:parts:actions``, the last two empty."""
    names = {0: "background", **dict(enumerate(classes, 1)), VOID: void_name(classes)}
    colors = palette().tolist()
    for name in names.values():
        if name.startswith("#"):
            raise ClassError(f"the class {name!r} would be a comment in labelmap.txt", hint="use the format coco or hf")
    lines = [f"{name}:{','.join(map(str, colors[label]))}::" for label, name in names.items()]
    path.write_text("\n".join(["# label:color_rgb:parts:actions", *lines, ""]), encoding="utf-8")


def _open_list(root: Path, name: str) -> TextIO:
    path = root / "ImageSets" / "Segmentation" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w", encoding="utf-8", newline="\n")


def _numbered(segments: Segments, label_map: np.ndarray) -> tuple[np.ndarray, int]:
    """Objects as (H, W) uint8, void 255; and how many share a number with others of their class: the smallest ones."""
    largest = sorted(segments.segments, key=lambda one: (-one.area_px, one.number))
    if len(largest) > MAX_OBJECTS:
        largest = largest[: MAX_OBJECTS - len({one.label for one in largest})]
    distinct = {one.number for one in largest}
    number = np.zeros(len(segments.segments) + 1, np.uint8)
    assigned: dict[int, int] = {}
    for one in segments.segments:
        key = one.number if one.number in distinct else -one.label
        number[one.number] = assigned.setdefault(key, len(assigned) + 1)
    numbers = number[segments.map]
    numbers[label_map == VOID] = VOID
    return numbers, len(segments.segments) - len(distinct)
