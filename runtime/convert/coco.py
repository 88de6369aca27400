"""Writes COCO: instances and panoptic segmentation.

    images/train/NAME.jpg                 the photographs as they are
    annotations/instances_train.json      objects of `instances` with compressed RLE, box, area, score and quality; may overlap
    annotations/panoptic_train.json       `segments`, which do not overlap, and background as stuff
    annotations/panoptic_train/NAME.png   segment ids as R + 256 G + 65536 B, 0 void

Category ids are label values; background in the panoptic file is C + 1, because COCO reserves 0. The panoptic files are
lossless; instances cannot represent void, nor which of several objects has a pixel. ``score`` and ``quality`` are those of the
box, absent where an object has none.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image

from ... import __version__
from ...batch import VOID
from .base import Loss
from .instances import instances_of
from .labeled import Labeled
from .segments import Segments, segments_of

_ROWS = 256
"""Rows colored at a time: ids take four times the memory of a label map."""


class CocoWriter:
    """Writes COCO's files. The ids of images and annotations are their places in the store, from 1."""

    def __init__(self, root: Path, classes: tuple[str, ...], splits: tuple[str, ...], files: ExitStack) -> None:
        (root / "annotations").mkdir()
        self._splits = {split: _Split(root, split, classes, files) for split in splits}
        self._background = len(classes) + 1
        self._images = self._objects = self._void = self._pixels = 0

    def add(self, item: Labeled) -> Path:
        name, split = item.name(flat=False), self._splits[item.split]
        self._images += 1
        self._void += int(item.count[VOID])
        self._pixels += item.label_map.size
        height, width = item.shape
        split.images.add({"id": self._images, "file_name": name + item.ending, "height": height, "width": width})
        for one in instances_of(item):
            self._objects += 1
            common = _segment(one.label, one.mask.bounds(), one.mask.area())
            scores = {} if one.score is None else {"score": one.score, "quality": one.quality}
            mask = {"segmentation": {"size": [height, width], "counts": one.mask.counts()}}
            split.objects.add({"id": self._objects, "image_id": self._images, **common, **mask, **scores})
        segments = segments_of(item)
        found = [
            {"id": one.number, **_segment(one.label, (one.top, one.left, one.bottom, one.right), one.area_px)}
            for one in segments.segments
        ]
        if item.count[0]:
            number = len(segments.segments) + 1
            found.append({"id": number, **_segment(self._background, *_extent(item.label_map == 0))})
        split.segments.add({"image_id": self._images, "file_name": f"{name}.png", "segments_info": found})
        _save_panoptic(split.panoptic / f"{name}.png", segments, item.label_map)
        return Path("images", item.split, name + item.ending)

    def finish(self) -> list[Loss]:
        for split in self._splits.values():
            split.finish()
        share = self._void / max(self._pixels, 1)
        return [
            Loss(self._void, f"void pixels ({share:.2%} of all) cannot be written as instances; the panoptic files keep them")
        ]


class _Array:
    """A JSON array that is written item by item to a temporary file, because a COCO file has several arrays."""

    def __init__(self, folder: Path, files: ExitStack) -> None:
        self._file = tempfile.TemporaryFile("w+", dir=folder, encoding="utf-8", newline="\n")  # noqa: SIM115
        files.callback(self._file.close)
        self._between = "\n"

    def add(self, value: dict[str, Any]) -> None:
        self._file.write(self._between + json.dumps(value, ensure_ascii=False, separators=(",", ":")))
        self._between = ",\n"

    def copy_to(self, target: TextIO) -> None:
        self._file.seek(0)
        target.write("[")
        shutil.copyfileobj(self._file, target)
        target.write("\n]")


class _Split:
    def __init__(self, root: Path, name: str, classes: tuple[str, ...], files: ExitStack) -> None:
        self._root, self._name = root / "annotations", name
        (root / "images" / name).mkdir(parents=True)
        self.panoptic = self._root / f"panoptic_{name}"
        self.panoptic.mkdir()
        self.images, self.objects, self.segments = (_Array(self._root, files) for _ in range(3))
        self._things = [{"id": label, "name": class_name, "supercategory": ""} for label, class_name in enumerate(classes, 1)]
        self._all = [{**thing, "isthing": 1} for thing in self._things]
        self._all.append({"id": len(classes) + 1, "name": "background", "supercategory": "", "isthing": 0})

    def finish(self) -> None:
        self._write("instances", self._things, self.objects)
        self._write("panoptic", self._all, self.segments)

    def _write(self, task: str, categories: list[dict[str, Any]], annotations: _Array) -> None:
        info = {"description": "pseudo-labels made with wsss, not drawn by people", "version": __version__}
        with (self._root / f"{task}_{self._name}.json").open("w", encoding="utf-8", newline="\n") as file:
            file.write(f'{{"info":{json.dumps(info)},\n"categories":{json.dumps(categories, ensure_ascii=False)},\n"images":')
            self.images.copy_to(file)
            file.write(',\n"annotations":')
            annotations.copy_to(file)
            file.write("}\n")


def _save_panoptic(path: Path, segments: Segments, label_map: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colors = np.empty((*label_map.shape, 3), np.uint8)
    for top in range(0, len(label_map), _ROWS):
        rows = slice(top, top + _ROWS)
        ids = np.where(label_map[rows] == 0, len(segments.segments) + 1, segments.map[rows])
        for channel in range(3):
            colors[rows, :, channel] = ids >> 8 * channel & 255
    with path.open("xb") as file:
        Image.fromarray(colors).save(file, format="PNG")


def _segment(category: int, bounds: tuple[int, int, int, int], area: int) -> dict[str, Any]:
    top, left, bottom, right = bounds
    return {"category_id": category, "bbox": [left, top, right - left, bottom - top], "area": area, "iscrowd": 0}


def _extent(mask: np.ndarray) -> tuple[tuple[int, int, int, int], int]:
    """The bounds (top, left, bottom, right) and the area of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1), int(mask.sum())
