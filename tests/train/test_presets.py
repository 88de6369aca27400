"""docs/presets.md is true: its tables name what is built, and every difference from a source has its reason."""

from __future__ import annotations

import torch

from wsss.train.args import config_from, typed
from wsss.train.checkpoint import load_run
from wsss.train.loop import train
from wsss.train.model import build_from

from pathlib import Path

from .conftest import TINY

Scenes = tuple[Path, Path]


def test_fixed_batch_norms_stay_as_they_are(scenes: Scenes, tmp_path: Path) -> None:
    """Statistics, scale and shift; the convolutions learn."""
    changes = ["model.batch_norm=fixed", "optimizer.steps=2", "optimizer.average=0", "validation_steps=9"]
    config = config_from(TINY, *map(typed, changes))
    train(*scenes, tmp_path / "run", config)
    start = build_from(config.model, 12 + 1, config.seed).network
    norms = {name for name, module in start.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    after = load_run(tmp_path / "run", "last")[0].network.state_dict()
    changed = {name for name, value in start.state_dict().items() if not torch.equal(value, after[name])}
    assert len(norms) > 10 and not [name for name in changed if name.rpartition(".")[0] in norms]
    assert {"encoder.features.0.0.weight", "segmentation_head.0.weight"} <= changed
