"""Folders in object stores, through fsspec: ``s3://``, ``gs://`` and whatever else it opens. Only this module imports it.

Nothing is cached: each call asks the store. What may pass is tried again a few times. Whatever a backend raises comes out
as an OSError with its text in ``strerror``, so that callers treat a store as they treat a disk.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

from .errors import WsssError
from .extras import install_line

T = TypeVar("T")

WAITS = (0.5, 2.0)
"""Seconds before the second and the third try; the backends retry on their own too."""
PAGE = 1000
"""Names that S3 lists at once, its most."""
CHUNK = 1 << 20
"""Bytes of a long file that are read at once."""
_ETAGS = ("ETag", "etag", "md5Hash", "content_md5", "generation", "mtime", "LastModified", "last_modified", "updated", "created")
"""Under these keys backends tell what changes with a file, the surest first."""
_LASTING = {
    errno.EINVAL,
    errno.ENOSPC,
    getattr(errno, "EDQUOT", errno.ENOSPC),
    errno.EROFS,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.EPERM,
}
"""What trying again does not change."""


class Entry(NamedTuple):
    """A file: its name below its folder, its bytes, and what changes when it is written anew."""

    name: str
    size: int
    etag: str


def is_url(text: str) -> bool:
    """Does this name something that is reached through fsspec? ``file://`` does not."""
    return re.match(r"[a-z][a-z0-9+.-]*://", text) is not None and not text.startswith("file://")


def hint_of(error: OSError) -> str:
    """What the user may do about an error of this module."""
    if error.errno == errno.EACCES:
        return "check the credentials and what they may do (S3: AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
    if error.errno == errno.ENOENT:
        return "check the name of the bucket and of the folder in it"
    return "check the network and the name of the server (S3: AWS_ENDPOINT_URL)"


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of an object store; may be pickled, any number of processes may hold one. Names have forward slashes.

    A write is whole or not at all as far as the store's own PUT is, which of object stores is true.

    All methods raise OSError: FileNotFoundError, PermissionError, FileExistsError, or one with ``errno`` EIO after
    several tries; and WsssError where the package that opens such a URL is not installed.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    # ---- reading ----

    def entry(self, name: str) -> Entry:
        """What is known of a file."""
        fs, root = _opened(self.url)
        info = _asked(lambda: fs.info(_joined(root, name)))
        if info["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "no such file")
        return Entry(name, int(info["size"]), _etag_of(info))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Its bytes from ``start`` to ``stop`` or the end; the range must not be empty."""
        fs, root = _opened(self.url)
        most = {} if stop is None else {"start": start, "end": stop}
        data: bytes = _asked(lambda: fs.cat_file(_joined(root, name), **most))
        return data

    def lines(self, name: str, most_bytes: int = 1 << 20) -> Iterator[bytes]:
        """Its lines with their line breaks, however long it is; a last one without is left out.

        Args:
            most_bytes: of a line; a longer one raises OSError (EFBIG).
        """
        size, rest = self.entry(name).size, b""
        for start in range(0, size, CHUNK):
            *lines, rest = (rest + self.read(name, start, min(start + CHUNK, size))).split(b"\n")
            if len(rest) > most_bytes:
                raise OSError(errno.EFBIG, f"a line of more than {most_bytes:,} bytes")
            yield from (line + b"\n" for line in lines)

    def scan(self, below: str = "") -> tuple[list[Entry], list[str]]:
        """The files and the sub-folders of one folder, which ends with a slash; both empty where it does not exist.

        ``below`` is "" for the folder itself; names come whole, those of sub-folders with their slash.
        """
        fs, root = _opened(self.url)
        if _is_s3(fs):
            files, folders = [], list[str]()
            for some, inside, _ in _s3_pages(fs, root, below, delimiter="/"):
                files += some
                folders += inside
            return files, folders
        where = _joined(root, below.rstrip("/"))
        try:
            found = _asked(lambda: fs.ls(where, detail=True))
        except FileNotFoundError:
            return [], []
        told = sorted(((below + info["name"].rstrip("/").rpartition("/")[2], info) for info in found), key=lambda each: each[0])
        entries = [Entry(name, int(info["size"] or 0), _etag_of(info)) for name, info in told if info["type"] == "file"]
        return entries, [f"{name}/" for name, info in told if info["type"] == "directory" and name != below.rstrip("/")]

    def walk(self, below: str = "") -> Iterator[Entry]:
        """All files below a folder by name (order of code points).

        Of S3 a page is in memory at a time, of others one folder's names and those above it.
        """
        fs, root = _opened(self.url)
        if _is_s3(fs):
            for files, _, _ in _s3_pages(fs, root, below):
                yield from files
            return
        files, folders = self.scan(below)
        for name, entry in sorted([*((file.name, file) for file in files), *((folder, None) for folder in folders)]):
            if entry is None:
                yield from self.walk(name)
            else:
                yield entry

    # ---- writing ----

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, or writes it anew."""
        fs, root = _opened(self.url)
        _asked(lambda: fs.pipe_file(_joined(root, name), data))

    def write_lines(self, name: str, lines: Iterable[bytes]) -> None:
        """The same of what may be too long for memory; it is gathered in a temporary file of this machine."""
        fs, root = _opened(self.url)
        with tempfile.NamedTemporaryFile(prefix="wsss-") as file:
            file.writelines(lines)
            file.flush()
            _asked(lambda: fs.put_file(file.name, _joined(root, name)))

    def create(self, name: str, data: bytes) -> str:
        """Writes a file that must not exist yet, in one step where the store can (S3, GCS); gives its etag."""
        fs, root = _opened(self.url)
        with suppress(FileNotFoundError):  # some servers that speak S3 know no conditions: they would write over it
            self.entry(name)
            raise FileExistsError(errno.EEXIST, "written by another")
        if _is_s3(fs):
            return _s3_put(fs, _joined(root, name), data, IfNoneMatch="*")
        _asked(lambda: fs.pipe_file(_joined(root, name), data, mode="create"))
        return self.entry(name).etag

    def swap(self, name: str, data: bytes, etag: str) -> str:
        """Writes a file anew that must have this etag, in one step on S3; gives the new one. Raises FileExistsError if not."""
        fs, root = _opened(self.url)
        if _is_s3(fs):
            return _s3_put(fs, _joined(root, name), data, IfMatch=f'"{etag}"')
        if self.entry(name).etag != etag:
            raise FileExistsError(errno.EEXIST, "written by another")
        self.write(name, data)
        return self.entry(name).etag

    def delete(self, names: Sequence[str]) -> None:
        """Deletes files; one that is not there is no error."""
        fs, root = _opened(self.url)
        if _is_s3(fs):
            for start in range(0, len(names), PAGE):
                _s3_delete(fs, [_joined(root, name) for name in names[start : start + PAGE]])
            return
        for name in names:
            with suppress(FileNotFoundError):
                _asked(partial(fs.rm_file, _joined(root, name)))


class Presence:
    """Which files there are below a folder: a page of names answers for many, where they are asked for nearly in order."""

    def __init__(self, folder: RemoteFolder, below: str) -> None:
        self._folder, self._below = folder, below
        self._pages: list[tuple[str, str | None, frozenset[str]]] = []
        """After which name, up to which, and the names between; the last one used last."""
        self._names_of = functools.lru_cache(maxsize=8)(self._list)

    def __contains__(self, name: str) -> bool:
        fs, root = _opened(self._folder.url)
        name = self._below + name
        if not _is_s3(fs):
            return name in self._names_of(name[: name.rfind("/") + 1])
        for page in reversed(self._pages):
            if page[0] < name and (page[1] is None or name <= page[1]):
                return name in page[2]
        after = name[:-1]
        files, _, more = next(_s3_pages(fs, root, self._below, after=after))
        until = None if not more else files[-1].name if files else name
        self._pages = [*self._pages[-3:], (after, until, frozenset(file.name for file in files))]
        return name in self._pages[-1][2]

    def _list(self, parent: str) -> frozenset[str]:
        return frozenset(file.name for file in self._folder.scan(parent)[0])


# ---- fsspec ----


def _opened(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it."""
    return _open(url, os.getpid())  # its connections do not survive a fork


@functools.lru_cache(maxsize=256)
def _open(url: str, _: int) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ModuleNotFoundError as error:
        if error.name and not error.name.startswith("fsspec"):
            raise
        raise WsssError(f"{url}: needs fsspec, which is not installed", hint=install_line("remote")) from None
    how: dict[str, Any] = {"use_listings_cache": False}
    if url.startswith(("s3://", "s3a://")):
        how["max_concurrency"] = 2  # of 50 MB each, when a long manifest is written
    try:
        fs, root = url_to_fs(url, **how)
    except ImportError as error:
        raise WsssError(f"{url}: {error}", hint=install_line("remote")) from None
    except ValueError as error:
        raise WsssError(f"{url}: expected s3://, gs:// or another URL that fsspec opens: {error}") from None
    return fs, str(root).rstrip("/")


def _joined(root: str, name: str) -> str:
    return f"{root}/{name}" if name else root


def _etag_of(info: dict[str, Any]) -> str:
    return next((str(info[key]).strip('"') for key in _ETAGS if info.get(key) is not None), "")


def _is_s3(fs: Any) -> bool:
    return hasattr(fs, "call_s3")


def _s3_put(fs: Any, path: str, data: bytes, **condition: str) -> str:
    bucket, key, _ = fs.split_path(path)
    told = _asked(lambda: fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition))
    return str(told["ETag"]).strip('"')


def _s3_delete(fs: Any, paths: Sequence[str]) -> None:
    keys = [{"Key": fs.split_path(path)[1]} for path in paths]
    bucket = fs.split_path(paths[0])[0]
    told = _asked(lambda: fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": keys, "Quiet": True}))
    if failed := told.get("Errors"):
        raise PermissionError(errno.EACCES, f"{failed[0]['Key']} cannot be deleted: {failed[0].get('Message', '')}")


def _s3_pages(
    fs: Any, root: str, below: str, *, after: str = "", delimiter: str = ""
) -> Iterator[tuple[list[Entry], list[str], bool]]:
    """Pages of files and sub-folders, and whether more follow. At least one comes, which may be empty."""
    bucket, key, _ = fs.split_path(f"{root}/") if "/" in root else (root, "", None)
    prefix = f"{key.rstrip('/')}/" if key else ""
    how = {"Bucket": bucket, "Prefix": prefix + below, "MaxKeys": PAGE, **fs.req_kw}
    how |= {"Delimiter": delimiter} if delimiter else {}
    how |= {"StartAfter": prefix + after} if after else {}
    last = ""
    while True:
        page = _asked(lambda: fs.call_s3("list_objects_v2", **how))
        files = [
            Entry(each["Key"][len(prefix) :], int(each["Size"]), each["ETag"].strip('"'))
            for each in page.get("Contents", ())
            if not each["Key"].endswith("/")  # what consoles make of a new folder
        ]
        for file in files:
            if file.name <= last:
                raise OSError(errno.EIO, f"lists its files out of order, {file.name!r} after {last!r} (a directory bucket?)")
            last = file.name
        yield files, [each["Prefix"][len(prefix) :] for each in page.get("CommonPrefixes", ())], bool(page.get("IsTruncated"))
        if not page.get("IsTruncated"):
            return
        how["ContinuationToken"] = page["NextContinuationToken"]


def _asked(what: Callable[[], T]) -> T:
    """Asks a store; again where it may have been a moment's trouble."""
    for wait in (*WAITS, None):
        try:
            return what()
        except Exception as error:  # a backend may raise anything: botocore's, aiohttp's, google.auth's
            told = _os_error(error)
        if told.errno != errno.EIO or wait is None:
            break
        time.sleep(wait)
    raise told


def _os_error(error: Exception) -> OSError:
    text = str(error) or type(error).__name__
    response = getattr(error.__cause__, "response", None)  # botocore's, where s3fs raised its own on top
    code = response.get("Error", {}).get("Code", "") if isinstance(response, dict) else ""
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, f"not found: {text}")
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return PermissionError(errno.EACCES, text)
    if isinstance(error, FileExistsError) or code in ("PreconditionFailed", "ConditionalRequestConflict", "412"):
        return FileExistsError(errno.EEXIST, text)
    if isinstance(error, UnicodeEncodeError):
        return OSError(errno.EILSEQ, "not Unicode")
    if code == "KeyTooLongError":
        return OSError(errno.ENAMETOOLONG, text)
    if isinstance(error, OSError) and error.errno in _LASTING:
        return OSError(error.errno, error.strerror or text)
    return OSError(errno.EIO, text)
