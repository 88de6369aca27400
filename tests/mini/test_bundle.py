"""The bundle `mini` as it is shipped: small, whole, and good at what it was trained for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from wsss.batch import Photograph
from wsss.errors import WsssWarning
from wsss.export.mini import (
    build_clip_mini,
    build_grounding_dino_mini,
    build_sam_mini,
    clip_mini_tokenizer,
    grounding_dino_mini_tokenizer,
)
from wsss.mini.scenes import CLASSES, draw_scene
from wsss.runtime.bundles import MINI
from wsss.runtime.chain import Chain, Rules
from wsss.spec import MODELS, open_bundle
from wsss.train.evaluate.metrics import confusion_matrix, label_scores, mean_iou

SCENES = [draw_scene(3_000_000 + number, split="held-out") for number in range(24)]
PHOTOGRAPHS = [Photograph(name=f"{number}.png", pixels=scene.pixels) for number, scene in enumerate(SCENES)]


def test_size_and_proof() -> None:
    assert sum(path.stat().st_size for path in MINI.rglob("*") if path.is_file()) <= 12 * 2**20
    bundle = open_bundle(MINI)
    assert bundle.models() == sorted(MODELS)
    for name in MODELS:
        model = bundle.model(name)  # every file is hashed
        for graph, spec in model.manifest.graphs.items():
            assert spec.parity is not None and spec.parity.rows, f"{name}/{graph} was never proven"


def test_manifest_names_no_machine() -> None:
    for path in MINI.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert str(Path.home()).encode() not in data and str(MINI.parents[1]).encode() not in data, path


def test_its_tokenizers_are_those_of_the_definitions() -> None:
    for name, tokenizer in (("clip", clip_mini_tokenizer()), ("grounding-dino", grounding_dino_mini_tokenizer())):
        assert json.loads(tokenizer.to_str()) == json.loads((MINI / name / "tokenizer.json").read_text(encoding="utf-8")), name


@pytest.mark.parametrize(
    ("build", "parameters"),
    [(build_clip_mini, 1_447_897), (build_grounding_dino_mini, 1_951_212), (build_sam_mini, 806_722)],
)
def test_the_definitions_are_those_of_the_trained_weights(build: Callable[[], nn.Module], parameters: int) -> None:
    """Counts of the models that were trained for the bundle: another depth or width has another one."""
    assert sum(parameter.numel() for parameter in build().parameters()) == parameters


def test_chain_labels_scenes() -> None:
    """Twenty-four scenes are a smoke alarm; `benchmarks/results/mini-quality.json` has the measurement on 200."""
    result = Chain.open("mini", classes="mini").pseudo_label(PHOTOGRAPHS)
    matrix = sum(confusion_matrix(s.label, m, len(CLASSES) + 1) for s, m in zip(SCENES, result.label_maps, strict=True))
    there = np.array([np.isin(np.arange(1, len(CLASSES) + 1), scene.labels) for scene in SCENES])
    assert mean_iou(np.asarray(matrix)) > 0.75
    assert label_scores(there, result.labels.present)["f1"] > 0.85


@pytest.mark.parametrize("gate", [True, False])
def test_row_does_not_see_its_neighbors(gate: bool) -> None:
    labeler = Chain.open("mini", classes="mini", rules=Rules(gate=gate))
    together = labeler.pseudo_label(PHOTOGRAPHS[:8]).label_maps
    for photo, label_map in zip(PHOTOGRAPHS[:8], together, strict=True):
        alone = labeler.pseudo_label([photo]).label_maps[0]
        assert (alone != label_map).mean() <= 1e-3, "a photograph's label depends on what it was batched with"


def test_unknown_words_do_no_harm() -> None:
    """Words that the small models never saw go through every stage all the same."""
    with pytest.warns(WsssWarning, match="know only red disc, .*; none of the 2 classes is among them"):
        labeler = Chain.open("mini", classes="aeroplane, sheep")
    result = labeler.pseudo_label(PHOTOGRAPHS[:4])
    assert all(map_.shape == scene.label.shape for map_, scene in zip(result.label_maps, SCENES[:4], strict=True))
