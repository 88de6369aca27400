"""Masks that come back from annotation tools: unchanged ones change nothing, changed ones replace the label and stay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsss.errors import UsageError, WsssError
from wsss.rle import MaskRuns
from wsss.runtime.chain import Chain
from wsss.runtime.convert.corrections import correct_store, read_corrections
from wsss.runtime.convert.dataset import convert
from wsss.runtime.convert.label_studio import brush_rle
from wsss.runtime.convert.labeled import read_labelled
from wsss.runtime.run.label_folder import label_folder
from wsss.store.local import read_label, read_records

from ...conftest import World

CLASSES = ("red", "green", "blue")
SHAPE = (40, 60)


@pytest.fixture
def store(world: World, photos: Path, tmp_path: Path) -> Path:
    """The store of ``photos``, in which two.png (60 x 40) has a red box at the upper left and a blue one."""
    label_folder(labeler_of(world), photos, tmp_path / "store")
    return tmp_path / "store"


def labeler_of(world: World) -> Chain:
    return Chain.open(world.bundle, classes=",".join(CLASSES), engine="ort")


def record_of(store: Path, name: str = "two.png") -> dict[str, Any]:
    return next(record for record in read_records(store) if record["path"] == name)


def label_of(store: Path, name: str = "two.png") -> np.ndarray:
    return read_label(store / "labels" / record_of(store, name)["label"])


def contents(store: Path) -> dict[str, bytes]:
    return {
        path.relative_to(store).as_posix(): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.name != "history.jsonl"
    }


def exported(store: Path, photos: Path, to: str, change: Callable[[Any], None] = lambda document: None) -> Path:
    """What a tool gives back: the data set of the store, its document changed."""
    out = store.parent / f"out-{to}"
    shutil.rmtree(out, ignore_errors=True)
    convert(store, photos, out, to)
    if to in ("voc", "cvat"):
        change(out)
        return out
    path = out / {"coco": "annotations/instances_train.json", "label-studio": "tasks.json"}[to]
    document = json.loads(path.read_text())
    if to == "label-studio":
        for task in document:
            task["annotations"] = [{"result": task.pop("predictions")[0]["result"]}]
    change(document)
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize("to", ["coco", "label-studio", "cvat", "voc"])
def test_what_was_not_changed_changes_nothing(store: Path, photos: Path, to: str) -> None:
    before = contents(store)
    done = correct_store(store, exported(store, photos, to))
    assert (done.corrected, done.unchanged, done.unknown) == (0, 5, [])
    assert contents(store) == before


def two_of(document: Any) -> int:
    return next(each["id"] for each in document["images"] if each["file_name"] == "two.png")


def remove_red_and_add_green(document: Any) -> None:
    """In COCO: the red object of two.png goes, and a green rectangle comes as a polygon, partly over the blue one."""
    image = two_of(document)
    document["annotations"] = [each for each in document["annotations"] if (each["image_id"], each["category_id"]) != (image, 1)]
    polygon = [[50, 20, 58, 20, 58, 38, 50, 38]]
    document["annotations"].append({"id": 99, "image_id": image, "category_id": 2, "segmentation": polygon, "bbox": [0, 0, 1, 1]})


def test_removed_and_added_objects(store: Path, photos: Path, world: World) -> None:
    before, others = label_of(store), label_of(store, "red.png")
    blue = record_of(store)["boxes"][1]
    done = correct_store(store, exported(store, photos, "coco", remove_red_and_add_green))
    assert (done.corrected, done.unchanged) == (1, 4)
    expected = np.where(before == 1, 0, before)
    expected[20:38, 50:58] = 2
    np.testing.assert_array_equal(label_of(store), expected)
    np.testing.assert_array_equal(label_of(store, "red.png"), others)
    record = record_of(store)
    assert record["corrected"] == "instances_train.json"
    assert record["classes"].keys() == {"green", "blue"}
    assert record["boxes"][0] == blue, "what was not changed keeps its scores"
    added = record["boxes"][1]
    assert (added["label"], added["score"], added["quality"]) == ("green", 1.0, 1.0)
    assert (added["xyxy"], added["won_px"]) == ([50.0, 20.0, 58.0, 38.0], 8 * 18)

    item = next(item for item in read_labelled(store, photos) if item.path == "two.png")
    assert [item.mask(box).area() for box in item.boxes][1] == 8 * 18, "its mask is kept as SAM's are"
    corrected = contents(store)
    assert label_folder(labeler_of(world), photos, store).labelled == 0
    assert contents(store) == corrected, "the next run keeps it"
    done = correct_store(store, exported(store, photos, "coco"))
    assert (done.corrected, done.unchanged) == (0, 5)


def test_a_photograph_that_changed_is_labeled_again(store: Path, photos: Path, world: World) -> None:
    correct_store(store, exported(store, photos, "coco", remove_red_and_add_green))
    world.save(photos / "two.png", *SHAPE, blue=(0, 0, 20, 20))
    assert label_folder(labeler_of(world), photos, store).labelled == 1
    assert "corrected" not in record_of(store)


def test_label_studio_brushes_polygons_and_void(store: Path, photos: Path) -> None:
    def paint(tasks: Any) -> None:
        task = next(task for task in tasks if task["data"]["image"].endswith("two.png"))
        regions = task["annotations"][0]["result"]
        red = next(region for region in regions if region["value"]["brushlabels"] == ["red"])
        mask = np.zeros(SHAPE, bool)
        mask[30:36, 2:20] = True
        spans = np.flatnonzero(np.diff(np.append(np.append(False, mask.ravel()), False)))
        red["value"]["rle"] = brush_rle(spans.reshape(-1, 2), mask.size)
        size = {"original_width": SHAPE[1], "original_height": SHAPE[0]}
        points = [[100 * x / SHAPE[1], 100 * y / SHAPE[0]] for x, y in ((40, 2), (50, 2), (50, 8), (40, 8))]
        regions.append({"type": "polygonlabels", **size, "value": {"points": points, "polygonlabels": ["void"]}})

    before = label_of(store)
    assert correct_store(store, exported(store, photos, "label-studio", paint)).corrected == 1
    expected = np.where((before == 1) | (before == 255), 0, before)
    expected[30:36, 2:20] = 1
    expected[2:8, 40:50] = 255
    np.testing.assert_array_equal(label_of(store), expected)
    assert record_of(store)["void_px"] == 60


def test_masks_of_cvat(store: Path, photos: Path) -> None:
    def paint(out: Path) -> None:
        (path,) = (out / "SegmentationClass").glob("two.png")
        image = Image.open(path).convert("RGB")
        image.paste(Image.open(path).convert("RGB").getpixel((5, 5)), (10, 30, 20, 38))  # red, on the background
        image.save(path)

    before = label_of(store)
    assert before[5, 5] == 1
    assert correct_store(store, exported(store, photos, "cvat", paint)).corrected == 1
    before[30:38, 10:20] = 1
    np.testing.assert_array_equal(label_of(store), before)
    assert [box["label"] for box in record_of(store)["boxes"]] == ["red", "blue"]


def drop(key: str) -> Callable[[Any], None]:
    return lambda document: document["annotations"][0].pop(key)


def rename_class(document: Any) -> None:
    document["categories"][0]["name"] = "rouge"


def other_size(document: Any) -> None:
    document["images"][0].update(height=7, width=9)
    for each in document["annotations"]:
        each["segmentation"] = [[0, 0, 5, 0, 5, 5]]


def other_names(document: Any) -> None:
    for each in document["images"]:
        each["file_name"] = f"other-{each['file_name']}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("segmentation"), "is damaged: KeyError 'segmentation'"),
        (drop("image_id"), "is damaged"),
        (rename_class, "has the class 'rouge', which the store lacks"),
        (other_size, "expected .* pixels"),
        (other_names, "the store has none of its 5 images, for example 'other-"),
        (
            lambda document: document["annotations"][0].update(segmentation={"size": [1 << 40, 1 << 40], "counts": "1"}),
            "a size of",
        ),
        (lambda document: document["annotations"][0]["segmentation"].update(counts="~"), "is damaged: ValueError"),
        (
            lambda document: document["annotations"][0].update(segmentation=[[0, 0, 1e999, 1, 5, 5]]),
            "expected finite numbers|finite",
        ),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(store: Path, photos: Path, change: Callable[[Any], None], message: str) -> None:
    before = contents(store)
    with pytest.raises(WsssError, match=message) as found:
        correct_store(store, exported(store, photos, "coco", change))
    assert found.value.hint
    assert contents(store) == before


@pytest.mark.parametrize("text", ["[]", "{}", "[1]", "no JSON", '[{"data": {"image": "x"}, "annotations": []}]'])
def test_other_files_are_refused(store: Path, tmp_path: Path, text: str) -> None:
    (path := tmp_path / "file.json").write_text(text)
    with pytest.raises(WsssError, match="file.json: "):
        correct_store(store, path)
    with pytest.raises(WsssError, match="has no folder SegmentationClass"):
        correct_store(store, tmp_path / "photos")


def test_a_color_of_no_class_is_refused(store: Path, photos: Path) -> None:
    def paint(out: Path) -> None:
        Image.new("RGB", SHAPE[::-1], (1, 2, 3)).save(out / "SegmentationClass" / "two.png")

    with pytest.raises(WsssError, match="has the color #010203, which labelmap.txt lacks"):
        correct_store(store, exported(store, photos, "cvat", paint))


def test_uncompressed_runs_are_those_of_pycocotools(store: Path, photos: Path) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    mask = np.asfortranarray(np.random.default_rng(0).random(SHAPE) < 0.4)
    mask[0, 0] = True
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    counts = [0, *counts]  # it begins with background

    def change(document: Any) -> None:
        document["annotations"] = [
            {"id": 1, "image_id": two_of(document), "category_id": 1, "segmentation": {"size": list(SHAPE), "counts": counts}}
        ]

    found = {each.name: each for each in read_corrections(exported(store, photos, "coco", change), CLASSES)}
    ((label, runs),) = found["two.png"].objects
    assert label == 1
    np.testing.assert_array_equal(runs.mask(), mask)
    assert runs.counts() == coco.encode(mask.astype(np.uint8, order="F"))["counts"].decode() == MaskRuns.of(mask).counts()


def test_the_command(store: Path, photos: Path, wsss: Any) -> None:
    path = exported(store, photos, "coco", remove_red_and_add_green)
    assert wsss("correct", store, path).out == f"{store}: 1 labels corrected, 4 unchanged\n"
    answer = wsss("correct", store, path.parent / "none.json")
    assert answer.code == 1 and "hint:" in answer.err
    with pytest.raises(UsageError):
        correct_store(store, exported(store, photos, "coco", other_names))


def test_an_image_that_the_file_has_twice_is_refused(store: Path, photos: Path) -> None:
    def twice(document: Any) -> None:
        document["images"].append({**document["images"][0], "id": 99})

    with pytest.raises(WsssError, match="has 'black.png' twice"):
        correct_store(store, exported(store, photos, "coco", twice))


def test_a_folder_of_the_photographs_may_be_called_train(world: World, photos: Path, tmp_path: Path) -> None:
    """Each of a.png and train/a.png gets its own correction, in any order of the file."""
    shutil.copytree(photos / "sub", photos / "train")
    shutil.copy(photos / "sub" / "three.png", photos / "three.png")
    label_folder(labeler_of(world), photos, tmp_path / "store")
    store = tmp_path / "store"
    for reverse in (False, True):

        def remove(document: Any, reverse: bool = reverse) -> None:
            image = next(each["id"] for each in document["images"] if each["file_name"] == "train/three.png")
            document["annotations"] = [each for each in document["annotations"] if each["image_id"] != image]
            document["images"].sort(key=lambda each: each["file_name"], reverse=reverse)

        done = correct_store(store, exported(store, photos, "coco", remove))
        assert done.corrected == (not reverse) and not done.unknown
        assert label_of(store, "train/three.png").max() == 0 or set(np.unique(label_of(store, "train/three.png"))) == {0, 255}
        assert label_of(store, "three.png").max() >= 3


def test_masks_that_fit_two_photographs_are_refused(world: World, photos: Path, tmp_path: Path) -> None:
    Image.open(photos / "two.png").save(photos / "two.bmp")
    label_folder(labeler_of(world), photos, tmp_path / "store")

    def rename(out: Path) -> None:
        for path in (out / "SegmentationClass").glob("two*"):
            path.unlink()
        Image.new("RGB", SHAPE[::-1]).save(out / "SegmentationClass" / "two.png")

    with pytest.raises(WsssError, match="'two' could be 'two.bmp' or 'two.png' of the store"):
        correct_store(tmp_path / "store", exported(tmp_path / "store", photos, "cvat", rename))
