"""The page to look at: every image beside its overlay, doubtful ones first, no name trusted as HTML."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from wsss.classes import palette
from wsss.errors import ImageError, StoreError
from wsss.labelstore import LabelStore
from wsss.runtime.overlay import overlay, shrink
from wsss.runtime.pipeline import Labeler
from wsss.runtime.report import doubt, write_report
from wsss.runtime.run import label_folder

if TYPE_CHECKING:
    from ..conftest import World


@pytest.fixture
def store(world: World, photos: Path, tmp_path: Path) -> Path:
    world.save(photos / "<b>&.png", 20, 20, red=(0, 0, 20, 20))
    (photos / "bad.jpg").write_text("no")
    label_folder(Labeler.open(world.bundle, classes=world.classes), photos, tmp_path / "store", warn=lambda _: None)
    return tmp_path / "store"


def test_the_page_shows_every_image_and_names_the_failed(store: Path, photos: Path, tmp_path: Path) -> None:
    page = write_report(store, photos, tmp_path / "page.html").read_text()
    assert page.count("<figure>") == 6
    assert page.count("data:image/jpeg;base64,") == 12
    assert "6 images labelled · 8 boxes · 1 failed · 6 shown" in page
    assert "<li>bad.jpg: " in page
    assert "&lt;b&gt;&amp;.png" in page
    assert "<b>&.png" not in page
    assert "http" not in page, "needs no network"
    assert f"rgb({','.join(map(str, palette()[1]))})" in page


def test_doubtful_images_come_first(world: World, tmp_path: Path) -> None:
    photos, scores = tmp_path / "photos", {"sure.png": 0.95, "unsure.png": 0.4, "middling.png": 0.7}
    boxes = {}
    for name, score in scores.items():
        world.save(photos / name, 20, 20, red=(0, 0, 10, 10))
        boxes[name] = [{"label": "red", "xyxy": [0, 0, 10, 10], "score": score}]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    labeler = Labeler.open(world.bundle, classes=world.classes, boxes=tmp_path / "boxes.json")
    label_folder(labeler, photos, tmp_path / "store")
    page = write_report(tmp_path / "store", photos, tmp_path / "page.html").read_text()
    assert re.findall(r"<figcaption><b>(.*?)</b>", page) == ["unsure.png", "middling.png", "sure.png"]


def test_limit(store: Path, photos: Path, tmp_path: Path) -> None:
    assert write_report(store, photos, tmp_path / "page.html", limit=2).read_text().count("<figure>") == 2


def test_an_image_gone_from_disk_is_counted(store: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "red.png").unlink()
    page = write_report(store, photos, tmp_path / "page.html").read_text()
    assert page.count("<figure>") == 5
    assert "1 not found on disk" in page


def test_the_wrong_folder_and_no_store(world: World, store: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(ImageError, match="has none of the store's images"):
        write_report(store, tmp_path / "other", tmp_path / "page.html")
    with pytest.raises(StoreError, match="expected a label store"):
        write_report(tmp_path / "other", tmp_path / "other", tmp_path / "page.html")
    with LabelStore(tmp_path / "new", world.classes, {}):
        pass
    with pytest.raises(StoreError, match="no image in it yet"):
        write_report(tmp_path / "new", tmp_path / "other", tmp_path / "page.html")


def record(void: int = 0, *boxes: tuple[str, float, float], classes: tuple[str, ...] = ()) -> dict[str, Any]:
    found = [{"label": label, "score": score, "quality": quality} for label, score, quality in boxes]
    return {"height": 10, "width": 10, "void_px": void, "boxes": found, "classes": dict.fromkeys(classes, 0.9)}


@pytest.mark.parametrize(
    ("of", "value"),
    [
        (record(), 0),
        (record(20), 0.2),
        (record(0, ("dog", 0.5, 0.8)), 0.6),
        (record(0, ("dog", 1, 1), ("cat", 0.5, 1)), 0.5),  # the weakest
        (record(0, classes=("dog",)), 0.5),  # tagged, not found
        (record(10, ("dog", 1, 1), classes=("dog", "cat", "cow")), 0.6),
    ],
)
def test_doubt(of: dict[str, Any], value: float) -> None:
    assert doubt(of) == pytest.approx(value)


def test_overlay_colours_labels_and_leaves_background_clear() -> None:
    pixels = np.full((3, 5, 3), 100, np.uint8)
    label_map = np.zeros((3, 5), np.uint8)
    label_map[:, 3:] = 1
    shown = overlay(pixels, label_map, strength=0.5)
    assert (shown.shape, shown.dtype) == ((3, 5, 3), np.uint8)
    assert shown[0, 0].tolist() == [100, 100, 100]
    assert shown[0, 3].tolist() == palette()[1].tolist(), "the outline is the colour itself"
    assert shown[0, 4].tolist() == [round(v) for v in (100 + palette()[1].astype(float)) / 2]


@pytest.mark.parametrize(("size", "thumbnail"), [((10, 20), (20, 10)), ((400, 800), (64, 32)), ((1000, 10), (1, 64))])
def test_thumbnails_never_grow(size: tuple[int, int], thumbnail: tuple[int, int]) -> None:
    assert shrink(np.zeros((*size, 3), np.uint8), 64).size == thumbnail
