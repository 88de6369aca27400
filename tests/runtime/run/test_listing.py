"""Photographs as users have them: turned, gray, transparent, 16-bit, broken; and the folders they are in."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import io
import os
import socket
import struct
import subprocess
import sys
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from wsss import photographs
from wsss.errors import ImageError
from wsss.frame import Frame
from wsss.photographs import read_photograph
from wsss.runtime.canvas import on_canvas
from wsss.runtime.run import listing as images_module
from wsss.runtime.run.listing import Folder, check_images, describe_left_out, label_names

RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3)).astype(np.uint8)


def png(folder: Path, image: Image.Image, name: str = "x.png", **how: object) -> np.ndarray:
    """Saves an image and gives the pixels that are read back."""
    image.save(folder / name, **how)  # type: ignore[arg-type]
    pixels = read_photograph(folder, name).pixels
    assert (pixels.dtype, pixels.ndim, pixels.shape[2]) == (np.uint8, 3, 3)
    return pixels


def test_pixels_size_and_hash(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "x.png")
    photo = read_photograph(tmp_path, "x.png")
    data = (tmp_path / "x.png").read_bytes()
    assert np.array_equal(photo.pixels, RGB)
    assert (photo.name, photo.shape, photo.size_bytes) == ("x.png", (6, 9), len(data))
    assert photo.sha256 == hashlib.sha256(data).hexdigest()
    assert np.array_equal(read_photograph(tmp_path / "x.png", "x.png").pixels, RGB), "one image instead of a folder"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = png(tmp_path, Image.fromarray(RGB), exif=exif)
    with Image.open(tmp_path / "x.png") as image:
        assert np.array_equal(pixels, np.array(ImageOps.exif_transpose(image)))
    turns = {1: RGB, 3: RGB[::-1, ::-1], 6: np.rot90(RGB, -1), 8: np.rot90(RGB)}  # as cameras are held
    assert np.array_equal(pixels, turns.get(orientation, pixels))
    assert pixels.shape == ((6, 9, 3) if orientation <= 4 else (9, 6, 3))
    for suffix in ("jpg", "webp", "tif"):
        assert png(tmp_path, Image.fromarray(RGB), f"x.{suffix}", exif=exif).shape == pixels.shape, suffix


def test_gray_becomes_three_equal_channels(tmp_path: Path) -> None:
    pixels = png(tmp_path, Image.fromarray(RGB[:, :, 0]))
    assert np.array_equal(pixels, np.repeat(RGB[:, :, :1], 3, axis=2))


def test_black_and_white(tmp_path: Path) -> None:
    assert set(np.unique(png(tmp_path, Image.fromarray(RGB[:, :, 0]).convert("1")))) <= {0, 255}


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_lies_over_white(tmp_path: Path, mode: str) -> None:
    image = Image.new(mode, (2, 1))  # black, fully transparent
    image.putpixel((1, 0), (40, 255) if mode == "LA" else (40, 40, 40, 255))
    assert png(tmp_path, image).tolist() == [[[255] * 3, [40] * 3]]


def test_half_transparency_is_blended(tmp_path: Path) -> None:
    assert np.allclose(png(tmp_path, Image.new("RGBA", (1, 1), (0, 100, 200, 128))), [[[127, 177, 227]]], atol=1)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "LAB"])
def test_bands_of_rows_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    image = Image.fromarray(np.dstack([RGB, RGB[:, :, :1]])) if mode in ("RGBA", "CMYK") else Image.fromarray(RGB)
    if mode == "CMYK":
        image = Image.frombytes("CMYK", image.size, image.tobytes())
    elif mode == "LAB":
        image = Image.frombytes("LAB", image.size, image.tobytes())
    elif mode == "P":
        image = image.quantize()
    how = {"transparency": 0} if mode == "P" else {}
    suffix = "png" if mode in ("RGB", "RGBA", "P") else "tif"
    whole = png(tmp_path, image, f"x.{suffix}", **how)
    monkeypatch.setattr(photographs, "_BAND", 4)
    assert np.array_equal(read_photograph(tmp_path, f"x.{suffix}").pixels, whole)


def test_a_palette_with_a_transparent_entry(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert png(tmp_path, image).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert png(tmp_path, image, transparency=0).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_cmyk(tmp_path: Path) -> None:
    ink = Image.new("CMYK", (3, 2), (0, 255, 255, 0))
    assert png(tmp_path, ink, "x.tif").tolist() == [[[255, 0, 0]] * 3] * 2
    assert np.allclose(png(tmp_path, ink, "x.jpg", quality=95), [255, 0, 0], atol=12)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_gray_keeps_its_high_byte(tmp_path: Path, suffix: str) -> None:
    wide = np.array([[0, 255, 256, 0x1234, 0xFFFF]], np.uint16)
    pixels = png(tmp_path, Image.fromarray(wide), f"x.{suffix}")
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 0x12, 255]


def test_32_bit_gray_is_read_as_16_bits_and_ends_at_black_and_white(tmp_path: Path) -> None:
    wide = np.array([[-1, -(1 << 20), 0, 0x1234, 0xFFFF, 0x10000, 1 << 30]], np.int32)
    assert png(tmp_path, Image.fromarray(wide), "x.tif")[0].tolist() == [[level] * 3 for level in (0, 0, 0, 0x12, 255, 255, 255)]


def test_16_bit_color(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + struct.pack(">6H", 0x1234, 0xFF00, 0x00FF, 0, 0x8000, 0xFFFF)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    assert read_photograph(tmp_path, "x.png").pixels.tolist() == [[[0x12, 0xFF, 0], [0, 0x80, 0xFF]]]


def test_of_an_animation_the_first_frame(tmp_path: Path) -> None:
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    pixels = png(tmp_path, frames[0], "x.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert np.array_equal(pixels, RGB)


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.kron(RGB, np.ones((8, 8, 1), np.uint8))).save(buffer, "JPEG")
    return buffer.getvalue()


def gif() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, "GIF")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"", "empty", id="zero bytes"),
        pytest.param(b"dear diary", "none of AVIF, BMP, JPEG, PNG, TIFF, WEBP", id="text"),
        pytest.param(gif(), "none of AVIF, BMP, JPEG, PNG, TIFF, WEBP", id="a format that is not taken"),
        pytest.param(jpeg()[:-300], "truncated", id="truncated"),
        pytest.param(jpeg()[:40], "x.jpg: not a readable image", id="truncated in its header"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x.jpg").write_bytes(data)
    with pytest.raises(ImageError, match=r"^x\.jpg: not a readable image") as caught:
        read_photograph(tmp_path, "x.jpg")
    assert message in caught.value.message
    assert "0x" not in caught.value.message, "no address: two runs say the same"
    assert caught.value.hint


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, twice: bool) -> None:
    Image.fromarray(RGB).save(tmp_path / "x.png")
    monkeypatch.setattr(photographs, "MAX_PIXELS", 54)
    read_photograph(tmp_path, "x.png")
    monkeypatch.setattr(photographs, "MAX_PIXELS", 53)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20 if twice else 53)
    with pytest.raises(ImageError, match=r"x\.png: .*(at most 53 pixels, got 9 x 6|decompression bomb)"):
        read_photograph(tmp_path, "x.png")


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"^gone\.jpg: cannot be read: No such file") as caught:
        read_photograph(tmp_path, "gone.jpg")
    assert caught.value.hint


def test_what_is_no_file_fails_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    with contextlib.chdir(tmp_path), socket.socket(socket.AF_UNIX) as plug:  # a socket's path is short
        plug.bind("socket.jpg")
    for name, kind in (("pipe", "a named pipe"), ("device", "a device"), ("socket", "a socket")):
        with pytest.raises(ImageError, match=rf"^{name}\.jpg: expected a regular file, got {kind}"):
            read_photograph(tmp_path, f"{name}.jpg")


@pytest.mark.parametrize("form", ["avif", "jfif", "jpe"])
def test_other_endings_of_photographs(tmp_path: Path, form: str) -> None:
    kind = {"avif": "AVIF"}.get(form, "JPEG")
    if kind not in photographs.FORMATS:
        pytest.skip("this Pillow decodes no AVIF")
    picture = np.kron(RGB, np.ones((8, 8, 1), np.uint8))
    Image.fromarray(picture).save(tmp_path / f"x.{form}", kind, quality=95)
    (found,) = Folder(tmp_path)
    assert np.abs(read_photograph(tmp_path, found.name).pixels.astype(int) - picture).mean() < 12


def test_heic_is_taken_where_a_plugin_decodes_it(tmp_path: Path) -> None:
    """A stand-in for pillow-heif, whose HEIF files are BMPs."""
    (tmp_path / "pillow_heif.py").write_text(
        "from PIL import BmpImagePlugin, Image\n"
        "def register_heif_opener():\n"
        "    Image.register_open('HEIF', BmpImagePlugin.BmpImageFile, lambda prefix: prefix[:2] == b'BM')\n"
    )
    program = "from wsss.photographs import FORMATS, SUFFIXES; print(SUFFIXES.get('.heic'), SUFFIXES.get('.heif'), *FORMATS)"
    paths = {True: f"{tmp_path}{os.pathsep}", False: ""}
    results = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": path + os.environ.get("PYTHONPATH", "")},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for path in paths.values()
    ]
    assert results[0][:2] == ["HEIF", "HEIF"]
    assert "HEIF" in results[0][2:]
    if importlib.util.find_spec("pillow_heif") is None:
        assert results[1][:2] == ["None", "None"]
        assert "HEIF" not in results[1]


@pytest.mark.parametrize(
    ("pixels", "warned"),
    [
        pytest.param(np.arange(4096, dtype=np.uint16).reshape(64, 64), True, id="12 bits in 16"),
        pytest.param(np.arange(4096, dtype=np.uint16).reshape(64, 64) << 4, False, id="12 bits, shifted"),
        pytest.param(np.full((64, 64, 4), [90, 10, 200, 0], np.uint8), True, id="transparent"),
        pytest.param(np.full((64, 64), 7, np.uint8), True, id="one gray"),
        pytest.param(np.kron(np.eye(2), np.ones((32, 32))).astype(np.uint8) * 15, True, id="15 levels apart"),
        pytest.param(np.kron(np.eye(2), np.ones((32, 32))).astype(np.uint8) * 16, False, id="16 levels apart"),
        pytest.param(np.pad(np.full((1, 1), 255, np.uint8), ((3, 60), (5, 58))), False, id="one bright pixel"),
    ],
)
def test_next_to_no_range_is_warned_of(tmp_path: Path, pixels: np.ndarray, warned: bool) -> None:
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert ("next to no range" in read_photograph(tmp_path, "x.png").warning) == warned


def test_damaged_tiffs_fail_and_say_nothing_on_stderr(tmp_path: Path) -> None:
    """libtiff writes to the process's stderr, and decodes fax lines that it cannot read to anything."""
    for name, image, how in (
        ("lzw", Image.fromarray(np.kron(RGB, np.ones((20, 20, 1), np.uint8))), "tiff_lzw"),
        ("zip", Image.fromarray(np.kron(RGB, np.ones((20, 20, 1), np.uint8))), "tiff_adobe_deflate"),
        ("fax", Image.fromarray(np.kron(RGB[:, :, 0], np.ones((20, 20), np.uint8))).convert("1"), "group4"),
    ):
        image.save(tmp_path / f"{name}.tif", compression=how)
        data = bytearray((tmp_path / f"{name}.tif").read_bytes())
        with Image.open(tmp_path / f"{name}.tif") as whole:
            (start,) = whole.tag_v2[273][:1]
        data[start + 8 : start + 40] = bytes(range(200, 232))
        (tmp_path / f"{name}.tif").write_bytes(data)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    Image.fromarray(RGB).save(tmp_path / "exif.jpg", exif=exif.tobytes()[:-20])
    program = (
        "import sys; from pathlib import Path\n"
        "from wsss.errors import ImageError; from wsss.photographs import read_photograph\n"
        "for name in ('lzw.tif', 'zip.tif', 'fax.tif', 'exif.jpg'):\n"
        "    try: print(read_photograph(Path(sys.argv[1]), name).name)\n"
        "    except ImageError as error: print(error.message)\n"
    )
    output = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert output.stdout.splitlines() == [
        *(f"{name}.tif: not a readable image: its TIFF data are damaged" for name in ("lzw", "zip", "fax")),
        "exif.jpg",
    ]
    assert output.stderr == ""


# ---- folders ----


def test_finds_images_below_a_folder_in_order(tmp_path: Path) -> None:
    images = ("b.JPG", "a.jpeg", "sub/deep/c.png", "sub/d.webp", "e.tiff", "f.bmp")
    for name in (*images, ".hidden.jpg", ".cache/g.jpg", "notes.txt", "h.gif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [each.name for each in Folder(tmp_path)] == ["a.jpeg", "b.JPG", "e.tiff", "f.bmp", "sub/d.webp", "sub/deep/c.png"]
    assert [each.name for each in Folder(tmp_path, tmp_path / "sub")] == ["a.jpeg", "b.JPG", "e.tiff", "f.bmp"]
    assert [each.name for each in Folder(tmp_path / "notes.txt")] == ["notes.txt"], "one file is taken as it is"


def test_names_come_in_the_order_of_their_code_points(tmp_path: Path) -> None:
    names = ["a-b.jpg", "a.jpg", "a/z.jpg", "a0.jpg", "ab/c.jpg", "ä.jpg", "B.jpg", "a.jpg.d/x.jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [each.name for each in Folder(tmp_path)] == sorted(names)


def test_shards_share_the_images_and_an_image_stays_in_its_share(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.jpg").touch()
    shares = [{each.name for each in Folder(tmp_path, shard=(number, 3))} for number in range(3)]
    assert set.union(*shares) == {f"{number}.jpg" for number in range(40)}
    assert sum(map(len, shares)) == 40
    assert min(map(len, shares)) > 5
    (tmp_path / "0new.jpg").touch()
    for number in range(3):
        assert {each.name for each in Folder(tmp_path, shard=(number, 3))} - {"0new.jpg"} == shares[number]


def test_links_to_folders_are_not_followed_and_said(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").touch()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "y.txt").symlink_to(tmp_path / "a" / "x.jpg")
    images = Folder(tmp_path)
    assert [each.name for each in images] == ["a/x.jpg"]
    assert images.left_out.links == ["a/up"], "not the link to a file"


def test_what_is_left_out_is_counted_by_ending(tmp_path: Path) -> None:
    names = [
        "a.jpg",
        "b.heic",
        "b.HEIC",
        "sub/c.GIF",
        "noext",
        "a.xml",
        "b.xml",
        "list.txt",
        ".hidden.gif",
        "x.not an ending",
        "y.é\t",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    images = Folder(tmp_path)
    for _ in range(2):  # gone through again, they are not counted twice
        assert [each.name for each in images] == ["a.jpg"]
    assert images.left_out.files == {".heic": 2, ".gif": 1, "none": 1, ".xml": 2, ".txt": 1, "other": 2}
    shares = [Folder(tmp_path, shard=(number, 3)) for number in range(3)]
    assert [len(list(share)) for share in shares].count(1) == 1
    assert sum((share.left_out.files for share in shares), Counter()) == images.left_out.files
    assert (
        describe_left_out(images.left_out.files) == "2 .heic, 2 with other endings, 1 .gif, 1 without an ending, 3 of .xml .txt"
    )
    assert describe_left_out({}) == ""
    many = {f".{number}": number for number in range(1, 10)}
    assert describe_left_out(many) == "9 .9, 8 .8, 7 .7, 6 .6, 5 .5, 4 .4, 6 others"


def test_so_many_endings_are_counted_apart(tmp_path: Path) -> None:
    for number in range(130):
        (tmp_path / f"image.{number:03}").touch()
    images = Folder(tmp_path)
    assert not list(images)
    assert len(images.left_out.files) == 101
    assert images.left_out.files["other"] == 30


def test_a_sub_folder_that_cannot_be_read_is_noted_and_its_like_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/x.jpg", "b/y.jpg", "c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if path in refused:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    refused = {tmp_path / "a/"}
    monkeypatch.setattr(images_module.os, "scandir", refuse)
    images = Folder(tmp_path)
    assert [each.name for each in images] == ["b/y.jpg", "c.jpg"]
    assert images.left_out.folders == {"a/": "Permission denied"}
    refused |= {tmp_path / "", tmp_path}
    with pytest.raises(ImageError, match=f"^{tmp_path}: cannot be read: Permission denied") as caught:
        list(Folder(tmp_path))
    assert caught.value.hint


def test_labels_of_folders_that_differ_by_case_only_do_not_meet(tmp_path: Path) -> None:
    for name in (
        "Dog/a.jpg",
        "dog/a.jpg",
        "Dog/on/b.jpg",
        "dog/on/b.jpg",
        "dog.png/x.jpg",
        "dog.jpg",
        "cat/a.jpg",
        "cat/on/b.jpg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    labels = {each.name: each.label for each in Folder(tmp_path)}
    assert (labels["cat/a.jpg"], labels["cat/on/b.jpg"]) == ("cat/a.png", "cat/on/b.png")
    assert labels["dog.jpg"] == "dog.jpg.png", "dog.png is a folder"
    assert len({label.lower() for label in labels.values()}) == 8


def test_an_empty_folder_and_none_at_all(tmp_path: Path) -> None:
    (tmp_path / "text.txt").touch()
    with pytest.raises(ImageError, match="no images in it") as caught:
        check_images(Folder(tmp_path))
    assert ".jpg" in caught.value.hint
    (tmp_path / "b.heic").touch()
    with pytest.raises(ImageError, match=r"no images in it; left out: 1 \.heic, 1 of \.txt") as caught:
        check_images(Folder(tmp_path))
    assert "pillow-heif" in caught.value.hint
    (tmp_path / "photos").mkdir()
    with pytest.raises(ImageError, match="expected a folder of images, found nothing") as caught:
        check_images(Folder(tmp_path / "photoz"))
    assert f"Did you mean {tmp_path / 'photos'}?" in caught.value.hint
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="expected a folder of images, found something else"):
        check_images(Folder(tmp_path / "pipe"))
    with pytest.raises(ImageError, match="expected a folder of images, found nothing"):
        check_images(Folder(tmp_path / "none"))


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        ([], []),
        (["dog.jpg", "a/dog.jpg"], ["dog.png", "a/dog.png"]),
        (["dog.v2.jpg"], ["dog.v2.png"]),
        (["dog.jpg", "dog.png", "cat.png"], ["dog.jpg.png", "dog.png.png", "cat.png"]),
        (["dog.jpg", "Dog.webp"], ["dog.jpg.png", "Dog.webp.png"]),  # one file where case is not told apart
        (["dog.jfif", "cat.avif"], ["dog.png", "cat.png"]),
        (["dog.jpg", "dog.jfif"], ["dog.png", "dog.jfif.png"]),  # the label of dog.jpg was called so before .jfif was taken
        (["dog.jpe", "dog.jfif"], ["dog.jpe.png", "dog.jfif.png"]),
        (["a.jpg", "a.webp", "a.jpg.png"], ["a.jpg.png", "a.webp.png", "a.jpg.png.png"]),
        (["a.jpg", "a.webp", "a.jpg.bmp", "a.jpg.bmp.tif"], ["a.jpg.png", "a.webp.png", "a.jpg.bmp.png", "a.jpg.bmp.tif.png"]),
    ],
)
def test_labels_never_meet(names: list[str], labels: list[str]) -> None:
    assert label_names(names) == dict(zip(names, labels, strict=True))
    assert len({label.lower() for label in labels}) == len(labels)


@pytest.mark.parametrize("names", [["a.jpg", "A.jpg"], ["é.jpg", "e\u0301.jpg"], ["x" * 251 + ".jpg", "x" * 251 + ".bmp"]])
def test_labels_that_only_some_file_systems_tell_apart_get_a_hash(names: list[str]) -> None:
    labels = label_names(names)
    assert len({unicodedata.normalize("NFC", label).casefold() for label in labels.values()}) == 2
    assert all(label.endswith(".png") and len(label.encode()) <= 255 for label in labels.values())


def test_only_a_label_that_no_file_system_takes_is_shortened() -> None:
    fits, long = "x" * 251, "x" * 252
    assert label_names([f"{fits}.jpg"]) == {f"{fits}.jpg": f"{fits}.png"}
    assert label_names([f"{long}.jpg"])[f"{long}.jpg"].startswith("x" * 238 + ".")


# ---- canvases ----


def test_on_canvas_pads_right_and_bottom_with_black() -> None:
    canvas = on_canvas(RGB, Frame((6, 9), (6, 9), (8, 12)), "bilinear")
    assert np.array_equal(canvas[:6, :9], RGB)
    assert canvas.sum() == RGB.sum()
    assert canvas.shape == (8, 12, 3)
    assert np.array_equal(on_canvas(RGB, Frame((6, 9), (6, 9), (6, 9)), "bilinear"), RGB)


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
def test_on_canvas_resizes_as_pil(filter: str) -> None:
    resample = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[filter]
    want = np.array(Image.fromarray(RGB).resize((4, 3), resample))
    assert np.array_equal(on_canvas(RGB, Frame((6, 9), (3, 4), (5, 5)), filter)[:3, :4], want)
