"""The layouts of VOC 2012 and COCO 2014 on disk: the images of each list and their true label maps.

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
"""Number of missing files named in a message."""
VOC_LISTS = {"train": ("train.txt",), "trainaug": ("trainaug.txt", "train_aug.txt"), "val": ("val.txt",)}
"""File names in use for each list; trainaug (10,582 images with those of SBD) is not part of the devkit."""
PROTOCOL = {
    "voc": {"train": 1464, "trainaug": 10582, "val": 1449},
    "coco": {"train": 82081, "val": 40137},
}
"""Number of images in the lists that papers use (COCO's without images that have no object)."""
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
    """The splits of a data set."""

    name: str
    """``voc``, ``coco``, or another name for data in one of these layouts."""
    scored: tuple[Split, ...]
    """The splits whose pseudo-labels are scored; the last one holds all images to label and train on."""
    val: Split

    @property
    def training(self) -> Split:
        return self.scored[-1]

    def deviation(self) -> str:
        """How the lists differ in length from the usual ones, where scores cannot be compared with published ones; else empty."""
        usual = PROTOCOL.get(self.name, {})
        lengths = ((split.name, len(split.images), usual.get(split.name)) for split in (*self.scored, self.val))
        return ", ".join(
            f"{name} has {count:,} images, usually {expected:,}"
            for name, count, expected in lengths
            if expected not in (None, count)
        )

    def digest(self) -> str:
        """A hash of the names in all lists."""
        digest = hashlib.sha256()
        for split in (*self.scored, self.val):
            digest.update("\n".join([split.name, *split.images, ""]).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def voc(data: Path, *, trainaug: bool = True) -> DataSet:
    """VOC 2012 in its devkit's layout.

    Args:
        data: the folder with JPEGImages, ``VOCdevkit/VOC2012``.
        trainaug: label and train on trainaug; False: on train alone (1,464 images).

    Raises:
        WsssError: a folder, list, photograph or label map is missing; the message names it and its source.
    """
    images = data / "JPEGImages"
    if not images.is_dir():
        inside = next((folder for folder in (data / "VOC2012", data / "VOCdevkit" / "VOC2012") if folder.is_dir()), None)
        raise WsssError(
            f"--data {data}: expected VOC 2012 with JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/",
            hint=f"--data {inside}" if inside else "VOCtrainval_11-May-2012.tar unpacks to VOCdevkit/VOC2012",
        )
    split_names = ("train", "trainaug", "val") if trainaug else ("train", "val")
    known = _photographs(images)
    splits = {name: _split(name, _voc_list(data, name), known, data / VOC_TRUTH[name], images) for name in split_names}
    missing = [name for name in splits["train"].images if trainaug and name not in splits["trainaug"].images]
    if missing:
        raise WsssError(
            f"{splits['trainaug'].list}: lacks {len(missing)} images of {splits['train'].list.name}, for example {missing[0]}",
            hint="trainaug contains all images of train",
        )
    return DataSet(name="voc", scored=tuple(splits[name] for name in split_names[:-1]), val=splits["val"])


def coco(data: Path, *, train_list: Path, val_list: Path, truth: Path | None = None) -> DataSet:
    """COCO 2014 with one label map for each image.

    Args:
        data: the folder with train2014 and val2014.
        truth: the folder of the label maps, with the same two folders; None takes ``data/SegmentationClass``.
        train_list, val_list: the usual 82,081 and 40,137 names, one a line.

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
    """Create or update a folder with exactly the photographs of a split, as links.

    Raises:
        WsssError: it cannot be written, or holds something other than links.
    """
    targets = {path.name: path.resolve() for path in split.images.values()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for entry in list(os.scandir(folder)):
            if not entry.is_symlink():
                raise WsssError(f"{entry.path}: expected links to photographs only", hint="give another --out")
            if targets.get(entry.name) != Path(entry.path).resolve():
                os.unlink(entry.path)
            else:
                targets.pop(entry.name)
        for name, path in targets.items():
            (folder / name).symlink_to(path)
    except OSError as error:
        raise WsssError(f"{folder}: cannot be written: {error.strerror}", hint="give another --out") from None
    return folder


def _voc_list(data: Path, name: str) -> Path:
    lists = data / "ImageSets" / "Segmentation"
    found = next((lists / file for file in VOC_LISTS[name] if (lists / file).is_file()), None)
    if found is None:
        hint = "it is part of VOCtrainval_11-May-2012.tar"
        if name == "trainaug":
            hint = (
                "the list of 10,582 names and SegmentationClassAug/ come from SBD (Hariharan et al., ICCV 2011); most WSSS "
                "repositories link to them. --train-on train does not need them"
            )
        raise WsssError(f"--data {data}: has no list {lists / VOC_LISTS[name][0]}", hint=hint)
    return found


def _photographs(folder: Path) -> dict[str, Path]:
    with os.scandir(folder) as entries:
        return {os.path.splitext(file.name)[0]: Path(file.path) for file in entries if Path(file.name).suffix.lower() in SUFFIXES}


def _split(name: str, list_file: Path, known: Mapping[str, Path], truth: Path, folder: Path) -> Split:
    if not truth.is_dir():
        raise WsssError(
            f"{truth}: the true label maps of {name} are missing",
            hint="SegmentationClassAug/ has one PNG for each image of trainaug"
            if truth.name == "SegmentationClassAug"
            else "one PNG for each image with label values as pixels: 0 background, then the classes in order, 255 void",
        )
    images: dict[str, Path] = {}
    missing: list[str] = []
    for number, line in list_lines(list_file, f"list of {name}"):
        found = next((stem for stem in possible_names(line) if stem in known), None)
        if found is None:
            missing.append(line[:100])
        elif found in images:
            raise WsssError(f"{list_file}: {found} is listed twice, again in line {number}", hint="remove one of them")
        else:
            images[found] = known[found]
    _refuse_missing(missing, list_file, folder, "photograph")
    _refuse_missing([stem for stem in images if not (truth / f"{stem}.png").is_file()], list_file, truth, "label map")
    return Split(name=name, list=list_file, images=images, truth=truth)


def _refuse_missing(missing: list[str], list_file: Path, folder: Path, kind: str) -> None:
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise WsssError(
            f"{folder}: has no {kind} of {', '.join(missing[:SHOWN])}{more}, which {list_file} names",
            hint="give the list that belongs to this folder",
        )
