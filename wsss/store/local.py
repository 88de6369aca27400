"""The label store in a local folder: a run writes it, a trainer reads it.

    labels/<image>.png     8-bit palette, original size: 0 background, 1..C classes, 255 void; and masks, see `mask_chunk`
    confidence/<image>.png 8-bit gray, 255 is certain; only with ``--confidence``, or where a segmenter made the labels
    manifest.jsonl         one line per finished or failed image; sorted by path
    manifest-I-of-N.jsonl  the same of shard I, until the last shard merges it into manifest.jsonl
    classes.json           names by label value
    run.json               every setting that decided the labels
    history.jsonl          one line per run: when, how many images, how many seconds

Everything but the history depends only on the images, the classes and the settings: a run that was killed and continued leaves
the same bytes as an uninterrupted one.

An image is published in two atomic steps: first its PNG (temporary file, fsync, rename), then its line. So a line always has
its PNG; a PNG without a line is labeled again. Lines are appended. If that breaks their order (a new image between old ones),
they are sorted when the run ends, or by the next run.
"""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..classes import ClassList
from ..errors import ImageError, StoreError
from ..files import replacing, sync_folder, write_atomically
from ..lock import lock
from ..photographs import MAX_PIXELS
from ..reading.documents import read_bytes
from .format import Record as Record
from .format import (
    Selection,
    W,
    cannot_write,
    check_complete,
    check_same,
    history_of,
    inside,
    json_of,
    line_of,
    names_by_value,
    parse_line,
    parse_run,
    run_of,
)
from .label_png import png_of
from .lines import Line, check_regular, current_lines, cut_torn_line, joined, merged, sections_of
from .mask_chunk import masks_in, with_masks

Shard = tuple[int, int]
"""(I, N): this run is number I, from 0, of N runs that share a store."""


@dataclass(frozen=True, slots=True)
class LabelFolder:
    """Writes label maps into a local store; several processes may hold one. ``temporary`` is on the same file system."""

    folder: Path
    temporary: Path

    def write(self, name: str, label_map: np.ndarray, masks: Sequence[str] | None = None) -> None:
        """Write a label map (H, W) uint8 atomically. Call `sync` to make its name survive a power cut.

        Args:
            masks: as in `wsss.store.format.LabelWriter`.

        Raises:
            ImageError: the file system does not allow the name, or the masks are too ragged. StoreError: it cannot be written.
        """
        self._write(self.folder / name, name, lambda file: file.write(label_file(name, label_map, masks)))

    def write_confidence(self, name: str, confidence: np.ndarray) -> None:
        """Write the confidence (H, W) uint8 of a label map, 255 is certain, as ``confidence/<name>`` beside ``labels/``.

        Raises:
            As ``write``.
        """
        picture = Image.fromarray(confidence)
        self._write(self.folder.parent / "confidence" / name, name, partial(picture.save, format="PNG"))

    def _write(self, path: Path, name: str, save: Callable[[BinaryIO], object]) -> None:
        try:
            inside(self.folder.parent, path.parent.relative_to(self.folder.parent).as_posix())
            make_folder(path.parent, within=self.folder.parent)  # a store that was moved away is not created again
            with replacing(path, temporary=self.temporary) as file:
                save(file)
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.EILSEQ):
                raise ImageError(f"{name}: a label cannot have this name: {error.strerror}") from None
            raise cannot_write(self.folder.parent, f"the label {name}", error) from None

    def sync(self, names: Iterable[str]) -> None:
        """Make the labels of these names survive a power cut. Raises OSError."""
        for parent in sorted({(self.folder / name).parent for name in names}):
            sync_folder(parent)


class LabelStore:
    """A label store open for writing, locked against other runs.

    Args:
        folder: created if missing; an existing store of the same settings is continued.
        classes: the run's class list.
        settings: everything that decides the labels; a store never mixes settings.
        shard: this run is one of several that write the store at the same time, each for its own images.

    Raises:
        StoreError: not writable, not a store, a store of other settings or classes, or in use by another run.
    """

    def __init__(self, folder: Path, classes: ClassList, settings: Mapping[str, Any], *, shard: Shard | None = None) -> None:
        self._start(folder, run_of(classes, settings), names_by_value(classes), shard)

    @classmethod
    def reopen(cls, folder: Path) -> LabelStore:
        """Open an existing store with the settings that it has. Raises StoreError as the constructor, or if there is none."""
        run = read_run(folder)
        store = cls.__new__(cls)
        store._start(folder, run, {}, None)
        return store

    def _start(self, folder: Path, run: dict[str, Any], names: Mapping[int, str], shard: Shard | None) -> None:
        part = "" if shard is None else f"-{shard[0]}-of-{shard[1]}"
        self.folder = folder
        self.labels = LabelFolder(folder / "labels", folder / f".tmp{part}")
        self._shard = shard
        self._manifest = folder / f"manifest{part}.jsonl"
        try:
            with ExitStack() as stack:
                self._open(run, names, part, stack)
                self._stack = stack.pop_all()
        except OSError as error:
            raise StoreError(
                f"--out {folder}: cannot be written: {error.strerror}", hint="give a folder you may write to"
            ) from None

    def _open(self, run: dict[str, Any], names: Mapping[int, str], part: str, stack: ExitStack) -> None:
        _check_folder(self.folder)
        make_folder(self.folder)
        self._lock = stack.enter_context(lock(self.folder / ".lock", shared=self._shard is not None))
        if part:
            stack.enter_context(lock(self.folder / f".lock{part}"))
        if (self.folder / "run.json").exists():
            check_same(self.folder, _parse_run(self.folder), run)
        for path in (self.labels.temporary, self.labels.folder):
            inside(self.folder, path.name)
        shutil.rmtree(self.labels.temporary, ignore_errors=True)  # unfinished files of a killed run
        stack.callback(shutil.rmtree, self.labels.temporary, ignore_errors=True)
        make_folder(self.labels.temporary)
        for path, value in ((self.folder / "run.json", run), (self.folder / "classes.json", names)):
            if value and not path.exists():  # run.json first: it marks the folder as a store
                write_atomically(path, json_of(value), temporary=self.labels.temporary)
        make_folder(self.labels.folder)
        self._lines = _open_lines(self._manifest)
        stack.callback(self._close_lines)

    def __enter__(self) -> LabelStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Sort the lines if necessary, unless other shards are still running, and release the store."""
        with self._stack:
            if self._lock.alone():
                with suppress(OSError, StoreError):  # nothing is lost: the next run sorts them
                    self._merge_manifests()

    def has_label(self, name: str) -> bool:
        """Whether there is a label map of this name. An empty file, as a power cut may leave it, is none."""
        try:
            found = (self.labels.folder / name).stat()
        except OSError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size > 0

    def select(self, images: Iterable[W], is_current: Callable[[W, Record], bool]) -> Selection:
        """Remove the lines of images that must be labeled again, and count the others.

        Args:
            images: sorted by name. The lines of other images stay.
            is_current: whether the line of an image is up to date.

        Raises:
            StoreError: the manifest is damaged or cannot be written.
        """
        selection = Selection()

        def delete_label(label: str) -> None:
            path = self.labels.folder / label
            inside(self.folder, path.parent.relative_to(self.folder).as_posix())
            path.unlink(missing_ok=True)

        with self._writing("the manifest"):
            others = self._shard is None
            lines = current_lines(images, self._merged(), is_current, selection, delete_label, keep_others=others)
            self._rewrite(self._manifest, lines)
            if self._shard is None:
                self._remove_parts()
        return selection

    def missing(self, images: Iterable[W]) -> Iterator[W]:
        """Those of the images, sorted by name, that have no line at the time of this call."""
        lines = merged(sections_of(self._manifest))
        return (image for image, line in joined(images, lines) if image is not None and line is None)

    def append(self, records: Sequence[Record]) -> None:
        """Append the lines of images whose labels are written.

        Raises:
            StoreError: the disk is full or broken. The manifest then has none of the lines, or complete ones only.
        """
        with self._writing(f"the line of {records[0]['path']}"):
            self.labels.sync(record["label"] for record in records if "error" not in record)
            size = os.fstat(self._lines).st_size
            try:
                _write_all(self._lines, b"".join(map(line_of, records)))
                os.fsync(self._lines)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._lines, size)
                raise

    def write(self, record: Record, label_map: np.ndarray | None, masks: Sequence[str] | None = None) -> None:
        """Write the label map (H, W) uint8 and the masks of an image if it has them, then its line. Raises as the steps do."""
        if label_map is not None:
            self.labels.write(record["label"], label_map, masks)
        self.append([record])

    @contextmanager
    def replacing_labels(self) -> Iterator[Callable[[Record, np.ndarray, Sequence[str] | None], None]]:
        """Yield a function that takes the new line, label map (H, W) uint8 and masks of an image that has a label.

        All labels and lines are replaced when the block ends without an error, and none otherwise. A kill while they are
        replaced leaves images with a new label and the old line; the same call again repairs them.

        Raises:
            StoreError: a file cannot be written.
        """
        staged: dict[str, tuple[Record, Path]] = {}

        def stage(record: Record, label_map: np.ndarray, masks: Sequence[str] | None) -> None:
            path = self.labels.temporary / f"{len(staged)}.png"
            try:
                parse_line(line_of(record))
            except ValueError as error:
                raise StoreError(f"{record['path']}: cannot be corrected: {error}", hint="leave it out of the file") from None
            with self._writing(f"the label {record['label']}"):
                write_atomically(path, label_file(record["label"], label_map, masks))
            staged[record["path"]] = record, path

        yield stage
        with self._writing("the corrected labels"):
            for record, path in staged.values():
                target = inside(self.folder, f"labels/{record['label']}")
                if inside(self.folder, f"confidence/{record['label']}").exists():
                    self.labels.write_confidence(record["label"], np.full((record["height"], record["width"]), 255, np.uint8))
                path.replace(target)
            self.labels.sync(record["label"] for record, _ in staged.values())
            self._rewrite(self._manifest, (_replaced(line, staged) for line in self._merged()))
            self._remove_parts()

    def add_history(self, record: Mapping[str, Any]) -> None:
        """Append a record of a run to the history. Raises StoreError."""
        with self._writing("the history"):
            handle = _open_lines(self.folder / "history.jsonl")
            try:
                _write_all(handle, line_of(dict(record)))
                os.fsync(handle)
            finally:
                os.close(handle)

    def _merged(self) -> Iterator[Line]:
        return merged([section for file in _manifests(self.folder) for section in sections_of(file)])

    def _merge_manifests(self) -> None:
        files = _manifests(self.folder)
        if len(files) > 1 or any(len(sections_of(file)) > 1 for file in files):
            self._rewrite(self.folder / "manifest.jsonl", self._merged())
            self._remove_parts()

    def _rewrite(self, manifest: Path, lines: Iterable[Line]) -> None:
        self._close_lines()  # Windows cannot replace an open file
        try:
            with replacing(manifest, temporary=self.labels.temporary) as file:
                file.writelines(line.data for line in lines)
            sync_folder(self.folder)
        finally:
            self._lines = _open_lines(self._manifest)

    def _close_lines(self) -> None:
        handle, self._lines = self._lines, -1
        if handle >= 0:
            os.close(handle)

    def _remove_parts(self) -> None:
        for path in _manifests(self.folder):
            if path.name != "manifest.jsonl":
                path.unlink()

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise cannot_write(self.folder, what, error) from None


def read_records(folder: Path) -> Iterator[Record]:
    """The records of a store by path, one per image, also while a run writes it; skips a line that a crash truncated.

    Raises:
        StoreError: a line is damaged, or the manifest cannot be read.
    """
    try:
        sections = [section for file in _manifests(folder) for section in sections_of(file)]
        yield from (line.record for line in merged(sections))
    except OSError as error:
        raise StoreError(
            f"{error.filename or folder}: cannot be read: {error.strerror or error}", hint="check its permissions"
        ) from None


def read_labeled_records(folder: Path, fields: Collection[str]) -> Iterator[Record]:
    """The records of the labeled images of a store, which have these fields and only classes of the store.

    Raises:
        StoreError: as `read_records` and `read_run`; or a line lacks a field, or names a class that the store lacks.
    """
    names = set(read_run(folder)["classes"])
    for record in read_records(folder):
        if "error" not in record:
            check_complete(record, names, fields, folder / "manifest.jsonl")
            yield record


def read_run(folder: Path) -> dict[str, Any]:
    """The settings of a store. Raises StoreError if ``folder`` is not a store."""
    if not os.path.exists(folder / "run.json"):  # unlike Path.exists, False for names that are too long
        raise StoreError(f"{folder}: expected a label store (with run.json)", hint="wsss label makes one")
    return _parse_run(folder)


def read_history(folder: Path) -> list[Record]:
    """The history records of a store's runs, oldest first; empty if there are none. Damaged lines are skipped."""
    path = folder / "history.jsonl"
    try:
        check_regular(path)
        lines = read_bytes(path, error=StoreError).splitlines(keepends=True)
    except (OSError, StoreError):
        return []
    return [record for line in lines if line.endswith(b"\n") and (record := history_of(line)) is not None]


def read_images_folder(folder: Path) -> Path:
    """The folder, or the single image, that the last run of a store labeled.

    Raises:
        StoreError: there is no store; its history names no local folder; or that folder does not exist.
    """
    read_run(folder)
    hint = "give the folder that was labeled: --images FOLDER"
    names = [name for run in read_history(folder) if isinstance(name := run.get("folder"), str)]
    if not names or "\0" in names[-1]:
        raise StoreError(f"{folder}: its history does not name the folder that was labeled", hint=hint)
    found = Path(os.path.normpath(folder / names[-1]))
    if not os.path.exists(found):
        raise StoreError(f"{folder}: was made from {found}, which does not exist", hint=hint)
    return found


def relative_images(images: Path, folder: Path) -> str:
    """The path of a store's images as its history records it: relative to the store, absolute on another drive."""
    try:
        return Path(os.path.relpath(images.resolve(), folder.resolve())).as_posix()
    except ValueError:
        return str(images.resolve())


def write_label(path: Path, label_map: np.ndarray) -> None:
    """Write a label map (H, W) uint8 as an 8-bit palette PNG with VOC's colors, atomically. Raises OSError."""
    make_folder(path.parent)
    with replacing(path) as file:
        file.write(png_of(label_map))
    sync_folder(path.parent)


def label_path(store: Path, label: str) -> Path:
    """The path of a record's label map. Raises StoreError if a link leads out of the store."""
    return inside(store, f"labels/{label}")


def read_label(path: Path, *, shape: tuple[int, int] | None = None) -> np.ndarray:
    """Read a label map (H, W) uint8 from an 8-bit palette or gray PNG.

    Args:
        shape: the expected height and width; checked before the image is decoded.

    Raises:
        StoreError: not such a PNG, another shape, or more than `MAX_PIXELS`.
    """
    return _decode_label(path, read_bytes(path, hint=_LABEL_HINT, error=StoreError), shape)


def read_label_and_masks(path: Path, *, shape: tuple[int, int], boxes: int) -> tuple[np.ndarray, list[str] | None]:
    """Read a label map as `read_label` does, and the masks of its boxes.

    Args:
        shape: the expected height and width. boxes: number of boxes in the manifest line.

    Returns:
        The label map, and for each box the compressed counts of its mask, to be decoded one by one by `MaskRuns.from_counts`,
        which checks them; None if the file has no masks.

    Raises:
        StoreError: as `read_label`; or the masks are damaged, or of another number.
    """
    data = read_bytes(path, hint=_LABEL_HINT, error=StoreError)
    label_map = _decode_label(path, data, shape)
    try:
        return label_map, masks_in(data, boxes) if boxes else []
    except ValueError as error:
        raise StoreError(f"{path}: not a readable label: {error}", hint=_LABEL_HINT) from None


def read_confidence(store: Path, label: str, *, shape: tuple[int, int]) -> np.ndarray:
    """Read the confidence (H, W) uint8 of a record's label map, 255 is certain.

    Args:
        shape: the expected height and width.

    Raises:
        StoreError: there is none, a link leads out of the store, or as `read_label`.
    """
    path = inside(store, f"confidence/{label}")
    return read_label(path, shape=shape)


_LABEL_HINT = "delete it and run wsss label again: it is created again"


def _decode_label(path: Path, data: bytes, shape: tuple[int, int] | None) -> np.ndarray:
    hint = _LABEL_HINT
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            # Pillow stretches gray values of fewer bits to 0..255, which changes the labels. Byte 24: IHDR's bit depth.
            mode = f"{data[24]}-bit gray" if image.mode == "L" and data[24] != 8 else f"mode {image.mode}"
            if mode not in ("mode P", "mode L"):
                raise StoreError(f"{path}: expected an 8-bit palette PNG, got {mode}", hint=hint)
            height, width = image.height, image.width
            if shape and (height, width) != shape:
                raise StoreError(f"{path}: is {width} x {height} pixels, the photograph was {shape[1]} x {shape[0]}", hint=hint)
            if height * width > MAX_PIXELS:
                raise StoreError(f"{path}: expected at most {MAX_PIXELS:,} pixels, got {width} x {height}", hint=hint)
            return np.array(image)
    except StoreError:
        raise
    except MemoryError:
        raise StoreError(f"{path}: this machine lacks the memory to decode it", hint=hint) from None
    except UnidentifiedImageError:  # Pillow's message contains a memory address
        raise StoreError(f"{path}: not a readable label: no PNG", hint=hint) from None
    except Exception as error:  # Pillow's decoders may raise any exception
        raise StoreError(f"{path}: not a readable label: {error or type(error).__name__}", hint=hint) from None


def make_folder(folder: Path, within: Path | None = None) -> None:
    """Create a folder and missing parents, so that they survive a power cut; ``within`` must exist. Raises OSError."""
    if folder.is_dir():
        return
    if folder == within:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    make_folder(folder.parent, within)
    try:
        folder.mkdir()
    except FileExistsError:  # created by another thread or shard, or a file
        if not folder.is_dir():
            raise
    sync_folder(folder.parent)


def _replaced(line: Line, staged: Mapping[str, tuple[Record, Path]]) -> Line:
    if line.path not in staged:
        return line
    record, _ = staged[line.path]
    return Line(line.path, line_of(record), record)


def label_file(name: str, label_map: np.ndarray, masks: Sequence[str] | None) -> bytes:
    """The PNG file of a label map (H, W) uint8, with its masks. Raises ImageError if they are too ragged."""
    png = png_of(label_map)
    try:
        return with_masks(png, masks) if masks else png
    except ValueError as error:
        raise ImageError(f"{name}: {error}") from None


def _open_lines(path: Path) -> int:
    check_regular(path)  # otherwise the target of a link would be truncated and appended to
    new = not path.exists()
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags, 0o666)
    cut_torn_line(handle)
    if new:
        sync_folder(path.parent)
    return handle


def _write_all(handle: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


def _manifests(folder: Path) -> list[Path]:
    """manifest.jsonl if it exists, then the manifests of shards, whose lines are newer."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"manifest(-\d+-of-\d+)?\.jsonl", path.name)]
    return sorted(found, key=lambda path: (path.name != "manifest.jsonl", path.name))


def _check_folder(folder: Path) -> None:
    if not folder.is_dir() or (folder / "run.json").exists():
        return
    if any(not path.name.startswith((".tmp", ".lock")) for path in folder.iterdir()):  # a crash may leave these
        raise StoreError(f"--out {folder}: the folder is not empty and holds no label store", hint="give a new or empty folder")


def _parse_run(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    return parse_run(read_bytes(path, hint="give a new --out", error=StoreError), path)
