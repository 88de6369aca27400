"""Graphs opened up for measuring: a copy is given more inputs and outputs, and ONNX Runtime computes it as it is written.

No optimization is allowed to change a copy: what is measured is the graph, not what a runtime makes of it.
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
from .lowering import name_nodes, settle

_NUMBERS = itertools.count()


def open_copy(source: ir.Model | Path) -> ir.Model:
    """A copy to be taken apart: nodes named as in the source, constants as initializers, types inferred.

    Weights that were stored as float16 behind a Cast (`to_onnx`) are float32 initializers again. Tensors are shared with
    the source, not copied. Raises WsssError for a file that is no ONNX graph.
    """
    if isinstance(source, Path):
        try:
            model = ir.load(source)
        except Exception as error:  # protobuf and onnx_ir raise their own classes for each way a file can be broken
            raise WsssError(f"{source}: expected an ONNX graph: {error}") from None
    else:
        model = clone(source)
    name_nodes(model)
    _widen_stored_weights(model)
    settle(model)
    return model


def clone(model: ir.Model) -> ir.Model:
    """A copy that can be changed without touching the other; tensors are shared.

    ``ir.Model.clone`` shares the types of values, and setting a value's dtype writes into its type.
    """
    copy = model.clone()
    for value in (*copy.graph.inputs, *copy.graph.initializers.values(), *(each for node in copy.graph for each in node.outputs)):
        if value.dtype is not None:
            value.type = ir.TensorType(value.dtype)
    return copy


def insert(before: ir.Node | None, graph: ir.Graph, op: str, inputs: Sequence[ir.Value | None], **attributes: object) -> ir.Value:
    """The output of a new node, put in front of ``before``; at the end when that is None."""
    node = ir.node(op, inputs, attributes)
    place_node(node, before, graph)
    return node.outputs[0]


def place_node(node: ir.Node, before: ir.Node | None, graph: ir.Graph) -> None:
    """Puts a node in front of ``before``, or at the end when that is None, under names that no traced graph has."""
    number = next(_NUMBERS)
    node.name = f"probe.{number}"
    for place, value in enumerate(node.outputs):
        value.name = f"probe.{number}.{place}"
    if before is None:
        graph.append(node)
    else:
        graph.insert_before(before, node)


def typed(value: ir.Value, *, like: ir.Value) -> ir.Value:
    """``value`` with the type and shape of another."""
    value.type, value.shape = like.type, like.shape
    return value


class Session:
    """ONNX Runtime on the CPU over a graph, without optimization; a context manager, because large weights pass by a file.

    Args:
        model: read, not changed.
        threads: 0 takes all cores.
    """

    def __init__(self, model: ir.Model, *, threads: int = 0) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="wsss-probe-")
        path = Path(self._folder.name) / "graph.onnx"
        ir.save(model, path, external_data="weights.data")
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        # In the order of the file. The default goes backwards from the last output, and what measures a tensor beside the
        # main path would run after all of it: 40 nodes in a row, each measured, hold 49 tensors at once, so 7.
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        options.intra_op_num_threads = threads
        options.log_severity_level = SILENT
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = tuple(each.name for each in self._session.get_inputs())
        self.outputs = tuple(each.name for each in self._session.get_outputs())

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs, by name."""
        values = self._session.run(None, {name: feeds[name] for name in self.inputs})
        return dict(zip(self.outputs, values, strict=True))

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        del self._session
        self._folder.cleanup()


def _widen_stored_weights(model: ir.Model) -> None:
    graph = model.graph
    for node in list(graph):
        stored = node.inputs[0] if node.op_type == "Cast" else None
        if stored is None or stored.const_value is None or stored.dtype != ir.DataType.FLOAT16:
            continue
        if node.attributes["to"].as_int() != ir.DataType.FLOAT:
            continue
        wide = node.outputs[0]
        name = str(wide.name)
        weight = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=stored.shape)
        weight.const_value = ir.Tensor(stored.const_value.numpy().astype(np.float32), name=name)
        wide.replace_all_uses_with(weight)
        graph.remove(node, safe=True)
        graph.register_initializer(weight)
        if not stored.uses():
            del graph.initializers[str(stored.name)]
