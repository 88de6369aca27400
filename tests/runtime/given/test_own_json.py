"""Boxes in our own JSON and in a store's manifest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from wsss.batch import Labels, Photograph
from wsss.classes import class_list
from wsss.errors import WsssError
from wsss.runtime.given.stages import BoxesFromFile
from wsss.store.format import line_of

CLASSES = class_list(["dog", "cat"])
NOTHING = Labels(np.zeros((0, 2), np.float32), np.zeros((0, 2), bool))
BOX = {"label": "cat", "xyxy": [1, 2, 30, 40], "score": 0.25}


def written(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def photo(name: str, height: int = 60, width: int = 60, orientation: int = 1) -> Photograph:
    return Photograph(name=name, pixels=np.zeros((height, width, 3), np.uint8), orientation=orientation)


def lines(path: Path, *records: dict[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(line_of({"label": "a.png", **record}) for record in records))
    return path


def test_own_json(tmp_path: Path) -> None:
    path = written(tmp_path / "b.json", {"a.jpg": [BOX, {"label": "dog", "xyxy": [0, 0, 5.5, 6]}], "b.jpg": []})
    given = BoxesFromFile(path, CLASSES)
    boxes = given([photo("b.jpg"), photo("a.jpg")], NOTHING)
    assert boxes.image.tolist() == [1, 1]
    assert boxes.label.tolist() == [2, 1]
    assert boxes.score.tolist() == [0.25, 1]
    assert boxes.xyxy_image.tolist() == [[1, 2, 30, 40], [0, 0, 5.5, 6]]
    assert len(given([], NOTHING)) == 0


@pytest.mark.parametrize(
    ("box", "message", "hint"),
    [
        (7, "expected a box, got 7", "xyxy"),
        ({"xyxy": [0, 0, 1, 1]}, "expected a box", "label"),
        ({"label": 1, "xyxy": [0, 0, 1, 1]}, "expected a box", "label"),
        ({"label": "dog"}, "expected a box", "xyxy"),
        ({"label": "dog", "xyxy": [0, 0, 1]}, "expected a box", "xyxy"),
        ({"label": "dog", "xyxy": "0 0 1 1"}, "expected a box", "xyxy"),
        ({"label": "dog", "xyxy": [0, 0, 1, "1"]}, "expected a box", "numbers stand without quotes"),
        ({"label": "dog", "xyxy": [0, 0, 1, True]}, "expected a box", "xyxy"),
        ({"label": "dog", "xyxy": [0, 0, 1, None]}, "expected a box", "xyxy"),
        ({"label": "dog", "bbox": [0, 0, 1, 1]}, "expected a box", "corners are written under xyxy"),
        ({"label": "dog", "xyxy": [0, 0, 9, 9], "score": None}, "expected a score in 0..1, got null", "leave the score out"),
        ({"label": "dog", "xyxy": [0, 0, 9, 9], "score": -0.5}, "expected a score in 0..1, got -0.5", "scores are in 0..1"),
        ({"label": "dog", "xyxy": [0, 0, 9, 9], "score": "0.5"}, "expected a score in 0..1, got '0.5'", "a score is a number"),
        ({"label": "dog", "xyxy": [0, 0, 9, 9], "score": True}, "expected a score in 0..1, got true", "a score is a number"),
        ({"label": "dgo", "xyxy": [0, 0, 9, 9]}, "the class 'dgo' is not in this run's list", "did you mean 'dog'?"),
        ({"label": [[[[[[[[]]]]]]]], "xyxy": [0, 0, 9, 9]}, "expected a box", "label"),
    ],
)
def test_a_bad_box_is_named_with_its_image(tmp_path: Path, box: object, message: str, hint: str) -> None:
    path = written(tmp_path / "boxes.json", {"a.jpg": [box], "b.jpg": [BOX]})
    given = BoxesFromFile(path, CLASSES)
    error = given.missing(photo("a.jpg"))
    assert error is not None
    assert f"{path}: a.jpg: " in error.message
    assert message in error.message
    assert hint in error.hint
    assert given.missing(photo("b.jpg")) is None


def test_scores_in_percent_are_a_fault_of_the_file(tmp_path: Path) -> None:
    """An image whose scores are all below 1 % would pass."""
    path = written(tmp_path / "b.json", {"a.jpg": [BOX | {"score": 0.9}], "b.jpg": [BOX | {"score": 87}]})
    with pytest.raises(WsssError, match=r"b\.jpg: expected a score in 0\.\.1, got 87") as caught:
        BoxesFromFile(path, CLASSES)
    assert "percent" in caught.value.hint


def test_width_and_height_are_a_fault_of_the_file(tmp_path: Path) -> None:
    """An image whose objects are all wider than far from the edge would pass."""
    path = written(tmp_path / "b.json", {"a.jpg": [BOX], "b.jpg": [BOX | {"xyxy": [40, 1, 15, 50]}]})
    with pytest.raises(WsssError, match="got what looks like x, y, width, height"):
        BoxesFromFile(path, CLASSES)


def test_too_many_boxes(tmp_path: Path) -> None:
    path = written(tmp_path / "b.json", {"a.jpg": [BOX] * 257, "b.jpg": [BOX] * 256 + [BOX | {"xyxy": [70, 70, 80, 80]}]})
    given = BoxesFromFile(path, CLASSES)
    assert "257 boxes, an image may have 256" in str(given.missing(photo("a.jpg")))
    assert given.missing(photo("b.jpg")) is None, "one is outside"


def test_a_manifest(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "manifest.jsonl",
        {"path": "a.jpg", "boxes": [BOX | {"xyxy": [0, 0, 1, 1]}], "height": 60, "width": 60},
        {"path": "c.jpg", "boxes": [BOX], "height": 60, "width": 60},
        {"path": "c.jpg", "error": "broken"},
        {"path": "d.jpg", "boxes": [BOX], "height": 30, "width": 60},
        {"path": "a.jpg", "boxes": [BOX], "height": 60, "width": 60},
    )
    given = BoxesFromFile(path, CLASSES)
    assert given([photo("a.jpg")], NOTHING).xyxy_image.tolist() == [[1, 2, 30, 40]], "the last line of a path counts"
    assert "has no entry in" in str(given.missing(photo("c.jpg")))
    assert "annotates a photograph of 60 x 30" in str(given.missing(photo("d.jpg")))


def test_a_store_and_its_shards(tmp_path: Path) -> None:
    written(tmp_path / "run.json", {"classes": ["dog", "cat"]})
    lines(tmp_path / "manifest-1-of-2.jsonl", {"path": "b.jpg", "boxes": [BOX]}, {"path": "a.jpg", "boxes": []})
    lines(tmp_path / "manifest.jsonl", {"path": "a.jpg", "boxes": [BOX]})
    given = BoxesFromFile(tmp_path, CLASSES)
    assert given([photo("a.jpg"), photo("b.jpg")], NOTHING).image.tolist() == [1]


def test_a_stores_boxes_are_those_of_the_upright_photograph(tmp_path: Path) -> None:
    """A store knows no other: a square photograph that EXIF turns needs no announcement."""
    notes: list[str] = []
    path = lines(tmp_path / "m", {"path": "a.jpg", "boxes": [BOX], "height": 60, "width": 60})
    given = BoxesFromFile(path, CLASSES, warn=notes.append)
    assert given([photo("a.jpg", orientation=6)], NOTHING).xyxy_image.tolist() == [[1, 2, 30, 40]]
    assert notes == []


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("{", "line 2 is damaged: Expecting property name"),
        ("7", "line 2 is damaged: expected an object, got 7"),
        ('{"boxes": []}', "line 2 is damaged: path: expected the name of a file"),
        ('{"path": "a", "label": "a.png"}', "line 2 is damaged: it has no boxes"),
        ('{"path": "a", "label": "a.png", "boxes": 7}', "line 2 is damaged: boxes: expected at most 256 boxes, got 7"),
        ('{"path": "a", "path": "b", "boxes": []}', "line 2 is damaged: a key occurs twice"),
    ],
)
def test_a_bad_line(tmp_path: Path, second: str, message: str) -> None:
    path = lines(tmp_path / "m", {"path": "x", "boxes": [BOX]})
    path.write_bytes(path.read_bytes() + f"{second}\n".encode())
    with pytest.raises(WsssError, match=message) as caught:
        BoxesFromFile(path, CLASSES)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["a\u2028b.jpg", "a\x85b.jpg", "a\x0cb.jpg", "caf\udce9.jpg"])
def test_a_manifest_s_lines_end_where_the_store_ends_them(tmp_path: Path, name: str) -> None:
    """Not at what else Python counts as a line break; and file names need not be Unicode."""
    written(tmp_path / "run.json", {"classes": ["dog", "cat"]})
    path = lines(tmp_path / "manifest.jsonl", {"path": name, "boxes": [BOX]}, {"path": "z.jpg", "boxes": []})
    for given in (BoxesFromFile(path, CLASSES), BoxesFromFile(tmp_path, CLASSES)):
        assert given([photo(name)], NOTHING).label.tolist() == [2]


def test_a_store_without_boxes(tmp_path: Path) -> None:
    """A segmenter's: every photograph would be background."""
    with pytest.raises(WsssError, match="no line has a box"):
        BoxesFromFile(lines(tmp_path / "m", {"path": "a.jpg", "boxes": []}), CLASSES)


def test_the_threshold_leaves_out_weak_boxes(tmp_path: Path) -> None:
    path = written(tmp_path / "b.json", {"a.jpg": [BOX, BOX | {"score": 0.5, "label": "dog"}], "b.jpg": [BOX]})
    given = BoxesFromFile(path, CLASSES, threshold=0.3)
    assert [given.missing(photo(name)) for name in ("a.jpg", "b.jpg")] == [None, None]
    boxes = given([photo("a.jpg"), photo("b.jpg")], NOTHING)
    assert (boxes.label.tolist(), boxes.score.tolist()) == ([1], [0.5])
    given = BoxesFromFile(path, CLASSES, threshold=0.5)
    assert given([photo("a.jpg")], NOTHING).score.tolist() == [0.5], "the threshold itself passes"
