"""The whole chain in TensorRT's engines on a simulated GPU, which computes the mini bundle's graphs with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from wsss.batch import Photograph, PseudoLabels
from wsss.engines.ort import OrtEngine
from wsss.engines.trt import TrtEngine
from wsss.export.to_engine import profile_of
from wsss.mini.scenes import draw_scene
from wsss.runtime.chain import Chain
from wsss.spec import GraphSpec, Model

from . import simulated_gpu as sim
from .bench import Bench


@pytest.fixture
def chain(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A labeler of the mini bundle on a simulated GPU, and its engines by ``model/graph``."""
    engines: dict[str, TrtEngine] = {}
    bench.use(sim.Gpu(memory_bytes=1 << 32))

    def open_graph(model: Model, graph: str, *_: Any, **__: Any) -> TrtEngine:
        spec, name = model.graph(graph), f"{model.manifest.family}/{graph}"
        ort, axes = OrtEngine(model.path(graph), spec, threads=1), profile_of(spec)

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
        made = [Chain.open("mini", classes="mini"), engines]
        yield made
        made.clear()  # pytest still holds the list when `bench` looks for memory that is left


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
