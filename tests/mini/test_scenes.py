"""Drawn scenes: exact truth, the same on every machine, and the variety that small models need to learn from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsss.mini.scenes import BACKGROUNDS, CLASSES, draw_scene, write_scenes

SCENES = [draw_scene(seed, split="held-out") for seed in range(60)]


def test_same_seed_same_scene() -> None:
    one, two = draw_scene(7), draw_scene(7)
    np.testing.assert_array_equal(one.pixels, two.pixels)
    np.testing.assert_array_equal(one.label, two.label)


def test_splits_do_not_meet() -> None:
    train = {hashlib.sha256(draw_scene(seed, split="train").pixels.tobytes()).digest() for seed in range(10)}
    held_out = {hashlib.sha256(scene.pixels.tobytes()).digest() for scene in SCENES[:10]}
    assert not train & held_out


def test_truth_agrees_with_itself() -> None:
    for scene in SCENES:
        assert scene.pixels.shape == (*scene.label.shape, 3) and scene.pixels.dtype == np.uint8
        assert set(np.unique(scene.instance)) <= set(range(len(scene.labels) + 1))
        for number, (label, box) in enumerate(zip(scene.labels, scene.xyxy_image, strict=True), 1):
            rows, columns = np.nonzero(scene.instance == number)
            assert len(rows) >= 80, "an object that nobody can see is in the truth"
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert (scene.label[rows, columns] == label).all()
        assert ((scene.label > 0) == (scene.instance > 0)).all()


def test_variety() -> None:
    assert len(CLASSES) >= 10 and len(set(CLASSES) | set(BACKGROUNDS)) == len(CLASSES) + len(BACKGROUNDS)
    counts = {len(scene.labels) for scene in SCENES}
    sides = [side for scene in SCENES for side in scene.label.shape]
    assert min(counts) == 0 and max(counts) == 5
    assert min(sides) >= 160 and max(sides) <= 640
    assert len({round(scene.label.shape[1] / scene.label.shape[0], 1) for scene in SCENES}) >= 4
    assert any(scene.distractors for scene in SCENES)
    assert {label for scene in SCENES for label in scene.labels.tolist()} == set(range(1, len(CLASSES) + 1))


@pytest.mark.parametrize("count", [1, 3])
def test_written_scenes_are_what_was_drawn(tmp_path: Path, count: int) -> None:
    paths = write_scenes(tmp_path, count, seed=4)
    labels = json.loads((tmp_path / "labels.json").read_text())
    assert [path.name for path in paths] == list(labels)
    for number, path in enumerate(paths):
        scene = draw_scene(4 + number, split="held-out")
        with Image.open(tmp_path / "truth" / f"{path.stem}.png") as truth, Image.open(path) as photo:
            assert truth.mode == "P" and photo.format == "JPEG"
            np.testing.assert_array_equal(np.array(truth), scene.label)
        assert sorted(labels[path.name]) == sorted({CLASSES[label - 1] for label in scene.labels})
