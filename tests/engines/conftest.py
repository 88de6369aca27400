"""A graph of one multiplication, its contract and its ONNX file; engines on a simulated machine."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from wsss.spec import AxisRange, GraphSpec, TensorSpec

from .bench import Bench, nothing_left


@pytest.fixture
def spec() -> GraphSpec:
    """``double`` and ``total``: (batch, 3) float32 times two, and its sum along each row."""
    return GraphSpec(
        file="double.onnx",
        inputs=(TensorSpec("x", ("batch", 3), "float32"),),
        outputs=(TensorSpec("double", ("batch", 3), "float32"), TensorSpec("total", ("batch",), "float32")),
        axes={"batch": AxisRange(1, 2, 4)},
        opset=18,
    )


@pytest.fixture
def onnx_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes the graph of ``spec``; ``batch`` and ``width`` change its axes, ``names`` its outputs."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    def write(batch: str | int = "batch", width: str | int = 3, names: tuple[str, str] = ("double", "total")) -> Path:
        def value(name: str, *shape: str | int) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))

        nodes = [
            helper.make_node("Add", ["x", "x"], [names[0]]),
            helper.make_node("ReduceSum", ["x", "axes"], [names[1]], keepdims=0),
        ]
        axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
        # Outputs stand in another order than in the contract: names decide.
        outputs = [value(names[1], batch), value(names[0], batch, width)]
        graph = helper.make_graph(nodes, "double", [value("x", batch, width)], outputs, [axes])
        path = tmp_path / "double.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
        return path

    return write


@pytest.fixture(scope="module")
def quick_garbage_collection() -> Iterator[None]:
    """What was imported so far is not looked through again by every test."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def bench(quick_garbage_collection: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    bench = Bench(tmp_path, monkeypatch)
    yield bench
    for engine in bench.opened:
        engine.close()
    bench.opened.clear()
    gc.collect()
    nothing_left(bench.gpu)
