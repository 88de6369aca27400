"""Sums inside long matrix products in half precision.

A GPU multiplies FP16 matrices in steps of `STEP` terms. It adds them in FP32, or in FP16 where that is faster (twice as fast on
an RTX 4090), and TensorRT may take either. A product between casts, Cast(FP32) -> MatMul -> Cast(FP16), is compiled to one kernel
that reads and writes FP16 and adds in FP32. ``lowering.lower`` writes this form for the products that `long_products` names.
BF16 is always added in FP32.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import numpy as np
import onnx_ir as ir

from .instrumentation import insert, typed

STEP = 16
"""Terms that a tensor core adds before it rounds the sum (the k of NVIDIA's ``mma.m16n8k16``)."""
LONG = 128
"""Terms of a long sum. From here on, sums in FP16 are at least twice as wrong as the rounding of the result alone. The error
grows with the square root of the length, to 5 times at 768 terms and 11 times at 4096
(``benchmarks/results/fp16-accumulation.json``)."""


def long_products(model: ir.Model) -> frozenset[str]:
    """Names of the products with weights whose sums are long (`LONG`).

    Products of two activations are left out: those of attention are parts of fused kernels, which casts would break up, and
    TensorRT does not fuse the casts of others (seen in TensorRT-RTX's compiled layers).
    """
    return frozenset(str(node.name) for node in model.graph if (shape := _weight_shape(node)) and shape[0] >= LONG)


def add_in_fp16(model: ir.Model, names: AbstractSet[str]) -> None:
    """Replace products by loops that round the sum to FP16 after every `STEP` terms, in place, for simulation.

    Args:
        model: float32, from `instrumentation.open_copy`.
        names: of `long_products`. The loops have the same names.
    """
    graph = model.graph
    for node in [node for node in graph if node.name in names]:
        _add_in_steps(graph, node)


def _weight_shape(node: ir.Node) -> tuple[int, int] | None:
    """(terms, results) of a product with a matrix of weights; None for other nodes."""
    if node.op_type not in ("MatMul", "Gemm") or (weight := node.inputs[1]) is None or weight.const_value is None:
        return None
    shape = tuple(int(side) for side in weight.const_value.shape)
    if len(shape) != 2 or _attribute(node, "transA"):
        return None
    return shape[::-1] if _attribute(node, "transB") else shape


def _attribute(node: ir.Node, name: str) -> int:
    return node.attributes[name].as_int() if name in node.attributes else 0


def _add_in_steps(graph: ir.Graph, node: ir.Node) -> None:
    shape, (terms, weight, *rest) = _weight_shape(node), node.inputs
    assert shape is not None and terms is not None and weight is not None and weight.const_value is not None
    length, width = shape
    step = max(step for step in range(1, STEP + 1) if length % step == 0)
    matrix = weight.const_value.numpy()
    matrix = matrix.T if _attribute(node, "transB") else matrix

    def constant(what: str, value: np.ndarray) -> ir.Value:
        tensor = ir.Tensor(value, name=f"{node.name}.{what}")
        made = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(value.shape), const_value=tensor)
        graph.register_initializer(made)
        return made

    rows = insert(node, graph, "Shape", [terms], end=-1)
    steps = constant("steps", np.array([length // step, step]))
    split = insert(node, graph, "Reshape", [terms, insert(node, graph, "Concat", [rows, steps], axis=0)])
    size = insert(node, graph, "Concat", [rows, constant("width", np.array([width]))], axis=0)
    zero = typed(insert(node, graph, "ConstantOfShape", [size], value=ir.Tensor(np.zeros(1, np.float32))), like=node.outputs[0])
    typed(split, like=terms).shape = None
    weights = constant("weights", np.ascontiguousarray(matrix.reshape(length // step, step, width)))
    loop = ir.node("Scan", [zero, split, weights], {"body": _step_of_the_sum(), "num_scan_inputs": 2, "scan_input_axes": [-2, 0]})
    graph.insert_before(node, loop)
    loop.name, loop.outputs[0].name = node.name, f"{node.name}.sum"
    result = typed(loop.outputs[0], like=node.outputs[0])
    if rest and rest[0] is not None:
        result = typed(insert(node, graph, "Add", [result, rest[0]]), like=node.outputs[0])
    name = node.outputs[0].name
    node.outputs[0].replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    result.name = name


def _step_of_the_sum() -> ir.Graph:
    """(sum so far, terms, weights) to the rounded sum."""
    total, terms, weights = (ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT)) for name in ("sum", "terms", "weights"))
    product = ir.node("MatMul", [terms, weights])
    added = ir.node("Add", [total, product.outputs[0]])
    half = ir.node("Cast", [added.outputs[0]], {"to": int(ir.DataType.FLOAT16)})
    rounded = ir.node("Cast", [half.outputs[0]], {"to": int(ir.DataType.FLOAT)})
    nodes = [product, added, half, rounded]
    for number, node in enumerate(nodes):
        node.name, node.outputs[0].name = f"step.{number}", f"step.{number}"
    rounded.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return ir.Graph([total, terms, weights], [rounded.outputs[0]], nodes=nodes, name="step", opset_imports={"": 18})
