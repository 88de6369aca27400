"""Single stages from the command line: what they write is what --labels and --boxes take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsss.runtime.chain import Chain
from wsss.runtime.run.sources import LocalImages
from wsss.runtime.run.stages import write_stage
from wsss.store.local import read_label, read_records

from ...conftest import World

CLASSES = "red, green, blue"
Stage = Callable[..., Any]


@pytest.fixture
def stage(wsss: Any, world: World, photos: Path, tmp_path: Path) -> Stage:
    def run(name: str, *flags: str, out: str = "out.json") -> Any:
        answer = wsss("label", "photos", "--classes", CLASSES, "--bundle", world.bundle, "--stage", name, "--out", out, *flags)
        return answer if flags and answer.code else (answer, json.loads((tmp_path / out).read_text()))

    return run


def labels_of(store: Path) -> dict[str, np.ndarray]:
    return {record["path"]: read_label(store / "labels" / record["label"]) for record in read_records(store)}


def test_tags_are_what_labels_takes(stage: Stage, wsss: Any, world: World, tmp_path: Path) -> None:
    answer, tags = stage("tag")
    assert answer.code == 0 and answer.out == "out.json: 5 images, 0 failed\n"
    assert {name: sorted(each) for name, each in tags.items()} == {
        "black.png": [],
        "green.png": ["green"],
        "red.png": ["red"],
        "sub/three.png": ["blue", "green", "red"],
        "two.png": ["blue", "red"],
    }
    flags = ("--classes", CLASSES, "--bundle", world.bundle)
    assert wsss("label", "photos", *flags, "--out", "whole").code == 0
    assert wsss("label", "photos", *flags, "--out", "given", "--labels", "out.json").code == 0
    whole, given = labels_of(tmp_path / "whole"), labels_of(tmp_path / "given")
    assert all((whole[name] == given[name]).all() for name in whole)


@pytest.mark.parametrize("flags", [(), ("--coco",)])
def test_boxes_are_what_boxes_takes(stage: Stage, wsss: Any, world: World, tmp_path: Path, flags: tuple[str, ...]) -> None:
    answer, boxes = stage("detect", *flags)
    assert answer.code == 0 and answer.out == "out.json: 5 images (7 boxes), 0 failed\n"
    if flags:
        assert len(boxes["annotations"]) == 7 and [each["name"] for each in boxes["categories"]] == ["red", "green", "blue"]
        assert {each["file_name"]: (each["height"], each["width"]) for each in boxes["images"]}["two.png"] == (40, 60)
    else:
        assert {name: len(each) for name, each in boxes.items()} == {
            "black.png": 0,
            "green.png": 1,
            "red.png": 1,
            "sub/three.png": 3,
            "two.png": 2,
        }
    arguments = ("--classes", CLASSES, "--bundle", world.bundle)
    assert wsss("label", "photos", *arguments, "--out", "whole").code == 0
    assert wsss("label", "photos", *arguments, "--out", "given", "--boxes", "out.json").code == 0
    whole, given = labels_of(tmp_path / "whole"), labels_of(tmp_path / "given")
    assert all((whole[name] == given[name]).mean() > 0.99 for name in whole)


def test_later_models_are_not_opened(world: World, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wsss.spec import Bundle

    opened: list[str] = []
    open_model = Bundle.model
    monkeypatch.setattr(Bundle, "model", lambda self, name: opened.append(name) or open_model(self, name))
    for until, models in (("tag", {"clip"}), ("detect", {"clip", "grounding-dino"})):
        opened.clear()
        chain = Chain.open(world.bundle, classes=CLASSES, engine="ort", until=until)  # type: ignore[arg-type]
        assert chain.settings["models"].keys() == models
        done = write_stage(chain, LocalImages(photos), tmp_path / "out.json", until, batch=2)  # type: ignore[arg-type]
        assert done.images == 5


@pytest.mark.parametrize(("batch", "counts"), [(None, [3, 5]), (2, [2, 4, 5]), (9, [5])])
def test_images_are_read_a_batch_at_a_time(
    world: World, photos: Path, tmp_path: Path, batch: int | None, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once, a large folder would not fit into memory."""
    monkeypatch.setattr(Chain, "usual_batch", lambda self: 3)
    chain, done = Chain.open(world.bundle, classes=CLASSES, engine="ort", until="tag"), []
    write_stage(chain, LocalImages(photos), tmp_path / "x", "tag", batch=batch, progress=lambda it: done.append(it.images))
    assert done == counts


def test_an_image_that_fails_has_no_entry(stage: Stage, photos: Path, tmp_path: Path) -> None:
    (photos / "bad.png").write_bytes(b"no image")
    answer = stage("detect", "--limit", "3")
    assert answer.code == 1 and "out.json: 2 images (1 boxes), 1 failed" in answer.out and "bad.png" in answer.err
    assert list(json.loads((tmp_path / "out.json").read_text())) == ["black.png", "green.png"]


def test_a_run_that_is_stopped_leaves_the_file_before(world: World, photos: Path, tmp_path: Path) -> None:
    (out := tmp_path / "out.json").write_text("before")

    def stop(summary: object) -> None:
        raise KeyboardInterrupt

    chain = Chain.open(world.bundle, classes=CLASSES, engine="ort", until="tag")
    with pytest.raises(KeyboardInterrupt):
        write_stage(chain, LocalImages(photos), out, "tag", batch=2, progress=stop)
    assert out.read_text() == "before" and len(list(tmp_path.glob(".*.tmp"))) == 0


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("tag", ("--coco",), "--coco is for --stage detect"),
        ("tag", ("--no-gate",), "--stage tag: CLIP is not asked"),
        ("tag", ("--model", "segmenter"), "--stage tag: a segmenter has no such stage"),
        ("detect", ("--devices", "cpu,cpu"), "--devices cannot be used with --stage"),
        ("detect", ("--shard", "0/2"), "--shard cannot be used with --stage"),
        ("detect", ("--out", "photos"), "--out photos: --stage writes a JSON file"),
    ],
)
def test_flags_that_do_not_fit(stage: Stage, name: str, flags: tuple[str, ...], message: str) -> None:
    answer = stage(name, *flags)
    assert answer.code == 2 and message in answer.err and "hint:" in answer.err
