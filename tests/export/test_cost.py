"""What an export is said to cost, and when it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from wsss.benchmarks.studies.harness import RESULTS
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


def test_models_without_a_rule_have_no_estimate() -> None:
    assert cost.estimate("segmenter", graph_like(9, 400, 2), tracing=True) is None
    lines: list[str] = []
    cost.announce("segmenter", [None], lines.append)
    assert not lines


def test_what_is_clearly_too_little_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = [cost.Estimate(graph="text", cpu_seconds=9, gigabytes=2.0), cost.Estimate(graph="image", cpu_seconds=90, gigabytes=8.0)]
    lines: list[str] = []
    monkeypatch.delenv(cost.SKIP, raising=False)
    for available in (None, 8.5, 6.1):
        monkeypatch.setattr(cost, "available_gigabytes", lambda available=available: available)
        cost.announce("sam", needed, lines.append)
    assert [line.partition(", and ")[2] for line in lines] == [
        "8.0 GB of memory for image",
        "8.0 GB of memory for image, 8.5 GB available",
        "8.0 GB of memory for image, 6.1 GB available",
    ]
    monkeypatch.setattr(cost, "available_gigabytes", lambda: 5.0)
    with pytest.raises(WsssError, match=r"sam image: needs about 8\.0 GB of memory, 5\.0 GB are available") as error:
        cost.announce("sam", needed, lines.append)
    assert "--batch" in str(error.value)
    monkeypatch.setenv(cost.SKIP, "1")
    cost.announce("sam", needed, lines.append)
    assert lines[-1].endswith(f"continuing, because {cost.SKIP} is set")


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable:    4000000 kB\n"}
TWO = {
    "proc/self/cgroup": "0::/a/b\n",
    "sys/fs/cgroup/a/memory.max": "3000000000\n",
    "sys/fs/cgroup/a/memory.current": "1500000000\n",
    "sys/fs/cgroup/a/memory.stat": "anon 5\ninactive_file 500000000\n",
    "sys/fs/cgroup/a/b/memory.max": "max\n",
    "sys/fs/cgroup/a/b/memory.current": "7\n",
}
ONE = {
    "proc/self/cgroup": "5:cpu:/\n4:memory:/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000000000",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "250000000",
}


@pytest.mark.parametrize(
    ("files", "available"),
    [
        pytest.param({}, None, id="a system that does not say"),
        pytest.param(MEMINFO, 4.096, id="no control groups"),
        pytest.param({**MEMINFO, **TWO}, 2.0, id="the limit of a group above, whose cache can be freed"),
        pytest.param({**MEMINFO, **ONE}, 0.75, id="control groups of version 1"),
    ],
)
def test_available_memory_is_that_of_the_machine_or_of_a_group(tmp_path: Path, files: dict[str, str], available: float) -> None:
    assert cost.available_gigabytes(written(tmp_path, files)) == available
