"""Boxes of COCO files: annotations and detections."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsss.batch import Boxes, Labels, Photograph
from wsss.classes import class_list
from wsss.errors import WsssError
from wsss.runtime.given.stages import BoxesFromFile

CLASSES = class_list(["dog", "potted plant"])
NOTHING = Labels(np.zeros((0, 2), np.float32), np.zeros((0, 2), bool))


def coco(**changes: Any) -> dict[str, Any]:
    return {
        "info": {"year": 2026},
        "images": [
            {"id": 9, "file_name": "a/x.jpg", "height": 40, "width": 60},
            {"id": 4, "file_name": "y.jpg", "height": 40, "width": 60},
        ],
        "categories": [{"id": 18, "name": "Dog"}, {"id": 64, "name": "potted plant"}],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 64, "bbox": [30, 20, 10, 8], "iscrowd": 0, "segmentation": []},
            {"id": 2, "image_id": 9, "category_id": 18, "bbox": [0, 0, 20.5, 10], "score": 0.25},
        ],
    } | changes


def annotation(**changes: Any) -> dict[str, Any]:
    return {"image_id": 9, "category_id": 18, "bbox": [1, 2, 10, 20]} | changes


def given(tmp_path: Path, document: object, notes: list[str] | None = None) -> BoxesFromFile:
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(document))
    return BoxesFromFile(path, CLASSES, warn=(notes if notes is not None else []).append)


def photo(name: str = "a/x.jpg", height: int = 40, width: int = 60) -> Photograph:
    return Photograph(name=name, pixels=np.zeros((height, width, 3), np.uint8))


def boxes(stage: BoxesFromFile, *photos: Photograph) -> Boxes:
    assert [stage.missing(each) for each in photos] == [None] * len(photos)
    return stage(photos, NOTHING)


def test_annotations_and_detections(tmp_path: Path) -> None:
    found = boxes(given(tmp_path, coco()), photo("y.jpg"), photo())
    assert found.image.tolist() == [1, 1], "an image without annotations is background"
    assert found.xyxy_image.tolist() == [[30, 20, 40, 28], [0, 0, 20.5, 10]]
    assert found.label.tolist() == [2, 1]
    assert found.score.tolist() == [1, 0.25]


def test_an_image_that_is_not_in_the_file(tmp_path: Path) -> None:
    error = given(tmp_path, coco()).missing(photo("x.jpg"))
    assert error is not None
    assert "has no entry in" in error.message
    assert "the file has 'a/x.jpg'" in error.hint


def test_another_size(tmp_path: Path) -> None:
    assert "annotates a photograph of 60 x 40" in str(given(tmp_path, coco()).missing(photo(height=20, width=30)))


@pytest.mark.parametrize(("height", "width"), [(0, 60), (40, 0), (40, None), (40.5, 60), (-40, 60), (True, 60), ("40", 60)])
def test_half_a_size_is_refused(tmp_path: Path, height: object, width: object) -> None:
    images = [{"id": 9, "file_name": "a/x.jpg", "height": height, "width": width}]
    error = str(given(tmp_path, coco(images=images)).missing(photo()))
    assert f"a/x.jpg: expected a height and width in pixels, got {height!r} and {width!r}" in error


def test_crowds_are_left_out_and_announced(tmp_path: Path) -> None:
    notes: list[str] = []
    crowd = annotation(iscrowd=1, segmentation={"counts": [1], "size": [40, 60]})
    found = boxes(given(tmp_path, coco(annotations=[annotation(), crowd]), notes), photo())
    assert found.xyxy_image.tolist() == [[1, 2, 11, 22]]
    assert "1 of 2 boxes left out: 1 of a crowd (iscrowd)" in notes[0]
    assert "no box remains of 1: 1 of a crowd" in str(given(tmp_path, coco(annotations=[crowd])).missing(photo()))


def test_corners_in_the_place_of_sides(tmp_path: Path) -> None:
    stage = given(tmp_path, coco(annotations=[annotation(bbox=[30, 20, 50, 38]), annotation(bbox=[0, 0, 9, 9])]))
    assert "got what looks like corners" in str(stage.missing(photo()))
    beyond = given(tmp_path, coco(annotations=[annotation(bbox=[30, 20, 28, 38]), annotation(bbox=[40, 2, 22, 9]), annotation()]))
    assert beyond.missing(photo()) is None, "a detection that reaches a little beyond"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": []}, "it has no annotations"),
        ({"annotations": None}, "expected a list of objects under annotations"),
        ({"categories": 3}, "expected a list of objects under categories"),
        ({"images": [3]}, "expected a list of objects under images"),
        ({"images": [{"id": 1}]}, "expected a string under file_name"),
        ({"images": [{"id": 1.5, "file_name": "x"}]}, "expected a number or string under id"),
        ({"images": [{"id": True, "file_name": "x"}]}, "expected a number or string under id, got true"),
        ({"images": [{"id": 9, "file_name": "x"}, {"id": 9, "file_name": "y"}]}, "the id 9 occurs twice"),
        ({"images": [{"id": 9, "file_name": "x"}, {"id": 8, "file_name": "x"}]}, "'x' occurs twice"),
        ({"images": [{"id": 9, "file_name": "x"}, {"id": 8, "file_name": "./x"}]}, "are the same photograph"),
        ({"categories": [{"id": 1, "name": "dog"}, {"id": 1, "name": "cat"}]}, "the id 1 occurs twice"),
        ({"annotations": [annotation(image_id=5)]}, "an annotation is of image 5, which is not among the images"),
        ({"annotations": [annotation(image_id="9")]}, "an annotation is of image '9', which is not"),
        ({"annotations": [annotation(score=87)]}, "expected a score in 0..1, got 87"),
    ],
)
def test_a_bad_file(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WsssError) as caught:
        given(tmp_path, coco(**changes))
    assert message in caught.value.message
    assert caught.value.message.startswith(f"--boxes {tmp_path / 'coco.json'}")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"category_id": 0}, "category 0 is not among the categories"),
        ({"bbox": None}, "expected bbox as x, y, width, height, got null"),
        ({"bbox": [1, 2, -3, 4]}, "expected bbox as x, y, width, height"),
        ({"bbox": [1, 2, 3, 4, 0.5]}, "expected bbox as x, y, width, height"),
        ({"bbox": [0.1, 0.2, 0.3, 0.4]}, "coordinates in 0..1"),
        ({"score": None}, "expected a score in 0..1, got null"),
    ],
)
def test_a_bad_annotation(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    error = given(tmp_path, coco(annotations=[annotation(**changes)])).missing(photo())
    assert error is not None
    assert message in error.message
    assert "coco.json: a/x.jpg: " in error.message
    assert error.hint


@pytest.mark.parametrize(("key", "message"), [("bbox", "bbox as x, y, width, height"), ("category_id", "number or string under")])
def test_an_annotation_without_a_key(tmp_path: Path, key: str, message: str) -> None:
    """It is not null: nothing stands there."""
    missing = {name: value for name, value in annotation().items() if name != key}
    error = given(tmp_path, coco(annotations=[missing])).missing(photo())
    assert error is not None
    assert message in error.message
    assert error.message.endswith("got nothing")


def test_detections_alone_do_not_say_which_images(tmp_path: Path) -> None:
    with pytest.raises(WsssError, match="got a list of detections") as caught:
        given(tmp_path, [annotation(score=0.5)])
    assert '"images"' in caught.value.hint
