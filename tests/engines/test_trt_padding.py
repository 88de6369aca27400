"""Padded axes of TensorRT's engine, and tensors that stay on the GPU or come from it together, on a simulated GPU."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from wsss.engines import tensors as tensors_module
from wsss.engines.engine import uploaded
from wsss.engines.padding import FILL, LENGTHS, padded_length
from wsss.engines.tensors import CudaTensor, Gathered
from wsss.engines.trt import TrtEngine
from wsss.spec import AxisRange, TensorSpec

from .bench import Bench, X, double, foreign, increment

AXES = {"batch": AxisRange(1, 2, 4), "tokens": AxisRange(4, 16, 60), "boxes": AxisRange(1, 8, 64)}
TEXT = (TensorSpec("text", ("batch", "tokens"), "float32"), TensorSpec("phrase", ("batch", "tokens"), "int64"))
BOXES = (TensorSpec("boxes", ("boxes", 4), "float32"), TensorSpec("phrase", ("boxes",), "int64"))
SUMS = (TensorSpec("each", ("batch", "tokens"), "float32"), TensorSpec("sum", ("batch",), "float32"))


def test_lengths() -> None:
    for axis, lengths in LENGTHS.items():
        axes = {axis: AxisRange(1, 2, 50)}
        assert list(lengths) == sorted(set(lengths))
        padded = [padded_length(axis, length, axes) for length in range(1, 51)]
        assert all(length <= each <= 50 for length, each in enumerate(padded, 1)) and padded == sorted(padded)
        assert len(set(padded)) <= 5
    assert padded_length("batch", 3, {"batch": AxisRange(1, 2, 4)}) == 3, "an image costs as much as a real one"
    assert set(FILL.values()) <= {0, -1}, "what filling bytes can write"


def text_graph(bench: Bench, shapes: set[tuple[int, ...]]) -> TrtEngine:
    """Twice each token of a phrase, and the sum of them."""

    def compute(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        shapes.add(feeds["text"].shape)
        assert (feeds["text"][feeds["phrase"] < 0] == 0).all()
        each = np.where(feeds["phrase"] < 0, np.nan, 2 * feeds["text"])
        return {"each": each, "sum": np.nansum(each, axis=1)}

    return bench.open("text", compute, TEXT, SUMS, axes=AXES)


def text(batch: int, tokens: int) -> dict[str, np.ndarray]:
    values = np.arange(batch * tokens, dtype=np.float32).reshape(batch, tokens) + tokens
    return {"text": values, "phrase": np.arange(batch * tokens).reshape(batch, tokens) % 3}


def test_a_few_shapes_for_all_numbers_of_tokens(bench: Bench) -> None:
    shapes: set[tuple[int, ...]] = set()
    engine = text_graph(bench, shapes)
    replays = []
    for tokens in (16, 4, 9, 17, 30, 60, 7, 33, 59, 20):
        feeds, before = text(2, tokens), bench.count("cudaGraphLaunch")
        out = engine(feeds)
        assert out["each"].shape == (2, tokens)
        assert np.array_equal(np.asarray(out["each"]), 2 * feeds["text"])
        assert np.array_equal(np.asarray(out["sum"]), 2 * feeds["text"].sum(axis=1))
        replays.append(bench.count("cudaGraphLaunch") - before)
    assert shapes == {(2, 16), (2, 32), (2, 60)}, "the last is the engine's limit"
    assert replays == [0, 0, 1, 0, 0, 0, 1, 0, 1, 1]


def test_a_cut_output_is_read_by_anyone(bench: Bench) -> None:
    engine = text_graph(bench, set())
    feeds = text(2, 5)
    out = engine(feeds)["each"]
    assert isinstance(out, CudaTensor) and not out.is_contiguous
    clone = out.clone()
    interface: dict[str, Any] = clone.__cuda_array_interface__
    assert (interface["shape"], interface["strides"]) == ((2, 5), (16 * 4, 4))
    again = engine({**feeds, "text": clone})["each"]
    assert np.array_equal(np.asarray(again), 4 * feeds["text"])
    assert np.array_equal(np.asarray(clone), 2 * feeds["text"])


def box_graph(bench: Bench, rows: list[int]) -> TrtEngine:
    def compute(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows.append(len(feeds["boxes"]))
        assert (feeds["phrase"][-1] == -1) == (not feeds["boxes"][-1].any()), "no rubbish where nothing was given"
        return {"area": feeds["boxes"].prod(axis=1)}

    return bench.open("boxes", compute, BOXES, (TensorSpec("area", ("boxes",), "float32"),), axes=AXES)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_rows_are_appended_on_the_host_and_on_the_gpu(bench: Bench, on_gpu: bool) -> None:
    rows: list[int] = []
    engine = box_graph(bench, rows)
    for count in (64, 1, 3, 8, 9, 5, 20):
        boxes = np.arange(4 * count, dtype=np.float32).reshape(count, 4) + 1
        feeds: dict[str, Any] = {"boxes": boxes, "phrase": np.zeros(count, np.int64)}
        if on_gpu:
            feeds = {name: foreign(bench.gpu, array) for name, array in feeds.items()}
        assert np.array_equal(np.asarray(engine(feeds)["area"]), boxes.prod(axis=1))
    assert set(rows) == {8, 16, 32, 64}


def test_a_tensor_on_the_gpu_is_not_padded_between_its_rows(bench: Bench) -> None:
    shapes: set[tuple[int, ...]] = set()
    engine = text_graph(bench, shapes)
    feeds = text(2, 5)
    out = engine({**feeds, "text": foreign(bench.gpu, feeds["text"])})
    assert np.array_equal(np.asarray(out["each"]), 2 * feeds["text"])
    assert shapes == {(2, 5)}


# ---- on the GPU for several calls ----


def test_an_uploaded_array_is_fed_in_parts(bench: Bench) -> None:
    engine = bench.open("double", double)
    x = np.arange(30, dtype=np.float32).reshape(10, 3)
    given = x.copy()
    there = uploaded(engine, given)
    given[:] = -1
    sent = engine.copied["host_to_device"]
    for start in (0, 3, 9):
        assert np.array_equal(np.asarray(engine({"x": there[start : start + 4]})["y"]), 2 * x[start : start + 4])
    assert engine.copied["host_to_device"] == sent == x.nbytes
    part = there[2:4]
    del there
    other = uploaded(engine, np.full((10, 3), 5, np.float32))
    assert np.array_equal(np.asarray(part), x[2:4]), "a part keeps the whole"
    assert np.array_equal(np.asarray(other), np.full((10, 3), 5))


def test_uploads_of_any_size_and_number(bench: Bench) -> None:
    engine = bench.open("double", double)
    arrays = [np.full(1 << (5 + 2 * number % 16), number, np.int64) for number in range(20)]
    there = [uploaded(engine, array) for array in arrays]
    for tensor, array in zip(there, arrays, strict=True):
        assert np.array_equal(np.asarray(tensor), array)


@pytest.mark.parametrize(("chunk_bytes", "waits"), [(1, 10), (64, 3), (1 << 20, 1)])
def test_outputs_gathered(bench: Bench, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, waits: int) -> None:
    monkeypatch.setattr(tensors_module, "CHUNK_BYTES", chunk_bytes)
    engine = text_graph(bench, set())
    gathered, expected = Gathered(), []
    before = bench.gpu.host_waits
    for turn in range(5):
        feeds = text(1, 4 + turn)
        out = engine({name: foreign(bench.gpu, array) for name, array in feeds.items()})
        for tensor in (out["each"], out["sum"], X + turn):
            gathered.add(tensor)
        expected += [2 * feeds["text"], 2 * feeds["text"].sum(axis=1), X + turn]
    assert bench.gpu.host_waits == before
    arrays = gathered.arrays()
    assert bench.gpu.host_waits == before + waits
    for found, wanted in zip(arrays, expected, strict=True):
        assert found.dtype == wanted.dtype and np.array_equal(found, wanted)


def test_outputs_of_several_engines_gathered(bench: Bench) -> None:
    engine, other = bench.open("double", double), bench.open("increment", increment)
    gathered = Gathered()
    for turn in range(2):
        gathered.add(engine({"x": X + turn})["y"])
        gathered.add(other({"x": X + turn})["y"])
    for found, wanted in zip(gathered.arrays(), [2 * X, X + 1, 2 * X + 2, X + 2], strict=True):
        assert np.array_equal(found, wanted)


def test_an_output_is_gathered_before_the_next_call(bench: Bench) -> None:
    engine = bench.open("double", double)
    out = engine({"x": X})["y"]
    engine({"x": X})
    with pytest.raises(RuntimeError, match="was used after its engine was called again"):
        Gathered().add(out)
    assert Gathered().arrays() == []


def test_lengths_ascend_and_are_those_that_kernels_are_fast_for() -> None:
    for lengths in LENGTHS.values():
        assert list(lengths) == sorted(set(lengths)) and not any(length % 8 for length in lengths)


def test_the_axes_are_those_of_the_exporters() -> None:
    """Names with a promise: see the docstring of `padding`."""
    from wsss.engines import padding
    from wsss.runtime.bundles import MINI
    from wsss.spec import open_bundle

    bundle = open_bundle(MINI)
    axes = {axis for name in bundle.models() for graph in bundle.model(name).manifest.graphs.values() for axis in graph.axes}
    of_photos = {"photo_height", "photo_width"}  # of bundles in half precision
    assert LENGTHS.keys() - of_photos <= axes and axes - LENGTHS.keys() == {"batch", "phrases", "length"}
    assert {
        name for line in re.findall(r"^- (.*?):", padding.__doc__ or "", re.M) for name in re.findall(r"``(\w+)``", line)
    } == (LENGTHS.keys())
