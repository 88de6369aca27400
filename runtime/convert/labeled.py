"""Reads the labeled images of a label store one by one for the converters, and names their files in a data set.

Names: a photograph is identified by its path below the folder that was labeled. In a data set it keeps that path without its
ending. Characters that list files, shells or flat folders cannot handle are percent-encoded (RFC 3986, as `urllib.parse.quote`
does), so that ``a/my dog.jpg`` becomes ``a%2Fmy%20dog`` where a format is flat. If two photographs differ only in their ending,
the ending stays, after an encoded dot: ``dog%2Ejpg`` and ``dog%2Epng``; if they differ in case or Unicode form, capitals and
non-ASCII characters are encoded too: ``%44og%2Ejpg``. `original_path` decodes a name.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from ...batch import VOID
from ...errors import ImageError, StoreError
from ...rle import MaskRuns
from ...store.decisions import Exclusion
from ...store.format import ascii_safe as ascii_safe
from ...store.format import is_below, photograph_of
from ...store.local import Record, label_path, read_label_and_masks, read_labeled_records, read_records, read_run

NAMED = 10
"""Most files that one message names."""
FIELDS = ("bytes", "sha256", "height", "width", "boxes")
"""The fields of a manifest line that a conversion needs."""
_BAND = 1 << 22
"""Pixels counted at a time: numpy's bincount needs 8 bytes for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A detection of the store.

    number: its place in the image's boxes, from 0. xyxy_image: pixels of the photograph. score: the detector's. quality: the
    mask's predicted IoU, both in 0..1. label: 1..C. won_px: pixels of the label map that come from this box's mask.
    """

    number: int
    label: int
    score: float
    quality: float
    xyxy_image: tuple[float, float, float, float]
    won_px: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Labeled:
    """One labeled image.

    label_map: (H, W) uint8, 0 background, 1..C classes, 255 void; EXIF rotation applied.
    count: (256,) int64, pixels of each label.
    """

    path: str
    """Below the folder that was labeled, with forward slashes."""
    label: str
    """The label's path below ``labels/``."""
    file: Path
    size_bytes: int
    sha256: str
    label_map: np.ndarray
    count: np.ndarray
    boxes: tuple[Box, ...]
    masks: tuple[str, ...] | None
    """For each box, the compressed counts of SAM's mask, not checked yet; None if the store has none."""
    split: str
    """``train`` or ``val``."""

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.label_map.shape[0], self.label_map.shape[1]

    def mask(self, box: Box) -> MaskRuns:
        """SAM's mask of a box. Raises StoreError if it is damaged."""
        assert self.masks is not None
        try:
            return MaskRuns.from_counts(self.masks[box.number], self.shape)
        except ValueError as error:
            raise StoreError(
                f"labels/{ascii_safe(self.label)}: the mask of box {box.number} is damaged: {error}",
                hint="delete the file and run wsss label again: it is created again",
            ) from None

    def is_object(self, box: Box) -> bool:
        """Whether the label map has a pixel of this box: one of its class in its mask, or one that it won. Raises as ``mask``."""
        if self.masks is None:
            return box.won_px > 0
        mask = self.mask(box)
        if box.won_px or not mask.area():
            return mask.area() > 0
        top, left, bottom, right = mask.bounds()
        return bool((mask.crop() & (self.label_map[top:bottom, left:right] == box.label)).any())

    def name(self, *, flat: bool) -> str:
        """The image's name in a data set, without its ending; see the module's docstring.

        Args:
            flat: without folders, and only letters, digits, ``-``, ``_``, ``.`` and ``%``. Otherwise folders stay, and only
                characters that are not printable or not safe in a list file are encoded.
        """
        stem, ending = os.path.splitext(self.path)
        # The store's label names are unique on any file system: they show which photographs have similar names.
        alone, similar = self.label == f"{stem}.png", self.label not in (f"{stem}.png", f"{self.path}.png")
        name = stem if alone else f"{stem}\0{ending[1:]}"  # a zero byte, which no file name has, marks the dot before the ending
        keeps = _kept_flat if flat else _kept
        name = "".join(char if keeps(char) and not (similar and _is_ambiguous(char)) else _percent(char) for char in name)
        if not flat:
            name = re.sub("^#", "%23", name)  # starts a comment in VOC's lists
            name = re.sub("^ +| +$", lambda found: "%20" * len(found[0]), name)
        return name.replace("%00", "%2E")

    @property
    def ending(self) -> str:
        """The file's ending, with its dot and in its original case."""
        return os.path.splitext(self.path)[1]


def original_path(file_name: str) -> str:
    """Decode a file's name in a data set to the photograph's original path: ``a%2Fmy%20dog.jpg`` is ``a/my dog.jpg``."""
    stem, ending = os.path.splitext(file_name)
    _, dot, kept = stem.rpartition("%2E")
    return unquote(stem, errors="surrogateescape") + ("" if dot and unquote(kept) == ending[1:] else ending)


def read_labelled(store: Path, images: Path, *, val: float = 0.0, exclude: Exclusion | None = None) -> Iterator[Labeled]:
    """Yield the labeled images of a store in the order of its manifest; only one is in memory at a time.

    Args:
        images: the folder or the single image that was labeled.
        val: share of the images that goes into the split ``val``, chosen by a hash of the name, so that an image stays in its
            split when others are added or removed.
        exclude: images that are left out.

    Raises:
        StoreError: a label map is missing, damaged, of another size, or has a label that is not a class.
    """
    classes: list[str] = read_run(store)["classes"]
    known = np.zeros(256, bool)
    known[: len(classes) + 1] = known[VOID] = True
    for record in read_labeled_records(store, FIELDS):
        if exclude is not None and exclude.excludes(record):
            continue
        label = label_path(store, record["label"])
        shape = record["height"], record["width"]
        label_map, masks = read_label_and_masks(label, shape=shape, boxes=len(record["boxes"]))
        count = count_labels(label_map)
        if (unknown := np.flatnonzero((count > 0) & ~known)).size:
            raise StoreError(
                f"{label}: has the label {unknown[0]}, but the store has {len(classes)} classes",
                hint="delete it and run wsss label again",
            )
        yield Labeled(
            path=record["path"],
            label=record["label"],
            file=photograph_of(images, record["path"]),
            size_bytes=record["bytes"],
            sha256=record["sha256"],
            label_map=label_map,
            count=count,
            boxes=tuple(_box(number, box, classes) for number, box in enumerate(record["boxes"])),
            masks=None if masks is None else tuple(masks),
            split="val" if _share_of(record["path"]) < val else "train",
        )


def check_images(store: Path, images: Path, exclude: Exclusion | None = None) -> tuple[int, int]:
    """Check that every labeled image, apart from those that ``exclude`` leaves out, still exists with the same size.

    Returns:
        The number of images that have a label, and of those that failed and have none.

    Raises:
        ImageError: images are missing or have changed; names them.
        StoreError: no image is labeled, or the manifest has a path outside of the store's folders.
    """
    total = failed = 0
    missing: list[str] = []
    changed: list[str] = []
    for record in read_records(store):
        if exclude is not None and not exclude.keeps(record):
            continue
        if "error" in record:
            failed += 1
            continue
        total += 1
        label_path(store, record["label"])
        if not is_below(record["path"]):  # the data set's files are named after it
            raise StoreError(
                f"{store / 'manifest.jsonl'}: {ascii_safe(record['path'])} leads out of the folder",
                hint="a store made from a list of paths cannot be converted: label the folder that contains them",
            )
        try:
            status = photograph_of(images, record["path"]).stat()
        except OSError:
            missing.append(record["path"])
        else:
            size = status.st_size if stat.S_ISREG(status.st_mode) else -1  # reading a pipe would never end
            if size != record.get("bytes", size):
                changed.append(record["path"])
    if total == 0:
        raise StoreError(f"{store}: no labeled image in it", hint="run wsss label first")
    if missing:
        raise ImageError(
            f"--images {images}: {len(missing)} of the {total} labeled images are missing: {_listed(missing)}",
            hint="give the folder that was labeled",
        )
    if changed:
        raise ImageError(
            f"--images {images}: {len(changed)} of the {total} images changed since they were labeled: {_listed(changed)}",
            hint="run the same wsss label command again: it labels the changed images",
        )
    return total, failed


def place_image(item: Labeled, target: Path, *, link: bool) -> None:
    """Copy a photograph unchanged, or make a hard link to it, and check that it is the one that was labeled.

    Raises:
        ImageError: its content has changed. OSError: it cannot be read, written or linked.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        os.link(item.file.resolve(), target)  # resolved, because Linux would link to a symbolic link itself
        with target.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    else:
        digest = hashlib.sha256()
        with item.file.open("rb") as source, target.open("xb") as copy:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                copy.write(chunk)
    if digest.hexdigest() != item.sha256:
        raise ImageError(
            f"{item.file}: changed since it was labeled",
            hint="run the same wsss label command again: it labels the changed images",
        )


def count_labels(label_map: np.ndarray) -> np.ndarray:
    """(256,) int64: pixels of each label in a label map (H, W) uint8."""
    flat = label_map.reshape(-1)
    count = np.zeros(256, np.int64)
    for start in range(0, flat.size, _BAND):
        count += np.bincount(flat[start : start + _BAND], minlength=256)
    return count


def void_name(classes: tuple[str, ...]) -> str:
    """The name of void in a format that needs one: ``void``, or ``void_`` where a class has that name."""
    name = "void"
    while name in {class_name.casefold() for class_name in classes}:
        name += "_"
    return name


def _box(number: int, box: Record, classes: list[str]) -> Box:
    x0, y0, x1, y1 = box["xyxy"]
    return Box(
        number=number,
        label=classes.index(box["label"]) + 1,
        score=box["score"],
        quality=box["quality"],
        xyxy_image=(x0, y0, x1, y1),
        won_px=box["won_px"],
    )


def _share_of(path: str) -> float:
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _kept_flat(char: str) -> bool:
    return char.isalnum() or char in "-_."


def _kept(char: str) -> bool:
    return char.isprintable() and char not in '%"\\'


def _is_ambiguous(char: str) -> bool:
    """Whether a file system may treat another character as the same: the other case, or another Unicode form."""
    return char.isupper() or not char.isascii()


def _percent(char: str) -> str:
    return "".join(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogateescape"))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(ascii_safe, names[:NAMED])) + more
