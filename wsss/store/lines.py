"""The lines of a label store's manifests: sorted, merged, mended. Only the label store uses this.

A manifest is appended to. It is a row of *sections*, in each of which paths ascend: one section after an unbroken run, a
second one where a later run put a new image between old ones. Merging the sections of all manifests gives each path once,
the last line written winning, with one line of each section in memory.
"""

from __future__ import annotations

import heapq
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..errors import StoreError
from .format import MAX_LINE, Record, Selection, W, parse_line

_HINT = "delete that line: its image is done again"


class Line(NamedTuple):
    """A whole line with its line break, checked, and the path that it is about."""

    path: str
    data: bytes
    record: Record


@dataclass(frozen=True, slots=True)
class Section:
    """Bytes ``start`` to ``stop`` of a manifest, in which paths ascend."""

    file: Path
    start: int
    stop: int

    def __iter__(self) -> Iterator[Line]:
        with open_regular(self.file) as file:
            file.seek(self.start)
            left = self.stop - self.start
            while left > 0:
                try:
                    line = line_from(file.readline(MAX_LINE + 1))
                except ValueError:
                    raise StoreError(f"{self.file}: was changed while it was read", hint="run the command again") from None
                left -= len(line.data)
                yield line


def sections_of(file: Path) -> list[Section]:
    """The sections of a manifest; a last line cut by a crash is left out.

    Raises:
        StoreError: a damaged line; names it. OSError: it cannot be read.
    """
    found: list[Section] = []
    start = stop = 0
    last = ""
    with open_regular(file) as lines:
        for number, data in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), b""), 1):
            if not data.endswith(b"\n") and len(data) <= MAX_LINE:
                break  # the crash
            try:
                line = line_from(data)
            except ValueError as error:
                raise StoreError(f"{file}: line {number} is damaged: {error}", hint=_HINT) from None
            if line.path <= last and stop > start:
                found.append(Section(file, start, stop))
                start = stop
            last, stop = line.path, stop + len(data)
    if stop > start:
        found.append(Section(file, start, stop))
    return found


def records_of(file: Path) -> Iterator[Record]:
    """The lines of one manifest by path, one an image. Raises StoreError: it cannot be read, or a line is damaged."""
    try:
        yield from (line.record for line in merged(sections_of(file)))
    except OSError as error:
        raise StoreError(
            f"{file}: cannot be read: {error.strerror or error}", hint="give a label store's manifest.jsonl"
        ) from None


def line_from(data: bytes) -> Line:
    """Check a line of a manifest. Raises ValueError, which says what is wrong with it."""
    if len(data) > MAX_LINE:
        raise ValueError(f"longer than {MAX_LINE:,} bytes")
    if not data.endswith(b"\n"):
        raise ValueError("it has no line break")
    record = parse_line(data)
    return Line(record["path"], data, record)


def open_regular(file: Path) -> BinaryIO:
    """Open a file of a store for reading. Raises StoreError where it is a link, a folder, or a pipe, which would never end."""
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    check_regular(file)
    return open(os.open(file, os.O_RDONLY | flags), "rb")


def check_regular(file: Path) -> None:
    """Check that a file of a store is a regular one or absent. Raises StoreError."""
    try:
        mode = file.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "no file"
        raise StoreError(f"{file}: expected a regular file, got {kind}", hint="give a label store as wsss label writes it")


def merged(sections: Iterable[Iterable[Line]]) -> Iterator[Line]:
    """The lines of all sections by path, one a path: that of the last section that has it."""
    waiting: Line | None = None
    for line in heapq.merge(*sections, key=lambda line: line.path):  # of equal paths, the first section's comes first
        if waiting and waiting.path != line.path:
            yield waiting
        waiting = line
    if waiting:
        yield waiting


def side_by_side(wanted: Iterable[W], lines: Iterable[Line]) -> Iterator[tuple[W | None, Line | None]]:
    """Joins what is wanted with its line, both sorted: either may be missing.

    Raises:
        AssertionError: ``wanted`` is not sorted by name.
    """
    rest = iter(lines)
    line = next(rest, None)
    last = ""
    for each in wanted:
        assert last <= each.name, f"{each.name!r} after {last!r}"
        last = each.name
        while line and line.path < each.name:
            yield None, line
            line = next(rest, None)
        if line and line.path == each.name:
            yield each, line
            line = next(rest, None)
        else:
            yield each, None
    while line:
        yield None, line
        line = next(rest, None)


def still_true(
    images: Iterable[W],
    lines: Iterable[Line],
    is_current: Callable[[W, Record], bool],
    told: Selection,
    drop: Callable[[str], None],
    *,
    others: bool,
) -> Iterator[Line]:
    """The lines to keep of those that a store has, both sorted; counts into ``told``.

    Args:
        drop: given the label of a line whose image's label is called otherwise now.
        others: keep the lines of images that are not among these.
    """
    for image, line in side_by_side(images, lines):
        told.images += image is not None
        if line is None:
            continue
        if image is None:
            if others:
                yield line
            continue
        if is_current(image, line.record):
            told.done += 1
            told.failed += "error" in line.record
            yield line
        elif line.record["label"] != image.label:
            drop(line.record["label"])


def cut_torn_line(handle: int) -> None:
    """Ends a manifest, open for reading and writing, after its last whole line. Raises OSError."""
    size = end = os.fstat(handle).st_size
    while end:
        start = max(0, end - (1 << 16))
        os.lseek(handle, start, os.SEEK_SET)
        found = os.read(handle, end - start).rfind(b"\n")
        end = start + found + 1 if found >= 0 else start
        if found >= 0:
            break
    if end < size:
        os.ftruncate(handle, end)
        os.fsync(handle)
