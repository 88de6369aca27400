"""Objects that overlap, written to each format and read back by its own tools: they are the masks of the store."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsss.classes import class_list
from wsss.errors import StoreError
from wsss.photographs import read_photograph
from wsss.rle import MaskRuns
from wsss.runtime.chain import Chain
from wsss.runtime.convert.dataset import Conversion, convert
from wsss.runtime.run.label_folder import label_folder
from wsss.store.local import LabelStore, read_label

from .stores import photos_below, quiet
from .test_label_studio import unpacked

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools, by numpy 2

SHAPE = (60, 80)
CLASSES = ("dog", "cat")


def disc(x: int, y: int, radius: int) -> np.ndarray:
    rows, columns = np.indices(SHAPE)
    return np.hypot(columns - x, rows - y) < radius


def behind_a_pole() -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[40:56, 4:40] = True
    mask[:, 18:22] = False
    mask[46:50, 28:34] = False
    return mask


MASKS = [disc(25, 20, 15), disc(40, 22, 14), behind_a_pole(), disc(25, 20, 6), disc(24, 18, 5), np.zeros(SHAPE, bool)]
"""Two dogs that overlap, a cat in two parts, a cat where the dog won all, a dog in a dog, and nothing."""
NAMES = ("dog", "dog", "cat", "cat", "dog", "dog")
OBJECTS = (0, 1, 4, 2)
"""Boxes that are objects, in the order in which they are written: by class."""
LABEL_MAP = np.where(MASKS[0] | MASKS[1], 1, np.where(MASKS[2], 2, 0)).astype(np.uint8)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs and a store: ``a`` has masks, ``b`` lost them to a program that saved it again."""
    root = tmp_path_factory.mktemp("masked")
    (root / "photos").mkdir()
    boxes = []
    for number, (name, mask) in enumerate(zip(NAMES, MASKS, strict=True)):
        y, x = np.nonzero(mask) if mask.any() else (np.array([50]), np.array([70]))
        xyxy = [float(x.min()), float(y.min()), x.max() + 1.0, y.max() + 1.0]
        won = {0: 500, 1: 400, 2: 400}.get(number, 0)
        boxes.append({"label": name, "score": 0.9 - number / 10, "quality": 0.5, "xyxy": xyxy, "area_px": 1, "won_px": won})
    with LabelStore(root / "store", class_list(CLASSES), {"masks": True}) as store:
        for name in ("a", "b"):
            Image.fromarray(np.full((*SHAPE, 3), 99, np.uint8)).save(root / "photos" / f"{name}.png")
            photo = read_photograph(root / "photos", f"{name}.png")
            line = {"path": f"{name}.png", "label": f"{name}.png", "bytes": photo.size_bytes, "mtime_ns": photo.mtime_ns}
            size = {"sha256": photo.sha256, "height": SHAPE[0], "width": SHAPE[1], "classes": {}, "boxes": boxes, "void_px": 0}
            store.write({**line, **size}, LABEL_MAP, [MaskRuns.of(mask).counts() for mask in MASKS])
    with Image.open(root / "store/labels/b.png") as image:
        image.load()
        image.save(root / "store/labels/b.png")
    return root


Convert = Callable[..., Conversion]


@pytest.fixture
def converted(masked: Path, tmp_path: Path) -> Convert:
    return lambda to, **how: convert(masked / "store", masked / "photos", tmp_path / to, to, **how)


def check_objects(found: list[tuple[str, np.ndarray]]) -> None:
    """These are the objects of ``a``, exactly."""
    assert [name for name, _ in found] == [NAMES[number] for number in OBJECTS]
    for (_, mask), number in zip(found, OBJECTS, strict=True):
        assert np.array_equal(mask, MASKS[number]), f"box {number}"


def test_coco_read_by_pycocotools(converted: Convert, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco = pytest.importorskip("pycocotools.coco", reason="needs pycocotools")
    losses = converted("coco").losses
    assert losses == ("1 images have no masks in the store: their objects are cut out of the label map",)
    data = coco.COCO(str(tmp_path / "coco/annotations/instances_train.json"))
    found = data.loadAnns(data.getAnnIds(imgIds=1))
    check_objects([(CLASSES[each["category_id"] - 1], data.annToMask(each).astype(bool)) for each in found])
    assert [each["score"] for each in found] == [0.9 - number / 10 for number in OBJECTS]
    for each, number in zip(found, OBJECTS, strict=True):
        y, x = np.nonzero(MASKS[number])
        assert each["bbox"] == [x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()]
        assert each["area"] == MASKS[number].sum()
    cut_out = [data.annToMask(each).astype(bool) for each in data.loadAnns(data.getAnnIds(imgIds=2))]
    assert len(cut_out) == 3 and not (cut_out[0] & cut_out[1]).any()


def test_coco_panoptic_segments_do_not_overlap(converted: Convert, tmp_path: Path) -> None:
    """The smallest mask has a pixel that several cover."""
    converted("coco")
    document = json.loads((tmp_path / "coco/annotations/panoptic_train.json").read_text())
    ids = np.array(Image.open(tmp_path / "coco/annotations/panoptic_train/a.png")).astype(int)[..., 0]
    segments = document["annotations"][0]["segments_info"]
    assert [each["category_id"] for each in segments] == [1, 1, 1, 2, 3]
    assert sum(each["area"] for each in segments) == SHAPE[0] * SHAPE[1]
    owner = np.zeros(SHAPE, int)
    for place in np.argsort([-MASKS[number].sum() for number in OBJECTS], kind="stable"):
        owner[MASKS[OBJECTS[place]]] = place + 1
    assert np.array_equal(np.where(ids == 5, 0, ids), owner)


def test_coco_read_by_datumaro(converted: Convert, tmp_path: Path) -> None:
    datumaro = pytest.importorskip("datumaro", reason="needs datumaro")
    converted("coco")
    data = datumaro.Dataset.import_from(str(tmp_path / "coco"), "coco_instances")
    item = next(item for item in data if item.id == "a")
    masks = [each for each in item.annotations if each.type is not datumaro.AnnotationType.bbox]
    masks.sort(key=lambda each: each.id)
    check_objects([(CLASSES[each.label], each.image.astype(bool)) for each in masks])


def test_coco_read_by_supervision(converted: Convert, tmp_path: Path) -> None:
    reader = pytest.importorskip("supervision", minversion="0.25", reason="needs supervision>=0.25")
    converted("coco")
    data = reader.DetectionDataset.from_coco(
        images_directory_path=str(tmp_path / "coco/images/train"),
        annotations_path=str(tmp_path / "coco/annotations/instances_train.json"),
        force_masks=True,
    )
    objects = next(objects for path, _, objects in data if path.endswith("a.png"))
    check_objects([(data.classes[label], mask) for label, mask in zip(objects.class_id, objects.mask, strict=True)])


def test_label_studio_read_by_its_sdk(converted: Convert, tmp_path: Path) -> None:
    brush = pytest.importorskip("label_studio_sdk.converter.brush", reason="needs label-studio-sdk")
    converted("label-studio")
    regions = json.loads((tmp_path / "label-studio/tasks.json").read_text())[0]["predictions"][0]["result"]
    found = []
    for each in regions:
        ((_, mask),) = brush.decode_from_annotation("label", [{**each, **each["value"]}]).items()
        found.append((each["value"]["brushlabels"][0], mask > 0))
    check_objects(found)


def test_label_studio_read_by_the_rules_of_rle_pack(converted: Convert, tmp_path: Path) -> None:
    converted("label-studio")
    regions = json.loads((tmp_path / "label-studio/tasks.json").read_text())[0]["predictions"][0]["result"]
    masks = [unpacked(each["value"]["rle"]).reshape(*SHAPE, 4)[..., 3] > 0 for each in regions]
    check_objects([(each["value"]["brushlabels"][0], mask) for each, mask in zip(regions, masks, strict=True)])
    assert [each["score"] for each in regions] == [0.9 - number / 10 for number in OBJECTS]


def test_hf_read_by_datasets(converted: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The boxes of the store, all of them, with their masks; empty where there are none."""
    quiet(monkeypatch)
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    coco = pytest.importorskip("pycocotools.mask", reason="needs pycocotools")
    converted("hf")
    data = datasets.load_dataset(str(tmp_path / "hf"), cache_dir=str(tmp_path / "cache"))["train"]
    rows = {row["path"]: row for row in data}
    objects = rows["a.png"]["objects"]
    assert objects["category"] == list(NAMES)
    for counts, mask in zip(objects["rle"], MASKS, strict=True):
        assert np.array_equal(coco.decode({"size": list(SHAPE), "counts": counts}).astype(bool), mask)
    assert rows["b.png"]["objects"]["rle"] == [""] * len(MASKS)


def test_cvat_objects_are_the_segments(converted: Convert, tmp_path: Path) -> None:
    converted("cvat")
    numbers = read_label(tmp_path / "cvat/SegmentationObject/a.png")
    assert np.array_equal(numbers > 0, LABEL_MAP > 0)
    assert np.unique(numbers).tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(numbers == 3, MASKS[4]), "the smallest is whole"


def ious(out: Path) -> list[float]:
    """IoU of the objects of ``a`` with what a reader fills."""
    from wsss.runtime.convert.polygons import filled

    lines = (out / "labels/train/a.txt").read_text().splitlines()
    assert len(lines) == len(OBJECTS), "one line an object"
    found = []
    for line, number in zip(lines, OBJECTS, strict=True):
        label, *shares = line.split()
        assert CLASSES[int(label)] == NAMES[number]
        corners = (np.array(shares, float).reshape(-1, 2) * SHAPE[::-1]).astype(np.int64)
        seen = filled(corners, SHAPE)
        found.append(float((seen & MASKS[number]).sum() / (seen | MASKS[number]).sum()))
    return found


LOSS = re.compile(r"(\d+) objects in several parts.*: their polygons have an IoU of ([\d.]+), at worst ([\d.]+)")


def test_yolo_has_a_line_for_each_object_and_says_what_joining_costs(converted: Convert, tmp_path: Path) -> None:
    (said,) = filter(None, map(LOSS.fullmatch, converted("yolo").losses))
    found = ious(tmp_path / "yolo")
    assert found[:3] == [1, 1, 1], "objects in one part are exact"
    assert 0.97 < found[3] < 1
    # Both images have the cat in two parts.
    assert (int(said[1]), float(said[2]), float(said[3])) == (
        2,
        pytest.approx(found[3], abs=1e-4),
        pytest.approx(found[3], abs=1e-4),
    )


def test_yolo_says_what_simplifying_costs(converted: Convert, tmp_path: Path) -> None:
    whole = converted("yolo")
    (tmp_path / "yolo").rename(tmp_path / "whole")
    (said,) = filter(None, map(LOSS.fullmatch, converted("yolo", simplify_px=1.0).losses))
    assert "and simplified outlines" in said[0]
    found = ious(tmp_path / "yolo")
    assert min(found) >= float(said[3]) - 1e-4
    assert 0.85 < float(said[3]) <= float(said[2]) < 1
    size = [sum(path.stat().st_size for path in (tmp_path / name / "labels/train").iterdir()) for name in ("yolo", "whole")]
    assert size[0] < 0.6 * size[1]
    assert whole.images == 2


@pytest.mark.parametrize("reader", ["cv2", "supervision"])
def test_yolo_read_by_others(reader: str, converted: Convert, tmp_path: Path) -> None:
    module = pytest.importorskip(reader, reason=f"needs {reader}")
    converted("yolo")
    if reader == "cv2":  # as ultralytics does
        masks = []
        for line in (tmp_path / "yolo/labels/train/a.txt").read_text().splitlines():
            corners = np.array(line.split()[1:], np.float32).reshape(-1, 2) * SHAPE[::-1]
            masks.append(module.fillPoly(np.zeros(SHAPE, np.uint8), [corners.astype(np.int32)], 1) > 0)
    else:
        data = module.DetectionDataset.from_yolo(
            images_directory_path=str(tmp_path / "yolo/images/train"),
            annotations_directory_path=str(tmp_path / "yolo/labels/train"),
            data_yaml_path=str(tmp_path / "yolo/data.yaml"),
            force_masks=True,
        )
        masks = list(next(objects.mask for path, _, objects in data if path.endswith("a.png")))
    found = [(seen & MASKS[number]).sum() / (seen | MASKS[number]).sum() for seen, number in zip(masks, OBJECTS, strict=True)]
    assert found == pytest.approx(ious(tmp_path / "yolo"), abs=2e-3)


def test_a_damaged_mask_is_named(masked: Path, tmp_path: Path) -> None:
    from wsss.store.local import label_file

    good = (masked / "store/labels/a.png").read_bytes()
    for counts, problem in (("0", "do not have the 4,800 pixels"), ("~", "not compressed counts")):
        masks = [MaskRuns.of(mask).counts() for mask in MASKS]
        masks[4] = counts
        (masked / "store/labels/a.png").write_bytes(label_file("a.png", LABEL_MAP, masks))
        try:
            for to in ("coco", "yolo", "cvat", "label-studio", "hf"):
                with pytest.raises(StoreError, match=rf"^labels/a\.png: the mask of box 4 is damaged: .*{problem}"):
                    convert(masked / "store", masked / "photos", tmp_path / "out", to)
        finally:
            (masked / "store/labels/a.png").write_bytes(good)


def test_what_sam_outlined_comes_back(tmp_path: Path) -> None:
    """From a photograph of two discs of one class that overlap, through the chain, the store and COCO."""
    pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
    rows, columns = np.indices((240, 320))
    pixels = np.full((240, 320, 3), 200, np.uint8)
    for x, color in ((120, (200, 20, 30)), (180, (220, 40, 40))):
        pixels[np.hypot(columns - x, rows - 120) < 50] = color
    (tmp_path / "photos").mkdir()
    Image.fromarray(pixels).save(tmp_path / "photos/discs.png")
    boxes = [{"label": "red disc", "xyxy": [x - 50, 70, x + 50, 170], "score": score} for x, score in ((120, 0.6), (180, 0.9))]
    (tmp_path / "boxes.json").write_text(json.dumps({"discs.png": boxes}))
    labeler = Chain.open("mini", classes="mini", engine="ort", device="cpu", boxes=tmp_path / "boxes.json")
    label_folder(labeler, tmp_path / "photos", tmp_path / "store")
    convert(tmp_path / "store", tmp_path / "photos", tmp_path / "coco", "coco")
    document = json.loads((tmp_path / "coco/annotations/instances_train.json").read_text())
    found = [MaskRuns.from_counts(each["segmentation"]["counts"], (240, 320)).mask() for each in document["annotations"]]

    result = labeler.pseudo_label([read_photograph(tmp_path / "photos", "discs.png")])
    assert result.masks is not None
    (frame,), side = result.masks.frames, result.masks.logits[0].shape[1]
    assert frame is not None
    logits = [np.asarray(result.masks.logits[part])[row] for part, row in zip(result.masks.part, result.masks.row, strict=True)]
    upsampled = [frame.mask_rows(side) @ each @ frame.mask_columns(side).T for each in logits]
    assert len(found) == 2
    assert (found[0] & found[1]).sum() > 500, "they overlap"
    for mask, expected in zip(found, upsampled, strict=True):
        assert np.abs(expected[mask != (expected > 0)]).max(initial=0) < 1e-4
    assert photos_below(tmp_path / "coco/images/train").keys() == {"discs.png"}
