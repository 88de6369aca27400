"""Multiply-adds of a graph, counted from the shapes of its tensors in a real run."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np
import onnx_ir as ir

from .instrumentation import Session, insert, open_copy

COUNTED = ("MatMul", "Gemm", "Conv", "ConvTranspose")
"""Ops that are counted. The others (norms, softmax, sampling) are bound by memory, not by arithmetic."""


def multiply_adds(source: ir.Model | Path, feeds: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Count the multiply-adds of each node of a `COUNTED` op, by node name; runs the graph once.

    Args:
        source: a graph of any precision.
        feeds: one array per input; they set the lengths of the free axes.
    """
    return count(open_copy(source), feeds)


def count(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Like `multiply_adds`, for a model from `open_copy`, which is changed."""
    graph, shape_names = model.graph, {}
    for node in [node for node in graph if node.op_type in COUNTED]:
        shapes = [insert(None, graph, "Shape", [value]) for value in (node.inputs[0], node.inputs[1], node.outputs[0])]
        for place, shape in enumerate(shapes):
            shape.name = f"{node.name}.shape{place}"
            shape.dtype = ir.DataType.INT64
        graph.outputs.extend(shapes)
        shape_names[node] = [str(shape.name) for shape in shapes]
    with Session(model) as session:
        outputs = session(feeds)
    return {str(node.name): _work(node, *(outputs[name].tolist() for name in names)) for node, names in shape_names.items()}


def float32_share(source: ir.Model | Path, feeds: Mapping[str, np.ndarray]) -> float:
    """Share of a half-precision graph's multiply-adds that it computes in FP32, in 0..1; runs the graph once."""
    work, model = multiply_adds(source, feeds), open_copy(source)
    in_fp32 = [str(node.name) for node in model.graph if node.outputs[0].dtype == ir.DataType.FLOAT]
    return sum(work.get(name, 0) for name in in_fp32) / max(sum(work.values()), 1)


def _work(node: ir.Node, first: list[int], second: list[int], out: list[int]) -> int:
    if node.op_type == "Conv":  # each output reads a kernel of (channels / group, *sides)
        return prod(out) * prod(second[1:])
    if node.op_type == "ConvTranspose":  # each input writes a kernel of (channels / group, *sides)
        return prod(first) * prod(second[1:])
    transposed = node.op_type == "Gemm" and "transA" in node.attributes and node.attributes["transA"].as_int()
    return prod(out) * first[0 if transposed else -1]
