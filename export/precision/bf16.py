"""A bfloat16 graph computed in float32 with bfloat16's rounding: for ONNX Runtime's CPU, which has no bfloat16 kernels.

The gate runs on this form of the very file that was written. Every value that is bfloat16 in the file is float32 here and
holds what bfloat16 can: the nodes' results are rounded by a Cast there and back. Sums inside of a node are in float32, as
they are in TensorRT's matrix products.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from .instrumentation import insert, typed
from .lowering import MOVES


def write_bf16_emulation(source: Path, folder: Path) -> Path:
    """Writes the widened form of a graph file, with weights of its own, into ``folder`` and returns its path."""
    model = ir.load(source)
    _widen(model.graph)
    ir.save(model, folder / source.name, external_data=f"{source.stem}.data")
    return folder / source.name


def _widen(graph: ir.Graph) -> None:
    narrow = {value for node in graph for value in node.outputs if value.dtype == ir.DataType.BFLOAT16}
    for constant in graph.initializers.values():
        if constant.dtype == ir.DataType.BFLOAT16:
            assert constant.const_value is not None
            constant.const_value = ir.Tensor(constant.const_value.numpy().astype(np.float32), name=constant.name)
            constant.type = ir.TensorType(ir.DataType.FLOAT)
    nodes = list(graph)
    for node, after in zip(nodes, [*nodes[1:], None], strict=True):
        for value in node.outputs:
            if value in narrow:
                _widen_result(graph, node, value, after)


def _widen_result(graph: ir.Graph, node: ir.Node, value: ir.Value, after: ir.Node | None) -> None:
    readers = list(value.uses())
    if node.op_type == "ConstantOfShape" and "value" in node.attributes:
        filler = node.attributes["value"].as_tensor().numpy().astype(np.float32)
        node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(filler))
    if node.op_type == "Cast":
        node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
    value.type = ir.TensorType(ir.DataType.FLOAT)
    if node.op_type in MOVES:  # of what is rounded already
        return
    rounded = typed(insert(after, graph, "Cast", [value], to=ir.DataType.BFLOAT16), like=value)
    rounded.type = ir.TensorType(ir.DataType.BFLOAT16)
    wide = typed(insert(after, graph, "Cast", [rounded], to=ir.DataType.FLOAT), like=value)
    for use in readers:
        use.node.replace_input_with(use.idx, wide)
