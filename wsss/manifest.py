"""The lines of a label store's manifests: sorted, merged, mended. Only the label store uses this.

A manifest is appended to. It is a row of *sections*, in each of which paths ascend: one section after an unbroken run, a
second one where a later run put a new image between old ones. Merging the sections of all manifests gives each path once,
the last line written winning, with one line of each section in memory.
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from .errors import StoreError


class Line(NamedTuple):
    """A whole line with its line break, and the path that it is about."""

    path: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Section:
    """Bytes ``start`` to ``stop`` of a manifest, in which paths ascend."""

    file: Path
    start: int
    stop: int

    def __iter__(self) -> Iterator[Line]:
        with self.file.open("rb") as file:
            file.seek(self.start)
            left = self.stop - self.start
            while left > 0:
                data = file.readline()
                left -= len(data)
                yield Line(json.loads(data)["path"], data)


class Named(Protocol):
    """Something that a line may be about."""

    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=Named)


def sections_of(file: Path) -> list[Section]:
    """The sections of a manifest; a last line cut by a crash is left out.

    Raises:
        StoreError: a damaged line before the last. OSError: it cannot be read.
    """
    found: list[Section] = []
    start = stop = 0
    last = ""
    with file.open("rb") as lines:
        for number, data in enumerate(lines, 1):
            line = line_from(data)
            if line is None:
                if lines.read(1):
                    raise StoreError(f"{file}: line {number} is damaged", hint="delete that line: its image is done again")
                break
            if line.path <= last and stop > start:
                found.append(Section(file, start, stop))
                start = stop
            last, stop = line.path, stop + len(data)
    if stop > start:
        found.append(Section(file, start, stop))
    return found


def line_from(data: bytes) -> Line | None:
    """A line read from a manifest; None where it is damaged or has no line break."""
    try:
        record = json.loads(data)
        path, _ = record["path"], record["label"]
    except (ValueError, KeyError, TypeError):
        return None
    return Line(path, data) if isinstance(path, str) and data.endswith(b"\n") else None


def merged(sections: Iterable[Iterable[Line]]) -> Iterator[Line]:
    """The lines of all sections by path, one a path: that of the last section that has it."""
    waiting: Line | None = None
    for line in heapq.merge(*sections, key=lambda line: line.path):  # of equal paths, the first section's comes first
        if waiting and waiting.path != line.path:
            yield waiting
        waiting = line
    if waiting:
        yield waiting


def side_by_side(wanted: Iterable[N], lines: Iterable[Line]) -> Iterator[tuple[N | None, Line | None]]:
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


def cut_torn_line(handle: int) -> None:
    """Ends a manifest, open for reading and writing, after its last whole line. Raises OSError."""
    size = end = os.fstat(handle).st_size
    while end:
        start = max(0, end - (1 << 16))
        found = os.pread(handle, end - start, start).rfind(b"\n")
        end = start + found + 1 if found >= 0 else start
        if found >= 0:
            break
    if end < size:
        os.ftruncate(handle, end)
        os.fsync(handle)
