"""Files and folders are published whole or not at all, wherever the process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wsss import files
from wsss.errors import BundleError
from wsss.files import publishing, restore, write_atomically
from wsss.lock import lock

KILLED = """
import os, signal, sys
from pathlib import Path
from wsss.files import publishing

target, at = Path(sys.argv[1]), int(sys.argv[2])
calls = 0

def dying(what):
    def call(*args, **options):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return what(*args, **options)
    return call

os.rename, os.unlink, os.rmdir, os.fsync = dying(os.rename), dying(os.unlink), dying(os.rmdir), dying(os.fsync)
Path.rename = lambda self, new: os.rename(self, new)
with publishing(target) as folder:
    (folder / "model").write_text("new")
    (folder / "weights").write_text("new")
"""


def publish(target: Path, text: str) -> None:
    with publishing(target) as folder:
        (folder / "model").write_text(text)
        (folder / "weights").write_text(text)


def content(target: Path) -> set[str]:
    return {path.read_text() for path in target.iterdir()}


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def kill_at(target: Path, step: int) -> bool:
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), str(step)], capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


@pytest.mark.skipif(os.name == "nt", reason="kills with SIGKILL")
def test_killed_at_any_step_the_old_or_the_new_folder_is_there_and_nothing_else(tmp_path: Path) -> None:
    publish(tmp_path / "clip", "old")
    step, seen = 1, []
    while kill_at(tmp_path / "clip", step):
        restore(tmp_path / "clip")
        seen.append(content(tmp_path / "clip"))
        publish(tmp_path / "clip", "old")
        assert hidden(tmp_path) == []
        step += 1
    assert step > 6
    assert all(each in ({"old"}, {"new"}) for each in seen)
    assert seen[0] == {"old"}
    assert {"new"} in seen


@pytest.mark.skipif(os.name == "nt", reason="kills with SIGKILL")
def test_killed_at_any_step_of_a_first_folder_the_next_start_sweeps(tmp_path: Path) -> None:
    step = 1
    while kill_at(tmp_path / "out", step):
        publish(tmp_path / "out", "other")
        assert content(tmp_path / "out") == {"other"}
        assert hidden(tmp_path) == []
        files.shutil.rmtree(tmp_path / "out")
        step += 1
    assert step > 3


def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    publish(tmp_path / "clip", "old")
    with pytest.raises(ZeroDivisionError), publishing(tmp_path / "clip") as folder:
        (folder / "model").write_text("new")
        raise ZeroDivisionError
    assert content(tmp_path / "clip") == {"old"}
    assert hidden(tmp_path) == []


def test_what_a_killed_process_had_moved_away_outlives_a_block_that_fails(tmp_path: Path) -> None:
    publish(tmp_path / ".clip.old-0123abcd", "old")
    with pytest.raises(ZeroDivisionError), publishing(tmp_path / "clip"):
        raise ZeroDivisionError
    assert content(tmp_path / "clip") == {"old"}
    assert hidden(tmp_path) == []


def test_a_folder_that_cannot_take_its_place_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "clip", "old")
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(PermissionError):
        publish(tmp_path / "clip", "new")
    assert content(tmp_path / "clip") == {"old"}
    assert hidden(tmp_path) == []


def test_of_several_that_were_moved_away_the_last_one_is_restored(tmp_path: Path) -> None:
    for name, text in ((".clip.old-bbbbbbbb", "older"), (".clip.old-aaaaaaaa", "newer"), (".clip.old-cccccccc", "newest")):
        publish(tmp_path / f"was {text}", text)
        time.sleep(0.02)  # a file system's clock may tick a hundred times a second
        (tmp_path / f"was {text}").rename(tmp_path / name)
    assert restore(tmp_path / "clip")
    assert content(tmp_path / "clip") == {"newest"}


def test_two_processes_never_publish_one_folder(tmp_path: Path) -> None:
    said = f"clip: another run .* process {os.getpid()} on"
    with publishing(tmp_path / "clip"), pytest.raises(BundleError, match=said), publishing(tmp_path / "clip", error=BundleError):
        pass


def test_what_a_live_process_builds_is_not_restored_or_swept(tmp_path: Path) -> None:
    (tmp_path / ".clip.old-0123abcd").mkdir()
    with lock(tmp_path / ".clip.lock"):
        assert not restore(tmp_path / "clip")
    assert restore(tmp_path / "clip")
    assert not restore(tmp_path / "clip")


def test_only_its_own_leftovers_are_swept(tmp_path: Path) -> None:
    others = [
        ".clip-large.partial-0123abcd",
        ".clip.partial-mine.partial-0123abcd",
        ".clip.partial-notes",
        "clip.partial-0123abcd",
    ]
    for name in (*others, ".clip.partial-0123abcd"):
        (tmp_path / name).mkdir()
    publish(tmp_path / "clip", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "clip"])


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    publish(tmp_path / "cache", "cached")
    (tmp_path / "clip").symlink_to("cache")
    publish(tmp_path / "clip", "new")
    assert content(tmp_path / "clip") == {"new"}
    assert content(tmp_path / "cache") == {"cached"}
    assert hidden(tmp_path) == []


def test_without_locks_folders_are_published_and_nothing_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsss.lock.fcntl", None)
    (tmp_path / ".clip.partial-0123abcd").mkdir()
    publish(tmp_path / "clip", "old")
    publish(tmp_path / "clip", "new")
    assert content(tmp_path / "clip") == {"new"}
    assert hidden(tmp_path) == [".clip.partial-0123abcd"]


def test_files_and_names_are_on_the_disk_before_and_after_each_rename(tmp_path: Path, disk: list[str]) -> None:
    write_atomically(tmp_path / "one", b"1")
    assert disk == ["fsync .tmp", "rename one", "fsync /"]
    disk.clear()
    publish(tmp_path / "clip", "old")
    assert disk == ["fsync model", "fsync weights", "fsync .partial/", "rename clip", "fsync /"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "one", b"1")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "one", b"2")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("one", b"1")]
