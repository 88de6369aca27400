"""Opening, failing and closing of TensorRT's engine on a simulated GPU."""

from __future__ import annotations

import gc
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from wsss.engines.trt import TrtEngine
from wsss.errors import BundleError, OutOfMemory, WsssError
from wsss.spec import AxisRange, GraphSpec

from . import simulated_gpu as sim
from .bench import AXES, Bench, X, double, nothing_left, tensors


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
    for use in (lambda: engine({"x": X}), lambda: engine.upload(X)):
        with pytest.raises(RuntimeError, match="double: called after it was closed"):
            use()
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


def test_an_engine_without_scratch_memory_opens(bench: Bench) -> None:
    """TensorRT takes no null pointer as the scratch memory, and ``cudaMalloc`` returns one for 0 bytes."""
    assert bench.open("double", double, network={"activations_bytes": 0}).cuda_graphs == 0


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


def test_the_last_errors_of_a_failed_run_are_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT reports what failed last; earlier lines say what was tried."""
    engine = bench.open("double", double)

    def fails(self: Any, stream: int) -> bool:
        for number in range(5):
            self._logger.log(sim.Severity.ERROR, f"Error Code {number}")
        return False

    monkeypatch.setattr(sim.Context, "execute_async_v3", fails)
    with pytest.raises(WsssError, match=r"the run failed: Error Code 2; Error Code 3; Error Code 4$"):
        engine({"x": X})


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


def test_warnings_of_tensorrt_are_logged_and_errors_are_not(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    logger = bench.open("double", double)._contexts._logger
    with caplog.at_level(logging.INFO):
        logger.log(sim.Severity.WARNING, "a slow kernel")
        logger.log(sim.Severity.ERROR, "a wrong shape")
    assert [record.getMessage() for record in caplog.records] == ["TensorRT: a slow kernel"]
    assert logger.take_errors() == "a wrong shape"
