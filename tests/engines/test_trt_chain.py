"""The whole chain in TensorRT's engines on a simulated GPU, which computes the mini bundle's graphs with ONNX Runtime."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsss.batch import Photograph, PseudoLabels
from wsss.engines.ort import OrtEngine
from wsss.engines.trt import TrtEngine
from wsss.export.resize import PARTS, WHOLE, resize_graphs
from wsss.export.to_engine import profile_of
from wsss.export.to_onnx import OPSET, WeightFile, export_onnx
from wsss.mini.scenes import draw_scene
from wsss.runtime.bundles import MINI
from wsss.runtime.chain import Chain
from wsss.spec import AxisRange, GraphSpec, Model, read_manifest, sha256_of, write_manifest

from . import simulated_gpu as sim
from .bench import Bench


@contextmanager
def chain_of(bundle: str | Path, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A labeler of a bundle on a simulated GPU, and its engines by ``model/graph``."""
    engines: dict[str, TrtEngine] = {}
    bench.use(sim.Gpu(memory_bytes=1 << 32))

    def open_graph(model: Model, graph: str, *_: Any, **__: Any) -> TrtEngine:
        spec, name = model.graph(graph), f"{model.manifest.family}/{graph}"
        ort, axes = OrtEngine(model.path(graph), spec, threads=1), profile_of(spec)
        axes |= {axis: AxisRange(1, 384, 512) for axis in ("photo_height", "photo_width") if axis in axes}

        def compute(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {name: np.asarray(value) for name, value in ort(feeds).items()}

        network = sim.Network(spec.inputs, spec.outputs, axes, compute, activations_bytes=1 << 27)
        plan = bench.plan(name.replace("/", "-"), network)
        contract = GraphSpec(file="", inputs=spec.inputs, outputs=spec.outputs, axes=axes, opset=18)
        bench.opened.append(engines.setdefault(name, TrtEngine(plan, contract, flavour="trt")))
        return engines[name]

    with monkeypatch.context() as patched:
        patched.setattr("wsss.runtime.chain.choose", lambda *_: ("trt", "cuda:0"))
        patched.setattr("wsss.runtime.chain.open_graph", open_graph)
        made = [Chain.open(bundle, classes="mini"), engines]
        yield made
        made.clear()  # pytest still holds the list when `bench` looks for memory that is left


@pytest.fixture
def chain(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The mini bundle on a simulated GPU."""
    with chain_of("mini", bench, monkeypatch) as made:
        yield made


@pytest.fixture(scope="module")
def resizing_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mini bundle with the graphs that resize photographs, which it has only in half precision."""
    bundle = tmp_path_factory.mktemp("resizing")
    for name in ("clip", "grounding-dino", "sam"):
        folder = bundle / name
        shutil.copytree(MINI / name, folder)
        manifest, views = read_manifest(folder), PARTS if name == "clip" else WHOLE
        graphs, files = dict(manifest.graphs), dict(manifest.files)
        weights = WeightFile(folder / "resize.data")
        for graph in (make() for make in resize_graphs(manifest.preprocess, views)):
            file = f"{graph.name}.onnx"
            export_onnx(graph, folder / file, weights)
            graphs[graph.name] = graph.spec(file, OPSET)
            files[file] = sha256_of(folder / file)
        write_manifest(folder, replace(manifest, graphs=graphs, files=files))
    return bundle


@pytest.fixture
def resizing(resizing_bundle: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A bundle with resizing graphs on a simulated GPU."""
    with chain_of(resizing_bundle, bench, monkeypatch) as made:
        yield made


def scenes(numbers: range, size: tuple[int, int] | None = None) -> list[Photograph]:
    return [Photograph(name=f"{number}", pixels=draw_scene(number, size=size).pixels) for number in numbers]


def assert_same(found: PseudoLabels, expected: PseudoLabels) -> None:
    """But for rounding: a padded product may add up in another order."""
    assert np.array_equal(found.boxes.image, expected.boxes.image) and np.array_equal(found.boxes.label, expected.boxes.label)
    assert np.allclose(found.boxes.xyxy_image, expected.boxes.xyxy_image, atol=0.05)
    for one, other in zip(found.label_maps, expected.label_maps, strict=True):
        assert one.shape == other.shape and (one != other).mean() < 2e-3
    assert np.allclose(found.area, expected.area, rtol=0.01, atol=5) and np.allclose(found.won, expected.won, rtol=0.02, atol=9)


def test_the_chain_agrees_with_onnx_runtime(request: pytest.FixtureRequest) -> None:
    photos = scenes(range(3))
    expected = Chain.open("mini", classes="mini", engine="ort", device="cpu").pseudo_label(photos)
    labeler, engines = request.getfixturevalue("chain")
    for _ in range(3):  # enqueued, captured, replayed
        assert_same(labeler.pseudo_label(photos), expected)
    assert np.bincount(expected.boxes.image).tolist() == [3, 3, 2] and expected.won.all(), "fewer than what is padded to"
    assert engines["sam/fuse"].cuda_graphs and engines["sam/decoder"].cuda_graphs


def test_inputs_made_on_the_gpu_give_the_same_labels(request: pytest.FixtureRequest) -> None:
    """Photographs of several sizes in one batch, one of them too large for the engines."""
    photos = [*scenes(range(2)), *scenes(range(2, 4), size=(200, 333)), *scenes(range(4, 5), size=(300, 600))]
    expected = Chain.open("mini", classes="mini", engine="ort", device="cpu").pseudo_label(photos)
    labeler, _ = request.getfixturevalue("resizing")
    for _ in range(3):  # enqueued, captured, replayed
        found = labeler.pseudo_label(photos)
        assert_same(found, expected)
        assert np.array_equal(found.labels.present, expected.labels.present)


def test_a_photograph_is_copied_to_the_gpu_once(resizing: list[Any]) -> None:
    """And nothing else of its pixels is."""
    labeler, engines = resizing
    photos = [*scenes(range(2)), *scenes(range(2, 4), size=(200, 333))]
    sent = sum(engine.copied["host_to_device"] for engine in engines.values())
    labeler.segment(photos, labeler.detect(photos, labeler.tag(photos)))
    sent = sum(engine.copied["host_to_device"] for engine in engines.values()) - sent
    pixels = sum(4 * photo.pixels[..., 0].size for photo in photos)
    assert pixels <= sent < pixels + 100_000, "captions, boxes, sizes and windows are small"


@pytest.mark.parametrize("masks", [True, False])
def test_fusing_waits_once_for_a_batch_and_once_for_its_masks(chain: list[Any], bench: Bench, masks: bool) -> None:
    labeler, engines = chain
    labeler.fuse.stage.keep_masks = masks
    photos = scenes(range(2)) + scenes(range(2, 3), size=(300, 1100))
    boxes = labeler.detect(photos, labels := labeler.tag(photos))
    for _ in range(2):  # the first uploads the matrices
        found, waits = labeler.segment(photos, boxes), bench.gpu.host_waits
        sent = engines["sam/fuse"].copied["host_to_device"]
        labeler.fuse(photos, labels, boxes, found)
    assert bench.gpu.host_waits == waits + 1 + masks
    assert len(boxes) > 2 and engines["sam/fuse"].copied["host_to_device"] - sent == 4 + (8 + 4 + 8) * len(boxes)
