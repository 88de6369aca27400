"""VOC and CVAT data sets, read back by their own tools."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from wsss.classes import palette
from wsss.photographs import read_photograph
from wsss.runtime.convert.labeled import Labeled, original_path
from wsss.store.local import read_label

if TYPE_CHECKING:
    pass

from .stores import CLASSES, TURNED, check_maps, paint, photos_below, truth

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools, by numpy 2


def test_voc_as_files(made: Path, converted: Callable[..., Path]) -> None:
    out = converted("voc")
    found = {}
    for name, path in photos_below(out / "JPEGImages").items():
        with Image.open(out / "SegmentationClass" / f"{path.stem}.png") as label:
            assert label.mode == "P"
            assert np.array_equal(np.array(label.getpalette()).reshape(-1, 3), palette())
            found[name] = np.array(label)
    check_maps(found, made)
    lines = (out / "ImageSets/Segmentation/train.txt").read_text().split()
    assert sorted(lines) == sorted(path.stem for path in (out / "JPEGImages").iterdir())


def test_voc_read_by_torchvision(made: Path, converted: Callable[..., Path], tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets", reason="needs torchvision")
    (tmp_path / "VOCdevkit").mkdir()
    (tmp_path / "VOCdevkit/VOC2012").symlink_to(converted("voc"))
    data = datasets.VOCSegmentation(str(tmp_path), image_set="train")
    found = {original_path(Path(image).name): number for number, image in enumerate(data.images)}
    for name in ("a b/my dog.jpg", "case/Dog.jpg", "line\nbreak.jpg", "empty.jpg"):
        photo, label = data[found[name]]
        assert np.array_equal(np.array(label), truth(made)[name])
        assert np.array_equal(np.array(photo), read_photograph(made / "photos", name).pixels)


@pytest.mark.parametrize("to", ["voc", "cvat"])
def test_voc_and_cvat_read_by_datumaro(to: str, made: Path, converted: Callable[..., Path]) -> None:
    """CVAT imports its "segmentation mask 1.1" with datumaro's VOC importer."""
    dataset = pytest.importorskip("datumaro", reason="needs datumaro")
    out = converted(to)
    data = dataset.Dataset.import_from(str(out), "voc_instance_segmentation" if to == "cvat" else "voc_segmentation")
    names = [label.name for label in data.categories()[dataset.AnnotationType.label]]
    assert names == ["background", *CLASSES, "void"]
    value = {number: 255 if name == "void" else number for number, name in enumerate(names)}
    found, objects = {}, {}
    for item in data:
        masks = [(each.label, each.image.astype(bool)) for each in item.annotations if each.label]
        name = original_path(item.id + Path(item.media.path).suffix)
        found[name] = paint(truth(made)[name].shape, [(value[label], mask) for label, mask in masks])
        objects[name] = sum(value[label] == 2 for label, _ in masks)
        assert item.media.data.shape[:2] == found[name].shape[:: -1 if name == TURNED else 1]
    check_maps(found, made)
    assert objects["dog.jpg"] == (2 if to == "cvat" else 1), "two boxes are two objects"


def test_cvat_as_files(made: Path, converted: Callable[..., Path]) -> None:
    out = converted("cvat")
    lines = [line.split(":") for line in (out / "labelmap.txt").read_text().splitlines()[1:]]
    assert [line[0] for line in lines] == ["background", *CLASSES, "void"]
    assert all(len(line) == 4 for line in lines)
    assert len({line[1] for line in lines}) == len(lines)
    assert lines[-1][1] == "224,224,192"
    names = (out / "ImageSets/Segmentation/default.txt").read_text().splitlines()
    assert "a b/sub/my dog" in names, "CVAT finds its images by their paths"
    found = {}
    for name, path in photos_below(out / "JPEGImages").items():
        stem = path.relative_to(out / "JPEGImages").with_suffix("").as_posix()
        assert stem in names
        found[name] = read_label(out / "SegmentationClass" / f"{stem}.png")
        objects = read_label(out / "SegmentationObject" / f"{stem}.png")
        assert np.array_equal(objects == 0, found[name] == 0)
        assert np.array_equal(objects == 255, found[name] == 255)
        pairs = {(int(number), int(label)) for number, label in zip(objects.flat, found[name].flat, strict=True)}
        assert len(pairs) == len({number for number, _ in pairs}), "an object is of one class"
    check_maps(found, made)


def test_cvat_with_more_objects_than_an_image_can_number() -> None:
    from wsss.runtime.convert.labeled import count_labels
    from wsss.runtime.convert.segments import segments_of
    from wsss.runtime.convert.voc import _numbered

    label_map = np.zeros((60, 60), np.uint8)
    label_map[::4, ::4] = 1
    label_map[2::4, ::4] = 2
    label_map[:, 1::8] = label_map[:, ::8]
    label_map[2, 0:3] = 2
    item = Labeled(
        path="a.jpg",
        label="a.png",
        file=Path(),
        size_bytes=0,
        sha256="",
        label_map=label_map,
        count=count_labels(label_map),
        boxes=(),
        masks=None,
        split="train",
    )
    segments = segments_of(item)
    assert len(segments.segments) == 450
    numbers, shared = _numbered(segments, label_map)
    assert shared == 450 - 252
    assert np.unique(numbers).tolist() == list(range(255))
    for label in (1, 2):
        assert not set(numbers[label_map == label]) & set(numbers[label_map != label])
    assert (numbers == numbers[2, 0]).sum() == 3, "a large one keeps its own number"


def test_void_has_a_name_of_its_own() -> None:
    from wsss.runtime.convert.labeled import void_name

    assert void_name(("dog",)) == "void"
    assert void_name(("Void", "void_")) == "void__"


def test_a_class_that_labelmap_cannot_hold(made: Path, tmp_path: Path) -> None:
    from wsss.errors import ClassError
    from wsss.runtime.convert.voc import write_label_map

    with pytest.raises(ClassError, match="would be a comment"):
        write_label_map(tmp_path / "labelmap.txt", ("#1 dog",))
