"""Label maps are found and paired by name; only indices are read, and never others than were written."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsss.errors import StoreError, WsssError
from wsss.train.evaluate.files import find_label_maps, list_lines, pair_up, read_label_map, read_list

MAP = np.array([[0, 1, 2], [3, 20, 255]], np.uint8)


def write(path: Path, label_map: np.ndarray = MAP, mode: str = "P") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(label_map)
    if mode == "P":
        image.putpalette(bytes(range(256)) * 3)
    image.save(path)
    return path


def packed_png(path: Path, rows: list[bytes], width: int, depth: int, color: int) -> Path:
    """A PNG made by hand, with any bit depth."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, color, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(range(48))) if color == 3 else b""
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    return path


# ---- reading ----


@pytest.mark.parametrize("mode", ["P", "L"])
def test_palette_and_gray_are_read_as_indices(tmp_path: Path, mode: str) -> None:
    found = read_label_map(write(tmp_path / "a.png", mode=mode))
    assert found.dtype == np.uint8
    assert np.array_equal(found, MAP)


@pytest.mark.parametrize("color", [0, 3], ids=["gray", "palette"])
@pytest.mark.parametrize(
    ("depth", "row", "want"), [(1, 0b10110000, [1, 0, 1, 1]), (2, 0b00011011, [0, 1, 2, 3]), (4, None, [7, 0, 15, 2])]
)
def test_few_bits_are_not_stretched(tmp_path: Path, depth: int, color: int, row: int | None, want: list[int]) -> None:
    """Pillow shows a gray PNG of 2 bits as 0, 85, 170, 255: other labels, and void."""
    data = bytes([0x70, 0xF2]) if row is None else bytes([row])
    found = read_label_map(packed_png(tmp_path / "a.png", [data, data], 4, depth, color))
    assert found.tolist() == [want, want]
    assert found.dtype == np.uint8


def test_sixteen_bits_hold_labels_too(tmp_path: Path) -> None:
    assert np.array_equal(read_label_map(write(tmp_path / "a.png", MAP.astype(np.uint16), mode="L")), MAP)
    with pytest.raises(StoreError, match=r"a\.png: expected labels of 0 to 255, got 256 in a 16-bit PNG"):
        read_label_map(write(tmp_path / "a.png", np.array([[0, 256]], np.uint16), mode="L"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colors_are_no_labels(tmp_path: Path, mode: str) -> None:
    Image.fromarray(MAP).convert(mode).save(tmp_path / "a.png")
    with pytest.raises(StoreError, match=rf"a\.png: expected labels as indices .* got mode {mode}") as caught:
        read_label_map(tmp_path / "a.png")
    assert ("save only the first channel" if mode == "LA" else "map them to indices") in caught.value.hint


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 21, (40, 50)).astype(np.uint8)).read_bytes()
    for length in [*range(0, len(whole), 29), *range(len(whole) - 30, len(whole))]:
        (tmp_path / "cut.png").write_bytes(whole[:length])
        with pytest.raises(StoreError, match=r"cut\.png: not a readable PNG"):
            read_label_map(tmp_path / "cut.png")


def test_other_files_are_refused(tmp_path: Path) -> None:
    Image.fromarray(MAP).save(tmp_path / "a.bmp")
    (tmp_path / "a.bmp").rename(tmp_path / "a.png")
    with pytest.raises(StoreError, match=r"a\.png: not a readable PNG: no PNG header"):
        read_label_map(tmp_path / "a.png")
    with pytest.raises(StoreError, match=r"b\.png: cannot be read: No such file"):
        read_label_map(tmp_path / "b.png")


def test_a_bomb_is_not_decoded(tmp_path: Path) -> None:
    packed_png(tmp_path / "a.png", [b"\0"], 4, 8, 0)
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = struct.pack(">II", 50_000, 50_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(StoreError, match=r"a\.png: expected at most 178,956,970 pixels, got 50000 x 50000"):
        read_label_map(tmp_path / "a.png")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(StoreError, match=r"a\.png: expected a regular file, got a named pipe"):
        read_label_map(tmp_path / "a.png")
    with pytest.raises(WsssError, match=r"--list .*a\.png: expected a regular file"):
        list_lines(tmp_path / "a.png", "--list")


# ---- finding ----


def test_a_plain_folder_with_subfolders(tmp_path: Path) -> None:
    for name in ("b.png", "a/b.png", "a/c.d.PNG", ".hidden.png", ".git/x.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = find_label_maps(tmp_path)
    assert dict(found.paths) == {"a/b": tmp_path / "a/b.png", "a/c.d": tmp_path / "a/c.d.PNG", "b": tmp_path / "b.png"}
    assert found.classes is None


def test_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    """A link to a folder above would have no end."""
    write(tmp_path / "maps" / "a.png")
    (tmp_path / "maps" / "up").symlink_to(tmp_path)
    write(tmp_path / "b.png")
    assert list(find_label_maps(tmp_path / "maps").paths) == ["a"]


def test_vocs_layout(tmp_path: Path) -> None:
    write(tmp_path / "SegmentationClassAug" / "2007_000032.png")
    write(tmp_path / "SegmentationObject" / "2007_000033.png")
    assert list(find_label_maps(tmp_path).paths) == ["2007_000032"]
    write(tmp_path / "SegmentationClass" / "2007_000039.png")
    assert list(find_label_maps(tmp_path).paths) == ["2007_000039"], "the benchmark's own labels come first"


def store(folder: Path, *records: dict[str, object], classes: object = ("dog", "cat")) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"classes": classes}))
    (folder / "manifest.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_a_label_store_is_what_its_manifest_says(tmp_path: Path) -> None:
    for name in ("a.png", "x/b.jpg.png", "unfinished.png"):
        write(tmp_path / "labels" / name)
    store(
        tmp_path,
        {"path": "a.jpg", "label": "a.png", "classes": {"dog": 0.9}},
        {"path": "broken.jpg", "label": "broken.png", "error": "not a readable image"},
        {"path": "gone.jpg", "label": "gone.png", "classes": {}},
        {"path": "x/b.jpg", "label": "x/b.jpg.png", "classes": {}},
    )
    found = find_label_maps(tmp_path)
    assert dict(found.paths) == {"a": tmp_path / "labels/a.png", "x/b.jpg": tmp_path / "labels/x/b.jpg.png"}
    assert found.classes == ("dog", "cat")
    assert found.scores == {"a": {"dog": 0.9}, "x/b.jpg": {}}


@pytest.mark.parametrize("classes", [{"horse": 0.9}, {"dog": "high"}, ["dog"], None])
def test_a_damaged_manifest(tmp_path: Path, classes: object) -> None:
    write(tmp_path / "labels" / "a.png")
    with pytest.raises(StoreError, match=r"manifest\.jsonl: .*damaged: (a has )?classes"):
        find_label_maps(store(tmp_path, {"path": "a.jpg", "label": "a.png", "classes": classes}))


def test_folders_without_label_maps(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere: expected a folder of label maps, found nothing"):
        find_label_maps(tmp_path / "nowhere")
    with pytest.raises(StoreError, match=r"a\.png: expected a folder of label maps, found a file"):
        find_label_maps(write(tmp_path / "a.png"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="empty: no label map in it"):
        find_label_maps(tmp_path / "empty")
    with pytest.raises(StoreError, match="a label store without a finished image"):
        find_label_maps(store(tmp_path / "store"))
    with pytest.raises(StoreError, match=r"run\.json: damaged"):
        find_label_maps(store(tmp_path / "store", classes="dog"))
    write(tmp_path / "twice" / "a.png")
    write(tmp_path / "twice" / "a.PNG")
    with pytest.raises(StoreError, match=r"twice/a\.png: has the name of .*twice/a\.PNG"):
        find_label_maps(tmp_path / "twice")


# ---- pairing ----


def folders(tmp_path: Path, predicted: str, truth: str) -> tuple[Path, Path]:
    for folder, names in (("predicted", predicted), ("truth", truth)):
        (tmp_path / folder).mkdir()
        for name in names.split():
            write(tmp_path / folder / f"{name}.png")
    return tmp_path / "predicted", tmp_path / "truth"


def test_pairs_by_name_and_what_has_no_partner(tmp_path: Path) -> None:
    predicted, truth = folders(tmp_path, "b x a/c y", "d a/c b a")
    pairs = pair_up(find_label_maps(predicted), find_label_maps(truth))
    assert pairs.names == ("a", "a/c", "b", "d")
    assert pairs.truth == tuple(truth / f"{name}.png" for name in pairs.names)
    assert pairs.predicted == (None, predicted / "a/c.png", predicted / "b.png", None)
    assert pairs.missing == ("a", "d")
    assert pairs.unused == 2


def test_a_list_says_which_and_in_what_order(tmp_path: Path) -> None:
    predicted, truth = folders(tmp_path, "a b c", "a b c d")
    (tmp_path / "list.txt").write_text("\ufeffd\n\n  b \n")
    pairs = pair_up(find_label_maps(predicted), find_label_maps(truth), tmp_path / "list.txt")
    assert (pairs.names, pairs.missing, pairs.unused) == (("d", "b"), ("d",), 2)


def test_no_common_names(tmp_path: Path) -> None:
    predicted, truth = folders(tmp_path, "x/a x/b", "a b")
    with pytest.raises(StoreError, match=r"no common names: .*predicted has x/a\.png, .*truth has a\.png") as caught:
        pair_up(find_label_maps(predicted), find_label_maps(truth))
    assert "path below the folder" in caught.value.hint


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("2007_000032", "2007_000032"),
        ("2007_000032.jpg", "2007_000032"),
        ("COCO_train2014_000000000009 45 49 50", "COCO_train2014_000000000009"),
        ("/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png", "2007_000032"),
        ("sub/a.v2", "sub/a.v2"),
        ("my dog", "my dog"),
        ("my dog.png", "my dog"),
    ],
)
def test_lines_as_the_field_writes_them(tmp_path: Path, line: str, name: str) -> None:
    write(tmp_path / "truth" / f"{name}.png")
    (tmp_path / "list.txt").write_text(line + "\r\n")
    assert read_list(tmp_path / "list.txt", find_label_maps(tmp_path / "truth")) == (name,)


def test_lists_that_do_not_fit(tmp_path: Path) -> None:
    truth = find_label_maps(write(tmp_path / "SegmentationClass" / "a.png").parents[1])
    path = tmp_path / "list.txt"
    for content, said in (
        ("", "list.txt: is empty"),
        ("a\nb\nc", "no label map of 2 of 3 names, for example b"),
        ("a\na.jpg", "a is in line 1 and in line 2"),
    ):
        path.write_text(content)
        with pytest.raises(WsssError, match=said):
            read_list(path, truth)
    with pytest.raises(WsssError, match="cannot be read: No such file"):
        read_list(tmp_path / "none.txt", truth)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WsssError, match="expected UTF-8 text, got byte 0x00 at 2"):
        read_list(path, truth)
    (tmp_path / "SegmentationClassAug").mkdir()
    path.write_text("b")
    with pytest.raises(WsssError) as caught:
        read_list(path, truth)
    assert caught.value.hint.endswith("SegmentationClassAug")
