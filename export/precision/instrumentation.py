"""Instrumented copies of a graph: extra nodes, inputs and outputs for measuring, run by ONNX Runtime.

ONNX Runtime's optimizations are off, so that the graph is measured as it is written.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ...engines.ort_library import SILENT, onnxruntime
from ...errors import WsssError
from .lowering import all_values, name_nodes, settle

_NUMBERS = itertools.count()


def open_copy(source: ir.Model | Path) -> ir.Model:
    """Copy a graph for instrumentation: nodes named as in the source, constants as initializers, types inferred.

    Weights that were stored as float16 behind a Cast (`to_onnx`) are float32 initializers again. Tensors are shared with
    the source, not copied. Raises WsssError for a file that is not an ONNX graph.
    """
    if isinstance(source, Path):
        try:
            model = ir.load(source)
        except Exception as error:  # protobuf and onnx_ir raise their own classes for each way a file can be broken
            raise WsssError(f"{source}: expected an ONNX graph: {error}") from None
    else:
        model = clone(source)
    name_nodes(model)
    _restore_float32_weights(model)
    settle(model)
    return model


def clone(model: ir.Model) -> ir.Model:
    """An independent copy of a model; tensors are shared.

    ``ir.Model.clone`` shares the types of values, and setting a value's dtype writes into its type.
    """
    copy = model.clone()
    for value in all_values(copy.graph):
        if value.dtype is not None:
            value.type = ir.TensorType(value.dtype)
    return copy


def insert(before: ir.Node | None, graph: ir.Graph, op: str, inputs: Sequence[ir.Value | None], **attributes: object) -> ir.Value:
    """Insert a node before ``before``, or at the end when that is None, and return its output."""
    node = ir.node(op, inputs, attributes)
    place_node(node, before, graph)
    return node.outputs[0]


def place_node(node: ir.Node, before: ir.Node | None, graph: ir.Graph) -> None:
    """Insert a node before ``before``, or at the end when that is None, with names that no traced graph has."""
    node.name = f"instrument.{next(_NUMBERS)}"
    for place, value in enumerate(node.outputs):
        value.name = f"{node.name}.{place}"
    if before is None:
        graph.append(node)
    else:
        graph.insert_before(before, node)


def typed(value: ir.Value, *, like: ir.Value) -> ir.Value:
    """Give ``value`` the type and shape of another value, and return it."""
    value.type, value.shape = like.type, like.shape
    return value


class Session:
    """A graph in ONNX Runtime on the CPU, without optimization; a context manager that owns a temporary file of weights.

    Args:
        model: read, not changed.
        threads: 0 takes all cores.
    """

    def __init__(self, model: ir.Model, *, threads: int = 0) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="wsss-instrument-")
        path = Path(self._folder.name) / "graph.onnx"
        ir.save(model, path, external_data="weights.data")
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Run nodes in the order of the file. The default order goes backwards from the last output and would run nodes that
        # measure after the whole main path: for 40 measured nodes in a row it holds 49 tensors at once, this order holds 7.
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        options.intra_op_num_threads = threads
        options.log_severity_level = SILENT
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = tuple(each.name for each in self._session.get_inputs())
        self.outputs = tuple(each.name for each in self._session.get_outputs())

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph and return all outputs by name."""
        values = self._session.run(None, {name: feeds[name] for name in self.inputs})
        return dict(zip(self.outputs, values, strict=True))

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        del self._session
        self._folder.cleanup()


def _restore_float32_weights(model: ir.Model) -> None:
    graph = model.graph
    for node in list(graph):
        stored = node.inputs[0] if node.op_type == "Cast" else None
        if stored is None or stored.const_value is None or stored.dtype != ir.DataType.FLOAT16:
            continue
        if node.attributes["to"].as_int() != ir.DataType.FLOAT:
            continue
        restored = node.outputs[0]
        name = str(restored.name)
        weight = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=stored.shape)
        weight.const_value = ir.Tensor(stored.const_value.numpy().astype(np.float32), name=name)
        restored.replace_all_uses_with(weight)
        graph.remove(node, safe=True)
        graph.register_initializer(weight)
        if not stored.uses():
            del graph.initializers[str(stored.name)]
