"""Deformable attention as one node for TensorRT's plugin, with an equivalent ONNX function for all other runtimes.

The node calls `MultiscaleDeformableAttnPlugin_TRT`, an ONNX function in the same file. ONNX Runtime, the parity gate and
TensorRT-RTX, which has no plugins, compute that function. For the full TensorRT the builder removes the function before it
parses the graph (`plugin_called`), so that the parser looks for the plugin of that name.

The plugin's contract is that of NVIDIA/TensorRT, plugin/multiscaleDeformableAttnPlugin/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from onnxscript import script
from onnxscript.values import Opset
from torch import Tensor

DOMAIN = "trt.plugins"
PLUGIN = "MultiscaleDeformableAttnPlugin_TRT"
VERSIONS = ("2", "1")
"""Versions of the plugin, newest first: 1 is deprecated since TensorRT 10.11, 2 computes the same."""
_opset = Opset(DOMAIN, 1)


def plugin_sampled(values: Tensor, places: Tensor, weights: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Add the node to a graph that is being traced; it computes nothing in torch.

    Args:
        values: (B, N, heads, d) float32, the cells of all levels.
        places: (B, Q, heads, L, P, 2) float32, x and y in 0..1 of each level.
        weights: (B, Q, heads, L, P) float32.
        shapes: (height, width) of each level.

    Returns:
        (B, Q, heads, d) float32.
    """
    starts = [sum(height * width for height, width in shapes[:level]) for level in range(len(shapes))]
    inputs = (values, torch.tensor(shapes, dtype=torch.int32), torch.tensor(starts, dtype=torch.int32), places, weights)
    shape = (values.shape[0], places.shape[1], *values.shape[2:])
    sampled: Tensor = torch.onnx.ops.symbolic(f"{DOMAIN}::{PLUGIN}", inputs, dtype=values.dtype, shape=shape, version=1)
    return sampled


@script(_opset, default_opset=op)
def MultiscaleDeformableAttnPlugin_TRT(values, shapes, starts, places, weights):  # type: ignore[no-untyped-def]
    """The plugin's computation: bilinear samples, 0 outside a level, summed with their weights.

    Args: those of the plugin: values (B, N, heads, d) float32, shapes (L, 2) int32 (height, width), starts (L,) int32,
        the first cell of each level, places (B, Q, heads, L, P, 2) and weights (B, Q, heads, L, P) float32.

    Returns: (B, Q, heads, d) float32.
    """
    sides = op.Cast(op.Gather(shapes, op.Constant(value_ints=[1, 0]), axis=1), to=1)
    sides = op.Unsqueeze(sides, op.Constant(value_ints=[1]))  # (L, 1, 2): width, height
    at = places * sides - op.Constant(value_float=0.5)  # in cells
    at = op.Unsqueeze(at, op.Constant(value_ints=[-2]))  # (B, Q, heads, L, P, 1, 2)
    corners = op.Reshape(op.Constant(value_floats=[0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0]), op.Constant(value_ints=[4, 2]))
    corner = op.Floor(at) + corners  # (B, Q, heads, L, P, 4, 2)
    near = op.ReduceProd(op.Constant(value_float=1.0) - op.Abs(corner - at), op.Constant(value_ints=[-1]), keepdims=0)
    last = op.Unsqueeze(sides, op.Constant(value_ints=[1])) - op.Constant(value_float=1.0)  # (L, 1, 1, 2)
    inside = op.Max(op.Min(corner, last), op.Constant(value_float=0.0))
    outside = op.ReduceMax(op.Abs(corner - inside), op.Constant(value_ints=[-1]), keepdims=0)  # 0 for cells of the level
    share = op.Where(outside > op.Constant(value_float=0.0), op.Constant(value_float=0.0), near)
    share = share * op.Unsqueeze(weights, op.Constant(value_ints=[-1]))  # (B, Q, heads, L, P, 4)
    # ---- index of each corner in the values, as (B N heads, d) ----
    cell = op.Cast(inside, to=7)
    width = op.Cast(op.Unsqueeze(op.Slice(shapes, [1], [2], [1]), op.Constant(value_ints=[1])), to=7)  # (L, 1, 1)
    start = op.Cast(op.Unsqueeze(starts, op.Constant(value_ints=[1, 2])), to=7)  # (L, 1, 1)
    row = op.Gather(cell, 1, axis=-1) * width + op.Gather(cell, 0, axis=-1) + start
    batch, cells, heads = op.Shape(values, start=0, end=1), op.Shape(values, start=1, end=2), op.Shape(values, start=2, end=3)
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    image = op.Unsqueeze(op.Range(zero, op.Squeeze(batch), one), op.Constant(value_ints=[1, 2, 3, 4, 5]))
    head = op.Unsqueeze(op.Range(zero, op.Squeeze(heads), one), op.Constant(value_ints=[1, 2, 3]))
    row = (row + image * cells) * heads + head
    # ---- read and sum ----
    listed = op.Concat(op.Shape(places, start=0, end=3), op.Constant(value_ints=[-1]), axis=0)  # B, Q, heads, 4 L P
    width_of_head = op.Shape(values, start=3)
    flat = op.Reshape(values, op.Concat(op.Constant(value_ints=[-1]), width_of_head, axis=0))
    read = op.Gather(flat, op.Reshape(row, listed), axis=0)  # (B, Q, heads, 4 L P, d)
    share = op.Unsqueeze(op.Reshape(share, listed), op.Constant(value_ints=[3]))
    return op.Squeeze(op.MatMul(share, read), op.Constant(value_ints=[3]))


def define_plugin(model: ir.Model) -> None:
    """Add the function to a model that calls it, in place."""
    if any(node.domain == DOMAIN for node in model.graph):
        function = ir.serde.deserialize_function(MultiscaleDeformableAttnPlugin_TRT.to_function_proto())
        model.functions[function.identifier()] = function
        model.opset_imports.setdefault(DOMAIN, 1)


def plugin_called(path: Path, version: str) -> bytes | None:
    """Serialize a graph file without the function, with calls that request a plugin version; None for a file without calls.

    Weights stay in their separate file, to which the result refers.
    """
    model = onnx.load(path, load_external_data=False)
    calls = [node for node in model.graph.node if node.domain == DOMAIN]
    if not calls:
        return None
    del model.functions[:]
    for node in calls:
        node.attribute.append(onnx.helper.make_attribute("plugin_version", version))
    data: bytes = model.SerializeToString()
    return data
