"""A store of awkward images becomes each format, and each format's own readers give every mask back.

Readers that this environment lacks are skipped by name; ``make formats`` runs with all of them, in an environment of its own,
for two of them want an older numpy and Pillow.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from wsss.classes import class_list, palette
from wsss.errors import ImageError, StoreError, UsageError, WsssError
from wsss.extras import install_line
from wsss.photographs import read_photograph
from wsss.runtime.convert.dataset import FORMATS, Conversion, convert, is_rotated
from wsss.runtime.convert.labeled import Labeled, original_path, read_labelled
from wsss.runtime.run.listing import Folder
from wsss.store.local import LabelStore, read_label, read_records

if TYPE_CHECKING:
    from ..conftest import Answer, World

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools, by numpy 2
CLASSES = ("dog", "potted plant", 'a "q" & <b>')
TURNED = "turned.jpg"
NAMES = (
    "a b/my dog.jpg",
    "a b/sub/my dog.jpg",
    "case/Dog.jpg",
    "case/dog.jpg",
    "dog.jpg",
    "dog.png",
    "empty.jpg",
    "#list 100%.jpg",
    "line\nbreak.jpg",
    "one.png",
    "test/__x/näher 日本.webp",
    "quo\"te's.JPG",
    TURNED,
)
"""What tools trip over: folders, blanks, signs, equal stems, one pixel, a name that means a split elsewhere."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``photos`` and their ``store``; it must not be written to."""
    root = tmp_path_factory.mktemp("made")
    random = np.random.default_rng(3)
    for number, name in enumerate(NAMES):
        path = root / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (1, 1) if name == "one.png" else (30 + number, 47)
        exif = Image.Exif()
        if name == TURNED:
            exif[0x0112] = 6
        Image.fromarray(random.integers(0, 255, (*size, 3)).astype(np.uint8)).save(path, exif=exif)
    with LabelStore(root / "store", class_list(CLASSES), {}) as store:
        for found in Folder(root / "photos"):
            photo = read_photograph(root / "photos", found.name)
            label_map, boxes = (np.zeros(photo.shape, np.uint8), []) if found.name == "empty.jpg" else scene(photo.shape, random)
            store.write(
                {
                    "path": found.name,
                    "label": found.label,
                    "bytes": photo.size_bytes,
                    "mtime_ns": photo.mtime_ns,
                    "sha256": photo.sha256,
                    "height": photo.shape[0],
                    "width": photo.shape[1],
                    "classes": {},
                    "boxes": boxes,
                    "void_px": int((label_map == 255).sum()),
                    "seconds": {},
                },
                label_map,
            )
        store.write({"path": "z.jpg", "label": "z.png", "bytes": 0, "mtime_ns": 0, "sha256": "", "error": "z.jpg: broken"}, None)
    return root


def scene(shape: tuple[int, int], random: np.random.Generator) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """A ring with a spot in it, two objects of a class side by side, ragged regions without a box, and void."""
    label_map = np.zeros(shape, np.uint8)
    label_map[2:14, 3:20] = 1
    label_map[4:12, 6:18] = 0
    label_map[7:9, 9:12] = 1
    label_map[16:28, 4:40] = 2
    label_map[20:21, 10:30] = 255
    label_map[random.random(shape) < 0.03] = 3
    label_map[0, 0] = 3
    label_map[-1, -1] = 255 if label_map.size > 1 else 3
    common: dict[str, Any] = {"quality": 0.75, "area_px": 9, "won_px": 9}
    boxes = [
        {"label": "dog", "score": 0.9, "xyxy": [3.25, 2.0, 20.0, 14.0], **common},
        {"label": "potted plant", "score": 0.5, "xyxy": [4.0, 16.0, 22.5, 28.0], **common},
        {"label": "potted plant", "score": 0.25, "xyxy": [20.0, 16.0, 40.0, 28.0], **common},
        {"label": "dog", "score": 0.2, "xyxy": [30.0, 2.0, 44.0, 9.0], **common, "won_px": 0},
    ]
    return label_map, boxes if label_map.size > 1 else []


@pytest.fixture
def converted(made: Path, tmp_path: Path) -> Callable[..., Path]:
    def run(to: str, **flags: Any) -> Path:
        convert(made / "store", made / "photos", tmp_path / to, to, **flags)
        return tmp_path / to

    return run


def truth(made: Path) -> dict[str, np.ndarray]:
    """Label maps by the path of their photograph."""
    return {
        record["path"]: read_label(made / "store" / "labels" / record["label"])
        for record in read_records(made / "store")
        if "error" not in record
    }


def check_maps(found: dict[str, np.ndarray], made: Path, *, void: bool = True) -> None:
    """Every photograph has its own label map, pixel for pixel; ``void`` false: with background for void."""
    expected = truth(made)
    assert found.keys() == expected.keys()
    for path, label_map in expected.items():
        if not void:
            label_map = np.where(label_map == 255, 0, label_map)
        assert np.array_equal(found[path], label_map), path


def paint(shape: tuple[int, int], masks: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """Masks that must not overlap, as a label map."""
    label_map = np.zeros(shape, np.uint8)
    for label, mask in masks:
        assert not label_map[mask].any(), "a pixel in two objects"
        label_map[mask] = label
    return label_map


def photos_below(folder: Path) -> dict[str, Path]:
    """The photographs of a converted data set by their original path."""
    return {original_path(path.relative_to(folder).as_posix()): path for path in folder.rglob("*") if path.is_file()}


def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


# ---- what holds for all formats ----


@pytest.mark.parametrize("to", FORMATS)
def test_photographs_go_through_unchanged_and_their_names_come_back(to: str, made: Path, converted: Callable[..., Path]) -> None:
    need(to)
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
    need(to)
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


def need(to: str) -> None:
    if to == "coco":
        pytest.importorskip("pycocotools", reason="needs pycocotools")


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
    need(to)
    out = converted(to, val=0.4)
    expected = {item.path for item in read_labelled(made / "store", made / "photos", val=0.4) if item.split == "val"}
    assert 0 < len(expected) < len(NAMES)
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


@pytest.fixture
def losses(made: Path, tmp_path: Path) -> Callable[[str], Conversion]:
    return lambda to: convert(made / "store", made / "photos", tmp_path / to, to)


def test_losses_are_said_with_their_measure(made: Path, losses: Callable[[str], Conversion]) -> None:
    maps = truth(made).values()
    void = sum(int((each == 255).sum()) for each in maps)
    share = f"{void:,} void pixels ({void / sum(each.size for each in maps):.2%} of all)"
    turned = "1 images have an EXIF rotation; their labels fit only readers that apply it"
    done = losses("yolo")
    assert (done.images, done.left_out) == (len(NAMES), 1)
    assert done.losses[0] == f"{share} become background"
    assert done.losses[2:] == ("33 scores of objects cannot be written in YOLO labels", turned)
    assert losses("voc").losses == (
        "44 boxes and their scores cannot be written in VOC segmentation",
        "4 images do not end in .jpg, the only ending that torchvision's VOCSegmentation opens",
        turned,
    )
    assert losses("cvat").losses == ("33 scores of objects cannot be written in CVAT masks", turned)
    assert losses("label-studio").losses == losses("hf").losses == (turned,)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_every_exif_rotation_is_noticed(orientation: int, ending: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (4, 3)).save(tmp_path / f"a.{ending}", exif=exif)
    assert is_rotated(tmp_path / f"a.{ending}") == (orientation > 1)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The photographs and the store, to be harmed."""
    return Path(shutil.copytree(made, tmp_path / "copy", symlinks=True))


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
    assert answer.err.count("note: ") == 4
    assert answer.err.endswith(f"next: yolo segment train data={tmp_path}/yolo/data.yaml\n")
    result = json.loads(wsss(*argv, "--out", "again", "--json").out)
    assert (result["out"], result["format"], result["images"], result["left_out"], len(result["losses"])) == (
        "again",
        "yolo",
        13,
        1,
        4,
    )
    again = wsss(*argv, "--out", "again")
    assert (again.code, again.out) == (1, "")
    assert again.err == "wsss: --out again: exists already\n\nhint: give a new or empty folder\n"


def test_what_label_wrote_can_be_converted(wsss: Callable[..., Answer], world: World, photos: Path, tmp_path: Path) -> None:
    assert wsss("label", photos, "--classes", "red, green, blue", "--bundle", world.bundle, "--out", "store").code == 0
    for to in FORMATS:
        need(to)
        answer = wsss("convert", "store", "--to", to, "--images", photos, "--out", to)
        assert (answer.code, answer.out) == (0, f"{to}: 5 images as {to}\n")
    lines = [json.loads(line) for line in (tmp_path / "hf/train/metadata.jsonl").read_text().splitlines()]
    boxes = {line["path"]: line["objects"]["category"] for line in lines}
    assert boxes["black.png"] == []
    assert boxes["sub/three.png"] == ["red", "green", "blue"]


def test_the_command_asks_for_what_is_missing(wsss: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch, made: Path) -> None:
    answer = wsss("convert", "store")
    assert (answer.code, "Missing option '--to'. Choose from:" in answer.err) == (2, True)
    answer = wsss("convert", "store", "--to", "vox", "--images", "x", "--out", "y")
    assert (answer.code, "'--to'" in answer.err, "'vox' is not one of 'voc', 'coco'" in answer.err) == (2, True, True)
    monkeypatch.delitem(__import__("sys").modules, "wsss.runtime.convert.coco", raising=False)
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    answer = wsss("convert", made / "store", "--to", "coco", "--images", made / "photos", "--out", "y")
    assert answer.code == 1
    assert "needs pycocotools, which is not installed" in answer.err
    assert f"hint: {install_line('formats')}" in answer.err


# ---- VOC ----


def test_voc_as_files(made: Path, converted: Callable[..., Path]) -> None:
    out = converted("voc")
    found = {}
    for name, path in photos_below(out / "JPEGImages").items():
        with Image.open(out / "SegmentationClass" / f"{path.stem}.png") as label:
            assert label.mode == "P"
            assert np.array_equal(np.array(label.getpalette()).reshape(-1, 3), palette())
            found[name] = np.array(label)
    check_maps(found, made)
    lines = (out / "ImageSets/Segmentation/train.txt").read_text().split()
    assert sorted(lines) == sorted(path.stem for path in (out / "JPEGImages").iterdir())


def test_voc_read_by_torchvision(made: Path, converted: Callable[..., Path], tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets", reason="needs torchvision")
    (tmp_path / "VOCdevkit").mkdir()
    (tmp_path / "VOCdevkit/VOC2012").symlink_to(converted("voc"))
    data = datasets.VOCSegmentation(str(tmp_path), image_set="train")
    found = {original_path(Path(image).name): number for number, image in enumerate(data.images)}
    for name in ("a b/my dog.jpg", "case/Dog.jpg", "line\nbreak.jpg", "empty.jpg"):
        photo, label = data[found[name]]
        assert np.array_equal(np.array(label), truth(made)[name])
        assert np.array_equal(np.array(photo), read_photograph(made / "photos", name).pixels)


@pytest.mark.parametrize("to", ["voc", "cvat"])
def test_voc_and_cvat_read_by_datumaro(to: str, made: Path, converted: Callable[..., Path]) -> None:
    """CVAT imports its "segmentation mask 1.1" with datumaro's VOC importer."""
    dataset = pytest.importorskip("datumaro", reason="needs datumaro")
    out = converted(to)
    data = dataset.Dataset.import_from(str(out), "voc_instance_segmentation" if to == "cvat" else "voc_segmentation")
    names = [label.name for label in data.categories()[dataset.AnnotationType.label]]
    assert names == ["background", *CLASSES, "void"]
    value = {number: 255 if name == "void" else number for number, name in enumerate(names)}
    found, objects = {}, {}
    for item in data:
        masks = [(each.label, each.image.astype(bool)) for each in item.annotations if each.label]
        name = original_path(item.id + Path(item.media.path).suffix)
        found[name] = paint(truth(made)[name].shape, [(value[label], mask) for label, mask in masks])
        objects[name] = sum(value[label] == 2 for label, _ in masks)
        assert item.media.data.shape[:2] == found[name].shape[:: -1 if name == TURNED else 1]
    check_maps(found, made)
    assert objects["dog.jpg"] == (2 if to == "cvat" else 1), "two boxes are two objects"


def test_cvat_as_files(made: Path, converted: Callable[..., Path]) -> None:
    out = converted("cvat")
    lines = [line.split(":") for line in (out / "labelmap.txt").read_text().splitlines()[1:]]
    assert [line[0] for line in lines] == ["background", *CLASSES, "void"]
    assert all(len(line) == 4 for line in lines)
    assert len({line[1] for line in lines}) == len(lines)
    assert lines[-1][1] == "224,224,192"
    names = (out / "ImageSets/Segmentation/default.txt").read_text().splitlines()
    assert "a b/sub/my dog" in names, "CVAT finds its images by their paths"
    found = {}
    for name, path in photos_below(out / "JPEGImages").items():
        stem = path.relative_to(out / "JPEGImages").with_suffix("").as_posix()
        assert stem in names
        found[name] = read_label(out / "SegmentationClass" / f"{stem}.png")
        objects = read_label(out / "SegmentationObject" / f"{stem}.png")
        assert np.array_equal(objects == 0, found[name] == 0)
        assert np.array_equal(objects == 255, found[name] == 255)
        pairs = {(int(number), int(label)) for number, label in zip(objects.flat, found[name].flat, strict=True)}
        assert len(pairs) == len({number for number, _ in pairs}), "an object is of one class"
    check_maps(found, made)


def test_cvat_with_more_objects_than_an_image_can_number() -> None:
    from wsss.runtime.convert.instances import instances_of
    from wsss.runtime.convert.labeled import Labeled, count_labels
    from wsss.runtime.convert.voc import _numbered

    label_map = np.zeros((60, 60), np.uint8)
    label_map[::4, ::4] = 1
    label_map[2::4, ::4] = 2
    label_map[:, 1::8] = label_map[:, ::8]
    label_map[2, 0:3] = 2
    item = Labeled(
        path="a.jpg",
        label="a.png",
        file=Path(),
        size_bytes=0,
        sha256="",
        label_map=label_map,
        count=count_labels(label_map),
        boxes=(),
        split="train",
    )
    instances = instances_of(item)
    assert len(instances.objects) == 450
    numbers, shared = _numbered(instances, label_map)
    assert shared == 450 - 252
    assert np.unique(numbers).tolist() == list(range(255))
    for label in (1, 2):
        assert not set(numbers[label_map == label]) & set(numbers[label_map != label])
    assert (numbers == numbers[2, 0]).sum() == 3, "a large one keeps its own number"


def test_void_has_a_name_of_its_own() -> None:
    from wsss.runtime.convert.labeled import void_name

    assert void_name(("dog",)) == "void"
    assert void_name(("Void", "void_")) == "void__"


def test_a_class_that_labelmap_cannot_hold(made: Path, tmp_path: Path) -> None:
    from wsss.errors import ClassError
    from wsss.runtime.convert.voc import write_label_map

    with pytest.raises(ClassError, match="would be a comment"):
        write_label_map(tmp_path / "labelmap.txt", ("#1 dog",))


# ---- COCO ----


@pytest.fixture
def coco(converted: Callable[..., Path]) -> Path:
    pytest.importorskip("pycocotools", reason="needs pycocotools")
    return converted("coco")


def test_coco_read_by_pycocotools(made: Path, coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pycocotools.coco import COCO

    data = COCO(str(coco / "annotations/instances_train.json"))
    assert [(each["id"], each["name"]) for each in data.loadCats(data.getCatIds())] == list(enumerate(CLASSES, 1))
    found, scores = {}, {}
    for image in data.loadImgs(data.getImgIds()):
        objects = data.loadAnns(data.getAnnIds(imgIds=image["id"]))
        for each in objects:
            mask = data.annToMask(each).astype(bool)
            y, x = np.nonzero(mask)
            assert each["area"] == mask.sum()
            assert each["bbox"] == [x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()]
        name = original_path(image["file_name"])
        masks = [(each["category_id"], data.annToMask(each).astype(bool)) for each in objects]
        found[name] = paint((image["height"], image["width"]), masks)
        scores[name] = [(each["category_id"], each.get("score"), each.get("quality")) for each in objects]
    check_maps(found, made, void=False)
    assert scores["dog.jpg"][:3] == [(1, 0.9, 0.75), (2, 0.5, 0.75), (2, 0.25, 0.75)]
    assert scores["dog.jpg"][3] == (3, None, None)
    # It takes what it wrote for results too: every object is found at full precision.
    from pycocotools.cocoeval import COCOeval

    results = [{**each, "score": each.get("score", 0.1)} for each in data.loadAnns(data.getAnnIds())]
    measured = COCOeval(data, data.loadRes(results), "segm")
    measured.params.maxDets = [1, 10, 1000]
    measured.evaluate()
    assert all(match.any(axis=0).all() for each in measured.evalImgs if each for match in [each["dtMatches"] > 0])


def test_coco_rle_is_that_of_pycocotools() -> None:
    coco_mask = pytest.importorskip("pycocotools.mask", reason="needs pycocotools")
    from wsss.runtime.convert.coco import compressed_rle

    random = np.random.default_rng(0)
    for top, left, shape in ((0, 0, (1, 1)), (2, 3, (7, 5)), (0, 0, (12, 9)), (4, 1, (8, 8))):
        whole = np.zeros((12, 9), bool)
        crop = random.random(shape) < 0.6
        crop[0, 0] = crop[-1, -1] = True
        whole[top : top + shape[0], left : left + shape[1]] = crop
        expected = coco_mask.encode(np.asfortranarray(whole, np.uint8))
        assert compressed_rle(crop, top, left, (12, 9)) == {"size": [12, 9], "counts": expected["counts"].decode()}


def test_coco_panoptic_is_the_label_map(made: Path, coco: Path) -> None:
    document = json.loads((coco / "annotations/panoptic_train.json").read_text())
    label_of = {each["id"]: each["id"] if each["isthing"] else 0 for each in document["categories"]}
    names = {image["id"]: original_path(image["file_name"]) for image in document["images"]}
    found = {}
    for each in document["annotations"]:
        colors = np.array(Image.open(coco / "annotations/panoptic_train" / each["file_name"])).astype(int)
        ids = colors[..., 0] + 256 * colors[..., 1] + 256**2 * colors[..., 2]
        label_map = np.full(ids.shape, 255, np.uint8)
        for segment in each["segments_info"]:
            mask = ids == segment["id"]
            y, x = np.nonzero(mask)
            assert segment["area"] == mask.sum() > 0
            assert segment["bbox"] == [x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()]
            label_map[mask] = label_of[segment["category_id"]]
        assert set(np.unique(ids)) - {0} == {segment["id"] for segment in each["segments_info"]}
        found[names[each["image_id"]]] = label_map
    check_maps(found, made)


@pytest.mark.parametrize("task", ["coco_instances", "coco_panoptic"])
def test_coco_read_by_datumaro(task: str, made: Path, coco: Path) -> None:
    dataset = pytest.importorskip("datumaro", reason="needs datumaro")
    data = dataset.Dataset.import_from(str(coco), task)
    names = [label.name for label in data.categories()[dataset.AnnotationType.label]]
    background = len(CLASSES)
    assert names == [*CLASSES, "background"][: len(names)]
    found = {}
    for item in data:
        name = original_path(item.id + Path(item.media.path).suffix)
        shape = truth(made)[name].shape
        label_map = np.zeros(shape, np.uint8) if task == "coco_instances" else np.full(shape, 255, np.uint8)
        for each in (each for each in item.annotations if each.type is not dataset.AnnotationType.bbox):
            label_map[each.image.astype(bool)] = 0 if each.label == background else each.label + 1
        if task == "coco_instances" and name == "dog.jpg":
            assert {each.attributes.get("score") for each in item.annotations} == {0.9, 0.5, 0.25, None}
        found[name] = label_map
        assert item.media.data.shape[:2] == shape[:: -1 if name == TURNED else 1]
    check_maps(found, made, void=task == "coco_panoptic")


def test_coco_read_by_supervision(made: Path, coco: Path) -> None:
    reader = pytest.importorskip("supervision", minversion="0.25", reason="needs supervision>=0.25")
    data = reader.DetectionDataset.from_coco(
        images_directory_path=str(coco / "images/train"),
        annotations_path=str(coco / "annotations/instances_train.json"),
        force_masks=True,
    )
    assert data.classes == list(CLASSES)
    found = {}
    for path, _, objects in data:
        name = original_path(Path(path).relative_to(coco / "images/train").as_posix())
        masks = (
            []
            if objects.mask is None
            else [(label + 1, mask) for label, mask in zip(objects.class_id, objects.mask, strict=True)]
        )
        found[name] = paint(truth(made)[name].shape, masks)
    check_maps(found, made, void=False)


# ---- YOLO ----


def test_yolo_corners_are_the_same_pixel_whether_cut_or_rounded(made: Path, converted: Callable[..., Path]) -> None:
    out = converted("yolo")
    for name, path in photos_below(out / "images/train").items():
        height, width = truth(made)[name].shape
        for line in (out / "labels/train" / f"{path.stem}.txt").read_text().splitlines():
            label, *shares = line.split()
            assert label in ("0", "1", "2")
            assert len(shares) >= 6
            corners = np.array(shares, np.float32).reshape(-1, 2) * np.array([width, height], np.float32)
            assert np.array_equal(np.trunc(corners), np.round(corners))
            x, y = np.trunc(corners).astype(int).T
            assert (truth(made)[name][y, x] == int(label) + 1).all()


def test_yolo_read_as_ultralytics_does(made: Path, converted: Callable[..., Path]) -> None:
    """ultralytics (AGPL, not installed): shares times the size, cut to whole pixels, cv2.fillPoly."""
    cv2 = pytest.importorskip("cv2", reason="needs opencv-python-headless")
    out = converted("yolo")
    found = {}
    for name, path in photos_below(out / "images/train").items():
        height, width = truth(made)[name].shape
        found[name] = np.zeros((height, width), np.uint8)
        for line in (out / "labels/train" / f"{path.stem}.txt").read_text().splitlines():
            label, *shares = line.split()
            corners = np.array(shares, np.float32).reshape(-1, 2)
            assert len(corners) >= 3
            assert corners.min() >= 0
            assert corners.max() <= 1
            mask = np.zeros((height, width), np.uint8)
            cv2.fillPoly(mask, [(corners * (width, height)).astype(np.int32)], 1)
            found[name][mask > 0] = int(label) + 1
    check_maps(found, made, void=False)


def test_yolo_read_by_supervision(made: Path, converted: Callable[..., Path]) -> None:
    reader = pytest.importorskip("supervision", minversion="0.25", reason="needs supervision>=0.25")
    out = converted("yolo")
    data = reader.DetectionDataset.from_yolo(
        images_directory_path=str(out / "images/train"),
        annotations_directory_path=str(out / "labels/train"),
        data_yaml_path=str(out / "data.yaml"),
        force_masks=True,
    )
    assert data.classes == list(CLASSES)
    found = {}
    for path, _, objects in data:
        name = original_path(Path(path).name)
        masks = (
            []
            if objects.mask is None
            else [(label + 1, mask) for label, mask in zip(objects.class_id, objects.mask, strict=True)]
        )
        found[name] = paint(truth(made)[name].shape, masks)
    check_maps(found, made, void=False)


# ---- Label Studio ----


def test_label_studio_read_by_its_sdk(made: Path, converted: Callable[..., Path]) -> None:
    brush = pytest.importorskip("label_studio_sdk.converter.brush", reason="needs label-studio-sdk")
    from label_studio_sdk.label_interface import LabelInterface

    out = converted("label-studio")
    interface = LabelInterface((out / "config.xml").read_text())
    found = {}
    for task in json.loads((out / "tasks.json").read_text()):
        assert interface.validate_task({"data": task["data"]})
        name = name_of(task)
        prediction = task["predictions"][0]
        if prediction["result"]:
            assert interface.validate_prediction(prediction)
        results = [{**each, **each["value"]} for each in prediction["result"]]
        layers = brush.decode_from_annotation("label", results)
        masks = [(value_of(layer.removeprefix("label-").rpartition("-")[0]), mask > 0) for layer, mask in layers.items()]
        found[name] = paint(truth(made)[name].shape, masks)
    check_maps(found, made)


def test_label_studio_read_by_the_rules_of_rle_pack(made: Path, converted: Callable[..., Path]) -> None:
    out = converted("label-studio")
    labels = [each.attrib["value"] for each in ElementTree.parse(out / "config.xml").iter("Label")]
    assert labels == [*CLASSES, "void"]
    found, ids = {}, []
    for task in json.loads((out / "tasks.json").read_text()):
        name, masks = name_of(task), []
        for each in task["predictions"][0]["result"]:
            ids.append(each["id"])
            shape = each["original_height"], each["original_width"]
            pixels = unpacked(each["value"]["rle"]).reshape(*shape, 4)
            assert set(np.unique(pixels)) <= {0, 255}
            masks.append((value_of(each["value"]["brushlabels"][0]), pixels[..., 3] > 0))
        found[name] = paint(truth(made)[name].shape, masks)
        if name == "dog.jpg":
            assert task["predictions"][0]["score"] == 0.25
            assert [each.get("score") for each in task["predictions"][0]["result"]][:3] == [0.9, 0.5, 0.25]
    check_maps(found, made)
    assert len(ids) == len(set(ids))


def test_brush_rle_of_long_runs() -> None:
    from wsss.runtime.convert.instances import spans_of
    from wsss.runtime.convert.label_studio import brush_rle

    mask = np.zeros((300, 250), bool)
    mask[100:] = True  # runs of 100,000 and 200,000 values, the code's longest has 65,536
    assert np.array_equal(unpacked(brush_rle(spans_of(mask), mask.size)), np.repeat(mask.ravel(), 4) * np.uint8(255))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (300, 400)])
def test_brush_rle_is_the_sdks(shape: tuple[int, int]) -> None:
    brush = pytest.importorskip("label_studio_sdk.converter.brush", reason="needs label-studio-sdk")
    from wsss.runtime.convert.instances import spans_of
    from wsss.runtime.convert.label_studio import brush_rle

    random = np.random.default_rng(0)
    for mask in (np.zeros(shape, bool), np.ones(shape, bool), random.random(shape) < 0.1):
        assert brush_rle(spans_of(mask), mask.size) == brush.mask2rle(mask.astype(np.uint8) * 255)


def name_of(task: dict[str, Any]) -> str:
    from urllib.parse import unquote

    return original_path(unquote(task["data"]["image"]).removeprefix("/data/local-files/?d=images/"))


def value_of(name: str) -> int:
    return 255 if name == "void" else CLASSES.index(name) + 1


def unpacked(rle: list[int]) -> np.ndarray:
    """thi.ng's rle-pack, decoded from its description."""
    bits = "".join(f"{byte:08b}" for byte in rle)
    place = 0

    def read(count: int) -> int:
        nonlocal place
        place += count
        return int(bits[place - count : place], 2)

    values = np.zeros(read(32), np.uint8)
    word = read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    done = 0
    while done < len(values):
        run, length = read(1), 0
        length = read(sizes[read(2)]) + 1
        if run:
            values[done : done + length] = read(word)
        else:
            values[done : done + length] = [read(word) for _ in range(length)]
        done += length
    return values


# ---- Hugging Face ----


@pytest.mark.parametrize("val", [0.0, 0.4])
def test_hf_read_by_datasets(
    val: float, made: Path, converted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet(monkeypatch)
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    out = converted("hf", val=val)
    found, boxes = {}, {}
    data = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert set(data) == ({"train", "val"} if val else {"train"}), "the folder called test is no split"
    for split in data.values():
        assert split.column_names == ["image", "mask", "path", "objects"]
        for row in split:
            assert row["mask"].mode == "P"
            found[row["path"]] = np.array(row["mask"])
            assert np.array_equal(np.array(row["image"].convert("RGB")), read_photograph(made / "photos", row["path"]).pixels)
            boxes[row["path"]] = row["objects"]
    check_maps(found, made)
    assert boxes["dog.jpg"]["score"] == [0.9, 0.5, 0.25, 0.2]
    assert boxes["dog.jpg"]["category"] == ["dog", "potted plant", "potted plant", "dog"]
    assert boxes["dog.jpg"]["bbox"][0] == [3.25, 2.0, 16.75, 12.0]


def test_hf_as_files(made: Path, converted: Callable[..., Path]) -> None:
    out = converted("hf")
    lines = [json.loads(line) for line in (out / "train/metadata.jsonl").read_text().splitlines()]
    check_maps({line["path"]: read_label(out / "train" / line["mask_file_name"]) for line in lines}, made)
    for line in lines:
        assert (out / "train" / line["file_name"]).read_bytes() == (made / "photos" / line["path"]).read_bytes()
    names = json.loads((out / "classes.json").read_text())
    assert names == {"0": "background", "1": "dog", "2": "potted plant", "3": 'a "q" & <b>', "255": "void"}
