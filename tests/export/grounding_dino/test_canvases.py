"""One trace for all canvases: the graphs are those that would have been traced alone."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import onnx_ir as ir
import pytest

from wsss.export.canvases import same_nodes, tracing_canvas
from wsss.export.family import Graph, Sampling
from wsss.export.grounding_dino import family as grounding_dino
from wsss.export.grounding_dino import weights as grounding_dino_weights
from wsss.export.grounding_dino.graphs import lengths_of, other_numbers
from wsss.export.to_onnx import WeightFile, export_onnx, trace
from wsss.spec import AxisRange

from .toy import toy

CANVASES = ((112, 112), (148, 92))
"""Windows that fit, and windows and merged cells that need padding."""


@cache  # the trace that they share
def graphs_of(sampling: Sampling, two_products: bool) -> list[Graph]:
    model = grounding_dino_weights.seeded(lambda: toy(window=7, depths=(2, 2), encoder_layers=1), 0)
    made = grounding_dino.image_graphs(model, CANVASES, AxisRange(1, 2, 3), grounding_dino.FULL.margin, sampling, two_products)
    return [make() for make in made]


def listed(model: ir.Model) -> list[object]:
    """The nodes of a graph in order, with constants in the place of their names, and all shapes."""
    at: dict[ir.Value, object] = {value: number for number, value in enumerate(model.graph.inputs)}
    nodes: list[object] = [[str(value.shape) for value in model.graph.inputs]]

    def read(value: ir.Value | None) -> object:
        if value is None or value.const_value is None or value.producer() is not None:
            return value if value is None else at[value]
        tensor = value.const_value
        return str(tensor.dtype), tuple(tensor.shape), str(value.shape), tensor.tobytes()

    for node in model.graph:
        attributes = sorted((name, str(attribute)) for name, attribute in node.attributes.items())
        nodes.append((node.domain, node.op_type, attributes, [read(value) for value in node.inputs]))
        nodes.append([str(value.shape) for value in node.outputs])
        for number, value in enumerate(node.outputs):
            at[value] = len(nodes), number
    return [*nodes, [at[value] for value in model.graph.outputs]]


@pytest.mark.parametrize(
    ("sampling", "two_products", "compared"),
    [
        ("grid-sample", False, slice(1, 2)),
        pytest.param("grid-sample", True, slice(0, 1), marks=pytest.mark.slow),
        pytest.param("gather", True, slice(2), marks=pytest.mark.slow),
        pytest.param("plugin", True, slice(2), marks=pytest.mark.slow),
    ],
)
def test_a_shared_trace_gives_the_graphs_of_separate_ones(sampling: Sampling, two_products: bool, compared: slice) -> None:
    for graph in graphs_of(sampling, two_products)[compared]:
        assert graph.template is not None
        assert listed(trace(graph)) == listed(trace(replace(graph, template=None))), graph.name


def test_a_canvas_in_half_precision_leaves_the_others_alone(tmp_path: Path) -> None:
    first, second = graphs_of("grid-sample", False)
    before = [str(value.type) for node in trace(second).graph for value in node.outputs]
    export_onnx(first.at("fp16"), tmp_path / "first.onnx", WeightFile(tmp_path / "weights.data"), precision="fp16")
    assert [str(value.type) for node in trace(second).graph for value in node.outputs] == before


def test_the_lengths_of_the_traced_canvas_occur_nowhere_else() -> None:
    model = grounding_dino_weights.seeded(lambda: toy(window=7, depths=(2, 2), encoder_layers=1), 0)
    others = other_numbers(model)
    canvas = tracing_canvas(lambda canvas: lengths_of(model, canvas), others, start=400, multiple_of=4)
    assert canvas is not None
    lengths, paddings = lengths_of(model, canvas)
    assert not set(lengths.values()) & others and 0 not in paddings and not any(side % 4 for side in canvas)
    by_length: dict[int, list[str]] = {}
    for name, length in lengths.items():
        by_length.setdefault(length, []).append(name)
    for other in (canvas, (800, 1344), (1024, 1024), (1088, 800)):
        found, _ = lengths_of(model, other)
        assert list(found) == list(lengths)
        assert all(len({found[name] for name in names}) == 1 for names in by_length.values()), "no length means two"


def test_canvases_that_do_not_fit_the_patches_and_a_single_one_are_traced_alone() -> None:
    model = grounding_dino_weights.seeded(lambda: toy(window=7, depths=(2, 2), encoder_layers=1), 0)
    for canvases in (((64, 64),), ((64, 64), (70, 96))):
        made = grounding_dino.image_graphs(model, canvases, AxisRange(1, 2, 3), grounding_dino.FULL.margin, "grid-sample", False)
        assert [make().template for make in made] == [None] * len(canvases)


def test_graphs_of_other_canvases_have_the_same_nodes_and_one_of_another_model_does_not(tmp_path: Path) -> None:
    store = WeightFile(tmp_path / "weights.data")
    paths = []
    for graph in graphs_of("grid-sample", False):
        paths.append(tmp_path / f"{graph.name}.onnx")
        export_onnx(graph, paths[-1], store)
    assert same_nodes(*paths)
    for spoil in ("Transpose", "MatMul"):
        model = ir.load(paths[1])
        node = next(node for node in model.graph if node.op_type == spoil)
        if spoil == "Transpose":
            node.attributes["perm"] = ir.AttrInt64s("perm", [1, 0, *range(2, len(node.attributes["perm"].as_ints()))])
        else:
            node.replace_input_with(0, node.inputs[1])
        ir.save(model, tmp_path / "spoiled.onnx")
        assert not same_nodes(paths[0], tmp_path / "spoiled.onnx")
