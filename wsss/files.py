"""Publish files and folders whole or not at all, also when the process is killed or the power is cut."""

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

_COUNT = itertools.count(secrets.randbits(48))  # machines that share a folder may have processes of one number


def write_atomically(path: Path, data: bytes | memoryview, *, temporary: Path | None = None, sync: bool = True) -> None:
    """Write a file whole or not at all. Raises as `replacing` does."""
    with replacing(path, temporary=temporary, sync=sync) as file:
        file.write(data)
    if sync:
        sync_folder(path.parent)


@contextmanager
def replacing(path: Path, *, temporary: Path | None = None, sync: bool = True) -> Iterator[BinaryIO]:
    """Yield a new file that replaces ``path`` when the block ends without an error, and is deleted otherwise.

    The file is synchronized before it is renamed; that the new name survives a power cut takes a `sync_folder` after it.

    Args:
        temporary: a folder on the same file system for the new file; None: that of ``path``.
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
    """Wait until the names in a folder would survive a power cut. Raises OSError."""
    if os.name == "nt":  # Windows synchronizes no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def publishing(target: Path, *, error: type[WsssError] = WsssError, sync: bool = True) -> Iterator[Path]:
    """Yield a new folder beside ``target`` that replaces it when the block ends without an error, and is deleted otherwise.

    Before the block, what killed processes left is mended: a folder that one of them had moved away is ``target`` again,
    unfinished and replaced ones are deleted. One process at a time publishes a folder: ``.NAME.lock`` beside it is held, which
    the operating system releases however the process ends. Where there are no locks, nothing is mended.

    The new folder is called ``.NAME.partial-*`` and the one it replaces ``.NAME.old-*`` until it is deleted. A process killed
    between the two renames leaves no ``target``, which the next one, or `restore`, brings back.

    Args:
        target: absent, or a folder or a link to one; a link itself is replaced.
        error: the class raised where another process publishes ``target``.
        sync: wait until all files of the new folder are on the disk before it is renamed.

    Raises:
        WsssError (``error``): another process publishes it. OSError: something cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with suppress(NoLocks):
            stack.enter_context(lock(_lock_of(target), where=str(target), error=error))
            _mend(target)
        new = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
        new.mkdir()
        try:
            yield new
            if sync:
                _sync_tree(new)
            _put(new, target)
        finally:
            _delete(new)


def restore(target: Path) -> bool:
    """Bring back a folder that a killed `publishing` had moved away; False where there is nothing to do or it cannot be done."""
    if target.exists() or not _left(target, "old"):
        return False
    with suppress(OSError, WsssError), lock(_lock_of(target), where=str(target)):
        return _restore(target)
    return False


def _lock_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def _mend(target: Path) -> None:
    """What is left of others is left of the dead: the caller holds the lock."""
    _restore(target)
    for path in (*_left(target, "partial"), *_left(target, "old")):
        _delete(path)


def _restore(target: Path) -> bool:
    if target.exists() or not (old := _left(target, "old")):
        return False
    max(old, key=lambda path: path.lstat().st_ctime_ns).rename(target)
    sync_folder(target.parent)
    return True


def _left(target: Path, what: str) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.{what}-\w{{8}}")
    with suppress(OSError):
        return [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]
    return []


def _put(new: Path, target: Path) -> None:
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
    if folder.is_symlink():  # what was published may have been a link; what it leads to stays
        folder.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for path, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(path, name), "rb+") as file:  # Windows synchronizes what is open for writing
                os.fsync(file.fileno())
        sync_folder(Path(path))
