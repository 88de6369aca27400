"""A folder of everything that users have: each file ends in exactly one line, good ones labeled, bad ones named, no crash."""

from __future__ import annotations

import errno
import io
import json
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from wsss.runtime.chain import Chain
from wsss.runtime.run.label_folder import Summary, label_folder
from wsss.store.local import read_label, read_records

if TYPE_CHECKING:
    from ..conftest import World

SCENE = np.zeros((24, 36, 3), np.uint8)
SCENE[4:20, 6:24, 0] = 255
PHOTO = Image.fromarray(SCENE)


def encoded(image: Image.Image, kind: str, **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)  # type: ignore[arg-type]
    return buffer.getvalue()


def png_of(width: int, height: int, data: bytes = b"", depth: int = 8, color: int = 0) -> bytes:
    """A PNG whose header claims a size, whatever its data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes(byte ^ 0xFF for byte in data[at : at + 12]) + data[at + 12 :]


def turned(orientation: int, kind: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(PHOTO, kind, exif=exif)


def palette_with_transparency() -> bytes:
    return encoded(PHOTO.quantize(4), "PNG", transparency=0)


JPEG, PNG, WEBP = encoded(PHOTO, "JPEG", quality=95), encoded(PHOTO, "PNG"), encoded(PHOTO, "WEBP", lossless=True)
TIFF, BMP = encoded(PHOTO, "TIFF"), encoded(PHOTO, "BMP")
GRAY = PHOTO.convert("L")
GOOD: dict[str, tuple[bytes, tuple[int, int]]] = {
    **{f"turned-{n}.png": (turned(n), (24, 36) if n <= 4 else (36, 24)) for n in range(1, 9)},
    "turned.jpg": (turned(6, "JPEG"), (36, 24)),
    "turned.webp": (turned(8, "WEBP"), (36, 24)),
    "gray.jpg": (encoded(GRAY, "JPEG"), (24, 36)),
    "gray-alpha.png": (encoded(PHOTO.convert("LA"), "PNG"), (24, 36)),
    "alpha.png": (encoded(PHOTO.convert("RGBA"), "PNG"), (24, 36)),
    "palette.png": (palette_with_transparency(), (24, 36)),
    "cmyk.jpg": (encoded(PHOTO.convert("CMYK"), "JPEG"), (24, 36)),
    "16-bit.png": (encoded(Image.fromarray(np.full((24, 36), 0x8000, np.uint16)), "PNG"), (24, 36)),
    "16-bit.tif": (encoded(Image.fromarray(np.full((24, 36), 0x8000, np.uint16)), "TIFF"), (24, 36)),
    "bitmap.png": (encoded(PHOTO.convert("1"), "PNG"), (24, 36)),
    "one.png": (encoded(PHOTO.resize((1, 1)), "PNG"), (1, 1)),
    "wide.png": (encoded(PHOTO.resize((30000, 1)), "PNG"), (1, 30000)),
    "high.png": (encoded(PHOTO.resize((1, 30000)), "PNG"), (30000, 1)),
    "moving.webp": (encoded(PHOTO, "WEBP", save_all=True, append_images=[GRAY], lossless=True), (24, 36)),
    "moving.png": (encoded(PHOTO, "PNG", save_all=True, append_images=[GRAY.convert("RGB")]), (24, 36)),
    "pages.tif": (encoded(PHOTO.copy(), "TIFF", save_all=True, append_images=[GRAY.copy()]), (24, 36)),
    "a png in truth.jpg": (PNG, (24, 36)),
    " spaces  in it .jpg": (JPEG, (24, 36)),
    "日本語 ñ 🐕.jpg": (JPEG, (24, 36)),
    "line\nbreak.jpg": (JPEG, (24, 36)),
    "\x1b[31mred\x07.jpg": (JPEG, (24, 36)),
    "quo\"te'`$(x).jpg": (JPEG, (24, 36)),
    "-rf.jpg": (JPEG, (24, 36)),
    "back\\slash.jpg": (JPEG, (24, 36)),
    "caf\udce9.jpg": (JPEG, (24, 36)),
    "twin.jpg": (JPEG, (24, 36)),
    "twin.png": (PNG, (24, 36)),
    "TWIN.jpg": (JPEG, (24, 36)),
    "Twin.JPG": (JPEG, (24, 36)),
    "sub/twin.jpg": (JPEG, (24, 36)),
    "Sub/twin.jpg": (JPEG, (24, 36)),
    "folder.png/x.jpg": (JPEG, (24, 36)),
    "folder.jpg": (JPEG, (24, 36)),
    "x" * 251 + ".jpg": (JPEG, (24, 36)),
    "x" * 251 + ".png": (PNG, (24, 36)),
    "dots.in.name.tiff": (TIFF, (24, 36)),
    "old.bmp": (BMP, (24, 36)),
}
BAD: dict[str, tuple[bytes, str]] = {
    "truncated.jpg": (JPEG[: len(JPEG) // 2], "not a readable image"),
    "truncated.png": (PNG[: len(PNG) // 2], "not a readable image"),
    "truncated.webp": (WEBP[: len(WEBP) // 2], "not a readable image"),
    "truncated.tif": (TIFF[: len(TIFF) // 2], "not a readable image"),
    "truncated.bmp": (BMP[: len(BMP) // 2], "not a readable image"),
    "corrupt.png": (flipped(PNG, 41), "not a readable image"),
    "corrupt.webp": (flipped(WEBP, 16), "not a readable image"),
    "corrupt.jpg": (flipped(JPEG, 160), "not a readable image"),
    "header-only.jpg": (JPEG[:20], "not a readable image"),
    **{f"empty.{suffix}": (b"", "not a readable image") for suffix in ("jpg", "png", "webp", "bmp", "tif")},
    "\x1b[2J\rfailed: all.jpg": (b"", "not a readable image"),
    "text.jpg": (b"dear diary", "not a readable image"),
    "page.png": (b"<html></html>", "not a readable image"),
    "gif.jpg": (encoded(PHOTO, "GIF"), "not a readable image"),
    "float.tif": (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "floating-point pixels"),
    "bomb.png": (png_of(30000, 30000), "decompression bomb"),
    "smaller-bomb.png": (png_of(14000, 13000), "decompression bomb"),
    "no-data.png": (png_of(10, 10), "not a readable image"),
    "no-pixels.png": (png_of(0, 10), "not a readable image"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, (data, _) in {**GOOD, **BAD}.items():
        path = tmp_path / "odd" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "odd"


def special(folder: Path) -> dict[str, str]:
    """What is no file at all; name to the expected message."""
    (folder / "broken-link.jpg").symlink_to("nowhere.jpg")
    (folder / "loop.jpg").symlink_to("pool.jpg")
    (folder / "pool.jpg").symlink_to("loop.jpg")
    (folder / "linked-folder.jpg").symlink_to(folder / "sub")
    os.mkfifo(folder / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        at = os.getcwd()
        os.chdir(folder)  # the path of a socket may have 108 bytes only
        listener.bind("socket.jpg")
        os.chdir(at)
    (folder / "sparse.jpg").touch()
    os.truncate(folder / "sparse.jpg", 3 << 30)
    (folder / "zz-vanishes.jpg").write_bytes(JPEG)
    return {
        "broken-link.jpg": "No such file",
        "loop.jpg": "symbolic links",
        "pool.jpg": "symbolic links",
        "linked-folder.jpg": "Is a directory",
        "pipe.jpg": "expected a regular file, got a named pipe",
        "socket.jpg": "expected a regular file, got a socket",
        "sparse.jpg": "expected at most 1,073,741,824 bytes",
        "zz-vanishes.jpg": "No such file",
    }


def as_for_others(true: Callable[..., int]) -> Callable[..., int]:
    """`os.open` as it is for all but root, whom no mode stops."""

    def open_readable(path: Any, *given: Any, **how: Any) -> int:
        if Path(path).is_file() and not Path(path).stat().st_mode & 0o444:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return true(path, *given, **how)

    return open_readable


def test_every_odd_file_ends_in_one_line(world: World, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {name: message for name, (_, message) in BAD.items()} | special(folder)
    (folder / "loop-of-folders").symlink_to(folder)
    (folder / "\x1b[2Jloop").symlink_to(folder)
    (folder / "x.\x1b[2J").touch()
    (folder / "secret.jpg").write_bytes(JPEG)
    (folder / "secret.jpg").chmod(0)
    expected["secret.jpg"] = "Permission denied"
    if os.geteuid() == 0:
        monkeypatch.setattr("wsss.reading.documents.os.open", as_for_others(os.open))
    assert len(GOOD) + len(expected) > 45
    warnings: list[str] = []

    def vanish(summary: Summary) -> None:
        (folder / "zz-vanishes.jpg").unlink(missing_ok=True)

    labeler = Chain.open(world.bundle, classes=world.classes)
    out = tmp_path / "store"
    summary = label_folder(labeler, folder, out, batch=2, progress=vanish, warn=warnings.append)
    assert (summary.labelled, summary.failed) == (len(GOOD), len(expected))

    records = list(read_records(out))
    assert [record["path"] for record in records] == sorted([*GOOD, *expected])
    for record in records:
        if record["path"] in GOOD:
            assert read_label(out / "labels" / record["label"]).shape == GOOD[record["path"]][1], record["path"]
        else:
            assert any(part in record["error"] for part in expected[record["path"]].split("|")), record
            assert record["path"] in record["error"]
    assert len({record["label"].casefold() for record in records if "error" not in record}) == len(GOOD)
    assert len(list((out / "labels").rglob("*.png"))) == len(GOOD) + 1, "folder.png is a folder"
    assert sum(line.startswith("failed: ") for line in warnings) == len(expected)
    assert any("loop-of-folders: a link to a folder" in line for line in warnings)
    assert all(line.isprintable() for line in warnings), "no file name may talk to the terminal"

    manifest = (out / "manifest.jsonl").read_bytes()
    again = label_folder(labeler, folder, out, batch=2, warn=warnings.append)
    assert (again.skipped, again.failed_before) == (len(GOOD) + len(expected) - 1, len(expected) - 1), "one vanished"
    assert (again.labelled, again.failed) == (0, 0)
    assert (out / "manifest.jsonl").read_bytes() == manifest


def test_the_chain_sees_what_is_in_them(world: World, folder: Path, tmp_path: Path) -> None:
    """Where the color survives the format, the red rectangle is found and outlined."""
    label_folder(Chain.open(world.bundle, classes=world.classes), folder, tmp_path / "store", warn=lambda _: None)
    found = {record["path"]: record for record in read_records(tmp_path / "store") if record.get("boxes")}
    colorful = {name for name in GOOD if name.startswith(("turned", "twin", "sub", "moving", "-rf", "old", "dots"))}
    assert colorful <= set(found)
    upright = read_label(tmp_path / "store" / "labels" / found["turned-6.png"]["label"])
    assert np.array_equal(upright > 0, np.rot90(read_label(tmp_path / "store" / "labels" / "old.png") > 0, -1))


@pytest.mark.parametrize(("before", "after"), [(b"no", JPEG), (JPEG, b"no")])
def test_a_file_that_is_mended_or_broken_is_done_again(world: World, tmp_path: Path, before: bytes, after: bytes) -> None:
    (tmp_path / "in").mkdir()
    labeler = Chain.open(world.bundle, classes=world.classes)
    for data in (before, after):
        (tmp_path / "in" / "a.jpg").write_bytes(data)
        summary = label_folder(labeler, tmp_path / "in", tmp_path / "store", warn=lambda _: None)
        assert (summary.skipped, summary.labelled) == (0, int(data == JPEG))
    assert len(list(read_records(tmp_path / "store"))) == 1


def test_the_manifest_is_plain_json_whatever_the_names(world: World, folder: Path, tmp_path: Path) -> None:
    label_folder(Chain.open(world.bundle, classes=world.classes), folder, tmp_path / "store", warn=lambda _: None)
    for line in (tmp_path / "store" / "manifest.jsonl").read_bytes().split(b"\n")[:-1]:
        assert json.loads(line)["path"]
