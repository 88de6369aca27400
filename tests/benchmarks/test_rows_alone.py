"""Each row of a batch against the row alone: right graphs pass, graphs that mix rows do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from wsss.benchmarks import rows_alone
from wsss.benchmarks.rows_alone import RowsAlone, check_rows, lines_of
from wsss.engines.opening import open_graph
from wsss.errors import ParityError
from wsss.runtime.bundles import MINI
from wsss.spec import Bundle, Model

Change = Callable[[dict[str, np.ndarray]], object]


@pytest.mark.parametrize("graph", ["clip/image", "clip/text", "grounding-dino/text", "sam/encoder", "sam/decoder", "sam/fuse"])
def test_the_small_models_pass(graph: str) -> None:
    name, _, graph = graph.partition("/")
    found = check_rows(Bundle(MINI).model(name), graph)
    assert (found.rows, found.skipped) == (0 if graph == "fuse" else 3, 0) and found.worst < 1e-4


def changed(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Graphs whose outputs ``change`` changes, in place."""

    def opened(
        model: Model, graph: str, engine: str, *, device: str
    ) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
        real = open_graph(model, graph, engine, device=device)

        class Changed:
            axes = real.axes

            def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
                outputs = {name: np.array(value) for name, value in real(feeds).items()}
                change(outputs)
                return outputs

        return Changed()

    monkeypatch.setattr(rows_alone, "open_graph", opened)


def mix(outputs: dict[str, np.ndarray]) -> None:
    outputs["embedding"] += 0.01 * outputs["embedding"].mean(axis=0)


def spoil(outputs: dict[str, np.ndarray]) -> None:
    outputs["embedding"][0, 0] = np.nan


def swap(outputs: dict[str, np.ndarray]) -> None:
    outputs["embedding"] = outputs["embedding"][::-1]


@pytest.mark.parametrize(("change", "message"), [(mix, "differs by 0.0"), (spoil, "row 0: not a number"), (swap, "differs by")])
def test_a_graph_that_mixes_or_spoils_rows_is_found(monkeypatch: pytest.MonkeyPatch, change: Change, message: str) -> None:
    changed(monkeypatch, change)
    with pytest.raises(ParityError, match=f"sam/encoder: output 'embedding', .*{message}") as found:
        check_rows(Bundle(MINI).model("sam"), "encoder")
    assert found.value.hint


def test_other_choices_between_near_equal_values_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(outputs: dict[str, np.ndarray]) -> None:
        outputs["query"][: len(outputs["query"]) - 2] += 1  # in the batch of three: another choice in the first row

    changed(monkeypatch, choose)
    found = check_rows(Bundle(MINI).model("grounding-dino"), "image-192x192")
    assert (found.rows, found.skipped) == (3, 1)
    assert "1 not comparable" in next(lines_of({"x": found}))

    def choose_everywhere(outputs: dict[str, np.ndarray]) -> None:
        outputs["query"] += len(outputs["query"])

    changed(monkeypatch, choose_everywhere)
    with pytest.raises(ParityError, match="chooses otherwise in every row"):
        check_rows(Bundle(MINI).model("grounding-dino"), "image-192x192")


def test_lines() -> None:
    worst = dataclasses.replace(RowsAlone(rows=3), worst=1.2e-6)
    assert [line.split(maxsplit=1) for line in lines_of({"a/b": worst, "c/d": RowsAlone(rows=0)})] == [
        ["a/b", "3 rows equal those alone within 1.2e-06"],
        ["c/d", "runs"],
    ]
