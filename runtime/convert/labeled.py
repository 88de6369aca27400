"""The finished images of a label store, one by one, as the converters take them, and the names they get elsewhere.

Names. A photograph is told apart by its path below the folder that was labeled. In a data set it keeps that path without
its ending; what a list file, a shell or a flat folder could trip over is percent-encoded (RFC 3986, as
`urllib.parse.quote` does), so that ``a/my dog.jpg`` becomes ``a%2Fmy%20dog`` where a format is flat. Where two photographs
differ in their ending alone the ending stays, behind an encoded dot: ``dog%2Ejpg`` and ``dog%2Epng``; where they differ in
case or Unicode form, capitals and what is not ASCII are encoded too: ``%44og%2Ejpg``. `original_path` takes a name back.
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
from ...store.format import ascii_safe as ascii_safe
from ...store.format import is_below, photograph_of
from ...store.local import Record, label_path, read_label, read_labeled_records, read_records, read_run

NAMED = 10
"""At most this many files are named in one message."""
FIELDS = ("bytes", "sha256", "height", "width", "boxes")
"""Of a line, what a conversion needs."""
_BAND = 1 << 22
"""Pixels counted at a time: numpy's bincount makes 8 bytes of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A detection as the store recorded it.

    xyxy_image: pixels of the photograph. score: the detector's. quality: the mask's predicted IoU, both in 0..1.
    label: 1..C. won_px: pixels of the label map that the box's mask gave their class.
    """

    label: int
    score: float
    quality: float
    xyxy_image: tuple[float, float, float, float]
    won_px: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Labeled:
    """One finished image.

    label_map: (H, W) uint8, 0 background, 1..C classes, 255 void; EXIF rotation applied.
    count: (256,) int64, pixels of each label.
    """

    path: str
    """Below the folder that was labeled, with forward slashes."""
    label: str
    """Its label's path below ``labels/``."""
    file: Path
    size_bytes: int
    sha256: str
    label_map: np.ndarray
    count: np.ndarray
    boxes: tuple[Box, ...]
    split: str
    """``train`` or ``val``."""

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.label_map.shape[0], self.label_map.shape[1]

    def name(self, *, flat: bool) -> str:
        """The image's name in a data set, without its ending; see the top of this module.

        Args:
            flat: no folders, and nothing but letters, digits, ``-``, ``_``, ``.`` and ``%``. Otherwise folders stay, and
                only what prints nothing or breaks a line of a list is encoded.
        """
        stem, ending = os.path.splitext(self.path)
        # The store chose each label's name so that no two meet, on any file system: it knows who is alike.
        alone, alike = self.label == f"{stem}.png", self.label not in (f"{stem}.png", f"{self.path}.png")
        name = stem if alone else f"{stem}\0{ending[1:]}"  # no file name has a zero byte: it stands for the kept dot
        keeps = _kept_flat if flat else _kept
        name = "".join(sign if keeps(sign) and not (alike and _differs(sign)) else _percent(sign) for sign in name)
        if not flat:
            name = re.sub("^#", "%23", name)  # a comment in VOC's lists
            name = re.sub("^ +| +$", lambda found: "%20" * len(found[0]), name)
        return name.replace("%00", "%2E")

    @property
    def ending(self) -> str:
        """The file's ending as it is written, with its dot."""
        return os.path.splitext(self.path)[1]


def original_path(file_name: str) -> str:
    """The path that a photograph had, from its file's name in a data set: ``a%2Fmy%20dog.jpg`` was ``a/my dog.jpg``."""
    stem, ending = os.path.splitext(file_name)
    _, dot, kept = stem.rpartition("%2E")
    return unquote(stem, errors="surrogateescape") + ("" if dot and unquote(kept) == ending[1:] else ending)


def read_labelled(store: Path, images: Path, *, val: float = 0.0) -> Iterator[Labeled]:
    """The finished images of a store, in the order of its manifest; one is held at a time.

    Args:
        images: the folder that was labeled, or the one image.
        val: share of the images that goes into the split ``val``: those whose name's hash falls below it, so that an
            image stays in its split when others come and go.

    Raises:
        StoreError: a label map that is missing, damaged, of another size, or that holds a label of no class.
    """
    classes: list[str] = read_run(store)["classes"]
    known = np.zeros(256, bool)
    known[: len(classes) + 1] = known[VOID] = True
    for record in read_labeled_records(store, FIELDS):
        label = label_path(store, record["label"])
        label_map = read_label(label, shape=(record["height"], record["width"]))
        count = count_labels(label_map)
        if (strange := np.flatnonzero((count > 0) & ~known)).size:
            raise StoreError(
                f"{label}: holds the label {strange[0]}, the store has {len(classes)} classes",
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
            boxes=tuple(_box(box, classes) for box in record["boxes"]),
            split="val" if _share_of(record["path"]) < val else "train",
        )


def check_images(store: Path, images: Path) -> tuple[int, int]:
    """Whether every finished image is still there with the size it had.

    Returns:
        Images that have a label, and images that failed and have none.

    Raises:
        ImageError: some are missing or changed; names them.
        StoreError: nothing is finished, or the manifest leads out of the store's folders.
    """
    total = failed = 0
    gone: list[str] = []
    changed: list[str] = []
    for record in read_records(store):
        if "error" in record:
            failed += 1
            continue
        total += 1
        label_path(store, record["label"])
        if not is_below(record["path"]):  # the data set's files are called after it
            raise StoreError(
                f"{store / 'manifest.jsonl'}: {ascii_safe(record['path'])} leads out of the folder",
                hint="a store made from a list of paths cannot be converted: label the folder that they are in",
            )
        try:
            status = photograph_of(images, record["path"]).stat()
        except OSError:
            gone.append(record["path"])
        else:
            size = status.st_size if stat.S_ISREG(status.st_mode) else -1  # a pipe would never end
            if size != record.get("bytes", size):
                changed.append(record["path"])
    if total == 0:
        raise StoreError(f"{store}: no labeled image in it", hint="run wsss label first")
    if gone:
        raise ImageError(
            f"--images {images}: has {len(gone)} of the {total} labeled images no more: {_listed(gone)}",
            hint="give the folder that was labeled",
        )
    if changed:
        raise ImageError(
            f"--images {images}: {len(changed)} of the {total} images changed since they were labeled: {_listed(changed)}",
            hint="run the same wsss label again: it does the changed ones",
        )
    return total, failed


def place_image(item: Labeled, target: Path, *, link: bool) -> None:
    """Copies a photograph as it is, or makes a hard link to it, and checks that it is the one that was labeled.

    Raises:
        ImageError: its content changed since. OSError: it cannot be read, written or linked.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        os.link(item.file.resolve(), target)  # resolved: Linux would link to a symbolic link itself
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
            f"{item.file}: changed since it was labeled", hint="run the same wsss label again: it does the changed ones"
        )


def count_labels(label_map: np.ndarray) -> np.ndarray:
    """(256,) int64: pixels of each label in a label map (H, W) uint8."""
    flat = label_map.reshape(-1)
    count = np.zeros(256, np.int64)
    for start in range(0, flat.size, _BAND):
        count += np.bincount(flat[start : start + _BAND], minlength=256)
    return count


def void_name(classes: tuple[str, ...]) -> str:
    """What void is called where a format wants a name: ``void``, or ``void_`` where a class has that name."""
    name = "void"
    while name in {each.casefold() for each in classes}:
        name += "_"
    return name


def _box(box: Record, classes: list[str]) -> Box:
    x0, y0, x1, y1 = box["xyxy"]
    return Box(
        label=classes.index(box["label"]) + 1,
        score=box["score"],
        quality=box["quality"],
        xyxy_image=(x0, y0, x1, y1),
        won_px=box["won_px"],
    )


def _share_of(path: str) -> float:
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _kept_flat(sign: str) -> bool:
    return sign.isalnum() or sign in "-_."


def _kept(sign: str) -> bool:
    return sign.isprintable() and sign not in '%"\\'


def _differs(sign: str) -> bool:
    """Whether file systems may take another sign for the same: of the other case, or of another Unicode form."""
    return sign.isupper() or not sign.isascii()


def _percent(sign: str) -> str:
    return "".join(f"%{byte:02X}" for byte in sign.encode("utf-8", "surrogateescape"))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(ascii_safe, names[:NAMED])) + more
