"""A training from several seeds: their scores side by side, each of them resumable."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from wsss.errors import WsssError
from wsss.train.apply.seeds import SEEDS, spread, train_seeds
from wsss.train.args import config_from
from wsss.train.loop import Result, train

from ..conftest import TINY

if TYPE_CHECKING:
    from ...conftest import Answer

Scenes = tuple[Path, Path]


def result(miou: float | None) -> Result:
    return Result(run="", images=1, steps=1, miou=miou, best_step=None, seconds=0, page="")


def test_each_seed_is_a_training_of_its_own(scenes: Scenes, tmp_path: Path) -> None:
    config = config_from(TINY, {"optimizer": {"steps": 2}})
    said: list[str] = []
    found = train_seeds(*scenes, tmp_path / "seeds", config, seeds=2, log=said.append)
    assert [path.name for path in sorted((tmp_path / "seeds").iterdir())] == ["seed-3", "seed-4", SEEDS]
    alone = train(*scenes, tmp_path / "alone", config_from(TINY, {"optimizer": {"steps": 2}, "seed": 4}))
    assert found[1].miou == alone.miou
    weights = [tmp_path / folder / "last.safetensors" for folder in ("seeds/seed-3", "seeds/seed-4", "alone")]
    assert weights[1].read_bytes()[-1000:] == weights[2].read_bytes()[-1000:] != weights[0].read_bytes()[-1000:]
    assert [each["miou"] for each in json.loads((tmp_path / "seeds" / SEEDS).read_text())] == [each.miou for each in found]
    train_seeds(*scenes, tmp_path / "seeds", config, seeds=2, log=said.append)
    assert f"{tmp_path / 'seeds' / 'seed-4'} is finished" in said
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(WsssError, match="the folder is not empty and has no seeds"):
        train_seeds(*scenes, tmp_path / "other", config, seeds=2, log=said.append)


def test_the_spread_of_scores() -> None:
    assert spread([result(0.5), result(0.6), result(0.7)]) == "mIoU 0.6000 +- 0.1000 (0.5000 to 0.7000) over 3 seeds"
    assert spread([result(0.5), result(None)]) == "1 of 2 seeds have no score: no validation could score"


def test_from_the_command_line(scenes: Scenes, wsss: Callable[..., Answer], tmp_path: Path) -> None:
    scenes_of = scenes[0], "--images", scenes[1]
    mixed = wsss("train", *scenes_of, "--out", "out", "--rounds", "2", "--seeds", "2")
    assert mixed.code == 2 and "--rounds and --seeds: give one of them" in mixed.err
    (tmp_path / "tiny.toml").write_text(
        'validation_steps = 9\n[model]\narchitecture = "unet"\nencoder = "mobilenet_v2"\n'
        "options = { encoder_depth = 3, decoder_channels = [16, 8, 8] }\n[data]\ncrop = 32\nbatch = 4\n"
        'validation_share = 0.25\n[machine]\nworkers = 0\ndevice = "cpu"\n'
    )
    answer = wsss("train", *scenes_of, "--out", "out", "--seeds", "2", "--config", "tiny.toml", "--init", "none", "--steps", "1")
    assert answer.code == 0, answer
    assert re.fullmatch(r"out: mIoU 0\.\d{4} \+- 0\.\d{4} \(.*\) over 2 seeds, against the store's labels\n", answer.out)
