"""Activation memory that TensorRT's engines share, on a simulated GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from wsss.engines.trt import TrtEngine
from wsss.errors import OutOfMemory
from wsss.spec import AxisRange

from . import simulated_gpu as sim
from .bench import Bench, X, double, foreign, increment, tensors

MIB = 1 << 20


def per_row(mib: int) -> dict[str, Any]:
    """A network that needs this memory for each row of its call."""

    def needed(shapes: Mapping[str, tuple[int, ...]]) -> int:
        return mib * MIB * next(iter(shapes.values()))[0]

    return {"network": {"activations_bytes": 4 * mib * MIB, "activations_of": needed}}


def rows(count: int, value: float = 1) -> np.ndarray:
    return np.full((count, 3), value, np.float32)


def used_mib(bench: Bench) -> int:
    return int(bench.gpu.used_bytes(0)) // MIB


def test_memory_is_that_of_the_largest_call_not_of_all_profiles(bench: Bench) -> None:
    first, second = bench.open("double", double, **per_row(10)), bench.open("increment", increment, **per_row(30))
    assert used_mib(bench) == 0, "opening takes none"
    found = [first({"x": rows(2)})["y"].clone()]
    assert used_mib(bench) == 20
    found.append(second({"x": rows(1)})["y"].clone())
    assert used_mib(bench) == 30, "which both share"
    found.append(first({"x": rows(3)})["y"].clone())
    assert used_mib(bench) == 30
    for tensor, expected in zip(found, (rows(2, 2), rows(1, 2), rows(3, 2)), strict=True):
        assert np.array_equal(np.asarray(tensor), expected)
    first.close()
    assert used_mib(bench) == 30
    assert np.array_equal(np.asarray(second({"x": rows(2)})["y"]), rows(2, 2))
    assert used_mib(bench) == 60
    second.close()
    assert used_mib(bench) == 0


def test_a_smaller_batch_fits(bench: Bench) -> None:
    bench.use(sim.Gpu(memory_bytes=25 * MIB))
    engine = bench.open("double", double, **per_row(10))
    for _ in range(3):
        with pytest.raises(OutOfMemory, match="cudaMalloc"):
            engine({"x": rows(4)})
        for turn in range(3):
            assert np.array_equal(np.asarray(engine({"x": rows(2, turn)})["y"]), rows(2, 2 * turn))


def test_padding_never_makes_a_call_too_large(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.use(sim.Gpu(memory_bytes=55 * MIB))
    boxes, area = tensors(("boxes", 3), "float32", "x"), tensors(("boxes", 3), "float32", "y")
    engine = bench.open("double", double, boxes, area, axes={"boxes": AxisRange(1, 8, 16)}, **per_row(10))
    for count in (5, 2, 5, 5, 3, 5):
        assert np.array_equal(np.asarray(engine({"x": rows(count)})["y"]), rows(count, 2))
    with pytest.raises(OutOfMemory):
        engine({"x": rows(6)})
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == ["pads its inputs no more"]


def test_graphs_whose_activations_moved_are_captured_again(bench: Bench) -> None:
    first, second = bench.open("double", double, **per_row(1)), bench.open("increment", increment, **per_row(2))

    def replays(engine: TrtEngine, count: int, result: float) -> bool:
        before = bench.count("cudaGraphLaunch")
        outs.append((engine({"x": foreign(bench.gpu, rows(count, 5))})["y"].clone(), rows(count, result)))
        return bench.count("cudaGraphLaunch") > before

    outs: list[tuple[Any, np.ndarray]] = []
    assert [replays(first, 1, 10) for _ in range(3)] == [False, False, True]
    assert [replays(second, 1, 6) for _ in range(3)] == [False, False, True], "the other's first call moved the memory"
    assert [replays(first, 1, 10) for _ in range(2)] == [False, True], "seen before, so captured at once"
    assert not replays(second, 4, 6)
    assert [replays(engine, 1, result) for engine, result in ((first, 10), (second, 6)) * 2] == [False] * 2 + [True] * 2
    assert [replays(second, 4, 6) for _ in range(2)] == [False, True]
    for tensor, expected in outs:
        assert np.array_equal(np.asarray(tensor), expected)
    first({"x": X}), second({"x": X})  # destroy what has ended
    assert bench.count("cudaGraphExecDestroy") == 3 and not bench.gpu.faults


def test_each_gpu_has_its_own(bench: Bench) -> None:
    bench.use(sim.Gpu(devices=2))
    engines = [bench.open(f"double{device}", double, device=device, **per_row(1 + device)) for device in (0, 1)]
    for engine in engines:
        assert np.array_equal(np.asarray(engine({"x": X})["y"]), 2 * X)
    assert [bench.gpu.used_bytes(device) // MIB for device in (0, 1)] == [2, 4]


@pytest.mark.parametrize("method", [True, False])
def test_a_tensorrt_that_cannot_tell_gets_the_memory_of_the_profile(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, method: bool
) -> None:
    if method:
        monkeypatch.setattr(sim.Context, "update_device_memory_size_for_shapes", lambda self: 0)
    else:
        monkeypatch.delattr(sim.Context, "update_device_memory_size_for_shapes")
    engine = bench.open("double", double, **per_row(3))
    assert np.array_equal(np.asarray(engine({"x": X})["y"]), 2 * X)
    assert used_mib(bench) == 12


def test_a_failed_opening_leaves_the_arena_to_the_others(bench: Bench) -> None:
    first = bench.open("double", double, **per_row(1))
    first({"x": X})
    with pytest.raises(OutOfMemory):
        bench.open("increment", increment, network={"weights_fit": False})
    assert np.array_equal(np.asarray(first({"x": X})["y"]), 2 * X) and used_mib(bench) == 2
