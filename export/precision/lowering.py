"""FP16 and BF16 graphs: strongly typed, lowered from the FP32 graph that has passed the gate.

One mechanism serves all: every floating-point value becomes half but those of *islands*, nodes that stay FP32. Islands come
from the modules themselves (`Fp32`, each with its reason), from the values of a graph's constants, and from the precision
doctor, which measures. Casts stand in the graph, so TensorRT 10, TensorRT 11, TensorRT-RTX and ONNX Runtime all
compute the same thing; no builder flag decides anything.
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
"""Where torch.onnx notes the modules that a node was traced from."""

MOVES = frozenset(
    {"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten", "Slice", "Split", "Concat", "Expand", "Identity", "Tile"}
    | {"Gather", "GatherElements", "GatherND", "DepthToSpace", "SpaceToDepth"}
)
"""Ops that only move values: they stay FP32 between two islands, so that nothing is rounded on the way."""
TAKES_ANY = frozenset({"Cast", "Shape", "Size"})
"""Ops whose input may be of either type."""
LACKING = {ir.DataType.FLOAT16: frozenset({PLUGIN}), ir.DataType.BFLOAT16: frozenset({PLUGIN, "ConvTranspose"})}
"""Ops that stay FP32: TensorRT has no kernel in the type (TensorRT-RTX 1.7: "Could not infer output types"), or one that takes
coordinates in it."""
FIXED_FLOAT = {"Resize": (2,)}
"""Inputs that ONNX itself demands as float32: (op, places)."""


class Fp32(nn.Module):
    """What is called in here stays FP32 in a half-precision graph.

    Args:
        inner: a module or function of tensors.
        why: the reason, for readers and for the report.
    """

    def __init__(self, inner: Callable[..., object], *, why: str) -> None:
        super().__init__()
        self.inner, self.why = inner, why

    def forward(self, *arguments: object) -> object:
        return self.inner(*arguments)


def islands(model: ir.Model, module: nn.Module) -> dict[str, str]:
    """Names of the nodes of a traced model that lie inside an `Fp32` of the module it was traced from, with the reasons."""
    found, parts = {}, dict(module.named_modules())
    for node in model.graph:
        for path in ast.literal_eval(node.metadata_props.get(SCOPES, "[]")):  # modules from the root down, then the op itself
            part = parts.get(path)
            if isinstance(part, Fp32):
                found[str(node.name)] = part.why
                break
    return found


def name_nodes(model: ir.Model) -> None:
    """Gives every node a name of its own: islands are told by name."""
    seen: set[str] = set()
    for number, node in enumerate(model.graph):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{number}"
        seen.add(node.name)


def lower(model: ir.Model, half: Half, keep: AbstractSet[str], io: Mapping[str, str]) -> None:
    """Turn a float32 model into a half-precision one, in place.

    Args:
        model: all its floating-point values float32, without subgraphs; its nodes named apart (`name_nodes`).
        half: fp16 or bf16.
        keep: names of the nodes that stay FP32.
        io: dtypes of the graph's inputs and outputs by name, of those that are floating point: float32 or float16.

    Raises:
        WsssError: ``keep`` names a node that is not there.
    """
    names = {str(node.name) for node in model.graph}
    if keep - names:
        raise WsssError(f"precision: the graph has no node {sorted(keep - names)[0]!r}")
    settle(model)
    _Lowering(model, half, keep, io).run()


def settle(model: ir.Model) -> None:
    """Makes all constants initializers and infers every type, in place."""
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    ShapeInferencePass()(model)


class Widths:
    """Which nodes of a float32 model compute in FP32 once it is lowered: what `lower` goes by, and the precision doctor.

    Args:
        model: as for `lower`, its constants lifted and its types inferred (`settle`).
        half: fp16 or bf16.
    """

    def __init__(self, model: ir.Model, half: Half) -> None:
        self.graph, self.half = model.graph, TYPES[half]
        self.floats = {value for value in _values(model.graph) if value.dtype == ir.DataType.FLOAT}
        """All floating-point values."""
        self.forced = {node for node in self.graph if self._needs_float32(node)}
        """Nodes that stay FP32 whatever is asked."""

    def float32_nodes(self, keep: AbstractSet[str]) -> set[ir.Node]:
        """Nodes that compute in FP32 when those named in ``keep`` are to."""
        wide = self.forced | {node for node in self.graph if node.name in keep}
        return wide | self._moves_between(wide)

    def _needs_float32(self, node: ir.Node) -> bool:
        """Whether the op is none in half, a constant of the node is lost, or it turns whole numbers into floating point."""
        if node.op_type in LACKING[self.half]:
            return True
        if node.op_type == "Cast":
            source = node.inputs[0]
            assert source is not None
            # Counts and coordinates beyond 2,048 have no exact half; pixels (uint8) and masks (bool) have.
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

    def _moves_between(self, islands: set[ir.Node]) -> set[ir.Node]:
        """Moving nodes whose inputs and some reader are FP32."""
        wanted: set[ir.Node] = set()
        for node in reversed(self.graph):
            if node.op_type in MOVES and node.outputs[0] in self.floats:
                readers = {use.node for value in node.outputs for use in value.uses()}
                if readers & islands or readers & wanted:
                    wanted.add(node)
        between: set[ir.Node] = set()
        for node in self.graph:
            if node in wanted:
                sources = [value for value in node.inputs if value in self.floats]
                if all(v.producer() in islands or v.producer() in between or v.const_value is not None for v in sources):
                    between.add(node)
        return between


class _Lowering:
    def __init__(self, model: ir.Model, half: Half, keep: AbstractSet[str], io: Mapping[str, str]) -> None:
        widths = Widths(model, half)
        self.graph, self.half, self.io, self.floats = model.graph, widths.half, io, widths.floats
        self.wide = widths.float32_nodes(keep)
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        outputs = list(self.graph.outputs)
        for value in self.graph.inputs:
            if value in self.floats:
                value.dtype = ir.DataType.FLOAT if self.io[str(value.name)] == "float32" else ir.DataType.FLOAT16
        for node in list(self.graph):
            self._convert(node)
        for place, value in enumerate(outputs):
            if value in self.floats:
                self._convert_output(place, value)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses():
                del self.graph.initializers[name]

    def _convert(self, node: ir.Node) -> None:
        wide = node in self.wide
        fixed = FIXED_FLOAT.get(node.op_type, ())
        target = ir.DataType.FLOAT if wide else self.half
        for place, value in enumerate(node.inputs):
            if value is None or value not in self.floats or node.op_type in TAKES_ANY:
                continue
            node.replace_input_with(place, self._as(value, ir.DataType.FLOAT if place in fixed else target))
        for value in node.outputs:
            if value in self.floats:
                value.dtype = target
        if not wide and any(value in self.floats for value in node.outputs):
            self._retype_attributes(node)

    def _retype_attributes(self, node: ir.Node) -> None:
        if node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", int(self.half))
        elif node.op_type == "ConstantOfShape":
            value = node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1, np.float32)
            node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(_rounded(value, self.half), dtype=self.half))

    def _as(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """The value in the wanted type: itself, a rounded copy of a constant, or a Cast that all its readers share."""
        if value.dtype == wanted:
            return value
        key = (value, wanted)
        if key not in self.casts:
            self.casts[key] = self._copied(value, wanted) if value.const_value is not None else self._cast(value, wanted)
        return self.casts[key]

    def _copied(self, constant: ir.Value, wanted: ir.DataType) -> ir.Value:
        assert constant.const_value is not None
        copy = ir.Value(name=f"{constant.name}.half", type=ir.TensorType(wanted), shape=constant.shape)
        copy.const_value = ir.Tensor(_rounded(constant.const_value.numpy(), wanted), dtype=wanted, name=copy.name)
        self.graph.register_initializer(copy)
        return copy

    def _cast(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        name = f"{value.name}.{wanted.name.lower()}"
        cast = ir.node("Cast", [value], {"to": int(wanted)}, name=name)
        cast.outputs[0].name, cast.outputs[0].type, cast.outputs[0].shape = name, ir.TensorType(wanted), value.shape
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], cast)
        else:
            self.graph.insert_after(producer, cast)
        return cast.outputs[0]

    def _convert_output(self, place: int, value: ir.Value) -> None:
        wanted = ir.DataType.FLOAT if self.io[str(value.name)] == "float32" else ir.DataType.FLOAT16
        if value.dtype == wanted:
            return
        name = str(value.name)
        value.name = f"{name}.uncast"  # not .inner: tracing may have given that to another (`to_onnx`)
        made = self._as(value, wanted)
        made.name = name
        self.graph.outputs[place] = made


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
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
