"""TensorRT's engine on a simulated GPU that runs nothing before it must: what is not waited for is wrong.

`simulated_gpu.py` says what is simulated. `test_trt_gpu.py` does the real thing.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from wsss.engines.trt import load_modules
from wsss.errors import FeedError, WsssError
from wsss.extras import install_line

from . import simulated_gpu as sim
from .bench import AXES, Bench, X, double, foreign, increment, tensors

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
        "cudaMemsetAsync": (4096, 255, 16, stream),
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
