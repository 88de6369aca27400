"""Shared fixtures: simple scenes that scripted engines label exactly, and the command line in this process.

Photographs are black with pure red, green and blue rectangles. The scripted CLIP finds the colors in a view, the scripted
Grounding-DINO puts a box around all pixels of a color, the scripted SAM outlines the box's main color, and the scripted fusion
follows the rule of `export/sam/fuse.py`. Rows of a batch do not affect each other. Ranges of the free axes are tiny, so that a
batch of a few photographs already needs several calls.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from wsss.batch import Photograph
from wsss.classes import ClassList, class_list
from wsss.engines.fake import FakeEngine, without_padding
from wsss.errors import WsssError
from wsss.spec import AxisRange, DType, GraphSpec, Manifest, Model, Preprocess, TensorSpec, open_bundle, sha256_of, write_manifest

Feeds = Mapping[str, np.ndarray]
COLORS = ("red", "green", "blue")
WORDS = {word: number for number, word in enumerate(("[UNK]", *COLORS, "grass", "photo", "[CLS]", "[SEP]", ".", "[END]", "sky"))}
TEXT, VIEW, SIDE = 16, 8, 32
_CACHES = itertools.count()
Box = tuple[int, int, int, int]


def tensors(**specs: tuple[tuple[int | str, ...], DType]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, shape, dtype) for name, (shape, dtype) in specs.items())


def of_color(pixels: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 to (..., 3) bool: whether a pixel is red, green, blue. Blends at edges are none of them."""
    strong = pixels > 127
    return strong & (strong.sum(axis=-1, keepdims=True) == 1)


def see_view(feeds: Feeds) -> Feeds:
    found = of_color(feeds["pixels"]).any(axis=(1, 2))  # (V, 3)
    embedding = np.concatenate([found, np.full((len(found), 1), 0.5)], axis=1).astype(np.float32)
    return {"embedding": embedding / np.linalg.norm(embedding, axis=1, keepdims=True)}


def read_sentence(feeds: Feeds) -> Feeds:
    embedding = np.stack([(feeds["tokens"] == WORDS[word]).any(axis=1) for word in (*COLORS, "grass")], axis=1)
    return {"embedding": embedding.astype(np.float32)}


def read_phrases(feeds: Feeds) -> Feeds:
    assert not feeds["tokens"][~feeds["mask"]].any(), "padding must be the pad token"
    return {"features": np.eye(TEXT, dtype=np.float32)[feeds["tokens"]]}


def find_colors(feeds: Feeds) -> Feeds:
    """Query q is color q: it has a high score for the tokens of its name if the photograph has a pixel of the color."""
    assert not feeds["text"][feeds["phrase"] < 0].any(), "padding must be zeros"
    rows, tokens = feeds["phrase"].shape
    logits = np.full((rows, 3, tokens), -4, np.float32)
    boxes = np.full((rows, 3, 4), 0.5, np.float32)
    seen = of_color(without_padding(feeds["pixels"], feeds["size"]))
    for row, (height, width) in enumerate(feeds["size"]):
        for color in range(3):
            y, x = np.nonzero(seen[row, :, :, color])
            if len(y):
                corners = np.array([x.min() / width, y.min() / height, (x.max() + 1) / width, (y.max() + 1) / height])
                boxes[row, color] = [*(corners[:2] + corners[2:]) / 2, *corners[2:] - corners[:2]]
                logits[row, color] = 8 * feeds["text"][row, :, WORDS[COLORS[color]]] - 4
    return {"logits": logits, "boxes": boxes, "query": np.tile(np.arange(3), (rows, 1))}


def encode(feeds: Feeds) -> Feeds:
    pixels = without_padding(feeds["pixels"], feeds["size"])
    return {"embedding": of_color(pixels).transpose(0, 3, 1, 2).astype(np.float32)}


def decode(feeds: Feeds) -> Feeds:
    """The box's main color inside the box, logits of +-4; of a box with ``multimask`` only the upper half, with a worse IoU."""
    logits = np.full((len(feeds["boxes"]), SIDE, SIDE), -4, np.float32)
    for row, (box, image) in enumerate(zip(feeds["boxes"].round().astype(int), feeds["image"], strict=True)):
        x0, y0, x1, y1 = box
        inside = feeds["embedding"][image][:, y0:y1, x0:x1]
        logits[row, y0:y1, x0:x1] = 8 * inside[inside.sum(axis=(1, 2)).argmax()] - 4
        if feeds["multimask"][row]:
            logits[row, (y0 + y1) // 2 :] = -4
    quality = np.where(feeds["multimask"], 0.8, 0.9).astype(np.float32)
    return {"logits": logits, "quality": quality, "token": feeds["multimask"].astype(np.int64), "stability": 0 * quality + 1}


def fuse(feeds: Feeds) -> Feeds:
    """The rule of `export/sam/fuse.py`, in numpy."""
    z = feeds["rows"] @ feeds["logits"][feeds["pick"]] @ feeds["columns"].T
    value = np.where(z > 0, feeds["score"][:, None, None] / (1 + np.exp(-z)), 0)
    winner, best = value.argmax(axis=0), value.max(axis=0)
    label = feeds["label"][winner]
    rival = np.where(feeds["label"][:, None, None] != label, value, 0).max(axis=0)
    contested = (rival > 0) & (best - rival < feeds["margin"][0] * best)
    owned = (best > 0) & ~contested
    return {
        "label_map": np.where(contested, 255, np.where(owned, label, 0)).astype(np.uint8),
        "area": (z > 0).sum(axis=(1, 2)),
        "won": np.bincount(winner[owned], minlength=len(z)).astype(np.int64),
        "confidence": np.rint(255 * np.select([contested, owned], [0, best - rival], 1)).astype(np.uint8),
    }


PIXELS = tensors(pixels=(("batch", VIEW, VIEW, 3), "uint8"))
SCRIPTS: dict[
    tuple[str, str], tuple[Callable[[Feeds], Feeds], tuple[TensorSpec, ...], tuple[TensorSpec, ...], dict[str, AxisRange]]
] = {
    ("clip", "image"): (see_view, PIXELS, tensors(embedding=(("batch", 4), "float32")), {"batch": AxisRange(1, 2, 3)}),
    ("clip", "text"): (
        read_sentence,
        tensors(tokens=(("batch", 4), "int64")),
        tensors(embedding=(("batch", 4), "float32")),
        {"batch": AxisRange(1, 2, 2)},
    ),
    ("grounding-dino", "text"): (
        read_phrases,
        tensors(tokens=(("phrases", "length"), "int64"), mask=(("phrases", "length"), "bool")),
        tensors(features=(("phrases", "length", TEXT), "float32")),
        {"phrases": AxisRange(1, 2, 2), "length": AxisRange(1, 2, 8)},
    ),
    ("sam", "encoder"): (
        encode,
        tensors(pixels=(("batch", SIDE, SIDE, 3), "uint8"), size=(("batch", 2), "int64")),
        tensors(embedding=(("batch", 3, SIDE, SIDE), "float32")),
        {"batch": AxisRange(1, 2, 3)},
    ),
    ("sam", "decoder"): (
        decode,
        tensors(
            embedding=(("images", 3, SIDE, SIDE), "float32"),
            boxes=(("boxes", 4), "float32"),
            image=(("boxes",), "int64"),
            multimask=(("boxes",), "bool"),
        ),
        tensors(
            logits=(("boxes", SIDE, SIDE), "float32"),
            quality=(("boxes",), "float32"),
            token=(("boxes",), "int64"),
            stability=(("boxes",), "float32"),
        ),
        {"images": AxisRange(1, 2, 2), "boxes": AxisRange(1, 2, 4)},
    ),
    ("sam", "fuse"): (
        fuse,
        tensors(
            logits=(("masks", SIDE, SIDE), "float32"),
            pick=(("picked",), "int64"),
            score=(("picked",), "float32"),
            label=(("picked",), "int64"),
            rows=(("height", SIDE), "float32"),
            columns=(("width", SIDE), "float32"),
            margin=((1,), "float32"),
        ),
        tensors(
            label_map=(("height", "width"), "uint8"),
            area=(("picked",), "int64"),
            won=(("picked",), "int64"),
            confidence=(("height", "width"), "uint8"),
        ),
        {
            "masks": AxisRange(1, 2, 8),
            "picked": AxisRange(1, 2, 8),
            "height": AxisRange(1, 8, 4096),
            "width": AxisRange(1, 8, 4096),
        },
    ),
}
CANVASES = ((32, 48), (48, 32))
for _height, _width in CANVASES:
    SCRIPTS["grounding-dino", f"image-{_height}x{_width}"] = (
        find_colors,
        tensors(
            pixels=(("batch", _height, _width, 3), "uint8"),
            size=(("batch", 2), "int64"),
            text=(("batch", "tokens", TEXT), "float32"),
            phrase=(("batch", "tokens"), "int64"),
            position=(("batch", "tokens"), "int64"),
        ),
        tensors(logits=(("batch", 3, "tokens"), "float32"), boxes=(("batch", 3, 4), "float32"), query=(("batch", 3), "int64")),
        {"batch": AxisRange(1, 2, 2), "tokens": AxisRange(4, 6, 8)},
    )

PREPROCESS: dict[str, dict[str, Any]] = {
    "clip": {"resize": "squash", "longest_px": VIEW, "canvases": ((VIEW, VIEW),)},
    "grounding-dino": {"resize": "short-longest", "short_px": 32, "longest_px": 48, "canvases": CANVASES},
    "sam": {"resize": "longest", "longest_px": SIDE, "canvases": ((SIDE, SIDE),)},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "clip": {
        "logit_scale": 20.0,
        "rule": "background",
        "views": [1, 2],
        "threshold": 0.5,
        "backgrounds": ["grass"],
        "context_length": 4,
        "pad": 0,
        "end": WORDS["[END]"],
        "templates": ["photo {}", "{}"],
    },
    "grounding-dino": {
        "cls": WORDS["[CLS]"],
        "sep": WORDS["[SEP]"],
        "dot": WORDS["."],
        "pad": 0,
        "max_tokens": 8,
        "box_threshold": 0.3,
    },
    "sam": {"logits_side": SIDE},
}


def write_model(folder: Path, family: str, settings: Mapping[str, Any] | None = None, *, drop: Sequence[str] = ()) -> None:
    """Write a model's folder like an exporter; the graphs are a few bytes that only `World.open_graph` understands."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [graph for model, graph in SCRIPTS if model == family]
    for graph in names:
        name = f"{family}/{graph}".encode()
        (folder / f"{graph}.onnx").write_bytes(b"\x42" + bytes([len(name)]) + name)  # field 8, which ONNX readers ignore
    if family != "sam":
        tokenizer = Tokenizer(WordLevel(WORDS, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.save(str(folder / "tokenizer.json"))
    manifest = Manifest(
        family=family,
        variant="fake",
        preprocess=Preprocess(filter="bilinear", mean=(0, 0, 0), std=(1, 1, 1), source="tests/conftest.py", **PREPROCESS[family]),
        graphs={graph: spec_of(family, graph) for graph in names},
        settings={**{name: SETTINGS[family][name] for name in SETTINGS[family] if name not in drop}, **(settings or {})},
        tokenizer=None if family == "sam" else "tokenizer.json",
        weights={"source": "none", "sha256": ""},
        tools={},
        files={path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name != "manifest.json"},
    )
    write_manifest(folder, manifest)


def spec_of(family: str, graph: str) -> GraphSpec:
    _, inputs, outputs, axes = SCRIPTS[family, graph]
    return GraphSpec(file=f"{graph}.onnx", inputs=inputs, outputs=outputs, axes=axes, opset=18)


@dataclass
class World:
    """A bundle on disk, its scripted engines, and photographs."""

    bundle: Path
    classes: ClassList = field(default_factory=lambda: class_list(COLORS))
    engines: dict[tuple[str, str], FakeEngine] = field(default_factory=dict)
    """Engines opened so far, by model and graph."""

    def model(self, name: str) -> Model:
        return open_bundle(self.bundle).model(name)

    def open_graph(
        self, model: Model, graph: str, engine: str = "ort", *, device: str = "cpu", unverified: bool = False
    ) -> FakeEngine:
        """Replaces `wsss.engines.opening.open_graph`."""
        key = model.manifest.family, graph
        return self.engines.setdefault(key, FakeEngine(model.graph(graph), SCRIPTS[key][0]))

    def engine(self, model: str, graph: str) -> FakeEngine:
        return self.open_graph(self.model(model), graph)

    def rows(self, model: str, graph: str) -> list[int]:
        """Number of rows in each call of an engine, by its first input."""
        if (model, graph) not in self.engines:
            return []
        engine = self.engines[model, graph]
        return [call[next(iter(engine.inputs))][0] for call in engine.calls]

    @staticmethod
    def scene(height: int, width: int, **colors: Box) -> np.ndarray:
        """(height, width, 3) uint8, black with a rectangle (x0, y0, x1, y1) of each color."""
        pixels = np.zeros((height, width, 3), np.uint8)
        for color, (x0, y0, x1, y1) in colors.items():
            pixels[y0:y1, x0:x1] = 0
            pixels[y0:y1, x0:x1, COLORS.index(color)] = 255
        return pixels

    def photo(self, height: int, width: int, name: str = "x.png", **colors: Box) -> Photograph:
        return Photograph(name=name, pixels=self.scene(height, width, **colors))

    def save(self, path: Path, height: int, width: int, **colors: Box) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.scene(height, width, **colors)).save(path)
        return path


@pytest.fixture(scope="session")
def needs_openvino() -> None:
    """Skip where OpenVINO is missing or refuses to run."""
    from wsss.engines.openvino import openvino

    try:
        openvino()
    except WsssError as error:
        pytest.skip(error.message)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept between tests, nor in the home folder."""
    monkeypatch.setenv("WSSS_CACHE", f"{tmp_path_factory.getbasetemp()}/cache-{next(_CACHES)}")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """The scripted bundle; `Chain.open` and the command line get its engines."""
    for name in SETTINGS:
        write_model(tmp_path / "bundle" / name, name)
    world = World(tmp_path / "bundle")
    monkeypatch.setattr("wsss.runtime.chain.open_graph", world.open_graph)
    return world


@pytest.fixture
def photos(world: World, tmp_path: Path) -> Path:
    """Five photographs: nothing, one, two and three colors, one of them in a sub-folder and upright."""
    folder = tmp_path / "photos"
    world.save(folder / "black.png", 30, 40)
    world.save(folder / "green.png", 64, 64, green=(16, 16, 48, 48))
    world.save(folder / "red.png", 48, 64, red=(8, 8, 32, 40))
    world.save(folder / "sub" / "three.png", 90, 60, red=(0, 0, 20, 30), green=(30, 30, 60, 60), blue=(10, 66, 40, 90))
    world.save(folder / "two.png", 40, 60, red=(0, 0, 20, 20), blue=(30, 10, 60, 40))
    return folder


@dataclass
class Answer:
    code: int
    out: str
    err: str


@pytest.fixture
def wsss(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Answer]:
    """Run the command line in this process, in a separate working folder."""
    from wsss.cli.main import main

    monkeypatch.chdir(tmp_path)

    def run(*argv: str | Path) -> Answer:
        monkeypatch.setattr(sys, "argv", ["wsss", *map(str, argv)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        out, err = capsys.readouterr()
        return Answer(code, out, err)

    return run


@dataclass
class Bucket:
    """A new bucket of a real S3 server on loopback, and boto3's own client, which shares no code with `wsss.object_storage`."""

    name: str
    client: Any

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=data)

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.name, Key=key)["Body"].read()

    def keys(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return [each["Key"] for page in pages for each in page.get("Contents", ())]

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=key)

    def upload(self, folder: Path, prefix: str) -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())

    def contents(self, prefix: str) -> dict[str, bytes]:
        """Every object below a folder, hidden ones too, but the history."""
        found = {key.removeprefix(f"{prefix}/"): self.get(key) for key in self.keys(f"{prefix}/")}
        found.pop("history.jsonl", None)
        return found


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a server that keeps its objects in memory."""
    pytest.importorskip("s3fs", reason="s3fs is not installed (pip install 'wsss[remote]')")
    server = pytest.importorskip("moto.server", reason="moto's server is not installed (pip install 'moto[server]')")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running.start()
    yield f"http://127.0.0.1:{running.get_host_and_port()[1]}"
    running.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Bucket:
    """A separate bucket for each test; code in this environment, including subprocesses, finds it by its URL."""
    import boto3

    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    name = f"bucket-{zlib.crc32(request.node.nodeid.encode()):08x}"
    client.create_bucket(Bucket=name)
    return Bucket(name, client)


# ---- damaged files (test_hostile_files.py) ----


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("damaged files")
    group.addoption("--mutations", type=int, default=12, help="damaged files of each kind that test_hostile_files.py tries")
    group.addoption("--mutation", type=int, default=None, help="only the damaged file of this number")
    group.addoption("--mutation-seed", type=int, default=0, help="other damage")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the number of damaged files that were tried."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, ())]
    properties = (entry for report in reports for entry in report.user_properties)
    tried = {name: counts for name, counts in properties if name.startswith("mutations of ")}
    if not tried:
        return
    outcomes = ("read", "refused", "failed")
    total = {outcome: sum(counts[outcome] for counts in tried.values()) for outcome in outcomes}
    if terminalreporter.config.option.verbose > 0:
        for name, counts in sorted(tried.items()):
            terminalreporter.write_line(f"{name}: " + ", ".join(f"{counts[outcome]} {outcome}" for outcome in outcomes))
    terminalreporter.write_line(
        f"damaged files: {sum(total.values()):,} tried, " + ", ".join(f"{total[outcome]:,} {outcome}" for outcome in outcomes)
    )
