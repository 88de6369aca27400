"""File locks of the operating system (flock; on Windows LockFile), which releases them however a process ends."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .errors import StoreError, WsssError

if sys.platform == "win32":
    import msvcrt

    _LOCKED_BYTE = 1 << 30
    """Offset of the locked byte, far behind the text: Windows lets nobody read a locked byte."""

    def _flock(handle: int, *, shared: bool) -> None:
        if shared:
            raise OSError(errno.ENOTSUP, "Windows has no shared locks here")
        os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)

    def _is_alone(handle: int) -> bool:
        return True  # locks on Windows are never shared

else:
    try:
        import fcntl
    except ImportError:  # `_flock` raises when a lock is taken
        fcntl = None  # type: ignore[assignment]

    def _flock(handle: int, *, shared: bool) -> None:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "this Python has no fcntl")
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)

    def _is_alone(handle: int) -> bool:
        try:
            _flock(handle, shared=False)
        except OSError:
            return False
        return True


class NoLocks(StoreError):
    """The file system or operating system does not support the requested lock."""


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock held by this process."""

    handle: int

    def alone(self) -> bool:
        """Whether nobody shares the lock. If so, nobody else can take it until it is released."""
        return _is_alone(self.handle)


@contextmanager
def lock(path: Path, *, shared: bool = False, where: str = "", error: type[WsssError] = StoreError) -> Iterator[Lock]:
    """Hold a lock on a file, which is created here and removed by the last holder.

    Args:
        shared: other processes may hold it at the same time if they share it too. Not on Windows.
        where: name of what is locked, for messages; default: ``--out FOLDER`` with the file's folder.
        error: the class raised when another process holds it.

    Raises:
        WsssError (``error``): another process holds it. NoLocks: unsupported. OSError: the file cannot be
            created.
    """
    handle = _acquire(path, shared, where or f"--out {path.parent}", error)
    held = Lock(handle)
    try:
        yield held
    finally:
        if held.alone():
            with suppress(OSError):  # Windows cannot remove an open file: it stays, unlocked
                path.unlink()
        os.close(handle)


def _acquire(path: Path, shared: bool, where: str, error: type[WsssError]) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
        try:
            _flock(handle, shared=shared)
            if _is_open_file(handle, path):
                holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
                os.ftruncate(handle, 0)
                os.lseek(handle, 0, os.SEEK_SET)
                os.write(handle, holder)
                return handle
        except OSError as problem:
            holder_name = _holder(handle)
            os.close(handle)
            if problem.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
                raise error(
                    f"{where}: another run writes to it: {holder_name}", hint="wait for it, or give another --out"
                ) from None
            if problem.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                hint = "mount it with flock, or write to another file system"
                if sys.platform == "win32":
                    hint = "on Windows only one run at a time can write a store: leave --shard out"
                with suppress(OSError):
                    path.unlink()
                raise NoLocks(f"{where}: no locks here: {problem.strerror}", hint=hint) from None
            raise
        os.close(handle)  # its last holder removed it between open and flock: try again


def _is_open_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _holder(handle: int) -> str:
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        record = json.loads(os.read(handle, 1000))
    except (OSError, ValueError, RecursionError):
        record = None
    return holder_name(record)


def holder_name(record: object) -> str:
    """Name the holder of a lock from the content of its file, which may be anything."""
    if isinstance(record, dict) and type(pid := record.get("pid")) is int and isinstance(host := record.get("host"), str):
        return f"process {pid} on {host[:255] if host.isprintable() else ascii(host[:255])}"
    return "holder unknown"
