"""The lock of a store in an object store: one run at a time, or shards; the dead are found out, the living never robbed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from wsss.errors import StoreError
from wsss.lock import holder_name
from wsss.object_storage import RemoteFolder
from wsss.store import remote_lock
from wsss.store.remote_lock import Lease
from wsss.store.remote_lock import remote_lock as lock

if TYPE_CHECKING:
    from ..conftest import Bucket

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed (pip install 'wsss[remote]')")


@pytest.fixture(params=["s3", "memory"])
def folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[RemoteFolder]:
    """A folder in whose locks a second is a tenth of one."""
    for name, seconds in {"BEAT": 0.05, "LEASE": 0.5, "POLL": 0.01, "GRACE": 0.5}.items():
        monkeypatch.setattr(remote_lock, name, seconds)
    if request.param == "s3":
        bucket: Bucket = request.getfixturevalue("bucket")
        yield RemoteFolder(f"{bucket.url}/store")
    else:
        fsspec.filesystem("memory").store.clear()
        yield RemoteFolder("memory://locks/store")
        fsspec.filesystem("memory").store.clear()


def locks(folder: RemoteFolder) -> list[str]:
    return [file.name for file in folder.scan(".lock/")[0]]


def leave_behind(folder: RemoteFolder, name: str, **holder: object) -> None:
    """The lock of a run that was killed."""
    folder.create(name, json.dumps({"owner": "x", "pid": 1, "host": "elsewhere", "machine": "another", **holder}).encode())


def test_a_second_run_is_refused_and_the_first_goes_on(folder: RemoteFolder) -> None:
    with lock(folder, "") as held:
        assert locks(folder) == [".lock/run"]
        with pytest.raises(StoreError, match=rf"another run writes to it: process {os.getpid()} on "), lock(folder, ""):
            raise AssertionError("two at once")
        with pytest.raises(StoreError, match="another run writes to it"), lock(folder, "-0-of-2"):
            raise AssertionError("two at once")
        held.check()
        assert held.alone()
    assert locks(folder) == []


def test_of_a_lock_of_any_size_only_the_first_bytes_are_read(folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[int, int]]()
    read = RemoteFolder.read

    def noted(self: RemoteFolder, name: str, start: int, stop: int) -> bytes:
        asked.append((start, stop))
        return read(self, name, start, stop)

    monkeypatch.setattr(RemoteFolder, "read", noted)
    leave_behind(folder, ".lock/run", note="x" * 100_000)
    with lock(folder, ""):
        assert asked and max(stop for _, stop in asked) <= 4096


def test_shards_share_and_a_run_alone_is_refused(folder: RemoteFolder) -> None:
    with lock(folder, "-0-of-2") as first, lock(folder, "-1-of-2") as second:
        with pytest.raises(StoreError, match="another run writes to it"), lock(folder, "-1-of-2"):
            raise AssertionError("the same shard twice")
        with pytest.raises(StoreError, match="another run writes to it"), lock(folder, ""):
            raise AssertionError("two at once")
        assert not first.alone()
        assert second.alone(), "the first has left"
        assert locks(folder) == [".lock/run"], "nobody can come"
    assert locks(folder) == []


def test_of_shards_that_leave_at_the_same_time_one_is_the_last(folder: RemoteFolder) -> None:
    barrier, last = threading.Barrier(4), list[int]()

    def work(number: int) -> None:
        with lock(folder, f"-{number}-of-4") as held:
            barrier.wait()
            if held.alone():
                last.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert last, "somebody folds"
    assert locks(folder) == []


def test_a_shard_that_leaves_waits_for_one_that_looks_whether_it_is_the_last(folder: RemoteFolder) -> None:
    with lock(folder, "-0-of-2") as held:
        other = Lease(folder, ".lock/run", wait=False)
        threading.Timer(0.2, other.release).start()
        assert held.alone()
    with lock(folder, "-0-of-2") as held:
        other = Lease(folder, ".lock/run", wait=False)
        assert not held.alone(), "it folds what this shard wrote too"
        other.release()
    assert locks(folder) == []


def test_of_runs_that_come_at_the_same_time_one_begins(folder: RemoteFolder) -> None:
    if folder.url.startswith("memory"):
        pytest.skip("fsspec's memory file system looks and writes in two steps")
    leave_behind(folder, ".lock/run")
    barrier, begun, refused, done = threading.Barrier(3), list[int](), list[StoreError](), threading.Event()

    def work(number: int) -> None:
        barrier.wait()
        try:
            with lock(folder, ""):
                begun.append(number)
                done.wait(timeout=20)
        except StoreError as error:
            refused.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while len(refused) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    done.set()
    for thread in threads:
        thread.join()
    assert (len(begun), len(refused)) == (1, 2)


@pytest.mark.parametrize("name", [".lock/run", ".lock/shard-0-of-2"])
def test_the_lock_of_the_dead_is_taken_over_after_a_while(folder: RemoteFolder, name: str) -> None:
    leave_behind(folder, name)
    start = time.monotonic()
    with lock(folder, ""):
        assert time.monotonic() - start > 0.5
        assert locks(folder) == [".lock/run"]


def test_a_holder_that_died_here_is_not_waited_for(folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_lock, "LEASE", 1000.0)
    machine = remote_lock._machine()
    if not machine:
        pytest.skip("this system does not tell one boot from another (/proc/sys/kernel/random/boot_id)")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    leave_behind(folder, ".lock/run", pid=gone.pid, machine=machine)
    with lock(folder, ""):
        pass


def test_a_process_of_another_machine_or_user_did_not_die_here(folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(pid: int, number: int) -> None:
        raise ProcessLookupError

    def refused(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(remote_lock, "_machine", lambda: "this")
    leave_behind(folder, ".lock/run", pid=7, machine="another")
    leave_behind(folder, ".lock/shard", pid=7, machine="this")
    monkeypatch.setattr(os, "kill", gone)
    assert not remote_lock._died_here(folder, ".lock/run")
    assert remote_lock._died_here(folder, ".lock/shard")
    monkeypatch.setattr(os, "kill", refused)
    assert not remote_lock._died_here(folder, ".lock/shard"), "it is alive"


def test_a_lock_is_renewed_several_times_before_others_may_take_it() -> None:
    assert 3 * remote_lock.BEAT <= remote_lock.LEASE


def test_a_lock_that_nobody_understands_is_waited_for(folder: RemoteFolder) -> None:
    folder.create(".lock/run", b"{")
    with lock(folder, ""):
        pass


def test_a_run_that_slept_too_long_finds_out(folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with lock(folder, "") as held:
        held.check()
        folder.write(".lock/run", json.dumps({"owner": "x", "pid": 7, "host": "elsewhere"}).encode())
        deadline = time.monotonic() + 5
        while not held._lease.lost and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(StoreError, match="process 7 on elsewhere took it over"):
            held.check()
        assert not held.alone()
    assert locks(folder) == [".lock/run"], "the other's"


def test_a_run_that_slept_to_its_end_leaves_the_other_s_lock(folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_lock, "BEAT", 1000.0)  # it lets go before its next sign of life
    with lock(folder, "") as held:
        folder.write(".lock/run", json.dumps({"owner": "x", "pid": 7, "host": "elsewhere"}).encode())
        assert not held._lease.lost
    assert locks(folder) == [".lock/run"], "the other's"


def test_an_answer_that_got_lost_is_no_other_run(folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write arrives, the answer does not, and the second try meets the first one's object."""
    create, swap = RemoteFolder.create, RemoteFolder.swap

    def create_twice(self: RemoteFolder, name: str, data: bytes) -> str:
        create(self, name, data)
        return create(self, name, data)

    def swap_twice(self: RemoteFolder, name: str, data: bytes, etag: str) -> str:
        swap(self, name, data, etag)
        return swap(self, name, data, etag)

    monkeypatch.setattr(RemoteFolder, "create", create_twice)
    monkeypatch.setattr(RemoteFolder, "swap", swap_twice)
    lease = Lease(folder, ".lock/run")
    time.sleep(0.3)
    assert not lease.lost
    lease.release()
    assert locks(folder) == []


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"pid": 7, "host": "here"}, "process 7 on here"),
        ({"pid": 7, "host": "a\x1b[2J"}, "process 7 on 'a\\x1b[2J'"),
        ({"pid": "7", "host": "here"}, "holder unknown"),
        ({"pid": 7, "host": ["x"]}, "holder unknown"),
        ({"pid": True, "host": "here"}, "holder unknown"),
        ([7], "holder unknown"),
        (None, "holder unknown"),
    ],
)
def test_who_holds_a_lock_is_said_only_where_it_can_be(record: object, name: str) -> None:
    assert holder_name(record) == name


@pytest.mark.parametrize("pid", [-1, 0, 10**30, "1", None, [1], True])
def test_a_lock_of_a_stranger_names_no_process_that_died(
    folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch, pid: object
) -> None:
    monkeypatch.setattr(remote_lock, "_machine", lambda: "this")
    folder.write(".lock/run", json.dumps({"pid": pid, "machine": "this"}).encode())
    assert not remote_lock._died_here(folder, ".lock/run")


@pytest.mark.parametrize("data", [b"", b"[" * 9999, b"7", b"\xff", b"x" * 100_000])
def test_a_lock_that_says_nothing_is_read(folder: RemoteFolder, data: bytes) -> None:
    folder.write(".lock/run", data)
    assert remote_lock._read(folder, ".lock/run")[1] == {}
