"""Sources of photographs: a local folder, a folder in an object store, or a list of files and URLs."""

from __future__ import annotations

import codecs
import hashlib
import heapq
import os
import posixpath
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count, groupby, islice
from pathlib import Path, PurePosixPath
from typing import ClassVar, Protocol
from urllib.parse import unquote

from ...errors import ImageError, UsageError
from ...object_storage import Entry, RemoteFolder, hint_of, is_url
from ...photographs import MAX_BYTES, SUFFIXES, ImageFile, read_file, stamp_of
from ...store.local import Shard
from .listing import Folder, Found, LeftOut, Listing, is_of_shard, label_of

SORTED_AT_ONCE = 200_000
"""Most lines of a list in memory at a time."""
LONGEST_LINE = 1 << 16
"""Most characters of a line of a list; no path or URL is longer."""


class Source(Protocol):
    """Where photographs are. Can be pickled and used by any number of threads and processes."""

    @property
    def is_remote(self) -> bool:
        """Whether reading mostly waits for a network."""
        ...

    def listing(self, out: Path | RemoteFolder | None = None, shard: Shard | None = None) -> Listing:
        """The images.

        Args:
            out: the label store, whose labels are not photographs.
            shard: (I, N): only those of the I-th of N shares.
        """
        ...

    def read(self, name: str) -> ImageFile:
        """Read one image's bytes. Raises ImageError as `read_file` does."""
        ...

    def stamp(self, name: str) -> Mapping[str, int | str]:
        """Metadata that changes with the image: ``bytes``, and ``mtime_ns`` or ``etag``. Raises OSError or ImageError."""
        ...


@dataclass(frozen=True)
class LocalImages:
    """The images of a folder on this machine and of its sub-folders, or the one image ``path``.

    only: images and sub-folders below ``path``, with forward slashes; empty takes all.
    """

    path: Path
    only: frozenset[str] = frozenset()
    is_remote: ClassVar[bool] = False

    def __str__(self) -> str:
        return str(self.path)

    def listing(self, out: Path | RemoteFolder | None = None, shard: Shard | None = None) -> Folder:
        """As `Source.listing`."""
        return Folder(self.path, out if isinstance(out, Path) else None, shard, only=self.only)

    def read(self, name: str) -> ImageFile:
        """As `Source.read`."""
        return read_file(self.path, name)

    def stamp(self, name: str) -> Mapping[str, int | str]:
        """As `Source.stamp`."""
        return stamp_of(self.path, name)


@dataclass(frozen=True)
class RemoteImages:
    """The images of a folder in an object store and of its sub-folders, or ``only`` one of them."""

    folder: RemoteFolder
    only: str = ""
    is_remote: ClassVar[bool] = True

    def __str__(self) -> str:
        return f"{self.folder}/{self.only}" if self.only else str(self.folder)

    def listing(self, out: Path | RemoteFolder | None = None, shard: Shard | None = None) -> Listing:
        """As `Source.listing`, without hidden files and folders. Pages are fetched when they are needed."""
        return _Listed(self, out, shard)

    def found(
        self, out: Path | RemoteFolder | None, shard: Shard | None = None, left_out: LeftOut | None = None
    ) -> Iterator[Found]:
        """Yield the images of `listing`, and fill ``left_out`` with the other files."""
        inside = f"{self.folder}/"
        leave_out = f"{out}/".removeprefix(inside) if isinstance(out, RemoteFolder) and f"{out}/".startswith(inside) else None
        try:
            for entry in [self.folder.entry(self.only)] if self.only else self.folder.walk():
                name = PurePosixPath(entry.name)
                if any(part.startswith(".") for part in name.parts) or (leave_out and entry.name.startswith(leave_out)):
                    continue
                if not is_of_shard(entry.name, shard):
                    continue
                if name.suffix.lower() in SUFFIXES:
                    yield Found(entry.name, label_of(entry.name), _stamp(entry))
                elif left_out is not None:
                    left_out.count(entry.name)
        except OSError as error:
            raise ImageError(f"{self}: cannot be listed: {error.strerror or error}", hint=hint_of(error)) from None

    def stamp(self, name: str) -> Mapping[str, int | str]:
        """As `Source.stamp`."""
        return _stamp(self.folder.entry(name))

    def read(self, name: str) -> ImageFile:
        """As `Source.read`."""
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
    is_remote: ClassVar[bool] = True
    """It may list URLs."""

    def __str__(self) -> str:
        return str(self.path)

    def listing(self, out: Path | RemoteFolder | None = None, shard: Shard | None = None) -> Listing:
        """As `Source.listing`: each image once, in any order of the list."""
        return _Listed(self, out, shard)

    def found(
        self, out: Path | RemoteFolder | None, shard: Shard | None = None, left_out: LeftOut | None = None
    ) -> Iterator[Found]:
        """Yield the images of `listing`; nothing else is in a list."""
        try:
            with ExitStack() as stack:
                names = filter(None, map(_name_of, self._lines(stack)))
                parts: list[Iterator[str]] = []
                while part := sorted(islice(names, SORTED_AT_ONCE)):
                    parts.append(_spooled(part, stack) if len(part) == SORTED_AT_ONCE or parts else iter(part))
                each = (name for name, _ in groupby(heapq.merge(*parts)))
                yield from (Found(name, label_of(name)) for name in each if is_of_shard(name, shard))
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
        """As `Source.stamp`."""
        source, inside = _source_of(name)
        return source.stamp(inside)

    def read(self, name: str) -> ImageFile:
        """As `Source.read`."""
        source, inside = _source_of(name)
        try:
            file = source.read(inside)
        except ImageError as error:
            message = error.message.replace(inside, name, 1) if inside != name else error.message
            if not is_url(name) and PurePosixPath(name).suffix.lower() not in SUFFIXES and not _exists(inside):
                message += "; a list has one path or URL a line, with its ending, without quotes or further columns"
            raise ImageError(message, hint=error.hint) from None
        return ImageFile(name=name, data=file.data, mtime_ns=file.mtime_ns, etag=file.etag, sha256=file.sha256)


@dataclass(frozen=True)
class Chosen:
    """Some images of a source, with their names and labels there.

    Args:
        source: of all images.
        leave_out: names of images that are not taken.
        only: names of the images that are taken; None takes all.
        every: of these, the first and every N-th after it, by name.
        limit: most images, the first by name; None takes all.
    """

    source: Source
    leave_out: frozenset[str] = frozenset()
    only: frozenset[str] | None = None
    every: int = 1
    limit: int | None = None

    def __str__(self) -> str:
        return str(self.source)

    @property
    def is_remote(self) -> bool:
        """As `Source.is_remote`."""
        return self.source.is_remote

    def listing(self, out: Path | RemoteFolder | None = None, shard: Shard | None = None) -> Listing:
        """As `Source.listing`."""
        return _Filtered(self, self.source.listing(out, shard))

    def takes(self, image: Found) -> bool:
        """Whether an image is taken, apart from the limit."""
        return image.name not in self.leave_out and (self.only is None or image.name in self.only)

    def read(self, name: str) -> ImageFile:
        """As `Source.read`."""
        return self.source.read(name)

    def stamp(self, name: str) -> Mapping[str, int | str]:
        """As `Source.stamp`."""
        return self.source.stamp(name)


@dataclass(frozen=True)
class _Filtered:
    chosen: Chosen
    images: Listing

    @property
    def left_out(self) -> LeftOut:
        return self.images.left_out

    @property
    def path(self) -> object:
        return self.images.path

    def __iter__(self) -> Iterator[Found]:
        taken = islice(filter(self.chosen.takes, self.images), 0, None, self.chosen.every)
        return islice(taken, self.chosen.limit)


@dataclass(frozen=True)
class _Listed:
    path: RemoteImages | FileList
    out: Path | RemoteFolder | None
    shard: Shard | None
    left_out: LeftOut = field(default_factory=LeftOut)

    def __iter__(self) -> Iterator[Found]:
        self.left_out.clear()
        return self.path.found(self.out, self.shard, self.left_out)


def source_of(*texts: str) -> Source:
    """The source that IMAGES names: a URL, a list (``.txt``), a folder or an image; or several folders and images, whose names
    are then their paths below the folder that all of them are in.

    Raises:
        UsageError: one of several is a URL or a list, or there is nothing of that name.
    """
    if len(texts) > 1:
        return _several(texts)
    (text,) = texts
    if is_url(text):
        url = text.rstrip("/")
        parent, _, name = url.rpartition("/")
        alone = PurePosixPath(name).suffix.lower() in SUFFIXES and not text.endswith("/") and not parent.endswith("/")
        return RemoteImages(RemoteFolder(parent), name) if alone else RemoteImages(RemoteFolder(url))
    path = local_path(text)
    return FileList(path) if path.suffix.lower() == ".txt" and path.is_file() else LocalImages(path)


def _several(texts: Sequence[str]) -> Source:
    paths = []
    for text in texts:
        path = local_path(text)
        if is_url(text) or path.suffix.lower() == ".txt":
            raise UsageError(
                f"{text}: is one of several IMAGES, which must be folders and images", hint="label it in its own run"
            )
        if not path.is_dir() and path.suffix.lower() not in SUFFIXES:
            raise UsageError(f"{text}: expected a folder or an image", hint=f"images end in {' '.join(SUFFIXES)}")
        if not path.exists():
            raise UsageError(f"{text}: expected a folder or an image, found nothing", hint="check its spelling")
        paths.append(Path(os.path.abspath(path)))
    root = Path(os.path.commonpath([path.parent if path.is_file() else path for path in paths]))
    if root in paths:
        return LocalImages(root)
    return LocalImages(root, frozenset(path.relative_to(root).as_posix() for path in paths))


def local_folder(source: Source) -> Path | None:
    """The folder, or the single image, whose images a source has; None for lists and object stores."""
    while isinstance(source, Chosen):
        source = source.source
    return source.path if isinstance(source, LocalImages) else None


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


def _source_of(name: str) -> tuple[Source, str]:
    if is_url(name):
        parent, _, last = name.rpartition("/")
        return RemoteImages(RemoteFolder(parent)), last
    try:
        return (LocalImages(Path()), name) if not name.startswith("file://") else (LocalImages(Path("/")), str(local_path(name)))
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
