"""Self-training: rounds that continue where they were stopped, scored against the same labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from wsss.errors import UsageError, WsssError
from wsss.store.local import read_records
from wsss.train.apply.self_train import Round, self_train, side_by_side
from wsss.train.args import config_from
from wsss.train.checkpoint import read_tensors
from wsss.train.dataset.masks import ValidationSet
from wsss.train.dataset.survey import read_survey

from ..conftest import TINY, write_store

if TYPE_CHECKING:
    from ...conftest import Answer

Scenes = tuple[Path, Path]
CONFIG = config_from(TINY, {"optimizer": {"steps": 3}, "validation_steps": 3})


def test_rounds_learn_from_the_round_before(scenes: Scenes, tmp_path: Path) -> None:
    store, images = scenes
    out, said = tmp_path / "out", list[str]()
    first, second = self_train(store, images, out, CONFIG, rounds=2, log=said.append)
    assert (first.number, first.result.images, second.number, second.result.images) == (1, 6, 2, 6)
    assert first.labels == str(store) and second.labels == str(out / "round-1" / "labels")
    assert first.result.against == second.result.against == "the store's labels"
    held_out = {item.path for item in read_survey(out / "round-1" / "run" / "survey.json").split(0.25, 500)[1]}
    validated = read_survey(out / "round-2" / "run" / "validation.json").items
    assert {item.path for item in validated} == held_out and len(held_out) == 2
    labeled = {record["path"] for record in read_records(out / "round-1" / "labels")}
    assert len(labeled) == 6 and not labeled & held_out, "the images that were held out are in no round"
    assert any("round-1/labels: 6 labeled, 0 done before, 0 failed" in line for line in said)
    shown = side_by_side((first, second)).splitlines()
    assert shown[0].split() == ["IoU", "%", "round", "1", "round", "2"] and shown[-1].startswith("mean")
    assert len(shown) == 1 + 13 + 1
    written = json.loads((out / "rounds.json").read_text())
    assert [each["result"]["miou"] for each in written] == [first.result.miou, second.result.miou]


def stop_at(word: str, said: list[str]) -> Callable[[str], None]:
    def log(line: str) -> None:
        said.append(line)
        if word and word in line:
            raise KeyboardInterrupt

    return log


def test_stopped_anywhere_it_goes_on_to_the_same(scenes: Scenes, tmp_path: Path) -> None:
    config = config_from(TINY, {"optimizer": {"steps": 3}, "machine": {"checkpoint_seconds": 0}})
    whole = self_train(*scenes, tmp_path / "whole", config, rounds=2)
    out, said = tmp_path / "out", list[str]()
    for word in ("step 3: mIoU", "round-1/labels: ", "round 2 of 2", "step 3: mIoU"):
        with pytest.raises(KeyboardInterrupt):
            self_train(*scenes, out, config, rounds=2, log=stop_at(word, said))
    said.clear()
    found = self_train(*scenes, out, config, rounds=2, log=stop_at("", said))
    assert "continuing at step 2" in said and any("6 done before" in line for line in said)
    assert found[1].result.scores == whole[1].result.scores
    one, other = (read_tensors(each / "round-2" / "run" / "last.safetensors")[0] for each in (tmp_path / "whole", out))
    assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)
    third = self_train(*scenes, out, config, rounds=3)
    assert len(third) == 3 and third[1].result.scores == found[1].result.scores


def test_masks_and_true_labels(scenes: Scenes, tmp_path: Path) -> None:
    store, images = scenes
    classes = tuple(json.loads((store / "run.json").read_text())["classes"])
    true, photographs = write_store(tmp_path / "val", count=3)
    validation = ValidationSet(images=photographs, labels=true / "labels")
    given = {"rounds": 2, "classes": classes, "validation": validation}
    rounds = self_train(store / "labels", images, tmp_path / "out", CONFIG, **given)  # type: ignore[arg-type]
    assert [each.result.images for each in rounds] == [8, 8]
    assert {each.result.against for each in rounds} == {f"the true labels of {true / 'labels'}"}
    assert all(each.result.scores is not None for each in rounds)


def test_what_is_refused(scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "main.tex").touch()
    with pytest.raises(WsssError, match="the folder is not empty and has no rounds"):
        self_train(*scenes, tmp_path / "thesis", CONFIG, rounds=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--rounds runs in one process"):
        self_train(*scenes, tmp_path / "out", CONFIG, rounds=2)


def test_from_the_command_line(scenes: Scenes, wsss: Callable[..., Answer], tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(
        'validation_steps = 2\n[model]\narchitecture = "unet"\nencoder = "mobilenet_v2"\ninit = "none"\n'
        "options = { encoder_depth = 3, decoder_channels = [16, 8, 8] }\n"
        "[data]\ncrop = 32\nbatch = 4\nvalidation_share = 0.25\n[optimizer]\nsteps = 2\n[machine]\nworkers = 0\n"
    )
    flags = ["--images", scenes[1], "--out", "out", "--config", tmp_path / "tiny.toml", "--device", "cpu", "--rounds", "2"]
    answer = wsss("train", scenes[0], *flags)
    assert answer.code == 0, answer
    assert answer.out.startswith("out: 2 rounds, against the store's labels\n\nIoU %")
    assert answer.out.endswith("\npage: out/round-2/run/report.html\n")
    told = json.loads(wsss("train", scenes[0], *flags, "--json").out)
    assert [each["number"] for each in told["rounds"]] == [1, 2]


def test_without_a_score_there_is_no_table(scenes: Scenes, tmp_path: Path) -> None:
    config = config_from(TINY, {"optimizer": {"steps": 1}, "data": {"validation_share": 0.0}})
    rounds: tuple[Round, ...] = self_train(*scenes, tmp_path / "out", config, rounds=1)
    assert rounds[0].result.scores is None and side_by_side(rounds) == "no validation could score"
