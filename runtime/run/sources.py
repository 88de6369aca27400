"""Sources of photographs: a local folder, a folder in an object store, or a list of files and URLs."""

from __future__ import annotations

import codecs
import hashlib
import heapq
import os
import posixpath
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count, groupby, islice
from pathlib import Path, PurePosixPath
from typing import Protocol
from urllib.parse import unquote

from ...errors import ImageError, UsageError
from ...object_storage import Entry, RemoteFolder, hint_of, is_url
from ...photographs import MAX_BYTES, SUFFIXES, ImageFile, Place, read_file, stamp_of
from .listing import Folder, Found, LeftOut, Listing, is_of_shard, label_of

SORTED_AT_ONCE = 200_000
"""Most lines of a list in memory at a time."""
LONGEST_LINE = 1 << 16
"""Most characters of a line of a list; no path or URL is longer."""


class Source(Place, Protocol):
    """A place whose images can be listed."""

    def found(self, out: Path | RemoteFolder | None, left_out: LeftOut | None = None) -> Iterator[Found]:
        """Yield the images sorted by name (by code points), without those of the store ``out``. Raises ImageError.

        Args:
            left_out: filled with the other files.
        """
        ...


@dataclass(frozen=True)
class RemoteImages:
    """The images of a folder in an object store and of its sub-folders, or ``only`` one of them."""

    folder: RemoteFolder
    only: str = ""

    def __str__(self) -> str:
        return f"{self.folder}/{self.only}" if self.only else str(self.folder)

    def found(self, out: Path | RemoteFolder | None, left_out: LeftOut | None = None) -> Iterator[Found]:
        """As `Source.found`, without hidden files and folders. Pages of the listing are fetched when they are needed."""
        inside = f"{self.folder}/"
        leave_out = f"{out}/".removeprefix(inside) if isinstance(out, RemoteFolder) and f"{out}/".startswith(inside) else None
        try:
            for entry in [self.folder.entry(self.only)] if self.only else self.folder.walk():
                name = PurePosixPath(entry.name)
                if any(part.startswith(".") for part in name.parts) or (leave_out and entry.name.startswith(leave_out)):
                    continue
                if name.suffix.lower() in SUFFIXES:
                    yield Found(entry.name, label_of(entry.name), _stamp(entry))
                elif left_out is not None:
                    left_out.count(entry.name)
        except OSError as error:
            raise ImageError(f"{self}: cannot be listed: {error.strerror or error}", hint=hint_of(error)) from None

    def stamp(self, name: str) -> Mapping[str, int | str]:
        """As `Place.stamp`."""
        return _stamp(self.folder.entry(name))

    def read(self, name: str) -> ImageFile:
        """As `Place.read`."""
        try:
            # Asked before the bytes are read: an object that is replaced in between differs from its line's ETag, and is
            # read again by the next run.
            entry = self.folder.entry(name)
            if entry.size > MAX_BYTES:
                raise ImageError(f"{name}: expected at most {MAX_BYTES:,} bytes, got {entry.size:,}", hint="make it smaller")
            data = self.folder.read(name, 0, entry.size) if entry.size else b""
        except OSError as error:
            raise ImageError(f"{name}: cannot be read: {error.strerror or error}", hint=hint_of(error)) from None
        return ImageFile(name=name, data=data, etag=entry.etag, sha256=hashlib.sha256(data).hexdigest())


@dataclass(frozen=True)
class FileList:
    """The images that a text file lists, one path (from the working folder) or URL a line; the lines are their names.

    UTF-8, or UTF-16 with a byte-order mark. Empty lines and comments (``# ...``) are skipped. Blanks around a name are removed,
    and paths are normalized: ``./a//b/../c.png`` is ``a/c.png``. Where paths have forward slashes, backslashes are read as
    slashes if that file exists.
    """

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def found(self, out: Path | RemoteFolder | None, left_out: LeftOut | None = None) -> Iterator[Found]:
        """As `Source.found`: each image once, in any order of the list."""
        try:
            with ExitStack() as stack:
                names = filter(None, map(_name_of, self._lines(stack)))
                parts: list[Iterator[str]] = []
                while part := sorted(islice(names, SORTED_AT_ONCE)):
                    parts.append(_spooled(part, stack) if len(part) == SORTED_AT_ONCE or parts else iter(part))
                yield from (Found(name, label_of(name)) for name, _ in groupby(heapq.merge(*parts)))
        except OSError as error:
            raise ImageError(
                f"{self.path}: cannot be read: {error.strerror}", hint="a list of images is a text file, a path or URL a line"
            ) from None
        except UnicodeDecodeError as error:
            raise ImageError(f"{self.path}: expected UTF-16 text: {error.reason}", hint="save the file as UTF-8") from None

    def _lines(self, stack: ExitStack) -> Iterator[str]:
        with self.path.open("rb") as file:
            wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        encoding, errors = ("utf-16", "strict") if wide else ("utf-8-sig", "surrogateescape")
        lines = stack.enter_context(self.path.open(encoding=encoding, errors=errors, newline="\n"))
        for number in count(1):
            line = lines.readline(LONGEST_LINE)
            if len(line) == LONGEST_LINE:
                raise ImageError(
                    f"{self.path}: line {number}: expected a path or URL, got over {LONGEST_LINE:,} characters",
                    hint="a list of images is a text file, a path or URL a line",
                )
            if not line:
                return
            yield line.rstrip("\r\n")

    def stamp(self, name: str) -> Mapping[str, int | str]:
        """As `Place.stamp`."""
        return stamp_of(*_place_of(name))

    def read(self, name: str) -> ImageFile:
        """As `Place.read`."""
        place, inside = _place_of(name)
        try:
            file = read_file(place, inside)
        except ImageError as error:
            message = error.message.replace(inside, name, 1) if inside != name else error.message
            if not is_url(name) and PurePosixPath(name).suffix.lower() not in SUFFIXES and not _exists(inside):
                message += "; a list has one path or URL a line, with its ending, without quotes or further columns"
            raise ImageError(message, hint=error.hint) from None
        return ImageFile(name=name, data=file.data, mtime_ns=file.mtime_ns, etag=file.etag, sha256=file.sha256)


@dataclass(frozen=True)
class _Listed:
    path: Source
    out: Path | RemoteFolder | None
    shard: tuple[int, int] | None
    left_out: LeftOut = field(default_factory=LeftOut)

    def __iter__(self) -> Iterator[Found]:
        self.left_out.clear()
        return (found for found in self.path.found(self.out, self.left_out) if is_of_shard(found.name, self.shard))


def source_of(text: str) -> Path | Source:
    """The source that IMAGES names: a URL, a list (``.txt``), a folder or an image."""
    if is_url(text):
        url = text.rstrip("/")
        parent, _, name = url.rpartition("/")
        alone = PurePosixPath(name).suffix.lower() in SUFFIXES and not text.endswith("/") and not parent.endswith("/")
        return RemoteImages(RemoteFolder(parent), name) if alone else RemoteImages(RemoteFolder(url))
    path = local_path(text)
    return FileList(path) if path.suffix.lower() == ".txt" and path.is_file() else path


def store_of(text: str) -> Path | RemoteFolder:
    """The store that --out names: a URL or a folder."""
    return RemoteFolder(text.rstrip("/")) if is_url(text) else local_path(text)


def local_path(text: str) -> Path:
    """The path that a path or ``file://`` URL names. Raises UsageError where the URL names another machine."""
    if not text.startswith("file://"):
        return Path(text)
    # Not urlsplit: it cuts the path at # and ?, and raises ValueError at a bracket.
    machine, slash, path = text.removeprefix("file://").partition("/")
    if machine not in ("", "localhost"):
        raise UsageError(f"{text}: expected a file of this machine", hint="file:///home/me/photos has three slashes")
    return Path(unquote(slash + path))


def listing(
    place: Path | Source,
    out: Path | RemoteFolder | None = None,
    shard: tuple[int, int] | None = None,
) -> Listing:
    """The images of a place.

    Args:
        out: the label store, whose labels are not photographs.
        shard: (I, N): only those of the I-th of N shares.
    """
    if isinstance(place, Path):
        return Folder(place, out if isinstance(out, Path) else None, shard)
    return _Listed(place, out, shard)


def _stamp(entry: Entry) -> Mapping[str, int | str]:
    return {"bytes": entry.size, "etag": entry.etag}


def _name_of(line: str) -> str:
    """The image that a line of a list names, or an empty string."""
    name = line.strip(" \t")
    if name != line and _exists(line):
        name = line
    if name.startswith("#") and not _exists(name):
        return ""
    if "\\" in name and not is_url(name) and not _exists(name) and _exists(name.replace("\\", "/")):
        name = name.replace("\\", "/")
    return name if not name or "\0" in name or is_url(name) or name.startswith("file://") else _normalized(name)


def _normalized(name: str) -> str:
    """A path without empty parts, ``.`` and ``a/..``, so that each file has one name."""
    normal = posixpath.normpath(name)
    normal = normal[1:] if normal.startswith("//") else normal
    if ".." in name.split("/"):  # below a link to a folder, .. is the parent of the link's target
        try:
            return normal if os.path.samefile(name, normal) else name
        except OSError:
            return name
    return normal


def _exists(name: str) -> bool:
    return os.path.lexists(name.replace("\0", ""))


def _place_of(name: str) -> tuple[Path | Place, str]:
    if is_url(name):
        parent, _, last = name.rpartition("/")
        return RemoteImages(RemoteFolder(parent)), last
    try:
        return (Path(), name) if not name.startswith("file://") else (Path("/"), str(local_path(name)))
    except UsageError as error:  # fails this image only
        raise ImageError(error.message, hint=error.hint) from None


def _spooled(names: list[str], stack: ExitStack) -> Iterator[str]:
    """Write sorted names to a temporary file, and read them back one by one."""
    file = tempfile.TemporaryFile(prefix="wsss-")  # noqa: SIM115
    stack.callback(file.close)
    for name in names:
        file.write(name.encode("utf-8", "surrogateescape") + b"\n")
    file.seek(0)
    return (line[:-1].decode("utf-8", "surrogateescape") for line in file)
