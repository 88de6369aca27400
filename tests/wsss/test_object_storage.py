"""Folders in object stores: the same answers from S3, from a server on loopback, and from any other file system of fsspec."""

from __future__ import annotations

import errno
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from wsss import object_storage as remote
from wsss.errors import WsssError
from wsss.extras import install_line
from wsss.object_storage import Presence, RemoteFolder, is_url

if TYPE_CHECKING:
    from ..conftest import Bucket

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed (pip install 'wsss[remote]')")
NAMES = sorted(["a-b.jpg", "a.jpg", "a/b.jpg", "a/z/c.jpg", "a0.jpg", "b.jpg", "z/é.jpg", "z/日 本.jpg", "z/\U0001f600.jpg"])


@pytest.fixture(params=["s3", "memory"])
def folder(request: pytest.FixtureRequest) -> Iterator[RemoteFolder]:
    if request.param == "s3":
        bucket: Bucket = request.getfixturevalue("bucket")
        yield RemoteFolder(f"{bucket.url}/some/where")
    else:
        fsspec.filesystem("memory").store.clear()
        yield RemoteFolder("memory://some/where")
        fsspec.filesystem("memory").store.clear()


@pytest.fixture
def filled(folder: RemoteFolder) -> RemoteFolder:
    for name in random.Random(0).sample(NAMES, len(NAMES)):
        folder.write(name, name.encode())
    RemoteFolder(f"{folder.url}-else").write("x.jpg", b"no")
    return folder


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("", False),
        ("photos", False),
        ("C:/x", False),
        ("s3://b/x", True),
        ("gs://b", True),
        ("file:///x", False),
        ("a b://x", False),
    ],
)
def test_what_is_a_url(text: str, is_one: bool) -> None:
    assert is_url(text) is is_one


def test_an_empty_folder(folder: RemoteFolder) -> None:
    assert folder.scan() == ([], [])
    assert list(folder.walk()) == []
    assert "x.png" not in Presence(folder, "labels/")


@pytest.mark.parametrize("page", [1, 2, 1000])
def test_files_come_by_name_page_by_page(filled: RemoteFolder, monkeypatch: pytest.MonkeyPatch, page: int) -> None:
    monkeypatch.setattr(remote, "PAGE", page)
    entries = list(filled.walk())
    assert [entry.name for entry in entries] == NAMES
    assert [entry.size for entry in entries] == [len(name.encode()) for name in NAMES]
    assert len({entry.etag for entry in entries} - {""}) == len(NAMES)
    assert [entry.name for entry in filled.walk("a/")] == ["a/b.jpg", "a/z/c.jpg"]
    files, folders = filled.scan()
    assert ([file.name for file in files], folders) == (["a-b.jpg", "a.jpg", "a0.jpg", "b.jpg"], ["a/", "z/"])
    files, folders = filled.scan("a/")
    assert ([file.name for file in files], folders) == (["a/b.jpg"], ["a/z/"])


def test_the_root_of_a_bucket_is_a_folder_too(bucket: Bucket) -> None:
    bucket.put("x.jpg", b"1")
    bucket.put("sub/", b"")  # as a console makes a new folder
    bucket.put("sub/y.jpg", b"1")
    assert [entry.name for entry in RemoteFolder(bucket.url).walk()] == ["sub/y.jpg", "x.jpg"]
    assert RemoteFolder(bucket.url).scan()[1] == ["sub/"]
    RemoteFolder(bucket.url).write("z.jpg", b"2")
    assert bucket.get("z.jpg") == b"2"


@pytest.mark.parametrize("page", [1, 3, 1000])
@pytest.mark.parametrize("order", ["sorted", "any"])
def test_presence_is_right_in_any_order(filled: RemoteFolder, monkeypatch: pytest.MonkeyPatch, page: int, order: str) -> None:
    monkeypatch.setattr(remote, "PAGE", page)
    asked = NAMES + [f"{name}x" for name in NAMES] + [name[:-1] for name in NAMES] + ["a", "zz", "none/x.jpg"]
    asked = sorted(asked) if order == "sorted" else random.Random(1).sample(asked, len(asked))
    there = Presence(filled, "")
    assert [name for name in asked if name in there] == [name for name in asked if name in NAMES]


def test_presence_asks_once_a_page(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RemoteFolder(f"{bucket.url}/store")
    for number in range(30):
        folder.write(f"labels/{number:02}.png", b"")
    asked = 0
    pages = remote._s3_pages

    def counted(*given: Any, **how: Any) -> Any:
        nonlocal asked
        asked += 1
        return pages(*given, **how)

    monkeypatch.setattr(remote, "PAGE", 10)
    monkeypatch.setattr(remote, "_s3_pages", counted)
    there = Presence(folder, "labels/")
    assert all(f"{number:02}.png" in there for number in range(30))
    assert asked == 3


def test_a_file_is_read_in_parts_and_by_lines(folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write("x", b"0123456789")
    assert (folder.read("x"), folder.read("x", 2, 5), folder.read("x", 8, 100)) == (b"0123456789", b"234", b"89")
    assert (folder.read("x", 7), folder.read("x", 0, 1)) == (b"789", b"0")
    lines = [b"", b"one", b"\r", b"three", "vier\u2028".encode()]
    for chunk in (2, 3, 7, 1000):
        monkeypatch.setattr(remote, "CHUNK", chunk)
        for torn in (b"", b"torn"):
            folder.write_lines("y", [*(line + b"\n" for line in lines), torn])
            assert list(folder.lines("y")) == [line + b"\n" for line in lines]
    folder.write("empty", b"")
    assert list(folder.lines("empty")) == []


def test_what_is_not_there(filled: RemoteFolder) -> None:
    for ask in (
        lambda: filled.read("none"),
        lambda: filled.entry("none"),
        lambda: filled.entry("a"),
        lambda: list(filled.lines("none")),
    ):
        with pytest.raises(FileNotFoundError):
            ask()
    filled.delete(["none", "a.jpg", "a/b.jpg"])
    filled.delete([])
    assert [entry.name for entry in filled.walk()] == [name for name in NAMES if name not in ("a.jpg", "a/b.jpg")]


def test_only_one_creates_and_only_one_swaps(folder: RemoteFolder) -> None:
    first = folder.create("lock", b"first")
    with pytest.raises(FileExistsError):
        folder.create("lock", b"second")
    second = folder.swap("lock", b"third", first)
    assert second == folder.entry("lock").etag != first
    with pytest.raises(FileExistsError):
        folder.swap("lock", b"fourth", first)
    assert folder.read("lock") == b"third"


def test_a_server_that_knows_no_conditions_writes_nothing_over(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    put = remote._s3_put
    monkeypatch.setattr(remote, "_s3_put", lambda fs, path, data, **_: put(fs, path, data))
    RemoteFolder(bucket.url).create("lock", b"first")
    with pytest.raises(FileExistsError):
        RemoteFolder(bucket.url).create("lock", b"second")
    assert bucket.get("lock") == b"first"


def test_only_the_condition_decides_between_two_at_once(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    def sees_nothing(*_: object) -> None:
        raise FileNotFoundError

    RemoteFolder(bucket.url).create("lock", b"first")
    monkeypatch.setattr(RemoteFolder, "entry", sees_nothing)
    with pytest.raises(FileExistsError):
        RemoteFolder(bucket.url).create("lock", b"second")
    assert bucket.get("lock") == b"first"


def test_it_can_be_sent_to_another_process(filled: RemoteFolder) -> None:
    filled.read("a.jpg")  # with its connections open
    assert pickle.loads(pickle.dumps(filled)).read("a.jpg") == b"a.jpg"


# ---- trouble ----


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """fsspec's memory file system, and no waiting."""
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0))
    return remote._opened("memory://some/where")[0]


@pytest.mark.parametrize("below", ["", "a/"])
def test_a_folder_that_is_listed_in_itself_is_left_out(memory: Any, monkeypatch: pytest.MonkeyPatch, below: str) -> None:
    """As some stores do that keep a mark for each folder."""
    memory.store.clear()
    folder = RemoteFolder("memory://some/where")
    folder.write("a/b.jpg", b"1")
    plain, listed = folder.scan(below), memory.ls

    def with_itself(path: str, **how: Any) -> list[dict[str, Any]]:
        return [{"name": path, "size": 0, "type": "directory"}, *listed(path, **how)]

    monkeypatch.setattr(memory, "ls", with_itself)
    assert folder.scan(below) == plain


@pytest.mark.parametrize(
    "error", [TimeoutError("slow"), OSError("reset"), ConnectionResetError(104, "reset"), RuntimeError("odd")]
)
def test_what_may_pass_is_tried_again(memory: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    folder = RemoteFolder("memory://some/where")
    folder.write("x", b"1")
    read, tries = memory.cat_file, list[str]()

    def fails(path: str, *given: Any, most: int, **how: Any) -> Any:
        tries.append(path)
        if len(tries) <= most:
            raise error
        return read(path, *given, **how)

    monkeypatch.setattr(memory, "cat_file", lambda path, *given, **how: fails(path, *given, most=2, **how))
    assert folder.read("x") == b"1"
    assert len(tries) == 3
    tries.clear()
    monkeypatch.setattr(memory, "cat_file", lambda path, *given, **how: fails(path, *given, most=9, **how))
    with pytest.raises(OSError, match=str(error.args[-1])) as caught:
        folder.read("x")
    assert (caught.value.errno, len(tries)) == (errno.EIO, 3)


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (PermissionError("forbidden"), errno.EACCES),
        (FileNotFoundError("gone"), errno.ENOENT),
        (type("NoCredentialsError", (Exception,), {})("none"), errno.EACCES),
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (OSError(errno.ENAMETOOLONG, "long"), errno.ENAMETOOLONG),
        (UnicodeEncodeError("utf-8", "\udce9", 0, 1, "surrogates not allowed"), errno.EILSEQ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_will_not_pass_is_said_at_once(memory: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, number: int) -> None:
    tries: list[str] = []

    def fails(path: str, *_: Any, **__: Any) -> Any:
        tries.append(path)
        raise error

    monkeypatch.setattr(memory, "pipe_file", fails)
    with pytest.raises(OSError) as caught:
        RemoteFolder("memory://some/where").write("x", b"1")
    assert (caught.value.errno, len(tries)) == (number, 1)
    assert caught.value.strerror


def test_a_listing_out_of_order_is_noticed(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put("a.jpg", b"")
    bucket.put("b.jpg", b"")
    folder = RemoteFolder(bucket.url)
    fs = remote._opened(folder.url)[0]
    call = fs.call_s3

    def turned(*given: Any, **how: Any) -> Any:
        page = call(*given, **how)
        return {**page, "Contents": page["Contents"][::-1]}

    monkeypatch.setattr(fs, "call_s3", turned)
    with pytest.raises(OSError, match=r"out of order, 'a\.jpg' after 'b\.jpg'"):
        list(folder.walk())


def test_a_url_that_nothing_opens() -> None:
    with pytest.raises(WsssError, match=r"^zzz://x: expected s3://, gs:// or another URL"):
        RemoteFolder("zzz://x").scan()


@pytest.mark.parametrize(("package", "url"), [("fsspec.core", "s3://x/y"), ("gcsfs", "gs://x/y")])
def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, package: str, url: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    remote._open.cache_clear()
    with pytest.raises(WsssError, match=package.partition(".")[0]) as caught:
        RemoteFolder(url).scan()
    assert caught.value.hint == install_line("remote")


def test_nothing_needs_fsspec_but_a_url() -> None:
    code = (
        "import sys; sys.modules['fsspec'] = None; import wsss.cli.main, wsss.runtime.run.label_folder, wsss.runtime.run.workers"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
