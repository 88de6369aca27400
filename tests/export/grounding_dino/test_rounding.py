"""The graph on a runtime that rounds in another way than PyTorch and ONNX Runtime: OpenVINO multiplies by reciprocals."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs torch: pip install 'wsss[export]'")

from wsss.benchmarks.studies.parity.grounding_dino_rounding import without_margin
from wsss.engines.openvino import OpenVinoEngine
from wsss.errors import ParityError
from wsss.export.family import Graph
from wsss.export.grounding_dino import family as grounding_dino
from wsss.export.grounding_dino import weights as grounding_dino_weights
from wsss.export.to_onnx import OPSET, WeightFile, export_onnx
from wsss.export.verify import gate
from wsss.spec import AxisRange

from .toy import toy

pytestmark = pytest.mark.usefixtures("needs_openvino")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, Path]:
    canvas = (200, 200)  # 50 x 50 cells on the first level
    model = grounding_dino_weights.seeded(lambda: toy(depths=(1, 1), encoder_layers=1, queries=1500), 0)
    graph = grounding_dino.image_graph(model, canvas, AxisRange(1, 2, 3), grounding_dino.MINI.margin)
    folder = tmp_path_factory.mktemp("rounding")
    export_onnx(graph, folder / "graph.onnx", WeightFile(folder / "weights.data"))
    return graph, folder / "graph.onnx"


def judge(graph: Graph, path: Path) -> None:
    gate(
        graph,
        OpenVinoEngine(path, graph.spec(path.name, OPSET)),
        engine_name="openvino",
        reference_name="transformers",
        where=graph.name,
    )


def test_the_gate_passes_where_cells_lie_on_the_limits_of_proposals(exported: tuple[Graph, Path]) -> None:
    judge(*exported)


def test_without_a_margin_the_gate_would_have_seen_it(exported: tuple[Graph, Path]) -> None:
    graph, path = exported
    with pytest.raises(ParityError, match="output 'query': scores of the chosen cells differ"):
        judge(graph, without_margin(path))


def test_samples_have_photographs_whose_cells_lie_there() -> None:
    assert grounding_dino.edge_lengths(800, [100, 50, 25, 13]) == [800, 400]
    assert grounding_dino.edge_lengths(1344, [168, 84, 42, 21]) == [1200, 800, 400]
    assert grounding_dino.edge_lengths(192, [24, 12, 6, 3]) == []
    model = grounding_dino_weights.seeded(lambda: toy(depths=(1, 1), encoder_layers=1), 0)
    size = grounding_dino.image_graph(model, (200, 200), AxisRange(1, 2, 3)).sample(3, 0)["size"]
    assert size[0, 0] == size[1, 0] == size[1, 1] == size[2, 1] == 200
