"""COCO data sets, read back by their own tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from wsss.runtime.convert.labeled import original_path

if TYPE_CHECKING:
    pass

from .stores import CLASSES, TURNED, check_maps, paint, truth

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools, by numpy 2


@pytest.fixture
def coco(converted: Callable[..., Path]) -> Path:
    pytest.importorskip("pycocotools", reason="needs pycocotools")
    return converted("coco")


def test_coco_read_by_pycocotools(made: Path, coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pycocotools.coco import COCO

    data = COCO(str(coco / "annotations/instances_train.json"))
    assert [(each["id"], each["name"]) for each in data.loadCats(data.getCatIds())] == list(enumerate(CLASSES, 1))
    found, scores = {}, {}
    for image in data.loadImgs(data.getImgIds()):
        objects = data.loadAnns(data.getAnnIds(imgIds=image["id"]))
        for each in objects:
            mask = data.annToMask(each).astype(bool)
            y, x = np.nonzero(mask)
            assert each["area"] == mask.sum()
            assert each["bbox"] == [x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()]
        name = original_path(image["file_name"])
        masks = [(each["category_id"], data.annToMask(each).astype(bool)) for each in objects]
        found[name] = paint((image["height"], image["width"]), masks)
        scores[name] = [(each["category_id"], each.get("score"), each.get("quality")) for each in objects]
    check_maps(found, made, void=False)
    assert scores["dog.jpg"][:3] == [(1, 0.9, 0.75), (2, 0.5, 0.75), (2, 0.25, 0.75)]
    assert scores["dog.jpg"][3] == (3, None, None)
    # It takes what it wrote for results too: every object is found at full precision.
    from pycocotools.cocoeval import COCOeval

    results = [{**each, "score": each.get("score", 0.1)} for each in data.loadAnns(data.getAnnIds())]
    measured = COCOeval(data, data.loadRes(results), "segm")
    measured.params.maxDets = [1, 10, 1000]
    measured.evaluate()
    assert all(match.any(axis=0).all() for each in measured.evalImgs if each for match in [each["dtMatches"] > 0])


def test_coco_panoptic_is_the_label_map(made: Path, coco: Path) -> None:
    document = json.loads((coco / "annotations/panoptic_train.json").read_text())
    label_of = {each["id"]: each["id"] if each["isthing"] else 0 for each in document["categories"]}
    names = {image["id"]: original_path(image["file_name"]) for image in document["images"]}
    found = {}
    for each in document["annotations"]:
        colors = np.array(Image.open(coco / "annotations/panoptic_train" / each["file_name"])).astype(int)
        ids = colors[..., 0] + 256 * colors[..., 1] + 256**2 * colors[..., 2]
        label_map = np.full(ids.shape, 255, np.uint8)
        for segment in each["segments_info"]:
            mask = ids == segment["id"]
            y, x = np.nonzero(mask)
            assert segment["area"] == mask.sum() > 0
            assert segment["bbox"] == [x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()]
            label_map[mask] = label_of[segment["category_id"]]
        assert set(np.unique(ids)) - {0} == {segment["id"] for segment in each["segments_info"]}
        found[names[each["image_id"]]] = label_map
    check_maps(found, made)


@pytest.mark.parametrize("task", ["coco_instances", "coco_panoptic"])
def test_coco_read_by_datumaro(task: str, made: Path, coco: Path) -> None:
    dataset = pytest.importorskip("datumaro", reason="needs datumaro")
    data = dataset.Dataset.import_from(str(coco), task)
    names = [label.name for label in data.categories()[dataset.AnnotationType.label]]
    background = len(CLASSES)
    assert names == [*CLASSES, "background"][: len(names)]
    found = {}
    for item in data:
        name = original_path(item.id + Path(item.media.path).suffix)
        shape = truth(made)[name].shape
        label_map = np.zeros(shape, np.uint8) if task == "coco_instances" else np.full(shape, 255, np.uint8)
        for each in (each for each in item.annotations if each.type is not dataset.AnnotationType.bbox):
            label_map[each.image.astype(bool)] = 0 if each.label == background else each.label + 1
        if task == "coco_instances" and name == "dog.jpg":
            assert {each.attributes.get("score") for each in item.annotations} == {0.9, 0.5, 0.25, None}
        found[name] = label_map
        assert item.media.data.shape[:2] == shape[:: -1 if name == TURNED else 1]
    check_maps(found, made, void=task == "coco_panoptic")


def test_coco_read_by_supervision(made: Path, coco: Path) -> None:
    reader = pytest.importorskip("supervision", minversion="0.25", reason="needs supervision>=0.25")
    data = reader.DetectionDataset.from_coco(
        images_directory_path=str(coco / "images/train"),
        annotations_path=str(coco / "annotations/instances_train.json"),
        force_masks=True,
    )
    assert data.classes == list(CLASSES)
    found = {}
    for path, _, objects in data:
        name = original_path(Path(path).relative_to(coco / "images/train").as_posix())
        masks = (
            []
            if objects.mask is None
            else [(label + 1, mask) for label, mask in zip(objects.class_id, objects.mask, strict=True)]
        )
        found[name] = paint(truth(made)[name].shape, masks)
    check_maps(found, made, void=False)
