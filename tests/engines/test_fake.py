"""The scripted engine: holds both sides to the contract and remembers its calls."""

from __future__ import annotations

import time

import numpy as np
import pytest

from wsss.engines.fake import FakeEngine, Script
from wsss.errors import FeedError
from wsss.spec import GraphSpec


def doubled(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"total": feeds["x"].sum(axis=1), "double": 2 * feeds["x"]}


def test_answers_in_the_order_of_the_contract_and_counts(spec: GraphSpec) -> None:
    engine = FakeEngine(spec, doubled)
    assert engine.calls == []
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    out = engine({"x": x})
    assert list(out) == ["double", "total"]
    assert np.array_equal(out["double"], 2 * x)
    engine({"x": x[:1]})
    assert engine.calls == [{"x": (2, 3)}, {"x": (1, 3)}]
    assert (engine.inputs["x"], engine.outputs["total"], dict(engine.axes)) == (spec.inputs[0], spec.outputs[1], spec.axes)


def test_refuses_like_the_others_and_does_not_count_it(spec: GraphSpec) -> None:
    engine = FakeEngine(spec, doubled)
    for wrong in (np.zeros((5, 3), np.float32), np.zeros((1, 3)), np.zeros((1, 4), np.float32)):
        with pytest.raises(FeedError, match=r"^fake: "):
            engine({"x": wrong})
    assert engine.calls == []


@pytest.mark.parametrize(
    "script",
    [
        lambda feeds: {"double": feeds["x"]},
        lambda feeds: {**doubled(feeds), "more": feeds["x"]},
        lambda feeds: {**doubled(feeds), "double": feeds["x"].astype(np.float64)},
        lambda feeds: {**doubled(feeds), "double": feeds["x"][:, :2]},
    ],
)
def test_a_script_is_held_to_the_contract(spec: GraphSpec, script: Script) -> None:
    with pytest.raises(FeedError, match="outputs of the script"):
        FakeEngine(spec, script)({"x": np.zeros((2, 3), np.float32)})


def test_a_script_must_answer_every_row(spec: GraphSpec) -> None:
    engine = FakeEngine(spec, lambda feeds: {name: value[:1] for name, value in doubled(dict(feeds)).items()})
    with pytest.raises(AssertionError, match="batch=1"):
        engine({"x": np.zeros((2, 3), np.float32)})


def test_takes_as_long_as_told(spec: GraphSpec) -> None:
    start = time.perf_counter()
    FakeEngine(spec, doubled, seconds=0.02)({"x": np.zeros((1, 3), np.float32)})
    assert time.perf_counter() - start >= 0.02


@pytest.mark.parametrize("queued", [False, True])
def test_calls_take_their_time_one_after_another(spec: GraphSpec, queued: bool) -> None:
    """A queued call returns at once, and its values are there when those before it and it are computed."""
    engine = FakeEngine(spec, doubled, seconds=0.2, queued=queued)
    x = np.ones((1, 3), np.float32)
    start = time.perf_counter()
    outs = [engine({"x": x}) for _ in range(3)]
    called = time.perf_counter() - start
    assert (called < 0.6) if queued else (called >= 0.6)
    assert (outs[0]["double"].shape, outs[0]["double"].dtype) == ((1, 3), np.float32)
    assert np.array_equal(np.asarray(outs[2]["double"]), 2 * x)
    assert time.perf_counter() - start >= 0.6
    assert len(engine.ends) == 3
    assert min(np.diff(engine.ends)) >= 0.199
