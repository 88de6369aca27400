"""Damaged files of every kind: the product reads them cleanly or refuses them with a WsssError, and nothing else.

Each number of a kind always gives the same damaged file. A failure names its number and keeps the file:

    pytest tests/test_hostile_files.py -k voc_xml --mutation 17
    pytest tests/test_hostile_files.py --mutations 800        # of each kind; 12 is the default
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsss.batch import Boxes, Images, Labels
from wsss.classes import class_list, parse_classes
from wsss.cli.main import main
from wsss.engines.opening import open_graph
from wsss.errors import BundleError, WsssError
from wsss.photographs import count_pixels, decode, read_file
from wsss.runtime.bundles import MINI
from wsss.runtime.chain import Chain
from wsss.runtime.convert.dataset import convert
from wsss.runtime.report.page import write_report
from wsss.runtime.run.label_folder import label_folder, printable
from wsss.runtime.run.sources import source_of
from wsss.spec import Model, open_bundle, sha256_of
from wsss.store.local import read_label

from .conftest import COLORS, SCRIPTS, SETTINGS, World, write_model
from .mutations import Mutate, damaged, json_changed, tokens_changed

SECONDS = 20
"""A test that takes longer is considered to hang."""
SLOW = 60
"""A call of a library that cannot be interrupted ends the process after this many seconds, with every thread's stack."""
CLASSES = class_list(COLORS)

Files = Mapping[str, tuple[bytes, Mutate]]
"""Undamaged files by their path below a case's folder, and what damages them; each is damaged in turn."""


@dataclass
class Case:
    """A folder with one damaged file, and the other files of its kind."""

    folder: Path
    name: str
    """Of the damaged file, below the folder."""
    number: int
    original: bytes

    @property
    def file(self) -> Path:
        return self.folder / self.name


Use = Callable[[Case], None]


@dataclass(frozen=True)
class Kind:
    use: Use
    files: Callable[[Path], Files]
    beside: Callable[[Path], None] | None
    """Makes what lies beside the file, once for all cases."""
    again: bool
    """What lies beside is changed by the use: each case gets its own copy."""
    share: float
    """Of the mutations asked for: slow kinds get fewer."""
    real_engines: bool
    refused: tuple[str, ...]
    """Files that are refused undamaged too: they lead to something that is not there."""


KINDS: dict[str, Kind] = {}


def kind(
    files: Callable[[Path], Files],
    *,
    beside: Callable[[Path], None] | None = None,
    again: bool = False,
    share: float = 1.0,
    real_engines: bool = False,
    refused: tuple[str, ...] = (),
) -> Callable[[Use], Use]:
    def register(use: Use) -> Use:
        KINDS[use.__name__] = Kind(use, files, beside, again, share, real_engines, refused)
        return use

    return register


# ---- images ----


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def images(_: Path) -> Files:
    scene = Image.fromarray(World.scene(24, 32, red=(2, 3, 14, 20), blue=(16, 4, 30, 22)))
    wide = Image.fromarray(np.arange(24 * 32, dtype=np.uint16).reshape(24, 32) * 80)
    turned = Image.Exif()
    turned[0x0112] = 6
    made = {
        "rgb.jpg": encoded(scene, "JPEG", exif=turned),
        "gray.jpg": encoded(scene.convert("L"), "JPEG", progressive=True),
        "cmyk.jpg": encoded(scene.convert("CMYK"), "JPEG"),
        "rgb.png": encoded(scene, "PNG"),
        "palette.png": encoded(scene.convert("P"), "PNG", transparency=0),
        "wide.png": encoded(wide, "PNG"),
        "clear.png": encoded(scene.convert("RGBA"), "PNG", exif=turned),
        "bits.png": encoded(scene.convert("1"), "PNG"),
        "lossy.webp": encoded(scene, "WEBP"),
        "moving.webp": encoded(scene, "WEBP", save_all=True, append_images=[scene.rotate(90)], lossless=True),
        "plain.bmp": encoded(scene, "BMP"),
        "palette.bmp": encoded(scene.convert("P"), "BMP"),
        "raw.tif": encoded(scene, "TIFF"),
        "lzw.tif": encoded(scene, "TIFF", compression="tiff_lzw"),
        "deflate.tif": encoded(wide, "TIFF", compression="tiff_adobe_deflate"),
        "jpeg.tif": encoded(scene, "TIFF", compression="jpeg"),
        "pages.tif": encoded(scene, "TIFF", save_all=True, append_images=[scene], compression="packbits"),
    }
    return {name: (data, damaged) for name, data in made.items()}


@kind(images)
def photograph(case: Case) -> None:
    file = read_file(case.folder, case.name)
    assert count_pixels(file) >= 0
    small = case.number % 4 == 0
    pixels = decode(file, shorter_side_px=8 if small else None).pixels
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size


def label_maps(_: Path) -> Files:
    label = (np.arange(24 * 32).reshape(24, 32) // 200).astype(np.uint8)
    palette = Image.fromarray(label)
    palette.putpalette(bytes(range(256)) * 3)
    made = {"palette.png": palette, "gray.png": Image.fromarray(label), "wide.png": Image.fromarray(label.astype(np.uint16))}
    files = {name: (encoded(image, "PNG"), damaged) for name, image in made.items()}
    return {**files, "four.png": (encoded(palette, "PNG", bits=4), damaged)}


@kind(label_maps)
def label_map(case: Case) -> None:
    from wsss.train.evaluate.files import read_label_map

    read = read_label if case.number % 3 == 1 and not case.name.startswith("wide") else read_label_map
    label = read(case.file)
    assert label.dtype == np.uint8 and label.ndim == 2 and label.size


# ---- what is given in place of a stage ----

OWN = {"scene.png": [{"label": "red", "xyxy": [2, 3, 30, 20], "score": 0.9}, {"label": "blue", "xyxy": [5.5, 6, 40, 39]}]}
COCO: dict[str, Any] = {
    "images": [{"id": 1, "file_name": "scene.png", "width": 60, "height": 40}],
    "annotations": [{"id": 7, "image_id": 1, "category_id": 3, "bbox": [2, 3, 28, 17], "area": 476, "iscrowd": 0}],
    "categories": [{"id": 3, "name": "red", "supercategory": "color"}, {"id": 4, "name": "blue"}],
}
LINE = {"path": "scene.png", "label": "scene.png", "height": 40, "width": 60, "boxes": OWN["scene.png"]}
XML = """<annotation>
  <folder>photos</folder><filename>scene.png</filename>
  <size><width>60</width><height>40</height><depth>3</depth></size>
  <object><name>red</name><difficult>0</difficult>
    <bndbox><xmin>3</xmin><ymin>4</ymin><xmax>30</xmax><ymax>20</ymax></bndbox></object>
  <object><name>blue</name><bndbox><xmin>6.5</xmin><ymin>7</ymin><xmax>40</xmax><ymax>39</ymax></bndbox></object>
</annotation>
"""


def text_of(value: object) -> bytes:
    return json.dumps(value, indent=1).encode()


SHAPE = 40, 60
SCENE = World.scene(*SHAPE, red=(2, 3, 30, 20), blue=(6, 21, 40, 39))


def photo_and_bundle(folder: Path) -> None:
    write_bundle(folder / "bundle")
    Image.fromarray(SCENE).save(folder / "scene.png")


def label_given(case: Case, path: Path, *, boxes: bool) -> None:
    """Labels the photograph with what is given, and looks at the boxes."""
    given = {"boxes" if boxes else "labels": path}
    labeler = Chain.open(case.folder / "bundle", classes=CLASSES, engine="ort", device="cpu", **given)
    detect = labeler.detect

    class Checked:
        stage = detect.stage

        def __call__(self, images: Images, labels: Labels) -> Boxes:
            boxes = detect(images, labels)
            height, width = SHAPE
            x0, y0, x1, y1 = boxes.xyxy_image.T
            assert ((x0 >= 0) & (x0 < x1) & (x1 <= width) & (y0 >= 0) & (y0 < y1) & (y1 <= height)).all(), boxes.xyxy_image
            assert ((boxes.score >= 0) & (boxes.score <= 1)).all(), boxes.score
            assert np.isin(boxes.label, (1, 2, 3)).all(), boxes.label
            return boxes

    labeler.detect = Checked()  # type: ignore[assignment]
    result = labeler.label(case.folder / "scene.png")
    assert result.label_maps[0].shape == SHAPE
    assert set(np.unique(result.label_maps[0])) <= {0, 1, 2, 3, 255}


@kind(lambda _: {"xml/scene.xml": (XML.encode(), tokens_changed)}, beside=photo_and_bundle)
def voc_xml(case: Case) -> None:
    label_given(case, case.folder / "xml", boxes=True)


@kind(lambda _: {"boxes.json": (text_of(OWN), json_changed)}, beside=photo_and_bundle)
def boxes_json(case: Case) -> None:
    label_given(case, case.file, boxes=True)


LINES = "".join(json.dumps({**LINE, "path": path}) + "\n" for path in ("a.png", "scene.png"))


@kind(lambda _: {"manifest.jsonl": (LINES.encode(), json_changed)}, beside=photo_and_bundle)
def boxes_of_a_store(case: Case) -> None:
    label_given(case, case.file, boxes=True)


@kind(lambda _: {"instances.json": (text_of(COCO), json_changed)}, beside=photo_and_bundle)
def coco_json(case: Case) -> None:
    label_given(case, case.file, boxes=True)


def yolo_files(_: Path) -> Files:
    data = b"path: .\ntrain: images\nnc: 3\nnames:\n  0: red\n  1: green\n  2: blue\n"
    boxes = b"0 0.25 0.3 0.4 0.5\n2 0.5 0.5 0.5 0.9\n"
    return {
        "yolo/scene.txt": (boxes, tokens_changed),
        "yolo/classes.txt": (b"red\ngreen\nblue\n", tokens_changed),
        "yolo/data.yaml": (data, tokens_changed),
    }


@kind(yolo_files, beside=photo_and_bundle)
def yolo_txt(case: Case) -> None:
    label_given(case, case.folder / "yolo", boxes=True)


@kind(lambda _: {"labels.json": (text_of({"scene.png": ["red", "blue"], "b.png": []}), json_changed)}, beside=photo_and_bundle)
def labels_json(case: Case) -> None:
    label_given(case, case.file, boxes=False)


# ---- class lists and settings ----


def class_files(_: Path) -> Files:
    plain = b"dog\ncat\nperson: people, human  # wordings\npotted plant\n!statue\n"
    pbtxt = b"item {\n  id: 1\n  name: 'dog'\n}\nitem {\n  id: 2\n  name: 'cat'\n  display_name: 'house cat'\n}\n"
    asked = {"dog": {"prompts": ["dog", "puppy"], "phrases": ["dog"]}, "cat": None, "negatives": ["statue"]}
    return {
        "classes.txt": (plain, tokens_changed),
        "coco.names": (b"dog\ncat\npotted plant\n", tokens_changed),
        "list.json": (text_of(["dog", "cat", "potted plant"]), json_changed),
        "classes.json": (text_of(asked), json_changed),
        "categories.json": (text_of({"categories": [{"id": 1, "name": "dog"}, {"id": 3, "name": "cat"}]}), json_changed),
        "data.yaml": (b"path: ../data\ntrain: images\nnc: 2\nnames:\n  0: dog\n  1: cat\n", tokens_changed),
        "names.yml": (b"names: [dog, 'potted plant']\nnc: 2\n", tokens_changed),
        "classes.toml": (b'classes = ["dog", "cat"]\n', tokens_changed),
        "labelmap.pbtxt": (pbtxt, tokens_changed),
        "labelmap.txt": (b"# label:color_rgb:parts:actions\nbackground:0,0,0::\ndog:128,0,0::\ncat:0,128,0::\n", tokens_changed),
        "labels.csv": (b"id,name\n1,dog\n2,cat\n", tokens_changed),
    }


@kind(class_files)
def classes_file(case: Case) -> None:
    found = parse_classes(str(case.file))
    assert 1 <= len(found) == len(found.prompts) == len(found.phrases) <= 4096
    for name in (*found.names, *found.negatives):
        assert name == name.strip() != "" and name.isprintable(), name


DEFAULTS = b"""[label]
images = "nowhere"
classes = ["dog", "cat"]
out = "store"
batch = 4
gate = false
nms = 0.4
shard = "0/2"

[eval]
PRED = "nowhere"
classes = "voc"
workers = 2

[convert]
images = "nowhere"
val = 0.1
link = true

[report]
limit = 10
thumbnail-px = 100

[export]
weights = ["clip=random:0"]
sizes = ["32x48"]
"""


def run_command(folder: Path, *argv: str) -> None:
    """The command line in this process: it ends well, or with 1 or 2 and a message. SystemExit with a message is a WsssError."""
    before, arguments = Path.cwd(), sys.argv
    out, err = io.StringIO(), io.StringIO()
    os.chdir(folder)
    sys.argv = ["wsss", *argv]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        if stop.code:
            assert stop.code in (1, 2), stop.code
            assert err.getvalue().strip()
            raise WsssError(err.getvalue()) from None
    finally:
        os.chdir(before)
        sys.argv = arguments


@kind(lambda _: {"wsss.toml": (DEFAULTS, tokens_changed)}, share=0.5, refused=("wsss.toml",))
def defaults_toml(case: Case) -> None:
    command = ("label", "eval", "convert", "report", "export")[case.number % 5]
    run_command(case.folder, command)


SETTINGS_TOML = b"""seed = 3
validation_steps = 4

[model]
architecture = "unet"
encoder = "mobilenet_v2"
options = { encoder_depth = 3, decoder_channels = [16, 8, 8] }

[data]
crop = 32
batch = 4
validation_share = 0.25
scale = [0.5, 2.0]
jitter = [0.1, 0.1, 0.1, 0.05]

[optimizer]
steps = 60
rate = 0.01

[machine]
workers = 0
device = "cpu"
"""


@kind(lambda _: {"train.toml": (SETTINGS_TOML, tokens_changed)})
def train_toml(case: Case) -> None:
    from wsss.train.args import config_from, deciding, read_config
    from wsss.train.presets import preset

    json.dumps(deciding(config_from(preset("mini"), read_config(case.file))), allow_nan=False)


# ---- bundles ----


def write_bundle(folder: Path) -> None:
    for name in SETTINGS:
        write_model(folder / name, name)


def manifests(folder: Path) -> Files:
    write_bundle(folder)
    return {f"{name}/manifest.json": ((folder / name / "manifest.json").read_bytes(), json_changed) for name in SETTINGS}


class ScriptedEngine:
    """A scripted engine whose failures count as refusals, since only the runtime's use of a manifest is tested."""

    def __init__(self, model: Model, graph: str) -> None:
        from wsss.engines.fake import FakeEngine

        with self.refusing():
            self._engine = FakeEngine(model.graph(graph), SCRIPTS[model.manifest.family, graph][0])
        self.inputs, self.outputs, self.axes = self._engine.inputs, self._engine.outputs, self._engine.axes

    def __call__(self, feeds: Any) -> Any:
        with self.refusing():
            return self._engine(feeds)

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        try:
            yield
        except WsssError:
            raise
        except Exception as error:
            raise BundleError(f"the engine cannot do it: {error}") from None


def open_scripted(model: Model, graph: str, engine: str = "ort", **_: object) -> ScriptedEngine:
    return ScriptedEngine(model, graph)


def label_one(bundle: Path) -> None:
    labeler = Chain.open(bundle, classes=CLASSES, engine="ort", device="cpu")
    result = labeler.label(World.scene(40, 60, red=(2, 3, 30, 20), blue=(34, 4, 58, 38)))
    assert result.label_maps[0].shape == (40, 60)
    json.dumps(labeler.settings, allow_nan=False)


@kind(manifests, beside=write_bundle, share=0.5)
def bundle_manifest(case: Case) -> None:
    label_one(case.folder)


def mini_manifests(_: Path) -> Files:
    return {f"{name}/manifest.json": ((MINI / name / "manifest.json").read_bytes(), json_changed) for name in SETTINGS}


def copy_mini(folder: Path) -> None:
    shutil.copytree(MINI, folder, dirs_exist_ok=True)


@kind(mini_manifests, beside=copy_mini, share=0.1, real_engines=True)
def bundle_manifest_of_real_graphs(case: Case) -> None:
    labeler = Chain.open(case.folder, classes="mini", engine="ort", device="cpu")
    assert labeler.label(World.scene(40, 60, red=(2, 3, 30, 20))).label_maps[0].shape == (40, 60)


def bundle_files(folder: Path) -> Files:
    write_bundle(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(folder)): (path.read_bytes(), damaged) for path in files}


@kind(bundle_files, beside=write_bundle)
def bundle_weights(case: Case) -> None:
    open_bundle(case.folder).model(case.file.parent.name)
    assert case.file.read_bytes() == case.original, "damaged weights were accepted"


# ---- label stores ----


def write_store(folder: Path) -> None:
    """A store of three photographs that scripted engines labeled, one of them unreadable; a file that nothing may touch."""
    write_bundle(folder / "bundle")
    for name, colors in {
        "a.png": {"red": (4, 4, 20, 20)},
        "sub/b.png": {"blue": (0, 0, 40, 10), "green": (4, 12, 30, 28)},
    }.items():
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(World.scene(32, 48, **colors)).save(folder / "photos" / name)
    (folder / "photos" / "broken.jpg").write_bytes(b"no")
    labeler = Chain.open(folder / "bundle", classes=CLASSES)
    label_folder(labeler, folder / "photos", folder / "store", warn=lambda message: None)
    (folder / "truth" / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        shutil.copy(folder / "store" / "labels" / name, folder / "truth" / name)
    for victim in ("victim.txt", "store/victim.txt", "photos/victim.txt"):
        (folder / victim).write_text("keep me")


def store_file(name: str) -> Callable[[Path], Files]:
    def files(folder: Path) -> Files:
        write_store(folder)
        return {f"store/{name}": ((folder / "store" / name).read_bytes(), json_changed)}

    return files


def use_store(case: Case) -> None:
    """What the product does with a store, one after another: label on, report, convert, score, train, give its boxes."""
    from wsss.train.dataset.survey import survey_store

    store, photos = case.folder / "store", case.folder / "photos"
    before = {path: path.stat().st_mtime_ns for path in case.folder.rglob("*") if path.is_file() and store not in path.parents}

    def give() -> None:
        labeler = Chain.open(case.folder / "bundle", classes=CLASSES, boxes=store / "manifest.jsonl")
        labeler.label(photos / "a.png")

    def go_on() -> None:
        labeler = Chain.open(case.folder / "bundle", classes=CLASSES)
        label_folder(labeler, photos, store, retry_failed=case.number % 2 == 0, warn=lambda message: None)

    formats = ("voc", "coco", "yolo", "label-studio")
    uses: tuple[Callable[[], object], ...] = (
        go_on,
        lambda: write_report(store, photos, case.folder / "out" / "report.html"),
        lambda: convert(store, photos, case.folder / "out", formats[case.number // 7 % len(formats)]),
        lambda: run_command(case.folder, "eval", "truth", "store", "--classes", ",".join(COLORS), "--workers", "1"),
        lambda: survey_store(store, photos),
        give,
        lambda: run_command(case.folder, "eval", "store", "truth", "--json", "--workers", "1"),
    )
    (case.folder / "out").mkdir() if case.number % 7 == 1 else None
    try:
        uses[case.number % len(uses)]()
    finally:
        kept = {path: path.stat().st_mtime_ns if path.exists() else None for path in before}
        assert kept == before, "a file outside of the store was touched"
        assert (store / "victim.txt").read_text() == "keep me"


@kind(store_file("manifest.jsonl"), beside=write_store, again=True)
def store_lines(case: Case) -> None:
    use_store(case)


@kind(store_file("run.json"), beside=write_store, again=True)
def store_run(case: Case) -> None:
    use_store(case)


@kind(store_file("history.jsonl"), beside=write_store, again=True, share=0.3)
def store_history(case: Case) -> None:
    use_store(dataclasses.replace(case, number=1))


# ---- checkpoints and what lies beside them ----


def checkpoints(_: Path) -> Files:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save

    state = {"layer.weight": torch.arange(12.0).reshape(3, 4), "layer.bias": torch.zeros(3, dtype=torch.float16)}

    def pth(value: object, **options: Any) -> bytes:
        stream = io.BytesIO()
        torch.save(value, stream, **options)
        return stream.getvalue()

    return {
        "model.safetensors": (save(state), damaged),
        "model.pth": (pth(state), damaged),
        "nested.pt": (pth({"model": state, "epoch": 3}), damaged),
        "legacy.bin": (pth(state, _use_new_zipfile_serialization=False), damaged),
    }


@kind(checkpoints)
def checkpoint(case: Case) -> None:
    from wsss.export.weights import read_checkpoint, weights_record
    from wsss.train.weights import read_weights

    before = case.folder / "undamaged"
    before.write_bytes(case.original)
    read = read_checkpoint if case.number % 2 else read_weights
    state = read(case.file)
    assert state and all(isinstance(name, str) for name in state)
    if case.file.read_bytes() != case.original:
        import torch

        record = weights_record(str(case.file), case.file, torch.nn.Module())
        assert record["sha256"] != sha256_of(before), "damaged weights were accepted"


def segmenter_files(folder: Path) -> Files:
    write_segmenter(folder)
    return {
        "segmenter.json": ((folder / "segmenter.json").read_bytes(), json_changed),
        "best.safetensors": ((folder / "best.safetensors").read_bytes(), damaged),
    }


def write_segmenter(folder: Path) -> None:
    """A training's folder with random weights."""
    pytest.importorskip("segmentation_models_pytorch")
    from wsss.train.checkpoint import RunRecord, save_best, write_record
    from wsss.train.model import build_segmenter

    folder.mkdir(parents=True, exist_ok=True)
    options = {"encoder_depth": 3, "decoder_channels": [16, 8, 8]}
    save_best(folder, build_segmenter("unet", "mobilenet_v2", options, 4).network, step=3, miou=0.5)
    record = RunRecord(
        architecture="unet",
        encoder="mobilenet_v2",
        options=options,
        classes=COLORS,
        mean=(123.0, 116.0, 103.0),
        std=(58.0, 57.0, 57.0),
        crop=32,
        multiple_of=8,
        steps=6,
        preset="mini",
        source="tests",
        init={"source": "none"},
        store="0" * 64,
        images=3,
        tools={"torch": "2"},
    )
    write_record(folder, record)


@kind(segmenter_files, beside=write_segmenter, share=0.25)
def trained_run(case: Case) -> None:
    from wsss.train.checkpoint import load_run

    segmenter, record = load_run(case.folder)
    assert record.classes and segmenter.network is not None


def clip_configs(_: Path) -> Files:
    open_clip = pytest.importorskip("open_clip")
    preprocess = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": open_clip.get_model_config("RN50"), "preprocess_cfg": preprocess}
    return {"open_clip_config.json": (text_of(config), json_changed)}


@kind(clip_configs)
def clip_config(case: Case) -> None:
    from wsss.export.clip import weights as clip_weights

    config = clip_weights._config_beside(case.folder / "open_clip_pytorch_model.bin", "RN50")
    recipe = clip_weights.recipe_of("RN50", config)
    for numbers, least in ((recipe.mean, -np.inf), (recipe.std, 0)):
        assert len(numbers) == 3 and all(type(each) in (int, float) and np.isfinite(each) and each > least for each in numbers)


def dino_configs(_: Path) -> Files:
    transformers = pytest.importorskip("transformers")
    return {"config.json": (text_of(transformers.GroundingDinoConfig().to_dict()), json_changed)}


@kind(dino_configs, share=0.3)
def dino_config(case: Case) -> None:
    from transformers import GroundingDinoConfig

    from wsss.export.grounding_dino.weights import _check_config

    _check_config(case.file, GroundingDinoConfig(), "Grounding-DINO tiny")


def image_labels(_: Path) -> Files:
    stream = io.BytesIO()
    np.save(stream, np.array({"scene": np.float32([1, 0, 1]), 2007000032: np.float32([0, 1, 0])}, dtype=object))
    return {
        "cls_labels.npy": (stream.getvalue(), damaged),
        "labels.txt": (b"scene 0 2\n2007_000032 1\n", tokens_changed),
        "labels.json": (text_of({"scene.png": ["red", "blue"], "2007_000032": ["green"]}), json_changed),
    }


@kind(image_labels)
def image_labels_of_eval(case: Case) -> None:
    from wsss.train.evaluate.labels import read_image_labels

    present = read_image_labels(case.file, COLORS, ["scene", "2007_000032"])
    assert present.shape == (2, 3) and present.dtype == bool


# ---- lists of files ----


def make_photos(folder: Path) -> None:
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    for name in ("a.png", "sub/b.png"):
        Image.fromarray(World.scene(8, 8)).save(folder / name)


def list_of_photos(folder: Path) -> Files:
    return {"list.txt": (b"a.png\nsub/b.png\n# a comment\nfile:///tmp/none.png\n", tokens_changed)}


@kind(list_of_photos, beside=make_photos)
def list_of_images(case: Case) -> None:
    source = source_of(str(case.file))
    found = list(source.listing(case.folder / "store"))
    labels = [each.label for each in found]
    assert len(set(labels)) == len(labels)
    for each in found[:20]:
        parts = Path(each.label).parts
        assert ".." not in parts and not Path(each.label).is_absolute(), each
        with contextlib.suppress(WsssError):
            decode(source.read(each.name))


def make_truth(folder: Path) -> None:
    (folder / "truth").mkdir(parents=True, exist_ok=True)
    for name in ("2007_000032", "COCO_train2014_000000000009"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "truth" / f"{name}.png")


def list_of_names(_: Path) -> Files:
    line = b"/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\nCOCO_train2014_000000000009 45 49 50\n"
    return {"list.txt": (line, tokens_changed)}


@kind(list_of_names, beside=make_truth)
def list_of_eval(case: Case) -> None:
    from wsss.train.evaluate.files import find_label_maps, read_list

    truth = find_label_maps(case.folder / "truth")
    assert set(read_list(case.file, truth)) <= truth.paths.keys()


@kind(
    lambda _: {"curve.jsonl": (b'{"step": 1, "loss": 2.5, "rate": 0.1, "seconds": 3}\n{"step": 2, "miou": 0.4}\n', json_changed)},
    share=0.3,
)
def curve_of_a_training(case: Case) -> None:
    from wsss.train.curve import Writer

    Writer(case.folder, 10, tensorboard=False).close()


# ---- the harness ----


@dataclass
class Tally:
    read: int = 0
    refused: int = 0
    failures: dict[str, list[str]] = field(default_factory=dict)
    """What went wrong, by what it was and where: each number with the file that did it."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[Path, Files]]]:
    """The folder of a kind, with what lies beside its files, made at first use."""
    made: dict[str, tuple[Path, Files]] = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("wsss.runtime.chain.open_graph", open_scripted)

        def of(name: str) -> tuple[Path, Files]:
            if name not in made:
                files = KINDS[name].files(tmp_path_factory.mktemp("files"))
                folder = tmp_path_factory.mktemp(name)
                if beside := KINDS[name].beside:
                    beside(folder)
                made[name] = folder, files
            return made[name]

        yield of


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_damaged_file_is_read_or_refused(
    name: str,
    prepared: Callable[[str], tuple[Path, Files]],
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    option = request.config.getoption
    seed, only, count = option("--mutation-seed"), option("--mutation"), max(2, round(option("--mutations") * KINDS[name].share))
    if KINDS[name].real_engines:
        monkeypatch.setattr("wsss.runtime.chain.open_graph", open_graph)
    template, files = prepared(name)
    tally = Tally()
    for number in range(count) if only is None else (only,):
        draw = random.Random(f"{seed}/{name}/{number}")
        file = sorted(files)[number % len(files)]
        original, mutate = files[file]
        data = mutate(original, draw)
        folder = template
        if KINDS[name].again:
            folder = tmp_path / f"{number}"
            shutil.copytree(template, folder)
        place = folder / file
        place.parent.mkdir(parents=True, exist_ok=True)
        undamaged = {other: files[other][0] for other in files if folder == template}
        for other, content in undamaged.items():
            (folder / other).parent.mkdir(parents=True, exist_ok=True)
            (folder / other).write_bytes(content)
        place.write_bytes(data)
        os.utime(place, ns=(number + 1, number + 1))  # hashes are remembered while a file's time of change stays
        problem = _problem_of(KINDS[name].use, Case(folder, file, number, original), tally)
        if problem:
            kept = tmp_path / f"{name}-{seed}-{number}-{Path(file).name}"
            kept.write_bytes(data)
            tally.failures.setdefault(problem, []).append(f"{number} ({kept})")
        if folder != template:
            shutil.rmtree(folder, ignore_errors=True)
    failed = sum(map(len, tally.failures.values()))
    record_property(f"mutations of {name}", {"read": tally.read, "refused": tally.refused, "failed": failed})
    if tally.failures:
        ranked = sorted(tally.failures.items(), key=lambda item: -len(item[1]))
        lines = [
            f"{len(numbers)} x {problem}\n      --mutation-seed {seed} --mutation {numbers[0]}" for problem, numbers in ranked
        ]
        pytest.fail(f"{name}: {failed} of {count} damaged files:\n" + "\n".join(lines), pytrace=False)


def _problem_of(use: Use, case: Case, tally: Tally) -> str:
    """What using a damaged file did, other than to succeed or to raise a WsssError; nothing where all was well."""
    start = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def too_long(*_: object) -> None:
        raise Hanging

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(SLOW, exit=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            use(case)
        tally.read += 1
    except WsssError:
        tally.refused += 1
    except Hanging:
        return f"took more than {SECONDS} s"
    except (Exception, RecursionError) as error:
        return _described(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        faulthandler.cancel_dump_traceback_later()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    if (seconds := time.monotonic() - start) > SECONDS:
        return f"took {seconds:.0f} s"
    return f"took {grown // 500 * 500} MiB or more" if grown > 1536 else ""


class Hanging(BaseException):
    """The alarm went off. Not an Exception: nothing that the product catches."""


def _described(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    root = str(Path(__file__).parent.parent)
    in_product = [frame for frame in frames if frame.filename.startswith(root) and "/tests/" not in frame.filename]
    last = (in_product or frames)[-1]
    message = printable(" ".join(str(error).split())[:160])
    return f"{type(error).__name__}: {message} at {Path(last.filename).name}:{last.lineno} {last.name}"


# ---- the harness is seen to notice ----


def test_damage_is_the_same_for_ever_and_changes_most_files() -> None:
    for original, mutate in ((text_of(COCO), json_changed), (XML.encode(), tokens_changed), (bytes(range(200)), damaged)):
        made = [mutate(original, random.Random(f"{number}")) for number in range(600)]
        assert made[::-1] == [mutate(original, random.Random(f"{number}")) for number in reversed(range(600))]
        assert sum(each != original for each in made) >= 500
        assert len(set(made)) >= 450


@pytest.mark.parametrize(
    ("use", "problem"),
    [
        (lambda case: {}["x"], r"KeyError: 'x'"),
        (lambda case: np.float32(1) / np.zeros(1, np.float32), "RuntimeWarning: divide by zero"),
        (lambda case: pytest.fail("no"), None),
        (lambda case: [][0], "IndexError"),
        (lambda case: None, ""),
    ],
)
def test_what_is_neither_a_result_nor_a_refusal_is_noticed(use: Use, problem: str | None, tmp_path: Path) -> None:
    tally = Tally()
    case = Case(tmp_path, "x", 0, b"")
    if problem is None:
        with pytest.raises(pytest.fail.Exception):
            _problem_of(use, case, tally)
        return
    found = _problem_of(use, case, tally)
    assert found.startswith(problem) if problem else found == ""
    assert tally.read == (not problem)


def test_a_hang_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SECONDS", 0.05)

    def hang(_: Case) -> None:
        while True:
            with contextlib.suppress(Exception):
                time.sleep(0.01)

    assert _problem_of(hang, Case(tmp_path, "x", 0, b""), Tally()).startswith("took more than")


@pytest.mark.parametrize("name", sorted(KINDS))
def test_undamaged_files_are_read(
    name: str, prepared: Callable[[str], tuple[Path, Files]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Otherwise nothing behind the first refusal is ever reached."""
    if KINDS[name].real_engines:
        monkeypatch.setattr("wsss.runtime.chain.open_graph", open_graph)
    template, files = prepared(name)
    for number, file in enumerate(sorted(files)):
        folder = tmp_path / f"{number}"
        shutil.copytree(template, folder)
        for other, (content, _) in files.items():
            (folder / other).parent.mkdir(parents=True, exist_ok=True)
            (folder / other).write_bytes(content)
        case = Case(folder, file, number, files[file][0])
        if file in KINDS[name].refused:
            with pytest.raises(WsssError):
                KINDS[name].use(case)
        else:
            KINDS[name].use(case)
