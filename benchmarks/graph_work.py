"""Multiply-adds and weight bytes of a call of a graph, from its file and the shapes of its inputs.

ONNX infers the shapes and the graph is not run: a SAM ViT-H takes a second. `wsss.export.precision.work` counts the same node by
node in a real run; the tests compare the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from ..errors import WsssError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """Cost of one call."""

    multiply_adds: int
    """Multiply-adds of matrix products and convolutions; all other nodes are bound by memory."""
    weight_bytes: int
    """Size of the weights as stored; a call reads them once."""


def work_of(path: Path, feeds: Mapping[str, np.ndarray]) -> Work:
    """Multiply-adds and weights of a graph for feeds of these shapes.

    Raises:
        WsssError: the file is not an ONNX graph, or the shape of a product depends on values; the message names the tensor.
        ImportError: onnx is not installed.
    """
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises many classes for damaged files
        raise WsssError(f"{path}: expected an ONNX graph: {error}") from None
    for value in model.graph.input:
        for dim, length in zip(value.type.tensor_type.shape.dim, feeds[value.name].shape, strict=True):
            dim.dim_value = length
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")  # named axes would stop the shape inference
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes: dict[str, Shape] = {}
    for value in (*inferred.value_info, *inferred.input, *inferred.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            shapes[value.name] = tuple(dim.dim_value for dim in dims)
    weights = 0
    for tensor in inferred.initializer:
        shapes[tensor.name] = tuple(tensor.dims)
        weights += prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    try:
        counted = sum(_multiply_adds(node, shapes) for node in inferred.node)
    except KeyError as error:
        raise WsssError(f"{path}: the shape of {error.args[0]!r} cannot be inferred without running the graph") from None
    return Work(counted, weights)


def _multiply_adds(node: object, shapes: Mapping[str, Shape]) -> int:
    op, inputs, outputs = node.op_type, node.input, node.output  # type: ignore[attr-defined]
    if op == "Conv":  # each output reads a kernel of (channels / group, *sides)
        return prod(shapes[outputs[0]]) * prod(shapes[inputs[1]][1:])
    if op == "ConvTranspose":  # each input writes a kernel of (channels / group, *sides)
        return prod(shapes[inputs[0]]) * prod(shapes[inputs[1]][1:])
    if op == "MatMul":
        return prod(shapes[outputs[0]]) * shapes[inputs[0]][-1]
    if op == "Gemm":
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)  # type: ignore[attr-defined]
        return prod(shapes[outputs[0]]) * shapes[inputs[0]][0 if transposed else -1]
    return 0
