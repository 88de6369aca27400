"""Writes YOLO-seg: a text file for each image, with one line for each object: ``class x y x y x y ...``, shares of the sides.

    images/train/NAME.jpg   labels/train/NAME.txt   data.yaml

The format has neither void nor scores. A line is one polygon. That of an object in one part is exact (`polygons`) unless it is
simplified; the parts of others are connected by lines, which readers paint too. How near the masks that readers fill come to the
objects is measured and reported.
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
from .polygons import filled, polygon_of, simplified

_INTO_PIXEL = 0.25
"""Offset of a corner in its pixel: readers truncate (ultralytics) or round (supervision) to whole pixels, and 0.25 gives the same
pixel either way. Its center, 0.5, would be rounded up by some."""


class YoloWriter:
    """Writes a YOLO-seg data set. Without a split ``val``, data.yaml gives ``train`` as ``val``, which YOLO requires.

    Args:
        simplify_px: most pixels by which an outline may be off, for fewer corners; 0 keeps all of them.
    """

    def __init__(
        self, root: Path, classes: tuple[str, ...], splits: tuple[str, ...], files: ExitStack, *, simplify_px: float = 0.0
    ) -> None:
        self._root, self._simplify_px = root, simplify_px
        self._void = self._pixels = self._scores = 0
        self._ious: list[float] = []
        """Of the objects whose polygons are not exact."""
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
        lines = []
        for one in instances_of(item):
            top, left, _, _ = one.mask.bounds()
            polygon = self._polygon(one.mask.crop())
            self._scores += one.score is not None
            corners = np.tile(polygon, (3, 1))[:3] if len(polygon) < 3 else polygon  # readers want three
            shares = (corners + np.array([left, top]) + _INTO_PIXEL) / (width, height)
            lines.append(" ".join([str(one.label - 1), *(f"{share:.6f}" for share in shares.ravel())]))
        with (self._root / "labels" / item.split / f"{name}.txt").open("x", encoding="ascii", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)
        self._void += int(item.count[VOID])
        self._pixels += item.label_map.size
        return Path("images", item.split, name + item.ending)

    def _polygon(self, mask: np.ndarray) -> np.ndarray:
        polygon = polygon_of(mask)
        if self._simplify_px:
            polygon = simplified(polygon, self._simplify_px)
        seen = filled(polygon, (mask.shape[0], mask.shape[1]))
        if not np.array_equal(seen, mask):
            self._ious.append(float((seen & mask).sum() / (seen | mask).sum()))
        return polygon

    def finish(self) -> list[Loss]:
        why = "objects in several parts, joined by lines" + (", and simplified outlines" if self._simplify_px else "")
        loss = f": their polygons have an IoU of {np.mean(self._ious):.4f}, at worst {min(self._ious):.4f}" if self._ious else ""
        return [
            Loss(self._void, f"void pixels ({self._void / max(self._pixels, 1):.2%} of all) cannot be written in YOLO labels"),
            Loss(len(self._ious), f"{why}{loss}"),
            Loss(self._scores, "scores of objects cannot be written in YOLO labels"),
        ]
