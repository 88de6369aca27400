"""Emulation of a bfloat16 graph in float32, for ONNX Runtime's CPU, which has no bfloat16 kernels.

The gate runs the emulation of the file that was written. Every value that is bfloat16 in the file is float32 here, and each
node's result is rounded to bfloat16 by a Cast there and back. Sums inside a node are in float32, as they are in TensorRT's
matrix products.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from .instrumentation import insert, typed
from .lowering import MOVES


def write_bf16_emulation(source: Path, folder: Path) -> Path:
    """Write the emulation of a graph file, with its own weights file, into ``folder`` and return its path."""
    model = ir.load(source)
    _emulate_bf16(model.graph)
    ir.save(model, folder / source.name, external_data=f"{source.stem}.data")
    return folder / source.name


def _emulate_bf16(graph: ir.Graph) -> None:
    bf16_values = {value for node in graph for value in node.outputs if value.dtype == ir.DataType.BFLOAT16}
    for constant in graph.initializers.values():
        if constant.dtype == ir.DataType.BFLOAT16:
            assert constant.const_value is not None
            constant.const_value = ir.Tensor(constant.const_value.numpy().astype(np.float32), name=constant.name)
            constant.type = ir.TensorType(ir.DataType.FLOAT)
    nodes = list(graph)
    for node, after in zip(nodes, [*nodes[1:], None], strict=True):
        for value in node.outputs:
            if value in bf16_values:
                _emulate_result(graph, node, value, after)


def _emulate_result(graph: ir.Graph, node: ir.Node, value: ir.Value, after: ir.Node | None) -> None:
    readers = list(value.uses())
    if node.op_type == "ConstantOfShape" and "value" in node.attributes:
        filler = node.attributes["value"].as_tensor().numpy().astype(np.float32)
        node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(filler))
    if node.op_type == "Cast":
        node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
    value.type = ir.TensorType(ir.DataType.FLOAT)
    if node.op_type in MOVES:  # its inputs are rounded already
        return
    rounded = typed(insert(after, graph, "Cast", [value], to=ir.DataType.BFLOAT16), like=value)
    rounded.type = ir.TensorType(ir.DataType.BFLOAT16)
    emulated = typed(insert(after, graph, "Cast", [rounded], to=ir.DataType.FLOAT), like=value)
    for use in readers:
        use.node.replace_input_with(use.idx, emulated)
