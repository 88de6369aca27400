"""Lowering of a traced FP32 graph to a strongly typed FP16 or BF16 graph.

Every floating-point value becomes half precision except in a short list of nodes that stay FP32. That list comes from the
modules (`Fp32`, each with its reason), from constants that half precision cannot represent, and from the measurements of
`search`. Casts are part of the graph, so that TensorRT 10, TensorRT 11, TensorRT-RTX and ONNX Runtime all compute the same
thing, independent of builder flags.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass
from torch import nn

from ...errors import WsssError
from ..deformable_plugin import PLUGIN

Half = Literal["fp16", "bf16"]
TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
SCOPES = "pkg.torch.onnx.name_scopes"
"""Node metadata in which torch.onnx records the modules that a node was traced from."""

MOVES = frozenset(
    {"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten", "Slice", "Split", "Concat", "Expand", "Identity", "Tile"}
    | {"Gather", "GatherElements", "GatherND", "DepthToSpace", "SpaceToDepth"}
)
"""Ops that only move values: between two FP32 nodes they stay FP32, so that nothing is rounded on the way."""
TAKES_ANY = frozenset({"Cast", "Shape", "Size"})
"""Ops whose input may be of either type."""
LACKING = {ir.DataType.FLOAT16: frozenset({PLUGIN}), ir.DataType.BFLOAT16: frozenset({PLUGIN, "ConvTranspose"})}
"""Ops that stay FP32, by type: TensorRT has no kernel for the type (TensorRT-RTX 1.7: "Could not infer output types"), or its
kernel would also read coordinates in it."""
FIXED_FLOAT = {"Resize": (2,)}
"""Positions of the inputs that ONNX requires as float32, by op."""


class Fp32(nn.Module):
    """Wraps a module or function whose nodes stay FP32 in a half-precision graph.

    Args:
        inner: a module or function of tensors.
        why: the reason, for readers and for the report.
    """

    def __init__(self, inner: Callable[..., object], *, why: str) -> None:
        super().__init__()
        self.inner, self.why = inner, why

    def forward(self, *arguments: object) -> object:
        return self.inner(*arguments)


def fp32_nodes(model: ir.Model, module: nn.Module) -> dict[str, str]:
    """Find the nodes that were traced from an `Fp32`.

    Args:
        model: traced from ``module``.

    Returns:
        The reason (`Fp32.why`) by node name.
    """
    reasons, modules = {}, dict(module.named_modules())
    for node in model.graph:
        for path in ast.literal_eval(node.metadata_props.get(SCOPES, "[]")):  # modules from the root down, then the op itself
            if isinstance(wrapper := modules.get(path), Fp32):
                reasons[str(node.name)] = wrapper.why
                break
    return reasons


def name_nodes(model: ir.Model) -> None:
    """Give every node a unique name, in place: the nodes that stay FP32 are listed by name."""
    seen: set[str] = set()
    for number, node in enumerate(model.graph):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{number}"
        seen.add(node.name)


def lower(
    model: ir.Model, half: Half, keep: AbstractSet[str], io: Mapping[str, str], fp32_accumulation: AbstractSet[str] = frozenset()
) -> None:
    """Turn a float32 model into a half-precision one, in place.

    Args:
        model: all its floating-point values are float32, it has no subgraphs, and its node names are unique (`name_nodes`).
        half: fp16 or bf16.
        keep: names of the nodes that stay FP32.
        io: dtypes of the floating-point inputs and outputs by name: float32 or float16.
        fp32_accumulation: names of products (`accumulation.long_products`) that add in FP32 what they read in half precision:
            Cast -> MatMul or Gemm -> Cast.

    Raises:
        WsssError: ``keep`` or ``fp32_accumulation`` names a node that the graph does not have.
    """
    names = {str(node.name) for node in model.graph}
    if unknown := (keep | fp32_accumulation) - names:
        raise WsssError(f"precision: the graph has no node {sorted(unknown)[0]!r}")
    for node in [node for node in model.graph if node.name in fp32_accumulation and len(node.inputs) > 2]:
        _split_bias(model.graph, node)
    settle(model)
    _Lowering(model, half, keep, io, fp32_accumulation).run()


def _split_bias(graph: ir.Graph, gemm: ir.Node) -> None:
    """Add the bias of a Gemm in a node of its own: with it inside, TensorRT would not fuse the casts around the product."""
    biased, bias = gemm.outputs[0], gemm.inputs[2]
    product = ir.Value(name=f"{biased.name}.product", type=ir.TensorType(ir.DataType.FLOAT), shape=biased.shape)
    gemm.resize_inputs(2)
    unbiased = ir.Node(gemm.domain, gemm.op_type, gemm.inputs, list(gemm.attributes.values()), outputs=[product], name=gemm.name)
    graph.insert_before(gemm, unbiased)
    add = ir.node("Add", [product, bias], name=f"{gemm.name}.bias")
    graph.insert_before(gemm, add)
    result = add.outputs[0]
    biased.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(gemm, safe=True)
    result.name, result.type, result.shape = biased.name, biased.type, biased.shape


def settle(model: ir.Model) -> None:
    """Make all constants initializers and infer every type, in place."""
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    ShapeInferencePass()(model)


class NodePrecisions:
    """Decides which nodes of a float32 model compute in FP32 once it is lowered; shared by `lower` and `simulation`.

    Args:
        model: as for `lower`, after `settle`.
        half: fp16 or bf16.
    """

    def __init__(self, model: ir.Model, half: Half) -> None:
        self.graph, self.half = model.graph, TYPES[half]
        self.floats = {value for value in all_values(model.graph) if value.dtype == ir.DataType.FLOAT}
        """All floating-point values."""
        self.forced = {node for node in self.graph if self._needs_float32(node)}
        """Nodes that always stay FP32."""

    def fp32_nodes(self, keep: AbstractSet[str]) -> set[ir.Node]:
        """All nodes that compute in FP32 when those named in ``keep`` stay FP32."""
        fp32 = self.forced | {node for node in self.graph if node.name in keep}
        return fp32 | self._moves_between(fp32)

    def _needs_float32(self, node: ir.Node) -> bool:
        """Whether half has no kernel for the op, would lose a constant of it, or the op turns integers into floating point."""
        if node.op_type in LACKING[self.half]:
            return True
        if node.op_type == "Cast":
            source = node.inputs[0]
            assert source is not None
            # Half cannot represent counts and coordinates beyond 2,048 exactly; it can represent pixels (uint8) and masks (bool).
            return source.dtype in (ir.DataType.INT64, ir.DataType.INT32) and node.outputs[0] in self.floats
        if node.op_type == "Range":
            return node.outputs[0] in self.floats
        for place, value in enumerate(node.inputs):
            if value is None or value not in self.floats or value.const_value is None:
                continue
            if place in FIXED_FLOAT.get(node.op_type, ()):
                continue
            if _is_lost(value.const_value, self.half):
                return True
        return False

    def _moves_between(self, fp32: set[ir.Node]) -> set[ir.Node]:
        """Nodes of `MOVES` with FP32 inputs and at least one FP32 reader."""
        before: set[ir.Node] = set()
        for node in reversed(self.graph):
            if node.op_type in MOVES and node.outputs[0] in self.floats:
                readers = {use.node for value in node.outputs for use in value.uses()}
                if readers & (fp32 | before):
                    before.add(node)
        between: set[ir.Node] = set()
        for node in self.graph:
            if node in before:
                sources = [value for value in node.inputs if value in self.floats]
                if all(v.producer() in fp32 or v.producer() in between or v.const_value is not None for v in sources):
                    between.add(node)
        return between


class _Lowering:
    def __init__(
        self, model: ir.Model, half: Half, keep: AbstractSet[str], io: Mapping[str, str], fp32_accumulation: AbstractSet[str]
    ) -> None:
        precisions = NodePrecisions(model, half)
        self.graph, self.half, self.io, self.floats = model.graph, precisions.half, io, precisions.floats
        self.fp32_nodes = precisions.fp32_nodes(keep)
        self.fp32_accumulation = fp32_accumulation
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        for value in self.graph.inputs:
            if value in self.floats:
                value.dtype = self._io_dtype(value)
        for node in list(self.graph):
            self._convert(node)
        for place, value in enumerate(list(self.graph.outputs)):
            if value in self.floats:
                self._convert_output(place, value)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses():
                del self.graph.initializers[name]

    def _convert(self, node: ir.Node) -> None:
        is_fp32 = node in self.fp32_nodes
        if node.name in self.fp32_accumulation and not is_fp32:
            self._add_in_fp32(node)
            return
        fixed = FIXED_FLOAT.get(node.op_type, ())
        target = ir.DataType.FLOAT if is_fp32 else self.half
        for place, value in enumerate(node.inputs):
            if value is None or value not in self.floats or node.op_type in TAKES_ANY:
                continue
            node.replace_input_with(place, self._as(value, ir.DataType.FLOAT if place in fixed else target))
        for value in node.outputs:
            if value in self.floats:
                value.dtype = target
        if not is_fp32 and any(value in self.floats for value in node.outputs):
            self._retype_attributes(node)

    def _add_in_fp32(self, node: ir.Node) -> None:
        """Put casts around a product.

        All are its own, and its result is cast even for readers in FP32. Otherwise TensorRT would multiply in FP32, too: it joins
        products that share an input before it looks for the casts.
        """
        for place, value in enumerate(node.inputs):
            assert value is not None
            wide = self._cast(self._as(value, self.half), ir.DataType.FLOAT, before=node)
            wide.name = f"{node.name}.{place}.float"
            node.replace_input_with(place, wide)
        total = node.outputs[0]
        readers, places = list(total.uses()), [place for place, each in enumerate(self.graph.outputs) if each is total]
        total.dtype = ir.DataType.FLOAT
        result = self._cast(total, self.half)
        result.name, total.name = total.name, f"{total.name}.sum"
        self.floats.add(result)
        for use in readers:
            use.node.replace_input_with(use.idx, result)
        for place in places:
            self.graph.outputs[place] = result

    def _retype_attributes(self, node: ir.Node) -> None:
        if node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", int(self.half))
        elif node.op_type == "ConstantOfShape":
            value = node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1, np.float32)
            node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(_rounded(value, self.half), dtype=self.half))

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The value in ``dtype``: itself, a rounded copy of a constant, or a Cast that all its readers share."""
        if value.dtype == dtype:
            return value
        key = (value, dtype)
        if key not in self.casts:
            self.casts[key] = self._copied(value, dtype) if value.const_value is not None else self._cast(value, dtype)
        return self.casts[key]

    def _copied(self, constant: ir.Value, dtype: ir.DataType) -> ir.Value:
        assert constant.const_value is not None
        copy = ir.Value(name=f"{constant.name}.half", type=ir.TensorType(dtype), shape=constant.shape)
        copy.const_value = ir.Tensor(_rounded(constant.const_value.numpy(), dtype), dtype=dtype, name=copy.name)
        self.graph.register_initializer(copy)
        return copy

    def _cast(self, value: ir.Value, dtype: ir.DataType, *, before: ir.Node | None = None) -> ir.Value:
        name = f"{value.name}.{dtype.name.lower()}"
        cast = ir.node("Cast", [value], {"to": int(dtype)}, name=name)
        cast.outputs[0].name, cast.outputs[0].type, cast.outputs[0].shape = name, ir.TensorType(dtype), value.shape
        producer = value.producer()
        if before is not None:
            self.graph.insert_before(before, cast)
        elif producer is None:
            self.graph.insert_before(self.graph[0], cast)
        else:
            self.graph.insert_after(producer, cast)
        return cast.outputs[0]

    def _convert_output(self, place: int, value: ir.Value) -> None:
        dtype, name = self._io_dtype(value), str(value.name)
        if value.dtype == dtype:
            return
        value.name = f"{name}.uncast"  # not .inner: `to_onnx` may have given that name to another value
        converted = self._as(value, dtype)
        converted.name = name
        self.graph.outputs[place] = converted

    def _io_dtype(self, value: ir.Value) -> ir.DataType:
        return ir.DataType.FLOAT if self.io[str(value.name)] == "float32" else ir.DataType.FLOAT16


def all_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Inputs, initializers and results of all nodes."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _rounded(values: np.ndarray, half: ir.DataType) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float16 if half == ir.DataType.FLOAT16 else ml_dtypes.bfloat16)


def _is_lost(tensor: ir.TensorProtocol, half: ir.DataType) -> bool:
    """Whether rounding makes a finite value infinite, or a small constant (an epsilon) zero."""
    values = tensor.numpy()
    rounded = _rounded(values, half).astype(np.float32)
    if (np.isfinite(values) & ~np.isfinite(rounded)).any():
        return True
    return values.size <= 16 and bool(((values != 0) & (rounded == 0)).any())
