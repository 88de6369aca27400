"""Where photographs come from: a folder of this machine, one of an object store, or a list of files and URLs."""

from __future__ import annotations

import hashlib
import heapq
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path, PurePosixPath
from typing import Protocol
from urllib.parse import unquote

from ..errors import ImageError, UsageError
from ..photographs import MOST_BYTES, SUFFIXES, ImageFile, Place, read_file, stamp_of
from ..remote import Entry, RemoteFolder, hint_of, is_url
from .images import Folder, Found, Listing, is_of_shard, label_of

SORTED_AT_ONCE = 200_000
"""Lines of a list in memory at a time."""


class Source(Place, Protocol):
    """A place whose images can be gone through."""

    def found(self, out: Path | RemoteFolder | None) -> Iterator[Found]:
        """The images by name, order of code points; none of the store ``out``. Raises ImageError."""
        ...


@dataclass(frozen=True)
class RemoteImages:
    """The images of a folder in an object store, sub-folders too, or ``only`` one of them."""

    folder: RemoteFolder
    only: str = ""

    def __str__(self) -> str:
        return f"{self.folder}/{self.only}" if self.only else str(self.folder)

    def found(self, out: Path | RemoteFolder | None) -> Iterator[Found]:
        """As `Source.found`: hidden files and folders are left out, as in a folder. Pages are fetched as they are needed."""
        inside = f"{self.folder}/"
        leave_out = f"{out}/".removeprefix(inside) if isinstance(out, RemoteFolder) and f"{out}/".startswith(inside) else None
        try:
            for entry in [self.folder.entry(self.only)] if self.only else self.folder.walk():
                name = PurePosixPath(entry.name)
                if name.suffix.lower() not in SUFFIXES or any(part.startswith(".") for part in name.parts):
                    continue
                if leave_out is None or not entry.name.startswith(leave_out):
                    yield Found(entry.name, label_of(entry.name), _stamp(entry))
        except OSError as error:
            raise ImageError(f"{self}: cannot be listed: {error.strerror or error}", hint=hint_of(error)) from None

    def stamp(self, name: str) -> Mapping[str, int | str]:
        """As `Place.stamp`."""
        return _stamp(self.folder.entry(name))

    def read(self, name: str) -> ImageFile:
        """As `Place.read`."""
        try:
            # Before the bytes: an object that is written anew in between has another etag than its line, and is read again.
            entry = self.folder.entry(name)
            if entry.size > MOST_BYTES:
                raise ImageError(f"{name}: {entry.size:,} bytes, at most {MOST_BYTES:,} are read")
            data = self.folder.read(name, 0, entry.size) if entry.size else b""
        except OSError as error:
            raise ImageError(f"{name}: cannot be read: {error.strerror or error}") from None
        return ImageFile(name=name, data=data, etag=entry.etag, sha256=hashlib.sha256(data).hexdigest())


@dataclass(frozen=True)
class FileList:
    """The images that a text file names, a path (from the working folder) or URL a line; the lines are their names."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def found(self, out: Path | RemoteFolder | None) -> Iterator[Found]:
        """As `Source.found`: each once, whatever their order in the list."""
        try:
            with ExitStack() as stack:
                lines = stack.enter_context(self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n"))
                names = (name for line in lines if (name := line.rstrip("\r\n")))
                parts: list[Iterator[str]] = []
                while some := sorted(islice(names, SORTED_AT_ONCE)):
                    parts.append(_set_aside(some, stack) if len(some) == SORTED_AT_ONCE or parts else iter(some))
                yield from (Found(name, label_of(name)) for name, _ in groupby(heapq.merge(*parts)))
        except OSError as error:
            raise ImageError(f"{self.path}: cannot be read: {error.strerror}") from None

    def stamp(self, name: str) -> Mapping[str, int | str]:
        """As `Place.stamp`."""
        return stamp_of(*_place_of(name))

    def read(self, name: str) -> ImageFile:
        """As `Place.read`."""
        place, inside = _place_of(name)
        try:
            file = read_file(place, inside)
        except ImageError as error:
            raise ImageError(error.message.replace(inside, name, 1) if inside != name else error.message) from None
        return ImageFile(name=name, data=file.data, mtime_ns=file.mtime_ns, etag=file.etag, sha256=file.sha256)


@dataclass(frozen=True)
class _Listed:
    path: Source
    out: Path | RemoteFolder | None
    shard: tuple[int, int] | None

    def __iter__(self) -> Iterator[Found]:
        return (found for found in self.path.found(self.out) if is_of_shard(found.name, self.shard))


def source_of(text: str) -> Path | Source:
    """What IMAGES names: a URL, a list (``.txt``), a folder or an image."""
    if is_url(text):
        url = text.rstrip("/")
        parent, _, name = url.rpartition("/")
        alone = PurePosixPath(name).suffix.lower() in SUFFIXES and not text.endswith("/") and not parent.endswith("/")
        return RemoteImages(RemoteFolder(parent), name) if alone else RemoteImages(RemoteFolder(url))
    path = local_path(text)
    return FileList(path) if path.suffix.lower() == ".txt" and path.is_file() else path


def store_of(text: str) -> Path | RemoteFolder:
    """What --out names: a URL or a folder."""
    return RemoteFolder(text.rstrip("/")) if is_url(text) else local_path(text)


def local_path(text: str) -> Path:
    """A path, also where it comes as ``file://``. Raises UsageError where that names another machine."""
    if not text.startswith("file://"):
        return Path(text)
    # Not urlsplit: it takes what follows a # or ? for no part of the path, and raises ValueError at a bracket.
    machine, slash, path = text.removeprefix("file://").partition("/")
    if machine not in ("", "localhost"):
        raise UsageError(f"{text}: expected a file of this machine", hint="file:///home/me/photos has three slashes")
    return Path(unquote(slash + path))


def listing(
    place: Path | Source,
    out: Path | RemoteFolder | None = None,
    shard: tuple[int, int] | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> Listing:
    """The images of a place.

    Args:
        out: the label store, whose labels are no photographs.
        shard: (I, N): only those of the I-th of N shares.
        warn: told of links to folders, which are not followed.
    """
    if isinstance(place, Path):
        return Folder(place, out if isinstance(out, Path) else None, shard, warn)
    return _Listed(place, out, shard)


def _stamp(entry: Entry) -> Mapping[str, int | str]:
    return {"bytes": entry.size, "etag": entry.etag}


def _place_of(name: str) -> tuple[Path | Place, str]:
    if is_url(name):
        parent, _, last = name.rpartition("/")
        return RemoteImages(RemoteFolder(parent)), last
    try:
        return (Path(), name) if not name.startswith("file://") else (Path("/"), str(local_path(name)))
    except UsageError as error:  # of this image alone
        raise ImageError(error.message, hint=error.hint) from None


def _set_aside(names: list[str], stack: ExitStack) -> Iterator[str]:
    """Sorted names in a temporary file, read as they are needed."""
    file = tempfile.TemporaryFile(prefix="wsss-")  # noqa: SIM115
    stack.callback(file.close)
    for name in names:
        file.write(name.encode("utf-8", "surrogateescape") + b"\n")
    file.seek(0)
    return (line[:-1].decode("utf-8", "surrogateescape") for line in file)
