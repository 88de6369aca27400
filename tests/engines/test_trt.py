"""TensorRT's engine on a simulated GPU that runs nothing before it must: what is not waited for is wrong.

`simulated_gpu.py` says what is simulated. `test_trt_gpu.py` does the real thing.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import random
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from wsss.engines import contexts
from wsss.engines.engine import outliving
from wsss.engines.tensors import CudaTensor
from wsss.engines.trt import TrtEngine, load_modules
from wsss.errors import BundleError, FeedError, OutOfMemory, WsssError
from wsss.extras import install_line
from wsss.spec import AxisRange, GraphSpec, TensorSpec

_spec = importlib.util.spec_from_file_location("simulated_gpu", Path(__file__).with_name("simulated_gpu.py"))
assert _spec is not None and _spec.loader is not None
sim: Any = importlib.util.module_from_spec(_spec)
sys.modules["simulated_gpu"] = sim  # dataclasses look their module up
_spec.loader.exec_module(sim)

X = np.array([[1, 2, 3], [4, 5, -6]], np.float32)
AXES = {"batch": AxisRange(1, 2, 4)}


def tensors(axes: tuple[int | str, ...] = ("batch", 3), dtype: Any = "float32", *names: str) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, axes, dtype) for name in names)


class Bench:
    """Opens engines on one simulated machine."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._patch = folder, monkeypatch
        self.opened: list[TrtEngine] = []
        self.use(sim.Gpu())

    def use(self, gpu: Any) -> Any:
        self.gpu = gpu
        self._patch.setattr("wsss.engines.trt.load_modules", lambda flavour: (gpu.tensorrt, gpu.runtime))
        return gpu

    def plan(self, name: str, network: Any) -> Path:
        path = self.folder / f"{name}.plan"
        path.write_bytes(name.encode())
        self.gpu.plans[name.encode()] = network
        return path

    def open(
        self,
        name: str,
        function: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]],
        inputs: tuple[TensorSpec, ...] = tensors(("batch", 3), "float32", "x"),
        outputs: tuple[TensorSpec, ...] = tensors(("batch", 3), "float32", "y"),
        *,
        flavour: Any = "trt",
        network: dict[str, Any] | None = None,
        **options: Any,
    ) -> TrtEngine:
        plan = self.plan(name, sim.Network(inputs, outputs, AXES, function, **(network or {})))
        spec = GraphSpec(file="graph.onnx", inputs=inputs, outputs=outputs, axes=AXES, opset=18)
        self.opened.append(TrtEngine(plan, spec, flavour=flavour, **options))
        return self.opened[-1]

    def count(self, call: str) -> int:
        return self.gpu.calls.count(call)


@pytest.fixture(autouse=True, scope="module")
def _quick_garbage_collection() -> Iterator[None]:
    """What was imported so far is not looked through again by every test."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    bench = Bench(tmp_path, monkeypatch)
    yield bench
    for engine in bench.opened:
        engine.close()
    bench.opened.clear()
    gc.collect()
    nothing_left(bench.gpu)


def nothing_left(gpu: Any) -> None:
    assert not gpu.faults
    assert not gpu.pinned and not gpu.graphs and not gpu.executables
    assert gpu.streams.keys() <= {sim.LEGACY}
    left = {base for base in gpu.memory if base not in gpu.__dict__.get("foreign", ())}
    assert not left, f"{len(left)} pieces of GPU memory leak"


def double(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"y": 2 * feeds["x"]}


def increment(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"y": feeds["x"] + 1}


def foreign(gpu: Any, values: np.ndarray, **options: Any) -> Any:
    tensor = sim.Foreign(gpu, values, **options)
    gpu.__dict__.setdefault("foreign", set()).add(tensor.address)
    return tensor


# ---- values ----


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_every_batch_size(bench: Bench, rows: int, cuda_graphs: bool) -> None:
    engine = bench.open("double", double, cuda_graphs=cuda_graphs)
    x = np.arange(3 * rows, dtype=np.float32).reshape(rows, 3)
    for turn in range(4):
        out = engine({"x": x + turn})["y"]
        assert (out.shape, out.dtype) == ((rows, 3), np.float32)
        assert np.array_equal(np.asarray(out), 2 * (x + turn))


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8", "int64", "bool"])
def test_every_type_in_and_out(bench: Bench, dtype: str) -> None:
    one = tensors(("batch", 3), dtype, "x")
    engine = bench.open("same", lambda feeds: {"y": feeds["x"]}, one, tensors(("batch", 3), dtype, "y"))
    x = np.array([[0, 1, 7], [250, 2, 0]]).astype(dtype)
    out = engine({"x": x})["y"]
    assert out.dtype == np.dtype(dtype)
    assert np.array_equal(np.asarray(out), x) and np.asarray(out).dtype == x.dtype
    assert np.array_equal(np.asarray(engine({"x": foreign(bench.gpu, x)})["y"]), x)


def test_contract_and_order_of_outputs(bench: Bench) -> None:
    outputs = (*tensors(("batch", 3), "float32", "double"), *tensors(("batch",), "int64", "total"))
    engine = bench.open("two", lambda f: {"total": f["x"].sum(1), "double": 2 * f["x"]}, outputs=outputs)
    out = engine({"x": X})
    assert list(out) == ["double", "total"]
    assert np.array_equal(np.asarray(out["total"]), [6, 3]) and np.array_equal(np.asarray(out["double"]), 2 * X)
    assert (list(engine.inputs), list(engine.outputs), dict(engine.axes)) == (["x"], ["double", "total"], AXES)


def test_asarray_converts_and_copies(bench: Bench) -> None:
    out = bench.open("double", double)({"x": X})["y"]
    assert np.asarray(out, np.float64).dtype == np.float64
    np.asarray(out)[:] = 0
    assert np.array_equal(np.asarray(out), 2 * X), "each array is the caller's own"
    with pytest.raises(ValueError, match="without a copy"):
        np.array(out, copy=False)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, r"expected the inputs \['x'\], got \[\]"),
        ({"x": X.astype(np.float64)}, "got float64"),
        ({"x": X[:, :2]}, r"got float32\(2, 2\)"),
        ({"x": np.zeros((5, 3), np.float32)}, "batch=5, the engine takes 1 to 4"),
    ],
)
def test_wrong_feeds_are_refused_before_it_runs(bench: Bench, feeds: dict[str, np.ndarray], message: str) -> None:
    engine = bench.open("double", double)
    before = engine({"x": X})["y"]
    with pytest.raises(FeedError, match=message):
        engine(feeds)
    assert np.array_equal(np.asarray(before), 2 * X), "a refused call overwrites nothing"


# ---- host memory ----


def test_strides_and_byte_order_of_host_arrays(bench: Bench) -> None:
    engine = bench.open("double", double)
    assert np.array_equal(np.asarray(engine({"x": np.asfortranarray(X)[:, ::-1]})["y"]), 2 * X[:, ::-1])
    assert np.array_equal(np.asarray(engine({"x": X.astype(">f4")})["y"]), 2 * X)


def test_a_host_array_may_be_overwritten_at_once(bench: Bench) -> None:
    """Also when the GPU is several calls behind: the pinned pieces take turns, and the third call waits for the first."""
    engine = bench.open("double", double)
    x, kept = X.copy(), []
    for turn in range(6):
        x[:] = X + turn
        kept.append(engine({"x": x})["y"].clone())
        x[:] = -1
    for turn, clone in enumerate(kept):
        assert np.array_equal(np.asarray(clone), 2 * (X + turn))
    assert engine.copied["host_to_device"] == 6 * X.nbytes


def test_calls_allocate_nothing_after_the_first(bench: Bench) -> None:
    engine = bench.open("double", double)
    np.asarray(engine({"x": X[:1]})["y"]), np.asarray(engine({"x": X[:1]})["y"])
    before = [bench.count(call) for call in ("cudaMalloc", "cudaHostAlloc")]
    for rows in (4, 3, 2, 1, 4):
        x = np.ones((rows, 3), np.float32)
        out = engine({"x": x})["y"]
        assert out.shape == (rows, 3)
    assert [bench.count(call) for call in ("cudaMalloc", "cudaHostAlloc")] == before


def test_the_host_waits_only_to_hand_over(bench: Bench) -> None:
    first, second = bench.open("double", double), bench.open("increment", increment)
    before = bench.count("cudaEventSynchronize")
    for _ in range(2):
        out = second({"x": first({"x": foreign(bench.gpu, X)})["y"]})["y"].clone()
    assert bench.count("cudaEventSynchronize") == before and bench.count("cudaStreamSynchronize") == 0
    assert np.array_equal(np.asarray(out), 2 * X + 1)
    assert bench.count("cudaEventSynchronize") == before + 1


def test_the_host_fills_one_pinned_piece_while_the_other_is_copied(bench: Bench) -> None:
    engine = bench.open("double", double)
    waits = []
    for _ in range(4):
        engine({"x": X})
        waits.append(bench.gpu.host_waits)
    assert waits == [0, 0, 1, 2], "the third call waits for the first"


# ---- from engine to engine ----


def test_outputs_feed_the_next_engine_without_a_copy(bench: Bench) -> None:
    first, second = bench.open("double", double), bench.open("increment", increment)
    out = second({"x": first({"x": X})["y"]})["y"]
    assert np.array_equal(np.asarray(out), 2 * X + 1), "the second stream waited for the first"
    assert dict(second.copied) == {"device_to_host": X.nbytes}
    assert dict(first.copied) == {"host_to_device": X.nbytes}


def test_an_output_is_not_overwritten_while_another_engine_reads_it(bench: Bench) -> None:
    first, second = bench.open("double", double), bench.open("increment", increment)
    middle = first({"x": X})["y"]
    out = second({"x": middle})["y"]
    again = first({"x": X + 5})["y"]
    assert np.array_equal(np.asarray(again), 2 * X + 10)
    assert np.array_equal(np.asarray(out), 2 * X + 1)


def test_an_engine_may_eat_its_own_output(bench: Bench) -> None:
    engine = bench.open("increment", increment)
    out = engine({"x": X})["y"]
    for _ in range(4):
        out = engine({"x": out})["y"]
    assert np.array_equal(np.asarray(out), X + 5)
    assert engine.copied["device_to_device"] == 4 * X.nbytes


def test_a_network_that_writes_before_it_has_read_all_of_its_own_output(bench: Bench) -> None:
    """Two outputs, of which the first overwrites what the second needs, unless the input was copied away."""
    names = tensors(("batch", 3), "float32", "y", "z")
    engine = bench.open("swap", lambda f: {"y": f["a"] - 1, "z": f["b"] * 3}, tensors(("batch", 3), "float32", "a", "b"), names)
    out = engine({"a": X, "b": X + 1})
    out = engine({"a": out["z"], "b": out["y"]})
    assert np.array_equal(np.asarray(out["y"]), 3 * (X + 1) - 1) and np.array_equal(np.asarray(out["z"]), 3 * (X - 1))


def test_an_overwritten_output_is_no_more(bench: Bench) -> None:
    first, second = bench.open("double", double), bench.open("increment", increment)
    old = first({"x": X})["y"]
    first({"x": X})
    uses = (np.asarray, lambda t: t.clone(), lambda t: second({"x": t}), lambda t: first({"x": t}))
    for use in (*uses, lambda t: t.__cuda_array_interface__):
        with pytest.raises(RuntimeError, match=r"float32\(2, 3\) was used after its engine was called again"):
            use(old)


def test_a_clone_lives_on(bench: Bench) -> None:
    engine = bench.open("double", double)
    clones = [engine({"x": X + turn})["y"].clone() for turn in range(3)]
    np.asarray(engine({"x": X - 9})["y"])  # runs the engine's stream: a clone that it did not wait for is too late
    for turn, clone in enumerate(clones):
        assert np.array_equal(np.asarray(clone), 2 * (X + turn))
    assert np.array_equal(np.asarray(engine({"x": clones[2]})["y"]), 4 * (X + 2))


def test_memory_of_a_dropped_clone_is_reused_after_its_readers(bench: Bench) -> None:
    first, second = bench.open("double", double), bench.open("increment", increment)
    out = second({"x": first({"x": X})["y"].clone()})["y"]
    allocations = bench.count("cudaMalloc")
    later = first({"x": X + 7})["y"].clone()  # lands where the first clone was
    assert bench.count("cudaMalloc") == allocations
    assert np.array_equal(np.asarray(later), 2 * (X + 7))
    assert np.array_equal(np.asarray(out), 2 * X + 1)


def test_outliving_copies_only_what_would_be_overwritten(bench: Bench) -> None:
    out = bench.open("double", double)({"x": X})["y"]
    kept = outliving(out)
    assert isinstance(kept, CudaTensor) and kept.block is not out.block
    assert outliving(X) is X


# ---- from and to other libraries ----


@pytest.mark.parametrize("given", [..., None, sim.LEGACY, "own"])
def test_tensors_of_other_libraries_are_read_where_they_are(bench: Bench, given: Any) -> None:
    engine = bench.open("double", double)
    own = bench.gpu.runtime.cudaStreamCreateWithFlags(1)[1]
    runs_in, says = (own, own) if given == "own" else (sim.LEGACY, given)
    x = foreign(bench.gpu, X, stream=says, runs_in=runs_in)
    outs = []
    for turn in range(4):
        outs.append(engine({"x": x})["y"].clone())
        x.write(X + turn + 1)  # must come after the engine has read
    bench.gpu.finish(bench.gpu.streams[runs_in])
    for turn, out in enumerate(outs):
        assert np.array_equal(np.asarray(out), 2 * (X + turn))
    assert engine.copied.keys() == {"device_to_device", "device_to_host"}, "only the clones and the arrays here"
    bench.gpu.runtime.cudaStreamDestroy(own)


def test_pytorch_is_asked_for_its_stream(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its interface does not say it."""
    engine = bench.open("double", double)
    own = bench.gpu.runtime.cudaStreamCreateWithFlags(1)[1]
    current = SimpleNamespace(cuda_stream=own)
    cuda = SimpleNamespace(current_stream=lambda device: current)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(Tensor=sim.Foreign, cuda=cuda))
    x = foreign(bench.gpu, X, stream=..., runs_in=own)
    x.device = 0
    out = engine({"x": x})["y"]
    x.write(X - 1)
    bench.gpu.finish(bench.gpu.streams[own])
    assert np.array_equal(np.asarray(out), 2 * X)
    current.cuda_stream = 0  # its default stream
    x.runs_in = sim.LEGACY
    x.write(X + 3)
    assert np.array_equal(np.asarray(engine({"x": x})["y"]), 2 * (X + 3))
    bench.gpu.runtime.cudaStreamDestroy(own)


def test_a_tensor_that_lies_askew_is_copied(bench: Bench) -> None:
    engine = bench.open("double", double)
    x = foreign(bench.gpu, X, offset=12)
    out = engine({"x": x})["y"]
    x.write(-X)
    bench.gpu.finish(bench.gpu.streams[sim.LEGACY])
    assert np.array_equal(np.asarray(out), 2 * X)
    assert engine.copied["device_to_device"] == X.nbytes


def test_a_view_of_its_own_output_by_another_library(bench: Bench) -> None:
    engine = bench.open("increment", increment)
    out = engine({"x": X})["y"]
    view = SimpleNamespace(__cuda_array_interface__=out.__cuda_array_interface__)
    assert np.array_equal(np.asarray(engine({"x": view})["y"]), X + 2)
    assert engine.copied["device_to_device"] == X.nbytes


@pytest.mark.parametrize(("strides", "fits"), [((12, 4), True), ((24, 8), False), ((4, 8), False)])
def test_gaps_are_refused(bench: Bench, strides: tuple[int, ...], fits: bool) -> None:
    engine = bench.open("double", double)
    x = foreign(bench.gpu, X)
    x.strides = strides
    if fits:
        assert np.array_equal(np.asarray(engine({"x": x})["y"]), 2 * X)
    else:
        with pytest.raises(FeedError, match=r"'x': expected a C-contiguous tensor, got strides"):
            engine({"x": x})


def test_foreign_tensors_of_another_kind_are_refused(bench: Bench) -> None:
    engine = bench.open("double", double)
    with pytest.raises(FeedError, match="expected x float32"):
        engine({"x": foreign(bench.gpu, X.astype(np.float16))})
    with pytest.raises(FeedError, match="byte order"):
        engine({"x": foreign(bench.gpu, X.astype(">f4"))})
    on_host = SimpleNamespace(__cuda_array_interface__={"shape": (2, 3), "typestr": "<f4", "data": (X.ctypes.data, False)})
    with pytest.raises(FeedError, match="'x' is on the host"):
        engine({"x": on_host})


def test_another_library_reads_an_output_where_it_is(bench: Bench) -> None:
    engine = bench.open("double", double)
    read = sim.read_by_library(bench.gpu, engine({"x": X})["y"])
    np.asarray(engine({"x": X + 1})["y"])  # must not overwrite before the library has read
    bench.gpu.finish(bench.gpu.streams[sim.LEGACY])
    assert np.array_equal(read, 2 * X)


def test_another_library_waits_for_an_output(bench: Bench) -> None:
    engine = bench.open("double", double)
    read = sim.read_by_library(bench.gpu, engine({"x": X})["y"].clone())
    bench.gpu.finish(bench.gpu.streams[sim.LEGACY])
    assert np.array_equal(read, 2 * X)


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


def test_another_address_is_never_replayed_with_the_old_one(bench: Bench) -> None:
    engine = bench.open("double", double)
    here, there = foreign(bench.gpu, X), foreign(bench.gpu, X + 50)
    for _ in range(3):
        assert np.array_equal(np.asarray(engine({"x": here})["y"]), 2 * X)
    assert engine.cuda_graphs == 1
    assert np.array_equal(np.asarray(engine({"x": there})["y"]), 2 * (X + 50))
    assert np.array_equal(np.asarray(engine({"x": X - 1})["y"]), 2 * (X - 1)), "nor an array of the host"
    assert np.array_equal(np.asarray(engine({"x": here})["y"]), 2 * X)


def test_graphs_are_bounded_and_the_unused_go(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "MAX_GRAPHS", 2)
    engine = bench.open("double", double)
    xs = [foreign(bench.gpu, X + number) for number in range(3)]

    def replays(number: int) -> bool:
        before = bench.count("cudaGraphLaunch")
        clones.append((engine({"x": xs[number]})["y"].clone(), 2 * (X + number)))
        return bench.count("cudaGraphLaunch") > before

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
    engines = {
        "double": bench.open("double", double, cuda_graphs=dice.random() < 0.7),
        "increment": bench.open("increment", increment),
        "add": bench.open("add", lambda f: {"y": f["a"] + f["b"]}, add),
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
    from wsss.engines.kernel_cache import save_kernels

    cache = sim.RuntimeCache()
    cache.kernels = {"other-gpu", "(2,3)"}
    save_kernels(bench.folder / "double.plan.kernels", cache)
    assert compiled(bench) == {"(2,3)"}
    assert "for another GPU, driver or TensorRT-RTX" in caplog.text


def test_a_folder_that_cannot_be_written_is_said(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wsss.files.os.fsync", full)
    compiled(bench)
    assert "compiled kernels cannot be saved: No space left on device" in caplog.text
    assert [path.name for path in bench.folder.iterdir()] == ["double.plan"], "and nothing half-written stays"


# ---- opening, failing, closing ----


def test_released_in_the_order_that_tensorrt_asks_for(bench: Bench) -> None:
    with bench.open("double", double) as engine:
        for rows in (1, 2, 1, 2):
            engine({"x": X[:rows]})
        assert engine.cuda_graphs == 2
    assert bench.gpu.released == ["context", "context", "context", "engine", "runtime"]
    nothing_left(bench.gpu)
    assert not bench.gpu.events or gc.collect() >= 0


def test_closing_twice_and_calling_after(bench: Bench) -> None:
    engine = bench.open("double", double)
    out = engine({"x": X})["y"]
    clone = out.clone()
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="double: called after it was closed"):
        engine({"x": X})
    with pytest.raises(RuntimeError, match="closed"):
        np.asarray(out)
    assert np.array_equal(np.asarray(clone), 2 * X), "a clone outlives its engine"
    del clone
    nothing_left(bench.gpu)


def test_an_engine_that_nobody_holds_frees_everything(bench: Bench) -> None:
    engine = bench.open("double", double)
    for _ in range(3):
        engine({"x": X})
    bench.opened.clear()
    del engine
    gc.collect()
    nothing_left(bench.gpu)
    assert bench.gpu.released[-2:] == ["engine", "runtime"]
    assert not bench.gpu.events


CALLS = ["cudaSetDevice", "cudaStreamCreateWithFlags", "cudaEventCreateWithFlags", "cudaMalloc"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_opening_that_fails_leaves_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch, call: str, after: int) -> None:
    function, left = getattr(sim.Calls, call), [after]

    def failing(gpu: Any, *args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise sim.Refusal(sim.Status.cudaErrorMemoryAllocation)
        return function(gpu, *args)

    monkeypatch.setattr(sim.Calls, call, staticmethod(failing))
    try:
        bench.open("double", double)
    except OutOfMemory as error:
        assert f"CUDA: {call}: cudaErrorMemoryAllocation" in error.message
        assert "--batch" in error.hint
    else:
        assert after > 0, "not every one of them is called three times"
    monkeypatch.undo()


def test_out_of_memory_in_a_call_is_said_and_survived(bench: Bench) -> None:
    engine = bench.open("double", double)
    bench.gpu.fail["cudaHostAlloc"] = sim.Status.cudaErrorMemoryAllocation
    with pytest.raises(OutOfMemory, match="CUDA: cudaHostAlloc: cudaErrorMemoryAllocation, said by the simulation"):
        engine({"x": X})
    bench.gpu.fail.clear()
    assert np.array_equal(np.asarray(engine({"x": X})["y"]), 2 * X), "TensorRT does not find the error of then"


def test_a_clone_takes_the_memory_of_dropped_ones_before_it_gives_up(bench: Bench) -> None:
    gpu = bench.use(sim.Gpu(memory_bytes=1 << 17))
    engine = bench.open("same", lambda f: {"y": f["x"]}, network={"activations_bytes": 1 << 12})
    out = engine({"x": np.ones((4, 3), np.float32)})["y"]
    spare = engine._cuda.take(1 << 16)
    engine._cuda.give_back(spare)
    gpu.memory_bytes = gpu.used_bytes(0)
    assert np.array_equal(np.asarray(out.clone()), np.ones((4, 3)))


def test_another_cuda_error_is_named(bench: Bench) -> None:
    engine = bench.open("double", double)
    out = engine({"x": X})["y"]
    bench.gpu.fail["cudaEventSynchronize"] = sim.Status.cudaErrorIllegalAddress
    with pytest.raises(WsssError, match="CUDA: cudaEventSynchronize: cudaErrorIllegalAddress") as caught:
        np.asarray(out)
    assert not isinstance(caught.value, OutOfMemory)
    bench.gpu.fail.clear()


def test_what_tensorrt_says_of_a_failed_run_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = bench.open("double", double)
    messages = ["Error Code 2: OutOfMemory (Requested size was 9 bytes.)", "Error Code 7: Internal Error"]

    def fails(self: Any, stream: int) -> bool:
        self._logger.log(sim.Severity.ERROR, messages.pop(0))
        return False

    monkeypatch.setattr(sim.Context, "execute_async_v3", fails)
    with pytest.raises(OutOfMemory, match="double: the run failed: Error Code 2"):
        engine({"x": X})
    with pytest.raises(WsssError, match=r"TensorRT 11\.0: the run failed: Error Code 7: Internal Error$") as caught:
        engine({"x": X})
    assert not isinstance(caught.value, OutOfMemory)


def test_a_plan_that_is_none(bench: Bench) -> None:
    path = bench.folder / "other.plan"
    path.write_bytes(b"rubbish")
    spec = GraphSpec(file="", inputs=tensors(("batch", 3), "float32", "x"), outputs=(), axes=AXES, opset=18)
    with pytest.raises(BundleError, match=r"other\.plan: refused: .*TensorRT 11\.0: not loaded: header\.magicTag") as caught:
        TrtEngine(path, spec, flavour="trt")
    assert "runtime.cpp" not in str(caught.value)
    with pytest.raises(BundleError, match=r"missing\.plan: cannot be read: No such file"):
        TrtEngine(bench.folder / "missing.plan", spec, flavour="trt")
    assert bench.gpu.released == ["runtime", "runtime"]


def test_weights_that_do_not_fit(bench: Bench) -> None:
    with pytest.raises(OutOfMemory, match="double: not loaded: .*out of memory"):
        bench.open("double", double, network={"weights_fit": False})


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"inputs": tensors(("batch", 3), "float32", "z")}, id="input name"),
        pytest.param({"inputs": tensors(("batch", 3), "float16", "x")}, id="input dtype"),
        pytest.param({"inputs": tensors(("batch", 4), "float32", "x")}, id="input side"),
        pytest.param({"inputs": tensors(("batch", 3, 1), "float32", "x")}, id="input rank"),
        pytest.param(
            {"inputs": tensors(("batch", 3), "float32", "y"), "outputs": tensors(("batch", 3), "float32", "x")}, id="mode"
        ),
        pytest.param({"outputs": tensors(("batch", 3), "float32", "y", "more")}, id="an output more"),
        pytest.param({"outputs": tensors(("batch", 5), "float32", "y")}, id="output side"),
        pytest.param({"outputs": tensors(("batch", 3), "int64", "y")}, id="output dtype"),
        pytest.param({"axes": {"batch": AxisRange(1, 2, 5)}}, id="wider than the profile"),
    ],
)
def test_a_manifest_of_another_engine_is_refused(bench: Bench, change: dict[str, Any]) -> None:
    one, other = tensors(("batch", 3), "float32", "x"), tensors(("batch", 3), "float32", "y")
    plan = bench.plan("double", sim.Network(one, other, AXES, double))
    spec = GraphSpec(file="graph.onnx", inputs=one, outputs=other, axes=AXES, opset=18)
    with pytest.raises(BundleError, match=r"double\.plan: the manifest and the engine differ in"):
        TrtEngine(plan, replace(spec, **change), flavour="trt")


@pytest.mark.parametrize("baked", ["inputs", "outputs"])
def test_an_engine_whose_free_axis_was_baked_in_is_refused(bench: Bench, baked: str) -> None:
    one, other = tensors(("batch", 3), "float32", "x"), tensors(("batch", 3), "float32", "y")
    network = sim.Network(one, other, AXES, double)
    setattr(network, baked, tensors((2, 3), "float32", "x" if baked == "inputs" else "y"))
    spec = GraphSpec(file="graph.onnx", inputs=one, outputs=other, axes=AXES, opset=18)
    with pytest.raises(BundleError, match="differ in"):
        TrtEngine(bench.plan("double", network), spec, flavour="trt")


@pytest.mark.parametrize(("method", "says"), [("get_tensor_location", "host"), ("is_shape_inference_io", True)])
def test_values_that_decide_shapes_are_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch, method: str, says: Any) -> None:
    monkeypatch.setattr(sim.Engine, method, lambda self, name: says)
    with pytest.raises(BundleError, match="differ in"):
        bench.open("double", double)


def test_a_shape_that_is_not_known_before_the_run_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim.Context, "get_tensor_shape", lambda self, name: (-1, 3))
    with pytest.raises(WsssError, match=r"the shape of 'y' depends on values: \(-1, 3\)"):
        bench.open("double", double)


# ---- several GPUs and threads ----


def test_a_second_gpu_and_another_thread(bench: Bench) -> None:
    gpu = bench.use(sim.Gpu(devices=2))
    engine = bench.open("double", double, device=1)
    found: list[np.ndarray] = []

    def work() -> None:
        for turn in range(3):
            found.append(np.asarray(engine({"x": X + turn})["y"].clone()))

    thread = threading.Thread(target=work)  # begins on GPU 0, as every thread
    thread.start()
    thread.join()
    assert [np.array_equal(value, 2 * (X + turn)) for turn, value in enumerate(found)] == [True] * 3
    assert set(gpu.device_at.values()) == {1}


def test_tensors_of_another_gpu_are_refused(bench: Bench) -> None:
    gpu = bench.use(sim.Gpu(devices=2))
    first = bench.open("double", double)
    x = first({"x": X})["y"]
    elsewhere = foreign(gpu, X)
    second = bench.open("increment", increment, device=1)
    for tensor in (x, elsewhere):
        with pytest.raises(FeedError, match=r"'x' is on cuda:0, the engine runs on cuda:1"):
            second({"x": tensor})


@pytest.mark.parametrize(
    ("devices", "device", "message"), [(0, 0, "needs an NVIDIA GPU.*cudaErrorInsufficientDriver"), (1, 1, "has 1 GPU$")]
)
def test_a_gpu_that_is_not_there(bench: Bench, devices: int, device: int, message: str) -> None:
    bench.use(sim.Gpu(devices=devices))
    with pytest.raises(WsssError) as caught:
        bench.open("double", double, device=device)
    assert re.search(message, caught.value.message) and caught.value.hint


def between(bench: Bench, monkeypatch: pytest.MonkeyPatch, call: str, act: Callable[[], object]) -> None:
    """Does something before the next call of CUDA's ``call``, as another thread might."""
    function = getattr(sim.Calls, call)

    def interrupted(gpu: Any, *args: Any) -> Any:
        monkeypatch.setattr(sim.Calls, call, staticmethod(function))
        act()
        return function(gpu, *args)

    interrupted.__annotations__["return"] = function.__annotations__["return"]
    monkeypatch.setattr(sim.Calls, call, staticmethod(interrupted))


def test_a_call_in_another_thread_waits_for_a_hand_over(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = bench.open("double", double)
    x = foreign(bench.gpu, X - 9)
    out = engine({"x": X})["y"]

    def call_again() -> None:
        engine({"x": x})
        bench.gpu.finish(bench.gpu.streams[int(engine._stream.handle)])

    between(bench, monkeypatch, "cudaEventSynchronize", call_again)
    assert np.array_equal(np.asarray(out), 2 * X)


@pytest.mark.parametrize("use", ["hand-over", "feed"])
def test_a_call_in_another_thread_that_came_between_is_noticed(bench: Bench, monkeypatch: pytest.MonkeyPatch, use: str) -> None:
    first, second = bench.open("double", double), bench.open("increment", increment)
    out = first({"x": X})["y"]
    between(bench, monkeypatch, "cudaStreamWaitEvent", lambda: first({"x": X}))
    with pytest.raises(RuntimeError, match="was used after its engine was called again"):
        np.asarray(out) if use == "hand-over" else second({"x": out})


# ---- the modules ----


@pytest.mark.parametrize(
    ("flavour", "absent", "message"),
    [
        ("trt-rtx", "cuda.bindings.runtime", "--engine trt-rtx: needs the package cuda-bindings"),
        ("trt-rtx", "tensorrt_rtx", "--engine trt-rtx: needs the package tensorrt_rtx"),
        ("trt", "tensorrt", "--engine trt: needs the package tensorrt"),
    ],
)
def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, flavour: Any, absent: str, message: str) -> None:
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(WsssError) as caught:
        load_modules(flavour)
    assert (caught.value.message, caught.value.hint) == (message, install_line(flavour))


# ---- the simulation itself ----


def test_the_simulation_answers_in_the_shape_of_the_real_calls() -> None:
    """Without a driver the real ones take their arguments, refuse, and return what they return."""
    real = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings: pip install 'wsss[trt-rtx]'")
    if int(real.cudaGetDeviceCount()[0]) == 0:
        pytest.skip("there is a GPU, which these calls would reach")
    stream, event, graph, executable = real.cudaStream_t(), real.cudaEvent_t(), real.cudaGraph_t(), real.cudaGraphExec_t()
    mode = real.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    arguments: dict[str, tuple[Any, ...]] = {
        "cudaGetDeviceCount": (),
        "cudaSetDevice": (0,),
        "cudaGetLastError": (),
        "cudaGetErrorName": (real.cudaError_t.cudaErrorMemoryAllocation,),
        "cudaGetErrorString": (real.cudaError_t.cudaErrorMemoryAllocation,),
        "cudaMalloc": (256,),
        "cudaFree": (4096,),
        "cudaHostAlloc": (256, 0),
        "cudaFreeHost": (4096,),
        "cudaPointerGetAttributes": (4096,),
        "cudaMemcpyAsync": (4096, 8192, 16, real.cudaMemcpyKind.cudaMemcpyHostToDevice, stream),
        "cudaStreamCreateWithFlags": (real.cudaStreamNonBlocking,),
        "cudaStreamDestroy": (stream,),
        "cudaStreamSynchronize": (stream,),
        "cudaStreamWaitEvent": (sim.LEGACY, event, 0),
        "cudaEventCreateWithFlags": (real.cudaEventDisableTiming | real.cudaEventBlockingSync,),
        "cudaEventRecord": (event, sim.LEGACY),
        "cudaEventSynchronize": (event,),
        "cudaEventQuery": (event,),
        "cudaEventDestroy": (event,),
        "cudaStreamBeginCapture": (stream, mode),
        "cudaStreamEndCapture": (stream,),
        "cudaGraphInstantiate": (graph, 0),
        "cudaGraphLaunch": (executable, stream),
        "cudaGraphDestroy": (graph,),
        "cudaGraphExecDestroy": (executable,),
    }
    assert arguments.keys() == {name for name in vars(sim.Calls) if name.startswith("cuda")}
    for name, given in arguments.items():
        bare = getattr(sim.Calls, name).__annotations__["return"] == "None"
        assert len(getattr(real, name)(*given)) == (1 if bare else 2), name
    for name in ("MemoryAllocation", "NotReady", "InsufficientDriver"):
        assert int(getattr(real.cudaError_t, f"cudaError{name}")) == getattr(sim.Status, f"cudaError{name}")


def test_the_simulation_invents_no_part_of_tensorrt() -> None:
    real = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install 'wsss[trt-rtx]'")
    pairs = (
        (sim.Engine, real.ICudaEngine),
        (sim.RtxContext, real.IExecutionContext),
        (sim.RuntimeConfig, real.IRuntimeConfig),
        (sim.RuntimeCache, real.IRuntimeCache),
        (sim.Gpu().tensorrt.Runtime, real.Runtime),
    )
    for simulated, genuine in pairs:
        names = {name for kind in simulated.__mro__[:-1] for name in vars(kind) if not name.startswith("_")}
        assert names and names <= set(dir(genuine)), genuine
    for name, value in vars(sim.Gpu().tensorrt).items():
        assert hasattr(real, name)
        if isinstance(value, SimpleNamespace):
            assert vars(value).keys() <= set(dir(getattr(real, name)))
