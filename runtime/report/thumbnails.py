"""Makes thumbnails for the report: a photograph and its label as two files, so that the page can blend them.

A file's name is a hash of its source (the photograph's hash, or the label's path, size and time), so that a thumbnail that exists
is current and is not made again.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ...classes import palette
from ...cores import cores
from ...errors import ImageError, StoreError
from ...files import write_atomically
from ...photographs import decode, read_file
from ...pixels.pictures import picture_of
from ...store.format import photograph_of
from ...store.local import Record, label_path, read_label

FORMAT = 1
"""Version of the thumbnails; increased when they look different, so that old ones are made again."""
_COLORS = palette()
_OURS = re.compile(r"[0-9a-f]{20}\.(jpg|png)|\.[^/]*\.tmp")

Progress = Callable[[int, int], None]
"""Called with the number of images done, and of all images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thumbnails:
    """The two thumbnails of an image: files below the thumbnail folder, with forward slashes; empty if missing."""

    photo: str
    label: str
    note: str
    """Why a thumbnail is missing; empty when both exist."""


def make_thumbnails(
    store: Path, images: Path, records: Sequence[Record], folder: Path, longest_px: int, progress: Progress | None = None
) -> list[Thumbnails]:
    """Make thumbnails of labeled images on all cores, in the images' order; those that ``folder`` already has are reused.

    A photograph or label that is missing, unreadable or changed gets a note instead.

    Args:
        store: the label store. images: the folder its images are in. records: manifest lines of labeled images.
        folder: where the thumbnails go; created if needed. longest_px: longest side; smaller pictures are not enlarged.

    Raises:
        StoreError: ``folder`` cannot be written.
    """
    try:
        have = {path for path, size in _files(folder) if size}  # a power cut may leave an empty file
        for shard in range(256):
            (folder / f"{shard:02x}").mkdir(parents=True, exist_ok=True)
        # Threads, not processes: Pillow releases the interpreter lock while it decodes, resizes and encodes.
        with ThreadPoolExecutor(cores()) as pool:
            waiting = [pool.submit(_make, store, images, record, folder, longest_px, have) for record in records]
            try:
                for done, future in enumerate(as_completed(waiting), 1):
                    future.result()
                    if progress:
                        progress(done, len(waiting))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    except OSError as error:
        raise StoreError(f"{folder}: cannot be written: {error.strerror}", hint="give --out a place you may write to") from None
    return [future.result() for future in waiting]


def remove_thumbnails(folder: Path, keep: Iterable[Thumbnails]) -> None:
    """Remove the thumbnails below ``folder`` that are not in ``keep``; files with other names stay."""
    kept = {name for thumbnails in keep for name in (thumbnails.photo, thumbnails.label)}
    for path, _ in _files(folder):
        if path not in kept and _OURS.fullmatch(path.partition("/")[2]):
            (folder / path).unlink(missing_ok=True)


def label_picture(label_map: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Draw a label map in the palette's colors, with a white line around every region and a transparent background.

    Args:
        label_map: (H, W) uint8. size: (width, height) of the picture, for which pixels of the map are sampled.

    Returns:
        Mode P, with the label values.
    """
    height, width = label_map.shape
    rows = ((np.arange(size[1]) + 0.5) * height / size[1]).astype(int)
    columns = ((np.arange(size[0]) + 0.5) * width / size[0]).astype(int)
    small = label_map[rows[:, None], columns]
    around = np.pad(small, 1, mode="edge")
    neighbors = (around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:])
    edge = (small != 0) & np.logical_or.reduce([small != neighbor for neighbor in neighbors])
    colors = _COLORS.copy()
    unused = np.flatnonzero(np.bincount(small.ravel(), minlength=256) == 0)
    if len(unused):  # otherwise, with 256 labels, no palette entry is left for the lines
        small = np.where(edge, unused[-1], small).astype(np.uint8)
        colors[unused[-1]] = 255
    picture = Image.fromarray(small, mode="P")
    picture.putpalette(colors.tobytes())
    picture.info["transparency"] = 0
    return picture


def _make(store: Path, images: Path, record: Record, folder: Path, longest_px: int, have: set[str]) -> Thumbnails:
    scale = min(1.0, longest_px / max(record["width"], record["height"]))
    size = max(1, round(record["width"] * scale)), max(1, round(record["height"] * scale))
    notes = []
    photo = _name(f"{longest_px} {record['sha256']}", "jpg")
    try:
        if photo not in have:
            _write(folder / photo, _photo(images, record, size), "JPEG", quality=82)
    except (ImageError, StoreError) as error:
        photo = ""
        notes.append(error.message)
    label = ""
    try:
        label_file = label_path(store, record["label"])
        stat = label_file.stat()
        label = _name(f"{longest_px} {record['label']} {stat.st_size} {stat.st_mtime_ns}", "png")
        if label not in have:
            label_map = read_label(label_file, shape=(record["height"], record["width"]))
            _write(folder / label, label_picture(label_map, size), "PNG")
    except StoreError as error:
        label = ""
        notes.append(error.message)
    except OSError as error:
        if label:
            raise
        notes.append(f"labels/{record['label']}: {error.strerror}")
    return Thumbnails(photo=photo, label=label, note="; ".join(notes))


def _photo(images: Path, record: Record, size: tuple[int, int]) -> Image.Image:
    file = read_file(photograph_of(images, record["path"]), record["path"])
    if file.sha256 != record["sha256"]:
        raise ImageError(f"{record['path']}: is not the file that was labeled")
    photo = decode(file, shorter_side_px=2 * min(size))
    return picture_of(photo.pixels).resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)


def _name(what: str, suffix: str) -> str:
    digest = hashlib.sha256(f"{FORMAT} {what}".encode("utf-8", "surrogatepass")).hexdigest()
    return f"{digest[:2]}/{digest[2:22]}.{suffix}"


def _write(path: Path, picture: Image.Image, form: str, **options: int) -> None:
    data = io.BytesIO()
    picture.save(data, format=form, **options)
    publish(path, data.getvalue())


def publish(path: Path, data: bytes) -> None:
    """Write a file atomically, but without flushing it to disk: what a power cut destroys is made again."""
    write_atomically(path, data, sync=False)


def _files(folder: Path) -> list[tuple[str, int]]:
    """The files in the sub-folders of ``folder`` as ``ab/name``, with their sizes."""
    if not folder.is_dir():
        return []
    return [
        (f"{shard.name}/{entry.name}", entry.stat().st_size)
        for shard in os.scandir(folder)
        if shard.is_dir()
        for entry in os.scandir(shard)
    ]
