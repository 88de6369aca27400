"""CUDA graphs of TensorRT's engine, any order of execution, and TensorRT-RTX, on a simulated GPU."""

from __future__ import annotations

import gc
import logging
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from wsss.engines import contexts
from wsss.engines.kernel_cache import save_kernels
from wsss.engines.tensors import CudaTensor

from . import simulated_gpu as sim
from .bench import Bench, X, double, foreign, increment, tensors

# ---- CUDA graphs ----


def test_the_third_call_is_a_replay(bench: Bench) -> None:
    engine = bench.open("double", double)
    launches = []
    for turn in range(5):
        assert np.array_equal(np.asarray(engine({"x": X + turn})["y"]), 2 * (X + turn))
        launches.append((bench.count("execute_async_v3"), bench.count("cudaGraphLaunch"), engine.cuda_graphs))
    assert launches == [(1, 0, 0), (3, 0, 1), (3, 1, 1), (3, 2, 1), (3, 3, 1)], "the second is run, then captured"


def test_without_cuda_graphs_nothing_is_captured(bench: Bench) -> None:
    engine = bench.open("double", double, cuda_graphs=False)
    for _ in range(4):
        engine({"x": X})
    assert bench.count("cudaStreamBeginCapture") == 0 and engine.cuda_graphs == 0


def test_shapes_that_alternate_each_have_a_graph(bench: Bench) -> None:
    engine = bench.open("double", double)
    for turn in range(4):
        for rows in (1, 4, 2):
            x = np.full((rows, 3), turn, np.float32)
            assert np.array_equal(np.asarray(engine({"x": x})["y"]), 2 * x)
    assert engine.cuda_graphs == 3 and bench.count("cudaGraphLaunch") == 6


def test_one_graph_serves_tensors_from_anywhere(bench: Bench) -> None:
    engine, other = bench.open("double", double), bench.open("increment", increment)
    here, there = foreign(bench.gpu, X), foreign(bench.gpu, X + 50)
    for _ in range(3):
        assert np.array_equal(np.asarray(engine({"x": here})["y"]), 2 * X)
    for values, tensor in (
        (X + 50, there),
        (X - 1, X - 1),
        (X + 1, other({"x": X})["y"].clone()),
        (X + 2, other({"x": X + 1})["y"]),
        (X, here),
    ):
        before = bench.count("cudaGraphLaunch")
        assert np.array_equal(np.asarray(engine({"x": tensor})["y"]), 2 * values)
        assert bench.count("cudaGraphLaunch") == before + 1
    assert engine.cuda_graphs == 1


def test_graphs_are_bounded_and_the_unused_go(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "MAX_GRAPHS", 2)
    engine = bench.open("double", double)
    xs = [foreign(bench.gpu, X[:1]), foreign(bench.gpu, X + 1), foreign(bench.gpu, np.concatenate([X, X]))]

    def replays(number: int) -> bool:
        before = bench.count("cudaGraphLaunch")
        clones.append((engine({"x": xs[number]})["y"].clone(), 2 * values[number]))
        return bench.count("cudaGraphLaunch") > before

    values = [X[:1], X + 1, np.concatenate([X, X])]
    clones: list[tuple[CudaTensor, np.ndarray]] = []
    assert [replays(number) for number in (0, 0, 1, 1, 1, 0)] == [False] * 4 + [True] * 2
    assert not replays(2)
    for turn in range(contexts.CREDIT):
        assert not replays(2)
        assert len(bench.gpu.executables) == 2 + (turn == contexts.CREDIT - 1), "the oldest stays until its credit is spent"
    assert replays(2)
    assert bench.count("cudaGraphExecDestroy") == 0, "its last run is still queued"
    assert replays(0) and engine.cuda_graphs == 2, "1 went, 0 was used after it"
    for clone, expected in clones:
        assert np.array_equal(np.asarray(clone), expected)
    assert not replays(1)
    assert bench.count("cudaGraphExecDestroy") == 1


def test_a_graph_that_is_replayed_again_and_again_keeps_its_place(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "MAX_GRAPHS", 1)
    engine = bench.open("double", double)
    used, other = foreign(bench.gpu, X), foreign(bench.gpu, X[:1])
    for x in (used, used, other):
        engine({"x": x})
    for _ in range(2 * contexts.CREDIT):
        engine({"x": other})
        engine({"x": used})
    assert bench.count("cudaGraphLaunch") == 2 * contexts.CREDIT


def test_what_came_once_is_not_remembered_for_ever(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "MAX_SEEN", 2)
    engine = bench.open("double", double)
    for rows in (1, 2, 3, 1):
        engine({"x": np.ones((rows, 3), np.float32)})
    assert engine.cuda_graphs == 0
    engine({"x": np.ones((1, 3), np.float32)})
    assert engine.cuda_graphs == 1


def refuse_capture(gpu: Any) -> None:
    gpu.plans[b"double"].allocates = True


def refuse_politely(gpu: Any) -> None:
    gpu.plans[b"double"].refuses = True


def refuse_begin(gpu: Any) -> None:
    gpu.fail["cudaStreamBeginCapture"] = sim.Status.cudaErrorStreamCaptureUnsupported


def refuse_instantiation(gpu: Any) -> None:
    gpu.fail["cudaGraphInstantiate"] = sim.Status.cudaErrorMemoryAllocation


@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        (refuse_capture, "cudaErrorStreamCaptureInvalidated, said by the simulation: operation not permitted"),
        (refuse_politely, "TensorRT refused the capture: operation not permitted"),
        (refuse_begin, "CUDA: cudaStreamBeginCapture: cudaErrorStreamCaptureUnsupported"),
        (refuse_instantiation, "CUDA: cudaGraphInstantiate: cudaErrorMemoryAllocation"),
    ],
)
def test_what_cannot_be_captured_is_enqueued_and_said_once(
    bench: Bench, caplog: pytest.LogCaptureFixture, refuse: Callable[[Any], None], message: str
) -> None:
    engine = bench.open("double", double)
    refuse(bench.gpu)
    for turn in range(4):
        assert np.array_equal(np.asarray(engine({"x": X + turn})["y"]), 2 * (X + turn))
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "double: runs without CUDA graphs" in line and message in line
    assert engine.cuda_graphs == 0 and not bench.gpu.graphs


def short_of_memory(bench: Bench, contexts: int) -> Any:
    """A GPU on which an engine has memory for this many execution contexts."""
    bench.use(sim.Gpu(memory_bytes=(contexts << 20) + (1 << 19)))
    return bench.open("double", double, network={"context_bytes": 1 << 20})


@pytest.mark.parametrize("graphs", [0, 1, 2])
def test_graphs_that_do_not_fit_in_memory_are_an_extra(bench: Bench, caplog: pytest.LogCaptureFixture, graphs: int) -> None:
    """All calls are answered at their full size, and creating contexts is not tried at each of them."""
    engine = short_of_memory(bench, 1 + graphs)
    allocations, clones = [], []
    for turn in range(30):
        for rows in (1, 2, 3, 4):
            x = np.full((rows, 3), turn, np.float32)
            clones.append((engine({"x": x})["y"].clone(), 2 * x))
            assert engine.cuda_graphs <= graphs
        allocations.append(bench.count("cudaMalloc"))
    for clone, expected in clones:
        assert np.array_equal(np.asarray(clone), expected)
    assert engine.cuda_graphs == graphs
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert ("keeps fewer CUDA graphs" if graphs else "runs without CUDA graphs") in line and "OutOfMemory" in line
    if not graphs:
        assert bench.count("cudaStreamBeginCapture") == 0
    else:
        assert bench.count("cudaStreamBeginCapture") <= 4 + 30 * 4 / contexts.CREDIT


def test_the_oldest_graph_is_given_up_where_memory_is_short(bench: Bench) -> None:
    engine = short_of_memory(bench, 3)
    one, two, four = foreign(bench.gpu, X[:1]), foreign(bench.gpu, X), foreign(bench.gpu, np.concatenate([X, X]))
    for x in (one, one, two, two, four, four):
        engine({"x": x})
    assert engine.cuda_graphs == 2
    for x, replayed in ((two, True), (four, True), (one, False)):
        before = bench.count("cudaGraphLaunch")
        engine({"x": x})
        assert (bench.count("cudaGraphLaunch") > before) == replayed


def test_a_graph_is_given_up_after_its_last_run(bench: Bench) -> None:
    engine = short_of_memory(bench, 2)
    one, two = foreign(bench.gpu, X[:1]), foreign(bench.gpu, X)
    outs = [engine({"x": x})["y"].clone() for x in (one, one, one, two, two, two)]
    for out in outs:
        assert np.array_equal(np.asarray(out), 2 * X[: len(np.asarray(out))])
    assert engine.cuda_graphs == 1 and bench.count("cudaGraphLaunch") == 2 and bench.count("cudaGraphExecDestroy") == 1


def test_a_first_run_for_a_graph_that_does_not_fit_is_enqueued(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = bench.open("double", double)
    engine({"x": X})
    enqueue, general = sim.Context.execute_async_v3, engine._contexts._context

    def fails(self: Any, stream: int) -> bool:
        if self is general:
            return bool(enqueue(self, stream))
        self._logger.log(sim.Severity.ERROR, "Error Code 2: OutOfMemory (Requested size was 9 bytes.)")
        return False

    monkeypatch.setattr(sim.Context, "execute_async_v3", fails)
    for _ in range(3):
        assert np.array_equal(np.asarray(engine({"x": X})["y"]), 2 * X)
    assert engine.cuda_graphs == 0


class Litter:
    """A cycle that calls CUDA when it is collected, as another library's tensors do."""

    def __init__(self, gpu: Any) -> None:
        self.me, self.event = self, gpu.runtime.cudaEventCreateWithFlags(0)[1]
        self.query = gpu.runtime.cudaEventQuery

    def __del__(self) -> None:
        self.query(self.event)


def test_collected_garbage_does_not_end_a_capture(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = bench.open("double", double)
    enqueue, thresholds = sim.Context.execute_async_v3, gc.get_threshold()

    def littered(self: Any, stream: int) -> bool:
        Litter(bench.gpu)
        pile = [{number: [number]} for number in range(500)]
        return bool(enqueue(self, stream)) and len(pile) == 500

    monkeypatch.setattr(sim.Context, "execute_async_v3", littered)
    gc.set_threshold(1)
    try:
        for _ in range(3):
            engine({"x": X})
    finally:
        gc.set_threshold(*thresholds)
    assert engine.cuda_graphs == 1 and gc.isenabled()


# ---- any order that a GPU might choose ----


@pytest.mark.parametrize("seed", range(25))
def test_random_programs_in_random_orders(bench: Bench, seed: int) -> None:
    """Three engines, outputs that feed each other, clones, hand-overs, other libraries: always numpy's values."""
    dice = random.Random(seed)
    gpu = bench.use(sim.Gpu(shuffle=seed))
    add = tensors(("batch", 3), "float32", "a", "b")

    def grows(most: int) -> dict[str, Any]:
        """More activations for two rows than for one."""
        return {
            "network": {"activations_bytes": most, "activations_of": lambda shapes: most - 300 * (2 - min(shapes.values())[0])}
        }

    engines = {
        "double": bench.open("double", double, cuda_graphs=dice.random() < 0.7, **grows(dice.randrange(400, 1500))),
        "increment": bench.open("increment", increment, **grows(dice.randrange(400, 1500))),
        "add": bench.open("add", lambda f: {"y": f["a"] + f["b"]}, add, **grows(dice.randrange(400, 1500))),
    }
    rules = {"double": lambda x: 2 * x % 1000, "increment": lambda x: x + 1, "add": lambda a, b: a + b}
    live: dict[str, tuple[Any, np.ndarray]] = {}  # an engine's output of now, or a clone, and what it must hold
    library = foreign(gpu, X)
    lent = X
    reads: list[tuple[np.ndarray, np.ndarray]] = []

    def pick() -> tuple[Any, np.ndarray]:
        kind = dice.randrange(4)
        if kind == 0:
            values = np.array(dice.choices(range(100), k=6), np.float32).reshape(2, 3)
            return values.copy(), values
        if kind == 1:
            return library, lent
        return dice.choice(list(live.values())) if live else (X, X)

    for step in range(60):
        name = dice.choice(list(engines))
        taken = [pick() for _ in engines[name].inputs]
        live.pop(name, None)
        out = engines[name](dict(zip(engines[name].inputs, (tensor for tensor, _ in taken), strict=True)))["y"]
        expected = rules[name](*(values for _, values in taken)) if name != "double" else 2 * taken[0][1]
        live[name] = out, expected
        for tensor, _ in taken:
            if isinstance(tensor, np.ndarray) and tensor is not X:
                tensor[:] = np.nan
        event = dice.random()
        if event < 0.2:
            live[f"clone{dice.randrange(2)}"] = out.clone(), expected
        elif event < 0.35:
            lent = X + step
            library.write(lent)
        elif event < 0.5:
            reads.append((sim.read_by_library(gpu, out), expected))
        elif event < 0.8:
            tensor, values = dice.choice(list(live.values()))
            assert np.array_equal(np.asarray(tensor), values), f"step {step}"
        if np.abs(expected).max() > 1e6:
            live.clear()
    gpu.finish(gpu.streams[sim.LEGACY])
    for read, values in reads:
        assert np.array_equal(read, values)
    assert sum(engine.cuda_graphs for engine in engines.values()) > 0


# ---- TensorRT-RTX ----


def test_rtx_compiles_in_the_background_but_first_for_a_graph(bench: Bench) -> None:
    bench.use(sim.Gpu(rtx=True))
    engine = bench.open("double", double, flavour="trt-rtx")
    for turn in range(4):
        assert np.array_equal(np.asarray(engine({"x": X + turn})["y"]), 2 * (X + turn))
    assert engine.cuda_graphs == 1, "a graph of the general kernels would compute rubbish here"


def test_rtx_says_what_cannot_be_captured(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.use(sim.Gpu(rtx=True))
    engine = bench.open("double", double, flavour="trt-rtx", network={"allocates": True})
    for _ in range(4):
        assert np.array_equal(np.asarray(engine({"x": X})["y"]), 2 * X)
    assert [r.getMessage().split(": ", 1)[1] for r in caplog.records] == [
        "runs without CUDA graphs: TensorRT-RTX allocates while this engine runs"
    ]
    assert bench.count("cudaStreamBeginCapture") == 0


def compiled(bench: Bench) -> set[str]:
    """What a fresh process compiles for one shape."""
    plans = dict(bench.gpu.plans)
    bench.use(sim.Gpu(rtx=True)).plans.update(plans)
    with bench.open("double", double, flavour="trt-rtx") as engine:
        assert np.array_equal(np.asarray(engine({"x": X})["y"]), 2 * X)
    return set(bench.gpu.compiled)


def test_rtx_keeps_compiled_kernels_beside_the_plan(bench: Bench) -> None:
    assert compiled(bench) == {"(2,3)"}
    file = bench.folder / "double.plan.kernels"
    before = file.read_bytes(), file.stat().st_mtime_ns
    assert compiled(bench) == set()
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before, "not written again for nothing"
    assert sorted(path.name for path in bench.folder.iterdir()) == ["double.plan", "double.plan.kernels"]


def test_rtx_saves_compiled_kernels_while_it_runs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed does not close its engines."""
    now, writes = [1000.0], []
    monkeypatch.setattr(contexts.time, "monotonic", lambda: now[0])
    save = contexts.save_kernels
    monkeypatch.setattr(contexts, "save_kernels", lambda path, cache: (writes.append(now[0]), save(path, cache)))
    bench.use(sim.Gpu(rtx=True))
    engine, file = bench.open("double", double, flavour="trt-rtx"), bench.folder / "double.plan.kernels"
    engine({"x": X})
    assert not file.exists()
    now[0] += contexts.SAVE_SECONDS
    engine({"x": X[:1]})
    assert b"(2,3)" in file.read_bytes() and b"(1,3)" in file.read_bytes()
    for turn in range(20):
        now[0] += contexts.SAVE_SECONDS / 4
        engine({"x": X[: 1 + turn % 2]})
    assert len(writes) == 2, "replays compile nothing"
    engine({"x": np.concatenate([X, X])})
    assert len(writes) == 3 and b"(4,3)" in file.read_bytes()
    engine({"x": np.concatenate([X, X[:1]])})
    assert len(writes) == 3, "a moment later"


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[:-1], lambda data: data[:-1] + b"?", lambda data: data[17:], lambda data: b"x" * 99],
)
def test_a_damaged_kernel_cache_is_ignored_and_replaced(
    bench: Bench, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    compiled(bench)
    file = bench.folder / "double.plan.kernels"
    file.write_bytes(damage(file.read_bytes()))
    assert compiled(bench) == {"(2,3)"}
    assert "compiled kernels are damaged and will be compiled again" in caplog.text
    assert compiled(bench) == set()


def test_a_kernel_cache_of_another_gpu_is_ignored(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    cache = sim.RuntimeCache()
    cache.kernels = {"other-gpu", "(2,3)"}
    save_kernels(bench.folder / "double.plan.kernels", cache)
    assert compiled(bench) == {"(2,3)"}
    assert "for another GPU, driver or TensorRT-RTX" in caplog.text


def test_kernels_that_the_library_does_not_give_are_not_kept(bench: Bench) -> None:
    save_kernels(bench.folder / "double.plan.kernels", SimpleNamespace(serialize=lambda: b""))
    assert not (bench.folder / "double.plan.kernels").exists()


def test_a_folder_that_cannot_be_written_is_said(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wsss.files.os.fsync", full)
    compiled(bench)
    assert "compiled kernels cannot be saved: No space left on device" in caplog.text
    assert [path.name for path in bench.folder.iterdir()] == ["double.plan"], "and nothing half-written stays"
