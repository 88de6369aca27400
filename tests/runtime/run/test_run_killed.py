"""A run that is killed or whose disk fails, at every single step of its writing: continued, it leaves the same bytes."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from wsss import files
from wsss.errors import StoreError
from wsss.photographs import ImageFile
from wsss.runtime.chain import Chain
from wsss.runtime.run import sources, stream
from wsss.runtime.run.label_folder import Summary, label_folder
from wsss.store import local as labelstore
from wsss.store.local import LabelStore, read_label, read_records

if TYPE_CHECKING:
    from ..conftest import World

CALLS = ("fsync", "replace", "write", "mkdir", "unlink", "open", "ftruncate")
"""Of the module os: through these, and `labelstore.png_of`, passes everything that changes a store."""
Fail = Callable[[str, Callable[[], Any]], Any]


@pytest.fixture
def many(world: World, tmp_path: Path) -> Path:
    """Five photographs in two folders, one of them broken."""
    for number in range(4):
        world.save(tmp_path / "many" / "ab"[number % 2] / f"{number}.png", 30, 40, red=(number, 2, 20, 20))
    (tmp_path / "many" / "a" / "broken.jpg").write_bytes(b"no")
    return tmp_path / "many"


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a store, hidden ones too, but the history."""
    files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    files.pop("history.jsonl", None)
    return files


def check_whole(out: Path) -> None:
    """No partial file is visible, and each line has its label."""
    for path in (out / "labels").rglob("*"):
        assert path.is_dir() or (path.suffix == ".png" and read_label(path).shape == (30, 40)), path
    if (out / "run.json").exists():
        json.loads((out / "run.json").read_text())
    paths = [record["path"] for record in read_records(out)]
    assert len(paths) == len(set(paths))
    for record in read_records(out):
        assert "error" in record or (out / "labels" / record["label"]).is_file()


@contextmanager
def steps(fail: Fail) -> Iterator[None]:
    """Hands every change of the file system that a store makes to ``fail``, with its name and the call that makes it."""
    with pytest.MonkeyPatch.context() as broken:
        for name in CALLS:
            true = getattr(os, name)

            def step(*given: Any, name: str = name, true: Callable[..., Any] = true, **how: Any) -> Any:
                return fail(name, lambda: true(*given, **how))

            broken.setattr(labelstore.os, name, step)
        encode = labelstore.png_of

        def encode_step(label_map: Any) -> Any:
            return fail("encode", lambda: encode(label_map))

        broken.setattr(labelstore, "png_of", encode_step)
        yield


def count_steps(run: Callable[[], object]) -> int:
    count = 0

    def counting(_: str, call: Callable[[], Any]) -> Any:
        nonlocal count
        count += 1
        return call()

    with steps(counting):
        run()
    return count


def in_a_child(work: Callable[[], object]) -> int:
    """Runs it in a forked process; minus the signal that ended it, or its exit code."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def label(world: World, many: Path) -> Callable[..., Summary]:
    labeler = Chain.open(world.bundle, classes=world.classes)
    return lambda out, **how: label_folder(labeler, many, out, batch=2, warn=lambda _: None, **how)


def test_killed_at_every_step_and_continued(label: Callable[..., Summary], tmp_path: Path) -> None:
    label(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    for number in itertools.count(0, 2):  # their number differs by a few: how lines are grouped into writes is the threads' luck
        out = tmp_path / f"killed-{number}"
        lock, left = threading.Lock(), number

        def kill(name: str, call: Callable[[], Any], lock: Any = lock) -> Any:
            nonlocal left
            with lock:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return call()

        def work(out: Path = out, kill: Fail = kill) -> None:
            with steps(kill):
                label(out)

        ended = in_a_child(work)
        assert ended in (0, -signal.SIGKILL)
        if out.exists():
            check_whole(out)
        label(out)
        assert contents(out) == whole, number
        if ended == 0:
            break
    assert number > 4 * 4


def test_killed_at_random_moments_and_continued_each_time(label: Callable[..., Summary], many: Path, tmp_path: Path) -> None:
    label(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    chance, kills, finished = random.Random(0), 0, 0
    out = tmp_path / "out"

    def slowly(name: str, call: Callable[[], Any]) -> Any:
        time.sleep(0.002)  # so that most moments are in the middle of a write
        return call()

    def work() -> None:
        with steps(slowly):
            label(out)

    while kills < 30:
        child = os.fork()
        if child == 0:
            try:
                work()
            finally:
                os._exit(0)
        time.sleep(chance.uniform(0.005, 0.12))
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL:
            kills += 1
            if out.exists():
                check_whole(out)
            continue
        assert contents(out) == whole
        finished += 1
        out = tmp_path / f"out-{finished}"
    label(out)
    assert contents(out) == whole


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS], ids=errno.errorcode.get)
def test_a_disk_that_fails_at_any_step(label: Callable[..., Summary], tmp_path: Path, number: int) -> None:
    label(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    total = count_steps(lambda: label(tmp_path / "counted"))
    stopped = 0
    for step in range(0, total, 2 if number == errno.ENOSPC else 9):
        out = tmp_path / f"full-{step}"
        lock, left = threading.Lock(), step

        def fail(name: str, call: Callable[[], Any], lock: Any = lock) -> Any:
            nonlocal left
            with lock:
                left -= 1
                full = left < 0
            if full and name not in ("unlink", "ftruncate"):  # what a full disk still can do
                raise OSError(number, os.strerror(number))
            return call()

        with steps(fail):
            try:
                label(out)
            except StoreError as error:
                stopped += 1
                assert os.strerror(number) in error.message
                assert error.hint
        if out.exists():
            check_whole(out)
            assert not [path for path in out.rglob("*.tmp") if path.is_file()], "a run that can still speak cleans up"
        label(out)
        assert contents(out) == whole, step
    assert stopped > 4


def test_a_store_that_vanishes_ends_the_run_and_is_not_begun_anew(label: Callable[..., Summary], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(StoreError, match="cannot write .*No such file") as caught:
        label(out, progress=lambda _: out.rename(tmp_path / "elsewhere"))
    assert "unmounted" in caught.value.hint
    assert not out.exists()
    assert label(out).labelled == 4


def test_half_a_line_on_a_full_disk_is_taken_back(
    label: Callable[..., Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = os.write, list[int]()

    def fill_up(handle: int, data: Any) -> int:
        if not written and not bytes(data).startswith(b'{"path"'):  # before the manifest: the lock
            return write(handle, data)
        written.append(len(data))
        if len(written) == 2:
            return write(handle, data[:30])
        if len(written) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data)

    with monkeypatch.context() as broken, pytest.raises(StoreError, match="No space left"):
        broken.setattr(labelstore.os, "write", fill_up)
        label(tmp_path / "out")
    assert (tmp_path / "out" / "manifest.jsonl").stat().st_size == written[0]
    check_whole(tmp_path / "out")


def test_what_a_killed_run_was_writing_is_in_nobody_s_way(label: Callable[..., Summary], tmp_path: Path) -> None:
    """Also where process numbers come again, as in a container, where each run may be process 7."""
    out = tmp_path / "out"
    label(out)
    whole = contents(out)
    (out / ".tmp").mkdir()
    first = next(files._COUNT)
    for number in range(first, first + 100):
        (out / ".tmp" / f".{os.getpid()}-{number}.tmp").write_bytes(b"half")
    for path in (out / "labels").rglob("*.png"):
        path.unlink()
    assert label(out).labelled == 4
    assert contents(out) == whole


def test_a_run_that_is_stopped_finishes_what_it_began_and_goes_on(
    label: Callable[..., Summary], world: World, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(30):
        world.save(many / f"{number:02}.png", 30, 40, blue=(2, 2, 20, 20))
    label(tmp_path / "whole")
    stop = threading.Event()
    read = sources.read_file

    def read_some(folder: Path, name: str) -> ImageFile:
        if name >= "10":  # names of digits come before a/ and b/
            assert stop.wait(60), "the first ten make progress without the others"
        return read(folder, name)

    monkeypatch.setattr(sources, "read_file", read_some)
    monkeypatch.setattr(stream, "cores", lambda: 40)  # threads of the pool: the reads that wait must leave some for the first ten
    first = label(tmp_path / "out", stop=stop, progress=lambda _: stop.set())
    assert first.stopped
    assert 0 < first.labelled < 30
    check_whole(tmp_path / "out")
    assert len(list((tmp_path / "out" / "labels").rglob("*.png"))) == first.labelled, "all that was begun is in the manifest"
    second = label(tmp_path / "out")
    assert (second.skipped, second.stopped) == (first.labelled + first.failed, False)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_runs_on_one_store_are_refused(label: Callable[..., Summary], world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    label(out)
    settings = Chain.open(world.bundle, classes=world.classes).settings
    with LabelStore(out, world.classes, settings):
        with pytest.raises(StoreError, match=rf"another run writes to it: process {os.getpid()} on "):
            label(out)
        with pytest.raises(StoreError, match="another run writes to it"):
            label(out, shard=(0, 2))
    label(out)


def test_the_lock_of_a_dead_process_is_taken_over(label: Callable[..., Summary], world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def die() -> None:
        label(out, progress=lambda _: os.kill(os.getpid(), signal.SIGKILL))

    assert in_a_child(die) == -signal.SIGKILL
    assert (out / ".lock").exists()
    label(out)
    assert not (out / ".lock").exists()


def test_shards_at_the_same_time_make_the_same_store(label: Callable[..., Summary], world: World, tmp_path: Path) -> None:
    label(tmp_path / "whole")
    out = tmp_path / "out"
    settings = Chain.open(world.bundle, classes=world.classes).settings
    with LabelStore(out, world.classes, settings, shard=(2, 3)):  # while one of them is at work ...
        summaries = [label(out, shard=(number, 3)) for number in range(2)]
        assert sorted(path.name for path in out.glob("manifest*")) == [f"manifest-{number}-of-3.jsonl" for number in range(3)]
        again = label(out, shard=(0, 3))
        assert (again.labelled, again.skipped) == (0, summaries[0].labelled + summaries[0].failed)
    third = label(out, shard=(2, 3))
    assert sum(each.images for each in (*summaries, third)) == 5
    assert sum(each.labelled for each in (*summaries, third)) == 4
    assert contents(out) == contents(tmp_path / "whole"), "... the last one folds them into one"
    assert label(out).skipped == 5
