"""A store of awkward images, and what is read back from its conversions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from wsss.runtime.convert.labeled import original_path
from wsss.store.local import read_label, read_records

if TYPE_CHECKING:
    pass

CLASSES = ("dog", "potted plant", 'a "q" & <b>')
TURNED = "turned.jpg"
NAMES = (
    "a b/my dog.jpg",
    "a b/sub/my dog.jpg",
    "case/Dog.jpg",
    "case/dog.jpg",
    "dog.jpg",
    "dog.png",
    "empty.jpg",
    "#list 100%.jpg",
    "line\nbreak.jpg",
    "one.png",
    "test/__x/näher 日本.webp",
    "quo\"te's.JPG",
    TURNED,
)
"""What tools trip over: folders, blanks, signs, equal stems, one pixel, a name that means a split elsewhere."""


def scene(shape: tuple[int, int], random: np.random.Generator) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """A ring with a spot in it, two objects of a class side by side, ragged regions without a box, and void."""
    label_map = np.zeros(shape, np.uint8)
    label_map[2:14, 3:20] = 1
    label_map[4:12, 6:18] = 0
    label_map[7:9, 9:12] = 1
    label_map[16:28, 4:40] = 2
    label_map[20:21, 10:30] = 255
    label_map[random.random(shape) < 0.03] = 3
    label_map[0, 0] = 3
    label_map[-1, -1] = 255 if label_map.size > 1 else 3
    common: dict[str, Any] = {"quality": 0.75, "area_px": 9, "won_px": 9}
    boxes = [
        {"label": "dog", "score": 0.9, "xyxy": [3.25, 2.0, 20.0, 14.0], **common},
        {"label": "potted plant", "score": 0.5, "xyxy": [4.0, 16.0, 22.5, 28.0], **common},
        {"label": "potted plant", "score": 0.25, "xyxy": [20.0, 16.0, 40.0, 28.0], **common},
        {"label": "dog", "score": 0.2, "xyxy": [30.0, 2.0, 44.0, 9.0], **common, "won_px": 0},
    ]
    return label_map, boxes if label_map.size > 1 else []


def truth(made: Path) -> dict[str, np.ndarray]:
    """Label maps by the path of their photograph."""
    return {
        record["path"]: read_label(made / "store" / "labels" / record["label"])
        for record in read_records(made / "store")
        if "error" not in record
    }


def check_maps(found: dict[str, np.ndarray], made: Path, *, void: bool = True) -> None:
    """Every photograph has its own label map, pixel for pixel; ``void`` false: with background for void."""
    expected = truth(made)
    assert found.keys() == expected.keys()
    for path, label_map in expected.items():
        if not void:
            label_map = np.where(label_map == 255, 0, label_map)
        assert np.array_equal(found[path], label_map), path


def paint(shape: tuple[int, int], masks: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """Masks that must not overlap, as a label map."""
    label_map = np.zeros(shape, np.uint8)
    for label, mask in masks:
        assert not label_map[mask].any(), "a pixel in two objects"
        label_map[mask] = label
    return label_map


def photos_below(folder: Path) -> dict[str, Path]:
    """The photographs of a converted data set by their original path."""
    return {original_path(path.relative_to(folder).as_posix()): path for path in folder.rglob("*") if path.is_file()}


def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
