"""The label store: exact pixels, published whole or not at all, continued after any crash, never mixed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsss import labelstore
from wsss.classes import class_list, palette
from wsss.errors import StoreError
from wsss.labelstore import LabelStore, read_label, read_records, read_run, write_atomically, write_label

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
        assert np.array(image.convert("RGB"))[1, 0].tolist() == [224, 224, 192], "VOC's colour of void"
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


@pytest.mark.parametrize("step", ["save", "fsync", "replace"])
def test_a_save_that_fails_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    with LabelStore(folder, CLASSES, SETTINGS) as store:
        store.write(record("good"), LABEL_MAP)
        owner = {"save": Image.Image, "fsync": labelstore.os, "replace": Path}[step]
        with monkeypatch.context() as broken:
            broken.setattr(owner, step, full)
            with pytest.raises(StoreError, match=r"cannot write the label bad\.png: No space left") as caught:
                store.write(record("bad"), LABEL_MAP)
        assert "make room" in caught.value.hint
        assert [line["path"] for line in read_records(folder)] == ["good.jpg"]
    assert files(folder / "labels") == ["good.png"]
    assert list(read_records(folder)) == [record("good")]


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
    save = labelstore._save

    def move_and_save(label_map: np.ndarray, file: Any) -> None:
        folder.rename(folder.with_name("elsewhere"))
        save(label_map, file)

    with monkeypatch.context() as moving, pytest.raises(StoreError, match="No such file"):
        moving.setattr(labelstore, "_save", move_and_save)
        store.labels.write("a/b.png", LABEL_MAP)
    with pytest.raises(StoreError, match="No such file"):
        store.labels.write("a/c.png", LABEL_MAP)
    assert not folder.exists()
    folder.with_name("elsewhere").rename(folder)
