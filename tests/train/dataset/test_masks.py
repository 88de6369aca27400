"""Folders of masks as training data: what is read where it is, and what is refused and why."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsss.errors import StoreError, UsageError, WsssError
from wsss.store.decisions import exclusion
from wsss.train.data import read_pair
from wsss.train.dataset.masks import survey_masks, survey_of
from wsss.train.dataset.survey import survey_store

Scenes = tuple[Path, Path]
CLASSES = ("dog", "cat")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``images`` and ``masks`` of three photographs, one in a sub-folder; a strip of the masks is void."""
    tmp_path /= "plain"
    mask = np.zeros((20, 30), np.uint8)
    mask[4:9, 5:15], mask[10:12, 5:15], mask[19] = 1, 2, 255
    for name in ("a", "b", "sub/c"):
        for kind, end in (("images", "jpg"), ("masks", "png")):
            (tmp_path / kind / name).parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(mask) if kind == "masks" else Image.new("RGB", (30, 20), "gray")
            picture.save(tmp_path / kind / f"{name}.{end}")
    return tmp_path


def test_masks_are_read_where_they_are(folder: Path) -> None:
    survey = survey_masks(folder / "masks", folder / "images", CLASSES)
    assert [item.path for item in survey.items] == ["a.jpg", "b.jpg", "sub/c.jpg"]
    assert all(item.confidence == (1, 1, 1) and item.pixels == (500, 50, 20) for item in survey.items)
    pixels, label = read_pair(folder / "masks", folder / "images", survey.items[2])
    assert pixels.shape == (20, 30, 3) and label.flags.writeable
    np.testing.assert_array_equal(label, np.array(Image.open(folder / "masks" / "sub" / "c.png")))


def test_masks_of_a_store_have_the_labels_of_the_store(scenes: Scenes) -> None:
    store, images = scenes
    classes = survey_store(store, images).classes
    masks = survey_masks(store / "labels", images, classes)
    assert [item.pixels for item in masks.items] == [item.pixels for item in survey_store(store, images).items]
    assert masks.items == survey_masks(store, images, classes).items, "a store's labels may be named as the store"


@pytest.mark.parametrize("mode", ["1", "4-bit", "16-bit"])
def test_other_depths_have_the_same_labels(folder: Path, mode: str) -> None:
    """A mask of one class in one bit, and 16-bit gray, as numpy arrays of bool and int are saved."""
    mask = np.zeros((20, 30), np.uint8)
    mask[3:5] = 1
    path = folder / "masks" / "a.png"
    if mode == "1":
        Image.fromarray(mask.astype(bool)).save(path)
    elif mode == "4-bit":
        picture = Image.fromarray(mask).convert("P")
        picture.putpalette([0, 0, 0, 128, 0, 0])
        picture.save(path, bits=4)
    else:
        Image.fromarray(mask.astype(np.uint16)).save(path)
    item = survey_masks(folder / "masks", folder / "images", CLASSES).items[0]
    assert item.pixels == (540, 60, 0)
    np.testing.assert_array_equal(read_pair(folder / "masks", folder / "images", item)[1], mask)


def test_the_layout_of_voc(folder: Path) -> None:
    """JPEGImages has more photographs than there are masks; a list chooses some of these."""
    voc = folder / "VOC2012"
    shutil.copytree(folder / "images", voc / "JPEGImages")
    shutil.copytree(folder / "masks", voc / "SegmentationClass")
    shutil.copy(voc / "JPEGImages" / "a.jpg", voc / "JPEGImages" / "z.jpg")
    said: list[str] = []
    survey = survey_masks(voc, voc, CLASSES, log=said.append)
    assert [item.path for item in survey.items] == ["a.jpg", "b.jpg", "sub/c.jpg"]
    assert len(said) == 1 and "1 of 4 photographs" in said[0] and said[0].endswith("left out: z.jpg")
    (folder / "list.txt").write_text("b\na\n")
    said.clear()
    survey = survey_masks(voc, voc, CLASSES, listed=folder / "list.txt", log=said.append)
    assert [item.path for item in survey.items] == ["a.jpg", "b.jpg"] and not said


def test_rejected_photographs_are_left_out(folder: Path) -> None:
    (path := folder / "list.txt").write_text("sub/c.jpg\n")
    said: list[str] = []
    survey = survey_masks(folder / "masks", folder / "images", CLASSES, exclude=exclusion(path), log=said.append)
    assert [item.path for item in survey.items] == ["a.jpg", "b.jpg"]
    assert said == [f"--exclude {path}: 1 images are left out"]


def test_the_digest_tells_masks_apart(folder: Path) -> None:
    def digest(classes: tuple[str, ...] = CLASSES) -> str:
        return survey_masks(folder / "masks", folder / "images", classes).digest

    before = digest()
    assert digest() == before != digest(("cat", "dog"))
    mask = np.array(Image.open(folder / "masks" / "a.png"))
    mask[0, 0] = 1
    Image.fromarray(mask).save(folder / "masks" / "a.png")
    assert digest() != before


def without_photograph(folder: Path) -> None:
    (folder / "images" / "a.jpg").unlink()


def without_mask(folder: Path) -> None:
    (folder / "masks" / "a.png").unlink()


def of_another_size(folder: Path) -> None:
    Image.new("L", (30, 21)).save(folder / "masks" / "a.png")


def beyond_the_list(folder: Path) -> None:
    Image.new("L", (30, 20), 3).save(folder / "masks" / "a.png")


def colors(folder: Path) -> None:
    Image.new("RGB", (30, 20)).save(folder / "masks" / "a.png")


def broken(folder: Path) -> None:
    (folder / "images" / "a.jpg").write_bytes(b"no photograph")


def binary(folder: Path) -> None:
    for name in ("a", "b", "sub/c"):
        mask = np.zeros((20, 30), np.uint8)
        mask[3:5] = 255
        Image.fromarray(mask).save(folder / "masks" / f"{name}.png")


def no_masks(folder: Path) -> None:
    shutil.rmtree(folder / "masks")
    (folder / "masks").mkdir()


def no_photographs(folder: Path) -> None:
    shutil.rmtree(folder / "images")


@pytest.mark.parametrize(
    ("damage", "said", "hint"),
    [
        (without_photograph, r"masks: 1 of 3 masks have no photograph in .*images: a\.png", "--list chooses"),
        (without_mask, r"1 of 3 photographs of .*images have no mask in .*masks: a\.jpg", "add their masks, or choose"),
        (of_another_size, r"a\.jpg: the photograph is 30 x 20 pixels, its mask .*masks/a\.png 30 x 21", "size of their"),
        (beyond_the_list, r"a\.jpg: its mask .*masks/a\.png has label 3, the class list ends at 2", "labels of --classes"),
        (colors, r"a\.jpg: .*masks/a\.png: expected labels as indices .*, got mode RGB", "labels of --classes"),
        (broken, r"1 of 3 images cannot be trained on:\n  a\.jpg: the photograph: not a readable image", "masks need"),
        (binary, r"its 3 masks have only 0 and 255: 255 is void", "write the number of the class"),
        (no_masks, r"masks: no label map in it", "PNG"),
        (no_photographs, r"--images .*images: expected the folder of the photographs, found nothing", ""),
    ],
)
def test_what_cannot_be_trained_on_is_named(folder: Path, damage: Callable[[Path], None], said: str, hint: str) -> None:
    damage(folder)
    with pytest.raises(WsssError, match=said) as caught:
        survey_masks(folder / "masks", folder / "images", CLASSES)
    assert hint in (caught.value.hint or "")


def test_a_list_that_does_not_fit(folder: Path) -> None:
    (folder / "list.txt").write_text("a\nd\n")
    with pytest.raises(WsssError, match=r"--val-list .*: .*masks has no label map of 1 of 2 names, for example d"):
        survey_masks(folder / "masks", folder / "images", CLASSES, listed=folder / "list.txt", flags=("--val", "--val-list"))


def test_two_masks_of_one_photograph(folder: Path) -> None:
    shutil.copy(folder / "masks" / "a.png", folder / "masks" / "a.jpg.png")
    with pytest.raises(StoreError, match=r"images/a\.jpg: has two masks, .*a\.png and .*a\.jpg\.png"):
        survey_masks(folder / "masks", folder / "images", CLASSES)


def test_a_store_and_masks_are_told_apart(folder: Path, scenes: Scenes) -> None:
    def survey(store: Path, **given: object) -> object:
        settings = {"classes": None, "listed": None, "exclude": None, "log": print, **given}
        return survey_of(store, folder / "images", **settings)  # type: ignore[arg-type]

    with pytest.raises(UsageError, match="or --classes for a folder of masks") as caught:
        survey(folder / "masks")
    assert "--classes voc" in caught.value.hint
    with pytest.raises(StoreError, match="expected a label store, or a folder of masks, found nothing"):
        survey(folder / "nowhere")
    with pytest.raises(WsssError, match=r"a label store of the classes red disc, .* not dog, cat"):
        survey(scenes[0], classes=CLASSES)
    with pytest.raises(UsageError, match="--list chooses masks of a folder"):
        survey(scenes[0], listed=folder / "list.txt")
    with pytest.raises(UsageError, match=r"loss\.confidence = pixel: .* is a folder of masks, which have no confidence"):
        survey(folder / "masks", classes=CLASSES, confidence=True)
