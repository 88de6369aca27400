"""Tracing a module into ONNX, and storing the weights of several graphs once.

Weights of all graphs of a model go to one file, each distinct tensor once: Grounding-DINO's graphs of different sizes
share theirs. A float32 tensor that float16 holds exactly (official CLIP, the mini models) is stored as float16 behind a
Cast: same numbers, half the bytes.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript import optimizer

from ..errors import WsssError
from ..spec import Precision, TensorSpec
from .deformable_plugin import define_plugin
from .family import Graph
from .precision.lowering import islands, lower, name_nodes

OPSET = 18
"""Newest opset whose GridSample every TensorRT reads right (TensorRT#4646); torch's default of 20 does not."""
INLINE_BYTES = 1024
"""Tensors up to this size stay in the graph file: they are constants, not weights."""
ALIGNMENT = 64
TRACED_ROWS = 3
"""Neither 0 nor 1, which torch.export specializes, nor a size that occurs in any model."""


class WeightFile:
    """One external data file, filled tensor by tensor; equal tensors share their bytes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at: dict[bytes, tuple[int, int]] = {}
        path.write_bytes(b"")

    def add(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        """Stores a tensor's bytes (once) and gives the reference to them."""
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
    """The float32 graph as torch.onnx traces it, its nodes named apart. Raises WsssError: an axis was fixed by tracing."""
    feeds = graph.sample(min(TRACED_ROWS, graph.axes[graph.row_axis].max), 0)
    arguments = tuple(_float32(torch.from_numpy(feeds[spec.name].copy())) for spec in graph.inputs)
    dims = {axis: torch.export.Dim(axis) for axis in graph.axes}
    shapes = tuple({place: dims[axis] for place, axis in enumerate(spec.shape) if isinstance(axis, str)} for spec in graph.inputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.onnx warns of its own deprecations
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
    _check_axes(graph.name, graph.inputs, model.graph.inputs)
    define_plugin(model)
    _free_output_names(model)
    name_nodes(model)
    return model


def _optimize(model: ir.Model) -> None:
    """onnxscript's optimizer, after what is repeated, constant or unused has gone: its rewrite rules try to match at each node
    they find, and two thirds of what torch.onnx writes are equal constants (Grounding-DINO mini: 34 s without, 9 s with)."""
    passes.CommonSubexpressionEliminationPass()(model)
    optimizer.fold_constants(model)
    optimizer.remove_unused_nodes(model)
    optimizer.optimize(model)


Chooser = Callable[[ir.Model, Graph], Mapping[str, str]]
"""(traced float32 model, its graph) to names of the nodes that stay FP32, with the reasons."""


def marked(model: ir.Model, graph: Graph) -> Mapping[str, str]:
    """The nodes that the graph's modules mark as FP32, see `precision.Fp32`."""
    return islands(model, graph.module)


def export_onnx(
    graph: Graph, path: Path, weights: WeightFile, *, precision: Precision = "fp32", choose: Chooser = marked
) -> dict[str, int]:
    """Writes ``graph`` to ``path``, its weights into ``weights``.

    Args:
        precision: of the arithmetic; in half precision, pass the graph with its half-precision contract (`Graph.at`).
        choose: says what stays FP32 in half precision.

    Returns:
        Why nodes of a half-precision graph stay FP32, and how many for each reason.

    Raises:
        WsssError: an axis that should be free was fixed by tracing.
    """
    model = trace(graph)
    kept: Mapping[str, str] = {}
    if precision != "fp32":
        kept = choose(model, graph)
        specs = (*graph.inputs, *graph.outputs)
        lower(model, precision, kept.keys(), {spec.name: spec.dtype for spec in specs})
    _store_weights(model, weights)
    _strip(model, types=precision != "bf16")  # onnx cannot infer those of bfloat16, which opset 18 does not list for Conv
    ir.save(model, path)
    return dict(Counter(kept.values()))


def _float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _strip(model: ir.Model, *, types: bool) -> None:
    """Drops what computes nothing: stack traces with the paths of the machine that traced, and the ``types`` of inner values,
    a third of a small graph's file, which every runtime infers again."""
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
    """Renames inner values that tracing gave an output's name (``aten.embedding`` beside an output "embedding")."""
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
