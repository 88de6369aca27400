"""A training of EoMT: its attention masks follow from the step, also after a stop, in validation and for a stopped run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from wsss.errors import WeightsError, WsssError
from wsss.train import loop
from wsss.train.args import Config, config_from, typed
from wsss.train.checkpoint import BEST, LAST, load_run, read_tensors
from wsss.train.loop import Result, Status, train
from wsss.train.networks.eomt import masked_share

from ..conftest import TINY, write_store

QUERIES, STEPS, STOP = 10, 8, 5
EOMT = {
    "architecture": "eomt",
    "encoder": "vit_small_patch16_dinov3",
    "options": {"depth": 3, "embed_dim": 48, "num_heads": 3, "queries": QUERIES, "blocks": 2, "img_size": 32},
}
Scenes = tuple[Path, Path]


class Stopped(Exception):
    pass


def settings(*assignments: str) -> Config:
    optimizer = {
        **TINY["optimizer"],
        "kind": "adamw",
        "steps": STEPS,
        "rate": 1e-3,
        "warm_up": 1,
        "encoder_warm_up": 1,
        "power": 0,
    }
    machine = {**TINY["machine"], "checkpoint_seconds": 0}
    tables = {**TINY, "validation_steps": 2, "model": EOMT, "loss": {"kind": "masks"}, "optimizer": optimizer, "machine": machine}
    return config_from(tables, *map(typed, assignments))


def masked_at(step: int) -> list[int]:
    return [round(QUERIES * masked_share(step / STEPS, start, start + 0.25)) for start in (0.25, 0.5)]


@dataclass
class Trained:
    """A run without a stop, one that was stopped and continued, and a copy of it as it was then."""

    scenes: Scenes
    whole: Path
    parts: Path
    stopped: Path
    result: Result


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """Validations without masks give no score, so that the best weights are of a step with masks."""
    folder = tmp_path_factory.mktemp("eomt")
    scenes = write_store(folder)

    def validate(segmenter: Any, *rest: Any, real: Any = loop.validate) -> float | None:
        return real(segmenter, *rest) if any(segmenter.network.masked) else None

    def watch(status: Status) -> None:
        if status.step == STOP:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "validate", validate)
        result = train(*scenes, folder / "whole", settings())
        with pytest.raises(Stopped):
            train(*scenes, folder / "parts", settings(), watch=watch)
        shutil.copytree(folder / "parts", folder / "stopped")
        train(*scenes, folder / "parts", settings())
    yield Trained(scenes, folder / "whole", folder / "parts", folder / "stopped", result)


def test_stopped_and_continued_it_ends_with_the_same_weights(trained: Trained) -> None:
    assert masked_at(STOP - 1) == [0, 10] != masked_at(STOP), "it stops where masks change"
    for name in (BEST, LAST):
        one, other = (read_tensors(folder / name) for folder in (trained.whole, trained.parts))
        assert one[0].keys() == other[0].keys() and not [key for key in one[0] if "probability" in key]
        assert not [key for key in one[0] if not torch.equal(one[0][key], other[0][key])]
        assert one[1]["step"] == other[1]["step"]


def test_a_stopped_run_has_the_masks_of_its_weights(trained: Trained) -> None:
    assert load_run(trained.stopped, "last")[0].network.masked == masked_at(STOP - 1)
    best = read_tensors(trained.stopped / BEST)[1]["step"]
    assert load_run(trained.stopped)[0].network.masked == masked_at(best)
    assert load_run(trained.whole, "last")[0].network.masked == [0, 0]


def test_the_best_weights_score_as_in_their_validation(trained: Trained) -> None:
    """The page scores the weights that `load_run` returns."""
    result = trained.result
    assert result.best_step in (2, 4) and result.scores is not None and result.scores["miou"] == result.miou


def test_it_is_not_continued_to_more_steps(trained: Trained) -> None:
    """Even where the rate is constant: its masks would have ended later."""
    with pytest.raises(WsssError, match=r"this run has 9: its attention masks end at shares of the steps") as caught:
        train(*trained.scenes, trained.whole, settings("optimizer.steps=9"))
    assert f"--init {trained.whole}" in (caught.value.hint or "")


def test_weights_of_no_step_of_the_run(trained: Trained) -> None:
    record = trained.stopped / "segmenter.json"
    text = record.read_text()
    record.write_text(json.dumps({**json.loads(text), "steps": 1}))
    try:
        with pytest.raises(WeightsError, match="damaged: expected a step of 1, got"):
            load_run(trained.stopped)
    finally:
        record.write_text(text)
