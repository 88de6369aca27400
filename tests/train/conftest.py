"""What the trainer's tests share: a small label store of drawn scenes, and settings that train on it in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsss.classes import named_list
from wsss.mini.scenes import CLASSES, draw_scene
from wsss.store.local import LabelStore

Tables = dict[str, Any]

TINY: Tables = {
    "seed": 3,
    "validation_steps": 4,
    "model": {"architecture": "unet", "encoder": "mobilenet_v2", "options": {"encoder_depth": 3, "decoder_channels": [16, 8, 8]}},
    "data": {"crop": 32, "batch": 4, "validation_share": 0.25, "jitter": [0.1, 0.1, 0.1, 0.05]},
    "optimizer": {"steps": 6, "rate": 0.01, "head_factor": 1, "average": 0.9},
    "machine": {"workers": 0, "checkpoint_seconds": 1000, "log_steps": 1, "device": "cpu"},
}
"""A network and a schedule that six steps of are done in two seconds on one core."""


def write_store(folder: Path, count: int = 8, size: tuple[int, int] = (48, 56)) -> tuple[Path, Path]:
    """A label store of drawn scenes with their true labels, and the folder of its images. One object's edge is void."""
    import hashlib

    images, store = folder / "images", folder / "store"
    images.mkdir(parents=True)
    with LabelStore(store, named_list("mini"), {"rules": "truth"}) as out:
        for number in range(count):
            scene = draw_scene(number, size=size)
            path = images / f"scene-{number:02d}.png"
            Image.fromarray(scene.pixels).save(path)
            label = scene.label.copy()
            label[:2] = 255
            boxes = [
                {
                    "label": CLASSES[each - 1],
                    "score": 0.5 + 0.05 * row,
                    "xyxy": xyxy,
                    "quality": 0.8,
                    "area_px": int((scene.instance == row + 1).sum()),
                    "won_px": int((scene.instance == row + 1).sum()),
                }
                for row, (each, xyxy) in enumerate(zip(scene.labels.tolist(), scene.xyxy_image.tolist(), strict=True))
            ]
            data = path.read_bytes()
            record = {
                "path": path.name,
                "label": f"{path.stem}.png",
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "height": size[0],
                "width": size[1],
                "classes": {box["label"]: 0.9 for box in boxes},
                "boxes": boxes,
                "void_px": int((label == 255).sum()),
                "seconds": {},
            }
            out.write(record, np.ascontiguousarray(label))
    return store, images


@pytest.fixture
def scenes(tmp_path: Path) -> tuple[Path, Path]:
    """A store of eight scenes, and its images."""
    return write_store(tmp_path)


@pytest.fixture
def edit_record(scenes: tuple[Path, Path]) -> Callable[[Callable[[dict[str, Any]], None]], None]:
    """Changes every line of the store's manifest."""
    import json

    def edit(change: Callable[[dict[str, Any]], None]) -> None:
        path = scenes[0] / "manifest.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            change(record)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))

    return edit
