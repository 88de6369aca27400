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
from wsss.runtime.given.stages import BoxesFromFile, Given, LabelsFromFile

if TYPE_CHECKING:
    from ..conftest import World

CLASSES = class_list(["dog", "cat", "potted plant"])
NOTHING = Labels(np.zeros((0, 3), np.float32), np.zeros((0, 3), bool))
XML = (
    "<annotation><object><name>{}</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>6</ymax></bndbox>"
    "</object></annotation>"
)


def written(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


# ---- labels ----


def test_labels_by_name(world: World, tmp_path: Path) -> None:
    path = written(tmp_path / "labels.json", {"a.jpg": ["cat"], "sub/b.jpg": [], "c.jpg": ["potted plant", "dog", "dog"]})
    given = LabelsFromFile(path, CLASSES)
    labels = given([world.photo(3, 3, name) for name in ("c.jpg", "sub/b.jpg", "a.jpg")])
    assert labels.present.tolist() == [[True, False, True], [False, False, False], [False, True, False]]
    assert labels.score.dtype == np.float32
    assert np.array_equal(labels.score, labels.present)
    assert given([]).present.shape == (0, 3)
    assert given.missing(world.photo(3, 3, "a.jpg")) is None
    error = given.missing(world.photo(3, 3, "b.jpg"))
    assert error is not None
    assert error.message == f"has no entry in {path}"
    assert "the file has 'sub/b.jpg'" in error.hint


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("a/caf\u00e9.jpg", "dog"),
        ("a/cafe\u0301.jpg", "Dog"),
        ("./a/caf\u00e9.jpg", " dog "),
        ("a\\caf\u00e9.jpg", "DOG"),
        (".\\a\\.\\cafe\u0301.jpg", "dog"),
    ],
)
def test_names_are_matched_as_people_write_them(world: World, tmp_path: Path, key: str, name: str) -> None:
    path = written(tmp_path / "labels.json", {key: [name, "potted_plant"]})
    boxes = written(tmp_path / "boxes.json", {key: [{"label": name, "xyxy": [0, 0, 2, 3]}]})
    for photo in (world.photo(3, 3, "a/caf\u00e9.jpg"), world.photo(3, 3, "a/cafe\u0301.jpg")):
        assert LabelsFromFile(path, CLASSES).missing(photo) is None
        assert LabelsFromFile(path, CLASSES)([photo]).present.tolist() == [[True, False, True]]
        assert BoxesFromFile(boxes, CLASSES).missing(photo) is None
        assert BoxesFromFile(boxes, CLASSES)([photo], NOTHING).label.tolist() == [1]


@pytest.mark.parametrize("keys", [("a/x.jpg", "./a/x.jpg"), ("a/x.jpg", "a\\x.jpg"), ("caf\u00e9.jpg", "cafe\u0301.jpg")])
def test_two_entries_of_one_photograph(tmp_path: Path, keys: tuple[str, str]) -> None:
    path = written(tmp_path / "x.json", {key: [] for key in keys})
    for given in (LabelsFromFile, BoxesFromFile):
        with pytest.raises(WsssError, match="are the same photograph"):
            given(path, CLASSES)


def test_one_entry_for_two_photographs(world: World, tmp_path: Path) -> None:
    path = written(tmp_path / "x.json", {"caf\u00e9.jpg": []})
    for given in (LabelsFromFile(path, CLASSES), BoxesFromFile(path, CLASSES)):
        for name in (both := ("caf\u00e9.jpg", "cafe\u0301.jpg")):
            assert "fits 2 photographs" in str(given.missing(world.photo(3, 3, name), both))
        assert given.missing(world.photo(3, 3, "caf\u00e9.jpg"), ("caf\u00e9.jpg", "sub/caf\u00e9.jpg")) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected JSON"),
        ("{", "expected JSON"),
        ([], "expected a JSON object of image names"),
        ({"a.jpg": "dog"}, "expected a JSON object of image names"),
        ({"a.jpg": ["dgo"]}, "a.jpg: the class 'dgo' is not in this run's list: dog, cat, potted plant"),
        ({"a.jpg": [1]}, "a.jpg: expected the name of a class, got 1"),
        ('{"a.jpg": [], "a.jpg": ["dog"]}', "the key 'a.jpg' occurs twice"),
    ],
)
def test_bad_labels(tmp_path: Path, content: object, message: str) -> None:
    path = written(tmp_path / "labels.json", content)
    with pytest.raises(WsssError, match=re.escape(message)) as caught:
        LabelsFromFile(path, CLASSES)
    assert caught.value.message.startswith(f"--labels {path}")
    assert caught.value.hint


def test_the_nearest_class_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "labels.json", {"a.jpg": ["Poted_Plant"]})
    with pytest.raises(WsssError) as caught:
        LabelsFromFile(path, CLASSES)
    assert "did you mean 'potted plant'?" in caught.value.hint
    assert "--ignore-unknown" in caught.value.hint


def test_no_labels_file(tmp_path: Path) -> None:
    with pytest.raises(WsssError, match=r"--labels .*none\.json: cannot be read"):
        LabelsFromFile(tmp_path / "none.json", CLASSES)


# ---- classes that are not in the list ----


def test_unknown_classes_are_left_out_and_counted(world: World, tmp_path: Path) -> None:
    given = LabelsFromFile(written(tmp_path / "l.json", {"a": ["dog", "cow"], "b": ["cow", "yak"]}), CLASSES, ignore_unknown=True)
    assert given([world.photo(3, 3, "a"), world.photo(3, 3, "b")]).present.tolist() == [[True, False, False], [False] * 3]
    assert given.ignored == {"cow": 2, "yak": 1}
    for name, label in (("a", "dog"), ("b", "cow"), ("c", "cow"), ("d", "Cat")):
        written(tmp_path / "xml" / f"{name}.xml", XML.format(label))
    written(tmp_path / "xml" / "broken.xml", "<")
    boxes = BoxesFromFile(tmp_path / "xml", CLASSES, ignore_unknown=True)
    assert boxes.ignored == {"cow": 2}
    photos = [world.photo(9, 9, f"{name}.jpg") for name in "abd"]
    assert [boxes.missing(photo) for photo in photos] == [None] * 3
    assert boxes(photos, NOTHING).image.tolist() == [0, 2]
    error = BoxesFromFile(tmp_path / "xml", CLASSES).missing(photos[1])
    assert "b.xml: the class 'cow' is not in this run's list" in str(error)


def test_leaving_out_everything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WsssError, match="none of its classes is in this run's list: cow"):
        LabelsFromFile(written(tmp_path / "l.json", {"a": ["cow"]}), CLASSES, ignore_unknown=True)
    written(tmp_path / "xml" / "a.xml", XML.format("cow"))
    with pytest.raises(WsssError, match="none of its classes"):
        BoxesFromFile(tmp_path / "xml", CLASSES, ignore_unknown=True)


# ---- which form ----


def test_boxes_from_a_voc_folder(world: World, tmp_path: Path) -> None:
    """Beside the image's own folders, or all in one folder."""
    written(tmp_path / "xml" / "sub" / "x.xml", XML.format("potted plant"))
    written(tmp_path / "xml" / "flat.xml", "<annotation/>")
    written(tmp_path / "xml" / "readme.txt", "made by us")
    given = BoxesFromFile(tmp_path / "xml", CLASSES)
    boxes = given([world.photo(375, 500, "deep/flat.jpg"), world.photo(375, 500, "sub/x.jpg")], NOTHING)
    assert boxes.image.tolist() == [1]
    assert boxes.label.tolist() == [3]
    assert boxes.score.tolist() == [1]
    assert boxes.xyxy_image.tolist() == [[0, 0, 5, 6]]
    assert boxes.xyxy_image.dtype == np.float32


def test_a_name_says_nothing_about_the_form(world: World, tmp_path: Path) -> None:
    box = {"label": "cat", "xyxy": [1, 2, 30, 40], "score": 0.25}
    coco = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "categories": [{"id": 7, "name": "cat"}],
        "annotations": [{"image_id": 1, "category_id": 7, "bbox": [1, 2, 29, 38], "score": 0.25}],
    }
    line = json.dumps({"path": "a.jpg", "label": "a.png", "boxes": [box], "height": 60, "width": 60})
    for number, text in enumerate(
        (json.dumps({"a.jpg": [box]}), json.dumps(coco), line + "\n", line + "\n" + line.replace("a.jpg", "b"))
    ):
        path = written(tmp_path / f"boxes{number}.txt", "\ufeff" + text)
        boxes = BoxesFromFile(path, CLASSES)([world.photo(60, 60, "a.jpg")], NOTHING)
        assert boxes.xyxy_image.tolist() == [[1, 2, 30, 40]]
        assert (boxes.label.tolist(), boxes.score.tolist()) == ([2], [0.25])


def test_a_folder_of_two_forms(tmp_path: Path) -> None:
    written(tmp_path / "x.xml", "<annotation/>")
    written(tmp_path / "x.txt", "0 0.5 0.5 0.1 0.1\n")
    with pytest.raises(WsssError, match=r"holds VOC XML files and YOLO labels: x\.xml, x\.txt"):
        BoxesFromFile(tmp_path, CLASSES)


def test_lists_and_empty_files_beside_xml_files_are_no_labels(world: World, tmp_path: Path) -> None:
    """As in the root of a VOC data set: ImageSets/Main/trainval.txt."""
    written(tmp_path / "Annotations" / "000005.xml", XML.format("dog"))
    written(tmp_path / "ImageSets" / "Main" / "trainval.txt", "000005\n000007\n000009\n000012\n000016\n")
    written(tmp_path / "ImageSets" / "Main" / "dog_val.txt", "000005  1\n000007 -1\n")
    written(tmp_path / "000007.txt", "")
    given = BoxesFromFile(tmp_path, CLASSES)
    assert given.missing(world.photo(9, 9, "Annotations/000005.jpg")) is None
    error = given.missing(world.photo(9, 9, "000005.jpg"))
    assert error is not None and f"--boxes {tmp_path / 'Annotations'}" in error.hint


@pytest.mark.parametrize(
    ("start", "kind"),
    [(b"\x89PNG\r\n\x1a\n", "a PNG image"), (b"\xff\xd8\xff\xe0\0\x10JFIF", "a JPEG image"), (b"\x1f\x8b\x08", "a gzip archive")],
)
def test_a_binary_file_is_named_as_what_it_is(tmp_path: Path, start: bytes, kind: str) -> None:
    (tmp_path / "x").write_bytes(start)
    for given in (LabelsFromFile, BoxesFromFile):
        with pytest.raises(WsssError, match=f"expected UTF-8 text, got {kind}") as caught:
            given(tmp_path / "x", CLASSES)
        assert "save the file" not in caught.value.hint


def test_a_folder_of_no_form(tmp_path: Path) -> None:
    written(tmp_path / "instances.json", "{}")
    written(tmp_path / "notes.txt", "nothing")
    with pytest.raises(WsssError, match="got a folder with none of them") as caught:
        BoxesFromFile(tmp_path, CLASSES)
    assert caught.value.hint == f"give the file itself: --boxes {tmp_path / 'instances.json'}"


@pytest.mark.parametrize(
    ("text", "got"), [('["dog"]', r"got \['dog'\]"), ('{"a.jpg": ["dog"], "b.jpg": "dog"}', "got 'dog' for 'b.jpg'")]
)
def test_a_labels_file_of_another_form(tmp_path: Path, text: str, got: str) -> None:
    with pytest.raises(WsssError, match=f"expected a JSON object of image names to lists of class names, {got}"):
        LabelsFromFile(written(tmp_path / "labels.json", text), CLASSES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected JSON"),
        ("7", "expected a JSON object of image names to lists of boxes, got 7"),
        ("[]", "expected a JSON object of image names to lists of boxes"),
        ("[1]", "expected a JSON object of image names to lists of boxes"),
        ('{"a.jpg": {}}', "expected a JSON object of image names to lists of boxes"),
        ("{", "expected JSON"),
        ("<annotations/>", "expected a folder of XML files"),
        ("0 0.5 0.5 0.1 0.1", "expected JSON"),
        ('{"a.jpg": [{"label": "dog", "xyxy": [NaN, 0, 1, 1]}]}', "line 1: expected finite numbers, got NaN"),
        ('{"a.jpg": [], "a.jpg": []}', "the key 'a.jpg' occurs twice"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}]', "a COCO file, got a list of detections"),
    ],
)
def test_a_bad_boxes_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(WsssError, match=message) as caught:
        BoxesFromFile(written(tmp_path / "boxes.json", text), CLASSES)
    assert caught.value.message.startswith(f"--boxes {tmp_path / 'boxes.json'}")
    assert caught.value.hint


def test_no_boxes_there(tmp_path: Path) -> None:
    with pytest.raises(WsssError, match="no such file or folder") as caught:
        BoxesFromFile(tmp_path / "none", CLASSES)
    assert "VOC XML" in caught.value.hint


def test_coordinates_that_may_be_percent_are_announced_once(world: World, tmp_path: Path) -> None:
    box = {"label": "dog", "xyxy": [20, 30, 60, 100]}
    photos = [world.photo(375, 500, f"{number}.jpg") for number in range(4)]
    boxes: dict[str, object] = {photo.name: [box, box] for photo in photos}

    def warnings(size: int = 375) -> list[str]:
        notes: list[str] = []
        given = BoxesFromFile(written(tmp_path / "x.json", boxes), CLASSES, warn=notes.append)
        for number in range(4):
            given([world.photo(size, 500, f"{number}.jpg")], NOTHING)
        return notes

    (note,) = warnings()
    assert "x.json: no coordinate exceeds 100, but photographs such as 2.jpg are larger, 500 x 375: expected pixels" in note
    assert warnings(150) == []
    boxes["another.jpg"] = [{"label": "dog", "xyxy": [20, 30, 101, 80]}]
    assert warnings() == []
    boxes = {"0.jpg": [box, box], "1.jpg": [], "2.jpg": [], "3.jpg": [box, box, box]}
    assert warnings() == [], "of two photographs only"


# ---- the hash ----


def test_the_hash_changes_with_what_is_given_for_a_photograph_only(tmp_path: Path) -> None:
    def hashes(**how: bool) -> list[str]:
        given = Given.open(CLASSES, tmp_path / "l.json", tmp_path / "xml", **how)
        return [given.hash(name) for name in ("a.jpg", "b.jpg", "c.jpg")]

    def changed() -> list[int]:
        nonlocal before
        now, was = hashes(), before
        before = now
        return [row for row in range(3) if now[row] != was[row]]

    written(tmp_path / "l.json", {"a.jpg": ["dog"], "b.jpg": ["dog", "cat"]})
    written(tmp_path / "xml" / "a.xml", XML.format("dog"))
    written(tmp_path / "xml" / "b.xml", XML.format("cow"))
    before = hashes()
    assert len({*before}) == 3 and all(len(each) == 16 for each in before)
    written(tmp_path / "xml" / "a.xml", XML.format("Dog").replace("Dog", "cat"))
    assert changed() == [0]
    written(tmp_path / "xml" / "c.xml", "<annotation/>")
    assert changed() == [2]
    written(tmp_path / "l.json", {"c.jpg": [], "b.jpg": ["cat", "dog", "dog"], "a.jpg": ["dog"]})
    assert changed() == [2], "order and repetition do not count"
    assert [one == other for one, other in zip(hashes(ignore_unknown=True), before, strict=True)] == [True, False, True]
    written(tmp_path / "xml" / "b.xml", XML.format("cat"))
    assert changed() == [1]
    given = Given.open(CLASSES, None, tmp_path / "xml")
    assert given.hash("a.jpg") not in ("", before[0])
    assert given.hash("a.jpg", ["a.jpg", "a.png"]) != given.hash("a.jpg") == given.hash("a.jpg", ["a.jpg", "sub/x.jpg"])
    assert Given().hash("a.jpg") == ""


def test_the_hash_covers_the_size_that_an_annotation_is_for(tmp_path: Path) -> None:
    """The same boxes of another frame are other boxes."""

    def hash_with(size: str) -> str:
        written(tmp_path / "xml" / "a.xml", XML.format("dog").replace("<annotation>", f"<annotation>{size}"))
        return Given.open(CLASSES, None, tmp_path / "xml").hash("a.jpg")

    sizes = ["", "<size><width>40</width><height>30</height></size>", "<size><width>30</width><height>40</height></size>"]
    assert len({hash_with(size) for size in sizes}) == 3


def test_the_hash_covers_the_list_of_classes(tmp_path: Path) -> None:
    labels = written(tmp_path / "labels" / "train" / "a.txt", "0 0.5 0.5 0.1 0.1\n").parent
    written(tmp_path / "data.yaml", "names: [dog, cat]\n")
    before = Given.open(CLASSES, None, labels).hash("a.jpg")
    written(tmp_path / "data.yaml", "names: [cat, dog]\n")
    assert Given.open(CLASSES, None, labels).hash("a.jpg") != before
