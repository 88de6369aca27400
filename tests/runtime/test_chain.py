"""The chain: four stages, each skipped where it has nothing to do, and only the engines that a run needs."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from wsss.batch import Photograph, PseudoLabels
from wsss.classes import ClassList, class_list
from wsss.errors import BundleError, ClassError, ImageError, UsageError, WsssError, WsssWarning
from wsss.runtime.chain import Chain, Rules, Timed
from wsss.runtime.device import Device
from wsss.spec import write_manifest

if TYPE_CHECKING:
    from ..conftest import World

DINO = ("grounding-dino", "image-32x48")
SAM = {("sam", "encoder"), ("sam", "decoder"), ("sam", "fuse")}
DETECT = {("grounding-dino", "text"), DINO}
TAG = {("clip", "image"), ("clip", "text")}


def two_colors(world: World) -> np.ndarray:
    return world.scene(32, 48, red=(0, 0, 20, 20), blue=(24, 8, 48, 32))


def test_no_image(world: World) -> None:
    result = Chain.open(world.bundle, classes=world.classes).label([])
    assert isinstance(result, PseudoLabels)
    assert len(result) == len(result.boxes) == 0


@pytest.mark.parametrize(
    ("engine", "place", "at_once", "queues"),
    [("ort", "cpu", 1, False), ("ort", "cuda:0", 2, False), ("trt", "cuda:0", 2, True), ("eager", "cpu", 1, True)],
)
def test_on_a_gpu_two_engines_compute_at_once_and_on_a_cpu_one(
    world: World, monkeypatch: pytest.MonkeyPatch, engine: str, place: str, at_once: int, queues: bool
) -> None:
    told: list[dict[str, object]] = []
    monkeypatch.setattr("wsss.runtime.chain.choose", lambda *_: (engine, place))
    monkeypatch.setattr("wsss.runtime.chain.Device", lambda **how: (told.append(how), Device(**how))[1])
    Chain.open(world.bundle, classes=world.classes)
    assert told == [{"at_once": at_once, "queues": queues}]


def test_pixels_in_labels_out(world: World) -> None:
    """Canvases of 32 px for a scene of 32 x 48: masks come back to within a pixel of the drawn edges."""
    result = Chain.open(world.bundle, classes=world.classes).label(two_colors(world))
    (label_map,) = result.label_maps
    assert (label_map.shape, label_map.dtype) == ((32, 48), np.uint8)
    truth = np.zeros((32, 48), np.uint8)
    truth[:20, :20], truth[8:32, 24:48] = 1, 3
    assert (label_map != truth).sum() <= 4 * (20 + 24)
    assert (label_map[2:18, 2:18] == 1).all()
    assert (label_map[10:30, 26:46] == 3).all()
    assert result.labels.present.tolist() == [[True, False, True]]
    assert result.boxes.label.tolist() == [1, 3]
    assert result.won.tolist() == [(label_map == 1).sum(), (label_map == 3).sum()]


def test_one_path_several_and_arrays(world: World, photos: Path) -> None:
    labeler = Chain.open(world.bundle, classes=world.classes)
    assert labeler.label(photos / "red.png").names == ["red.png"]
    assert labeler.label(str(photos / "red.png")).names == ["red.png"]
    mixed = labeler.label([photos / "sub" / "three.png", two_colors(world)])
    assert mixed.names == ["three.png", "1"]
    assert [each.shape for each in mixed.label_maps] == [(90, 60), (32, 48)]


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)]
)
def test_an_array_of_another_shape_is_refused(world: World, image: np.ndarray) -> None:
    with pytest.raises(WsssError, match=r"image 1: expected \(H, W, 3\) uint8 RGB"):
        Chain.open(world.bundle, classes=world.classes).label([two_colors(world), image])


def test_a_file_that_is_no_image(world: World, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_text("no")
    with pytest.raises(ImageError, match=r"x\.jpg"):
        Chain.open(world.bundle, classes=world.classes).label(tmp_path / "x.jpg")


# ---- work is skipped as early as possible ----


def test_without_a_wanted_class_the_detector_is_not_opened_and_sam_not_run(world: World) -> None:
    result = Chain.open(world.bundle, classes=world.classes).label([world.scene(30, 40), world.scene(30, 40)])
    assert not any(each.any() for each in result.label_maps)
    assert world.rows("clip", "image"), "CLIP has looked"
    assert DINO not in world.engines
    assert world.rows("sam", "encoder") == world.rows("sam", "decoder") == world.rows("sam", "fuse") == []


def test_in_a_batch_only_the_images_with_a_class_reach_the_detector(world: World) -> None:
    Chain.open(world.bundle, classes=world.classes).label([world.scene(32, 48), two_colors(world), world.scene(32, 48)])
    assert world.rows(*DINO) == [1]
    assert world.rows("sam", "encoder") == [1]


def test_without_a_box_sam_does_not_run(world: World) -> None:
    labeler = Chain.open(world.bundle, classes=world.classes, rules=Rules(box_threshold=1.0))
    result = labeler.label([two_colors(world), world.scene(32, 48)])
    assert world.rows(*DINO) == [1]
    assert world.rows("sam", "encoder") == world.rows("sam", "decoder") == world.rows("sam", "fuse") == []
    assert not result.label_maps[0].any()
    assert result.labels.present[0].any()


def test_each_image_alone_is_as_in_a_batch_of_strangers(world: World) -> None:
    rng = np.random.default_rng(0)
    colors = ("red", "green", "blue")
    scenes = []
    for _ in range(12):
        height, width = rng.integers(20, 90, 2)
        boxes = {}
        for color in rng.permutation(colors)[: rng.integers(0, 4)]:
            x0, y0 = rng.integers(0, width - 12), rng.integers(0, height - 12)
            boxes[color] = (x0, y0, x0 + rng.integers(8, width), y0 + rng.integers(8, height))
        scenes.append(world.scene(height, width, **boxes))
    labeler = Chain.open(world.bundle, classes=world.classes)
    together = labeler.label(scenes)
    assert len(together.boxes) >= 10
    for scene, label_map in zip(scenes, together.label_maps, strict=True):
        assert np.array_equal(labeler.label(scene).label_maps[0], label_map)


# ---- what a run needs ----


def given(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "given.json"
    path.write_text(json.dumps(content))
    return path


def keep_only(world: World, *models: str) -> None:
    for folder in list(world.bundle.iterdir()):
        if folder.name not in models:
            folder.rename(folder.parent / f".{folder.name}")


def test_all_three_models(world: World) -> None:
    labeler = Chain.open(world.bundle, classes=world.classes)
    assert list(labeler.settings["models"]) == ["clip", "grounding-dino", "sam"]
    labeler.label(two_colors(world))
    assert set(world.engines) == TAG | DETECT | SAM


def test_without_the_gate_clip_is_not_needed(world: World) -> None:
    keep_only(world, "grounding-dino", "sam")
    result = Chain.open(world.bundle, classes=world.classes, rules=Rules(gate=False)).label(two_colors(world))
    assert set(world.engines) == DETECT | SAM
    assert result.labels.present.all()
    assert result.boxes.label.tolist() == [1, 3]


def test_given_labels_replace_clip(world: World, tmp_path: Path) -> None:
    keep_only(world, "grounding-dino", "sam")
    path = given(tmp_path, {"0": ["blue"]})
    labeler = Chain.open(world.bundle, classes=world.classes, labels=path)
    assert labeler.label(two_colors(world)).boxes.label.tolist() == [3]
    assert set(world.engines) == DETECT | SAM
    assert list(labeler.settings["models"]) == ["grounding-dino", "sam"]


def test_given_boxes_replace_clip_and_the_detector(world: World, tmp_path: Path) -> None:
    keep_only(world, "sam")
    path = given(tmp_path, {"0": [{"label": "red", "xyxy": [0, 0, 20, 20]}]})
    labeler = Chain.open(world.bundle, classes=world.classes, boxes=path)
    assert np.unique(labeler.label(two_colors(world)).label_maps[0]).tolist() == [0, 1]
    assert set(world.engines) == SAM
    assert list(labeler.settings["models"]) == ["sam"]


def test_an_image_without_an_entry_is_named(world: World, tmp_path: Path) -> None:
    path = given(tmp_path, {"0": []})
    for labeler in (
        Chain.open(world.bundle, classes=world.classes, labels=path),
        Chain.open(world.bundle, classes=world.classes, boxes=path),
    ):
        assert labeler.missing(Photograph(name="0", pixels=two_colors(world))) is None
        with pytest.raises(WsssError, match=r"^1: has no entry in .*given\.json"):
            labeler.label([two_colors(world)] * 2)


@pytest.mark.parametrize("model", ["clip", "grounding-dino", "sam"])
def test_a_lacking_model_is_named(world: World, model: str) -> None:
    keep_only(world, *{"clip", "grounding-dino", "sam"} - {model})
    with pytest.raises(BundleError, match=f"needs the model '{model}'"):
        Chain.open(world.bundle, classes=world.classes)


def test_classes_by_text_and_engine_by_name(world: World) -> None:
    assert Chain.open(world.bundle, classes="red, blue", engine="ort").classes.names == ("red", "blue")
    with pytest.raises(ClassError):
        Chain.open(world.bundle, classes="red, red")
    with pytest.raises(UsageError, match="--engine"):
        Chain.open(world.bundle, classes="red,", engine="tpu")


def test_settings_tell_all_that_decides(world: World) -> None:
    """Two runs may share a store exactly when these are equal."""
    settings = Chain.open(world.bundle, classes=world.classes, rules=Rules(nms=0.4)).settings
    assert json.loads(json.dumps(settings)) == settings
    assert settings["engine"] == "ort"
    assert settings["rules"]["nms"] == 0.4
    assert settings["models"]["sam"] == world.model("sam").manifest.identity()


def test_there_is_no_bundle_unless_it_is_named(world: World) -> None:
    with pytest.raises(TypeError, match="bundle"):
        Chain.open(classes=world.classes)  # type: ignore[call-arg]


def test_thresholds_of_stages_that_do_not_run_are_as_typed(world: World, tmp_path: Path) -> None:
    (tmp_path / "boxes.json").write_text("{}")
    settings = Chain.open(world.bundle, classes=world.classes, boxes=tmp_path / "boxes.json").settings
    assert (settings["rules"]["tag_threshold"], settings["rules"]["box_threshold"]) == (None, None)
    ungated = Chain.open(world.bundle, classes=world.classes, rules=Rules(gate=False)).settings
    assert (ungated["rules"]["tag_threshold"], ungated["rules"]["box_threshold"]) == (None, 0.3)


def test_classes_that_the_small_models_do_not_know(world: World, tmp_path: Path) -> None:
    for name in ("clip", "grounding-dino", "sam"):
        manifest = world.model(name).manifest
        write_manifest(world.bundle / name, dataclasses.replace(manifest, variant="mini"))
    with pytest.warns(WsssWarning, match="know only red disc, green triangle, .* none of the 3 classes is among them") as caught:
        Chain.open(world.bundle, classes="red, green, blue")
    assert len(caught) == 1
    one_known = ClassList(names=("red", "blue"), prompts=(("red disc",), ("blue",)), phrases=(("red",), ("blue",)))
    Chain.open(world.bundle, classes=one_known)
    (tmp_path / "boxes.json").write_text("{}")
    Chain.open(world.bundle, classes="red, green", boxes=tmp_path / "boxes.json")  # outlines know no classes
    write_manifest(world.bundle / "clip", dataclasses.replace(world.model("clip").manifest, variant="ViT-B-16"))
    with pytest.warns(WsssWarning, match="know only red disc"):
        Chain.open(world.bundle, classes="red, green, blue")
    with pytest.warns(WsssWarning, match="know only red disc"):
        Chain.open(world.bundle, classes="red, green, blue", until="detect")
    Chain.open(world.bundle, classes="red, green, blue", until="tag")  # another CLIP


def test_regions_without_a_shape_are_warned_of(world: World, tmp_path: Path) -> None:
    with pytest.warns(WsssWarning, match="--classes: grass: regions without a shape, which a detector does not find"):
        Chain.open(world.bundle, classes="red, grass")
    (tmp_path / "names.txt").write_text("red\ngrass\n")
    with pytest.warns(WsssWarning, match="^--classes .*names.txt: grass: regions"):
        Chain.open(world.bundle, classes=f"{tmp_path / 'names.txt'}")
    Chain.open(world.bundle, classes="red, grass", until="tag")  # CLIP knows them
    (tmp_path / "boxes.json").write_text("{}")
    Chain.open(world.bundle, classes="red, grass", boxes=tmp_path / "boxes.json")


def test_a_photograph_without_range_is_warned_of(world: World, tmp_path: Path) -> None:
    world.save(tmp_path / "black.png", 8, 8)
    labeler = Chain.open(world.bundle, classes=world.classes)
    with pytest.warns(WsssWarning, match=r"^black\.png: next to no range"):
        labeler.label(tmp_path / "black.png")


@pytest.mark.parametrize("name", ["tag_threshold", "box_threshold", "nms", "nms_across", "margin"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_rules_outside_0_to_1_are_refused_as_typed(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"^--{name.replace('_', '-')}: expected a number in 0..1") as caught:
        Rules(**{name: value})  # type: ignore[arg-type]
    assert caught.value.hint == f"the default is {getattr(Rules(), name) or 'the one of the bundle'}"


# ---- stopwatch ----


def test_seconds_of_each_stage_since_last_asked(world: World) -> None:
    labeler = Chain.open(world.bundle, classes=class_list(["red"]))
    assert labeler.take_seconds() == {"tag": 0, "detect": 0, "segment": 0, "fuse": 0}
    labeler.label(two_colors(world))
    assert all(seconds > 0 for seconds in labeler.take_seconds().values())
    assert sum(labeler.take_seconds().values()) == 0


def test_a_stage_that_fails_is_timed_too() -> None:
    def stage() -> None:
        time.sleep(0.01)
        raise WsssError("broken")

    timed = Timed(stage)
    for _ in range(2):
        with pytest.raises(WsssError):
            timed()
    assert timed.seconds >= 0.02


def test_unknown_classes_are_ignored_only_in_labels_and_boxes_of_the_user(world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="^--ignore-unknown needs --labels or --boxes"):
        Chain.open(world.bundle, classes=world.classes, ignore_unknown=True)
    (tmp_path / "given.json").write_text("{}")
    Chain.open(world.bundle, classes=world.classes, ignore_unknown=True, labels=tmp_path / "given.json")
    Chain.open(world.bundle, classes=world.classes, ignore_unknown=True, boxes=tmp_path / "given.json")
