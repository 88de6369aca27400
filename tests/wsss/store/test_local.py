"""The label store: exact pixels, published whole or not at all, continued after any crash, never mixed."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsss.classes import class_list, palette
from wsss.errors import ImageError, StoreError
from wsss.store import local as labelstore
from wsss.store.format import inside, is_inside, is_label, json_of, line_of, missing_fields, photograph_of
from wsss.store.lines import sections_of
from wsss.store.local import (
    LabelStore,
    label_path,
    read_history,
    read_label,
    read_records,
    read_run,
    write_atomically,
    write_label,
)

CLASSES = class_list(["dog", "cat"])
SETTINGS: dict[str, Any] = {"engine": "ort", "rules": {"nms": 0.5, "tag_threshold": None}}
LABEL_MAP = np.array([[0, 1, 2], [255, 254, 128]], np.uint8)


def record(name: str) -> dict[str, Any]:
    return {"path": f"{name}.jpg", "label": f"{name}.png", "bytes": 1, "sha256": "0" * 64}


def files(folder: Path) -> list[str]:
    """Every file below a folder, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(folder: Path) -> Iterator[LabelStore]:
    with LabelStore(folder, CLASSES, SETTINGS) as opened:
        yield opened


def test_a_new_store_says_what_it_is(store: LabelStore, folder: Path) -> None:
    assert files(folder) == [".lock", "classes.json", "manifest.jsonl", "run.json"]
    assert json.loads((folder / "classes.json").read_text()) == {"0": "background", "1": "dog", "2": "cat", "255": "void"}
    assert read_run(folder) == {"format": 1, "classes": ["dog", "cat"], **SETTINGS}
    assert list(read_records(folder)) == []


def test_a_label_is_an_8_bit_palette_png_with_exact_values(store: LabelStore, folder: Path) -> None:
    store.write(record("a/b/dog"), LABEL_MAP)
    path = folder / "labels" / "a" / "b" / "dog.png"
    with Image.open(path) as image:
        assert (image.mode, image.size) == ("P", (3, 2))
        assert np.array_equal(np.array(image), LABEL_MAP)
        assert image.getpalette() == palette().ravel().tolist()
        assert np.array(image.convert("RGB"))[1, 0].tolist() == [224, 224, 192], "VOC's color of void"
    assert np.array_equal(read_label(path), LABEL_MAP)
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(read_records(folder)) == [record("a/b/dog")]


def test_every_value_survives(tmp_path: Path) -> None:
    label_map = np.arange(256, dtype=np.uint8).reshape(16, 16)
    write_label(tmp_path / "all.png", label_map)
    assert np.array_equal(read_label(tmp_path / "all.png"), label_map)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16", "LA", "1"])
def test_a_label_in_another_mode_is_refused(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (2, 2)).save(tmp_path / "x.png")
    with pytest.raises(StoreError, match=r"x\.png: expected an 8-bit palette PNG"):
        read_label(tmp_path / "x.png")


@pytest.mark.parametrize("data", [b"", b"no png", b"\x89PNG\r\n\x1a\n"])
def test_a_damaged_label_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(StoreError, match=r"x\.png: not a readable label"):
        read_label(tmp_path / "x.png")


def test_a_failed_image_has_a_line_and_no_label(store: LabelStore, folder: Path) -> None:
    store.write({**record("x"), "error": "x.jpg: not readable"}, None)
    assert [line["error"] for line in read_records(folder)] == ["x.jpg: not readable"]
    assert files(folder / "labels") == []


@pytest.mark.parametrize("step", ["png_of", "fsync", "replace"])
def test_a_save_that_fails_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    with LabelStore(folder, CLASSES, SETTINGS) as store:
        store.write(record("good"), LABEL_MAP)
        owner = {"png_of": labelstore, "fsync": labelstore.os, "replace": Path}[step]
        with monkeypatch.context() as broken:
            broken.setattr(owner, step, full)
            with pytest.raises(StoreError, match=r"cannot write the label bad\.png: No space left") as caught:
                store.write(record("bad"), LABEL_MAP)
        assert "free some space" in caught.value.hint
        assert [line["path"] for line in read_records(folder)] == ["good.jpg"]
    assert files(folder / "labels") == ["good.png"]
    assert list(read_records(folder)) == [record("good")]


def test_a_line_that_is_written_in_pieces_is_whole(store: LabelStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:7]))
    store.write(record("one"), LABEL_MAP)
    assert list(read_records(folder)) == [record("one")]


def test_a_line_that_the_disk_has_no_room_for_leaves_no_part(
    store: LabelStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write(record("one"), LABEL_MAP)
    before, write = (folder / "manifest.jsonl").read_bytes(), os.write

    def full(handle: int, data: bytes) -> int:
        write(handle, data[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(StoreError, match=r"cannot write the line of two\.jpg: No space left"):
        patched.setattr(os, "write", full)
        store.write(record("two"), LABEL_MAP)
    assert (folder / "manifest.jsonl").read_bytes() == before
    store.write(record("two"), LABEL_MAP)
    assert list(read_records(folder)) == [record("one"), record("two")]


def test_write_atomically_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    write_atomically(path, b"old")
    with monkeypatch.context() as broken:
        broken.setattr(labelstore.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == ["page.html"]


@dataclass(frozen=True)
class Photo:
    name: str
    label: str


def photos(*names: str) -> list[Photo]:
    return [Photo(f"{name}.jpg", f"{name}.png") for name in names]


def test_a_store_is_continued(folder: Path) -> None:
    with LabelStore(folder, CLASSES, SETTINGS) as store:
        store.write(record("one"), LABEL_MAP)
    with LabelStore(folder, CLASSES, SETTINGS) as store:
        wanted = photos("one", "three", "two")
        told = store.select(wanted, lambda photo, line: line == record("one"))
        assert (told.images, told.done, told.failed) == (3, 1, 0)
        assert [photo.name for photo in store.missing(wanted)] == ["three.jpg", "two.jpg"]
        store.append([record("three"), record("two")])
    assert [line["path"] for line in read_records(folder)] == ["one.jpg", "three.jpg", "two.jpg"]


def test_lines_that_are_no_longer_true_are_dropped_and_others_stay(folder: Path) -> None:
    with LabelStore(folder, CLASSES, SETTINGS) as store:
        for name in ("a", "b", "c", "d"):
            store.write(record(name), LABEL_MAP)
        moved = [Photo("b.jpg", "b.png"), Photo("c.jpg", "c.jpg.png")]
        told = store.select(moved, lambda photo, line: photo.label == line["label"])
        assert (told.images, told.done) == (2, 1)
        assert [line["path"] for line in read_records(folder)] == ["a.jpg", "b.jpg", "d.jpg"]
    assert files(folder / "labels") == ["a.png", "b.png", "d.png"], "the label of a name that changed is gone"


def test_a_line_out_of_order_is_sorted_when_the_store_is_closed(folder: Path) -> None:
    with LabelStore(folder, CLASSES, SETTINGS) as store:
        for name in ("b", "d", "a", "c"):
            store.write(record(name), LABEL_MAP)
        assert [line["path"] for line in read_records(folder)] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"], "and read sorted before"
    lines = (folder / "manifest.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["path"] for line in lines] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]


def test_an_image_done_twice_has_one_line_the_last(folder: Path) -> None:
    with LabelStore(folder, CLASSES, SETTINGS) as store:
        store.write(record("one"), LABEL_MAP)
        store.write({**record("one"), "bytes": 2}, LABEL_MAP)
    with LabelStore(folder, CLASSES, SETTINGS):
        pass
    assert len((folder / "manifest.jsonl").read_bytes().splitlines()) == 1
    with LabelStore(folder, CLASSES, SETTINGS):
        assert [line["bytes"] for line in read_records(folder)] == [2]


def test_shards_write_lines_of_their_own_until_the_last_one_leaves(folder: Path) -> None:
    with LabelStore(folder, CLASSES, SETTINGS) as store:
        for name in ("a", "b"):
            store.write(record(name), LABEL_MAP)
    with LabelStore(folder, CLASSES, SETTINGS, shard=(1, 2)) as other:
        other.select(photos("b"), lambda *_: False)
        other.write(record("b") | {"bytes": 2}, LABEL_MAP)
        with LabelStore(folder, CLASSES, SETTINGS, shard=(0, 2)) as store:
            assert store.select(photos("a", "c"), lambda *_: True).done == 1
            store.write(record("c"), LABEL_MAP)
        lines = {path.name: path.read_text().count("\n") for path in folder.glob("*.jsonl")}
        assert lines == {"manifest.jsonl": 2, "manifest-0-of-2.jsonl": 2, "manifest-1-of-2.jsonl": 1}
        assert [line["bytes"] for line in read_records(folder)] == [1, 2, 1], "a shard's lines are newer"
    assert [path.name for path in folder.glob("*.jsonl")] == ["manifest.jsonl"]
    assert [line["bytes"] for line in read_records(folder)] == [1, 2, 1]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux, which lists a process's open files")
def test_a_store_leaves_no_file_open(folder: Path) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = open_files()
    with LabelStore(folder, CLASSES, SETTINGS) as store:
        during = open_files()
        for number in range(3):
            store.select(photos("a"), lambda *_: True)
            store.write(record("a") | {"bytes": number}, LABEL_MAP)
            store.add_history({})
        assert open_files() == during
    assert open_files() == before


def test_an_empty_label_which_a_power_cut_leaves_is_none(store: LabelStore, folder: Path) -> None:
    (folder / "labels" / "one.png").touch()
    assert not store.has_label("one.png")
    store.labels.write("one.png", LABEL_MAP)
    assert store.has_label("one.png")


def test_a_last_line_cut_at_any_byte_is_done_again(folder: Path) -> None:
    with LabelStore(folder, CLASSES, SETTINGS) as store:
        store.write(record("one"), LABEL_MAP)
        store.write(record("two"), LABEL_MAP)
    manifest = folder / "manifest.jsonl"
    assert files(folder) == ["classes.json", "labels/one.png", "labels/two.png", "manifest.jsonl", "run.json"]
    whole = manifest.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole) - 1):
        manifest.write_bytes(whole[:cut])
        assert [line["path"] for line in read_records(folder)] == ["one.jpg"], cut
    with LabelStore(folder, CLASSES, SETTINGS) as store:
        store.write(record("two"), LABEL_MAP)
    assert manifest.read_bytes() == whole


@pytest.mark.parametrize("line", [b"{", b"{}", b'{"path": "x"}', b"7", b'"text"', b"\xff"])
def test_a_damaged_line_before_the_last_is_named(folder: Path, line: bytes) -> None:
    with LabelStore(folder, CLASSES, SETTINGS) as store:
        store.write(record("one"), LABEL_MAP)
    manifest = folder / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes() + line + b"\n" + manifest.read_bytes())
    with pytest.raises(StoreError, match=r"manifest\.jsonl: line 2 is damaged"):
        list(read_records(folder))


@pytest.mark.parametrize(
    ("classes", "settings", "said"),
    [
        (["dog"], SETTINGS, "made with classes"),
        (["cat", "dog"], SETTINGS, "made with classes"),
        (["dog", "cat"], {**SETTINGS, "engine": "eager"}, 'made with engine = "ort", this run has "eager"'),
        (["dog", "cat"], {**SETTINGS, "rules": {"nms": 0.6, "tag_threshold": None}}, "made with rules"),
        (["dog", "cat"], {"engine": "ort"}, "made with rules"),
    ],
)
def test_a_store_of_other_settings_is_not_touched(folder: Path, classes: list[str], settings: dict[str, Any], said: str) -> None:
    with LabelStore(folder, CLASSES, SETTINGS) as store:
        store.write(record("one"), LABEL_MAP)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(StoreError, match=said) as caught:
        LabelStore(folder, class_list(classes), settings)
    assert str(folder) in caught.value.message
    assert "new --out" in caught.value.hint
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_with_the_lock_of_a_killed_run_is_empty(folder: Path) -> None:
    folder.mkdir()
    (folder / ".lock").touch()
    with LabelStore(folder, CLASSES, SETTINGS):
        assert read_run(folder)["classes"] == ["dog", "cat"]


def test_a_folder_that_holds_something_else_is_refused(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").write_text("...")
    with pytest.raises(StoreError, match="not empty and holds no label store"):
        LabelStore(folder, CLASSES, SETTINGS)
    assert files(folder) == ["thesis.tex"]


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "\xff"])
def test_a_damaged_run_file_is_named(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(StoreError, match=r"run\.json: damaged"):
        LabelStore(folder, CLASSES, SETTINGS)
    with pytest.raises(StoreError, match=r"run\.json: damaged"):
        read_run(folder)


def test_a_folder_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        LabelStore(tmp_path / "file" / "store", CLASSES, SETTINGS)
    with pytest.raises(StoreError, match="cannot be written"):
        LabelStore(tmp_path / "file", CLASSES, SETTINGS)


def test_a_crash_while_the_store_is_made_is_healed_by_the_next_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before each of the writes that make a new store, the last one leaving its temporary behind."""

    class Killed(BaseException): ...

    for step in range(2):
        here = folder / str(step)
        left = iter(range(step))

        def dies(path: Path, data: bytes, temporary: Path | None = None, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                (path.parent / ".tmp" / ".k1ll3d.tmp").write_bytes(data[:5])
                raise Killed
            write_atomically(path, data, temporary=temporary)

        with monkeypatch.context() as broken, pytest.raises(Killed):
            broken.setattr(labelstore, "write_atomically", dies)
            LabelStore(here, CLASSES, SETTINGS)
        with LabelStore(here, CLASSES, SETTINGS) as store:
            store.write(record("one"), LABEL_MAP)
        assert list(read_records(here)) == [record("one")]


def test_a_name_that_is_no_unicode_is_kept(folder: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    with LabelStore(folder, CLASSES, SETTINGS) as store:
        store.write(record(name), LABEL_MAP)
    with LabelStore(folder, CLASSES, SETTINGS) as store:
        assert [photo.name for photo in store.missing(photos(name))] == []
    assert [line["label"] for line in read_records(folder)] == [f"{name}.png"]
    assert read_label(folder / "labels" / f"{name}.png").shape == (2, 3)


def test_a_store_that_is_moved_in_the_middle_of_a_write_is_not_begun_anew(
    store: LabelStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = labelstore.png_of

    def move_and_encode(label_map: np.ndarray) -> memoryview:
        folder.rename(folder.with_name("elsewhere"))
        return encode(label_map)

    with monkeypatch.context() as moving, pytest.raises(StoreError, match="No such file"):
        moving.setattr(labelstore, "png_of", move_and_encode)
        store.labels.write("a/b.png", LABEL_MAP)
    with pytest.raises(StoreError, match="No such file"):
        store.labels.write("a/c.png", LABEL_MAP)
    assert not folder.exists()
    folder.with_name("elsewhere").rename(folder)


def test_a_name_that_the_file_system_does_not_allow_fails_its_image_alone(store: LabelStore) -> None:
    name = f"{'x' * 300}.png"
    with pytest.raises(ImageError, match="x.png: a label cannot have this name: File name too long"):
        store.labels.write(name, LABEL_MAP)
    store.write(record("one"), LABEL_MAP)


# ---- stores from elsewhere ----


@pytest.mark.parametrize("name", ["nothing", "empty", "x" * 300])
def test_what_is_no_store_is_told_apart_from_a_damaged_one(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match=r"expected a label store \(with run\.json\)") as caught:
        read_run(tmp_path / name)
    assert caught.value.hint == "wsss label makes one"


WHOLE: dict[str, Any] = {
    "path": "one.jpg",
    "label": "one.png",
    "bytes": 1,
    "mtime_ns": 1,
    "sha256": "0" * 64,
    "height": 2,
    "width": 3,
    "classes": {"dog": 0.5},
    "boxes": [{"label": "dog", "score": 0.5, "xyxy": [0, 0, 1.5, 2], "quality": 1.02, "area_px": 2, "won_px": 1}],
    "void_px": 1,
}


def store_of(folder: Path, *lines: bytes) -> Path:
    with LabelStore(folder, CLASSES, SETTINGS):
        pass
    (folder / "manifest.jsonl").write_bytes(b"".join(lines))
    return folder


def line(**changed: object) -> bytes:
    return (json.dumps(WHOLE | changed) + "\n").encode()


def box(**changed: object) -> list[dict[str, Any]]:
    return [WHOLE["boxes"][0] | changed]


def test_a_line_may_lack_what_is_optional_and_have_more(folder: Path) -> None:
    lines = [
        line(seconds={"tag": 1}, other=[None]),
        b'{"path": "two.jpg", "label": "a/..b/two.png"}\n',
        line(path="/x", mtime_ns=-1, boxes=box(quality=-0.1, xyxy=[0, 3, 2, 4])),
        line(path="/y", classes={str(number): 0.5 for number in range(254)}, boxes=box() * 256),
    ]
    assert [each["path"] for each in read_records(store_of(folder, *lines))] == ["/x", "/y", "one.jpg", "two.jpg"]


PIXELS = 178_956_970
"""Pillow's own limit."""


@pytest.mark.parametrize(
    ("most", "more"),
    [
        (line(bytes=2**63 - 1), line(bytes=2**63)),
        (line(bytes=0), line(bytes=-1)),
        (line(mtime_ns=2**63 - 1), line(mtime_ns=2**63)),
        (line(mtime_ns=1 - 2**63), line(mtime_ns=-(2**63))),
        (line(height=PIXELS, width=1), line(height=PIXELS + 1, width=1)),
        (line(height=1, width=1), line(height=0, width=1)),
        (line(path="a" * 65_536), line(path="a" * 65_537)),
        (line(etag="a" * 65_536), line(etag="a" * 65_537)),
        (line(classes=dict.fromkeys(map(str, range(254)), 0.5)), line(classes=dict.fromkeys(map(str, range(255)), 0.5))),
        (line(classes={"dog": 1}), line(classes={"dog": 1.0001})),
        (line(classes={"dog": 0}), line(classes={"dog": -0.0001})),
        (line(boxes=box() * 256), line(boxes=box() * 257)),
        (line(boxes=box(score=1)), line(boxes=box(score=1.0001))),
        (line(boxes=box(score=0)), line(boxes=box(score=-0.0001))),
        (line(boxes=box(quality=100)), line(boxes=box(quality=100.01))),
        (line(boxes=box(quality=-100)), line(boxes=box(quality=-100.01))),
        (line(boxes=box(xyxy=[-PIXELS, 0, PIXELS, 1])), line(boxes=box(xyxy=[0, 0, PIXELS + 1, 1]))),
        (line(boxes=box(xyxy=[-PIXELS, 0, -PIXELS, 0])), line(boxes=box(xyxy=[-PIXELS - 1, 0, 1, 1]))),
        (line(boxes=box(area_px=0, won_px=0)), line(boxes=box(won_px=-1))),
    ],
)
def test_a_line_at_a_limit_is_read_and_beyond_it_refused(folder: Path, most: bytes, more: bytes) -> None:
    assert len(list(read_records(store_of(folder, most)))) == 1
    with pytest.raises(StoreError):
        list(read_records(store_of(folder, more)))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (line(label="../../victim.png"), "label: expected the path of a PNG file below labels/"),
        (line(label="/victim.png"), "label: "),
        (line(label="a/./b.png"), "label: "),
        (line(label="a//b.png"), "label: "),
        (line(label="a/.."), "label: "),
        (line(label="victim.txt"), "label: "),
        (line(label="a\0.png"), "label: "),
        (line(label=".png/"), "label: "),
        (line(label="\ud800.png"), "label: "),
        (line(label=7), "label: "),
        (line(label=""), "label: "),
        (line(path=""), "path: expected the name of a file"),
        (line(path="a\0"), "path: "),
        (line(path=["a"]), "path: "),
        (line(path="a" * 70000), "path: "),
        (line(bytes=-1), "bytes: expected a count"),
        (line(bytes=True), "bytes: "),
        (line(bytes=10**30), "bytes: "),
        (line(mtime_ns=1.5), "mtime_ns: "),
        (line(sha256="0"), "sha256: expected 64"),
        (line(sha256="0" * 64 + "\n"), "sha256: "),
        (line(sha256=None), "sha256: "),
        (line(etag=7), "etag: expected a text"),
        (line(error=None), "error: "),
        (line(height=0), "height, width: expected at most"),
        (line(height=50_000, width=50_000), "height, width: "),
        (line(width="3"), "width: "),
        (line(void_px=2.0), "void_px: "),
        (line(classes=["dog"]), "classes: expected an object"),
        (line(classes={"dog": 1.01}), "classes: expected scores in 0..1"),
        (line(classes={"dog": "high"}), "classes: "),
        (line(classes={str(n): 0.5 for n in range(255)}), "classes: "),
        (line(boxes={}), "boxes: expected at most 256"),
        (line(boxes=box() * 257), "boxes: expected at most 256"),
        (line(boxes=[7]), "boxes: expected an object"),
        (line(boxes=box(label=None)), "boxes: label: "),
        (line(boxes=box(xyxy=[0, 0, 1])), "boxes: xyxy: expected four numbers"),
        (line(boxes=box(xyxy=[0, 0, 1, "2"])), "boxes: xyxy: "),
        (line(boxes=box(xyxy=[2, 0, 1, 1])), "boxes: xyxy: expected the upper left corner first"),
        (line(boxes=box(xyxy=[0, 2, 9, 1])), "boxes: xyxy: expected the upper left corner first"),
        (line(boxes=box(score=-0.1)), "boxes: score: "),
        (line(boxes=box(score=True)), "boxes: score: "),
        (line(boxes=box(quality=None)), "boxes: quality: "),
        (line(boxes=box(quality=1e9)), "boxes: quality: "),
        (line(boxes=box(won_px=-1)), "boxes: won_px: "),
        (line(boxes=box(area_px=1.5)), "boxes: area_px: "),
        (line(boxes=box(score=float("nan"))), "expected finite numbers, got NaN"),
        (line().replace(b"1.02", b"1e999"), "boxes: quality: "),
        (line().replace(b'"dog": 0.5', b'"dog": 0.5, "dog": 0.6'), "a key occurs twice"),
        (b"[" * 200_000 + b"\n", "nested too deep"),
        (b'{"bytes": ' + b"9" * 5000 + b"}\n", "Exceeds the limit"),
        (b"\xff\xfe{}\n", "'utf-8' codec can't decode byte"),
        (b"x" * (1 << 20) + b"\n", "longer than 1,048,576 bytes"),
        (b"x" * (1 << 21), "longer than 1,048,576 bytes"),
    ],
)
def test_a_line_that_cannot_be_is_named_and_harms_nothing(folder: Path, data: bytes, said: str) -> None:
    victim = folder.parent / "victim.png"
    victim.touch()
    store_of(folder, line(path="a.jpg", label="a.png"), data)
    with pytest.raises(StoreError) as caught:
        list(read_records(folder))
    assert f"manifest.jsonl: line 2 is damaged: {said}" in caught.value.message
    assert "delete that line" in caught.value.hint
    assert len(caught.value.message) < 1000
    with LabelStore(folder, CLASSES, SETTINGS) as store:
        if data.endswith(b"\n"):
            with pytest.raises(StoreError, match="line 2 is damaged"):
                store.select(photos("one"), lambda *_: False)
        else:  # cut when the store was opened
            assert store.select(photos("one"), lambda *_: False).done == 0
    assert victim.exists()


def test_boxes_of_older_versions_have_no_area() -> None:
    older = [{key: value for key, value in box()[0].items() if key != "area_px"}]
    assert missing_fields(WHOLE | {"boxes": older}, ("boxes",)) == ""
    assert missing_fields(WHOLE | {"boxes": [*older, {"label": "dog"}]}, ("boxes",)).startswith("has a box that lacks one of ")


def test_a_folder_whose_name_starts_like_that_of_the_images_is_outside(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    assert photograph_of(tmp_path / "photos", "a/../b.jpg") == tmp_path / "photos" / "b.jpg"
    with pytest.raises(StoreError, match=r"\.\./photos-2/a\.jpg: leads out of --images"):
        photograph_of(tmp_path / "photos", "../photos-2/a.jpg")


def test_what_is_below_the_current_folder() -> None:
    inside_of_it = {
        "a.jpg": True,
        "a/b.jpg": True,
        "..a/b.jpg": True,
        "../a.jpg": False,
        "..": False,
        os.path.abspath("a"): False,
    }
    assert {name: is_inside(name, os.curdir) for name in inside_of_it} == inside_of_it


def test_a_file_in_the_place_of_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        labelstore.make_folder(tmp_path / "labels")


def test_lines_in_order_are_one_section(tmp_path: Path) -> None:
    """The lines of a, b and d were written by one run, that of c by a later one."""
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(b"".join(line_of(record(name)) for name in "abdc"))
    assert [[line.path for line in section] for section in sections_of(path)] == [["a.jpg", "b.jpg", "d.jpg"], ["c.jpg"]]


def test_labels_with_drives_and_backslashes_are_refused_where_they_mean_something() -> None:
    for name in ("..\\victim.png", "C:victim.png", "a\\b.png"):
        assert is_label(name, windows=False)
        assert not is_label(name, windows=True)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"classes": None}, "expected classes, 1 to 254 names"),
        ({"classes": []}, "expected classes"),
        ({"classes": ["dog", "dog"]}, "different names"),
        ({"classes": ["dog", 7]}, "the name of a class"),
        ({"classes": ["dog", "c\x1b[2Jat"]}, "the name of a class"),
        ({"classes": [str(n) for n in range(255)]}, "expected classes"),
        ({"rules": {"tag_threshold": "high"}}, "tag_threshold in 0..1"),
        ({"rules": {"tag_thresholds": {"dog": 2}}}, "tag_thresholds, an object of numbers in 0..1"),
        ({"rules": {"tag_thresholds": [0.5]}}, "tag_thresholds, an object of numbers in 0..1"),
        ({"format": 2}, "expected format 1, got 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(folder: Path, changed: dict[str, Any], said: str) -> None:
    store_of(folder)
    (folder / "run.json").write_text(json.dumps({"format": 1, "classes": ["dog", "cat"], **SETTINGS} | changed))
    with pytest.raises(StoreError, match=said) as caught:
        read_run(folder)
    assert "run.json" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("text", ["[" * 200_000, '{"classes": ["dog"], "classes": ["cat"]}', '{"classes": ["dog"], "x": NaN}'])
def test_a_run_file_that_is_no_plain_json_is_refused(folder: Path, text: str) -> None:
    store_of(folder)
    (folder / "run.json").write_text(text)
    with pytest.raises(StoreError, match=r"run\.json: damaged"):
        read_run(folder)


@pytest.mark.parametrize("name", ["labels", "labels/sub", ".tmp"])
def test_nothing_is_written_or_deleted_through_a_link_that_leaves_the_store(folder: Path, name: str) -> None:
    with LabelStore(folder, CLASSES, SETTINGS) as store:
        store.write(record("sub/one"), LABEL_MAP)
    elsewhere = folder.parent / "elsewhere"
    if name == ".tmp":
        elsewhere.mkdir()
    else:
        (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    before = files(elsewhere)
    with pytest.raises(StoreError, match="a link leads out of the store"), LabelStore(folder, CLASSES, SETTINGS) as store:
        with pytest.raises(StoreError, match="a link leads out of the store"):
            store.labels.write("sub/two.png", LABEL_MAP)
        store.select([Photo("sub/one.jpg", "sub/one.jpg.png")], lambda *_: False)
    with pytest.raises(StoreError, match="a link leads out of the store"):
        label_path(folder, "sub/one.png") if name != ".tmp" else inside(folder, ".tmp")
    assert files(elsewhere) == before


def test_a_label_that_is_itself_a_link_is_deleted_as_a_link(folder: Path) -> None:
    with LabelStore(folder, CLASSES, SETTINGS) as store:
        store.write(record("one"), LABEL_MAP)
        victim = folder.parent / "victim.txt"
        victim.write_text("thesis")
        (folder / "labels/one.png").unlink()
        (folder / "labels/one.png").symlink_to(victim)
        store.select([Photo("one.jpg", "one.jpg.png")], lambda *_: False)
        store.labels.write("one.png", LABEL_MAP)
    assert victim.read_text() == "thesis"
    assert not (folder / "labels/one.png").is_symlink()


@pytest.mark.parametrize("name", ["manifest.jsonl", "history.jsonl"])
def test_lines_are_not_read_or_written_through_a_link_or_a_pipe(folder: Path, name: str) -> None:
    store_of(folder)
    victim = folder.parent / "victim.txt"
    for make in (lambda path: path.symlink_to(victim), os.mkfifo):
        victim.write_text("whole\ntorn")
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        with pytest.raises(StoreError, match=rf"{name}: expected a regular file"), LabelStore(folder, CLASSES, SETTINGS) as store:
            store.add_history({"labelled": 1})
        assert read_history(folder) == []
        assert victim.read_text() == "whole\ntorn"
        (folder / name).unlink()


def test_history_that_is_damaged_is_left_out(folder: Path) -> None:
    store_of(folder)
    good = b'{"labelled": 1, "seconds": 2.5, "stage_seconds": {"tag": 1}}\n'
    bad = [
        b"{\n",
        b"7\n",
        b'{"labelled": "x"}\n',
        b'{"labelled": 1, "seconds": NaN}\n',
        b'{"labelled": 1, "seconds": -1}\n',
        b'{"stage_seconds": {"tag": "x"}}\n',
        b"[" * 9999,
    ]
    (folder / "history.jsonl").write_bytes(good + b"".join(bad))
    assert [each["labelled"] for each in read_history(folder)] == [1]
    (folder / "history.jsonl").write_bytes(good + good[:-1])
    assert len(read_history(folder)) == 1, "the last line has no end"


@pytest.mark.parametrize(
    ("mode", "size", "said"),
    [
        ("L", (50_000, 50_000), "decompression bomb|at most 178,956,970 pixels"),
        ("P", (4, 2), "is 4 x 2 pixels, the photograph was 3 x 2"),
    ],
)
def test_a_label_is_measured_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, size: tuple[int, int], said: str
) -> None:
    path = tmp_path / "x.png"
    Image.new(mode, (1, 1)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", *size)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("was decoded"))
    with pytest.raises(StoreError, match=said) as caught:
        read_label(path, shape=(2, 3) if mode == "P" else None)
    assert caught.value.hint


def test_gray_of_four_bits_which_pillow_stretches_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    rows = zlib.compress(b"\0\x12\0\x30")  # a filter byte and two pixels a row
    header = struct.pack(">IIBBBBB", 2, 2, 4, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    )
    with pytest.raises(StoreError, match="got 4-bit gray"):
        read_label(path)


def test_compressed_text_in_a_label_cannot_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    write_label(path, LABEL_MAP)
    text = b"x\0\0" + zlib.compress(bytes(1 << 28), 9)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    data = path.read_bytes()
    path.write_bytes(data[:33] + chunk + data[33:])
    with pytest.raises(StoreError, match="not a readable label: Decompressed data too large"):
        read_label(path)


@pytest.mark.parametrize("size", [1, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, 200_000])
def test_a_torn_line_of_any_length_is_cut(folder: Path, size: int) -> None:
    store_of(folder, line(), b"x" * size)
    with LabelStore(folder, CLASSES, SETTINGS) as store:
        assert (folder / "manifest.jsonl").read_bytes() == line()
        store.append([record("two") | {"error": "no"}])
    assert [each["path"] for each in read_records(folder)] == ["one.jpg", "two.jpg"]


@pytest.mark.parametrize("size", [1, 200_000])
def test_a_first_line_that_is_torn_is_cut(folder: Path, size: int) -> None:
    store_of(folder, b"x" * size)
    with LabelStore(folder, CLASSES, SETTINGS):
        assert (folder / "manifest.jsonl").read_bytes() == b""


def test_a_whole_line_that_lacks_its_line_break_is_done_again(folder: Path) -> None:
    store_of(folder, line(path="a.jpg"), line()[:-1])
    assert [each["path"] for each in read_records(folder)] == ["a.jpg"]
    with LabelStore(folder, CLASSES, SETTINGS) as store:
        assert [photo.name for photo in store.missing(photos("one"))] == ["one.jpg"]
        assert (folder / "manifest.jsonl").read_bytes() == line(path="a.jpg")


def test_an_error_of_any_length_can_be_read_back(folder: Path) -> None:
    with LabelStore(folder, CLASSES, SETTINGS) as store:
        store.append([record("one") | {"error": "no " * (1 << 20)}])
    [told] = read_records(folder)
    assert told["error"].startswith("no no ")
    assert len(told["error"]) < 5000


def test_a_power_cut_at_any_time_leaves_no_line_without_its_label(folder: Path, disk: list[str]) -> None:
    """Each file is on the disk before its name, each name before what relies on it."""
    with LabelStore(folder, CLASSES, SETTINGS) as store:
        assert disk == [
            "fsync /",  # the store's name
            "fsync store/",
            *("fsync .tmp", "rename run.json", "fsync store/"),
            *("fsync .tmp", "rename classes.json", "fsync store/"),
            "fsync store/",  # labels/
            "fsync store/",  # manifest.jsonl
        ]
        disk.clear()
        store.write(record("a/one"), LABEL_MAP)
        assert disk == ["fsync labels/", "fsync .tmp", "rename one.png", "fsync a/", "fsync manifest.jsonl"]
        disk.clear()
        store.add_history({"labelled": 1})
        assert disk == ["fsync store/", "fsync history.jsonl"]
        disk.clear()
        store.select([], lambda *_: True)
        assert disk == ["fsync .tmp", "rename manifest.jsonl", "fsync store/"]
    disk.clear()
    (folder / "manifest.jsonl").write_bytes(b"torn")
    with LabelStore(folder, CLASSES, SETTINGS):
        assert disk[-1:] == ["fsync manifest.jsonl"], "the cut"


def test_files_can_be_read_by_people() -> None:
    assert json_of({"classes": ["Bär"]}) == '{\n "classes": [\n  "Bär"\n ]\n}\n'.encode()
