"""The label store in an object store: what is left when runs are over downloads as a store of this machine."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsss.classes import class_list
from wsss.errors import ImageError, StoreError
from wsss.object_storage import RemoteFolder
from wsss.store import remote as remote_store
from wsss.store.local import LabelStore, read_history, read_label, read_records, read_run
from wsss.store.remote import RemoteLabels, RemoteStore

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed (pip install 'wsss[remote]')")
CLASSES = class_list(["dog", "cat"])
SETTINGS: dict[str, Any] = {"engine": "ort", "rules": {"nms": 0.5}}
LABEL_MAP = np.array([[0, 1, 2], [255, 254, 128]], np.uint8)
NAMES = ("a", "b", "c", "d", "e")


@dataclass(frozen=True)
class Photo:
    name: str
    label: str


def photos(*names: str) -> list[Photo]:
    return [Photo(f"{name}.jpg", f"{name}.png") for name in names]


def record(name: str, **more: Any) -> dict[str, Any]:
    return {"path": f"{name}.jpg", "label": f"{name}.png", "bytes": 1, "sha256": "0" * 64, **more}


@pytest.fixture(autouse=True)
def folder() -> Iterator[RemoteFolder]:
    fsspec.filesystem("memory").store.clear()
    yield RemoteFolder("memory://stores/store")
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_store, "PART_LINES", 2)


def contents(folder: RemoteFolder) -> dict[str, bytes]:
    """Every file, hidden ones too, but the history."""
    return {file.name: folder.read(file.name) if file.size else b"" for file in folder.walk() if "history" not in file.name}


def downloaded(folder: RemoteFolder, to: Path) -> Path:
    for name, data in contents(folder).items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_bytes(data)
    return to


def run(folder: RemoteFolder, names: tuple[str, ...] = NAMES, **how: Any) -> int:
    """Labels what has no label yet, as a run does; how many."""
    with RemoteStore(folder, CLASSES, SETTINGS, **how) as store:
        images = photos(*names)
        store.select(images, lambda photo, line: line == record(photo.name[:-4]) and store.has_label(photo.label))
        done = 0
        for photo in store.missing(images):
            store.labels.write(photo.label, LABEL_MAP)
            store.append([record(photo.name[:-4])])
            done += 1
        store.add_history({"labelled": done})
    return done


def test_it_downloads_as_the_store_that_this_machine_would_have_made(folder: RemoteFolder, tmp_path: Path) -> None:
    run(folder)
    here = downloaded(folder, tmp_path / "downloaded")
    with LabelStore(tmp_path / "local", CLASSES, SETTINGS) as store:
        for name in NAMES:
            store.write(record(name), LABEL_MAP)
    local = {str(path.relative_to(tmp_path / "local")): path.read_bytes() for path in (tmp_path / "local").rglob("*.*")}
    assert contents(folder) == {name: data for name, data in local.items()}
    assert list(read_records(here)) == [record(name) for name in NAMES]
    assert read_run(here)["classes"] == ["dog", "cat"]
    assert np.array_equal(read_label(here / "labels" / "a.png"), LABEL_MAP)
    with LabelStore(here, CLASSES, SETTINGS) as store:
        assert list(store.missing(photos(*NAMES, "f"))) == photos("f"), "and goes on here"


def test_while_a_run_is_at_work_lines_are_in_parts(folder: RemoteFolder) -> None:
    with RemoteStore(folder, CLASSES, SETTINGS) as store:
        store.select(photos(*NAMES), lambda *_: False)
        for name in NAMES:
            store.labels.write(f"{name}.png", LABEL_MAP)
            store.append([record(name)])
        parts = [file.name for file in folder.walk("manifest/")]
        assert parts == ["manifest/0000000000.jsonl", "manifest/0000000001.jsonl"], "the fifth line waits"
        assert [json.loads(line)["path"] for part in parts for line in folder.lines(part)] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
        assert not list(folder.lines("manifest.jsonl"))
    assert [json.loads(line)["path"] for line in folder.lines("manifest.jsonl")] == [f"{name}.jpg" for name in NAMES]
    assert not list(folder.walk("manifest/"))


def test_lines_do_not_wait_long(folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_store, "PART_LINES", 1000)
    monkeypatch.setattr(remote_store, "PART_SECONDS", 0.0)
    with RemoteStore(folder, CLASSES, SETTINGS) as store:
        store.append([record("a")])
        assert len(list(folder.walk("manifest/"))) == 1


def test_lines_that_are_no_longer_true_are_dropped_and_others_stay(folder: RemoteFolder) -> None:
    run(folder)
    with RemoteStore(folder, CLASSES, SETTINGS) as store:
        moved = [Photo("b.jpg", "b.png"), Photo("c.jpg", "c.jpg.png"), Photo("x.jpg", "x.png")]
        told = store.select(moved, lambda photo, line: photo.label == line["label"])
        assert (told.images, told.done, told.failed) == (3, 1, 0)
        assert [photo.name for photo in store.missing(moved)] == ["c.jpg", "x.jpg"]
    assert [json.loads(line)["path"] for line in folder.lines("manifest.jsonl")] == ["a.jpg", "b.jpg", "d.jpg", "e.jpg"]
    assert not store.has_label("c.png") and store.has_label("b.png"), "the label of a name that changed is gone"


def test_a_lost_label_is_made_again(folder: RemoteFolder) -> None:
    run(folder)
    before = contents(folder)
    folder.delete(["labels/c.png"])
    assert run(folder) == 1
    assert contents(folder) == before
    assert run(folder) == 0


def test_shards_fold_into_one_when_the_last_one_leaves(folder: RemoteFolder, tmp_path: Path) -> None:
    run(RemoteFolder("memory://stores/whole"))
    with RemoteStore(folder, CLASSES, SETTINGS, shard=(1, 2)) as other:
        other.select(photos("b", "d"), lambda *_: False)
        run(folder, ("a", "c", "e"), shard=(0, 2))
        assert [file.name for file in folder.walk() if "manifest-" in file.name] == [
            "manifest-0-of-2.jsonl",
            "manifest-0-of-2/0000000000.jsonl",
            "manifest-0-of-2/0000000001.jsonl",
            "manifest-1-of-2.jsonl",
        ]
        assert run(folder, ("a", "c", "e"), shard=(0, 2)) == 0, "it goes on from its own"
        for name in ("b", "d"):
            other.labels.write(f"{name}.png", LABEL_MAP)
            other.append([record(name)])
    assert contents(folder) == contents(RemoteFolder("memory://stores/whole"))


def test_a_shard_begins_with_its_own_lines_alone(folder: RemoteFolder) -> None:
    run(folder)
    with RemoteStore(folder, CLASSES, SETTINGS, shard=(0, 2)) as store:
        assert store.select(photos("a", "c"), lambda *_: True).done == 2
        assert [json.loads(line)["path"] for line in folder.lines("manifest-0-of-2.jsonl")] == ["a.jpg", "c.jpg"]


def test_the_history_of_all_runs_is_kept(folder: RemoteFolder, tmp_path: Path) -> None:
    for names in (("a",), ("a", "b", "c")):
        run(folder, names)
    (tmp_path / "history.jsonl").write_bytes(folder.read("history.jsonl"))
    assert [each["labelled"] for each in read_history(tmp_path)] == [1, 2]
    assert not list(folder.walk("history/"))


def test_confidence_lies_beside_the_labels(folder: RemoteFolder, tmp_path: Path) -> None:
    RemoteLabels(folder).write_confidence("a/b.png", LABEL_MAP)
    (tmp_path / "x.png").write_bytes(folder.read("confidence/a/b.png"))
    assert np.array_equal(read_label(tmp_path / "x.png"), LABEL_MAP)


def test_a_store_of_other_settings_is_not_touched(folder: RemoteFolder) -> None:
    run(folder)
    before = contents(folder)
    with pytest.raises(StoreError, match='made with engine = "ort", this run has "eager"') as caught:
        RemoteStore(folder, CLASSES, {**SETTINGS, "engine": "eager"})
    assert "new --out" in caught.value.hint
    assert contents(folder) == before


def test_a_folder_that_holds_something_else_is_refused(folder: RemoteFolder) -> None:
    folder.write("thesis/chapter.tex", b"...")
    with pytest.raises(StoreError, match="not empty and holds no label store"):
        RemoteStore(folder, CLASSES, SETTINGS)
    assert list(contents(folder)) == ["thesis/chapter.tex"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{\n", "Expecting property name"),
        (b'{"path": "a.jpg", "label": "a.png"}\n', "out of order"),
        (b'{"path": "e.jpg", "label": "e.png"}\n', "out of order"),
    ],
)
def test_a_damaged_manifest_is_named(folder: RemoteFolder, line: bytes, said: str) -> None:
    run(folder)
    folder.write("manifest.jsonl", folder.read("manifest.jsonl") + line)
    with pytest.raises(StoreError, match=rf"store/manifest\.jsonl: line 6 is damaged: .*{said}"):
        run(folder)


def test_a_name_that_the_store_cannot_take_is_that_image_s_failure(folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.EILSEQ, "not Unicode")

    monkeypatch.setattr(RemoteFolder, "write", refuses)
    with pytest.raises(ImageError, match="a label cannot have this name: not Unicode"):
        RemoteLabels(folder).write("x.png", LABEL_MAP)


def test_a_run_that_was_robbed_writes_no_more_lines(folder: RemoteFolder) -> None:
    store = RemoteStore(folder, CLASSES, SETTINGS)
    store.select([], lambda *_: False)
    store._lock._lease.lost = "process 7 on elsewhere"
    with pytest.raises(StoreError, match="process 7 on elsewhere took it over"):
        store.append([record("a"), record("b")])
    with pytest.raises(StoreError, match="took it over"):
        store.close()
    assert not list(folder.walk("manifest/"))


def test_a_run_that_was_robbed_deletes_no_parts(folder: RemoteFolder) -> None:
    store = RemoteStore(folder, CLASSES, SETTINGS)
    store.append([record("a"), record("b")])
    store._lock._lease.lost = "process 7 on elsewhere"
    with pytest.raises(StoreError, match="process 7 on elsewhere took it over"):
        store.select(photos("a", "b"), lambda *_: True)
    assert [file.name for file in folder.walk("manifest/")] == ["manifest/0000000000.jsonl"]
    store._lock.release()


# ---- killed, or failing, at every step ----

Step = Callable[[Callable[[], Any]], Any]


@contextlib.contextmanager
def steps(step: Step) -> Iterator[None]:
    """Hands every change of a store to ``step``; without its lock, which `test_remote_lock` is about."""
    with pytest.MonkeyPatch.context() as broken:
        for name in ("write", "write_lines", "delete"):
            true = getattr(RemoteFolder, name)
            broken.setattr(RemoteFolder, name, lambda *given, true=true: step(lambda: true(*given)))
        yield


class Killed(BaseException): ...


@pytest.fixture
def no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unlocked:
        def check(self) -> None: ...

        def alone(self) -> bool:
            return True

    monkeypatch.setattr(remote_store, "remote_lock", lambda *_: contextlib.nullcontext(Unlocked()))


def check_whole(folder: RemoteFolder) -> None:
    """Each line, of the manifest and of the parts, has its label."""
    for file in folder.walk():
        if file.name.startswith("manifest"):
            for line in folder.lines(file.name):
                folder.entry(f"labels/{json.loads(line)['label']}")


def changed(folder: RemoteFolder, shard: tuple[int, int] | None) -> None:
    """A store of an earlier run, all of which is no longer true but one line."""
    with RemoteStore(folder, CLASSES, SETTINGS) as store:
        for name in ("a", "c", "d"):
            store.labels.write(f"{name}.png", LABEL_MAP)
            store.append([record(name) if name == "c" else record(name, bytes=2)])


def killed_late(folder: RemoteFolder, shard: tuple[int, int] | None) -> None:
    """A store that a killed run left with four lines in two parts."""
    left = 10

    def kill(call: Callable[[], Any]) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return call()

    with steps(kill), contextlib.suppress(Killed):
        run(folder, shard=shard)
    assert len([file for file in folder.walk() if file.name.startswith("manifest") and "/" in file.name]) == 2


def test_a_new_part_replaces_none_of_a_killed_run(no_lock: None, folder: RemoteFolder) -> None:
    killed_late(folder, None)
    with RemoteStore(folder, CLASSES, SETTINGS) as store:
        store.append([record("f"), record("g")])
        assert [file.name[-8:] for file in folder.walk("manifest/")] == ["00.jsonl", "01.jsonl", "02.jsonl"]
    paths = [json.loads(line)["path"] for line in folder.lines("manifest.jsonl")]
    assert paths == [f"{name}.jpg" for name in (*NAMES[:4], "f", "g")]


@pytest.mark.parametrize("begin", [lambda *_: None, changed, killed_late], ids=["new", "changed", "killed"])
@pytest.mark.parametrize("shard", [None, (0, 1)], ids=["alone", "shard"])
def test_killed_at_every_step_and_continued(
    no_lock: None, begin: Callable[[RemoteFolder, tuple[int, int] | None], None], shard: tuple[int, int] | None
) -> None:
    run(RemoteFolder("memory://stores/whole"))
    whole = contents(RemoteFolder("memory://stores/whole"))
    left_over = 1 if begin is killed_late else len(NAMES)
    for number in itertools.count():
        folder = RemoteFolder(f"memory://stores/{shard}-{number}")
        begin(folder, shard)
        left = number

        def kill(call: Callable[[], Any]) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed  # and nothing is written from here on
            return call()

        with steps(kill):
            try:
                run(folder, shard=shard)
                killed = False
            except Killed:
                killed = True
        check_whole(folder)
        before, left_over = left_over, run(folder, shard=shard)
        assert left_over <= before, f"{number}: a line that was put is there when the store is folded too"
        assert contents(folder) == whole, number
        if not killed:
            break
    assert number >= 9


@pytest.mark.parametrize("shard", [None, (0, 1)], ids=["alone", "shard"])
def test_a_store_that_fails_at_any_step(no_lock: None, shard: tuple[int, int] | None) -> None:
    run(RemoteFolder("memory://stores/whole"))
    whole = contents(RemoteFolder("memory://stores/whole"))
    stopped = 0
    for number in itertools.count():
        folder = RemoteFolder(f"memory://stores/{shard}-{number}")
        left, failed = number, False

        def fail(call: Callable[[], Any]) -> Any:
            nonlocal left, failed
            left -= 1
            if left < 0:
                failed = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call()

        with steps(fail):
            try:
                run(folder, shard=shard)
            except StoreError as error:
                stopped += 1
                assert "No space left" in error.message
                assert error.hint
        check_whole(folder)
        run(folder, shard=shard)
        assert contents(folder) == whole, number
        if not failed:
            break
    assert stopped >= 10


def test_a_strangers_line_deletes_nothing(folder: RemoteFolder) -> None:
    run(folder)
    folder.write("victim.png", b"thesis")
    line = json.dumps(record("b", label="../victim.png")).encode()
    folder.write("manifest.jsonl", folder.read("manifest.jsonl").replace(json.dumps(record("b")).encode(), line))
    with pytest.raises(StoreError, match=r"manifest\.jsonl: line 2 is damaged: label: "):
        run(folder)
    assert folder.read("victim.png") == b"thesis"


def test_files_that_are_no_parts_are_left_alone(folder: RemoteFolder) -> None:
    run(folder)
    for name in ("manifest/notes.jsonl", "manifest/.keep", "manifest/1.jsonl"):
        folder.write(name, b"mine")
    run(folder)
    assert folder.read("manifest/notes.jsonl") == b"mine"


@pytest.mark.parametrize("data", [b"", b"[" * 9999, b"x" * (1 << 21)])
def test_a_run_file_or_a_line_of_a_stranger_is_refused(folder: RemoteFolder, data: bytes) -> None:
    run(folder)
    if data:
        whole = folder.read("manifest.jsonl")
        folder.write("manifest.jsonl", whole + data + b"\n")
        with pytest.raises(StoreError, match=r"manifest\.jsonl: (line 6 is damaged|cannot be read: a line of more)"):
            run(folder)
        folder.write("manifest.jsonl", whole)
    folder.write("run.json", data)
    with pytest.raises(StoreError, match=r"run\.json: damaged"):
        run(folder)


def test_a_run_file_that_is_too_long_is_not_read(folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run(folder)
    monkeypatch.setattr(remote_store, "MAX_BYTES", size := folder.entry("run.json").size)
    assert run(folder) == 0
    monkeypatch.setattr(remote_store, "MAX_BYTES", size - 1)
    with pytest.raises(StoreError, match=rf"run\.json: expected at most {size - 1} bytes, got {size}"):
        run(folder)
