"""``wsss tune`` and ``wsss calibrate``, and that ``wsss label`` reads what they write."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from ....conftest import Answer, World

Run = Callable[..., "Answer"]
COUNT = 10


@pytest.fixture
def labeled(world: World, tmp_path: Path) -> Path:
    """Photographs of a red and a green rectangle; the truth has the red one only, so that green boxes are wrong."""
    (tmp_path / "truth").mkdir()
    for number in range(COUNT):
        path = world.save(tmp_path / "photos" / f"{number}.png", 32, 48, red=(2, 2, 10 + number, 28), green=(30, 4, 44, 30))
        red = np.array(Image.open(path))[..., 0] > 0
        Image.fromarray(red.astype(np.uint8)).save(tmp_path / "truth" / path.name)
    (tmp_path / "labels.json").write_text(json.dumps({f"{number}.png": ["red"] for number in range(COUNT)}))
    script = world.engine("grounding-dino", "image-32x48").script

    def less_sure_of_green(feeds: Any) -> Any:
        out = script(feeds)
        out["logits"][:, 1] = np.where(out["logits"][:, 1] > 0, -0.2, -4)  # a score of 0.45
        return out

    world.engine("grounding-dino", "image-32x48").script = less_sure_of_green
    return tmp_path


def test_tune_writes_settings_that_label_reads(wsss: Run, world: World, labeled: Path) -> None:
    (labeled / "wsss.toml").write_text('# mine\n[label]\nmargin = 0.2  # old\nbatch = 2\n\n[eval]\nclasses = "red, green"\n')
    answer = wsss("tune", "photos", "truth", "--classes", "red, green", "--bundle", world.bundle)
    assert answer.code == 0, answer.err
    assert "10 photographs, " in answer.out and "score_rule box_threshold" in answer.out
    written = tomllib.loads((labeled / "wsss.toml").read_text())
    assert written["label"]["box-threshold"] > 0.45 and written["label"]["batch"] == 2
    assert written["label"]["margin"] == 0.1, "that of the run, not of an older file"
    assert written["eval"] == {"classes": "red, green"} and (labeled / "wsss.toml").read_text().startswith("# mine\n")
    assert wsss("label", "photos", "--classes", "red, green", "--bundle", world.bundle, "--out", "store").code == 0
    rules = json.loads((labeled / "store/run.json").read_text())["rules"]
    for flag, value in written["label"].items():
        assert flag == "batch" or rules[flag.replace("-", "_")] == value
    scores = json.loads(wsss("eval", "store", "truth", "--json").out)
    assert scores["miou"] > 0.95


def test_tune_tells_machines_the_scores_of_a_real_run(wsss: Run, world: World, labeled: Path) -> None:
    argv = ["--classes", "red, green", "--bundle", world.bundle]
    found = json.loads(wsss("tune", "photos", "truth", *argv, "--out", "best.toml", "--json").out)
    assert found["written"] == "best.toml" and found["held_out"]["low"] > 0.1
    assert not (labeled / "wsss.toml").exists()
    for name, flags in (("default_miou", ["default"]), ("miou", ["rules"])):
        rules = found[flags[0]]
        typed = [f"--{key.replace('_', '-')}={value}" for key, value in rules.items() if key != "enclosing"]
        typed.append("--enclosing" if rules["enclosing"] else "--no-enclosing")
        assert wsss("label", "photos", *argv, "--out", name, *typed).code == 0
        assert json.loads(wsss("eval", name, "truth", "--json").out)["miou"] == pytest.approx(found[name], abs=1e-4)


def test_tune_leaves_the_file_where_the_defaults_are_best(wsss: Run, world: World, labeled: Path) -> None:
    answer = wsss("tune", "photos", "truth", "--classes", "red", "--bundle", world.bundle)
    assert answer.code == 0, answer.err
    assert "Nothing was better than the defaults" in answer.out
    assert not (labeled / "wsss.toml").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["photos", "truth", "--folds", "11"], "--folds: expected 2 to 10, the number of photographs, got 11"),
        (["photos", "none"], "none: expected a folder of label maps, found nothing"),
        (["none", "truth"], "PHOTOS none: expected the folder of the photographs, found nothing"),
        (["photos", "high"], "label 3, the class list ends at 2"),
    ],
)
def test_tune_refuses(wsss: Run, world: World, labeled: Path, argv: list[str], message: str) -> None:
    (labeled / "high").mkdir()
    Image.fromarray(np.full((32, 48), 3, np.uint8)).save(labeled / "high" / "0.png")
    answer = wsss("tune", *argv, "--classes", "red, green", "--bundle", world.bundle)
    assert answer.code in (1, 2) and message in answer.err


@pytest.mark.parametrize("given", [["truth"], ["--labels", "labels.json"]])
def test_calibrate_writes_thresholds_that_label_reads(wsss: Run, world: World, labeled: Path, given: list[str]) -> None:
    """Green is in every photograph for CLIP, and in none for the truth."""
    argv = ["--classes", "red, green", "--bundle", world.bundle]
    answer = wsss("calibrate", "photos", *given, *argv, "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    thresholds = json.loads((labeled / "tag-thresholds.json").read_text())
    assert thresholds == found["thresholds"] and list(thresholds) == ["red", "green"]
    assert thresholds["green"] == 0.5, "a class without a photograph keeps the common threshold"
    assert (found["miou"] is None) == (given[0] != "truth")
    assert wsss("label", "photos", *argv, "--out", "store", "--tag-thresholds", "tag-thresholds.json").code == 0
    assert json.loads((labeled / "store/run.json").read_text())["rules"]["tag_thresholds"] == thresholds
    assert "macro f1" in wsss("calibrate", "photos", *given, *argv).out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["photos"], "expected TRUTH or --labels, one of them"),
        (["photos", "truth", "--labels", "labels.json"], "expected TRUTH or --labels, one of them"),
        (["photos", "--labels", "few.json"], "has no entry for 9 of 10 images"),
    ],
)
def test_calibrate_refuses(wsss: Run, world: World, labeled: Path, argv: list[str], message: str) -> None:
    (labeled / "few.json").write_text('{"0.png": ["red"]}')
    answer = wsss("calibrate", *argv, "--classes", "red, green", "--bundle", world.bundle)
    assert answer.code in (1, 2) and message in answer.err
