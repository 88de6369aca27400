"""Tensors of TensorRT's engine shared with other engines, libraries, GPUs and threads, on a simulated GPU."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from wsss.engines.engine import outliving
from wsss.engines.tensors import CudaTensor, foreign_tensor
from wsss.errors import FeedError, WsssError

from . import simulated_gpu as sim
from .bench import Bench, X, double, foreign, increment, tensors

# ---- from engine to engine ----


def test_outputs_feed_the_next_engine_on_the_gpu(bench: Bench) -> None:
    first, second = bench.open("double", double), bench.open("increment", increment)
    out = second({"x": first({"x": X})["y"]})["y"]
    assert np.array_equal(np.asarray(out), 2 * X + 1), "the second stream waited for the first"
    assert dict(second.copied) == {"device_to_device": X.nbytes, "device_to_host": X.nbytes}
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


def test_an_input_that_is_there_already_is_not_copied_again(bench: Bench) -> None:
    first, second = bench.open("double", double), bench.open("increment", increment)
    for turn in range(3):
        out = first({"x": X + turn})["y"]
        for tensor in (out, out, out):
            assert np.array_equal(np.asarray(second({"x": tensor})["y"]), 2 * (X + turn) + 1)
    assert second.copied["device_to_device"] == 3 * X.nbytes
    assert np.array_equal(np.asarray(second({"x": X})["y"]), X + 1)
    assert np.array_equal(np.asarray(second({"x": out})["y"]), 2 * (X + 2) + 1), "an array came between"
    sim.read_by_library(bench.gpu, out)
    second({"x": out})
    assert second.copied["device_to_device"] == 5 * X.nbytes, "another library may have written to it"


def test_an_input_whose_copy_failed_is_copied_again(bench: Bench) -> None:
    first, second = bench.open("double", double), bench.open("increment", increment)
    second({"x": X})
    out = first({"x": X})["y"]
    bench.gpu.fail["cudaMemcpyAsync"] = sim.Status.cudaErrorInvalidValue
    with pytest.raises(WsssError, match="cudaErrorInvalidValue"):
        second({"x": out})
    bench.gpu.fail.clear()
    assert np.array_equal(np.asarray(second({"x": out})["y"]), 2 * X + 1)


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


def test_a_clone_outlives_its_engine_and_other_clones(bench: Bench) -> None:
    engine = bench.open("double", double)
    dropped, kept = engine({"x": X})["y"].clone(), engine({"x": X + 1})["y"].clone()
    engine.close()
    del dropped
    assert np.array_equal(np.asarray(kept), 2 * (X + 1))


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
def test_tensors_of_other_libraries_are_read_on_the_gpu(bench: Bench, given: Any) -> None:
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


@pytest.mark.parametrize(("shape", "strides"), [((1, 3), (999, 4)), ((2, 1), (4, 999)), ((0, 3), (0, 0))])
def test_strides_of_one_step_or_none_do_not_matter(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    interface = {"shape": shape, "typestr": "<f4", "data": (256, False), "strides": strides}
    tensor = foreign_tensor(SimpleNamespace(__cuda_array_interface__=interface), "x")
    assert (tensor.shape, tensor.dtype, tensor.address) == (shape, np.float32, 256)


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


@pytest.mark.parametrize("use", ["hand-over", "feed", "clone"])
def test_a_call_in_another_thread_that_came_between_is_noticed(bench: Bench, monkeypatch: pytest.MonkeyPatch, use: str) -> None:
    first, second = bench.open("double", double), bench.open("increment", increment)
    out = first({"x": X})["y"]
    between(bench, monkeypatch, "cudaStreamWaitEvent", lambda: first({"x": X}))
    with pytest.raises(RuntimeError, match="was used after its engine was called again"):
        {"hand-over": np.asarray, "feed": lambda out: second({"x": out}), "clone": lambda out: out.clone()}[use](out)


def test_a_reader_that_comes_while_the_next_writer_waits_is_noticed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may neither break the writer's wait for the readers before it, nor be forgotten."""
    first, second = bench.open("double", double), bench.open("increment", increment)
    out = first({"x": X})["y"]
    np.asarray(out)  # a reader, for which the next call waits
    noticed: list[str] = []

    def read() -> None:
        try:
            second({"x": out})
        except RuntimeError as error:
            noticed.append(f"{error}")

    between(bench, monkeypatch, "cudaStreamWaitEvent", read)
    assert np.array_equal(np.asarray(first({"x": X + 1})["y"]), 2 * (X + 1))
    assert noticed and "was used after its engine was called again" in noticed[0]
