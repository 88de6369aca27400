"""Trace once for all canvases: the graphs of two canvases differ only in numbers.

Tracing Grounding-DINO takes a minute for each canvas. Its graphs have the same nodes on every canvas, with other lengths in the
shapes of reshapes, slices and paddings, and other constants (masks of windows, positions of cells). So a module is traced on a
canvas whose lengths occur nowhere else in the model (`tracing_canvas`), and in a copy of the graph each length is replaced by
that of another canvas. Constants that depend on the canvas are buffers of the module, and are replaced by their names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from torch import nn

Canvas = tuple[int, int]
Lengths = Callable[[Canvas], tuple[Mapping[str, int], Collection[int]]]
"""Of a graph on a canvas (height, width): all lengths that depend on it, by names that are the same for every canvas; and the
amounts of padding, which are 0 where the graph of this canvas alone would have no node for it."""
TRIED_SIDES = 1000
FLOAT_LENGTHS = 64
"""Lengths in float32 constants are in small tables, of (width, height) by level."""


def tracing_canvas(lengths: Lengths, taken: Collection[int], *, start: int, multiple_of: int) -> Canvas | None:
    """A canvas whose lengths differ from each other and from all of ``taken``; None if there is none.

    Lengths that are equal on every canvas (the height after one stage and before the next) may be equal here.

    Args:
        lengths: no amount of padding is 0 on the canvas, so that every padding is in the graph.
        taken: the numbers in the graph that do not depend on the canvas.
        start: the smallest side to try, px. multiple_of: of the sides, px.
    """
    others = set(taken)

    def different_names(samples: list[Canvas]) -> list[str]:
        found = [lengths(sample)[0] for sample in samples]
        always_equal: dict[tuple[int, ...], str] = {}
        for name in found[0]:
            always_equal.setdefault(tuple(each[name] for each in found), name)
        return list(always_equal.values())

    def fits(canvas: Canvas, names: list[str]) -> bool:
        found, paddings = lengths(canvas)
        values = {found[name] for name in names}
        return all(paddings) and len(values) == len(names) and not values & others

    samples = [(multiple_of * (300 + 37 * number), multiple_of * (401 + 53 * number)) for number in range(16)]
    of_square, of_any = different_names([(height, height) for height, _ in samples]), different_names(samples)
    sides: list[int] = []
    for side in range(start, start + TRIED_SIDES * multiple_of, multiple_of):
        if fits((side, side), of_square):
            for other in sides:
                if fits((other, side), of_any):
                    return other, side
            sides.append(side)
    return None


class Template:
    """One trace for the graphs of a module on several canvases.

    Args:
        lengths: see `Lengths`.
        canvas: of the trace, see `tracing_canvas`.
    """

    def __init__(self, lengths: Lengths, canvas: Canvas) -> None:
        self.lengths, self.canvas = lengths, canvas
        self._traced: ir.Model | None = None

    def at(self, canvas: Canvas, module: nn.Module, trace: Callable[[], ir.Model]) -> ir.Model:
        """The graph of ``module``, which is for ``canvas``; ``trace`` traces the module for this template's canvas."""
        if self._traced is None:
            self._traced = trace()
        (old, _), (new, _) = self.lengths(self.canvas), self.lengths(canvas)
        return with_lengths(self._traced, {old[name]: new[name] for name in old}, dict(module.named_buffers()))


def with_lengths(traced: ir.Model, lengths: Mapping[int, int], buffers: Mapping[str, object]) -> ir.Model:
    """A copy of a graph with other lengths, and the tensors of ``buffers`` for the constants of their names."""
    model = traced.clone()
    graph = model.graph
    inner = [output for node in graph.all_nodes() for output in node.outputs]
    for value in (*graph.inputs, *graph.initializers.values(), *inner):
        if value.dtype is not None:
            value.type = ir.TensorType(value.dtype)  # a clone shares it, and lowering to half precision changes it
    for value in (*graph.inputs, *inner):
        if value.shape is not None:
            value.shape = ir.Shape([_replaced(dim, lengths) for dim in value.shape])
    for name, value in graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if name in buffers:
            value.const_value = ir.tensor(buffers[name].numpy(), name=name)  # type: ignore[attr-defined]
        elif is_of_lengths(tensor):
            numbers = tensor.numpy()
            replaced = [lengths.get(int(number), int(number)) for number in numbers.flatten()]
            value.const_value = ir.tensor(np.array(replaced, numbers.dtype).reshape(numbers.shape), name=name)
        value.shape = ir.Shape(value.const_value.shape)
    _set_paddings(graph)
    remove_paddings_by_nothing(graph)
    _remove_slices_of_all(graph)
    return model


def _replaced(dim: int | ir.SymbolicDim, lengths: Mapping[int, int]) -> int | str | None:
    """A dimension with other lengths; those of free axes are products, as ``64*batch``."""
    if isinstance(dim, int):
        return lengths.get(dim, dim)
    if dim.value is None:
        return None
    return re.sub(r"\b\d+\b", lambda found: str(lengths.get(int(found[0]), int(found[0]))), dim.value)


def is_of_lengths(tensor: ir.TensorProtocol) -> bool:
    """Whether a constant can contain lengths: integers, or a small table of whole numbers."""
    if tensor.dtype in (ir.DataType.INT64, ir.DataType.INT32):
        return True
    if tensor.dtype != ir.DataType.FLOAT or tensor.size > FLOAT_LENGTHS or len(tensor.shape) < 2:
        return False
    numbers = tensor.numpy()
    return bool((numbers == numbers.round()).all())


def _set_paddings(graph: ir.Graph) -> None:
    """Pad each axis at its end by what its output is longer."""
    for node in list(graph):
        if node.op_type != "Pad":
            continue
        data, amount = node.inputs[0], node.inputs[1]
        assert data is not None and data.shape is not None and node.outputs[0].shape is not None and amount is not None
        sizes = zip(data.shape, node.outputs[0].shape, strict=True)
        added = [after - before if isinstance(after, int) and isinstance(before, int) else 0 for before, after in sizes]
        pads = ir.Value(name=f"{node.outputs[0].name}.pads", type=amount.type, shape=ir.Shape([2 * len(added)]))
        pads.const_value = ir.tensor(np.array([0] * len(added) + added, np.int64), name=pads.name)
        graph.register_initializer(pads)
        node.replace_input_with(1, pads)


def remove_paddings_by_nothing(graph: ir.Graph) -> None:
    """Remove paddings of photographs and windows that already fit; tracing writes some of them."""
    for node in list(graph):
        pads = node.inputs[1].const_value if node.op_type == "Pad" and node.inputs[1] is not None else None
        if pads is not None and not pads.numpy().any():
            _bypass(graph, node)


def _remove_slices_of_all(graph: ir.Graph) -> None:
    for node in list(graph):
        if node.op_type != "Slice":
            continue
        starts, ends, axes, steps = (None if each is None else each.const_value for each in (*node.inputs[1:], None)[:4])
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        if shape is None or starts is None or ends is None or axes is None:
            continue
        lengths = [shape[axis] for axis in axes.numpy()]
        whole = [isinstance(length, int) and end >= length for length, end in zip(lengths, ends.numpy(), strict=True)]
        if all(whole) and not starts.numpy().any() and (steps is None or (steps.numpy() == 1).all()):
            _bypass(graph, node)


def _bypass(graph: ir.Graph, node: ir.Node) -> None:
    assert node.inputs[0] is not None
    node.outputs[0].replace_all_uses_with(node.inputs[0])
    graph.remove(node, safe=True)


def same_nodes(one: Path, other: Path) -> bool:
    """Whether two graph files have the same nodes, apart from paddings and slices of what fits already.

    If so, they treat the rows of a batch alike: they differ in lengths and constants only.
    """
    first, second = (_nodes(onnx.load(path, load_external_data=False)) for path in (one, other))
    return first == second


def _nodes(model: onnx.ModelProto) -> list[object]:
    """Each node's operator, attributes, and the nodes that it reads."""
    at: dict[str, object] = {value.name: value.name for value in model.graph.input}
    nodes: list[object] = []
    for node in model.graph.node:
        if node.op_type in ("Pad", "Slice") and node.input[0] in at:
            at[node.output[0]] = at[node.input[0]]
            continue
        attributes = sorted(attribute.SerializeToString() for attribute in node.attribute)
        nodes.append((node.domain, node.op_type, attributes, [at.get(name) for name in node.input]))
        for number, name in enumerate(node.output):
            at[name] = (len(nodes), number)
    return nodes
