"""Label maps from evidence are those of real runs with the same flags; the models run once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from wsss.batch import Photograph
from wsss.errors import WsssError
from wsss.mini.hard_scenes import Kind, draw_hard_scene
from wsss.runtime.chain import Chain, Rules
from wsss.runtime.tune.evidence import Evidence, Grid

if TYPE_CHECKING:
    from ...conftest import World

HARD: tuple[Kind, ...] = ("overlap", "look-alikes", "crowd", "shifted", "empty")
SCENES = {f"{kind}.png": draw_hard_scene(seed, kind) for seed, kind in enumerate(HARD)}
PHOTOGRAPHS = {name: Photograph(name=name, pixels=scene.pixels) for name, scene in SCENES.items()}
GRID = Grid(
    tag_threshold=(0.2, 0.9),
    box_threshold=(0.2, 0.5),
    nms=(0.4, 0.5),
    nms_across=(0.6, 0.8),
    margin=(0.0, 0.3),
    quality_exponent=(0.0,),
)


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    chain = Chain.open("mini", classes="mini")
    return Evidence(chain, list(SCENES), PHOTOGRAPHS.__getitem__, lambda name: SCENES[name].label, GRID)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"tag_threshold": 0.2, "score_rule": "mean", "box_threshold": 0.2, "margin": 0.3, "quality_exponent": 0.0},
        {"tag_threshold": 0.9, "nms": 0.4, "nms_across": 0.6, "enclosing": False, "margin": 0.0},
        {"tag_thresholds": {"yellow star": 0.05, "red disc": 0.99}},
    ],
)
def test_label_maps_are_those_of_a_real_run(evidence: Evidence, flags: dict[str, Any]) -> None:
    real = Chain.open("mini", classes="mini", rules=Rules(**flags)).pseudo_label(list(PHOTOGRAPHS.values())).label_maps
    rules = replace(evidence.rules, **flags)
    ours = [evidence.label_map(number, rules) for number in range(len(evidence))]
    assert [label_map.shape for label_map in ours] == [label_map.shape for label_map in real]
    apart = sum(int((one != other).sum()) for one, other in zip(ours, real, strict=True))
    assert apart <= 3, "but for pixels where a logit is 0 within rounding"
    assert sum(int((label_map > 0).sum()) for label_map in real) > 1000


def colors(world: World) -> tuple[dict[str, Photograph], dict[str, np.ndarray]]:
    photos = {
        "a.png": world.photo(32, 48, "a.png", red=(0, 0, 20, 20), blue=(24, 8, 48, 32)),
        "b.png": world.photo(48, 32, "b.png", green=(4, 4, 28, 40)),
        "c.png": world.photo(32, 48, "c.png"),
    }
    return photos, {name: np.zeros(photo.shape, np.uint8) for name, photo in photos.items()}


def test_the_models_run_once_for_each_set_of_classes(world: World) -> None:
    photos, truth = colors(world)
    chain = Chain.open(world.bundle, classes=world.classes)
    evidence = Evidence(chain, list(photos), photos.__getitem__, truth.__getitem__)
    graphs = [
        ("clip", "image"),
        ("grounding-dino", "image-32x48"),
        ("grounding-dino", "image-48x32"),
        ("sam", "encoder"),
        ("sam", "decoder"),
    ]
    calls = [world.rows(*graph) for graph in graphs]
    assert sum(calls[1]) == len([key for sample in evidence.samples[::2] for key in sample.found if any(key)])
    assert sum(calls[3]) == 2, "each photograph with a box is embedded once"
    for rules in (
        evidence.rules,
        *(replace(evidence.rules, nms=0.4, margin=margin, tag_threshold=0.05) for margin in (0.0, 0.3)),
    ):
        for number in range(3):
            assert evidence.label_map(number, rules).shape == photos[evidence.samples[number].name].shape
    assert [world.rows(*graph) for graph in graphs] == calls, "nothing ran again"
    evidence.label_map(0, replace(evidence.rules, tag_thresholds={"red": 1.0}))
    assert sum(world.rows("grounding-dino", "image-32x48")) == sum(calls[1]) + 1, "a set of classes that is not of the grid"


def test_given_labels_replace_the_tag_threshold(world: World, tmp_path: Path) -> None:
    photos, truth = colors(world)
    (tmp_path / "labels.json").write_text(json.dumps({"a.png": ["blue"], "b.png": [], "c.png": ["red"]}))
    chain = Chain.open(world.bundle, classes=world.classes, labels=tmp_path / "labels.json")
    evidence = Evidence(chain, list(photos), photos.__getitem__, truth.__getitem__)
    assert not evidence.tags
    assert np.unique(evidence.label_map(0, evidence.rules)).tolist() == [0, 3]
    assert not evidence.label_map(1, evidence.rules).any()
    assert evidence.present(evidence.rules).tolist() == [[False, False, True], [False] * 3, [True, False, False]]


def test_truth_of_another_size_is_refused(world: World) -> None:
    photos, truth = colors(world)
    chain = Chain.open(world.bundle, classes=world.classes)
    truth["b.png"] = truth["b.png"].T
    with pytest.raises(WsssError, match="b.png: is 32 x 48 pixels, its true label map 48 x 32"):
        Evidence(chain, list(photos), photos.__getitem__, truth.__getitem__)
