"""Thumbnails: right colors, made once, made again when what they show has changed, and notes instead of crashes."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from wsss.classes import palette
from wsss.errors import StoreError
from wsss.photographs import decode, read_file
from wsss.runtime.chain import Chain
from wsss.runtime.report import thumbnails
from wsss.runtime.report.thumbnails import Thumbnails, label_picture, make_thumbnails, remove_thumbnails
from wsss.runtime.run.label_folder import label_folder
from wsss.store.local import read_records

if TYPE_CHECKING:
    from ..conftest import World


def shown(picture: Image.Image) -> np.ndarray:
    return np.array(picture.convert("RGBA"))


def test_a_label_has_its_colors_a_white_line_and_a_clear_background() -> None:
    label_map = np.zeros((7, 9), np.uint8)
    label_map[1:6, 1:6] = 2
    label_map[:, 8] = 255
    pixels = shown(label_picture(label_map, (9, 7)))
    assert pixels.shape == (7, 9, 4)
    assert (pixels[label_map == 0, 3] == 0).all(), "background is clear"
    assert (pixels[label_map != 0, 3] == 255).all()
    assert pixels[2:5, 2:5, :3].tolist() == [[palette()[2].tolist()] * 3] * 3
    ring = (label_map == 2) & (np.pad(label_map[2:5, 2:5], ((2, 2), (2, 4))) == 0)
    assert (pixels[ring, :3] == 255).all(), "the line is inside the region"
    assert (pixels[:, 8, :3] == 255).all(), "void is a region too"


def test_a_label_at_the_border_of_the_image_has_no_line_there() -> None:
    pixels = shown(label_picture(np.full((4, 4), 3, np.uint8), (4, 4)))
    assert (pixels[:, :, :3] == palette()[3]).all()


def test_a_smaller_label_samples_the_middle_of_each_patch() -> None:
    label_map = np.zeros((30, 60), np.uint8)
    label_map[12:18, 22:38] = 1
    assert (shown(label_picture(label_map, (3, 3)))[:, :, 3] > 0).tolist() == [[False] * 3, [False, True, False], [False] * 3]


def test_a_label_of_all_values_keeps_its_colors() -> None:
    label_map = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (shown(label_picture(label_map, (16, 16)))[:, :, :3].reshape(-1, 3) == palette()).all()


@pytest.fixture
def store(world: World, photos: Path, tmp_path: Path) -> Path:
    label_folder(Chain.open(world.bundle, classes=world.classes), photos, tmp_path / "store", warn=lambda _: None)
    return tmp_path / "store"


class Maker:
    """Makes the thumbnails of a store, and counts what is decoded and written."""

    def __init__(self, store: Path, photos: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store, self.photos, self.folder = store, photos, folder
        self.written: list[str] = []
        publish = thumbnails.publish

        def counted(path: Path, data: bytes) -> None:
            self.written.append(path.suffix)
            publish(path, data)

        monkeypatch.setattr(thumbnails, "publish", counted)

    def __call__(self, longest_px: int = 32) -> dict[str, Thumbnails]:
        self.written.clear()
        records = [record for record in read_records(self.store) if "error" not in record]
        made = make_thumbnails(self.store, self.photos, records, self.folder, longest_px)
        return {record["path"]: each for record, each in zip(records, made, strict=True)}

    def open(self, name: str) -> Image.Image:
        with Image.open(self.folder / name) as image:
            image.load()
            return image


@pytest.fixture
def make(store: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    return Maker(store, photos, tmp_path / "files", monkeypatch)


def test_photograph_and_label_have_one_size_and_fit(make: Maker) -> None:
    for name, each in make().items():
        assert not each.note
        photo, label = make.open(each.photo), make.open(each.label)
        assert (photo.format, label.format) == ("JPEG", "PNG")
        assert photo.size == label.size
        with Image.open(make.photos / name) as original:
            assert max(photo.size) == min(32, max(original.size))
            assert photo.width / photo.height == pytest.approx(original.width / original.height, rel=0.05)
    assert sorted(make.written) == [".jpg"] * 5 + [".png"] * 5
    for name, each in make(999).items():
        with Image.open(make.photos / name) as original:
            assert make.open(each.photo).size == make.open(each.label).size == original.size, "small ones do not grow"


def test_the_photograph_is_the_right_one(make: Maker) -> None:
    red = np.asarray(make.open(make()["red.png"].photo)).astype(int)
    assert red[12, 8, 0] > 200 > 60 > red[12, 8, 1:].max()
    assert red[:, 28:].max() < 60


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(np.full((600, 1600, 3), (200, 30, 30), np.uint8)).save(tmp_path / "large.jpg", exif=exif)
    file = read_file(tmp_path, "large.jpg")
    assert decode(file).shape == (1600, 600)
    assert decode(file, shorter_side_px=150).shape == (400, 150)
    assert decode(file, shorter_side_px=151).shape == (800, 300)
    assert decode(file, shorter_side_px=700).shape == (1600, 600)
    assert int(decode(file, shorter_side_px=150).pixels[200, 75, 0]) == pytest.approx(200, abs=4)


def test_a_second_run_makes_nothing_and_needs_no_photographs(make: Maker) -> None:
    first = make()
    for path in make.photos.rglob("*.png"):
        path.unlink()
    assert make() == first
    assert make.written == []


def test_another_size_is_other_files(make: Maker) -> None:
    first = make()
    assert make(16)["red.png"].photo != first["red.png"].photo
    assert len(make.written) == 10


def test_what_changed_is_made_again(make: Maker) -> None:
    first = make()
    label = make.store / "labels" / "red.png"
    Image.fromarray(np.zeros((48, 64), np.uint8), mode="P").save(label)
    os.utime(label, ns=(1, 1))
    second = make()
    assert make.written == [".png"]
    assert {name for name in first if first[name] != second[name]} == {"red.png"}


def test_an_empty_file_left_by_a_power_cut_is_made_again(make: Maker) -> None:
    broken = make.folder / make()["red.png"].photo
    broken.write_bytes(b"")
    make()
    assert make.written == [".jpg"]
    assert broken.stat().st_size


def test_what_is_missing_changed_or_damaged_gets_a_note(make: Maker, world: World) -> None:
    (make.photos / "red.png").unlink()
    world.save(make.photos / "green.png", 64, 64, blue=(0, 0, 64, 64))
    (make.store / "labels" / "two.png").write_bytes(b"no")
    (make.store / "labels" / "black.png").unlink()
    made = make()
    assert made["red.png"].photo == made["green.png"].photo == made["two.png"].label == made["black.png"].label == ""
    assert made["red.png"].label and made["two.png"].photo
    assert made["red.png"].note == "red.png: cannot be read: No such file or directory"
    assert made["green.png"].note == "green.png: is not the file that was labeled"
    assert "two.png: not a readable label" in made["two.png"].note
    assert made["black.png"].note == "labels/black.png: No such file or directory"
    assert not made["sub/three.png"].note


@pytest.mark.parametrize(
    ("path", "message"), [("../red.png", "leads out of --images"), ("x" * 5000, "cannot be read: File name too long")]
)
def test_a_photograph_that_no_folder_can_hold_gets_a_note(make: Maker, path: str, message: str) -> None:
    records: list[dict[str, Any]] = [record for record in read_records(make.store) if record["path"] == "two.png"]
    [made] = make_thumbnails(make.store, make.photos, [{**records[0], "path": path, "sha256": "0" * 64}], make.folder, 16)
    assert made.photo == ""
    assert message in made.note


def test_labels_behind_a_link_get_a_note(make: Maker) -> None:
    (make.store / "labels").rename(make.store.parent / "elsewhere")
    (make.store / "labels").symlink_to(make.store.parent / "elsewhere")
    assert all("a link leads out of the store" in each.note and not each.label for each in make().values())


def test_old_pictures_go_and_other_files_stay(make: Maker) -> None:
    small, large = make(16), make(32)
    mine = make.folder / "00" / "holiday.jpg"
    mine.write_bytes(b"mine")
    torn = make.folder / "00" / ".abc.tmp"
    torn.write_bytes(b"half")
    remove_thumbnails(make.folder, large.values())
    assert all((make.folder / each.photo).exists() and (make.folder / each.label).exists() for each in large.values())
    assert not any((make.folder / each.photo).exists() for each in small.values())
    assert (mine.exists(), torn.exists()) == (True, False)


def test_progress_counts_to_the_end(make: Maker) -> None:
    progress: list[tuple[int, int]] = []
    records: list[dict[str, Any]] = list(read_records(make.store))
    make_thumbnails(make.store, make.photos, records, make.folder, 16, lambda done, total: progress.append((done, total)))
    assert progress == [(done, 5) for done in range(1, 6)]


def test_a_folder_that_cannot_be_written_is_named(make: Maker) -> None:
    make.folder.write_text("a file")
    with pytest.raises(StoreError, match="files: cannot be written"):
        make()


def test_a_disk_that_fills_up_between_photograph_and_label_is_named(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = thumbnails.publish

    def full(path: Path, data: bytes) -> None:
        if path.suffix == ".png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        publish(path, data)

    monkeypatch.setattr(thumbnails, "publish", full)
    with pytest.raises(StoreError, match="files: cannot be written: No space left on device"):
        make()
