"""YOLO data sets, read back by their own tools."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from wsss.runtime.convert.labeled import original_path
from wsss.runtime.convert.polygons import filled
from wsss.runtime.given.yolo import read_names

from .stores import CLASSES, photos_below, truth

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools, by numpy 2


def test_yolo_corners_are_the_same_pixel_whether_cut_or_rounded(made: Path, converted: Callable[..., Path]) -> None:
    out = converted("yolo")
    for name, path in photos_below(out / "images/train").items():
        height, width = truth(made)[name].shape
        for line in (out / "labels/train" / f"{path.stem}.txt").read_text().splitlines():
            label, *shares = line.split()
            assert label in ("0", "1", "2")
            assert len(shares) >= 6
            corners = np.array(shares, np.float32).reshape(-1, 2) * np.array([width, height], np.float32)
            assert np.array_equal(np.trunc(corners), np.round(corners))
            x, y = np.trunc(corners).astype(int).T
            assert (truth(made)[name][y, x] == int(label) + 1).all()


def test_yolo_read_as_ultralytics_does(made: Path, converted: Callable[..., Path]) -> None:
    """ultralytics (AGPL, not installed): shares times the size, cut to whole pixels, cv2.fillPoly."""
    cv2 = pytest.importorskip("cv2", reason="needs opencv-python-headless")
    out = converted("yolo")
    found = {}
    for name, path in photos_below(out / "images/train").items():
        height, width = truth(made)[name].shape
        found[name] = np.zeros((height, width), np.uint8)
        for line in (out / "labels/train" / f"{path.stem}.txt").read_text().splitlines():
            label, *shares = line.split()
            corners = np.array(shares, np.float32).reshape(-1, 2)
            assert len(corners) >= 3
            assert corners.min() >= 0
            assert corners.max() <= 1
            mask = np.zeros((height, width), np.uint8)
            corners = (corners * (width, height)).astype(np.int32)
            cv2.fillPoly(mask, [corners], 1)
            assert np.array_equal(mask > 0, filled(corners.astype(np.int64), (height, width)))
            found[name][mask > 0] = int(label) + 1
    check_covered(found, made)


def check_covered(found: dict[str, np.ndarray], made: Path) -> None:
    """Every object is painted; the lines that join its parts may hide pixels of others and of the background."""
    for path, label_map in truth(made).items():
        assert (found[path][(label_map > 0) & (label_map < 255)] > 0).all(), path


def test_yolo_says_that_lines_are_regions(converted: Callable[..., Path]) -> None:
    out = converted("yolo")
    assert read_names(out / "data.yaml") == (list(CLASSES), False)


def test_yolo_read_by_supervision(made: Path, converted: Callable[..., Path]) -> None:
    reader = pytest.importorskip("supervision", minversion="0.25", reason="needs supervision>=0.25")
    out = converted("yolo")
    data = reader.DetectionDataset.from_yolo(
        images_directory_path=str(out / "images/train"),
        annotations_directory_path=str(out / "labels/train"),
        data_yaml_path=str(out / "data.yaml"),
        force_masks=True,
    )
    assert data.classes == list(CLASSES)
    found = {}
    for path, _, objects in data:
        name = original_path(Path(path).name)
        masks = (
            []
            if objects.mask is None
            else [(label + 1, mask) for label, mask in zip(objects.class_id, objects.mask, strict=True)]
        )
        found[name] = np.zeros(truth(made)[name].shape, np.uint8)
        for label, mask in masks:
            found[name][mask] = label
    check_covered(found, made)
