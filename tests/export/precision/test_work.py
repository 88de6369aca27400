"""Multiply-adds, against formulas written by hand."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from wsss.export.precision.instrumentation import clone, open_copy
from wsss.export.precision.lowering import lower
from wsss.export.precision.work import float32_share, multiply_adds

TEXT = """<ir_version: 10, opset_import: ["": 18]>
g (float[B, 4, H, 10] x, float[B, 3, 5] rows)
=> (float[B, 6, H2, 5] conv, float[B, 4, H3, 20] up, float[B, 3, 7] product, float[5, 7] g)
<float[6, 2, 3, 3] kernel, float[4, 2, 2, 2] spread, float[5, 7] matrix, float[3, 5] tall, float[7, 3] flat>
{
    [conv] conv = Conv<group = 2, strides = [2, 2], pads = [1, 1, 1, 1]>(x, kernel)
    [up] up = ConvTranspose<group = 2, strides = [2, 2]>(x, spread)
    [matmul] product = MatMul(rows, matrix)
    [gemm] g = Gemm<transA = 1, transB = 1>(tall, flat)
    [cheap] unused = Exp(product)
}"""
SHAPES = {"kernel": (6, 2, 3, 3), "spread": (4, 2, 2, 2), "matrix": (5, 7), "tall": (3, 5), "flat": (7, 3)}


def model() -> ir.Model:
    proto = onnx.parser.parse_model(TEXT.replace("\n<float", " <float"))
    for initializer in list(proto.graph.initializer):
        proto.graph.initializer.remove(initializer)
    for name, shape in SHAPES.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))
    return ir.from_proto(proto)


def test_each_op_counts_what_its_shapes_say() -> None:
    source = model()
    feeds = {"x": np.ones((2, 4, 8, 10), np.float32), "rows": np.ones((2, 3, 5), np.float32)}
    assert multiply_adds(source, feeds) == {
        "conv": 2 * 6 * (4 * 5) * (2 * 3 * 3),  # each of the outputs reads two channels of nine cells
        "up": 2 * 4 * (8 * 10) * (2 * 2 * 2),  # each of the inputs writes two channels of four cells
        "matmul": 2 * 3 * 5 * 7,
        "gemm": 5 * 3 * 7,
    }
    assert [value.name for value in source.graph.outputs] == ["conv", "up", "product", "g"]  # the source is as it was


def test_free_axes_count_as_they_are_fed() -> None:
    one, four = (
        multiply_adds(model(), {"x": np.ones((rows, 4, 8, 10), np.float32), "rows": np.ones((rows, 3, 5), np.float32)})
        for rows in (1, 4)
    )
    assert {name: four[name] / one[name] for name in one} == {"conv": 4, "up": 4, "matmul": 4, "gemm": 1}


def test_what_stays_float32_is_told_apart_from_what_was_lowered() -> None:
    source = open_copy(model())
    lower(source, "fp16", {"matmul", "cheap"}, dict.fromkeys(("x", "rows", "conv", "up", "product", "g"), "float32"))
    feeds = {"x": np.ones((1, 4, 8, 10), np.float32), "rows": np.ones((1, 3, 5), np.float32)}
    conv, up, product, gemm = 6 * 20 * 18, 4 * 80 * 8, 3 * 5 * 7, 5 * 3 * 7
    assert float32_share(source, feeds) == product / (conv + up + product + gemm)


def test_a_copy_has_types_of_its_own() -> None:
    source = open_copy(model())
    copy = clone(source)
    for value in (*copy.graph.inputs, *copy.graph.initializers.values(), *(each for node in copy.graph for each in node.outputs)):
        value.dtype = ir.DataType.FLOAT16
    assert {value.dtype for node in source.graph for value in node.outputs} == {ir.DataType.FLOAT}
    assert {value.dtype for value in source.graph.inputs} == {ir.DataType.FLOAT}
