"""Boxes of YOLO labels and their lists of classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wsss.batch import Labels, Photograph
from wsss.classes import class_list
from wsss.errors import WsssError
from wsss.runtime.given.names import twins_of
from wsss.runtime.given.stages import BoxesFromFile

CLASSES = class_list(["cat", "dog"])
NOTHING = Labels(np.zeros((0, 2), np.float32), np.zeros((0, 2), bool))


def folder(tmp_path: Path, text: str, names: str = "dog\ncat\n", list_name: str = "classes.txt") -> Path:
    (tmp_path / "labels" / "train").mkdir(parents=True, exist_ok=True)
    (tmp_path / "labels" / "train" / "x.txt").write_text(text)
    (tmp_path / "labels" / "train" / "empty.txt").write_text("")
    if names:
        (tmp_path / list_name).write_text(names)
    return tmp_path / "labels" / "train"


def photo(name: str = "x.jpg", orientation: int = 1) -> Photograph:
    return Photograph(name=name, pixels=np.zeros((40, 80, 3), np.uint8), orientation=orientation)


@pytest.mark.parametrize(
    ("line", "xyxy", "score"),
    [
        ("0 0.5 0.5 0.25 0.5", [30, 10, 50, 30], 1),
        ("0 0.5 0.5 0.25 0.5 0.75", [30, 10, 50, 30], 0.75),
        ("0 0.5 0.5 0.25 0.5 1.005", [30, 10, 50, 30], 1),  # rounding
        ("0 0.25 0.5 0.5 0.25 0.75 0.5 0.5 0.75", [20, 10, 60, 30], 1),
        ("0 0.25 0.5 0.5 0.25 0.75 0.5 0.5 0.75 0.5", [20, 10, 60, 30], 0.5),
        ("  0   0.0125 0.0250 2.5e-2 5e-2  ", [0, 0, 2, 2], 1),
        ("0.000000000000000000e+00 5.0e-01 5.0e-01 2.5e-01 5.0e-01", [30, 10, 50, 30], 1),
    ],
)
def test_lines(tmp_path: Path, line: str, xyxy: list[float], score: float) -> None:
    given = BoxesFromFile(folder(tmp_path, f"{line}\n\n1 0.5 0.5 1 1\n"), CLASSES)
    assert given.missing(photo()) is None
    boxes = given([photo("empty.jpg"), photo()], NOTHING)
    assert boxes.image.tolist() == [1, 1]
    assert boxes.xyxy_image == pytest.approx(np.array([xyxy, [0, 0, 80, 40]]), abs=1e-4)
    assert boxes.label.tolist() == [2, 1], "classes are those of the list beside the labels, not of the run"
    assert boxes.score.tolist() == [score, 1]


def test_a_folder_whose_labels_are_all_empty_gives_no_boxes(tmp_path: Path) -> None:
    given = BoxesFromFile(folder(tmp_path, ""), CLASSES)
    assert given.missing(photo()) is None
    assert len(given([photo()], NOTHING)) == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.1 0.1", "class 2, but "),
        ("0 0.5 0.5 0.1", "expected a line of YOLO labels"),
        ("0.5 0.5 0.5 0.1 0.1", "expected a line of YOLO labels"),
        ("-1 0.5 0.5 0.1 0.1", "expected a line of YOLO labels"),
        ("9" * 5000 + " 0.5 0.5 0.1 0.1", "expected a line of YOLO labels"),
        ("dog 0.5 0.5 0.1 0.1", "expected a line of YOLO labels"),
        ("0 0.5 0.5 0.1 nan", "expected a line of YOLO labels"),
        ("0 40 20 10 10", "expected shares in 0..1"),
        ("0 0.5 0.5 0.1 0.1 17", "expected shares in 0..1"),
        ("0 0.5 0.5 -0.005 0.1", "expected a width and height of at least 0"),
        ("0 0.7 0.5 0.9 0.9\n0 0.1 0.1 0.2 0.2", "got what looks like corners"),
        ("0 0.5 0.5 0.001 0.1", "no box remains of 1"),
    ],
)
def test_bad_lines(tmp_path: Path, line: str, message: str) -> None:
    labels = folder(tmp_path, f"{line}\n")
    (labels / "good.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    error = BoxesFromFile(labels, CLASSES).missing(photo())
    assert error is not None
    assert message in error.message
    assert "x.txt" in error.message
    assert error.hint


def test_a_box_beyond_the_photograph_among_others_is_cut(tmp_path: Path) -> None:
    """Only where all numbers could be corners are they taken for such."""
    labels = folder(tmp_path, "0 0.7 0.5 0.9 0.9\n0 0.5 0.5 0.1 0.1\n")
    boxes = BoxesFromFile(labels, CLASSES)([photo()], NOTHING)
    assert boxes.xyxy_image == pytest.approx(np.array([[20, 2, 80, 38], [36, 18, 44, 22]]), abs=1e-4)


def test_a_photograph_without_a_file_has_none(tmp_path: Path) -> None:
    error = BoxesFromFile(folder(tmp_path, "0 0.5 0.5 0.1 0.1"), CLASSES).missing(photo("y.jpg"))
    assert error is not None
    assert "has no labels y.txt" in error.message
    assert "an empty file" in error.hint


def test_one_file_for_two_photographs(tmp_path: Path) -> None:
    given = BoxesFromFile(folder(tmp_path, "0 0.5 0.5 0.1 0.1"), CLASSES)
    twins = twins_of(["x.jpg", "x.png", "y.png"])
    assert twins == dict.fromkeys(("x.jpg", "x.png"), ("x.jpg", "x.png"))
    for name in ("x.jpg", "x.png"):
        assert "fits 2 photographs, but belongs to one: x.jpg, x.png" in str(given.missing(photo(name), twins[name]))


def test_a_photograph_that_exif_turns_is_announced(tmp_path: Path) -> None:
    notes: list[str] = []
    given = BoxesFromFile(folder(tmp_path, "0 0.5 0.5 0.25 0.5"), CLASSES, warn=notes.append)
    assert given([photo(orientation=6)], NOTHING).xyxy_image.tolist() == [[30, 10, 50, 30]]
    assert "EXIF rotates" in notes[0]


@pytest.mark.parametrize(
    ("list_name", "names"),
    [
        ("labels/train/classes.txt", "dog\ncat\n\n"),
        ("labels/obj.names", "\ufeffdog\r\ncat"),
        ("data.yaml", "path: .\nnames: [dog, cat]\n"),
        ("data.yaml", "names:\n- dog\n- cat\nnc: 2\n"),
        ("coco.yml", "names:\n  1: cat\n  0: dog\n"),
    ],
)
def test_lists_of_classes(tmp_path: Path, list_name: str, names: str) -> None:
    labels = folder(tmp_path, "0 0.5 0.5 0.25 0.5", "")
    (tmp_path / list_name).write_text(names, encoding="utf-8")
    (tmp_path / "other.yaml").write_text("epochs: 3\n")
    assert BoxesFromFile(labels, CLASSES)([photo()], NOTHING).label.tolist() == [2]


def test_the_nearest_list_counts_and_two_must_agree(tmp_path: Path) -> None:
    labels = folder(tmp_path, "0 0.5 0.5 0.25 0.5", "cat\ndog\n")
    (labels / "classes.txt").write_text("dog\ncat\n")
    assert BoxesFromFile(labels, CLASSES)([photo()], NOTHING).label.tolist() == [2]
    (labels / "data.yaml").write_text("names: [dog, cat]\n")
    assert BoxesFromFile(labels, CLASSES)([photo()], NOTHING).label.tolist() == [2]
    (labels / "data.yaml").write_text("names: [cat, dog]\n")
    with pytest.raises(WsssError, match=r"several lists of classes that differ: classes\.txt, data\.yaml"):
        BoxesFromFile(labels, CLASSES)


@pytest.mark.parametrize(
    ("list_name", "names", "message"),
    [
        ("x.md", "", "there is no list of classes"),
        ("classes.txt", "dog\n\ncat\n", "an empty line among the names"),
        ("classes.txt", "", "an empty line|no names|class 0, but .* has 0"),
        ("data.yaml", "names: dog", "expected a list of names"),
        ("data.yaml", "names: [1, 2]", "expected a list of names"),
        ("data.yaml", "names: {1: dog, 2: cat}", "expected a list of names"),
        ("data.yaml", "names: [dog, cat]\nnc: 3", "nc is 3, names has 2 entries"),
        ("data.yaml", "names: [dog, cat", "expected YAML"),
        ("data.yaml", "names: !!python/object/apply:os.system [true]", "expected YAML"),
    ],
)
def test_bad_lists_of_classes(tmp_path: Path, list_name: str, names: str, message: str) -> None:
    labels = folder(tmp_path, "0 0.5 0.5 0.25 0.5", "")
    (tmp_path / list_name).write_text(names)
    with pytest.raises(WsssError, match=message) as caught:
        if error := BoxesFromFile(labels, CLASSES).missing(photo()):
            raise error
    assert caught.value.hint


def test_keypoints_follow_the_box(tmp_path: Path) -> None:
    labels = folder(tmp_path, "0 0.5 0.5 0.25 0.5 0.1 0.1 2 0.2 0.2 0", "names: [dog]\nkpt_shape: [2, 3]\n", "data.yaml")
    assert BoxesFromFile(labels, CLASSES)([photo()], NOTHING).xyxy_image.tolist() == [[30, 10, 50, 30]]


POSES = (  # x y of three keypoints, the last one not seen; with visibility; with visibility and confidence
    "0 0.5 0.5 0.25 0.5 0.42 0.3 0.58 0.7 0 0\n0 0.3 0.4 0.2 0.2 0.3 0.35 0.35 0.45 0 0\n",
    "0 0.5 0.5 0.25 0.5 0.42 0.3 2 0.58 0.7 2 0 0 0\n",
    "0 0.5 0.5 0.25 0.5 0.42 0.3 2 0.58 0.7 1 0 0 0 0.875\n",
)


@pytest.mark.parametrize("text", POSES)
def test_keypoints_without_a_word_about_them_are_refused(tmp_path: Path, text: str) -> None:
    labels = folder(tmp_path, text)
    with pytest.raises(WsssError, match=r"x\.txt: line 1: .*may also be a box and keypoints") as caught:
        BoxesFromFile(labels, CLASSES)
    assert "kpt_shape" in caught.value.hint and "task: segment" in caught.value.hint
    for kind in ("kpt_shape: [3, 2]", "task: pose"):
        (tmp_path / "data.yaml").write_text(f"names: [dog, cat]\n{kind}\n")
        assert BoxesFromFile(labels, CLASSES)([photo()], NOTHING).xyxy_image[0].tolist() == [30, 10, 50, 30]
    (tmp_path / "data.yaml").write_text("names: [dog, cat]\ntask: segment\n")
    BoxesFromFile(labels, CLASSES)


def test_regions_are_not_taken_for_keypoints(tmp_path: Path) -> None:
    """Small regions near the center, such as the first one, could be keypoints; not all of a folder are."""
    near = "0 0.5 0.5 0.6 0.5 0.6 0.6 0.5 0.6\n"
    for others in ("0 0.1 0.1 0.3 0.1 0.3 0.3 0.1 0.3\n", "0 0.5 0.5 0.6 0.5 0.6 0.6\n"):
        xyxy = BoxesFromFile(folder(tmp_path, near + others), CLASSES)([photo()], NOTHING).xyxy_image
        assert xyxy[0] == pytest.approx([40, 20, 48, 24])


def test_a_confidence_before_the_box_is_refused(tmp_path: Path) -> None:
    """The first line can be read both ways, the second one cannot."""
    labels = folder(tmp_path, "0 0.6 0.5 0.5 0.2 0.3\n1 0.9 0.5 0.5 0.3 0.2\n")
    with pytest.raises(WsssError, match=r"x\.txt: line 2: .*class x y width height confidence, got what .*class confidence x y"):
        BoxesFromFile(labels, CLASSES)
    labels = folder(tmp_path, "0 0.6 0.5 0.5 0.2 0.3\n")
    with pytest.raises(WsssError, match=r"x\.txt: line 1: .*class x y width height confidence, got what may also be class conf"):
        BoxesFromFile(labels, CLASSES)
    beyond = folder(tmp_path, "1 0.9 0.5 0.5 0.3 0.2\n0 0.5 0.9 0.2 0.4 0.5\n")  # the second box ends below the photograph
    with pytest.raises(WsssError, match=r"x\.txt: line 1: .*got what looks like class confidence x y"):
        BoxesFromFile(beyond, CLASSES)
    labels = folder(tmp_path, "0 0.6 0.5 0.5 0.2 0.3\n")
    (tmp_path / "data.yaml").write_text("names: [dog, cat]\ntask: detect\n")
    assert BoxesFromFile(labels, CLASSES)([photo()], NOTHING).score == pytest.approx([0.3])
    (tmp_path / "data.yaml").unlink()
    labels = folder(tmp_path, "0 0.6 0.5 0.5 0.2 0.3\n1 0.9 0.5 0.2 0.3 0.9\n")
    assert BoxesFromFile(labels, CLASSES)([photo()], NOTHING).score == pytest.approx([0.3, 0.9])


def test_of_several_files_with_the_mistake_the_first_by_name_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever order the file system lists them."""
    labels = folder(tmp_path, "1 0.9 0.5 0.5 0.3 0.2\n")
    (labels / "y.txt").write_text("1 0.9 0.5 0.5 0.3 0.2\n")
    listed = Path.rglob
    for reverse in (False, True):
        monkeypatch.setattr(Path, "rglob", lambda *of, reverse=reverse: iter(sorted(listed(*of), reverse=reverse)))
        with pytest.raises(WsssError, match=r"x\.txt: line 1: "):
            BoxesFromFile(labels, CLASSES)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("label", ["0", "0.0"])
def test_a_folder_in_another_encoding_is_recognized(tmp_path: Path, encoding: str, label: str) -> None:
    labels = folder(tmp_path, "")
    (labels / "empty.txt").unlink()
    (labels / "x.txt").write_text(f"{label} 0.5 0.5 0.25 0.5\n", encoding=encoding)
    assert BoxesFromFile(labels, CLASSES)([photo()], NOTHING).xyxy_image.tolist() == [[30, 10, 50, 30]]


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("0,0.5,0.5,0.1,0.1", "separate values by blanks"),
        ("0; 0.5; 0.5; 0.1; 0.1", "separate values by blanks"),
        ("0 0,5 0,5 0,1 0,1", "decimal points"),
        ("dog 0.5 0.5 0.1 0.1", "the class is its number in "),
        ("0 0.5 0.5 0.1 0.1 87", "divide percent by 100"),
        ("0 0.5 0.5 -0.2 0.1", "a line is: class"),
        ("0 -0.5 0.5 0.2 0.1", "a line is: class"),
        ("0 0.5 0.5 0.2 0.1 0.5 0.5 2 0.9 0.1 2", "need a data.yaml with kpt_shape"),
        ("0 320 240 100 80", "pixels by the photograph's sides"),
    ],
)
def test_hints_fit_the_mistake(tmp_path: Path, line: str, hint: str) -> None:
    """Also where all files of the folder have it."""
    labels = folder(tmp_path, f"\n{line}\n")
    (labels / "empty.txt").unlink()
    error = BoxesFromFile(labels, CLASSES).missing(photo())
    assert error is not None
    assert "x.txt: line 2: expected" in error.message
    assert hint in error.hint
    assert ("pixels" in error.hint) == ("pixels" in hint)


def test_labels_in_another_spelling_are_recognized_beside_other_text_files(tmp_path: Path) -> None:
    labels = folder(tmp_path, "0,0.5,0.5,0.1,0.1\n")
    (labels / "notes.txt").write_text("made on Monday\n")
    error = BoxesFromFile(labels, CLASSES).missing(photo())
    assert error is not None and "separate values by blanks" in error.hint


def test_a_folder_of_other_text_files_names_one(tmp_path: Path) -> None:
    labels = folder(tmp_path, "1 2 3 4 5 6 7 8 plane 0\n")
    (labels / "empty.txt").unlink()
    with pytest.raises(WsssError, match=r"none of them: .*x\.txt starts with '1 2 3 4 5 6 7 8 plane 0'"):
        BoxesFromFile(labels, CLASSES)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("train/x.txt", "--boxes {}/train"), ("X.txt", "upper and lower case"), ("deep/x.jpg.txt", "--boxes {}/deep")],
)
def test_the_nearest_file_is_named(tmp_path: Path, name: str, hint: str) -> None:
    labels = tmp_path / "labels"
    (labels / name).parent.mkdir(parents=True)
    (labels / name).write_text("0 0.5 0.5 0.1 0.1")
    (labels / "classes.txt").write_text("dog")
    error = BoxesFromFile(labels, CLASSES).missing(photo())
    assert error is not None
    assert "has no labels x.txt" in error.message
    assert f"there is {labels / name}: " in error.hint
    assert hint.format(labels) in error.hint
    assert "empty file" not in error.hint
