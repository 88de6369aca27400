"""The look through a store: what can be trained on, what cannot and why, and how sure the store is of its labels."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsss.classes import class_list
from wsss.errors import StoreError
from wsss.store.decisions import exclusion
from wsss.store.local import LabelFolder, LabelStore, read_label, read_records, write_label
from wsss.train.dataset.survey import Item, Survey, class_confidence, read_survey, survey_store, write_survey

Scenes = tuple[Path, Path]
Edit = Callable[[Callable[[dict[str, Any]], None]], None]


def test_a_store_is_counted(scenes: Scenes, tmp_path: Path) -> None:
    survey = survey_store(*scenes)
    assert (len(survey.items), len(survey.classes), survey.failed) == (8, 12, 0)
    for item in survey.items:
        label = read_label(scenes[0] / "labels" / item.label)
        assert item.pixels == tuple(int((label == value).sum()) for value in range(13))
        assert len(item.confidence) == 13
    write_survey(tmp_path / "survey.json", survey)
    assert read_survey(tmp_path / "survey.json") == survey


def test_the_digest_tells_labels_apart(scenes: Scenes, edit_record: Edit) -> None:
    store, images = scenes
    before = survey_store(store, images).digest
    assert survey_store(store, images).digest == before
    path = store / "labels" / "scene-00.png"
    label = read_label(path)
    label[10, 10] = 7 - label[10, 10] % 2
    write_label(path, label)
    after = survey_store(store, images).digest
    assert after != before
    edit_record(lambda record: [box.update(score=0.31) for box in record["boxes"]])
    assert survey_store(store, images).digest not in (before, after)


@pytest.mark.parametrize("field", ["sha256", "height", "width"])
def test_a_line_that_lacks_a_field_is_named(scenes: Scenes, edit_record: Edit, field: str) -> None:
    edit_record(lambda record: record.pop(field))
    with pytest.raises(StoreError, match=rf"manifest\.jsonl: .*{field}"):
        survey_store(*scenes)


def test_failed_images_are_left_out(scenes: Scenes) -> None:
    store, images = scenes
    with LabelStore(store, named(store), {"rules": "truth"}) as out:
        out.write({"path": "bad.png", "label": "bad.png", "bytes": 0, "sha256": "", "error": "not a readable image"}, None)
    survey = survey_store(store, images)
    assert (len(survey.items), survey.failed) == (8, 1)


def test_confidence_of_pixels_is_checked(scenes: Scenes) -> None:
    """Where it is asked for: that it is there, gray, of the label's size, and inside of the store."""
    store, _ = scenes
    assert survey_store(*scenes).confidence == ()
    with pytest.raises(StoreError, match=r"loss\.confidence = pixel: the store has no confidence of pixels") as caught:
        survey_store(*scenes, confidence=True)
    assert "wsss label --confidence" in caught.value.hint
    folder = LabelFolder(store / "labels", store)
    for number in range(8):
        folder.write_confidence(f"scene-{number:02d}.png", np.full((48, 56), 200, np.uint8))
    survey = survey_store(*scenes, confidence=True)
    assert [sum(row) for row in survey.confidence] == np.sum([item.pixels for item in survey.items], axis=0).tolist()
    folder.write_confidence("scene-04.png", np.full((48, 56), 201, np.uint8))
    assert survey_store(*scenes, confidence=True).digest != survey.digest != survey_store(*scenes).digest
    folder.write_confidence("scene-01.png", np.full((48, 55), 200, np.uint8))
    (store / "confidence" / "scene-02.png").unlink()
    Image.new("RGB", (56, 48)).save(store / "confidence" / "scene-03.png")
    with pytest.raises(StoreError, match="3 of 8 images cannot be trained on") as caught:
        survey_store(*scenes, confidence=True)
    assert all(part in caught.value.message for part in ("55 x 48 pixels", "scene-02.png", "got mode RGB"))
    (store / "confidence" / "scene-02.png").symlink_to(store.parent / "images" / "scene-02.png")
    with pytest.raises(StoreError, match="a link leads out of the store"):
        survey_store(*scenes, confidence=True)


def named(store: Path) -> Any:
    return class_list(json.loads((store / "run.json").read_text())["classes"])


def missing(store: Path, images: Path) -> str:
    (images / "scene-03.png").unlink()
    return "scene-03.png: the image: cannot be read: No such file"


def changed(store: Path, images: Path) -> str:
    with Image.open(images / "scene-03.png") as image:
        image.rotate(180).save(images / "scene-03.png")
    return "scene-03.png: the image has changed since it was labeled"


def unlabelled(store: Path, images: Path) -> str:
    (store / "labels" / "scene-03.png").unlink()
    return "scene-03.png: cannot be read"


def of_another_size(store: Path, images: Path) -> str:
    write_label(store / "labels" / "scene-03.png", np.zeros((56, 48), np.uint8))
    return "scene-03.png: the image is 48 x 56 pixels, its label 56 x 48"


def beyond_the_list(store: Path, images: Path) -> str:
    write_label(store / "labels" / "scene-03.png", np.full((48, 56), 13, np.uint8))
    return "scene-03.png: its label map has label 13, the store has 12 classes"


@pytest.mark.parametrize("damage", [missing, changed, unlabelled, of_another_size, beyond_the_list])
def test_what_cannot_be_trained_on_is_named(scenes: Scenes, damage: Callable[[Path, Path], str]) -> None:
    said = damage(*scenes)
    with pytest.raises(StoreError) as caught:
        survey_store(*scenes)
    assert "1 of 8 images cannot be trained on" in caught.value.message
    assert said in caught.value.message
    assert "--images" in caught.value.hint


def test_many_bad_images_are_counted_and_the_first_named(scenes: Scenes, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"8 of 8 images(.|\n)*scene-02\.png(.|\n)*and 5 more") as caught:
        survey_store(scenes[0], tmp_path / "elsewhere")
    assert "scene-03" not in caught.value.message


def test_an_empty_store(tmp_path: Path) -> None:
    with LabelStore(tmp_path / "empty", class_list(["dog"]), {}) as out:
        pass
    with pytest.raises(StoreError, match="no image in it yet"):
        survey_store(tmp_path / "empty", tmp_path)
    with LabelStore(tmp_path / "empty", class_list(["dog"]), {}) as out:
        out.write({"path": "a.png", "label": "a.png", "bytes": 0, "sha256": "", "error": "no"}, None)
    with pytest.raises(StoreError, match="none of its 1 images could be labeled"):
        survey_store(tmp_path / "empty", tmp_path)
    with pytest.raises(StoreError, match="expected a label store"):
        survey_store(tmp_path, tmp_path)


def box(label: str, score: float, quality: float, won: int) -> dict[str, Any]:
    return {"label": label, "score": score, "quality": quality, "won_px": won}


@pytest.mark.parametrize(
    ("record", "pixels", "expected"),
    [
        ({}, [9, 9, 0], [1, 1, 1]),
        ({"classes": {"dog": 0.5}}, [9, 9, 0], [1, 1, 1]),
        ({"boxes": [], "classes": {}}, [9, 0, 0], [1, 1, 1]),
        ({"boxes": [], "classes": {"dog": 0.75}}, [9, 0, 0], [0.25, 1, 1]),
        ({"boxes": [], "classes": {"dog": 0.75}}, [9, 9, 0], [1, 0.75, 1]),  # as a segmenter's store has it
        ({"boxes": [], "classes": {"dog": 0.75, "cat": 0.6}}, [9, 9, 0], [0.4, 0.75, 1]),
        ({"boxes": [box("dog", 0.5, 0.8, 10)], "classes": {"dog": 0.9}}, [9, 10, 0], [1, 0.4, 1]),
        ({"boxes": [box("dog", 0.5, 0.8, 1)], "classes": {"dog": 0.9}}, [9, 1, 0], [1, 0.4, 1]),
        ({"boxes": [box("dog", 0.5, 0.8, 30), box("dog", 1, 1, 10)], "classes": {"dog": 0.9}}, [9, 40, 0], [1, 0.55, 1]),
        ({"boxes": [box("cat", 0.5, 0.5, 9), box("dog", 1, 1, 0)], "classes": {"dog": 0.6, "cat": 1}}, [9, 0, 9], [0.4, 1, 0.25]),
        ({"boxes": [box("cat", 1.0001, 1, 9)], "classes": {"cat": 1}}, [9, 0, 9], [1, 1, 1]),
        ({"boxes": [{**box("dog", 0.5, 0.8, 9), "stability": 0.5}], "classes": {"dog": 0.9}}, [9, 9, 0], [1, 0.2, 1]),
    ],
)
def test_confidence_is_score_times_quality_by_pixels_won(
    record: dict[str, Any], pixels: list[int], expected: list[float]
) -> None:
    assert class_confidence(record, ["dog", "cat"], pixels) == pytest.approx(expected)


def survey_of(count: int) -> Survey:
    items = tuple(
        Item(path=f"{n}.jpg", label=f"{n}.png", sha256="", confidence=(1, 1), pixels=(9, 0), size=(3, 3)) for n in range(count)
    )
    return Survey(classes=("dog",), items=items, failed=0, digest="")


@pytest.mark.parametrize(
    ("count", "share", "limit", "held_out"), [(1, 0.9, 9, 0), (20, 0, 9, 0), (20, 0.25, 9, 5), (20, 0.25, 3, 3), (3, 0.9, 9, 2)]
)
def test_the_split_takes_everything_once(count: int, share: float, limit: int, held_out: int) -> None:
    survey = survey_of(count)
    training, validation = survey.split(share, limit)
    assert len(validation) == held_out
    assert sorted(item.path for item in (*training, *validation)) == sorted(item.path for item in survey.items)


def test_an_image_added_leaves_the_others_where_they_were() -> None:
    before, after = (set(survey_of(count).split(0.5, 10**6)[1]) for count in (200, 202))
    assert len(before - after) <= 2


def test_the_records_are_not_touched(scenes: Scenes) -> None:
    before = list(read_records(scenes[0]))
    survey_store(*scenes)
    assert list(read_records(scenes[0])) == before


def test_a_pipe_in_an_images_place_is_not_waited_for(scenes: Scenes) -> None:
    store, images = scenes
    (images / "scene-00.png").unlink()
    os.mkfifo(images / "scene-00.png")
    with pytest.raises(
        StoreError,
        match=r"1 of 8 images cannot be trained on:\n  scene-00\.png: the image: expected a regular file, got a named pipe",
    ):
        survey_store(store, images)


def test_rejected_images_are_not_read(scenes: Scenes, tmp_path: Path) -> None:
    store, images = scenes
    (path := tmp_path / "list.txt").write_text("scene-01.png\nscene-04.png\n")
    (images / "scene-04.png").unlink()
    said: list[str] = []
    survey = survey_store(store, images, exclude=exclusion(path), log=said.append)
    assert [item.path for item in survey.items] == [f"scene-{number:02}.png" for number in (0, 2, 3, 5, 6, 7)]
    assert said == [f"--exclude {path}: 2 images are left out"]
