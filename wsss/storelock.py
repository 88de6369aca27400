"""The lock of a label store: the operating system's (flock), so that a process that dies, however it dies, lets go."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .errors import StoreError


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock that is held."""

    handle: int

    def alone(self) -> bool:
        """Is nobody else here? If so, nobody can come until this lock is let go."""
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


@contextmanager
def lock(path: Path, *, shared: bool = False) -> Iterator[Lock]:
    """Holds the lock of a file, which is made, and removed by whoever leaves last.

    Args:
        shared: others who share it may come too.

    Raises:
        StoreError: another process holds it, or the file system has no locks.
    """
    handle = _take(path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    held = Lock(handle)
    try:
        yield held
    finally:
        if held.alone():
            with suppress(OSError):
                path.unlink()
        os.close(handle)


def _take(path: Path, kind: int) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            if _is_at(handle, path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
                return handle
        except OSError as error:
            holder = _holder(handle)
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise StoreError(
                    f"--out {path.parent}: another run writes to it: {holder}",
                    hint="wait for it, or give another --out",
                ) from None
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise StoreError(
                    f"--out {path.parent}: its file system has no locks: {error.strerror}",
                    hint="mount it with flock, or write to another file system",
                ) from None
            raise
        os.close(handle)  # removed by its last holder between open and flock: make it anew


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _holder(handle: int) -> str:
    try:
        told = json.loads(os.pread(handle, 1000, 0))
        return f"process {told['pid']} on {told['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "which one is not known"
