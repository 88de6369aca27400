"""Each option of `wsss label` changes the labels it is there to change; `run.json` is not asked. Defaults are pinned."""

from __future__ import annotations

import dataclasses
import inspect
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from wsss.cli.label import label as label_command
from wsss.engines.fake import FakeEngine
from wsss.rle import MaskRuns
from wsss.runtime import detect, fuse, segment, tag
from wsss.runtime.chain import Chain, Rules
from wsss.runtime.run import label_folder as run
from wsss.store.local import read_confidence, read_label_and_masks, read_records

from ..conftest import COLORS, SCRIPTS, WORDS, write_model

if TYPE_CHECKING:
    from wsss.spec import Model

    from ..conftest import Answer, World

    Run = Callable[..., Answer]

Found = tuple[str, float, tuple[float, float, float, float]]
"""Class, score, and box in pixels of the photograph."""


@pytest.fixture
def label(wsss: Run, world: World, tmp_path: Path) -> Callable[..., dict[str, np.ndarray]]:
    """Runs `wsss label photos` with these flags into a store; its label maps by name."""

    def labels(*flags: str | Path, store: str = "store", code: int = 0) -> dict[str, np.ndarray]:
        given = [] if "--classes" in flags else ["--classes", "red, green, blue"]
        answer = wsss("label", "photos", *given, "--bundle", world.bundle, "--out", store, *flags)
        assert answer.code == code, answer.err
        folder = tmp_path / store / "labels"
        return {path.stem: np.array(Image.open(path)) for path in sorted(folder.rglob("*.png"))}

    return labels


Label = Callable[..., dict[str, np.ndarray]]


def find(world: World, *found: Found, size: tuple[int, int] = (32, 48)) -> None:
    """Scripts the detector's answer for every photograph of this (height, width), up to three boxes."""

    def script(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows, tokens = feeds["phrase"].shape
        logits, boxes = np.full((rows, 3, tokens), -20, np.float32), np.full((rows, 3, 4), 0.5, np.float32)
        for row in range(rows):
            for query, (name, score, (x0, y0, x1, y1)) in enumerate(found):
                logits[row, query] += feeds["text"][row, :, WORDS[name]] * (20 + np.log(score / (1 - score)))
                boxes[row, query] = np.array([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]) / (size[::-1] * 2)
        return {"logits": logits, "boxes": boxes, "query": np.tile(np.arange(3), (rows, 1))}

    world.engine("grounding-dino", "image-32x48").script = script


def values(label_map: np.ndarray) -> list[int]:
    return np.unique(label_map).tolist()


# ---- thresholds ----


@pytest.mark.parametrize(
    ("bundled", "flags", "labels"),
    [
        (0.5, [], [0, 1]),
        (1.0, [], [0]),  # without the flag, the bundle's
        (0.5, ["--tag-threshold", "1"], [0]),
        (1.0, ["--tag-threshold", "0.5"], [0, 1]),
        (1.0, ["--tag-threshold", "0"], [0, 1]),  # zero is a threshold, not the absence of one
    ],
)
def test_tag_threshold(world: World, label: Label, tmp_path: Path, bundled: float, flags: list[str], labels: list[int]) -> None:
    write_model(world.bundle / "clip", "clip", {"threshold": bundled})
    world.save(tmp_path / "photos" / "a.png", 32, 48, red=(4, 4, 24, 24))
    assert values(label(*flags)["a"]) == labels


@pytest.mark.parametrize(
    ("bundled", "flags", "labels"),
    [
        (0.3, [], [0, 1]),
        (0.8, [], [0]),
        (0.3, ["--box-threshold", "0.8"], [0]),
        (0.8, ["--box-threshold", "0.3"], [0, 1]),
        (0.8, ["--box-threshold", "0.65"], [0, 1]),
        (0.8, ["--box-threshold", "0.75"], [0]),
        (0.8, ["--box-threshold", "0"], [0, 1]),
    ],
)
def test_box_threshold(world: World, label: Label, tmp_path: Path, bundled: float, flags: list[str], labels: list[int]) -> None:
    write_model(world.bundle / "grounding-dino", "grounding-dino", {"box_threshold": bundled})
    world.save(tmp_path / "photos" / "a.png", 32, 48, red=(4, 4, 24, 24))
    find(world, ("red", 0.7, (4, 4, 24, 24)))
    assert values(label(*flags)["a"]) == labels


def test_tag_thresholds(world: World, label: Label, tmp_path: Path) -> None:
    """Red and blue are certain; a threshold of 1 is above both."""
    world.save(tmp_path / "photos" / "a.png", 32, 48, red=(0, 0, 20, 20), blue=(24, 8, 48, 32))
    (tmp_path / "t.json").write_text(json.dumps({"blue": 1.0}))
    (tmp_path / "t.toml").write_text("red = 0.5\nblue = 0.5\n")
    assert values(label("--tag-thresholds", "t.json")["a"]) == [0, 1]
    assert values(label("--tag-threshold", "1", "--tag-thresholds", "t.toml", store="both")["a"]) == [0, 1, 3]
    assert json.loads((tmp_path / "both/run.json").read_text())["rules"]["tag_thresholds"] == {"red": 0.5, "blue": 0.5}


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ('{"cow": 0.5}', (), "--tag-thresholds: 'cow' is not in --classes"),
        ('{"red": 1.5}', (), "'red': expected a number in 0..1, got 1.5"),
        ('{"red": true}', (), "'red': expected a number in 0..1, got True"),
        ("[0.5]", (), "expected an object of class names to numbers, got [0.5]"),
        ("{}", (), "expected an object of class names to numbers, got {}"),
        ('{"red": 0.5}', ("--no-gate",), "--tag-thresholds: CLIP is not asked"),
    ],
)
def test_tag_thresholds_that_cannot_be_meant(
    wsss: Run, world: World, tmp_path: Path, text: str, flags: tuple[str, ...], message: str
) -> None:
    world.save(tmp_path / "photos" / "a.png", 32, 48, red=(0, 0, 20, 20))
    (tmp_path / "t.json").write_text(text)
    argv = ["label", "photos", "--classes", "red, blue", "--bundle", world.bundle, "--out", "out"]
    answer = wsss(*argv, "--tag-thresholds", "t.json", *flags)
    assert answer.code == 2 and message in answer.err


@pytest.mark.parametrize(
    ("bundled", "flags", "labels"),
    [
        ({"score_rule": "max", "box_thresholds": {"max": 0.5, "mean": 0.3}}, [], [0, 1]),
        ({"score_rule": "max", "box_thresholds": {"max": 0.9, "mean": 0.3}}, [], [0]),
        ({"score_rule": "max", "box_thresholds": {"max": 0.9, "mean": 0.3}}, ["--score-rule", "mean"], [0, 1]),
        ({"score_rule": "mean", "box_thresholds": {"max": 0.9, "mean": 0.6}}, [], [0]),
        ({"score_rule": "mean", "box_thresholds": {"max": 0.7, "mean": 0.6}}, ["--score-rule", "max"], [0, 1]),
        ({"score_rule": "max", "box_thresholds": {"max": 0.9}}, ["--score-rule", "mean", "--box-threshold", "0.4"], [0, 1]),
        ({"box_threshold": 0.4}, [], [0, 1]),  # of an earlier version, which took the mean
        ({"box_threshold": 0.5}, [], [0]),
    ],
)
def test_score_rule(
    world: World, label: Label, tmp_path: Path, bundled: dict[str, Any], flags: list[str], labels: list[int]
) -> None:
    """A phrase of two tokens, of which one has 0.8 and the other next to nothing: 0.8 or 0.41."""
    write_model(world.bundle / "grounding-dino", "grounding-dino", bundled, drop=("box_threshold",))
    world.save(tmp_path / "photos" / "a.png", 32, 48, red=(4, 4, 24, 24))
    find(world, ("red", 0.8, (4, 4, 24, 24)))
    found = label(*flags, "--no-gate", "--classes", "red grass")["a"]
    assert values(found) == labels
    rule = flags[1] if flags else bundled.get("score_rule", "mean")
    assert json.loads((tmp_path / "store/run.json").read_text())["rules"]["score_rule"] == rule


def test_a_rule_without_a_threshold_of_its_own_is_refused(wsss: Run, world: World, photos: Path) -> None:
    settings = {"score_rule": "max", "box_thresholds": {"max": 0.3}}
    write_model(world.bundle / "grounding-dino", "grounding-dino", settings, drop=("box_threshold",))
    answer = wsss("label", photos, "--classes", "red", "--bundle", world.bundle, "--out", "out", "--score-rule", "mean")
    assert answer.code == 2
    assert "--score-rule mean: the bundle's grounding-dino has a box threshold for max only" in answer.err


def test_enclosing(world: World, label: Label, tmp_path: Path) -> None:
    """A third box around two better ones: it is labeled up to its end, or not at all."""
    world.save(tmp_path / "photos" / "a.png", 32, 48, red=(0, 0, 48, 20))
    find(world, ("red", 0.8, (0, 0, 16, 20)), ("red", 0.7, (20, 0, 36, 20)), ("red", 0.6, (0, 0, 44, 20)))
    ends = {
        flag: np.flatnonzero(label(flag, store=flag)["a"].any(axis=0)).max() + 1 for flag in ("--enclosing", "--no-enclosing")
    }
    assert ends == {"--enclosing": pytest.approx(44, abs=1), "--no-enclosing": pytest.approx(36, abs=1)}


def test_views(world: World, label: Label, tmp_path: Path) -> None:
    """A class that CLIP's scripted engine overlooks in the whole photograph, not in a part of it."""
    write_model(world.bundle / "clip", "clip", {"views": [1]})
    world.save(tmp_path / "photos" / "a.png", 32, 48, red=(4, 4, 24, 24), blue=(39, 26, 45, 30))
    assert values(label()["a"]) == values(label("--views", "1", store="one")["a"]) == [0, 1]
    assert 3 in values(label("--views", "3", store="three")["a"])


def test_views_need_clip(wsss: Run, world: World, photos: Path) -> None:
    answer = wsss("label", photos, "--classes", "red", "--bundle", world.bundle, "--out", "out", "--views", "3", "--no-gate")
    assert answer.code == 2 and "--views: CLIP is not asked" in answer.err


def test_tiles(world: World, label: Label, tmp_path: Path) -> None:
    """A detector that finds the same corner of whatever it sees also finds it in each tile."""
    world.save(tmp_path / "photos" / "a.png", 32, 48, red=(0, 0, 48, 32))
    find(world, ("red", 0.8, (6, 6, 24, 20)))
    ends = {tiles: np.flatnonzero(label("--tiles", tiles, store=tiles)["a"].any(axis=0)).max() + 1 for tiles in ("1", "2")}
    assert ends == {"1": pytest.approx(24, abs=1), "2": pytest.approx(16 + 24 * 2 / 3, abs=1)}


# ---- boxes that are one object ----

LEFT, RIGHT = (0.0, 0.0, 30.0, 20.0), (6.0, 0.0, 36.0, 20.0)  # IoU 24/36 = 0.67
WIDE, LOW = (0.0, 0.0, 40.0, 20.0), (0.0, 0.0, 40.0, 17.0)  # IoU 0.85


@pytest.mark.parametrize(
    ("flags", "right_edge"),
    [
        ([], 30),
        (["--nms", "0.6"], 30),
        (["--nms", "0.7"], 36),
        (["--nms-across", "0.9"], 30),  # of one class, it says nothing
        (["--nms-across", "0.1", "--nms", "0.7"], 36),
    ],
)
def test_nms(world: World, label: Label, tmp_path: Path, flags: list[str], right_edge: int) -> None:
    """Two boxes on one red bar: where they are two objects, the second one's end is labeled too."""
    world.save(tmp_path / "photos" / "a.png", 32, 48, red=(0, 0, 48, 20))
    find(world, ("red", 0.8, LEFT), ("red", 0.7, RIGHT))
    label_map = label(*flags)["a"]
    assert np.flatnonzero(label_map.any(axis=0)).max() + 1 == pytest.approx(right_edge, abs=1)
    assert values(label_map) == [0, 1]


@pytest.mark.parametrize(
    ("flags", "labels"),
    [
        ([], [0, 1]),
        (["--nms-across", "0.84"], [0, 1]),
        (["--nms-across", "0.86"], [0, 1, 255]),
        (["--nms", "0.9"], [0, 1]),  # of two classes, it says nothing
        (["--nms", "0.1", "--nms-across", "0.86"], [0, 1, 255]),
    ],
)
def test_nms_across(world: World, label: Label, tmp_path: Path, flags: list[str], labels: list[int]) -> None:
    """A red and a green box on one bar, with scores that the margin calls void where both stay."""
    world.save(tmp_path / "photos" / "a.png", 32, 48, red=(0, 0, 48, 20))
    find(world, ("red", 0.8, WIDE), ("green", 0.75, LOW))
    assert values(label(*flags, "--no-gate")["a"]) == labels


@pytest.mark.parametrize(
    ("flags", "labels"),
    [
        ([], [0, 1, 255]),  # (0.80 - 0.74) / 0.80 = 0.075, within the 0.1 that is the default
        (["--margin", "0"], [0, 1]),
        (["--margin", "0.07"], [0, 1]),
        (["--margin", "0.08"], [0, 1, 255]),
        (["--margin", "1"], [0, 1, 255]),
    ],
)
def test_margin(world: World, label: Label, tmp_path: Path, flags: list[str], labels: list[int]) -> None:
    world.save(tmp_path / "photos" / "a.png", 32, 48, red=(0, 0, 48, 20))
    find(world, ("red", 0.8, WIDE), ("green", 0.74, (0, 0, 20, 20)))
    assert values(label(*flags, "--no-gate")["a"]) == labels


def test_margin_has_a_default_of_a_tenth(world: World, label: Label, tmp_path: Path) -> None:
    world.save(tmp_path / "photos" / "a.png", 32, 48, red=(0, 0, 48, 20))
    find(world, ("red", 0.8, WIDE), ("green", 0.71, (0, 0, 20, 20)))  # 0.1125
    assert values(label("--no-gate")["a"]) == [0, 1]


@pytest.mark.parametrize(("flags", "winner"), [([], 2), (["--quality-exponent", "0"], 1), (["--quality-exponent", "2"], 2)])
def test_quality_exponent(world: World, label: Label, tmp_path: Path, flags: list[str], winner: int) -> None:
    """The red box scores better, the green one's mask has the better predicted IoU."""
    world.save(tmp_path / "photos" / "a.png", 32, 48, red=(0, 0, 48, 20))
    find(world, ("red", 0.8, WIDE), ("green", 0.7, (0, 0, 20, 20)))
    script = world.engine("sam", "decoder").script
    world.engine("sam", "decoder").script = lambda feeds: (
        (out := script(feeds)),
        {**out, "quality": np.where(feeds["boxes"][:, 2] < 21, 0.9, 0.6).astype(np.float32)},
    )[1]
    assert label(*flags, "--no-gate", "--margin", "0")["a"][10, 10] == winner


def decoding(world: World, change: Callable[[Mapping[str, np.ndarray], dict[str, np.ndarray]], Any]) -> None:
    """Lets ``change`` write to the outputs of the scripted decoder."""
    script = world.engine("sam", "decoder").script

    def changed(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        out = dict(script(feeds))
        change(feeds, out)
        return out

    world.engine("sam", "decoder").script = changed


def test_multimask(world: World, label: Label, tmp_path: Path) -> None:
    """The scripted best of three covers the upper half of a box."""
    world.save(tmp_path / "photos" / "a.png", 32, 48, red=(0, 0, 48, 20))
    find(world, ("red", 0.8, WIDE))
    whole, half = label("--no-gate")["a"], label("--no-gate", "--multimask", store="best")["a"]
    assert whole[2, 10] == half[2, 10] == whole[14, 10] == 1 and half[14, 10] == 0
    ((box,), (best,)) = (record["boxes"] for store in ("store", "best") for record in read_records(tmp_path / store))
    assert (box["quality"], best["quality"]) == (0.9, 0.8)


def test_min_region(world: World, label: Label, tmp_path: Path) -> None:
    """A hole of 3 x 3 cells and a crumb of 2 x 2, each of 2.25 pixels."""

    def pierce(_: object, out: dict[str, np.ndarray]) -> None:
        out["logits"][:, 4:7, 10:13] = -4
        out["logits"][:, 16:18, 3:5] = 4

    world.save(tmp_path / "photos" / "a.png", 32, 48, red=(0, 0, 48, 20))
    find(world, ("red", 0.8, WIDE))
    decoding(world, pierce)
    hole, crumb = np.s_[7:10, 16:19], np.s_[24:27, 5:7]
    marks = []
    for number, pixels in enumerate(["0", "8", "15", "40"]):
        found = label("--no-gate", "--min-region", pixels, store=f"{number}")["a"]
        marks.append((set(np.unique(found[hole]).tolist()), set(np.unique(found[crumb]).tolist())))
    assert marks == [({0}, {1}), ({0}, {1}), ({0}, {0}), ({1}, {0})]
    (record,) = read_records(tmp_path / "3")
    assert record["boxes"][0]["area_px"] == np.count_nonzero(found == 1), "areas and kept masks are of the same mask"
    masks = read_label_and_masks(tmp_path / "3/labels/a.png", shape=(32, 48), boxes=1)[1]
    assert masks is not None and MaskRuns.from_counts(masks[0], (32, 48)).area() == np.count_nonzero(found == 1)


@pytest.mark.parametrize(("exponent", "winner"), [("0", 1), ("1", 2), ("2", 2)])
def test_stability_exponent(world: World, label: Label, tmp_path: Path, exponent: str, winner: int) -> None:
    """The red box scores better, the green one's mask is more stable."""

    def unstable(feeds: Mapping[str, np.ndarray], out: dict[str, np.ndarray]) -> None:
        out["stability"] = np.where(feeds["boxes"][:, 2] < 21, 0.9, 0.6).astype(np.float32)

    world.save(tmp_path / "photos" / "a.png", 32, 48, red=(0, 0, 48, 20))
    find(world, ("red", 0.8, WIDE), ("green", 0.7, (0, 0, 20, 20)))
    decoding(world, unstable)
    assert label("--no-gate", "--margin", "0", "--stability-exponent", exponent)["a"][10, 10] == winner
    (record,) = read_records(tmp_path / "store")
    kept = [box.get("stability") for box in record["boxes"]]
    assert sorted(kept, key=str) == ([None, None] if exponent == "0" else [0.6, 0.9])


def test_confidence(wsss: Run, world: World, label: Label, tmp_path: Path) -> None:
    """Box score x predicted IoU x probability, less that of a rival; 255 in background."""
    world.save(tmp_path / "photos" / "a.png", 32, 48, red=(0, 0, 48, 20))
    find(world, ("red", 0.8, WIDE), ("green", 0.5, (0, 0, 20, 20)))
    found = label("--no-gate", "--confidence", "--margin", "0")["a"]
    sure = read_confidence(tmp_path / "store", "a.png", shape=(32, 48))
    assert found[10, 10] == found[10, 25] == 1 and found[30, 30] == 0
    probable = 0.9 / (1 + np.exp(-4))
    assert sure[10, 25] == pytest.approx(255 * 0.8 * probable, abs=1) and sure[30, 30] == 255
    assert sure[10, 10] == pytest.approx(255 * (0.8 - 0.5) * probable, abs=1)
    assert json.loads((tmp_path / "store/run.json").read_text())["confidence"] is True
    assert not (label("--no-gate", store="without") and (tmp_path / "without/confidence").exists())
    argv = ["label", "photos", "--classes", "red, green, blue", "--bundle", world.bundle, "--no-gate"]
    assert "was made with confidence = null, this run has true" in wsss(*argv, "--out", "without", "--confidence").err


@pytest.mark.parametrize("flags", [["--multimask"], ["--stability-exponent", "1"], ["--confidence"]])
def test_a_bundle_of_an_earlier_version_refuses_what_it_lacks(
    wsss: Run, world: World, label: Label, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    """And makes the same labels without."""
    world.save(tmp_path / "photos" / "a.png", 32, 48, red=(0, 0, 48, 20))
    now = label()["a"]
    for graph, added in (("decoder", {"multimask", "token", "stability"}), ("fuse", {"confidence"})):
        script, inputs, outputs, axes = SCRIPTS["sam", graph]

        def before(feeds: Mapping[str, np.ndarray], script: Any = script, added: set[str] = added) -> dict[str, np.ndarray]:
            given = {"multimask": np.zeros(len(feeds["boxes"]), bool), **feeds} if "boxes" in feeds else feeds
            return {name: value for name, value in script(given).items() if name not in added}

        kept = (tuple(spec for spec in specs if spec.name not in added) for specs in (inputs, outputs))
        monkeypatch.setitem(SCRIPTS, ("sam", graph), (before, *kept, axes))
    write_model(world.bundle / "sam", "sam")
    world.engines.clear()
    answer = wsss("label", "photos", "--classes", "red", "--bundle", world.bundle, "--out", "refused", *flags)
    assert answer.code == 1
    assert f"{flags[0]}: expected a bundle whose sam has" in answer.err
    assert "hint: export it again: wsss export --model sam --variant fake" in answer.err
    assert np.array_equal(label(store="older")["a"], now)


# ---- what replaces a stage ----


def test_gate(world: World, label: Label, tmp_path: Path) -> None:
    """A class that CLIP's scripted views overlook and the detector finds."""
    write_model(world.bundle / "clip", "clip", {"views": [1]})
    world.save(tmp_path / "photos" / "a.png", 32, 48, red=(4, 4, 24, 24), blue=(39, 26, 45, 30))
    assert values(label()["a"]) == values(label("--gate")["a"]) == [0, 1]
    assert 3 in values(label("--no-gate", store="open")["a"])


def test_labels_and_boxes(world: World, label: Label, tmp_path: Path) -> None:
    world.save(tmp_path / "photos" / "a.png", 32, 48, red=(0, 0, 20, 20), blue=(24, 8, 48, 32))
    (tmp_path / "labels.json").write_text(json.dumps({"a.png": ["blue"]}))
    (tmp_path / "boxes.json").write_text(json.dumps({"a.png": [{"label": "green", "xyxy": [0, 0, 20, 20]}]}))
    assert values(label()["a"]) == [0, 1, 3]
    assert values(label("--labels", "labels.json", store="by labels")["a"]) == [0, 3]
    assert values(label("--boxes", "boxes.json", store="by boxes")["a"]) == [0, 2]


def test_ignore_unknown(world: World, label: Label, tmp_path: Path) -> None:
    """Without it, an image whose file names a class that is not in the list fails; with it, its other boxes are labeled."""
    world.save(tmp_path / "photos" / "a.png", 32, 48, red=(0, 0, 20, 20), blue=(24, 8, 48, 32))
    boxes = [{"label": "red", "xyxy": [0, 0, 20, 20]}, {"label": "cow", "xyxy": [24, 8, 48, 32]}]
    (tmp_path / "boxes.json").write_text(json.dumps({"a.png": boxes}))
    assert label("--boxes", "boxes.json", code=1) == {}
    assert values(label("--boxes", "boxes.json", "--ignore-unknown", store="known")["a"]) == [0, 1]


def test_classes_give_the_indices(world: World, label: Label, tmp_path: Path) -> None:
    world.save(tmp_path / "photos" / "a.png", 32, 48, red=(0, 0, 20, 20), blue=(24, 8, 48, 32))
    assert values(label("--classes", "green, blue")["a"]) == [0, 2]
    assert values(label("--classes", "blue, red", store="two")["a"][:10, :10]) == [2]


def test_masks(world: World, label: Label, tmp_path: Path) -> None:
    """The object behind another one of its class is whole; without masks the label is the same, and the file has nothing else."""
    world.save(tmp_path / "photos" / "a.png", 32, 48, red=(0, 0, 48, 20))
    find(world, ("red", 0.8, LEFT), ("red", 0.7, RIGHT))
    kept, none = label("--nms", "0.7")["a"], label("--nms", "0.7", "--no-masks", store="none")["a"]
    assert np.array_equal(kept, none)
    (record,) = read_records(tmp_path / "store")
    label_map, masks = read_label_and_masks(tmp_path / "store/labels/a.png", shape=(32, 48), boxes=2)
    assert masks is not None
    decoded = [MaskRuns.from_counts(counts, (32, 48)) for counts in masks]
    assert [mask.area() for mask in decoded] == [box["area_px"] for box in record["boxes"]]
    assert decoded[0].bounds()[3] == pytest.approx(30, abs=1) and decoded[1].bounds()[1] == pytest.approx(6, abs=1)
    assert np.array_equal(decoded[0].mask() | decoded[1].mask(), label_map == 1)
    assert read_label_and_masks(tmp_path / "none/labels/a.png", shape=(32, 48), boxes=2)[1] is None
    assert json.loads((tmp_path / "none/run.json").read_text()).get("masks") is None


def test_a_store_has_all_masks_or_none(wsss: Run, world: World, label: Label, tmp_path: Path) -> None:
    world.save(tmp_path / "photos" / "a.png", 32, 48, red=(0, 0, 48, 20))
    label("--no-masks", store="old")
    world.save(tmp_path / "photos" / "b.png", 32, 48, red=(0, 0, 48, 20))
    argv = ["label", "photos", "--classes", "red, green, blue", "--bundle", world.bundle, "--out", "old"]
    answer = wsss(*argv)
    assert answer.code == 1
    assert "was made with masks = null, this run has true" in answer.err
    assert "continue this one, which has no masks, with --no-masks" in answer.err
    assert wsss(*argv, "--no-masks").code == 0
    label(store="new")
    assert "was made with masks = true, this run has null" in wsss(*argv[:-1], "new", "--no-masks").err


# ---- where it runs ----


@pytest.fixture
def opened(world: World, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """How each engine was opened. One that is not ONNX Runtime's, on the CPU, verified, calls everything green."""
    calls: list[dict[str, Any]] = []

    def open_graph(model: Model, graph: str, engine: str, **options: Any) -> FakeEngine:
        calls.append({"engine": engine, **options})
        made = world.open_graph(model, graph)
        if graph == "fuse" and (engine, options) != ("ort", {"device": "cpu", "unverified": False}):
            answer = made.script
            made.script = lambda feeds: answer({**feeds, "label": np.full_like(feeds["label"], 2)})
        return made

    monkeypatch.setattr("wsss.runtime.chain.open_graph", open_graph)
    return calls


@pytest.mark.parametrize(
    ("flags", "how", "labels"),
    [
        ([], {"engine": "ort", "device": "cpu", "unverified": False}, [0, 1]),
        (["--engine", "ort", "--device", "cpu"], {"engine": "ort", "device": "cpu", "unverified": False}, [0, 1]),
        (["--engine", "eager"], {"engine": "eager", "device": "cpu", "unverified": False}, [0, 2]),
        (["--engine", "trt"], {"engine": "trt", "device": "cuda:0", "unverified": False}, [0, 2]),
        (["--engine", "trt-rtx", "--device", "cuda:3"], {"engine": "trt-rtx", "device": "cuda:3", "unverified": False}, [0, 2]),
        (["--device", "cuda:1"], {"engine": "ort", "device": "cuda:1", "unverified": False}, [0, 2]),
        (["--device", "cuda"], {"engine": "ort", "device": "cuda:0", "unverified": False}, [0, 2]),
        (["--devices", "2"], {"engine": "ort", "device": "cuda:2", "unverified": False}, [0, 2]),
        (["--unverified"], {"engine": "ort", "device": "cpu", "unverified": True}, [0, 2]),
    ],
)
def test_engine_device_and_unverified_reach_every_graph(
    world: World,
    label: Label,
    opened: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    flags: list[str],
    how: dict[str, Any],
    labels: list[int],
) -> None:
    monkeypatch.setattr("wsss.engines.opening._ort_uses_gpu", lambda: False)
    world.save(tmp_path / "photos" / "a.png", 32, 48, red=(4, 4, 24, 24))
    assert values(label(*flags)["a"]) == labels
    assert opened == [how] * 7, "two of CLIP, two of Grounding-DINO, three of SAM"


@pytest.mark.parametrize(("flags", "most"), [(["--batch", "1"], 1), (["--batch", "2"], 2), ([], 2)])
def test_batch(world: World, label: Label, tmp_path: Path, flags: list[str], most: int) -> None:
    """Rows of the detector's calls; the labels are the same."""
    for number in range(6):
        world.save(tmp_path / "photos" / f"{number}.png", 32, 48, red=(4, 4, 10 + 4 * number, 24))
    found = label(*flags)
    assert max(world.rows("grounding-dino", "image-32x48")) == most
    edges = [np.flatnonzero(found[str(number)].any(axis=0)).max() for number in range(6)]
    assert edges == pytest.approx([9 + 4 * number for number in range(6)], abs=1)


# ---- which images ----


def test_shard(world: World, label: Label, tmp_path: Path) -> None:
    """Which image is of which shard is for ever: runs of two versions may share a store."""
    names = [f"{number}.png" for number in range(9)]
    for name in names:
        world.save(tmp_path / "photos" / name, 32, 48, red=(4, 4, 24, 24))
    shares = [sorted(label("--shard", f"{number}/3", store=f"store{number}")) for number in range(3)]
    assert shares == [[n.removesuffix(".png") for n in names if zlib.crc32(n.encode()) % 3 == number] for number in range(3)]
    assert all(shares), "each has something"
    assert len(label(store="whole")) == 9


def test_retry_failed(world: World, label: Label, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An image that failed for a reason that is gone, itself unchanged."""
    world.save(tmp_path / "photos" / "a.png", 32, 48, red=(4, 4, 24, 24))
    world.save(tmp_path / "photos" / "b.png", 64, 96, red=(4, 4, 24, 24))
    with monkeypatch.context() as small:
        small.setattr("wsss.photographs.MAX_PIXELS", 32 * 48)
        assert list(label(code=1)) == ["a"]
    assert list(label(code=1)) == ["a"], "a failure is remembered"
    assert list(label("--retry-failed")) == ["a", "b"]


# ---- defaults ----


def defaults_of(function: Callable[..., Any]) -> dict[str, Any]:
    return {name: each.default for name, each in inspect.signature(function).parameters.items() if each.default is not each.empty}


RULES = {
    "tag_threshold": None,
    "tag_thresholds": None,
    "views": None,
    "score_rule": None,
    "box_threshold": None,
    "nms": 0.5,
    "nms_across": 0.8,
    "enclosing": True,
    "tiles": 1,
    "margin": 0.1,
    "quality_exponent": 1.0,
    "multimask": False,
    "min_region": 0,
    "stability_exponent": 0.0,
    "gate": True,
}


def test_defaults_are_these_and_the_same_in_python_and_on_the_command_line() -> None:
    assert dataclasses.asdict(Rules()) == RULES
    command = defaults_of(label_command)
    assert {name: command[name] for name in RULES} == RULES
    how = {
        "model": "chain",
        "engine": "auto",
        "device": "auto",
        "unverified": False,
        "labels": None,
        "boxes": None,
        "ignore_unknown": False,
        "masks": True,
        "confidence": False,
    }
    python = defaults_of(Chain.open)
    assert {name: command[name] for name in how} == {name: python[name] for name in how} == how
    assert python["rules"] is None
    running = {"batch": None, "retry_failed": False, "shard": None}
    python = defaults_of(run.label_folder)
    assert {name: command[name] for name in running} == {name: python[name] for name in running} == running


def test_the_stages_have_the_rules_defaults() -> None:
    names = ("score_rule", "nms", "nms_across", "enclosing", "tiles")
    assert {name: defaults_of(detect.Detector)[name] for name in names} == {name: RULES[name] for name in names}
    assert (
        defaults_of(detect.Detector)["threshold"]
        is defaults_of(tag.Tagger)["thresholds"]
        is defaults_of(tag.Tagger)["threshold"]
        is None
    )
    own = {"keep_masks": False, "confidence": False}
    assert defaults_of(fuse.Fuser) == {name: RULES[name] for name in ("margin", "quality_exponent", "stability_exponent")} | own
    own = {"resizer": None, "stability": False}
    assert defaults_of(segment.MaskPredictor) == {name: RULES[name] for name in ("multimask", "min_region")} | own


def test_every_rule_is_an_option_and_has_a_test_here() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    names = {field.name for field in dataclasses.fields(Rules)}
    assert names <= tested
    assert names <= defaults_of(label_command).keys()
    assert set(COLORS) == {"red", "green", "blue"}
