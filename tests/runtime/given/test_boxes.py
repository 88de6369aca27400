"""Boxes in the photograph's own frame: another frame, dropped boxes, and other kinds of coordinates are refused or announced."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsss.batch import Boxes, Labels, Photograph
from wsss.classes import class_list
from wsss.photographs import read_photograph
from wsss.runtime.given.boxes import rotated
from wsss.runtime.given.stages import BoxesFromFile

CLASSES = class_list(["dog", "cat"])
NOTHING = Labels(np.zeros((0, 2), np.float32), np.zeros((0, 2), bool))
ORIENTATION = 0x0112


def own(tmp_path: Path, boxes: list[list[float]], **more: object) -> Path:
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"x.png": [{"label": "dog", "xyxy": box, **more} for box in boxes]}))
    return path


def voc(tmp_path: Path, boxes: list[list[int]], size: tuple[int, int] | None) -> Path:
    """A folder with the annotation of x.*: ``boxes`` 0-based and exclusive, ``size`` (height, width)."""
    objects = "".join(
        f"<object><name>dog</name><bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
        "</bndbox></object>"
        for x0, y0, x1, y1 in boxes
    )
    sizes = f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>" if size else ""
    (tmp_path / "xml").mkdir(exist_ok=True)
    (tmp_path / "xml" / "x.xml").write_text(f"<annotation>{sizes}{objects}</annotation>")
    return tmp_path / "xml"


def black(height: int, width: int, orientation: int = 1) -> Photograph:
    return Photograph(name="x.png", pixels=np.zeros((height, width, 3), np.uint8), orientation=orientation)


def found(path: Path, photo: Photograph) -> tuple[Boxes, list[str]]:
    notes: list[str] = []
    given = BoxesFromFile(path, CLASSES, warn=notes.append)
    error = given.missing(photo)
    assert error is None, error
    return given([photo], NOTHING), notes


def refused(path: Path, photo: Photograph, *words: str) -> None:
    """The image fails with these words in its message, and a hint."""
    error = BoxesFromFile(path, CLASSES).missing(photo)
    assert error is not None
    assert error.hint
    for word in words:
        assert word in str(error)


# ---- frames ----


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("frame", ["stored", "upright"])
def test_boxes_of_a_photograph_that_exif_turns(tmp_path: Path, orientation: int, frame: str) -> None:
    """A white rectangle is drawn in the file; the box is that of the rectangle in the photograph as decoded."""
    stored = np.zeros((48, 80, 3), np.uint8)
    stored[8:16, 56:72] = 255
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(stored).save(tmp_path / "x.png", exif=exif)
    photo = read_photograph(tmp_path, "x.png")
    assert (photo.orientation, photo.raw_shape) == (orientation, (48, 80))
    y, x = np.nonzero(photo.pixels[:, :, 0])
    upright = [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]
    assert list(rotated((56, 8, 72, 16), (48, 80), orientation)) == upright
    if orientation < 5 and frame == "stored":
        return  # both frames have one size: taken as upright, see below
    path = voc(tmp_path, [[56, 8, 72, 16] if frame == "stored" else upright], (48, 80) if frame == "stored" else photo.shape)
    boxes, notes = found(path, photo)
    assert boxes.xyxy_image.tolist() == [upright]
    assert bool(notes) == (1 < orientation < 5), "a size that both frames have does not tell which one is meant"


@pytest.mark.parametrize(("height", "width", "orientation"), [(40, 40, 6), (40, 60, 3), (40, 60, 2)])
def test_a_size_that_both_frames_have_is_announced(tmp_path: Path, height: int, width: int, orientation: int) -> None:
    boxes, notes = found(voc(tmp_path, [[1, 2, 30, 35]], (height, width)), black(height, width, orientation))
    assert boxes.xyxy_image.tolist() == [[1, 2, 30, 35]]
    assert ["assumed to be in the frame after rotation" in note for note in notes] == [True]


def test_boxes_without_a_size_of_a_turned_photograph(tmp_path: Path) -> None:
    _, notes = found(voc(tmp_path, [[1, 2, 30, 35]], None), black(60, 40, 6))
    assert len(notes) == 1
    refused(voc(tmp_path, [[1, 2, 55, 35]], None), black(60, 40, 6), "fit it before EXIF rotation", "60 x 40")


@pytest.mark.parametrize("size", [(20, 30), (80, 120), (40, 61), (60, 40)])
def test_another_size_is_refused_and_both_are_named(tmp_path: Path, size: tuple[int, int]) -> None:
    refused(voc(tmp_path, [[1, 2, 15, 15]], size), black(40, 60), f"{size[1]} x {size[0]}", "60 x 40", str(tmp_path / "xml"))


def test_an_unknown_size_is_no_size(tmp_path: Path) -> None:
    boxes, notes = found(voc(tmp_path, [[1, 2, 15, 15]], (0, 0)), black(40, 60))
    assert (len(boxes), notes) == (1, [])


# ---- boxes that would be dropped ----


def test_swapped_corners_are_sorted(tmp_path: Path) -> None:
    for swapped in ([20, 10, 0, 30], [10, 20, 30, 0]):  # as x, y, width, height they would be empty
        assert len(found(own(tmp_path, [swapped]), black(40, 60))[0]) == 1
    boxes, notes = found(own(tmp_path, [[50, 30, 40, 0], [1, 2, 3, 4]]), black(40, 60))
    assert boxes.xyxy_image.tolist() == [[40, 0, 50, 30], [1, 2, 3, 4]]
    assert "1 of 2 boxes had swapped corners" in notes[0]
    path = voc(tmp_path, [[1, 2, 31, 32]], None)
    text = (path / "x.xml").read_text().replace("xmin", "?").replace("xmax", "xmin").replace("?", "xmax")
    (path / "x.xml").write_text(text)
    boxes, notes = found(path, black(40, 60))
    assert boxes.xyxy_image.tolist() == [[1, 2, 31, 32]], "still the smaller one is 1-based"
    assert len(notes) == 1


def test_boxes_outside_are_counted(tmp_path: Path) -> None:
    boxes, notes = found(
        own(tmp_path, [[-5, -5, 10, 10], [60, 0, 70, 10], [29.2, 3.1, 29.6, 30], [50, 30, 61, 40]]), black(40, 60)
    )
    assert boxes.xyxy_image.tolist() == [[0, 0, 10, 10], [50, 30, 60, 40]]
    assert "boxes.json: x.png: 2 of 4 boxes left out: 1 outside the photograph, 1 less than a pixel" in notes[0]
    assert "1 of 4 boxes reach far beyond the photograph" in notes[1]


@pytest.mark.parametrize("box", [[60, 0, 70, 10], [-9, -9, -1, -1], [29.2, 3.1, 29.6, 3.4], [5, 5, 5, 9]])
def test_no_box_remains(tmp_path: Path, box: list[float]) -> None:
    refused(own(tmp_path, [box]), black(40, 60), "no box remains of 1", "60 x 40", "boxes.json: x.png")


def test_boxes_of_score_0_would_be_background(tmp_path: Path) -> None:
    refused(own(tmp_path, [[1, 1, 9, 9]], score=0), black(40, 60), "1 of score 0", "correct the scores")


def test_shares_are_no_pixels(tmp_path: Path) -> None:
    refused(own(tmp_path, [[0, 0.1, 0.75, 1]]), black(40, 60), "expected pixels, got coordinates in 0..1", "60 x 40")
    refused(own(tmp_path, [[0, 0, 1, 1]]), black(40, 60), "coordinates in 0..1")
    assert len(found(own(tmp_path, [[0, 0, 1, 1]]), black(1, 1))[0]) == 1


def test_a_pixel_is_a_box(tmp_path: Path) -> None:
    boxes, notes = found(voc(tmp_path, [[7, 8, 8, 9]], (40, 60)), black(40, 60))
    assert (boxes.xyxy_image.tolist(), notes) == ([[7, 8, 8, 9]], [])
    assert len(found(own(tmp_path, [[7, 8, 7.999, 9]]), black(40, 60))[0]) == 1, "a share with few decimals"


def test_width_and_height_in_the_place_of_corners(tmp_path: Path) -> None:
    """Of a box that is farther right than wide: sorting it would cover other objects."""
    refused(own(tmp_path, [[30, 20, 10, 8]]), black(40, 60), "looks like x, y, width, height: [30, 20, 10, 8]")
    boxes, _ = found(own(tmp_path, [[30, 20, 10, 8], [50, 39, 30, 1]]), black(40, 60))
    assert boxes.xyxy_image.tolist() == [[10, 8, 30, 20], [30, 1, 50, 39]], "the second one would reach beyond: both are corners"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("far", [1e39, 1e300, 1.7e308, 10**300])
def test_huge_coordinates(tmp_path: Path, far: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        boxes, notes = found(own(tmp_path, [[-far, 0, far, far]]), black(40, 60))
    assert boxes.xyxy_image.tolist() == [[0, 0, 60, 40]]
    assert "were cut" in notes[0]


def test_an_integer_that_no_float_holds(tmp_path: Path) -> None:
    refused(own(tmp_path, [[0, 0, 10**400, 9]]), black(40, 60), "expected a box")
