"""Engines that take turns, and calls cut smaller when memory runs out: the labels stay the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from wsss.batch import Tensor
from wsss.engines.engine import Engine
from wsss.engines.fake import FakeEngine
from wsss.errors import OutOfMemory
from wsss.runtime.chain import Chain
from wsss.runtime.device import CutSmaller, Device, FairLock, cut_to_fit
from wsss.runtime.run.label_folder import label_folder
from wsss.runtime.run.stream import Stream
from wsss.spec import AxisRange, GraphSpec, TensorSpec
from wsss.store.local import read_records

if TYPE_CHECKING:
    from ..conftest import World

SPEC = GraphSpec(
    file="x.onnx",
    inputs=(TensorSpec("x", ("batch", 2), "float32"),),
    outputs=(TensorSpec("y", ("batch",), "float32"),),
    axes={"batch": AxisRange(1, 4, 16)},
    opset=18,
)


class Small:
    """An engine whose memory holds ``most`` rows of a call's first input."""

    def __init__(self, engine: Engine, most: int) -> None:
        self._engine, self.most = engine, most
        self.inputs, self.outputs, self.axes = engine.inputs, engine.outputs, engine.axes

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if next(iter(feeds.values())).shape[0] > self.most:
            raise OutOfMemory("no room")
        return self._engine(feeds)


def engine(seconds: float = 0.0, spec: GraphSpec = SPEC) -> FakeEngine:
    return FakeEngine(spec, lambda feeds: {"y": feeds["x"].sum(axis=1)}, seconds=seconds)


def wait_for(what: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_calls_are_halved_until_they_fit_and_stay_so() -> None:
    device, warnings = Device(), list[str]()
    device.warn = warnings.append
    guarded = device.engine(Small(engine(), 3), "sam/encoder")
    rows = np.arange(40, dtype=np.float32).reshape(20, 2)

    def stage() -> list[int]:
        step = guarded.axes["batch"].max
        return [len(guarded({"x": rows[start : start + step]})["y"]) for start in range(0, len(rows), step)]  # type: ignore[arg-type]

    assert cut_to_fit(stage) == [2] * 10
    assert cut_to_fit(stage) == [2] * 10
    assert warnings == [
        "sam/encoder: out of memory with batch = 16; going on with 8",
        "sam/encoder: out of memory with batch = 8; going on with 4",
        "sam/encoder: out of memory with batch = 4; going on with 2",
    ]
    assert guarded.axes["batch"] == AxisRange(1, 2, 2)
    assert device.seconds > 0


def test_calls_are_never_smaller_than_the_engine_takes() -> None:
    guarded = Device().engine(Small(engine(spec=replace(SPEC, axes={"batch": AxisRange(3, 4, 16)})), 3), "x")

    def stage() -> int:
        return len(guarded({"x": np.zeros((guarded.axes["batch"].max, 2), np.float32)})["y"])  # type: ignore[arg-type]

    assert cut_to_fit(stage) == 3
    assert guarded.axes["batch"] == AxisRange(3, 3, 3)


def test_an_engine_that_holds_its_callers_gets_two_where_two_may_compute() -> None:
    assert [Device(at_once, queues=queues).callers for at_once in (1, 2) for queues in (True, False)] == [1, 1, 1, 2]


@pytest.mark.parametrize(("at_once", "queues", "turns"), [(1, True, 1), (1, False, 1), (2, True, 2), (2, False, 3)])
def test_who_waits_within_an_engine_takes_no_other_s_turn(at_once: int, queues: bool, turns: int) -> None:
    device, taken = Device(at_once, queues=queues), list[int]()

    def take_all() -> None:
        while True:
            device.turn.__enter__()
            taken.append(1)

    thread = threading.Thread(target=take_all, daemon=True)
    thread.start()
    thread.join(timeout=0.2)
    assert len(taken) == turns


def test_the_smallest_call_that_does_not_fit_is_an_error() -> None:
    guarded = Device().engine(Small(engine(), 0), "x")
    with pytest.raises(CutSmaller):
        guarded({"x": np.zeros((2, 2), np.float32)})
    with pytest.raises(OutOfMemory):
        guarded({"x": np.zeros((1, 2), np.float32)})


@pytest.mark.parametrize("at_once", [1, 2])
def test_turns_are_given_in_the_order_of_asking(at_once: int) -> None:
    turns, order, inside, most = FairLock(at_once), list[int](), 0, 0
    lock = threading.Lock()

    def take(number: int) -> None:
        nonlocal inside, most
        with turns:
            with lock:
                order.append(number)
                inside += 1
                most = max(most, inside)
            time.sleep(0.005)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=take, args=(number,)) for number in range(6)]
    with turns:
        others = [turns for _ in range(at_once - 1)]
        for other in others:
            other.__enter__()
        for asking, thread in enumerate(threads, 1):
            thread.start()
            wait_for(lambda asking=asking: len(turns._queue) == asking)  # type: ignore[misc]
        assert order == [], "all turns are taken"
        for other in others:
            other.__exit__()
    for thread in threads:
        thread.join()
    assert sorted(order[:at_once]) == list(range(at_once))
    assert (sorted(order), most) == (list(range(6)), at_once)
    if at_once == 1:
        assert order == list(range(6))


def test_waiting_for_a_turn_is_not_the_stage_s_time() -> None:
    device = Device(at_once=1)
    slow, quick = device.engine(waiting := engine(seconds=0.2), "slow"), device.engine(engine(), "quick")
    feeds = {"x": np.zeros((1, 2), np.float32)}
    thread = threading.Thread(target=slow, args=(feeds,))
    thread.start()
    wait_for(lambda: bool(waiting.ends))
    asked, ended = time.perf_counter(), waiting.ends[0]
    quick(feeds)
    thread.join()
    assert ended - asked <= device.waited() <= time.perf_counter() - asked


@pytest.mark.parametrize(
    ("graph", "most"),
    [("clip/image", 1), ("grounding-dino/image-32x48", 1), ("sam/encoder", 1), ("sam/decoder", 1), ("grounding-dino/text", 1)],
)
def test_a_run_goes_on_with_smaller_calls(
    world: World, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graph: str, most: int
) -> None:
    label_folder(Chain.open(world.bundle, classes=world.classes), photos, tmp_path / "whole")
    warnings: list[str] = []
    tight(world, monkeypatch, graph, most)
    label_folder(Chain.open(world.bundle, classes=world.classes), photos, tmp_path / "tight", warn=warnings.append)
    assert contents(tmp_path / "tight") == contents(tmp_path / "whole")
    assert graph == "grounding-dino/text" or any(line.startswith(f"{graph}: out of memory") for line in warnings), warnings


def test_an_image_that_never_fits_fails_alone(
    world: World, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tight(world, monkeypatch, "grounding-dino/image-48x32", 0)  # the canvas of one photograph, upright
    summary = label_folder(Chain.open(world.bundle, classes=world.classes), photos, tmp_path / "store", warn=lambda _: None)
    assert (summary.labelled, summary.failed) == (4, 1)
    failed = [record for record in read_records(tmp_path / "store") if "error" in record]
    assert [record["path"] for record in failed] == ["sub/three.png"]
    assert "no room" in failed[0]["error"]


def test_the_batch_is_what_the_engines_were_built_for(
    world: World, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder's ``opt`` is 2; a batch that is asked for wins."""
    used: list[int] = []

    def spy(*given: Any, batch: int, **how: Any) -> Stream:
        used.append(batch)
        return Stream(*given, batch=batch, **how)

    monkeypatch.setattr("wsss.runtime.run.label_folder.Stream", spy)
    for batch in (None, 1):
        label_folder(Chain.open(world.bundle, classes=world.classes), photos, tmp_path / f"store-{batch}", batch=batch)
    assert used == [2, 1]


GREEN, EVERY = ["green.png", "sub/three.png"], ["green.png", "red.png", "sub/three.png", "two.png"]


@pytest.mark.parametrize(
    ("model", "graphs", "output", "failed"),
    [
        ("clip", ["image"], "embedding", GREEN),
        ("grounding-dino", ["image-32x48", "image-48x32"], "logits", GREEN),
        ("grounding-dino", ["image-32x48", "image-48x32"], "boxes", GREEN),
        ("sam", ["decoder"], "quality", EVERY),
    ],
)
def test_a_photograph_whose_result_is_nan_fails_alone(
    world: World, photos: Path, tmp_path: Path, model: str, graphs: list[str], output: str, failed: list[str]
) -> None:
    """Or it would be background: NaN reaches no threshold."""

    def spoiled(feeds: Mapping[str, np.ndarray], script: Callable[..., Any]) -> dict[str, np.ndarray]:
        found = {name: np.array(value) for name, value in script(feeds).items()}
        green = (feeds["pixels"] == (0, 255, 0)).all(axis=-1).any(axis=(1, 2)) if "pixels" in feeds else slice(None)
        found[output][green] = np.nan
        return found

    for graph in graphs:
        engine = world.engine(model, graph)
        engine.script = partial(spoiled, script=engine.script)
    labeler = Chain.open(world.bundle, classes=world.classes)
    summary = label_folder(labeler, photos, tmp_path / "out", warn=lambda _: None)
    errors = {record["path"]: record["error"] for record in read_records(tmp_path / "out") if "error" in record}
    assert sorted(errors) == failed and summary.labelled == 5 - len(failed)
    where = f"{model}/{graphs[0].partition('-')[0]}"
    assert all(text.startswith(f"{name}: {where}: its output is NaN") for name, text in errors.items())


def test_a_batch_is_tried_in_halves(world: World, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fusing cannot cut its masks: two photographs of one mask each fit one by one only, those of several masks never."""
    label_folder(Chain.open(world.bundle, classes=world.classes), photos, tmp_path / "whole")
    tight(world, monkeypatch, "sam/fuse", 1)
    warnings: list[str] = []
    opened = Chain.open(world.bundle, classes=world.classes)
    summary = label_folder(opened, photos, tmp_path / "tight", warn=warnings.append)
    assert (summary.labelled, summary.failed) == (3, 2)
    assert any("trying them in halves" in line for line in warnings), (warnings, summary)
    whole, found = contents(tmp_path / "whole"), contents(tmp_path / "tight")
    labels = {name for name in found if name.startswith("labels/")}
    assert labels
    assert all(found[name] == whole[name] for name in labels)


def tight(world: World, monkeypatch: pytest.MonkeyPatch, graph: str, most: int) -> None:
    """From now on this graph has memory for that many rows."""
    world.engines.clear()
    opened = world.open_graph

    def open_graph(model, name, *given, **how):  # type: ignore[no-untyped-def]
        fake = opened(model, name, *given, **how)
        return Small(fake, most) if f"{model.manifest.family}/{name}" == graph else fake

    monkeypatch.setattr("wsss.runtime.chain.open_graph", open_graph)


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "history.jsonl"}
