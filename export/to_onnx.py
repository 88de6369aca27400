"""Tracing of modules to ONNX, with one weights file for all graphs of a model.

Each distinct tensor is stored once: Grounding-DINO's graphs of different sizes share their weights. A float32 tensor that
float16 represents exactly (official CLIP, the mini models) is stored as float16 behind a Cast: same numbers, half the bytes.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript import optimizer

from ..errors import WsssError
from ..spec import Precision, TensorSpec
from .canvases import remove_paddings_by_nothing
from .deformable_plugin import define_plugin
from .family import Graph
from .precision.accumulation import long_products
from .precision.lowering import fp32_nodes, lower, name_nodes

OPSET = 18
"""Newest opset whose GridSample every TensorRT reads correctly (TensorRT#4646), unlike that of torch's default, 20."""
INLINE_BYTES = 1024
"""Tensors up to this size stay in the graph file: they are constants, not weights."""
ALIGNMENT = 64
TRACED_ROWS = 3
"""Not 0 or 1, for which torch.export specializes, nor a size that occurs in any model."""


class WeightFile:
    """An external data file that grows tensor by tensor; equal tensors share their bytes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at: dict[bytes, tuple[int, int]] = {}
        path.write_bytes(b"")

    def add(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        """Store a tensor's bytes, unless they are in the file already, and return a reference to them."""
        data = tensor.tobytes()
        key = hashlib.sha256(data).digest()
        if key not in self._at:
            with self._path.open("ab") as file:
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                self._at[key] = (file.tell(), len(data))
                file.write(data)
        offset, length = self._at[key]
        return ir.ExternalTensor(
            self._path.name,
            offset,
            length,
            tensor.dtype,
            shape=ir.Shape(tensor.shape),
            name=tensor.name or "",
            base_dir=self._path.parent,
        )


def trace(graph: Graph) -> ir.Model:
    """Trace the float32 graph with torch.onnx; node names are unique. Graphs with one `Template` are traced once.

    Raises:
        WsssError: tracing fixed a free axis.
    """
    if (template := graph.template) is None:
        return _trace(graph)
    return template.shared.at(template.canvas, graph.module, lambda: _trace(template.graph()))


def _trace(graph: Graph) -> ir.Model:
    feeds = graph.sample(min(TRACED_ROWS, graph.axes[graph.row_axis].max), 0)
    arguments = tuple(_float32(torch.from_numpy(feeds[spec.name].copy())) for spec in graph.inputs)
    dims = {axis: torch.export.Dim(axis) for axis in graph.axes}
    shapes = tuple({place: dims[axis] for place, axis in enumerate(spec.shape) if isinstance(axis, str)} for spec in graph.inputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.onnx uses what torch has deprecated
        program = torch.onnx.export(
            graph.module.eval(),
            arguments,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            input_names=[spec.name for spec in graph.inputs],
            output_names=[spec.name for spec in graph.outputs],
            optimize=False,
            verbose=False,
        )
    assert program is not None
    model = program.model
    _optimize(model)
    remove_paddings_by_nothing(model.graph)
    _check_axes(graph.name, graph.inputs, model.graph.inputs)
    define_plugin(model)
    _free_output_names(model)
    name_nodes(model)
    return model


def _optimize(model: ir.Model) -> None:
    """Run onnxscript's optimizer, after removing repeated, constant and unused nodes: its rewrite rules try to match at every
    node, and two thirds of what torch.onnx writes are equal constants (Grounding-DINO mini: 9 s instead of 34 s)."""
    passes.CommonSubexpressionEliminationPass()(model)
    optimizer.fold_constants(model)
    optimizer.remove_unused_nodes(model)
    optimizer.optimize(model)


@dataclass(frozen=True, slots=True)
class Fp32Choice:
    """What a half-precision graph computes in FP32.

    nodes: reasons by name, of nodes that stay FP32. accumulation: names of the products that add in FP32.
    """

    nodes: Mapping[str, str]
    accumulation: frozenset[str] = frozenset()


Chooser = Callable[[ir.Model, Graph], Fp32Choice]
"""(traced float32 model, its graph) to what it computes in FP32 once it is lowered."""


def marked(model: ir.Model, graph: Graph) -> Fp32Choice:
    """The nodes that the graph's modules mark with `Fp32`."""
    return Fp32Choice(fp32_nodes(model, graph.module))


def marked_with_accumulation(model: ir.Model, graph: Graph) -> Fp32Choice:
    """The nodes of `marked`, and the accumulation of all long products."""
    nodes = fp32_nodes(model, graph.module)
    return Fp32Choice(nodes, long_products(model) - nodes.keys())


def export_onnx(
    graph: Graph, path: Path, weights: WeightFile, *, precision: Precision = "fp32", choose: Chooser = marked
) -> tuple[dict[str, int], int]:
    """Write ``graph`` to ``path`` and its weights to ``weights``.

    Args:
        precision: of the arithmetic; in half precision, pass the graph with its half-precision contract (`Graph.at`).
        choose: selects the nodes that stay FP32 in half precision.

    Returns:
        The reasons why nodes of a half-precision graph stay FP32, with the number of nodes for each; how many products add in
        FP32.

    Raises:
        WsssError: an axis that should be free was fixed by tracing.
    """
    model = trace(graph)
    in_fp32 = Fp32Choice({})
    if precision != "fp32":
        in_fp32 = choose(model, graph)
        io = {spec.name: spec.dtype for spec in (*graph.inputs, *graph.outputs)}
        lower(model, precision, in_fp32.nodes.keys(), io, in_fp32.accumulation)
    _store_weights(model, weights)
    _strip(model, types=precision != "bf16")  # onnx cannot infer bfloat16 for Conv, where opset 18 does not allow it
    ir.save(model, path)
    return dict(Counter(in_fp32.nodes.values())), len(in_fp32.accumulation)


def _float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _strip(model: ir.Model, *, types: bool) -> None:
    """Remove metadata: stack traces, which contain paths of this machine, and the ``types`` of inner values, which are a third
    of a small graph's file and which every runtime infers again."""
    model.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if types and not value.is_graph_output():
                value.type, value.shape = None, None


def _check_axes(name: str, specs: tuple[TensorSpec, ...], inputs: object) -> None:
    for spec, value in zip(specs, inputs, strict=True):  # type: ignore[call-overload]
        for axis, dim in zip(spec.shape, value.shape, strict=True):
            if isinstance(axis, str) == isinstance(dim, int):
                raise WsssError(f"{name}: tracing gave {spec.name} the shape {value.shape}, expected {spec.shape}")


def _free_output_names(model: ir.Model) -> None:
    """Rename inner values to which tracing gave an output's name (``aten.embedding`` beside an output "embedding")."""
    outputs = {value.name: value for value in model.graph.outputs}
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value.name in outputs and value is not outputs[value.name]:
                value.name = f"{value.name}.inner"


def _store_weights(model: ir.Model, weights: WeightFile) -> None:
    graph = model.graph
    for initializer in list(graph.initializers.values()):
        tensor = initializer.const_value
        if tensor is None or tensor.nbytes <= INLINE_BYTES:
            continue
        half = _half_exactly(tensor)
        if half is None:
            initializer.const_value = weights.add(tensor)
            continue
        name = str(initializer.name)
        stored = ir.Value(name=f"{name}.half", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape(half.shape))
        stored.const_value = weights.add(ir.Tensor(half, name=f"{name}.half"))
        cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT}, name=f"{name}.cast")
        cast.outputs[0].type, cast.outputs[0].shape = initializer.type, initializer.shape
        initializer.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
        del graph.initializers[name]
        cast.outputs[0].name = name
        graph.register_initializer(stored)
        graph.insert_before(graph[0], cast)


def _half_exactly(tensor: ir.TensorProtocol) -> np.ndarray | None:
    if tensor.dtype != ir.DataType.FLOAT:
        return None
    values = tensor.numpy()
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), values) else None
