"""The lock of a label store in an object store: an object that its holder rewrites every few seconds.

An object store does not release a lock when a process dies, and clocks differ. So a new run watches an existing lock: if it is
rewritten, its holder is alive and the new run is refused; if it is not rewritten for `LEASE` seconds, its holder is dead and the
lock is taken over. A holder that died on this machine is recognized at once.

Where PUT can be conditional (S3, GCS), two runs never both begin. But a holder that was suspended for longer than `LEASE` may
still complete a write when it wakes; it notices at its next heartbeat and stops. Then work was done twice, but no label is
wrong: two runs of one store write the same bytes.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..errors import StoreError
from ..lock import holder_name
from ..object_storage import RemoteFolder

BEAT, LEASE = 8.0, 30.0
"""Seconds between heartbeats, and without one until a lock counts as dead."""
POLL = 0.25
"""Seconds between reads of another run's lock."""
GRACE = 3.0
"""Seconds that an ending shard waits for another one that is ending too."""
_MAX_BYTES = 4096
"""Bytes read of a lock, which has about 200."""
FOLDER = ".lock/"
RUN = f"{FOLDER}run"
"""Held by a run without shards. A shard holds a lock of its own name, and this one while it merges the manifests."""


class Lease:
    """A lock object held by this process.

    Args:
        wait: watch another holder until it is known whether it is alive.

    Raises:
        StoreError: another process holds it and is alive. FileExistsError: the same, without ``wait``. OSError: the object
            store cannot be reached.
    """

    def __init__(self, folder: RemoteFolder, name: str, *, wait: bool = True) -> None:
        self._folder, self._name = folder, name
        self._who = {"owner": uuid.uuid4().hex, "pid": os.getpid(), "host": socket.gethostname(), "machine": _machine()}
        self._beats = 0
        self._etag = self._acquire(wait)
        self.lost = ""
        """The run that took the lock over, if one did."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._heartbeat, name="lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Release the lock. Raises nothing: a lock that cannot be deleted expires."""
        self._stopped.set()
        self._thread.join(timeout=GRACE)
        with suppress(OSError):
            if not self.lost and self._folder.entry(self._name).etag == self._etag:
                self._folder.delete([self._name])

    def _acquire(self, wait: bool) -> str:
        while True:
            try:
                return self._folder.create(self._name, self._data())
            except FileExistsError:
                if not wait:
                    raise
            try:
                etag, holder = _read(self._folder, self._name)
            except FileNotFoundError:
                continue  # just released
            if holder.get("owner") == self._who["owner"]:
                return etag  # it was written, but the response was lost
            _wait_for_death(self._folder, lambda name: name == self._name)
            with suppress(FileExistsError, FileNotFoundError):  # another run was faster, or it was released
                return self._folder.swap(self._name, self._data(), etag)

    def _heartbeat(self) -> None:
        while not self._stopped.wait(BEAT):
            self._beats += 1
            try:
                self._etag = self._folder.swap(self._name, self._data(), self._etag)
            except (FileExistsError, FileNotFoundError):
                with suppress(OSError):
                    etag, holder = _read(self._folder, self._name)
                    if holder.get("owner") == self._who["owner"]:  # it was written, but the response was lost
                        self._etag = etag
                        continue
                    self.lost = holder_name(holder)
                    return
                self.lost = "another run"
                return
            except OSError:
                continue  # a network failure; if it lasts, nothing else can be written either

    def _data(self) -> bytes:
        return json.dumps({**self._who, "beats": self._beats}).encode()


class RemoteLock:
    """The lock of a store, held by a run or by one of its shards."""

    def __init__(self, folder: RemoteFolder, part: str) -> None:
        self._folder, self._part = folder, part
        self._lease = Lease(folder, f"{FOLDER}shard{part}" if part else RUN)

    def check(self) -> None:
        """Raises StoreError if another run took the lock over."""
        if self._lease.lost:
            raise StoreError(
                f"--out {self._folder}: {self._lease.lost} took it over: this run did not renew its lock for {LEASE:.0f} s",
                hint="what was written so far is intact; run the same command again when the other run has ended",
            )

    def alone(self) -> bool:
        """Whether no other run is active. If so, none can begin until this lock is released. Releases a shard's own lock."""
        if self._lease.lost:
            return False
        if not self._part:
            return True
        self._lease.release()
        deadline = time.monotonic() + GRACE
        while True:
            try:
                self._lease = Lease(self._folder, RUN, wait=False)
                break
            except FileExistsError:  # another ending shard, which may merge the manifests
                if time.monotonic() > deadline:
                    return False
                time.sleep(POLL / 2)
        if _locks(self._folder, lambda name: name != RUN):
            self._lease.release()
            return False
        return True

    def release(self) -> None:
        """Release the lock."""
        self._lease.release()


@contextmanager
def remote_lock(folder: RemoteFolder, part: str) -> Iterator[RemoteLock]:
    """Hold the lock of a store.

    Args:
        part: the name of a shard, which may share the store with others; empty for a run without shards.

    Raises:
        StoreError: another run is active. OSError.
    """
    held = RemoteLock(folder, part)
    try:
        # Take the own lock first, then check the others: of two runs that start together, at least one sees the other.
        _wait_for_death(folder, lambda name: name == RUN if part else name != RUN, delete=True)
        yield held
    finally:
        held.release()


def _wait_for_death(folder: RemoteFolder, which: Callable[[str], bool], *, delete: bool = False) -> None:
    """Wait until locks are released or dead. Raises StoreError as soon as one is renewed."""
    watched = _locks(folder, which)
    died = {name for name in watched if _died_here(folder, name)}
    deadline = time.monotonic() + LEASE
    while watched:
        now = _locks(folder, which)
        for name, etag in list(watched.items()):
            if name not in now:
                del watched[name]
            elif now[name] != etag:
                raise _in_use(folder, name)
            elif name in died or time.monotonic() > deadline:
                if delete:
                    folder.delete([name])
                del watched[name]
        if watched:
            time.sleep(POLL)


def _locks(folder: RemoteFolder, which: Callable[[str], bool]) -> dict[str, str]:
    return {entry.name: entry.etag for entry in folder.scan(FOLDER)[0] if which(entry.name)}


def _in_use(folder: RemoteFolder, name: str) -> StoreError:
    holder: dict[str, Any] = {}
    with suppress(OSError):
        holder = _read(folder, name)[1]
    return StoreError(
        f"--out {folder}: another run writes to it: {holder_name(holder)}", hint="wait for it, or give another --out"
    )


def _read(folder: RemoteFolder, name: str) -> tuple[str, dict[str, Any]]:
    entry = folder.entry(name)
    try:
        holder = json.loads(folder.read(name, 0, min(entry.size, _MAX_BYTES))) if entry.size else {}
    except (ValueError, RecursionError):
        holder = {}
    return entry.etag, holder if isinstance(holder, dict) else {}


def _died_here(folder: RemoteFolder, name: str) -> bool:
    """Whether its holder was a process of this machine (and container) that has ended."""
    try:
        holder = _read(folder, name)[1]
    except OSError:
        return False
    pid = holder.get("pid")
    if not _machine() or holder.get("machine") != _machine() or type(pid) is not int or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _machine() -> str:
    """Identifies this boot of this machine and the container (PID namespace); "" if unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
