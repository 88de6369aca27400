"""The label store in an object store. When no run is active it has the same files as a local one (see `local`).

An object store has no append, no rename and no locks. So, while a run is active:

    labels/<image>.png               one PUT, which is atomic
    manifest/<number>.jsonl          *parts*: the lines of many finished images, in order, in one PUT
    manifest-I-of-N/<number>.jsonl   the same of shard I
    history/<time>.jsonl             the record of a run
    .lock/                           the active runs (`remote_lock`)

The last run merges the parts into manifest.jsonl when it ends, and then deletes them; the parts of a killed run are merged by
the next run. A line is written after its label, so a line always has its label. If a run is killed, the images whose lines were
not written yet are labeled again.
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
from .lines import Line, current_lines, joined, line_from, merged
from .local import Shard, label_file
from .remote_lock import remote_lock

PART_LINES, PART_SECONDS = 1000, 10.0
"""A part is written when this many lines are pending, or the oldest has been pending this long."""
_MANIFEST = re.compile(r"manifest(-\d+-of-\d+)?(\.jsonl|/)")
_PART = re.compile(r"manifest(-\d+-of-\d+)?/\d{10}\.jsonl")


@dataclass(frozen=True, slots=True)
class RemoteLabels:
    """Writes label maps into an object store; several processes may hold one."""

    folder: RemoteFolder

    def write(self, name: str, label_map: np.ndarray, masks: Sequence[str] | None = None) -> None:
        """Write a label map (H, W) uint8 atomically.

        Args:
            masks: as in `wsss.store.format.LabelWriter`.

        Raises:
            ImageError: the object store does not allow the name, or the masks are too ragged. StoreError: it cannot be written.
        """
        self._write(f"labels/{name}", name, label_file(name, label_map, masks))

    def write_confidence(self, name: str, confidence: np.ndarray) -> None:
        """Write the confidence (H, W) uint8 of a label map, 255 is certain, as ``confidence/<name>``. Raises as ``write``."""
        buffer = io.BytesIO()
        Image.fromarray(confidence).save(buffer, format="PNG")
        self._write(f"confidence/{name}", name, buffer.getvalue())

    def _write(self, path: str, name: str, data: bytes) -> None:
        try:
            self.folder.write(path, data)
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.EILSEQ):
                raise ImageError(f"{name}: a label cannot have this name: {error.strerror}") from None
            raise cannot_write(self.folder, f"the label {name}", error) from None


@dataclass(frozen=True, slots=True)
class _PartsInOrder:
    """Files whose lines, one file after the other, ascend by path."""

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
                            f"{where}: line {number} is damaged: {error}", hint="delete that line: its image is labeled again"
                        ) from None
                    last = line.path
                    yield line
            except OSError as error:
                raise StoreError(f"{where}: cannot be read: {error.strerror or error}", hint=hint_of(error)) from None


class RemoteStore:
    """A label store open for writing, locked against other runs. As `LabelStore`, but lines are written in batches.

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
        self._labels_present = Presence(folder, "labels/")
        self._pending: list[bytes] = []
        self._pending_since = 0.0
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
        except FileNotFoundError:  # run.json first: it marks the folder as a store
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
        """Write pending lines, merge the parts unless other shards are still running, and release the store.

        Raises:
            StoreError: pending lines cannot be written.
        """
        with self._stack:
            self._write_part()
            with suppress(OSError, StoreError):  # nothing is lost: the next run merges them
                if self._lock.alone():
                    self._merge_parts()

    def has_label(self, name: str) -> bool:
        """Whether there is a label map of this name. Cheap if names are asked for nearly in order. Raises OSError."""
        return name in self._labels_present

    def select(self, images: Iterable[W], is_current: Callable[[W, Record], bool]) -> Selection:
        """As `LabelStore.select`."""
        selection = Selection()

        def delete_label(label: str) -> None:
            self.folder.delete([f"labels/{label}"])

        with self._writing("the manifest"):
            parts, files = self._all_parts()
            lines = current_lines(images, merged(parts), is_current, selection, delete_label, keep_others=not self._part)
            self.folder.write_lines(self._manifest, (line.data for line in lines))
            self._delete(self._parts(self._manifest) if self._part else files)
            self._next = 0
        return selection

    def missing(self, images: Iterable[W]) -> Iterator[W]:
        """As `LabelStore.missing`."""
        lines = _PartsInOrder(self.folder, [self._manifest])
        return (image for image, line in joined(images, lines) if image is not None and line is None)

    def append(self, records: Sequence[Record]) -> None:
        """Write the lines of images whose labels are written, within `PART_SECONDS`.

        Raises:
            StoreError: the store cannot be written, or another run took it over.
        """
        if not self._pending:
            self._pending_since = time.monotonic()
        self._pending += map(line_of, records)
        if len(self._pending) >= PART_LINES or time.monotonic() - self._pending_since >= PART_SECONDS:
            self._write_part()

    def add_history(self, record: Mapping[str, Any]) -> None:
        """Add a record of a run to the history. Raises StoreError."""
        self._write_part()
        with self._writing("the history"):
            now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
            self.folder.write(f"history/{now}-{uuid.uuid4().hex[:8]}.jsonl", line_of(dict(record)))

    def _write_part(self) -> None:
        self._lock.check()
        if not self._pending:
            return
        with self._writing(f"{len(self._pending)} lines of the manifest"):
            self.folder.write(f"{self._manifest[:-6]}/{self._next:010}.jsonl", b"".join(self._pending))
        self._pending.clear()
        self._next += 1

    def _parts(self, manifest: str) -> list[str]:
        """Names of a manifest's parts; other files are ignored."""
        return [entry.name for entry in self.folder.walk(f"{manifest[:-6]}/") if _PART.fullmatch(entry.name)]

    def _all_parts(self) -> tuple[list[_PartsInOrder], list[str]]:
        """The manifests and their parts, newest last, and the names of all these files but manifest.jsonl."""
        files, folders = self.folder.scan()
        names = [name for name in (*(file.name for file in files), *folders) if _MANIFEST.fullmatch(name)]
        # manifest.jsonl, manifest/, then each shard's; a part is newer than the manifest it will be merged into.
        names.sort(key=lambda name: (name not in ("manifest.jsonl", "manifest/"), re.split(r"[./]", name)[0], name[-1] == "/"))
        parts = [self._parts(f"{name[:-1]}.jsonl") if name[-1] == "/" else [name] for name in names]
        return [_PartsInOrder(self.folder, row) for row in parts], [
            file for row in parts for file in row if file != "manifest.jsonl"
        ]

    def _merge_parts(self) -> None:
        parts, files = self._all_parts()
        if files:
            self.folder.write_lines("manifest.jsonl", (line.data for line in merged(parts)))
            self._delete(files)
        if history := [entry.name for entry in self.folder.walk("history/")]:
            files = [entry.name for entry in self.folder.scan()[0] if entry.name == "history.jsonl"]
            self.folder.write_lines(
                "history.jsonl", (line for file in (*files, *history) for line in self.folder.lines(file, MAX_LINE))
            )
            self.folder.delete(history)

    def _delete(self, files: Sequence[str]) -> None:
        self._lock.check()  # never delete files of another run
        self.folder.delete(files)

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise cannot_write(self.folder, what, error) from None
