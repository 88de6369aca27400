"""Where photographs come from: URLs, lists, folders; how their labels are called where not all names are in memory."""

from __future__ import annotations

import itertools
import os
import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from wsss.errors import ImageError, UsageError
from wsss.object_storage import RemoteFolder
from wsss.runtime.run import sources
from wsss.runtime.run.listing import check_images, label_of
from wsss.runtime.run.sources import (
    Chosen,
    FileList,
    LocalImages,
    RemoteImages,
    Source,
    local_folder,
    local_path,
    source_of,
    store_of,
)

if TYPE_CHECKING:
    from ..conftest import Bucket


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("dog.jpg", "dog.png"),
        ("a/b/dog.jpg", "a/b/dog.png"),
        ("dog.png", "dog.png.png"),
        ("dog.JPG", "dog.JPG.png"),
        ("dog.webp", "dog.webp.png"),
        ("dog.png.jpg", "dog.png.jpg.png"),
        ("dog", "dog%.png"),
        ("a//dog.jpg", "a/%/dog.png"),
        ("/data/dog.jpg", "%/data/dog.png"),
        ("../dog.jpg", "..%/dog.png"),
        ("./dog.jpg", ".%/dog.png"),
        ("dog.jfif", "dog.jfif%.png"),
        ("dog.jfif.jpg", "dog.jfif.png"),
        ("s3://bucket/a/dog.jpg", "s3:/%/bucket/a/dog.png"),
        ("dog.png/x.jpg", "dog.png%/x.png"),
        ("..", "..%.png"),
    ],
)
def test_how_a_label_is_called(name: str, label: str) -> None:
    assert label_of(name) == label


def test_no_two_labels_meet_nor_leave_their_folder() -> None:
    odd = ["", ".", "..", "%", ".%", "x", "x%", "x.png%"]
    parts = [*odd, "x.png", "x.jpg", "x.jpg.png", "x.png.jpg", "x%.jpg", "x%.png", "x.JPG"]
    names = ["/".join(each) for count in (1, 2, 3) for each in itertools.product(parts, repeat=count)]
    labels = [label_of(name) for name in names]
    assert len(set(labels)) == len(names)
    for label in labels:
        assert label.endswith(".png")
        assert all(part not in ("", ".", "..") for part in label.split("/"))
    folders = {label.rpartition("/")[0] for label in labels} - {""}
    assert not folders & set(labels), "what is a file is no folder"


def test_a_name_too_long_for_a_file_is_cut() -> None:
    one, two = (label_of(f"a/{'ü' * 125}{end}.webp") for end in "xy")
    assert one != two
    assert all(len(os.fsencode(each.removeprefix("a/"))) <= 255 and each.endswith(".png") for each in (one, two))
    fits = "é" * 125 + "x"
    assert label_of(f"a/{fits}.jpg") == f"a/{fits}.png", "255 bytes"


def test_what_images_and_out_name(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("x.jpg\n")
    (tmp_path / "folder.txt").mkdir()
    assert source_of("photos") == LocalImages(Path("photos"))
    assert source_of(str(tmp_path / "folder.txt")) == LocalImages(tmp_path / "folder.txt")
    assert source_of(str(tmp_path / "none.txt")) == LocalImages(tmp_path / "none.txt")
    assert source_of(str(tmp_path / "list.txt")) == FileList(tmp_path / "list.txt")
    assert source_of("s3://b/photos/") == RemoteImages(RemoteFolder("s3://b/photos"))
    assert source_of("s3://b") == RemoteImages(RemoteFolder("s3://b"))
    assert source_of("s3://b.jpg") == RemoteImages(RemoteFolder("s3://b.jpg"))
    assert source_of("s3://b/x.jpg") == RemoteImages(RemoteFolder("s3://b"), "x.jpg")
    assert source_of("s3://b/x.jpg/") == RemoteImages(RemoteFolder("s3://b/x.jpg"))
    assert store_of("s3://b/store/") == RemoteFolder("s3://b/store")
    assert store_of("store") == Path("store")
    assert source_of("file:///data/my%20photos") == LocalImages(Path("/data/my photos"))
    assert local_path("file://localhost/data/my%20photos") == Path("/data/my photos")
    with pytest.raises(UsageError, match="expected a file of this machine"):
        source_of("file://data/photos")


def names(place: RemoteImages | FileList, out: RemoteFolder | None = None, shard: tuple[int, int] | None = None) -> list[str]:
    return [found.name for found in place.listing(out, shard)]


def test_images_of_a_bucket_are_those_of_a_folder(bucket: Bucket, tmp_path: Path) -> None:
    inside = ["a.jpg", "a.txt", "A.JPEG", "sub/b.png", "sub/c d.webp", "z.tif", "storeroom/x.jpg"]
    for name in [*inside, ".hidden.jpg", "sub/.git/x.jpg", "store/labels/a.png"]:
        bucket.put(f"photos/{name}", b"1")
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    bucket.put("photos-2/x.jpg", b"1")
    place = RemoteImages(RemoteFolder(f"{bucket.url}/photos"))
    there = place.listing(RemoteFolder(f"{bucket.url}/photos/store"))
    assert len(list(there)) == 6
    assert there.left_out.files == {".txt": 1}
    here = [found.name for found in LocalImages(tmp_path).listing(tmp_path / "store")]
    assert names(place, RemoteFolder(f"{bucket.url}/photos/store")) == here
    assert here == ["A.JPEG", "a.jpg", "storeroom/x.jpg", "sub/b.png", "sub/c d.webp", "z.tif"]
    assert "store/labels/a.png" in names(place, RemoteFolder(f"{bucket.url}/photos-2"))
    shards = [names(place, RemoteFolder(f"{bucket.url}/photos/store"), (number, 3)) for number in range(3)]
    assert sorted(name for shard in shards for name in shard) == here
    for number, shard in enumerate(shards):
        local = LocalImages(tmp_path).listing(tmp_path / "store", (number, 3))
        remote = place.listing(RemoteFolder(f"{bucket.url}/photos/store"), (number, 3))
        assert [found.name for found in local] == [found.name for found in remote] == shard
        assert local.left_out.files == remote.left_out.files
    check_images(place.listing())


def test_an_object_is_read_and_stamped(bucket: Bucket) -> None:
    bucket.put("photos/a b.jpg", b"12")
    bucket.put("photos/empty.jpg", b"")
    place = pickle.loads(pickle.dumps(RemoteImages(RemoteFolder(f"{bucket.url}/photos"))))
    file = place.read("a b.jpg")
    assert (file.name, file.data, file.etag) == ("a b.jpg", b"12", "c20ad4d76fe97759aa27a0c99bff6710")
    assert place.stamp("a b.jpg") == {"bytes": 2, "etag": file.etag}
    (found, _) = place.found(None)
    assert found.stamp == {"bytes": 2, "etag": file.etag}
    assert place.read("empty.jpg").data == b""
    with pytest.raises(ImageError, match=r"^none\.jpg: cannot be read: not found"):
        place.read("none.jpg")


def test_an_object_that_is_too_long_is_not_read(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put("a.jpg", b"12345")
    monkeypatch.setattr(sources, "MAX_BYTES", 4)
    monkeypatch.setattr(RemoteFolder, "read", None)
    with pytest.raises(ImageError, match=r"a\.jpg: expected at most 4 bytes, got 5"):
        RemoteImages(RemoteFolder(bucket.url)).read("a.jpg")


def test_one_object(bucket: Bucket) -> None:
    bucket.put("photos/a.jpg", b"12")
    place = source_of(f"{bucket.url}/photos/a.jpg")
    assert isinstance(place, RemoteImages)
    assert (names(place), place.read("a.jpg").data) == (["a.jpg"], b"12")
    with pytest.raises(ImageError, match=r"photos/b\.jpg: cannot be listed: not found"):
        names(RemoteImages(RemoteFolder(f"{bucket.url}/photos"), "b.jpg"))


def test_no_images_in_a_bucket(bucket: Bucket) -> None:
    with pytest.raises(ImageError, match=rf"^{bucket.url}/photos: no images in it"):
        check_images(RemoteImages(RemoteFolder(f"{bucket.url}/photos")).listing())


# ---- lists ----


@pytest.mark.parametrize("at_once", [1, 2, 3, 1000])
def test_a_list_in_any_order_gives_each_once_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(sources, "SORTED_AT_ONCE", at_once)
    lines = [
        b"\xef\xbb\xbfb.jpg",
        b"",
        b"a/x.jpg\r",
        b"s3://b/c.jpg",
        b"b.jpg",
        b"caf\xe9.jpg",
        b"",
        b"",
        b"z \xe2\x80\xa8.jpg",
        b"a",
    ]
    (tmp_path / "list.txt").write_bytes(b"\n".join(lines))
    wanted = sorted(["b.jpg", "a/x.jpg", "s3://b/c.jpg", os.fsdecode(b"caf\xe9.jpg"), "z \u2028.jpg", "a"])
    place = FileList(tmp_path / "list.txt")
    assert names(place) == wanted
    assert sorted(name for number in range(3) for name in names(place, shard=(number, 3))) == wanted


def test_a_line_of_a_list_as_people_write_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("sub/x.jpg", "sub/y.jpg", "z.jpg", "#1.jpg", "blank .jpg ", "back\\slash.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to("deep/er")
    (tmp_path / "deep" / "z.jpg").touch()
    lines = {
        "sub\\x.jpg": "sub/x.jpg",
        "  sub/y.jpg \t": "sub/y.jpg",
        "./z.jpg": "z.jpg",
        ".//./z.jpg": "z.jpg",
        "sub//x.jpg": "sub/x.jpg",
        "sub/../sub/./y.jpg": "sub/y.jpg",
        "link/../z.jpg": "link/../z.jpg",
        "../gone.jpg": "../gone.jpg",
        "# a comment": None,
        "#1.jpg": "#1.jpg",
        "   ": None,
        "blank .jpg ": "blank .jpg ",
        "back\\slash.jpg": "back\\slash.jpg",
        "gone\\z.jpg": "gone\\z.jpg",
        "C:\\z.jpg": "C:\\z.jpg",
        "nul\0.jpg": "nul\0.jpg",
    }
    wanted = sorted({name for name in lines.values() if name})
    for encoding, end in (("utf-8", "\n"), ("utf-8-sig", "\r\n"), ("utf-16", "\r\n")):
        (tmp_path / "list.txt").write_bytes(end.join(lines).encode(encoding))
        assert names(FileList(tmp_path / "list.txt")) == wanted, encoding


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"a.jpg\n" + b"x" * 70_000, "line 2: expected a path or URL, got over 65,536 characters", id="long"),
        pytest.param(b"\xff\xfea", "expected UTF-16 text", id="half a character"),
    ],
)
def test_a_list_that_is_none(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "list.txt").write_bytes(data)
    with pytest.raises(ImageError, match=message) as caught:
        names(FileList(tmp_path / "list.txt"))
    assert caught.value.hint


def test_an_empty_list_and_none_at_all(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("\n\n")
    with pytest.raises(ImageError, match="no images in it"):
        check_images(FileList(tmp_path / "list.txt").listing())
    with pytest.raises(ImageError, match=r"none\.txt: cannot be read"):
        check_images(FileList(tmp_path / "none.txt").listing())


def test_a_list_names_paths_and_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: Bucket) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x y.jpg").write_bytes(b"1")
    bucket.put("photos/a.jpg", b"12")
    place = pickle.loads(pickle.dumps(FileList(tmp_path / "list.txt")))
    for name in ("sub/x y.jpg", "./sub/x y.jpg", str(tmp_path / "sub" / "x y.jpg"), f"file://{tmp_path}/sub/x%20y.jpg"):
        assert (place.read(name).name, place.read(name).data) == (name, b"1")
        assert place.stamp(name) == {"bytes": 1, "mtime_ns": (tmp_path / "sub" / "x y.jpg").stat().st_mtime_ns}
    name = f"{bucket.url}/photos/a.jpg"
    assert (place.read(name).name, place.read(name).data) == (name, b"12")
    assert place.stamp(name)["bytes"] == 2
    for name in ("sub/none.jpg", f"{bucket.url}/photos/none.jpg"):
        with pytest.raises(ImageError) as caught:
            place.read(name)
        assert caught.value.message.startswith(f"{name}: cannot be read")


def test_a_line_that_has_more_than_a_path_is_told_the_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = FileList(tmp_path / "list.txt")
    for name in ("a.png\t3", "a.png,dog", '"a.png"', "2007_000032", "none.png"):
        with pytest.raises(ImageError, match="cannot be read") as caught:
            place.read(name)
        assert ("a list has one path or URL a line" in caught.value.message) == (name != "none.png")


# ---- several folders and images; some images of a source ----


def names_of(source: Source, out: Path | None = None) -> list[str]:
    return [image.name for image in source.listing(out)]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a/1.jpg", "a/2.png", "a/in/3.jpg", "a/notes.txt", "ab/4.jpg", "b/5.jpg", "b/6.jpg", "7.jpg", "b/8.log"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "root", "names"),
    [
        (("a", "b/5.jpg"), "", ["a/1.jpg", "a/2.png", "a/in/3.jpg", "b/5.jpg"]),
        (("a/1.jpg", "a/2.png"), "a", ["1.jpg", "2.png"]),
        (("a/in/", "./a/1.jpg"), "a", ["1.jpg", "in/3.jpg"]),
        (("a", "a/in"), "a", ["1.jpg", "2.png", "in/3.jpg"]),
        (("b/6.jpg", "b/6.jpg"), "b", ["6.jpg"]),
        (("7.jpg", "b"), "", ["7.jpg", "b/5.jpg", "b/6.jpg"]),
    ],
)
def test_several_inputs_are_one_folder_with_some_of_its_images(
    tree: Path, given: tuple[str, ...], root: str, names: list[str]
) -> None:
    source = source_of(*given)
    assert isinstance(source, LocalImages) and source.path == tree / root
    assert names_of(source) == names
    whole = {image.name: image.label for image in LocalImages(tree / root).listing()}
    assert {image.name: image.label for image in source.listing()}.items() <= whole.items()
    assert local_folder(source) == tree / root


def test_only_files_of_the_inputs_count_as_left_out(tree: Path) -> None:
    listing = source_of("a", "b/5.jpg").listing()
    list(listing)
    assert listing.left_out.files == {".txt": 1}


def test_folders_beside_the_inputs_are_not_entered(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[str] = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: entered.append(os.path.relpath(path, tree)) or scan(path))  # type: ignore[func-returns-value]
    names_of(source_of("a/in", "b"))
    assert sorted(entered) == [".", "a", "a/in", "b"]


@pytest.mark.parametrize("other", ["s3://bucket/a", "a/notes.txt", "b/8.log", "missing.jpg", "missing"])
def test_several_inputs_are_folders_and_images(tree: Path, other: str) -> None:
    with pytest.raises(UsageError, match=re.escape(other)) as found:
        source_of("a", other)
    assert found.value.hint


def test_some_images_of_a_source(tree: Path) -> None:
    source = LocalImages(tree / "b")
    assert names_of(Chosen(source, leave_out=frozenset({"5.jpg"}))) == ["6.jpg"]
    assert names_of(Chosen(source, only=frozenset({"5.jpg", "x.jpg"}))) == ["5.jpg"]
    some = Chosen(LocalImages(tree), frozenset({"7.jpg"}), limit=2)
    assert names_of(some) == names_of(some) == ["a/1.jpg", "a/2.png"]
    assert pickle.loads(pickle.dumps(some)) == some
    assert (local_folder(some), str(some), some.is_remote) == (tree, str(tree), False)
    assert some.stamp("b/5.jpg")["bytes"] == 0
