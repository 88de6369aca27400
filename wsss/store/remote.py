"""The label store in an object store: once no run is at work, file for file what `labelstore` says, which downloads as one.

An object store has no append, no rename and no locks. So, while a run is at work:

    labels/<image>.png               one PUT, whole or not at all
    manifest/<number>.jsonl          lines of finished images in their order, a PUT for many of them: its *parts*
    manifest-I-of-N/<number>.jsonl   the same of shard I
    history/<time>.jsonl             what each run noted
    .lock/                           who is at work (`remote_lock`)

When the last run leaves, parts are folded into manifest.jsonl, and only then deleted; a run that was killed leaves its
parts to the next one, which folds them first. A line is put after its label, so that a line without a label cannot happen;
lines that were not put yet when a run is killed cost their images a second time, no more.
"""

from __future__ import annotations

import errno
import io
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from PIL import Image

from ..classes import ClassList
from ..errors import ImageError, StoreError
from ..object_storage import Presence, RemoteFolder, hint_of
from ..reading.documents import MAX_BYTES
from .format import (
    MAX_LINE,
    Record,
    Selection,
    W,
    cannot_write,
    check_same,
    json_of,
    line_of,
    names_by_value,
    parse_run,
    run_of,
)
from .lines import Line, line_from, merged, side_by_side, still_true
from .local import Shard, png_of
from .remote_lock import remote_lock

PART_LINES, PART_SECONDS = 1000, 10.0
"""A part is put when so many lines wait, or the oldest waits for so long."""
_MANIFEST = re.compile(r"manifest(-\d+-of-\d+)?(\.jsonl|/)")
_PART = re.compile(r"manifest(-\d+-of-\d+)?/\d{10}\.jsonl")


@dataclass(frozen=True, slots=True)
class RemoteLabels:
    """Where label maps are published; several processes may hold one."""

    folder: RemoteFolder

    def write(self, name: str, label_map: np.ndarray) -> None:
        """Publishes a label map (H, W) uint8 whole or not at all.

        Raises:
            ImageError: the store takes no such name. StoreError: it cannot be written.
        """
        self._publish(f"labels/{name}", name, bytes(png_of(label_map)))

    def write_confidence(self, name: str, confidence: np.ndarray) -> None:
        """Publishes the confidence (H, W) uint8 of a label map, 255 is certain, as ``confidence/<name>``. Raises as ``write``."""
        buffer = io.BytesIO()
        Image.fromarray(confidence).save(buffer, format="PNG")
        self._publish(f"confidence/{name}", name, buffer.getvalue())

    def _publish(self, path: str, name: str, data: bytes) -> None:
        try:
            self.folder.write(path, data)
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.EILSEQ):
                raise ImageError(f"{name}: a label cannot have this name: {error.strerror}") from None
            raise cannot_write(self.folder, f"the label {name}", error) from None


@dataclass(frozen=True, slots=True)
class _Row:
    """Files of lines that, one after the other, ascend by path."""

    folder: RemoteFolder
    files: Sequence[str]

    def __iter__(self) -> Iterator[Line]:
        last = ""
        for file in self.files:
            where = f"{self.folder}/{file}"
            try:
                for number, data in enumerate(self.folder.lines(file, MAX_LINE), 1):
                    try:
                        line = line_from(data)
                        if line.path <= last:
                            raise ValueError("out of order")
                    except ValueError as error:
                        raise StoreError(
                            f"{where}: line {number} is damaged: {error}", hint="delete that line: its image is done again"
                        ) from None
                    last = line.path
                    yield line
            except OSError as error:
                raise StoreError(f"{where}: cannot be read: {error.strerror or error}", hint=hint_of(error)) from None


class RemoteStore:
    """A label store open for writing, locked against other runs. As `LabelStore`, but for when lines are published.

    Raises:
        As `LabelStore`.
    """

    def __init__(
        self, folder: RemoteFolder, classes: ClassList, settings: Mapping[str, Any], *, shard: Shard | None = None
    ) -> None:
        self.folder = folder
        self.labels = RemoteLabels(folder)
        self._part = "" if shard is None else f"-{shard[0]}-of-{shard[1]}"
        self._manifest = f"manifest{self._part}.jsonl"
        self._there = Presence(folder, "labels/")
        self._waiting: list[bytes] = []
        self._since = 0.0
        try:
            with ExitStack() as stack:
                self._check_folder()
                self._lock = stack.enter_context(remote_lock(folder, self._part))
                self._open(run_of(classes, settings), classes)
                self._stack = stack.pop_all()
        except OSError as error:
            raise StoreError(f"--out {folder}: cannot be written: {error.strerror or error}", hint=hint_of(error)) from None

    def _check_folder(self) -> None:
        files, folders = self.folder.scan()
        names = [*(file.name for file in files), *folders]
        if "run.json" not in names and any(not name.startswith(".lock") for name in names):
            raise StoreError(
                f"--out {self.folder}: the folder is not empty and holds no label store", hint="give a new or empty folder"
            )

    def _open(self, run: dict[str, Any], classes: ClassList) -> None:
        try:
            check_same(self.folder, parse_run(self._read_run(), f"{self.folder}/run.json"), run)
        except FileNotFoundError:  # run.json first: from here on the folder is known as a store
            self.folder.write("run.json", json_of(run))
        self.folder.write("classes.json", json_of(names_by_value(classes)))
        self._next = 1 + max((int(name.rpartition("/")[2][:-6]) for name in self._parts(self._manifest)), default=-1)

    def _read_run(self) -> bytes:
        size = self.folder.entry("run.json").size
        if size > MAX_BYTES:
            raise StoreError(
                f"{self.folder}/run.json: expected at most {MAX_BYTES:,} bytes, got {size:,}", hint="give a new --out"
            )
        return self.folder.read("run.json", 0, size) if size else b""

    def __enter__(self) -> RemoteStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Puts what waits, folds the parts unless other shards are still at work, and lets the store go.

        Raises:
            StoreError: lines that waited cannot be written.
        """
        with self._stack:
            self._put()
            with suppress(OSError, StoreError):  # nothing is lost: the next run folds them
                if self._lock.alone():
                    self._fold()

    def has_label(self, name: str) -> bool:
        """Is there a label map of this name? Cheap where names are asked for nearly in order. Raises OSError."""
        return name in self._there

    def select(self, images: Iterable[W], is_current: Callable[[W, Record], bool]) -> Selection:
        """As `LabelStore.select`."""
        told = Selection()

        def drop(label: str) -> None:
            self.folder.delete([f"labels/{label}"])

        with self._writing("the manifest"):
            rows, files = self._rows()
            lines = still_true(images, merged(rows), is_current, told, drop, others=not self._part)
            self.folder.write_lines(self._manifest, (line.data for line in lines))
            self._delete(self._parts(self._manifest) if self._part else files)
            self._next = 0
        return told

    def missing(self, images: Iterable[W]) -> Iterator[W]:
        """As `LabelStore.missing`."""
        lines = _Row(self.folder, [self._manifest])
        return (image for image, line in side_by_side(images, lines) if image is not None and line is None)

    def append(self, records: Sequence[Record]) -> None:
        """Publishes the lines of images whose labels are written, soon.

        Raises:
            StoreError: the store cannot be written, or another run took it over.
        """
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting += map(line_of, records)
        if len(self._waiting) >= PART_LINES or time.monotonic() - self._since >= PART_SECONDS:
            self._put()

    def add_history(self, told: Mapping[str, Any]) -> None:
        """Notes what a run did. Raises StoreError."""
        self._put()
        with self._writing("the history"):
            now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
            self.folder.write(f"history/{now}-{uuid.uuid4().hex[:8]}.jsonl", line_of(dict(told)))

    def _put(self) -> None:
        self._lock.check()
        if not self._waiting:
            return
        with self._writing(f"{len(self._waiting)} lines of the manifest"):
            self.folder.write(f"{self._manifest[:-6]}/{self._next:010}.jsonl", b"".join(self._waiting))
        self._waiting.clear()
        self._next += 1

    def _parts(self, manifest: str) -> list[str]:
        """The parts of a manifest; files of other names are not ours."""
        return [entry.name for entry in self.folder.walk(f"{manifest[:-6]}/") if _PART.fullmatch(entry.name)]

    def _rows(self) -> tuple[list[_Row], list[str]]:
        """The manifests and their parts, the newer ones last, and the names of all but manifest.jsonl."""
        files, folders = self.folder.scan()
        names = [name for name in (*(file.name for file in files), *folders) if _MANIFEST.fullmatch(name)]
        # manifest.jsonl, manifest/, then each shard's; a part is newer than the manifest it will be folded into.
        names.sort(key=lambda name: (name not in ("manifest.jsonl", "manifest/"), re.split(r"[./]", name)[0], name[-1] == "/"))
        parts = [self._parts(f"{name[:-1]}.jsonl") if name[-1] == "/" else [name] for name in names]
        return [_Row(self.folder, row) for row in parts], [file for row in parts for file in row if file != "manifest.jsonl"]

    def _fold(self) -> None:
        rows, files = self._rows()
        if files:
            self.folder.write_lines("manifest.jsonl", (line.data for line in merged(rows)))
            self._delete(files)
        if history := [entry.name for entry in self.folder.walk("history/")]:
            files = [entry.name for entry in self.folder.scan()[0] if entry.name == "history.jsonl"]
            self.folder.write_lines(
                "history.jsonl", (line for file in (*files, *history) for line in self.folder.lines(file, MAX_LINE))
            )
            self.folder.delete(history)

    def _delete(self, files: Sequence[str]) -> None:
        self._lock.check()  # of what another run writes, nothing is deleted
        self.folder.delete(files)

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise cannot_write(self.folder, what, error) from None
