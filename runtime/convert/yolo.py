"""Writes YOLO-seg: a text file for each image, with one line for each region: ``class x y x y x y ...``, shares of the sides.

    images/train/NAME.jpg   labels/train/NAME.txt   data.yaml

The format has neither void nor scores. A line is one polygon, and an object in several parts has a line for each. The regions
themselves are exact: see `polygons`.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ...batch import VOID
from .base import Loss
from .instances import instances_of
from .labeled import Labeled
from .polygons import polygons_of

_INTO_PIXEL = 0.25
"""Offset of a corner in its pixel: readers truncate (ultralytics) or round (supervision) to whole pixels, and 0.25 gives the same
pixel either way. Its center, 0.5, would be rounded up by some."""


class YoloWriter:
    """Writes a YOLO-seg data set. Without a split ``val``, data.yaml gives ``train`` as ``val``, which YOLO requires."""

    def __init__(self, root: Path, classes: tuple[str, ...], splits: tuple[str, ...], files: ExitStack) -> None:
        self._root = root
        self._void = self._pixels = self._parted = self._scores = 0
        for split in splits:
            (root / "labels" / split).mkdir(parents=True)
            (root / "images" / split).mkdir(parents=True)
        # Names as JSON strings, which YAML reads the same. Without `path`, paths start at data.yaml's folder.
        lines = [f"train: images/{splits[0]}", f"val: images/{splits[-1]}", "task: segment", "names:"]
        lines += [f"  {number}: {json.dumps(name, ensure_ascii=False)}" for number, name in enumerate(classes)]
        (root / "data.yaml").write_text("\n".join([*lines, ""]), encoding="utf-8")

    def add(self, item: Labeled) -> Path:
        name = item.name(flat=True)
        height, width = item.shape
        instances = instances_of(item)
        lines = []
        for one in instances.objects:
            polygons = polygons_of(instances.crop(one))
            self._parted += len(polygons) > 1
            self._scores += one.score is not None
            for polygon in polygons:
                corners = np.tile(polygon, (3, 1))[:3] if len(polygon) < 3 else polygon  # readers want three
                shares = (corners + np.array([one.left, one.top]) + _INTO_PIXEL) / (width, height)
                lines.append(" ".join([str(one.label - 1), *(f"{share:.6f}" for share in shares.ravel())]))
        with (self._root / "labels" / item.split / f"{name}.txt").open("x", encoding="ascii", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)
        self._void += int(item.count[VOID])
        self._pixels += item.label_map.size
        return Path("images", item.split, name + item.ending)

    def finish(self) -> list[Loss]:
        return [
            Loss(self._void, f"void pixels ({self._void / max(self._pixels, 1):.2%} of all) become background"),
            Loss(self._parted, "objects in several parts have a line for each part"),
            Loss(self._scores, "scores of objects cannot be written in YOLO labels"),
        ]
