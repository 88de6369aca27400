"""Sort, merge and repair the lines of a label store's manifests. Only the label store uses this.

A manifest is appended to. It consists of *sections* in which paths ascend: one section after an uninterrupted run, a second one
where a later run added an image between old ones. Merging the sections of all manifests gives the last written line of each
path, with one line of each section in memory.
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

_HINT = "delete that line: its image is labeled again"


class Line(NamedTuple):
    """A checked line with its line break, and the path of its image."""

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
                    raise StoreError(f"{self.file}: changed while it was read", hint="run the command again") from None
                left -= len(line.data)
                yield line


def sections_of(file: Path) -> list[Section]:
    """The sections of a manifest, without a last line that a crash truncated.

    Raises:
        StoreError: a line is damaged; names it. OSError: the file cannot be read.
    """
    found: list[Section] = []
    start = stop = 0
    last = ""
    with open_regular(file) as lines:
        for number, data in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), b""), 1):
            if not data.endswith(b"\n") and len(data) <= MAX_LINE:
                break  # truncated by a crash
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


def line_from(data: bytes) -> Line:
    """Parse and check a manifest line. Raises ValueError with the problem."""
    if len(data) > MAX_LINE:
        raise ValueError(f"longer than {MAX_LINE:,} bytes")
    if not data.endswith(b"\n"):
        raise ValueError("it has no line break")
    record = parse_line(data)
    return Line(record["path"], data, record)


def open_regular(file: Path) -> BinaryIO:
    """Open a file of a store for reading. Raises StoreError if it is a link, a folder or a pipe."""
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    check_regular(file)
    return open(os.open(file, os.O_RDONLY | flags), "rb")


def check_regular(file: Path) -> None:
    """Raises StoreError if a file of a store exists and is not a regular file."""
    try:
        mode = file.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "no file"
        raise StoreError(f"{file}: expected a regular file, got {kind}", hint="give a label store as wsss label writes it")


def merged(sections: Iterable[Iterable[Line]]) -> Iterator[Line]:
    """The lines of all sections by path, one per path: that of the last section that has it."""
    latest: Line | None = None
    for line in heapq.merge(*sections, key=lambda line: line.path):  # of equal paths, the first section's comes first
        if latest and latest.path != line.path:
            yield latest
        latest = line
    if latest:
        yield latest


def joined(images: Iterable[W], lines: Iterable[Line]) -> Iterator[tuple[W | None, Line | None]]:
    """Outer join of images and lines by path, both sorted; None where one of them is missing.

    Raises:
        AssertionError: ``images`` is not sorted by name.
    """
    rest = iter(lines)
    line = next(rest, None)
    last = ""
    for image in images:
        assert last <= image.name, f"{image.name!r} after {last!r}"
        last = image.name
        while line and line.path < image.name:
            yield None, line
            line = next(rest, None)
        if line and line.path == image.name:
            yield image, line
            line = next(rest, None)
        else:
            yield image, None
    while line:
        yield None, line
        line = next(rest, None)


def current_lines(
    images: Iterable[W],
    lines: Iterable[Line],
    is_current: Callable[[W, Record], bool],
    selection: Selection,
    delete_label: Callable[[str], None],
    *,
    keep_others: bool,
) -> Iterator[Line]:
    """The lines that are still current. ``images`` and ``lines`` are sorted; counts are added to ``selection``.

    Args:
        delete_label: called with the label's path of an outdated line whose image's label has another path now.
        keep_others: keep the lines of images that are not in ``images``.
    """
    for image, line in joined(images, lines):
        selection.images += image is not None
        if line is None:
            continue
        if image is None:
            if keep_others:
                yield line
            continue
        if is_current(image, line.record):
            selection.done += 1
            selection.failed += "error" in line.record
            yield line
        elif line.record["label"] != image.label:
            delete_label(line.record["label"])


def cut_torn_line(handle: int) -> None:
    """Truncate a manifest, open for reading and writing, after its last complete line. Raises OSError."""
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
