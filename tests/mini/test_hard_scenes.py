"""Hard scenes: repeatable, with exact truth, each with its difficulty."""

from __future__ import annotations

import numpy as np
import pytest

from wsss.mini.hard_scenes import KINDS, LOOK_ALIKES, Kind, draw_hard_scene
from wsss.mini.scenes import CLASSES, draw_scene

COUNT = 12


@pytest.mark.parametrize("kind", KINDS)
def test_a_scene_depends_on_its_kind_and_seed_alone(kind: Kind) -> None:
    one, again, other = draw_hard_scene(3, kind), draw_hard_scene(3, kind), draw_hard_scene(4, kind)
    assert np.array_equal(one.pixels, again.pixels) and np.array_equal(one.label, again.label)
    assert one.pixels.shape != other.pixels.shape or not np.array_equal(one.pixels, other.pixels)
    assert not np.array_equal(one.pixels, draw_scene(3, split="held-out").pixels)


@pytest.mark.parametrize("kind", KINDS)
def test_truth_is_that_of_the_objects(kind: Kind) -> None:
    for seed in range(COUNT):
        scene = draw_hard_scene(seed, kind)
        assert set(np.unique(scene.label)) - {0} == set(scene.labels.tolist())
        for row, (label, box) in enumerate(zip(scene.labels, scene.xyxy_image.astype(int), strict=True)):
            mask = scene.instance == row + 1
            assert (scene.label[mask] == label).all() and mask[box[1] : box[3], box[0] : box[2]].sum() == mask.sum() >= 80


def test_each_kind_has_its_difficulty() -> None:
    of = {kind: [draw_hard_scene(seed, kind) for seed in range(COUNT)] for kind in KINDS}
    assert not any(len(scene.labels) for scene in of["empty"])
    assert np.mean([len(scene.labels) for scene in of["crowd"]]) > 4
    assert all(len(set(scene.labels.tolist())) <= 2 for scene in of["crowd"])

    def share(kind: Kind) -> float:
        sides = [(scene.xyxy_image[:, 2:] - scene.xyxy_image[:, :2]).max(axis=1) / min(scene.label.shape) for scene in of[kind]]
        return float(np.concatenate(sides).mean())

    assert share("small") < 0.15 < 0.3 < share("overlap")
    ends = [
        (*scene.xyxy_image[:, :2].ravel(), *(scene.label.shape[::-1] - scene.xyxy_image[:, 2:]).ravel()) for scene in of["border"]
    ]
    assert sum(np.array(each).reshape(2, -1, 2).min(axis=(0, 2)).max(initial=0) == 0 for each in ends) >= COUNT - 2, (
        "cut by an edge"
    )

    def color(kind: Kind) -> float:
        grounds = [scene.pixels[scene.instance == 0].astype(int) for scene in of[kind]]
        return float(np.mean([np.ptp(pixels, axis=1).mean() for pixels in grounds]))

    assert color("grounds") > color("border") + 40 and color("shifted") > color("border") + 40


def test_look_alikes_are_of_no_class() -> None:
    looks, shapes = zip(*(name.split() for name in CLASSES), strict=True)
    assert not set(LOOK_ALIKES) & set(CLASSES)
    assert all(name.split()[0] in looks and name.split()[1] in shapes for name in LOOK_ALIKES)
