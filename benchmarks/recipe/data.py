"""The field's data sets as they lie on a disk: which images each list names, and where their true label maps are.

VOC 2012 (the devkit's layout)                      COCO 2014
    JPEGImages/2007_000032.jpg                          train2014/COCO_train2014_000000000009.jpg, val2014/
    SegmentationClass/2007_000032.png                   SegmentationClass/train2014/COCO_train2014_000000000009.png,
    SegmentationClassAug/2007_000032.png                SegmentationClass/val2014/: one PNG an image, labels 0 to 80, 255
    ImageSets/Segmentation/{train,trainaug,val}.txt     lists: given by flag
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import WsssError
from ...photographs import SUFFIXES
from ...train.evaluate.files import list_lines, possible_names

SHOWN = 3
"""Of many missing files, so many are named."""
VOC_LISTS = {"train": ("train.txt",), "trainaug": ("trainaug.txt", "train_aug.txt"), "val": ("val.txt",)}
"""Names in use for each list; trainaug (10,582 images with SBD's) is no part of the devkit."""
PROTOCOL = {
    "voc": {"train": 1464, "trainaug": 10582, "val": 1449},
    "coco": {"train": 82081, "val": 40137},
}
"""Images in the field's lists (COCO's without those that have no object)."""
VOC_TRUTH = {"train": "SegmentationClass", "trainaug": "SegmentationClassAug", "val": "SegmentationClass"}


@dataclass(frozen=True, kw_only=True)
class Split:
    """The images of one list."""

    name: str
    list: Path
    images: Mapping[str, Path]
    """Photographs by name, in the order of the list."""
    truth: Path
    """Folder of the true label maps, by the same names."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What the recipe needs of a data set."""

    name: str
    """``voc``, ``coco``, or another in the layout of one of them."""
    scored: tuple[Split, ...]
    """The splits whose pseudo-labels are scored; the last one holds all images to be labeled and trained on."""
    val: Split

    @property
    def training(self) -> Split:
        return self.scored[-1]

    def deviation(self) -> str:
        """Where the lists differ in length from the field's: such scores stand beside no published ones. Empty where not."""
        usual = PROTOCOL.get(self.name, {})
        told = ((split.name, len(split.images), usual.get(split.name)) for split in (*self.scored, self.val))
        return ", ".join(
            f"{name} has {count:,} images, the field's {asked:,}" for name, count, asked in told if asked not in (None, count)
        )

    def digest(self) -> str:
        """Of the names in all lists."""
        told = hashlib.sha256()
        for split in (*self.scored, self.val):
            told.update("\n".join([split.name, *split.images, ""]).encode("utf-8", "surrogatepass"))
        return told.hexdigest()


def voc(data: Path, *, trainaug: bool = True) -> DataSet:
    """VOC 2012 in its devkit's layout.

    Args:
        data: the folder with JPEGImages, ``VOCdevkit/VOC2012``.
        trainaug: label and train on trainaug; without it on train alone (1,464 images).

    Raises:
        WsssError: a folder, list, photograph or label map is missing; says which, and where it comes from.
    """
    images = data / "JPEGImages"
    if not images.is_dir():
        inside = next((each for each in (data / "VOC2012", data / "VOCdevkit" / "VOC2012") if each.is_dir()), None)
        raise WsssError(
            f"--data {data}: expected VOC 2012 with JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/",
            hint=f"--data {inside}" if inside else "VOCtrainval_11-May-2012.tar unpacks to VOCdevkit/VOC2012",
        )
    wanted = ("train", "trainaug", "val") if trainaug else ("train", "val")
    known = _photographs(images)
    splits = {name: _split(name, _voc_list(data, name), known, data / VOC_TRUTH[name], images) for name in wanted}
    lost = [name for name in splits["train"].images if trainaug and name not in splits["trainaug"].images]
    if lost:
        raise WsssError(
            f"{splits['trainaug'].list}: lacks {len(lost)} images of {splits['train'].list.name}, for example {lost[0]}",
            hint="trainaug holds all of train",
        )
    return DataSet(name="voc", scored=tuple(splits[name] for name in wanted[:-1]), val=splits["val"])


def coco(data: Path, *, train_list: Path, val_list: Path, truth: Path | None = None) -> DataSet:
    """COCO 2014 with one label map an image.

    Args:
        data: the folder with train2014 and val2014. truth: that of the label maps, with the same two folders; default:
            ``data/SegmentationClass``. train_list, val_list: the field's 82,081 and 40,137 names, one a line.

    Raises:
        WsssError: as `voc`.
    """
    truth = truth or data / "SegmentationClass"
    splits = {}
    for name, list_file in (("train", train_list), ("val", val_list)):
        images = data / f"{name}2014"
        if not images.is_dir():
            raise WsssError(
                f"--data {data}: expected COCO 2014 with train2014/ and val2014/, {images.name} is missing",
                hint="train2014.zip and val2014.zip unpack to these folders",
            )
        splits[name] = _split(name, list_file, _photographs(images), truth / images.name, images)
    return DataSet(name="coco", scored=(splits["train"],), val=splits["val"])


def link_photographs(split: Split, folder: Path) -> Path:
    """A folder that holds exactly the photographs of a split, as links; made anew or brought up to date.

    Raises:
        WsssError: it cannot be written, or holds something that is no link of ours.
    """
    wanted = {path.name: path.resolve() for path in split.images.values()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for entry in list(os.scandir(folder)):
            if not entry.is_symlink():
                raise WsssError(f"{entry.path}: expected links to photographs only", hint="give another --out")
            if wanted.get(entry.name) != Path(entry.path).resolve():
                os.unlink(entry.path)
            else:
                wanted.pop(entry.name)
        for name, path in wanted.items():
            (folder / name).symlink_to(path)
    except OSError as error:
        raise WsssError(f"{folder}: cannot be written: {error.strerror}", hint="give another --out") from None
    return folder


def _voc_list(data: Path, name: str) -> Path:
    lists = data / "ImageSets" / "Segmentation"
    found = next((lists / each for each in VOC_LISTS[name] if (lists / each).is_file()), None)
    if found is None:
        hint = "it is part of VOCtrainval_11-May-2012.tar"
        if name == "trainaug":
            hint = (
                "the list of 10,582 names and SegmentationClassAug/ come from SBD (Hariharan et al., ICCV 2011) and go with most "
                "repositories of the field; --train-on train does without them"
            )
        raise WsssError(f"--data {data}: has no list {lists / VOC_LISTS[name][0]}", hint=hint)
    return found


def _photographs(folder: Path) -> dict[str, Path]:
    with os.scandir(folder) as entries:
        return {os.path.splitext(each.name)[0]: Path(each.path) for each in entries if Path(each.name).suffix.lower() in SUFFIXES}


def _split(name: str, list_file: Path, known: Mapping[str, Path], truth: Path, folder: Path) -> Split:
    if not truth.is_dir():
        raise WsssError(
            f"{truth}: the true label maps of {name} are missing",
            hint="SegmentationClassAug/ holds one PNG for each image of trainaug"
            if truth.name == "SegmentationClassAug"
            else "one PNG an image, its pixels the labels: 0 background, then the classes in order, 255 void",
        )
    images: dict[str, Path] = {}
    lost: list[str] = []
    for number, line in list_lines(list_file, f"list of {name}"):
        found = next((each for each in possible_names(line) if each in known), None)
        if found is None:
            lost.append(line[:100])
        elif found in images:
            raise WsssError(f"{list_file}: {found} stands there twice, again in line {number}", hint="remove one of them")
        else:
            images[found] = known[found]
    _check_all(lost, images, list_file, folder, "photograph")
    _check_all([each for each in images if not (truth / f"{each}.png").is_file()], images, list_file, truth, "label map")
    return Split(name=name, list=list_file, images=images, truth=truth)


def _check_all(lost: list[str], found: Mapping[str, Path], list_file: Path, folder: Path, what: str) -> None:
    if lost:
        more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
        raise WsssError(
            f"{folder}: has no {what} of {', '.join(lost[:SHOWN])}{more}, which {list_file} names",
            hint="give the list that belongs to this folder",
        )
