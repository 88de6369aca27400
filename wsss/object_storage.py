"""Folders in object stores, through fsspec: ``s3://``, ``gs://`` and its other protocols. Only this module imports fsspec.

Nothing is cached: each call asks the store. Errors that may be temporary are retried a few times. Every exception of a backend
is converted to an OSError with its text in ``strerror``, so that callers handle a store like a disk.
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
"""Seconds before the second and the third attempt; the backends retry too."""
PAGE = 1000
"""Names per listing: the maximum of S3."""
CHUNK = 1 << 20
"""Bytes of a long file that are read at a time."""
_ETAGS = ("ETag", "etag", "md5Hash", "content_md5", "generation", "mtime", "LastModified", "last_modified", "updated", "created")
"""Keys of the backends for a value that changes with the file, most reliable first."""
_PERMANENT = {
    errno.EINVAL,
    errno.ENOSPC,
    getattr(errno, "EDQUOT", errno.ENOSPC),
    errno.EROFS,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.EPERM,
}
"""Errors that are not retried."""


class Entry(NamedTuple):
    """A file: its name below the folder, its size in bytes, and a tag that changes when it is rewritten."""

    name: str
    size: int
    etag: str


def is_url(text: str) -> bool:
    """Whether the text is a URL that is opened through fsspec; ``file://`` is not."""
    return re.match(r"[a-z][a-z0-9+.-]*://", text) is not None and not text.startswith("file://")


def hint_of(error: OSError) -> str:
    """A hint for the user about an error of this module."""
    if error.errno == errno.EACCES:
        return "check the credentials and their permissions (S3: AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
    if error.errno == errno.ENOENT:
        return "check the name of the bucket and of its folder"
    return "check the network and the name of the server (S3: AWS_ENDPOINT_URL)"


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of an object store. Can be pickled and used by any number of processes. Names have forward slashes.

    Writes are atomic because PUT is atomic in object stores.

    All methods raise OSError: FileNotFoundError, PermissionError, FileExistsError, or one with ``errno`` EIO after several
    attempts; and WsssError if the package that opens such URLs is not installed.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    # ---- reading ----

    def entry(self, name: str) -> Entry:
        """Get a file's entry."""
        fs, root = _opened(self.url)
        info = _retried(lambda: fs.info(_joined(root, name)))
        if info["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "no such file")
        return Entry(name, int(info["size"]), _etag_of(info))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read a file's bytes from ``start`` to ``stop`` or the end; the range must not be empty."""
        fs, root = _opened(self.url)
        limits = {"start": start, "end": stop} if start or stop is not None else {}
        data: bytes = _retried(lambda: fs.cat_file(_joined(root, name), **limits))
        return data

    def lines(self, name: str, max_bytes: int = 1 << 20) -> Iterator[bytes]:
        """Read a file's lines with their line breaks, in chunks; a last line without one is skipped.

        Args:
            max_bytes: longest line; a longer one raises OSError (EFBIG).
        """
        size, rest = self.entry(name).size, b""
        for start in range(0, size, CHUNK):
            *lines, rest = (rest + self.read(name, start, min(start + CHUNK, size))).split(b"\n")
            if len(rest) > max_bytes:
                raise OSError(errno.EFBIG, f"a line of more than {max_bytes:,} bytes")
            yield from (line + b"\n" for line in lines)

    def scan(self, below: str = "") -> tuple[list[Entry], list[str]]:
        """List the files and sub-folders of the folder ``below``; both are empty if it does not exist.

        ``below`` is "" or ends with a slash. Names are relative to this folder; those of sub-folders end with a slash.
        """
        fs, root = _opened(self.url)
        if _is_s3(fs):
            files, folders = [], list[str]()
            for page_files, page_folders, _ in _s3_pages(fs, root, below, delimiter="/"):
                files += page_files
                folders += page_folders
            return files, folders
        where = _joined(root, below.rstrip("/"))
        try:
            listed = _retried(lambda: fs.ls(where, detail=True))
        except FileNotFoundError:
            return [], []
        inside = [info for info in listed if info["name"].rstrip("/") != where.rstrip("/")]  # some list the folder itself too
        infos = sorted(((below + info["name"].rstrip("/").rpartition("/")[2], info) for info in inside), key=lambda pair: pair[0])
        entries = [Entry(name, int(info["size"] or 0), _etag_of(info)) for name, info in infos if info["type"] == "file"]
        return entries, [f"{name}/" for name, info in infos if info["type"] == "directory"]

    def walk(self, below: str = "") -> Iterator[Entry]:
        """All files below a folder, sorted by name (code points).

        Memory: on S3 one page of names, on other stores the names of one folder and of those above it.
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
        """Write a file, replacing an existing one."""
        fs, root = _opened(self.url)
        _retried(lambda: fs.pipe_file(_joined(root, name), data))

    def write_lines(self, name: str, lines: Iterable[bytes]) -> None:
        """Write a file that may be too long for memory, through a local temporary file."""
        fs, root = _opened(self.url)
        with tempfile.NamedTemporaryFile(prefix="wsss-") as file:
            file.writelines(lines)
            file.flush()
            _retried(lambda: fs.put_file(file.name, _joined(root, name)))

    def create(self, name: str, data: bytes) -> str:
        """Write a file that must not exist, atomically where the store supports it (S3, GCS). Returns its etag."""
        fs, root = _opened(self.url)
        with suppress(FileNotFoundError):  # some S3-compatible servers ignore conditions and would overwrite it
            self.entry(name)
            raise FileExistsError(errno.EEXIST, "written by another")
        if _is_s3(fs):
            return _s3_put(fs, _joined(root, name), data, IfNoneMatch="*")
        _retried(lambda: fs.pipe_file(_joined(root, name), data, mode="create"))
        return self.entry(name).etag

    def swap(self, name: str, data: bytes, etag: str) -> str:
        """Replace a file that must have this etag, atomically on S3. Returns the new etag. Raises FileExistsError otherwise."""
        fs, root = _opened(self.url)
        if _is_s3(fs):
            return _s3_put(fs, _joined(root, name), data, IfMatch=f'"{etag}"')
        if self.entry(name).etag != etag:
            raise FileExistsError(errno.EEXIST, "written by another")
        self.write(name, data)
        return self.entry(name).etag

    def delete(self, names: Sequence[str]) -> None:
        """Delete files; missing ones are ignored."""
        fs, root = _opened(self.url)
        if _is_s3(fs):
            for start in range(0, len(names), PAGE):
                _s3_delete(fs, [_joined(root, name) for name in names[start : start + PAGE]])
            return
        for name in names:
            with suppress(FileNotFoundError):
                _retried(partial(fs.rm_file, _joined(root, name)))


class Presence:
    """Set of the files below a folder. One page of names answers many look-ups if they are nearly in order."""

    def __init__(self, folder: RemoteFolder, below: str) -> None:
        self._folder, self._below = folder, below
        self._pages: list[tuple[str, str | None, frozenset[str]]] = []
        """Cached pages, newest last: the name before it, its last name (None: no limit), and its names."""
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
        files, _, is_truncated = next(_s3_pages(fs, root, self._below, after=after))
        until = None if not is_truncated else files[-1].name if files else name
        self._pages = [*self._pages[-3:], (after, until, frozenset(file.name for file in files))]
        return name in self._pages[-1][2]

    def _list(self, parent: str) -> frozenset[str]:
        return frozenset(file.name for file in self._folder.scan(parent)[0])


# ---- fsspec ----


def _opened(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it."""
    return _open(url, os.getpid())  # by process: connections do not survive a fork


@functools.lru_cache(maxsize=256)
def _open(url: str, _: int) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ModuleNotFoundError as error:
        if error.name and not error.name.startswith("fsspec"):
            raise
        raise WsssError(f"{url}: needs fsspec, which is not installed", hint=install_line("remote")) from None
    options: dict[str, Any] = {"use_listings_cache": False}
    if url.startswith(("s3://", "s3a://")):
        options["max_concurrency"] = 2  # parts of 50 MB, when a long manifest is written
    try:
        fs, root = url_to_fs(url, **options)
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
    response = _retried(lambda: fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition))
    return str(response["ETag"]).strip('"')


def _s3_delete(fs: Any, paths: Sequence[str]) -> None:
    keys = [{"Key": fs.split_path(path)[1]} for path in paths]
    bucket = fs.split_path(paths[0])[0]
    response = _retried(lambda: fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": keys, "Quiet": True}))
    if failed := response.get("Errors"):
        raise PermissionError(errno.EACCES, f"{failed[0]['Key']} cannot be deleted: {failed[0].get('Message', '')}")


def _s3_pages(
    fs: Any, root: str, below: str, *, after: str = "", delimiter: str = ""
) -> Iterator[tuple[list[Entry], list[str], bool]]:
    """Pages of files and sub-folders, and whether more follow. There is at least one page, which may be empty."""
    bucket, key, _ = fs.split_path(f"{root}/") if "/" in root else (root, "", None)
    prefix = f"{key.rstrip('/')}/" if key else ""
    request = {"Bucket": bucket, "Prefix": prefix + below, "MaxKeys": PAGE, **fs.req_kw}
    request |= {"Delimiter": delimiter} if delimiter else {}
    request |= {"StartAfter": prefix + after} if after else {}
    last = ""
    while True:
        page = _retried(lambda: fs.call_s3("list_objects_v2", **request))
        files = [
            Entry(each["Key"][len(prefix) :], int(each["Size"]), each["ETag"].strip('"'))
            for each in page.get("Contents", ())
            if not each["Key"].endswith("/")  # placeholders for folders, created by web consoles
        ]
        for file in files:
            if file.name <= last:
                raise OSError(errno.EIO, f"lists its files out of order, {file.name!r} after {last!r} (a directory bucket?)")
            last = file.name
        yield files, [each["Prefix"][len(prefix) :] for each in page.get("CommonPrefixes", ())], bool(page.get("IsTruncated"))
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _retried(call: Callable[[], T]) -> T:
    """Call a backend; retry errors that may be temporary."""
    for wait in (*WAITS, None):
        try:
            return call()
        except Exception as error:  # a backend may raise exceptions of botocore, aiohttp, google.auth and others
            converted = _os_error(error)
        if converted.errno != errno.EIO or wait is None:
            break
        time.sleep(wait)
    raise converted


def _os_error(error: Exception) -> OSError:
    text = str(error) or type(error).__name__
    response = getattr(error.__cause__, "response", None)  # of the botocore exception that s3fs wrapped
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
    if isinstance(error, OSError) and error.errno in _PERMANENT:
        return OSError(error.errno, error.strerror or text)
    return OSError(errno.EIO, text)
