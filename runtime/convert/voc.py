"""PASCAL VOC's folders for segmentation, and CVAT's "segmentation mask 1.1", which is the same with objects beside it.

    JPEGImages/                    the photographs as they are
    SegmentationClass/NAME.png     8-bit palette, VOC's colors: 0 background, 1..C classes, 255 void
    SegmentationObject/NAME.png    CVAT only: 1..254 objects of `instances`, 255 void
    ImageSets/Segmentation/*.txt   a name a line
    labelmap.txt                   name:r,g,b:: of each label, void too: CVAT and datumaro refuse colors not declared

VOC is flat; CVAT keeps folders, for it finds an image by its path.
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
from .instances import Instances, instances_of
from .labeled import Labeled, void_name

MAX_OBJECTS = VOID - 1
"""Of an image in SegmentationObject."""


class VocWriter:
    """Writes VOC's folders. Raises ClassError: a class whose name labelmap.txt cannot hold."""

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
            Loss(self._scores, "boxes with their scores have no place in VOC segmentation"),
            Loss(self._other, "images do not end in .jpg, the only ending that torchvision's VOCSegmentation opens"),
        ]


class CvatWriter:
    """Writes what CVAT imports as "segmentation mask 1.1" once it is zipped. Raises ClassError as `VocWriter` does."""

    def __init__(self, root: Path, classes: tuple[str, ...], splits: tuple[str, ...], files: ExitStack) -> None:
        self._root = root
        self._list = files.enter_context(_open_list(root, "default"))
        self._scores = self._merged = 0
        write_label_map(root / "labelmap.txt", classes)

    def add(self, item: Labeled) -> Path:
        name = item.name(flat=False)
        instances = instances_of(item)
        numbers, merged = _numbered(instances, item.label_map)
        save_indexed(self._root / "SegmentationClass" / f"{name}.png", item.label_map)
        save_indexed(self._root / "SegmentationObject" / f"{name}.png", numbers)
        self._list.write(f"{name}\n")
        self._scores += sum(each.score is not None for each in instances.each)
        self._merged += merged
        return Path("JPEGImages", name + item.ending)

    def finish(self) -> list[Loss]:
        return [
            Loss(self._scores, "scores of objects have no place in CVAT masks"),
            Loss(self._merged, f"objects share a number with another of their class: an image has {MAX_OBJECTS} at most"),
        ]


def write_label_map(path: Path, classes: tuple[str, ...]) -> None:
    """Writes labelmap.txt: ``name:r,g,b:parts:actions``, the last two empty."""
    named = {0: "background", **dict(enumerate(classes, 1)), VOID: void_name(classes)}
    colors = palette().tolist()
    for name in named.values():
        if name.startswith("#"):
            raise ClassError(f"the class {name!r} would be a comment in labelmap.txt", hint="take the format coco or hf")
    lines = [f"{name}:{','.join(map(str, colors[label]))}::" for label, name in named.items()]
    path.write_text("\n".join(["# label:color_rgb:parts:actions", *lines, ""]), encoding="utf-8")


def _open_list(root: Path, name: str) -> TextIO:
    path = root / "ImageSets" / "Segmentation" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w", encoding="utf-8", newline="\n")


def _numbered(instances: Instances, label_map: np.ndarray) -> tuple[np.ndarray, int]:
    """Objects as (H, W) uint8, void 255; and how many had to share a number: the smallest, within their class."""
    alone = instances.each
    if len(alone) > MAX_OBJECTS:
        classes = {each.label for each in alone}
        alone = tuple(sorted(alone, key=lambda each: (-each.area_px, each.number))[: MAX_OBJECTS - len(classes)])
    own = {each.number for each in alone}
    number = np.zeros(len(instances.each) + 1, np.uint8)
    given: dict[int, int] = {}
    for each in instances.each:
        key = each.number if each.number in own else -each.label
        number[each.number] = given.setdefault(key, len(given) + 1)
    numbers = number[instances.map]
    numbers[label_map == VOID] = VOID
    return numbers, len(instances.each) - len(own)
