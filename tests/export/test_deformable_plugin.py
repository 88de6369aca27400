"""Deformable attention as one node: its function beside grid_sample, and what TensorRT's parser is given."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install 'wsss[export]'")
pytest.importorskip("onnxscript", reason="needs onnxscript: pip install 'wsss[export]'")

import onnx  # noqa: E402
import onnx_ir as ir  # noqa: E402
import onnxruntime  # noqa: E402

from wsss.errors import WsssError  # noqa: E402
from wsss.export.deformable_plugin import DOMAIN, PLUGIN, define_plugin, plugin_called, plugin_sampled  # noqa: E402
from wsss.export.precision.instrumentation import clone  # noqa: E402
from wsss.export.precision.lowering import fp32_nodes, lower, name_nodes  # noqa: E402
from wsss.export.to_engine import _parsed  # noqa: E402

SHAPES = ((7, 9), (4, 5), (2, 3))
CELLS, HEADS, WIDTH, POINTS = sum(height * width for height, width in SHAPES), 2, 6, 4
Tensors = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]


class Sampled(torch.nn.Module):
    def forward(self, values: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return plugin_sampled(values, places, weights, SHAPES)


def drawn(batch: int, queries: int, seed: int = 0) -> Tensors:
    """Values, places within and around every level, weights."""
    torch.manual_seed(seed)
    places = torch.rand(batch, queries, HEADS, len(SHAPES), POINTS, 2) * 1.5 - 0.25
    return torch.randn(batch, CELLS, HEADS, WIDTH), places, torch.rand(places.shape[:-1])


def sampled(values: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The same by grid_sample, level by level."""
    found, start = torch.zeros(values.shape[0], places.shape[1], HEADS, WIDTH), 0
    for level, (height, width) in enumerate(SHAPES):
        for head in range(HEADS):
            image = values[:, start : start + height * width, head].reshape(-1, height, width, WIDTH).permute(0, 3, 1, 2)
            read = torch.nn.functional.grid_sample(image, 2 * places[:, :, head, level] - 1, align_corners=False)
            found[:, :, head] += (read * weights[:, None, :, head, level]).sum(-1).transpose(1, 2)
        start += height * width
    return found


@pytest.fixture(scope="module")
def traced() -> ir.Model:
    batch, queries = torch.export.Dim("batch"), torch.export.Dim("queries")
    shapes = ({0: batch}, {0: batch, 1: queries}, {0: batch, 1: queries})
    names = {"input_names": ["values", "places", "weights"], "output_names": ["sampled"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.onnx warns of axes that share a name
        program = torch.onnx.export(
            Sampled().eval(), drawn(3, 11), dynamo=True, opset_version=18, dynamic_shapes=shapes, verbose=False, **names
        )
    assert program is not None
    model: ir.Model = program.model
    name_nodes(model)
    define_plugin(model)
    return model


@pytest.fixture
def path(traced: ir.Model, tmp_path: Path) -> Path:
    ir.save(traced, tmp_path / "sampled.onnx")
    return tmp_path / "sampled.onnx"


@pytest.mark.parametrize(("batch", "queries"), [(1, 1), (2, 30), (4, 7)])
def test_the_function_computes_what_grid_sample_does(path: Path, batch: int, queries: int) -> None:
    onnx.checker.check_model(str(path))
    feeds = drawn(batch, queries, seed=queries)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = ("values", "places", "weights")
    (found,) = session.run(None, {name: value.numpy() for name, value in zip(names, feeds, strict=True)})
    np.testing.assert_allclose(found, sampled(*feeds).numpy(), atol=3e-6)


def test_a_place_on_the_border_reads_half_of_the_outside(path: Path) -> None:
    values, places, weights = drawn(1, 1)
    places[...], weights[...] = 0.5, 0.0
    places[0, 0, 0, 1, 0] = torch.tensor([1.0, 0.5 / 4])  # the right end of the first row of the second level
    weights[0, 0, 0, 1, 0] = 1.0
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"values": values.numpy(), "places": places.numpy(), "weights": weights.numpy()})
    np.testing.assert_allclose(found[0, 0, 0], values[0, 7 * 9 + 4, 0].numpy() / 2, atol=1e-6)
    assert not found[0, 0, 1].any()


@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_in_half_precision_the_node_and_its_coordinates_stay_float32(traced: ir.Model, half: Any) -> None:
    model = clone(traced)
    dtypes = {"values": "float16", "places": "float32", "weights": "float32", "sampled": "float16"}
    assert not fp32_nodes(model, Sampled())
    lower(model, half, frozenset(), dtypes)
    (node,) = [node for node in model.graph if node.op_type == PLUGIN]
    wanted = [ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT32, ir.DataType.FLOAT, ir.DataType.FLOAT]
    assert [value.dtype for value in node.inputs if value is not None] == wanted


def test_a_graph_without_the_node_is_given_as_it_is(tmp_path: Path) -> None:
    info = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Relu", ["a"], ["b"])
    graph = onnx.helper.make_graph([node], "plain", [info("a", 1, [2])], [info("b", 1, [2])])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "plain.onnx")
    assert plugin_called(tmp_path / "plain.onnx", "2") is None


# ---- the full TensorRT, which is not here ----


class Registry:
    def __init__(self, *versions: str) -> None:
        self.versions = versions

    def get_creator(self, name: str, version: str, namespace: str) -> object | None:
        return object() if (name, namespace) == (PLUGIN, "") and version in self.versions else None


class Parser:
    def __init__(self, network: object, logger: object) -> None:
        self.num_errors = 0

    def parse(self, data: bytes, path: str) -> bool:
        given.append(("bytes", data))
        return True

    def parse_from_file(self, path: str) -> bool:
        given.append(("file", path))
        return True


given: list[tuple[str, Any]] = []


def tensorrt(*versions: str) -> Any:
    return SimpleNamespace(
        __version__="11.0",
        NetworkDefinitionCreationFlag=SimpleNamespace(),
        OnnxParser=Parser,
        init_libnvinfer_plugins=lambda logger, namespace: True,
        get_plugin_registry=lambda: Registry(*versions),
    )


def parsed(path: Path, flavour: Any, *versions: str) -> tuple[str, Any]:
    given.clear()
    builder = SimpleNamespace(create_network=lambda flags: object())
    _parsed(tensorrt(*versions), builder, SimpleNamespace(errors=[]), path, flavour, "grounding-dino: image")
    return given[0]


@pytest.mark.parametrize(("versions", "asked"), [(("1",), "1"), (("1", "2"), "2")])
def test_tensorrt_is_given_a_call_of_its_newest_plugin(path: Path, versions: tuple[str, ...], asked: str) -> None:
    kind, data = parsed(path, "trt", *versions)
    assert kind == "bytes"
    model = onnx.load_model_from_string(data)
    assert not model.functions
    (node,) = [node for node in model.graph.node if node.domain == DOMAIN]
    assert {each.name: each.s.decode() for each in node.attribute} == {"plugin_version": asked}


def test_tensorrt_without_the_plugin_is_refused_with_the_way_out(path: Path) -> None:
    with pytest.raises(WsssError, match=r"grounding-dino: image: TensorRT 11\.0 has no plugin Multiscale") as caught:
        parsed(path, "trt")
    assert caught.value.hint == "export with --sampling grid-sample, which needs none"


def test_tensorrt_rtx_is_given_the_file_with_the_function(path: Path) -> None:
    assert parsed(path, "trt-rtx") == ("file", str(path))


# ---- NVIDIA's own parser, from TensorRT-RTX ----


def test_nvidias_parser_asks_for_the_plugin_with_the_inputs_it_takes(path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install 'wsss[trt-rtx]'")
    asked, messages = [], []

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = PLUGIN, "2", ""
            self.field_names = trt.PluginFieldCollection([])

        def create_plugin(self, name: str, fields: object, phase: object) -> None:
            asked.append(name)  # and is given none: TensorRT-RTX cannot place plugins

    class Logger(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: object, message: str) -> None:
            messages.append(message)

    logger, registry, creator = Logger(), trt.get_plugin_registry(), Creator()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    registry.register_creator(creator, "")
    try:
        assert not parser.parse(plugin_called(path, "2"), str(path))
    finally:
        registry.deregister_creator(creator)
    assert len(asked) == 1 and "Could not create the plugin" in parser.get_error(0).desc()
    (inputs,) = [line for line in messages if f"[{PLUGIN}] inputs" in line]
    assert re.findall(r"\((.*?)\)\[(\w+)\]", inputs) == [
        (f"-1, {CELLS}, {HEADS}, {WIDTH}", "FLOAT"),
        (f"{len(SHAPES)}, 2", "INT32"),
        (f"{len(SHAPES)}", "INT32"),
        (f"-1, -1, {HEADS}, {len(SHAPES)}, {POINTS}, 2", "FLOAT"),
        (f"-1, -1, {HEADS}, {len(SHAPES)}, {POINTS}", "FLOAT"),
    ]
