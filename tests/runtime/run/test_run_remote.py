"""Runs from and into an object store, a real S3 server on loopback: the same labels, resumed, shared, killed, refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from wsss import object_storage as remote
from wsss.object_storage import RemoteFolder
from wsss.runtime.chain import Chain
from wsss.runtime.run.label_folder import label_folder
from wsss.runtime.run.sources import RemoteImages
from wsss.runtime.run.workers import Workers
from wsss.store.local import read_label, read_records
from wsss.store.remote import RemoteStore

if TYPE_CHECKING:
    from ..conftest import Answer, Bucket, World

    Run = Callable[..., Answer]

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed (pip install 'wsss[remote]')")
NAMES = ["black.png", "green.png", "red.png", "sub/three.png", "two.png"]
# A process of its own, with scripted engines: label.py IMAGES OUT BUNDLE [SHARD OF [WRITES]], killed by that many writes.
SCRIPT = """
import importlib.util, os, signal, sys, threading
spec = importlib.util.spec_from_file_location("scripted_world", {conftest!r})
module = sys.modules["scripted_world"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from wsss import object_storage as remote
from wsss.store import remote as remote_store
from wsss.runtime import chain as pipeline
from wsss.runtime.run import label_folder as run, sources

def open_labeler(bundle):
    world = module.World(bundle)
    pipeline.open_graph = world.open_graph
    return pipeline.Chain.open(bundle, classes=world.classes)

def main(images, out, bundle, shard="-1", count="0", left="-1"):
    remote_store.PART_LINES = 2
    lock, left = threading.Lock(), [int(left)]
    write, write_lines, delete = remote.RemoteFolder.write, remote.RemoteFolder.write_lines, remote.RemoteFolder.delete
    def step(true):
        def call(*given):
            with lock:
                left[0] -= 1
                if left[0] == -1:
                    os.kill(os.getpid(), signal.SIGKILL)
            return true(*given)
        return call
    if left[0] >= 0:
        for name in ("write", "write_lines", "delete"):
            setattr(remote.RemoteFolder, name, step(getattr(remote.RemoteFolder, name)))
    share = (int(shard), int(count)) if int(count) else None
    run.label_folder(open_labeler(bundle), sources.source_of(images), sources.store_of(out), batch=2, shard=share)

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@pytest.fixture
def label(wsss: Run, world: World) -> Run:
    """``label(images, out, *flags)``."""

    def run(images: object, out: object, *flags: str) -> Answer:
        return wsss("label", str(images), "--classes", "red, green, blue", "--bundle", world.bundle, "--out", str(out), *flags)

    return run


@pytest.fixture
def photos_url(bucket: Bucket, photos: Path) -> str:
    bucket.upload(photos, "photos")
    return f"{bucket.url}/photos"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "label_script.py").write_text(SCRIPT.format(conftest=str(Path(__file__).parents[2] / "conftest.py")))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "label_script.py"


def start(script: Path, world: World, images: str, out: str, *more: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, script, images, out, world.bundle, *map(str, more)], stderr=subprocess.PIPE)


def records(bucket: Bucket, prefix: str = "store") -> dict[str, dict[str, Any]]:
    return {record["path"]: record for record in map(json.loads, bucket.get(f"{prefix}/manifest.jsonl").splitlines())}


def by_image(records: dict[str, dict[str, Any]], read: Callable[[str], bytes]) -> dict[str, object]:
    """What a run found out about each image, and its label, without what tells where the image was."""
    where = ("label", "mtime_ns", "etag")
    return {
        path: ({key: value for key, value in record.items() if key not in where}, read(f"labels/{record['label']}"))
        for path, record in records.items()
    }


def test_any_mix_of_here_and_there_makes_the_same_labels(
    label: Run, bucket: Bucket, photos: Path, photos_url: str, tmp_path: Path
) -> None:
    assert label(photos, "here").code == 0
    here = {record["path"]: record for record in read_records(tmp_path / "here")}
    want = by_image(here, lambda name: (tmp_path / "here" / name).read_bytes())
    assert list(want) == NAMES

    assert label(photos_url, "from-there").code == 0
    found = {record["path"]: record for record in read_records(tmp_path / "from-there")}
    assert by_image(found, lambda name: (tmp_path / "from-there" / name).read_bytes()) == want
    for name, out in ((photos, "from-here"), (photos_url, "there")):
        answer = label(name, f"{bucket.url}/{out}")
        assert (answer.code, answer.out.split(",")[0]) == (0, f"{bucket.url}/{out}: 5 labeled (7 boxes)")
        assert by_image(records(bucket, out), lambda name, out=out: bucket.get(f"{out}/{name}")) == want  # type: ignore[misc]
    assert bucket.keys("from-here/") == [
        "from-here/classes.json",
        "from-here/history.jsonl",
        *(f"from-here/labels/{name}" for name in NAMES),
        "from-here/manifest.jsonl",
        "from-here/run.json",
    ]
    for name in ("run.json", "classes.json", "manifest.jsonl"):
        assert bucket.get(f"from-here/{name}") == (tmp_path / "here" / name).read_bytes()
    assert records(bucket, "there")["red.png"]["etag"]
    assert "mtime_ns" not in records(bucket, "there")["red.png"]


def test_one_object_and_a_list(label: Run, bucket: Bucket, photos: Path, photos_url: str, tmp_path: Path) -> None:
    assert "1 labeled (1 boxes)" in label(f"{photos_url}/red.png", f"{bucket.url}/one").out
    assert list(records(bucket, "one")) == ["red.png"]
    names = [f"{photos_url}/two.png", "photos/green.png", f"{photos_url}/none.png", "photos/green.png"]
    (tmp_path / "list.txt").write_text("\n".join(names))
    answer = label("list.txt", "store")
    assert (answer.code, "2 labeled (3 boxes), 0 already done, 1 failed" in answer.out) == (1, True)
    assert f"failed: {photos_url}/none.png: cannot be read: not found" in answer.err
    again = label("list.txt", "store")
    assert (again.code, "0 labeled (0 boxes), 3 already done (1 of them failed" in again.out) == (1, True)
    for record in read_records(tmp_path / "store"):
        assert "error" in record or read_label(tmp_path / "store" / "labels" / record["label"]).any()


# ---- again ----


def test_only_what_changed_is_done_again(label: Run, bucket: Bucket, world: World, photos_url: str, tmp_path: Path) -> None:
    out = f"{bucket.url}/store"
    label(photos_url, out)
    before = bucket.contents("store")
    answer = label(photos_url, out)
    assert "0 labeled (0 boxes), 5 already done, 0 failed" in answer.out
    assert bucket.contents("store") == before

    bucket.put("photos/red.png", world.save(tmp_path / "x.png", 48, 64, green=(8, 8, 32, 40)).read_bytes())
    bucket.put("photos/new.png", world.save(tmp_path / "x.png", 20, 20).read_bytes())
    bucket.delete("store/labels/green.png.png")
    same = bucket.client.create_multipart_upload(Bucket=bucket.name, Key="photos/two.png")  # the same bytes by another etag
    part = {"Bucket": bucket.name, "Key": "photos/two.png", "UploadId": same["UploadId"]}
    tag = bucket.client.upload_part(**part, PartNumber=1, Body=bucket.get("photos/two.png"))["ETag"]
    bucket.client.complete_multipart_upload(**part, MultipartUpload={"Parts": [{"ETag": tag, "PartNumber": 1}]})
    assert "3 labeled (2 boxes), 3 already done, 0 failed" in label(photos_url, out).out
    assert list(records(bucket)) == sorted([*NAMES, "new.png"])
    assert list(records(bucket)["red.png"]["classes"]) == ["green"]
    assert bucket.get("store/labels/green.png.png") == before["labels/green.png.png"]


def test_a_bad_object_is_named_and_tried_again_when_asked(label: Run, bucket: Bucket, photos_url: str) -> None:
    out = f"{bucket.url}/store"
    bucket.put("photos/bad.jpg", b"no image")
    bucket.put("photos/empty.jpg", b"")
    answer = label(photos_url, out)
    assert (answer.code, "5 labeled (7 boxes), 0 already done, 2 failed" in answer.out) == (1, True)
    assert "failed: bad.jpg: not a readable image" in answer.err
    assert records(bucket)["bad.jpg"]["etag"]
    assert "7 already done (2 of them failed: --retry-failed)" in label(photos_url, out).out
    assert "5 already done, 2 failed" in label(photos_url, out, "--retry-failed").out
    bucket.put("photos/bad.jpg", bucket.get("photos/two.png"))
    assert "1 labeled (2 boxes), 6 already done (1 of them failed" in label(photos_url, out).out
    assert len(records(bucket)) == 7


def test_other_settings_are_refused(label: Run, bucket: Bucket, photos_url: str) -> None:
    label(photos_url, f"{bucket.url}/store")
    before = bucket.contents("store")
    answer = label(photos_url, f"{bucket.url}/store", "--margin", "0.2")
    assert (answer.code, "was made with rules" in answer.err, "Traceback" in answer.err) == (1, True, False)
    assert bucket.contents("store") == before


def test_a_store_among_the_photographs_is_not_labeled(label: Run, bucket: Bucket, photos_url: str) -> None:
    for done in (0, 5):
        assert f"{5 - done} labeled" in (answer := label(photos_url, f"{photos_url}/store")).out
        assert f"{done} already done" in answer.out


# ---- several, and killed ----


def test_killed_anywhere_and_continued(
    label: Run, bucket: Bucket, photos_url: str, world: World, script: Path, tmp_path: Path
) -> None:
    label(photos_url, f"{bucket.url}/whole")
    whole = bucket.contents("whole")
    killed = {left: start(script, world, photos_url, f"{bucket.url}/killed-{left}", -1, 0, left) for left in (2, 7, 12)}
    for left, process in killed.items():
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        for record in (
            json.loads(line) for key in bucket.keys(f"killed-{left}/manifest") for line in bucket.get(key).splitlines()
        ):
            assert bucket.get(f"killed-{left}/labels/{record['label']}")
        assert label(photos_url, f"{bucket.url}/killed-{left}").code == 0
        assert bucket.contents(f"killed-{left}") == whole, left


def test_shards_at_the_same_time_make_the_same_store(
    label: Run, bucket: Bucket, photos_url: str, world: World, script: Path
) -> None:
    label(photos_url, f"{bucket.url}/whole")
    shards = [start(script, world, photos_url, f"{bucket.url}/store", number, 3) for number in range(3)]
    errors = [process.communicate()[1] for process in shards]
    assert [process.returncode for process in shards] == [0, 0, 0]
    assert b"".join(errors).startswith(b"black.png: next to no range") and b"".join(errors).count(b"\n") == 1
    assert bucket.contents("store") == bucket.contents("whole")


def test_workers_read_and_write_there(bucket: Bucket, photos_url: str, world: World, script: Path, label: Run) -> None:
    label(photos_url, f"{bucket.url}/whole")

    import label_script  # type: ignore[import-not-found]

    openers = [("cpu", partial(label_script.open_labeler, world.bundle))] * 2
    with Workers(openers, batch=1) as workers:
        images, out = RemoteImages(RemoteFolder(photos_url)), RemoteFolder(f"{bucket.url}/store")
        assert label_folder(workers, images, out).labelled == 5
    assert bucket.contents("store") == bucket.contents("whole")


def test_a_second_run_is_refused(
    label: Run, bucket: Bucket, photos_url: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsss.store.remote_lock.BEAT", 0.05)
    out = f"{bucket.url}/store"
    with RemoteStore(RemoteFolder(out), world.classes, Chain.open(world.bundle, classes=world.classes).settings):
        answer = label(photos_url, out)
    assert (answer.code, f"another run writes to it: process {os.getpid()} on " in answer.err) == (1, True)
    assert label(photos_url, out).code == 0


# ---- trouble ----


@pytest.fixture
def anew(bucket: Bucket) -> Iterator[Callable[[], None]]:
    """Connections are made anew when this is called, and after the test: they keep the address and credentials of before."""

    def forget() -> None:
        remote._open.cache_clear()
        fsspec.get_filesystem_class("s3").clear_instance_cache()

    yield forget
    forget()


def check_message(answer: Answer, *messages: str) -> None:
    assert (answer.code, answer.out) == (1, "")
    for text in messages:
        assert text in answer.err
    assert "hint: " in answer.err
    assert "Traceback" not in answer.err


def test_a_bucket_that_is_not_there(label: Run, bucket: Bucket, photos_url: str) -> None:
    check_message(
        label("s3://no-such-bucket/photos", "store"), "s3://no-such-bucket/photos: cannot be listed: not found", "name of the"
    )
    check_message(label(photos_url, "s3://no-such-bucket/store"), "--out s3://no-such-bucket/store: cannot be written: not found")


def test_no_credentials(
    label: Run, bucket: Bucket, photos: Path, photos_url: str, monkeypatch: pytest.MonkeyPatch, anew: Callable[[], None]
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    anew()
    check_message(label(photos_url, "store"), "cannot be listed: Unable to locate credentials", "check the credentials")
    check_message(
        label(photos, f"{bucket.url}/store"), "cannot be written: Unable to locate credentials", "check the credentials"
    )


def test_a_server_that_does_not_answer(
    label: Run, photos_url: str, monkeypatch: pytest.MonkeyPatch, anew: Callable[[], None]
) -> None:
    monkeypatch.setattr(remote, "WAITS", ())
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    anew()
    check_message(label(photos_url, "store"), "Could not connect to the endpoint URL", "AWS_ENDPOINT_URL")


def test_an_object_that_may_not_be_read_fails_by_name(
    label: Run, bucket: Bucket, photos_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = RemoteFolder.read

    def forbidden(self: RemoteFolder, name: str, *given: Any) -> bytes:
        if name == "red.png":
            raise PermissionError(13, "Access Denied")
        return read(self, name, *given)

    monkeypatch.setattr(RemoteFolder, "read", forbidden)
    answer = label(photos_url, f"{bucket.url}/store")
    assert (answer.code, "4 labeled (6 boxes), 0 already done, 1 failed" in answer.out) == (1, True)
    assert "failed: red.png: cannot be read: Access Denied" in answer.err


def test_a_write_that_fails_stops_the_run_and_the_store_goes_on(
    label: Run, bucket: Bucket, photos_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    label(photos_url, f"{bucket.url}/whole")
    write, written = RemoteFolder.write, list[str]()

    def fails(self: RemoteFolder, name: str, data: bytes) -> None:
        written.append(name)
        if len(written) > 4:
            raise PermissionError(13, "Access Denied")
        write(self, name, data)

    with monkeypatch.context() as broken:
        broken.setattr(RemoteFolder, "write", fails)
        answer = label(photos_url, f"{bucket.url}/store")
    check_message(answer, f"{bucket.url}/store: cannot write ", "Access Denied", "run the same command again")
    assert label(photos_url, f"{bucket.url}/store").code == 0
    assert bucket.contents("store") == bucket.contents("whole")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("convert", "s3://b/store", "--to", "coco", "--images", "photos", "--out", "coco"), "aws s3 sync s3://b/store store"),
        (("report", "store", "--images", "gs://b/photos"), "gcloud storage rsync --recursive gs://b/photos photos"),
        (("train", "s3://b/store", "--images", "photos", "--out", "run"), "aws s3 sync s3://b/store store"),
        (("report", "store", "--images", "photos", "--out", "s3://b/page.html"), "give a local folder"),
    ],
)
def test_other_commands_say_how_to_copy(wsss: Run, command: tuple[str, ...], message: str) -> None:
    answer = wsss(*command)
    assert (answer.code, answer.out) == (2, "")
    assert message in answer.err
    assert "only wsss label reaches object stores" in answer.err
