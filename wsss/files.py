"""Write files and folders atomically, even if the process is killed or power fails."""

from __future__ import annotations

import itertools
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import WsssError
from .lock import NoLocks, lock

_COUNT = itertools.count(secrets.randbits(48))  # machines that share a folder may use the same process id


def write_atomically(path: Path, data: bytes | memoryview, *, temporary: Path | None = None, sync: bool = True) -> None:
    """Write a file atomically. Raises as `replacing` does."""
    with replacing(path, temporary=temporary, sync=sync) as file:
        file.write(data)
    if sync:
        sync_folder(path.parent)


@contextmanager
def replacing(path: Path, *, temporary: Path | None = None, sync: bool = True) -> Iterator[BinaryIO]:
    """Yield a new file that replaces ``path`` when the block ends without an error, and is deleted otherwise.

    The file is synchronized before it is renamed. Call `sync_folder` afterwards to make the new name survive a power cut.

    Args:
        temporary: folder on the same file system for the new file; None: the folder of ``path``.
        sync: wait for the disk. Without it a power cut may leave an empty or partial file.

    Raises:
        OSError: it cannot be written.
    """
    new = (temporary or path.parent) / f".{os.getpid()}-{next(_COUNT)}.tmp"
    try:
        with new.open("xb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise


def sync_folder(path: Path) -> None:
    """Synchronize a folder, so that the names in it survive a power cut. Raises OSError."""
    if os.name == "nt":  # Windows cannot synchronize folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def publishing(target: Path, *, error: type[WsssError] = WsssError, sync: bool = True) -> Iterator[Path]:
    """Yield a new folder beside ``target`` that replaces it when the block ends without an error, and is deleted otherwise.

    The new folder is called ``.NAME.partial-*``, and the one it replaces ``.NAME.old-*`` until it is deleted. A process killed
    between the two renames leaves no ``target``; the next call, or `restore`, moves it back.

    Before the block, leftovers of killed processes are cleaned up: ``target`` is restored if it was moved away, and unfinished
    and replaced folders are deleted. A lock on ``.NAME.lock`` beside the folder lets one process publish it at a time. Where the
    file system has no locks, nothing is cleaned up.

    Args:
        target: may exist as a folder or a link to one; a link itself is replaced.
        error: the class raised when another process publishes ``target``.
        sync: wait until all files of the new folder are on the disk before it is renamed.

    Raises:
        WsssError (``error``): another process publishes it. OSError: something cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with suppress(NoLocks):
            stack.enter_context(lock(_lock_of(target), where=str(target), error=error))
            _clean_up(target)
        new = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
        new.mkdir()
        try:
            yield new
            if sync:
                _sync_tree(new)
            _replace(new, target)
        finally:
            _delete(new)


def restore(target: Path) -> bool:
    """Restore a folder that a killed `publishing` had moved away. Returns whether it did."""
    if target.exists() or not _leftovers(target, "old"):
        return False
    with suppress(OSError, WsssError), lock(_lock_of(target), where=str(target)):
        return _restore(target)
    return False


def _lock_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def _clean_up(target: Path) -> None:
    """Restore or delete leftovers. The caller holds the lock, so their processes have ended."""
    _restore(target)
    for path in (*_leftovers(target, "partial"), *_leftovers(target, "old")):
        _delete(path)


def _restore(target: Path) -> bool:
    if target.exists() or not (old := _leftovers(target, "old")):
        return False
    max(old, key=lambda path: path.lstat().st_ctime_ns).rename(target)
    sync_folder(target.parent)
    return True


def _leftovers(target: Path, kind: str) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.{kind}-\w{{8}}")
    with suppress(OSError):
        return [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]
    return []


def _replace(new: Path, target: Path) -> None:
    if target.is_dir():
        old = target.with_name(new.name.replace(".partial-", ".old-"))
        target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            old.rename(target)
            raise
        sync_folder(target.parent)
        _delete(old)
    else:
        new.rename(target)
        sync_folder(target.parent)


def _delete(folder: Path) -> None:
    if folder.is_symlink():  # only the link is deleted
        folder.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for path, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(path, name), "rb+") as file:  # Windows requires a file open for writing
                os.fsync(file.fileno())
        sync_folder(Path(path))


def cache_folder() -> Path:
    """Folder of downloads and of embedded texts: ``$WSSS_CACHE``, else ``wsss`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if "WSSS_CACHE" in os.environ:
        return Path(os.environ["WSSS_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "wsss"
