"""The lock of a label store in an object store: an object that its holder writes anew every few seconds.

An object store lets go of nothing when a process dies, and clocks differ. So whoever finds a lock watches it: one that is
written anew is alive, and the newcomer is refused; one that is not for `LEASE` seconds is dead, and taken over. A holder
that died on this machine is known to be dead at once.

What it guarantees where PUT can be conditional (S3, GCS): two runs never both begin. What it cannot: a holder that was
asleep for longer than `LEASE` (a suspended machine) may still write what it had in hand when it wakes; it finds out at its
next sign of life and stops. Then work was done twice, but no label is wrong: two runs of one store write the same bytes.
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
"""Seconds between signs of life, and without one until a lock is dead."""
POLL = 0.25
"""Seconds between looks at another's lock."""
GRACE = 3.0
"""Seconds that a shard which leaves waits for another one that is about to leave too."""
_MOST_BYTES = 4096
"""Read of a lock, which holds 200."""
FOLDER = ".lock/"
RUN = f"{FOLDER}run"
"""Held by a run that is alone; a shard holds one of its own name, and this one while it folds the manifests."""


class Lease:
    """A lock object held by this process.

    Args:
        wait: watch another holder until it is known whether it lives.

    Raises:
        StoreError: another process holds it and is alive. FileExistsError: the same, without ``wait``. OSError: the store
            cannot be asked.
    """

    def __init__(self, folder: RemoteFolder, name: str, *, wait: bool = True) -> None:
        self._folder, self._name = folder, name
        self._who = {"owner": uuid.uuid4().hex, "pid": os.getpid(), "host": socket.gethostname(), "machine": _machine()}
        self._beats = 0
        self._etag = self._take(wait)
        self.lost = ""
        """Who took it over, if somebody did."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Lets go. Raises nothing: a lock that stays is dead soon."""
        self._over.set()
        self._thread.join(timeout=GRACE)
        with suppress(OSError):
            if not self.lost and self._folder.entry(self._name).etag == self._etag:
                self._folder.delete([self._name])

    def _take(self, wait: bool) -> str:
        while True:
            try:
                return self._folder.create(self._name, self._data())
            except FileExistsError:
                if not wait:
                    raise
            try:
                etag, holder = _read(self._folder, self._name)
            except FileNotFoundError:
                continue  # let go of just now
            if holder.get("owner") == self._who["owner"]:
                return etag  # it was written, but the answer got lost
            _wait_for_death(self._folder, lambda name: name == self._name)
            with suppress(FileExistsError, FileNotFoundError):  # another was faster, or it was let go of
                return self._folder.swap(self._name, self._data(), etag)

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            self._beats += 1
            try:
                self._etag = self._folder.swap(self._name, self._data(), self._etag)
            except (FileExistsError, FileNotFoundError):
                with suppress(OSError):
                    etag, holder = _read(self._folder, self._name)
                    if holder.get("owner") == self._who["owner"]:  # it was written, but the answer got lost
                        self._etag = etag
                        continue
                    self.lost = holder_name(holder)
                    return
                self.lost = "another run"
                return
            except OSError:
                continue  # a moment's trouble of the network; should it last, nothing else is written either

    def _data(self) -> bytes:
        return json.dumps({**self._who, "beats": self._beats}).encode()


class RemoteLock:
    """The lock of a store, held by a run that is alone, or by a shard."""

    def __init__(self, folder: RemoteFolder, part: str) -> None:
        self._folder, self._part = folder, part
        self._lease = Lease(folder, f"{FOLDER}shard{part}" if part else RUN)

    def check(self) -> None:
        """Raises StoreError when another run took the lock over."""
        if self._lease.lost:
            raise StoreError(
                f"--out {self._folder}: {self._lease.lost} took it over: this run showed no sign of life for too long",
                hint="what was written so far is whole; when the other run has ended, the same command goes on",
            )

    def alone(self) -> bool:
        """Is nobody else here? If so, nobody can come until this lock is let go. A shard's own name is free from here on."""
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
            except FileExistsError:  # a shard that looks whether it is the last, or that is, and folds what this one wrote too
                if time.monotonic() > deadline:
                    return False
                time.sleep(POLL / 2)
        if _locks(self._folder, lambda name: name != RUN):
            self._lease.release()
            return False
        return True

    def release(self) -> None:
        """Lets go."""
        self._lease.release()


@contextmanager
def remote_lock(folder: RemoteFolder, part: str) -> Iterator[RemoteLock]:
    """Holds the lock of a store.

    Args:
        part: of a shard, which may share the store with others: what tells it from them.

    Raises:
        StoreError: another run is at work. OSError.
    """
    held = RemoteLock(folder, part)
    try:
        # First its own, then a look at the others': of two that come at once, at least one sees the other.
        _wait_for_death(folder, lambda name: name == RUN if part else name != RUN, delete=True)
        yield held
    finally:
        held.release()


def _wait_for_death(folder: RemoteFolder, which: Callable[[str], bool], *, delete: bool = False) -> None:
    """Watches locks until they are gone or dead. Raises StoreError as soon as one shows a sign of life."""
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
        holder = json.loads(folder.read(name, 0, min(entry.size, _MOST_BYTES))) if entry.size else {}
    except (ValueError, RecursionError):
        holder = {}
    return entry.etag, holder if isinstance(holder, dict) else {}


def _died_here(folder: RemoteFolder, name: str) -> bool:
    """Was its holder a process of this machine (and container), and is there none of that number any more?"""
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
    """This boot of this machine, and the container that counts its processes; "" where that is not known."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
