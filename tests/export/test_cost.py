"""What an export is said to cost, and when it is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from wsss.benchmarks.studies.harness import RESULTS
from wsss.cores import UNKNOWN
from wsss.errors import WsssError
from wsss.export import cost
from wsss.export.family import DISTINCT, Graph, Tolerance
from wsss.spec import AxisRange, TensorSpec

MEASURED = json.loads((RESULTS / "export-cost.json").read_text(encoding="utf-8"))


def graph_like(pixels: int, weights: int, most: int) -> Graph:
    """An image graph of so many pixels, bytes of weights and rows, without memory of its own."""
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(torch.empty(weights // 4, device="meta")))
    return Graph(
        name="image",
        module=module,
        inputs=(TensorSpec("pixels", ("batch", 1, pixels, 3), "uint8"),),
        outputs=(),
        axes={"batch": AxisRange(1, min(2, most), most)},
        row_axis="batch",
        sample=lambda rows, seed: {"pixels": np.zeros((rows, 1, pixels, 3), np.uint8)},
        reference=lambda feeds, _: feeds,
        distinct=DISTINCT,
        tolerance={"y": Tolerance(relative=1, why="test")},
    )


def measured_graphs() -> list[Any]:
    return [
        pytest.param(model.split()[0], found["weights_bytes"], graph, id=f"{model} {name}")
        for model, found in MEASURED.items()
        for name, graph in found["graphs"].items()
        if graph["pixels"] and graph["batches"][-1] == graph["rows"]
    ]


@pytest.mark.parametrize(("model", "weights", "graph"), measured_graphs())
def test_the_rule_predicts_what_was_measured(model: str, weights: int, graph: dict[str, Any]) -> None:
    found = cost.estimate(model, graph_like(graph["pixels"], weights, graph["rows"]), tracing=True)
    assert found is not None
    assert found.gigabytes == pytest.approx(graph["gate"]["peak_gb"], rel=0.25)
    assert found.cpu_seconds == pytest.approx(graph["gate"]["cpu_seconds"] + graph["trace"]["cpu_seconds"], rel=0.35)


def test_a_segmenter_has_an_estimate() -> None:
    """DeepLabV3+ with ResNet-101 at 512 x 512 and up to 8 rows took 55 CPU seconds, with loading, and 2.6 GB."""
    found = cost.estimate("segmenter", graph_like(512 * 512, 182_427_072, 8), tracing=True)
    assert found is not None
    assert found.gigabytes == pytest.approx(2.62, rel=0.1) and 30 < found.cpu_seconds < 60


def test_models_without_a_rule_have_no_estimate() -> None:
    assert cost.estimate("mini", graph_like(9, 400, 2), tracing=True) is None
    lines: list[str] = []
    cost.announce("mini", [None], lines.append)
    assert not lines


def test_what_is_clearly_too_little_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = [
        cost.Estimate(graph="text", cpu_seconds=9, gigabytes=2.0),
        cost.Estimate(graph="image", cpu_seconds=90, gigabytes=8.0),
    ]
    lines: list[str] = []
    monkeypatch.delenv(cost.SKIP, raising=False)
    for available in (UNKNOWN, 8_500_000_000, 6_100_000_000):
        monkeypatch.setattr(cost, "free_bytes", lambda available=available: available)
        cost.announce("sam", needed, lines.append)
    assert [line.partition(", and ")[2] for line in lines] == [
        "8.0 GB of memory for image",
        "8.0 GB of memory for image, 8.5 GB available",
        "8.0 GB of memory for image, 6.1 GB available",
    ]
    monkeypatch.setattr(cost, "free_bytes", lambda: 5_000_000_000)
    with pytest.raises(WsssError, match=r"sam image: needs about 8\.0 GB of memory, 5\.0 GB are available") as error:
        cost.announce("sam", needed, lines.append)
    assert "--batch" in str(error.value)
    monkeypatch.setenv(cost.SKIP, "1")
    cost.announce("sam", needed, lines.append)
    assert lines[-1].endswith(f"continuing, because {cost.SKIP} is set")


def test_the_speed_of_a_core_is_possible() -> None:
    """In GFLOP/s; between a small processor of 2010 and ten times what a core of today can do."""
    assert 0.1 < cost.speed_of_core(256, 2) < 10_000
