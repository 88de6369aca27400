"""Writes Hugging Face's ``imagefolder``: ``load_dataset("imagefolder", data_dir=OUT)`` gives ``image``, ``mask`` and more.

    train/metadata.jsonl      one line for each image: file_name, mask_file_name, path, objects
    train/images/NAME.jpg     the photographs as they are
    train/masks/NAME.png      8-bit palette: 0 background, 1..C classes, 255 void
    README.md                 the splits, given explicitly: datasets would guess them from folder names such as ``test``
    classes.json              names by label

Lossless: ``objects`` has the boxes of the store: category (name), bbox (x, y, width, height in pixels), score, quality, and
rle: SAM's mask of the box at the image's size, the counts of COCO's compressed RLE; empty where the store has none.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

from ...batch import VOID
from .base import Loss, save_indexed
from .labeled import Labeled, void_name


class HuggingFaceWriter:
    """Writes an imagefolder."""

    def __init__(self, root: Path, classes: tuple[str, ...], splits: tuple[str, ...], files: ExitStack) -> None:
        self._root, self._classes = root, classes
        for split in splits:
            (root / split).mkdir()
        self._lines = {
            split: files.enter_context((root / split / "metadata.jsonl").open("w", encoding="utf-8", newline="\n"))
            for split in splits
        }
        names = {0: "background", **dict(enumerate(classes, 1)), VOID: void_name(classes)}
        (root / "classes.json").write_text(json.dumps(names, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        table = "\n".join(f"| {label} | {_cell(name)} |" for label, name in names.items())
        split_files = "\n".join(f'  - split: {split}\n    path: "{split}/**"' for split in splits)
        (root / "README.md").write_text(_README.format(splits=split_files, table=table), encoding="utf-8")

    def add(self, item: Labeled) -> Path:
        name = item.name(flat=False)
        save_indexed(self._root / item.split / "masks" / f"{name}.png", item.label_map)
        boxes = [(box, *box.xyxy_image) for box in item.boxes]
        line = {
            "file_name": f"images/{name}{item.ending}",
            "mask_file_name": f"masks/{name}.png",
            "path": item.path.encode("utf-8", "surrogateescape").decode("utf-8", "replace"),
            "objects": {
                "category": [self._classes[box.label - 1] for box, *_ in boxes],
                "bbox": [[x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)] for _, x0, y0, x1, y1 in boxes],
                "score": [box.score for box, *_ in boxes],
                "quality": [box.quality for box, *_ in boxes],
                "rle": ["" if item.masks is None else item.mask(box).counts() for box, *_ in boxes],
            },
        }
        self._lines[item.split].write(json.dumps(line, ensure_ascii=False) + "\n")
        return Path(item.split, "images", name + item.ending)

    def finish(self) -> list[Loss]:
        return []


def _cell(name: str) -> str:
    return name.replace("|", "\\|")


_README = """---
task_categories:
- image-segmentation
configs:
- config_name: default
  drop_labels: true
  data_files:
{splits}
---

Pseudo-labels made with wsss, not drawn by people. The values of a mask's pixels are

| label | class |
|---|---|
{table}
"""
