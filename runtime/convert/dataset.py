"""Converts a label store to a data set of another tool: VOC, COCO, YOLO, CVAT, Label Studio, Hugging Face.

Each format has a writer in its own module, which documents the format's files. Images are converted one by one, so that memory
does not grow with their number. The data set is built in a temporary folder beside ``out`` and renamed when it is complete
(`publishing`; its files are not flushed to disk one by one, so that a power cut may damage them). The same store gives the same
bytes.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from ...errors import StoreError, UsageError
from ...files import publishing
from ...photographs import FORMATS as FILE_FORMATS
from ...store.decisions import exclusion
from ...store.local import read_run
from .base import Loss, OpenWriter
from .coco import CocoWriter
from .hf import HuggingFaceWriter
from .label_studio import LabelStudioWriter
from .labeled import Labeled, ascii_safe, check_images, place_image, read_labelled
from .voc import CvatWriter, VocWriter
from .yolo import YoloWriter

FORMATS = ("voc", "coco", "yolo", "cvat", "label-studio", "hf")
WITH_SPLITS = ("voc", "coco", "yolo", "hf")
WITH_OBJECTS = ("coco", "yolo", "cvat", "label-studio")
"""Formats whose objects are cut out of the label map where a store has no masks."""
_ORIENTATION = 0x0112
"""EXIF tag: 1 is upright, 2 to 8 are rotated or mirrored."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Result of a conversion."""

    images: int
    left_out: int
    """Images that failed and have no label."""
    losses: tuple[str, ...]
    """Counts of what the format cannot represent, and of what its readers may not handle."""


def writer_of(to: str, *, simplify_px: float = 0.0) -> OpenWriter:
    """The writer of a format of `FORMATS`. Raises UsageError for arguments of `convert` that it has no use for."""
    writers: dict[str, OpenWriter] = {
        "voc": VocWriter,
        "coco": CocoWriter,
        "yolo": partial(YoloWriter, simplify_px=simplify_px),
        "cvat": CvatWriter,
        "label-studio": LabelStudioWriter,
        "hf": HuggingFaceWriter,
    }
    if to not in writers:
        raise UsageError(f"--to: expected one of {', '.join(FORMATS)}, got {to!r}")
    if not 0 <= simplify_px < math.inf:
        raise UsageError(f"--simplify: expected a number of pixels, 0 or more, got {simplify_px}")
    if simplify_px and to != "yolo":
        raise UsageError(f"--simplify: {to} has no polygons, its masks are exact", hint="--to yolo has")
    return writers[to]


def convert(
    store: Path,
    images: Path,
    out: Path,
    to: str,
    *,
    link: bool = False,
    val: float = 0.0,
    simplify_px: float = 0.0,
    exclude: str | Path | None = None,
    log: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write the labeled images of a label store as a data set.

    Args:
        images: the folder or the single image that was labeled. Its files are never changed.
        out: an empty folder, or a path that does not exist.
        to: one of `FORMATS`.
        link: make hard links instead of copies of the photographs; needs the same file system.
        val: share of the images that goes into the split ``val`` (see `read_labelled`).
        simplify_px: most pixels by which the outlines of polygons may be off, for fewer corners.
        exclude: decisions or a list (`wsss.store.decisions`) whose rejected images are left out. log: called with what was.
        progress: called with the number of images done, and of all images.

    Raises:
        StoreError: there is no store, it is empty, a label is damaged, or ``out`` cannot be written.
        ImageError: photographs that are missing or changed since they were labeled. UsageError: an argument that does not fit.
    """
    if not 0 <= val < 1:
        raise UsageError(f"--val: expected a share in 0..1, below 1, got {val}")
    if val and to not in WITH_SPLITS:
        raise UsageError(f"--val: {to} has no splits", hint=f"formats with splits: {', '.join(WITH_SPLITS)}")
    open_writer = writer_of(to, simplify_px=simplify_px)
    classes = tuple(read_run(store)["classes"])
    rejected = exclusion(exclude)
    total, left_out = check_images(store, images, rejected)
    if rejected is not None:
        rejected.report(log)
    _check_empty(out)
    item: Labeled | None = None
    try:
        # Resolved, so that the data set goes to the target where ``out`` is a link to an empty folder.
        with publishing(out.resolve(), error=StoreError, sync=False) as building, ExitStack() as files:
            writer = open_writer(building, classes, ("train", "val") if val else ("train",), files)
            done = rotated = cut_out = 0
            for item in read_labelled(store, images, val=val, exclude=rejected):
                target = building / writer.add(item)
                place_image(item, target, link=link)
                rotated += is_rotated(target)
                cut_out += to in WITH_OBJECTS and bool(item.boxes) and item.masks is None
                done += 1
                if progress:
                    progress(done, total)
            losses = [
                *writer.finish(),
                Loss(cut_out, "images have no masks in the store: their objects are cut out of the label map"),
                Loss(rotated, "images have an EXIF rotation; their labels fit only readers that apply it"),
            ]
    except OSError as error:
        raise _write_error(out, item, error, link) from None
    return Conversion(images=done, left_out=left_out, losses=tuple(str(loss) for loss in losses if loss.count))


def is_rotated(path: Path) -> bool:
    """Whether EXIF rotates or mirrors a photograph, so that its label fits only readers that apply EXIF."""
    with Image.open(path, formats=FILE_FORMATS) as image:
        return image.getexif().get(_ORIENTATION, 1) in range(2, 9)


def _check_empty(out: Path) -> None:
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise StoreError(f"--out {out}: exists already", hint="give a new or empty folder")
    except OSError as error:
        raise StoreError(f"--out {out}: cannot be read: {error.strerror}") from None


def _write_error(out: Path, item: Labeled | None, error: OSError, link: bool) -> StoreError:
    where = f"--out {out}: {ascii_safe(item.path)}: " if item else f"--out {out}: "
    if error.errno == errno.EXDEV:
        return StoreError(f"{where}is on another file system, to which hard links are not possible", hint="leave out --link")
    if item and error.errno == errno.EEXIST:
        return StoreError(f"{where}another image of the store has the same name", hint="do names differ only in case?")
    if error.errno == errno.ENAMETOOLONG:
        return StoreError(f"{where}its name is too long for the format", hint="cvat, coco, label-studio and hf keep folders")
    return StoreError(f"{where}cannot be written: {error.strerror or error}", hint="nothing was written")
