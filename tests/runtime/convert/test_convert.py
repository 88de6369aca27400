"""A store of awkward images becomes each format: what holds for all of them, losses, mistakes, and the command.

Readers that this environment lacks are skipped by name; ``make formats`` runs with all of them, in an environment of its own,
for two of them want an older numpy and Pillow.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from wsss.classes import class_list
from wsss.errors import ImageError, StoreError, UsageError, WsssError
from wsss.photographs import read_photograph
from wsss.runtime.convert.dataset import FORMATS, Conversion, convert, is_rotated
from wsss.runtime.convert.labeled import Labeled, original_path, read_labelled
from wsss.store.decisions import exclusion
from wsss.store.local import LabelStore, read_records

if TYPE_CHECKING:
    from ..conftest import Answer, World

from .stores import CLASSES, NAMES, photos_below, truth

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools, by numpy 2


# ---- what holds for all formats ----


@pytest.mark.parametrize("to", FORMATS)
def test_photographs_go_through_unchanged_and_their_names_come_back(to: str, made: Path, converted: Callable[..., Path]) -> None:
    out = converted(to)
    folder = {"voc": "JPEGImages", "cvat": "JPEGImages", "hf": "train/images", "label-studio": "images"}.get(to, "images/train")
    found = photos_below(out / folder)
    assert found.keys() == set(NAMES)
    for name, path in found.items():
        assert path.read_bytes() == (made / "photos" / name).read_bytes()
        assert path.stat().st_nlink == 1
    if to in ("voc", "yolo"):
        assert all(path.parent == out / folder and path.name.isprintable() and " " not in path.name for path in found.values())
    assert len({str(path).casefold() for path in found.values()}) == len(NAMES), "or they meet on another file system"


@pytest.mark.parametrize("to", FORMATS)
def test_the_same_store_gives_the_same_bytes_and_leaves_nothing_beside(to: str, made: Path, tmp_path: Path) -> None:
    for out in ("first", "second"):
        convert(made / "store", made / "photos", tmp_path / out, to, link=out == "second")
    digests = [
        {
            path.relative_to(tmp_path / out): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted((tmp_path / out).rglob("*"))
            if path.is_file()
        }
        for out in ("first", "second")
    ]
    assert digests[0] == digests[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_links_lead_to_the_photographs(made: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in NAMES:  # a folder of symbolic links: what they point to is linked
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "real").mkdir(exist_ok=True)
        real = tmp_path / "real" / str(NAMES.index(name))
        shutil.copyfile(made / "photos" / name, real)
        (tmp_path / "photos" / name).symlink_to(real)
    convert(made / "store", tmp_path / "photos", tmp_path / "out", "hf", link=True)
    for path in photos_below(tmp_path / "out/train/images").values():
        assert not path.is_symlink()
        assert path.stat().st_nlink == 2


@pytest.mark.parametrize("to", ["voc", "coco", "yolo", "hf"])
def test_a_share_is_held_out_by_name(to: str, made: Path, converted: Callable[..., Path]) -> None:
    out = converted(to, val=0.4)
    expected = {item.path for item in read_labelled(made / "store", made / "photos", val=0.4) if item.split == "val"}
    assert 0 < len(expected) < len(NAMES)
    assert {item.split for item in read_labelled(made / "store", made / "photos")} == {"train"}
    if to == "voc":
        lists = {path.stem: path.read_text().split() for path in (out / "ImageSets/Segmentation").iterdir()}
        by_name = {path.stem: name for name, path in photos_below(out / "JPEGImages").items()}
        assert {by_name[name] for name in lists["val"]} == expected
        assert sorted(lists["trainval"]) == sorted(by_name) == sorted(lists["train"] + lists["val"])
        return
    for split, names in (("val", expected), ("train", set(NAMES) - expected)):
        assert photos_below(out / (f"{split}/images" if to == "hf" else f"images/{split}")).keys() == names
    if to == "yolo":
        assert "val: images/val\n" in (out / "data.yaml").read_text()
        assert len(list((out / "labels/val").iterdir())) == len(expected)
    if to == "coco":
        assert len(json.loads((out / "annotations/instances_val.json").read_text())["images"]) == len(expected)


@pytest.mark.parametrize("to", ["voc", "coco", "yolo", "cvat", "label-studio", "hf"])
def test_rejected_images_are_left_out(to: str, made: Path, tmp_path: Path) -> None:
    rejected = {"a b/my dog.jpg", "one.png"}
    (path := tmp_path / "bad.txt").write_text("\n".join(rejected))
    said: list[str] = []
    done = convert(made / "store", made / "photos", tmp_path / "out", to, exclude=path, log=said.append)
    everything = {item.path for item in read_labelled(made / "store", made / "photos")}
    assert done.images == len(everything) - 2 and said == [f"--exclude {path}: 2 images are left out"]
    names = {item.path for item in read_labelled(made / "store", made / "photos", exclude=exclusion(path))}
    assert names == everything - rejected


def test_memory_holds_one_image_at_a_time(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    from wsss.runtime.convert import dataset as formats

    held: list[weakref.ref[np.ndarray]] = []
    most = 0

    def counted(*args: Any, **flags: Any) -> Any:
        nonlocal most
        for item in read_labelled(*args, **flags):
            held.append(weakref.ref(item.label_map))
            most = max(most, sum(each() is not None for each in held))
            yield item

    monkeypatch.setattr(formats, "read_labelled", counted)
    for to in ("voc", "yolo", "cvat", "label-studio", "hf"):
        convert(made / "store", made / "photos", tmp_path / to, to)
    assert most <= 2, "the one that is read while the one before is let go"


@pytest.mark.parametrize(
    ("path", "label", "flat", "nested"),
    [
        ("dog.jpg", "dog.png", "dog", "dog"),
        ("a/my dog.jpg", "a/my dog.png", "a%2Fmy%20dog", "a/my dog"),
        ("a%2Fmy%20dog.jpg", "a%2Fmy%20dog.png", "a%252Fmy%2520dog", "a%252Fmy%2520dog"),
        ("dog.v2.JPG", "dog.v2.JPG.png", "dog.v2%2EJPG", "dog.v2%2EJPG"),
        ("dog%2Ejpg.jpg", "dog%2Ejpg.png", "dog%252Ejpg", "dog%252Ejpg"),
        ("Dog.JPG", "Dog.JPG.0123456789ab.png", "%44og%2E%4A%50%47", "%44og%2E%4A%50%47"),
        (" #é\n.jpg", " #é\n.png", "%20%23é%0A", "%20#é%0A"),
        ("#x .jpg", "#x .png", "%23x%20", "%23x%20"),
        ("é.jpg", "é.jpg.0123456789ab.png", "%C3%A9%2Ejpg", "%C3%A9%2Ejpg"),
        ("b\udce9d.jpg", "b\udce9d.png", "b%E9d", "b%E9d"),
    ],
)
def test_names_go_there_and_back(path: str, label: str, flat: str, nested: str) -> None:
    item = Labeled(
        path=path,
        label=label,
        file=Path(),
        size_bytes=0,
        sha256="",
        label_map=np.zeros((1, 1), np.uint8),
        count=np.zeros(256, np.int64),
        boxes=(),
        masks=None,
        split="train",
    )
    assert (item.name(flat=True), item.name(flat=False)) == (flat, nested)
    for name in (flat, nested):
        assert original_path(name + item.ending) == path


def test_a_name_that_is_no_unicode(made: Path, tmp_path: Path) -> None:
    name = "b\udce9d.jpg"
    (tmp_path / "photos").mkdir()
    try:
        shutil.copyfile(made / "photos/dog.jpg", tmp_path / "photos" / name)
    except OSError:
        pytest.skip("needs a file system that takes such names")
    record = next(each for each in read_records(made / "store") if each["path"] == "dog.jpg")
    with LabelStore(tmp_path / "store", class_list(CLASSES), {}) as store:
        store.write({**record, "path": name, "label": "b\udce9d.png"}, truth(made)["dog.jpg"])
    for to in ("voc", "cvat", "yolo", "label-studio", "hf"):
        convert(tmp_path / "store", tmp_path / "photos", tmp_path / to, to)
        for path in (tmp_path / to).rglob("*"):
            path.name.encode()
            if path.suffix in (".json", ".jsonl", ".txt"):
                path.read_text(encoding="utf-8")
    line = json.loads((tmp_path / "hf/train/metadata.jsonl").read_text())
    assert (line["file_name"], line["path"]) == ("images/b%E9d.jpg", "b\ufffdd.jpg")


# ---- losses and mistakes ----


def test_losses_are_said_with_their_measure(made: Path, losses: Callable[[str], Conversion]) -> None:
    maps = truth(made).values()
    void = sum(int((each == 255).sum()) for each in maps)
    share = f"{void:,} void pixels ({void / sum(each.size for each in maps):.2%} of all)"
    cut_out = "11 images have no masks in the store: their objects are cut out of the label map"
    turned = "1 images have an EXIF rotation; their labels fit only readers that apply it"
    done = losses("yolo")
    assert (done.images, done.left_out) == (len(NAMES), 1)
    assert done.losses[0] == f"{share} cannot be written in YOLO labels"
    assert re.fullmatch(
        r"\d+ objects in several parts, joined by lines: their polygons have an IoU of 0\.\d{4}, .*", done.losses[1]
    )
    assert done.losses[2:] == ("33 scores of objects cannot be written in YOLO labels", cut_out, turned)
    assert losses("voc").losses == (
        "44 boxes and their scores cannot be written in VOC segmentation",
        "4 images do not end in .jpg, the only ending that torchvision's VOCSegmentation opens",
        turned,
    )
    assert losses("cvat").losses == ("33 scores of objects cannot be written in CVAT masks", cut_out, turned)
    assert losses("label-studio").losses == (cut_out, turned)
    assert losses("hf").losses == (turned,)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_every_exif_rotation_is_noticed(orientation: int, ending: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (4, 3)).save(tmp_path / f"a.{ending}", exif=exif)
    assert is_rotated(tmp_path / f"a.{ending}") == (orientation > 1)


def test_missing_and_changed_images_are_named(copy: Path, tmp_path: Path) -> None:
    (copy / "photos/dog.png").unlink()
    (copy / "photos/line\nbreak.jpg").unlink()
    with pytest.raises(ImageError, match=r"2 of the 13 labeled images are missing: dog\.png, 'line\\nbreak\.jpg'"):
        convert(copy / "store", copy / "photos", tmp_path / "out", "voc")
    with pytest.raises(ImageError, match="13 of the 13 labeled images are missing: .* and 3 more") as error:
        convert(copy / "store", tmp_path / "elsewhere", tmp_path / "out", "voc")
    assert "the folder that was labeled" in error.value.hint


def test_an_image_of_another_size_is_named(copy: Path, tmp_path: Path) -> None:
    with (copy / "photos/dog.jpg").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ImageError, match=r"1 of the 13 images changed since they were labeled: dog\.jpg"):
        convert(copy / "store", copy / "photos", tmp_path / "out", "voc")


@pytest.mark.parametrize("link", [False, True])
def test_another_content_of_the_same_size_is_noticed(copy: Path, tmp_path: Path, link: bool) -> None:
    path = copy / "photos/dog.jpg"
    path.write_bytes(path.read_bytes()[:-3] + b"abc")
    with pytest.raises(ImageError, match=r"dog\.jpg: changed since it was labeled"):
        convert(copy / "store", copy / "photos", tmp_path / "out", "voc", link=link)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"], "nothing is left behind"


def test_a_label_that_does_not_fit_is_named(copy: Path, tmp_path: Path) -> None:
    label = copy / "store/labels/empty.png"
    for label_map, message in (
        (np.zeros((5, 6), np.uint8), "empty.png: is 6 x 5 pixels, the photograph was 47 x 36"),
        (np.full((36, 47), 4, np.uint8), "empty.png: has the label 4, but the store has 3 classes"),
    ):
        Image.fromarray(label_map).save(label)
        with pytest.raises(StoreError, match=message):
            convert(copy / "store", copy / "photos", tmp_path / "out", "voc")
    label.unlink()
    with pytest.raises(StoreError, match=r"empty\.png: cannot be read: No such file"):
        convert(copy / "store", copy / "photos", tmp_path / "out", "voc")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize("name", ["../photos/dog.jpg", "/etc/passwd"])
def test_a_manifest_cannot_lead_out_of_the_folder(copy: Path, tmp_path: Path, name: str) -> None:
    manifest = copy / "store/manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"path": "dog.jpg"', f'"path": "{name}"'))
    with pytest.raises(StoreError, match="leads out of the folder"):
        convert(copy / "store", copy / "photos", tmp_path / "out", "voc")


KILLED = """
import os, signal, sys
from pathlib import Path
from wsss.runtime.convert.dataset import convert

calls, rename = 0, os.rename

def dying(source, target):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
    if calls == -int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

os.rename = dying
made, out = Path(sys.argv[1]), Path(sys.argv[3])
convert(made / "store", made / "photos", out, "cvat", progress=lambda done, of: done < 5 or sys.argv[2] != "0" or os.abort())
"""


@pytest.mark.skipif(os.name == "nt", reason="kills with SIGKILL")
@pytest.mark.parametrize("empty", [False, True])
def test_a_conversion_that_is_killed_leaves_nothing_after_the_next(made: Path, tmp_path: Path, empty: bool) -> None:
    """Killed in the middle (0), before (1, 2) or after (-1, -2) each rename of its folders."""
    for step in (0, 1, -1, 2, -2) if empty else (0, 1, -1):
        out = tmp_path / f"out {step}"
        if empty:
            out.mkdir()
        done = subprocess.run([sys.executable, "-c", KILLED, str(made), str(step), str(out)], capture_output=True, text=True)
        assert done.returncode < 0, done.stderr
        whole = step == (-2 if empty else -1)
        assert (out / "labelmap.txt").exists() == whole
        if whole:
            with pytest.raises(StoreError, match="exists already"):
                convert(made / "store", made / "photos", out, "cvat")
            shutil.rmtree(out)
        convert(made / "store", made / "photos", out, "cvat")
        assert (out / "labelmap.txt").exists()
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_out_that_is_a_link_is_filled_where_it_leads(made: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    convert(made / "store", made / "photos", tmp_path / "out", "cvat")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk/labelmap.txt").exists()


@pytest.mark.parametrize("name", ["labels", "labels/dog.jpg.png", "labels/a b"])
def test_labels_that_a_link_leads_out_of_the_store_are_refused(copy: Path, tmp_path: Path, name: str) -> None:
    path = copy / "store" / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="a link leads out of the store"):
        convert(copy / "store", copy / "photos", tmp_path / "out", "voc")


def test_photographs_behind_a_link_of_the_users_own_are_taken(copy: Path, tmp_path: Path) -> None:
    (copy / "photos/a b").rename(tmp_path / "disk")
    (copy / "photos/a b").symlink_to(tmp_path / "disk")
    assert convert(copy / "store", copy / "photos", tmp_path / "out", "voc").images == len(NAMES)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_a_named_pipe_is_no_label_and_no_photograph(copy: Path, tmp_path: Path) -> None:
    for path, message in ((copy / "store/labels/empty.png", "got a named pipe"), (copy / "photos/empty.jpg", "changed since")):
        data = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(WsssError, match=message):
            convert(copy / "store", copy / "photos", tmp_path / "out", "voc")
        path.unlink()
        path.write_bytes(data)


def test_out_must_be_new_or_empty(made: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    (tmp_path / "empty").mkdir()
    for out in ("full", "full/thesis.tex"):
        with pytest.raises(StoreError, match="exists already"):
            convert(made / "store", made / "photos", tmp_path / out, "voc")
    assert convert(made / "store", made / "photos", tmp_path / "empty", "voc").images == len(NAMES)
    with pytest.raises(StoreError, match="out: cannot be written: File exists"):
        convert(made / "store", made / "photos", tmp_path / "full/thesis.tex/out", "voc")


def test_out_that_cannot_be_looked_at(made: Path, tmp_path: Path) -> None:
    """It may hold files, which are not overwritten: nothing is written beside it."""
    with pytest.raises(StoreError, match="x: cannot be read: File name too long"):
        convert(made / "store", made / "photos", tmp_path / ("x" * 300), "voc")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wsss.runtime.convert.voc.save_indexed", full)
    with pytest.raises(StoreError, match="#list 100%.jpg: cannot be written: No space left on device"):
        convert(made / "store", made / "photos", tmp_path / "out", "voc")
    assert not list(tmp_path.iterdir())


def test_two_images_of_one_name_are_refused(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that does not tell case, should the store's names meet there after all."""
    monkeypatch.setattr("wsss.runtime.convert.labeled.Labeled.name", lambda self, *, flat: "same")
    for to in ("voc", "yolo", "cvat", "hf"):
        with pytest.raises(StoreError, match=r"a b/my dog\.jpg: another image of the store has the same name"):
            convert(made / "store", made / "photos", tmp_path / "out", to)


def test_links_over_file_systems_say_what_to_do(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def apart(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", apart)
    with pytest.raises(StoreError, match="is on another file system") as error:
        convert(made / "store", made / "photos", tmp_path / "out", "voc", link=True)
    assert error.value.hint == "leave out --link"


def test_a_store_without_a_label(tmp_path: Path) -> None:
    with LabelStore(tmp_path / "store", class_list(CLASSES), {}):
        pass
    with pytest.raises(StoreError, match="no labeled image in it"):
        convert(tmp_path / "store", tmp_path, tmp_path / "out", "voc")


def test_flags_that_mean_nothing(made: Path, tmp_path: Path) -> None:
    for to, val, message in (
        ("voc", 1.0, "--val: expected a share"),
        ("cvat", 0.1, "cvat has no splits"),
        ("voc07", 0, "--to: expected one of voc"),
    ):
        with pytest.raises(UsageError, match=message):
            convert(made / "store", made / "photos", tmp_path / "out", to, val=val)
    for to, simplify, message in (
        ("coco", 1.0, "coco has no polygons"),
        ("yolo", -1.0, "0 or more"),
        ("yolo", np.inf, "0 or more"),
    ):
        with pytest.raises(UsageError, match=f"^--simplify: .*{message}"):
            convert(made / "store", made / "photos", tmp_path / "out", to, simplify_px=simplify)


def test_one_labeled_image_instead_of_a_folder(made: Path, tmp_path: Path) -> None:
    photo = read_photograph(made / "photos/dog.jpg", "dog.jpg")
    record = next(each for each in read_records(made / "store") if each["path"] == "dog.jpg")
    with LabelStore(tmp_path / "store", class_list(CLASSES), {}) as store:
        store.write({**record, "label": "dog.png"}, np.zeros(photo.shape, np.uint8))
    convert(tmp_path / "store", made / "photos/dog.jpg", tmp_path / "out", "voc")
    assert (tmp_path / "out/JPEGImages/dog.jpg").read_bytes() == (made / "photos/dog.jpg").read_bytes()


# ---- the command ----


def test_the_command(wsss: Callable[..., Answer], made: Path, tmp_path: Path) -> None:
    argv = ["convert", made / "store", "--to", "yolo", "--images", made / "photos"]
    answer = wsss(*argv, "--out", "yolo", "--val", "0.2")
    assert (answer.code, answer.out) == (0, "yolo: 13 images as yolo\n")
    assert answer.err.startswith("left out: 1 images that failed and have no label\nnote: ")
    assert answer.err.count("note: ") == 5
    assert answer.err.endswith(f"next: yolo segment train data={tmp_path}/yolo/data.yaml\n")
    result = json.loads(wsss(*argv, "--out", "again", "--json").out)
    assert (result["out"], result["format"], result["images"], result["left_out"], len(result["losses"])) == (
        "again",
        "yolo",
        13,
        1,
        5,
    )
    again = wsss(*argv, "--out", "again")
    assert (again.code, again.out) == (1, "")
    assert again.err == "wsss: --out again: exists already\n\nhint: give a new or empty folder\n"


def test_what_label_wrote_can_be_converted(wsss: Callable[..., Answer], world: World, photos: Path, tmp_path: Path) -> None:
    assert wsss("label", photos, "--classes", "red, green, blue", "--bundle", world.bundle, "--out", "store").code == 0
    for to in FORMATS:
        answer = wsss("convert", "store", "--to", to, "--images", photos, "--out", to)
        assert (answer.code, answer.out) == (0, f"{to}: 5 images as {to}\n")
    lines = [json.loads(line) for line in (tmp_path / "hf/train/metadata.jsonl").read_text().splitlines()]
    boxes = {line["path"]: line["objects"]["category"] for line in lines}
    assert boxes["black.png"] == []
    assert boxes["sub/three.png"] == ["red", "green", "blue"]


def test_the_command_asks_for_what_is_missing(wsss: Callable[..., Answer]) -> None:
    answer = wsss("convert", "store")
    assert (answer.code, "Missing option '--to'. Choose from:" in answer.err) == (2, True)
    answer = wsss("convert", "store", "--to", "vox", "--images", "x", "--out", "y")
    assert (answer.code, "'--to'" in answer.err, "'vox' is not one of 'voc', 'coco'" in answer.err) == (2, True, True)
