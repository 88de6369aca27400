"""What the user already knows: class names and boxes from files, each mistake named with its file and image."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from wsss.batch import Labels
from wsss.classes import class_list
from wsss.errors import WsssError
from wsss.runtime.given import GivenBoxes, GivenLabels, given_hash, read_voc_xml

if TYPE_CHECKING:
    from ..conftest import World

CLASSES = class_list(["dog", "cat", "potted plant"])
NOTHING = Labels(np.zeros((0, 3), np.float32), np.zeros((0, 3), bool))
VOC = """<annotation><filename>x.jpg</filename>
<object><name>dog</name><difficult>1</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>500</xmax><ymax>375</ymax></bndbox>
  <part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part></object>
<object><name> potted plant </name><bndbox><ymin>20.5</ymin><xmin>10</xmin><ymax>40</ymax><xmax>30</xmax></bndbox></object>
</annotation>"""


def written(path: Path, told: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(told if isinstance(told, str) else json.dumps(told), encoding="utf-8")
    return path


# ---- labels ----


def test_labels_by_name(world: World, tmp_path: Path) -> None:
    path = written(tmp_path / "labels.json", {"a.jpg": ["cat"], "sub/b.jpg": [], "c.jpg": ["potted plant", "dog", "dog"]})
    given = GivenLabels(path, CLASSES)
    labels = given([world.photo(3, 3, name) for name in ("c.jpg", "sub/b.jpg", "a.jpg")])
    assert labels.present.tolist() == [[True, False, True], [False, False, False], [False, True, False]]
    assert labels.score.dtype == np.float32
    assert np.array_equal(labels.score, labels.present)
    assert given([]).present.shape == (0, 3)
    assert given.missing("a.jpg") is None
    assert given.missing("b.jpg") == f"b.jpg: has no entry in {path}"


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("", "expected a JSON file"),
        ("{", "expected a JSON file"),
        ([], "expected a JSON object of image names"),
        ({"a.jpg": "dog"}, "expected a JSON object of image names"),
        ({"a.jpg": ["dgo"]}, "a.jpg: the class 'dgo' is not in this run's list: dog, cat, potted plant"),
        ({"a.jpg": [1]}, "a.jpg: the class '1' is not in"),
    ],
)
def test_bad_labels(tmp_path: Path, told: object, said: str) -> None:
    path = written(tmp_path / "labels.json", told)
    with pytest.raises(WsssError, match=re.escape(said)) as caught:
        GivenLabels(path, CLASSES)
    assert caught.value.message.startswith(f"--labels {path}")


def test_no_labels_file(tmp_path: Path) -> None:
    with pytest.raises(WsssError, match=r"--labels .*none\.json: expected a JSON file"):
        GivenLabels(tmp_path / "none.json", CLASSES)


# ---- boxes ----


def test_voc_corners_become_zero_based(tmp_path: Path) -> None:
    """1-based inclusive: a box over the whole of 500 x 375 is [0, 0, 500, 375]. A dog's head is not an object."""
    assert read_voc_xml(written(tmp_path / "x.xml", VOC)) == [
        {"label": "dog", "xyxy": [0, 0, 500, 375]},
        {"label": "potted plant", "xyxy": [9, 19.5, 30, 40]},
    ]
    assert read_voc_xml(written(tmp_path / "x.xml", "<annotation/>")) == []


def test_boxes_from_a_voc_folder(world: World, tmp_path: Path) -> None:
    """Beside the image's own folders, or all in one folder."""
    written(tmp_path / "xml" / "sub" / "x.xml", VOC)
    written(tmp_path / "xml" / "flat.xml", "<annotation/>")
    given = GivenBoxes(tmp_path / "xml", CLASSES)
    boxes = given([world.photo(375, 500, "deep/flat.jpg"), world.photo(375, 500, "sub/x.jpg")], NOTHING)
    assert boxes.image.tolist() == [1, 1]
    assert boxes.label.tolist() == [1, 3]
    assert boxes.score.tolist() == [1, 1]
    assert boxes.xyxy_image.tolist() == [[0, 0, 500, 375], [9, 19.5, 30, 40]]
    assert given.missing("sub/x.jpg") is None
    assert "cannot be read" in str(given.missing("y.jpg"))


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_boxes_from_one_file(world: World, tmp_path: Path, suffix: str) -> None:
    told = {
        "a.jpg": [{"label": "cat", "xyxy": [1, 2, 30, 40], "score": 0.25}, {"label": "dog", "xyxy": [0, 0, 5.5, 6]}],
        "b.jpg": [],
    }
    lines = [{"path": name, "boxes": boxes, "quality": 1} for name, boxes in told.items()] + [
        {"path": "c.jpg", "error": "broken"}
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + "\n" if suffix == "jsonl" else json.dumps(told)
    given = GivenBoxes(written(tmp_path / f"boxes.{suffix}", text), CLASSES)
    boxes = given([world.photo(60, 60, "b.jpg"), world.photo(60, 60, "a.jpg")], NOTHING)
    assert boxes.image.tolist() == [1, 1]
    assert boxes.label.tolist() == [2, 1]
    assert boxes.score.tolist() == [0.25, 1]
    assert boxes.xyxy_image.tolist() == [[1, 2, 30, 40], [0, 0, 5.5, 6]]
    assert given.missing("c.jpg") == f"c.jpg: has no entry in {tmp_path / f'boxes.{suffix}'}"
    assert len(given([], NOTHING)) == 0


def test_boxes_are_clipped_to_the_photograph(world: World, tmp_path: Path) -> None:
    boxes = [[-5, -5, 10, 10], [50, 30, 90, 90], [60, 0, 70, 10], [20, 20, 10, 30]]
    path = written(tmp_path / "boxes.json", {"x.png": [{"label": "dog", "xyxy": box} for box in boxes]})
    found = GivenBoxes(path, CLASSES)([world.photo(40, 60)], NOTHING)
    assert found.xyxy_image.tolist() == [[0, 0, 10, 10], [50, 30, 60, 40]], "outside and inside out ones are dropped"


@pytest.mark.parametrize(
    ("box", "said"),
    [
        (7, "expected a box, got 7"),
        ({"xyxy": [0, 0, 1, 1]}, "expected a box"),
        ({"label": 1, "xyxy": [0, 0, 1, 1]}, "expected a box"),
        ({"label": "dog"}, "expected a box"),
        ({"label": "dog", "xyxy": [0, 0, 1]}, "expected a box"),
        ({"label": "dog", "xyxy": "0 0 1 1"}, "expected a box"),
        ({"label": "dog", "xyxy": [0, 0, 1, "1"]}, "expected a box"),
        ({"label": "dog", "xyxy": [0, 0, 1, True]}, "expected a box"),
        ({"label": "dog", "xyxy": [0, 0, 1, float("nan")]}, "expected a box"),
        ({"label": "dog", "xyxy": [0, 0, 1, 1], "score": None}, "expected a box"),
        ({"label": "dog", "xyxy": [0, 0, 1, 1], "score": 1.5}, "expected a score in 0..1, got 1.5"),
        ({"label": "dgo", "xyxy": [0, 0, 1, 1]}, "the class 'dgo' is not in this run's list"),
    ],
)
def test_a_bad_box_is_named_with_its_image(tmp_path: Path, box: object, said: str) -> None:
    path = written(tmp_path / "boxes.json", {"a.jpg": [box]})
    reason = GivenBoxes(path, CLASSES).missing("a.jpg")
    assert reason is not None
    assert reason.startswith("a.jpg: ")
    assert str(path) in reason
    assert said in reason


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("boxes.json", "", "expected a JSON file"),
        ("boxes.json", "[]", "expected a JSON object of image names to lists of boxes"),
        ("boxes.json", '{"a.jpg": {}}', "expected a JSON object of image names to lists of boxes"),
        ("boxes.jsonl", "{", "not the manifest of a label store"),
        ("boxes.jsonl", '{"boxes": []}', "not the manifest of a label store"),
        ("boxes.jsonl", "7", "not the manifest of a label store"),
        ("boxes.jsonl", '{"path": "a", "boxes": 7}', "expected a JSON object"),
    ],
)
def test_a_bad_boxes_file(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(WsssError, match=said) as caught:
        GivenBoxes(written(tmp_path / name, text), CLASSES)
    assert caught.value.message.startswith(f"--boxes {tmp_path / name}")


def test_no_boxes_there(tmp_path: Path) -> None:
    with pytest.raises(WsssError, match="no such file or folder") as caught:
        GivenBoxes(tmp_path / "none", CLASSES)
    assert "VOC XML" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not a VOC annotation"),
        ("<annotation>", "not a VOC annotation"),
        ("<annotation><object><name>dog</name></object></annotation>", "not a VOC annotation"),
        (VOC.replace("<xmin>1<", "<xmin>one<"), "not a VOC annotation"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation/>', "declares entities"),
    ],
)
def test_a_bad_annotation_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(WsssError, match=rf"x\.xml: {said}"):
        read_voc_xml(written(tmp_path / "x.xml", text))


def test_the_hash_of_what_is_given_tells_every_change(tmp_path: Path) -> None:
    (tmp_path / "xml" / "sub").mkdir(parents=True)
    (tmp_path / "xml" / "a.xml").write_text("<a/>")
    (tmp_path / "xml" / "sub" / "b.xml").write_text("<b/>")
    (tmp_path / "xml" / "notes.txt").write_text("not looked at")
    seen = [given_hash(tmp_path / "xml")]
    (tmp_path / "xml" / "notes.txt").write_text("still not")
    assert given_hash(tmp_path / "xml") == seen[0]
    (tmp_path / "xml" / "sub" / "b.xml").write_text("<c/>")
    seen.append(given_hash(tmp_path / "xml"))
    (tmp_path / "xml" / "a.xml").rename(tmp_path / "xml" / "aa.xml")
    seen.append(given_hash(tmp_path / "xml"))
    seen.append(given_hash(tmp_path / "xml" / "aa.xml"))
    assert len(set(seen)) == 4
    with pytest.raises(WsssError, match="cannot be read: No such file"):
        given_hash(tmp_path / "none")
