"""Sums of long products: which are long, how they are simulated, and that they are added in FP32 where the tolerance needs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from wsss.export.family import Tolerance
from wsss.export.precision.accumulation import LONG, STEP, add_in_fp16, long_products
from wsss.export.precision.instrumentation import Session, open_copy
from wsss.export.precision.lowering import lower
from wsss.export.precision.search import AIM, Diagnosis, diagnose

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
WIDTH = 24


def value(name: str, *shape: int | str, constant: np.ndarray | None = None) -> ir.Value:
    tensor = None if constant is None else ir.Tensor(constant.astype(np.float32), name=name)
    return ir.Value(name=name, type=ir.TensorType(FLOAT), shape=ir.Shape(shape), const_value=tensor)


def half_numbers(*shape: int, seed: int) -> np.ndarray:
    """Numbers that FP16 represents exactly, so that only sums and results are rounded."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float16).astype(np.float32)


def product(op: str, length: int, *, bias: bool = False, **attributes: int) -> tuple[ir.Model, np.ndarray, np.ndarray]:
    """y = x @ weights (+ bias), of (N, ``length``); its weights and its bias."""
    weights, offset = half_numbers(length, WIDTH, seed=1), half_numbers(WIDTH, seed=2) * bias
    stored = weights.T if attributes.get("transB") else weights
    x, w, b = value("x", "N", length), value("w", *stored.shape, constant=stored), value("b", WIDTH, constant=offset)
    node = ir.node(op, [x, w, *([b] if bias else [])], attributes, name="product")
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(FLOAT), ir.Shape(["N", WIDTH])
    constants = [w, *([b] if bias else [])]
    graph = ir.Graph([x], [y], nodes=[node], initializers=constants, opset_imports={"": 18}, name="g")
    return ir.Model(graph, ir_version=10), weights, offset


def sums_in_fp16(x: np.ndarray, weights: np.ndarray, step: int) -> np.ndarray:
    total = np.zeros((len(x), weights.shape[1]), np.float16)
    for start in range(0, len(weights), step):
        part = slice(start, start + step)
        total = (total.astype(np.float32) + x[:, part] @ weights[part]).astype(np.float16)
    return total.astype(np.float32)


@pytest.mark.parametrize(
    ("op", "attributes", "bias", "length", "step"),
    [
        ("MatMul", {}, False, 512, STEP),
        ("MatMul", {}, False, 196, 14),
        ("Gemm", {}, False, 256, STEP),
        ("Gemm", {"transB": 1}, True, 256, STEP),
    ],
)
def test_sums_are_rounded_after_every_step(op: str, attributes: dict[str, int], bias: bool, length: int, step: int) -> None:
    source, weights, offset = product(op, length, bias=bias, **attributes)
    model = open_copy(source)
    assert long_products(model) == {"product"}
    add_in_fp16(model, {"product"})
    x = half_numbers(40, length, seed=3)
    with Session(model) as session:
        (got,) = session({"x": x}).values()
    exact = x.astype(np.float64) @ weights + offset
    expected = sums_in_fp16(x, weights, step) + offset
    # The order of the terms within a step may change the last digit of a sum.
    assert np.linalg.norm(got - expected) < 0.1 * np.linalg.norm(exact - expected)
    error, rounding = (np.linalg.norm(each - exact) for each in (got, exact.astype(np.float16)))
    assert error > 2 * rounding if length >= LONG else error > rounding


def test_long_products_have_weights_and_many_terms() -> None:
    assert not long_products(open_copy(product("MatMul", LONG - 1)[0]))
    assert not long_products(open_copy(product("Gemm", 2 * LONG, transA=1)[0]))
    two = value("a", "N", 512), value("b", 512, 8)
    node = ir.node("MatMul", two, name="attention")
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(FLOAT)
    graph = ir.Graph(list(two), list(node.outputs), nodes=[node], opset_imports={"": 18}, name="g")
    assert not long_products(open_copy(ir.Model(graph, ir_version=10)))


@pytest.mark.parametrize("taken", ["float32", "float16"])
@pytest.mark.parametrize(("op", "bias"), [("MatMul", False), ("Gemm", True)])
def test_a_product_between_casts_reads_half_and_adds_in_float32(op: str, bias: bool, taken: str) -> None:
    source, weights, offset = product(op, 256, bias=bias)
    model = open_copy(source)
    lower(model, "fp16", frozenset(), {"x": "float16", "y": taken}, frozenset({"product"}))
    nodes = {node.op_type: node for node in model.graph if node.op_type != "Cast"}
    multiplies = nodes[op]
    assert len(multiplies.inputs) == 2 and {each.dtype for each in (*multiplies.inputs, *multiplies.outputs) if each} == {FLOAT}
    for each in multiplies.inputs:
        assert each is not None
        cast = each.producer()
        assert cast is not None and cast.op_type == "Cast" and cast.inputs[0] is not None and cast.inputs[0].dtype == HALF
    (cast,) = [use.node for use in multiplies.outputs[0].uses()]
    assert cast.op_type == "Cast" and cast.outputs[0].dtype == HALF
    assert ("Add" in nodes) == bias and (not bias or nodes["Add"].outputs[0].dtype == HALF)
    assert [(each.name, each.dtype) for each in model.graph.outputs] == [("y", HALF if taken == "float16" else FLOAT)]
    x = half_numbers(8, 256, seed=4)
    with Session(model) as session:
        got = session({"x": x.astype(np.float16)})["y"]
    np.testing.assert_allclose(got, x @ weights + offset, rtol=1e-3, atol=0.05)


def test_a_reader_in_float32_gets_the_cast_result_too() -> None:
    """Otherwise TensorRT multiplies in FP32, too, instead of adding in it."""
    source, _, _ = product("MatMul", 256)
    (y,) = source.graph.outputs
    reader = ir.node("Exp", [y], name="reader")
    reader.outputs[0].name, reader.outputs[0].type = "z", ir.TensorType(FLOAT)
    source.graph.append(reader)
    source.graph.outputs[0] = reader.outputs[0]
    model = open_copy(source)
    lower(model, "fp16", frozenset({"reader"}), {"x": "float16", "z": "float32"}, frozenset({"product"}))
    nodes = {str(node.name): node for node in model.graph}
    assert nodes["reader"].inputs[0] is not None and nodes["reader"].inputs[0].dtype == FLOAT
    assert [(use.node.op_type, use.node.outputs[0].dtype) for use in nodes["product"].outputs[0].uses()] == [("Cast", HALF)]


@pytest.mark.parametrize(("allowed", "needed"), [(2e-3, True), (2e-2, False)])
def test_the_search_asks_for_float32_sums_where_the_tolerance_needs_them(allowed: float, needed: bool) -> None:
    """Sums of 4096 terms are 2e-3 wrong in FP16, the rounded result 2e-4."""
    source = product("MatMul", 4096)[0]
    found = searched(source, [half_numbers(16, 4096, seed=5)], allowed)
    assert not found.keep and found.after["y"][0] < 4e-4 < found.in_fp16_sums["y"][0] < 4e-3
    assert (found.in_fp16_sums["y"][0] > AIM * allowed) == needed
    assert found.fp32_accumulation == ({"product"} if needed else set())
    assert ("1 products of 128 and more terms add in FP32" in found.report()) == needed


def test_bfloat16_needs_no_choice_of_sums() -> None:
    found = searched(product("MatMul", 4096)[0], [half_numbers(4, 4096, seed=6)], 1e-2, half="bf16")
    assert not found.fp32_accumulation and not found.in_fp16_sums


def searched(source: ir.Model, feeds: Sequence[np.ndarray], allowed: float, **options: str) -> Diagnosis:
    tolerance = {"y": Tolerance(relative=allowed, why="test")}
    return diagnose(source, [{"x": x} for x in feeds], tolerance, float16={"x"}, threads=1, **options)  # type: ignore[arg-type]


def test_tensorrt_fuses_the_casts(tmp_path: Path) -> None:
    """The same kernels, reading the same bytes, as without the casts; with the bias inside the product they would stand alone."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install 'wsss[trt-rtx]'")
    kernels = {}
    for name, accumulation in (("half", set[str]()), ("fp32", {"product", "other"})):
        model = open_copy(product("Gemm", 768, bias=True)[0])
        weights = value("v", 768, WIDTH, constant=half_numbers(768, WIDTH, seed=9))
        other = ir.node("MatMul", [model.graph.inputs[0], weights], name="other")  # TensorRT joins products of one input
        other.outputs[0].name, other.outputs[0].type, other.outputs[0].shape = "z", ir.TensorType(FLOAT), ir.Shape(["N", WIDTH])
        model.graph.register_initializer(weights)
        model.graph.append(other)
        model.graph.outputs.append(other.outputs[0])
        lower(model, "fp16", frozenset(), dict.fromkeys("xyz", "float16"), frozenset(accumulation))
        ir.save(model, tmp_path / f"{name}.onnx")
        kernels[name] = compiled_kernels(tmp_path / f"{name}.onnx", rows=64)
    assert sum(moved for _, moved in kernels["fp32"]) <= 1.02 * sum(moved for _, moved in kernels["half"])
    assert "Float" not in str(kernels["fp32"])


def compiled_kernels(path: Path, rows: int) -> list[tuple[str, int]]:
    """Kind with largest tensor, and bytes, of each kernel that a graph with the input x (N, 768) is compiled to."""
    import tensorrt_rtx as trt

    from wsss.benchmarks.compiled import _kernel
    from wsss.export.to_engine import build_logger

    log = build_logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(str(path)), log.errors
    network.get_input(0).shape = (rows, 768)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    assert builder.build_serialized_network(network, config) is not None
    return [(f"{kind} {largest}", moved) for kind, largest, moved in map(_kernel, log.layers)]
