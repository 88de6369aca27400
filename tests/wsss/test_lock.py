"""Locks on files: held by one process or shared, and removed by the last holder."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from wsss import lock as locks
from wsss.errors import StoreError
from wsss.lock import lock


def test_a_file_that_was_removed_while_it_was_locked_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last holder may end after the file is opened, and another process may then create and lock a new one."""
    path, flock = tmp_path / ".lock", locks._flock

    def late(handle: int, *, shared: bool) -> None:
        monkeypatch.setattr(locks, "_flock", flock)
        path.unlink()
        other.enter_context(lock(path))
        flock(handle, shared=shared)

    monkeypatch.setattr(locks, "_flock", late)
    with ExitStack() as other, pytest.raises(StoreError, match="another run writes to it"), lock(path):
        pass


def test_the_holder_is_named_in_a_file_that_a_killed_process_left(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_bytes(b'{"pid": 1, "host": "' + b"x" * 300 + b'"}')
    with lock(path), pytest.raises(StoreError, match=f"process {os.getpid()} on "), lock(path):
        pass


def test_only_the_last_of_those_who_share_a_lock_removes_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with lock(path, shared=True):
        with lock(path, shared=True):
            pass
        assert path.exists()
        with pytest.raises(StoreError, match="another run writes to it"), lock(path):
            pass
    assert not path.exists()
