"""``wsss train`` from the outside: flags, configuration files, messages, and several processes as torchrun starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from wsss.extras import install_line
from wsss.train.curve import read_curve

if TYPE_CHECKING:
    from ..conftest import Answer

    Run = Callable[..., Answer]
Scenes = tuple[Path, Path]

TOML = """
seed = 3
validation_steps = 100
[model]
architecture = "unet"
encoder = "mobilenet_v2"
options = { encoder_depth = 3, decoder_channels = [16, 8, 8] }
init = "none"
batch_norm = "frozen"
[data]
crop = 32
batch = 4
[optimizer]
rate = 0.01
head_factor = 1
[machine]
workers = 0
log_steps = 1
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "tiny.toml").write_text(TOML)
    return tmp_path / "tiny.toml"


def test_train_from_the_command_line(wsss: Run, scenes: Scenes, config: Path) -> None:
    flags = ["--images", scenes[1], "--out", "run", "--config", config, "--steps", "2", "--device", "cpu"]
    answer = wsss("train", scenes[0], *flags, "--set", "data.validation_share=0")
    assert answer.code == 0, answer
    assert answer.out.startswith("run: 2 steps on 8 images in 0:") and answer.out.endswith("\npage: run/report.html\n")
    assert "step 2/2  loss " in answer.err and "8 images to train on, 0 to validate" in answer.err
    again = wsss("train", scenes[0], *flags, "--set", "data.validation_share=0", "--json")
    assert "run is finished" in again.err
    told = json.loads(again.out)
    assert (told["run"], told["steps"], told["images"], told["miou"]) == ("run", 2, 8, None)


def test_masks_and_true_labels(wsss: Run, scenes: Scenes, config: Path) -> None:
    masks, flags = scenes[0] / "labels", ["--out", "run", "--config", config, "--steps", "1", "--device", "cpu"]
    given = [masks, "--images", scenes[1], "--classes", "mini", "--val", scenes[1], masks]
    answer = wsss("train", *given, *flags)
    assert answer.code == 0, answer
    assert f"against the true labels of {masks}\n\n" in answer.out and "\nred disc " in answer.out
    told = json.loads(wsss("train", *given, *flags, "--json").out)
    assert told["against"] == f"the true labels of {masks}" and len(told["scores"]["classes"]) == 13


def test_the_photographs_of_vocs_layout_are_found(wsss: Run, scenes: Scenes, config: Path, tmp_path: Path) -> None:
    voc = tmp_path / "VOC2012"
    voc.mkdir()
    (voc / "JPEGImages").symlink_to(scenes[1])
    (voc / "SegmentationClassAug").symlink_to(scenes[0] / "labels")
    (tmp_path / "list.txt").write_text("scene-00\nscene-01\nscene-02\nscene-03\n")
    for number, store in enumerate((voc, voc / "SegmentationClassAug")):
        flags = ["--classes", "mini", "--out", f"run-{number}", "--config", config, "--steps", "1", "--device", "cpu"]
        answer = wsss("train", store, *flags, "--list", tmp_path / "list.txt", "--set", "data.validation_share=0")
        assert answer.code == 0 and "4 images to train on, 0 to validate" in answer.err, answer


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ([], 2, "labels: expected a label store (with run.json), or --images for a folder of masks"),
        (["--images", "IMAGES"], 2, "labels: expected a label store (with run.json), or --classes for a folder of masks"),
        (["--images", "none", "--classes", "mini"], 1, "--images none: expected the folder of the photographs, found nothing"),
        (["--images", "IMAGES", "--classes", "dog"], 1, "the class list ends at 1"),
        (["--images", "IMAGES", "--classes", "mini", "--list", "none"], 1, "--list none: cannot be read"),
        (["--images", "IMAGES", "--classes", "mini", "--val", "IMAGES", "none"], 1, "none: expected a folder of label maps"),
        (["--images", "IMAGES", "--classes", "mini", "--val", "none", "MASKS"], 1, "--val none: expected the folder of the"),
        (["--images", "IMAGES", "--val-list", "x"], 2, "--val-list chooses masks of --val"),
        (["--images", "IMAGES", "--rounds", "0"], 2, "Invalid value for '--rounds'"),
    ],
)
def test_mistakes_with_masks(wsss: Run, scenes: Scenes, flags: list[str], code: int, message: str) -> None:
    masks = scenes[0] / "labels"
    answer = wsss("train", masks, "--out", "run", *({"IMAGES": scenes[1], "MASKS": masks}.get(flag, flag) for flag in flags))
    assert answer.code == code and answer.out == "" and "Traceback" not in answer.err
    assert message in answer.err


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ([], 2, "Missing argument 'STORE'"),
        (["store"], 2, "Missing option '--out'"),
        (["store", "--images", "x"], 2, "Missing option '--out'"),
        (["store", "--images", "x", "--out", "run", "--preset", "minni"], 2, "'minni' is not one of 'deeplabv2-voc'"),
        (
            ["store", "--images", "x", "--out", "run", "--config", "none.toml"],
            2,
            "--config none.toml: cannot be read: No such",
        ),
        (["store", "--images", "x", "--out", "run", "--crop", "8"], 2, "data.crop: expected at least 16, got 8"),
        (["store", "--images", "x", "--out", "run", "--precision", "int8"], 2, "'int8' is not one of 'fp32'"),
        (["store", "--images", "x", "--out", "run", "--set", "data.corp=8"], 2, "did you mean data.crop?"),
        (["nowhere", "--images", "x", "--out", "run"], 1, "nowhere: expected a label store"),
    ],
)
def test_mistakes_are_one_message(wsss: Run, argv: list[str], code: int, message: str) -> None:
    answer = wsss("train", *argv)
    assert answer.code == code and answer.out == ""
    assert message in answer.err and "Traceback" not in answer.err


def test_a_missing_extra_says_what_to_install(wsss: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("wsss.train.") and "evaluate" not in name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    answer = wsss("train", "store", "--images", "x", "--out", "run")
    assert answer.code == 1 and f"hint: {install_line('train')}" in answer.err


def test_two_processes_follow_the_curve_of_one(scenes: Scenes, config: Path, tmp_path: Path) -> None:
    """20 steps in float32 on the CPU, the same global batch, batch statistics frozen; gloo, as torchrun starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(out: str, **world: str) -> subprocess.Popen[str]:
        flags = ["--images", scenes[1], "--out", tmp_path / out, "--config", config, "--steps", "20", "--device", "cpu"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **world}
        command = [sys.executable, "-m", "wsss", "train", scenes[0], *flags]
        return subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.PIPE, text=True)

    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    started = [start("one"), *(start("two", RANK=rank, LOCAL_RANK=rank, **meeting) for rank in ("0", "1"))]
    for each in started:
        _, said = each.communicate(timeout=300)
        assert each.returncode == 0, said
    one, two = ([point["loss"] for point in read_curve(tmp_path / out) if "loss" in point] for out in ("one", "two"))
    assert len(one) == len(two) == 20
    assert two == pytest.approx(one, abs=1e-4)
    assert one[-1] < 0.9 * one[0], "something was learned on the way"
    assert [p["miou"] for p in read_curve(tmp_path / "one") if "miou" in p] == pytest.approx(
        [p["miou"] for p in read_curve(tmp_path / "two") if "miou" in p], abs=1e-2
    )
