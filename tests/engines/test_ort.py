"""ONNX Runtime on a graph of two nodes: right numbers, tensors that feed the next engine, and files it must refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from wsss.engines.ort import OrtEngine, OrtTensor
from wsss.engines.ort_library import TF32
from wsss.errors import BundleError, FeedError, OutOfMemory, WsssError
from wsss.extras import replace_onnxruntime
from wsss.spec import AxisRange, GraphSpec, TensorSpec

X = np.array([[1, 2, 3], [4, 5, -6]], np.float32)


@pytest.fixture
def engine(onnx_file: Callable[..., Path], spec: GraphSpec) -> OrtEngine:
    return OrtEngine(onnx_file(), spec, threads=1)


@pytest.mark.parametrize("rows", [1, 2])
def test_values_by_name(engine: OrtEngine, rows: int) -> None:
    out = engine({"x": X[:rows]})
    assert list(out) == ["double", "total"]
    assert np.array_equal(np.asarray(out["double"]), 2 * X[:rows])
    assert np.array_equal(np.asarray(out["total"]), X[:rows].sum(axis=1))


def test_a_graph_is_read_as_onnx_whatever_its_name(onnx_file: Callable[..., Path], spec: GraphSpec) -> None:
    """ONNX Runtime takes a name that ends in .ort for its own format, whose weights would not be checked."""
    path = onnx_file()
    engine = OrtEngine(path.rename(path.with_suffix(".ort")), spec, threads=1)
    assert np.array_equal(np.asarray(engine({"x": X})["double"]), 2 * X)


def test_an_output_feeds_the_next_engine_as_it_is(engine: OrtEngine) -> None:
    first = engine({"x": X})["double"]
    assert isinstance(first, OrtTensor)
    assert (first.shape, first.dtype) == ((2, 3), np.float32)
    assert np.array_equal(np.asarray(engine({"x": first})["double"]), 4 * X)
    assert np.array_equal(np.asarray(first), 2 * X), "and lives on"


def test_outputs_of_two_calls_are_apart(engine: OrtEngine) -> None:
    first = engine({"x": X})["double"]
    second = engine({"x": X + 1})["double"]
    assert np.array_equal(np.asarray(first), 2 * X)
    assert np.array_equal(np.asarray(second), 2 * X + 2)


def test_asarray_converts_and_copies_on_request(engine: OrtEngine) -> None:
    out = engine({"x": X})["double"]
    assert np.asarray(out, np.float64).dtype == np.float64
    copy = np.array(out, copy=True)
    copy[:] = 0
    assert np.array_equal(np.asarray(out), 2 * X)


def test_a_view_with_gaps_is_fed_right(onnx_file: Callable[..., Path], spec: GraphSpec) -> None:
    many = OrtEngine(onnx_file(), replace(spec, axes={"batch": AxisRange(1, 2, 100_000)}), threads=1)
    turned = np.arange(300_000, dtype=np.float32).reshape(3, 100_000).T
    for _ in range(5):
        assert np.array_equal(np.asarray(many({"x": turned})["double"]), 2 * turned)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, r"expected the inputs \['x'\], got \[\]"),
        ({"y": X}, r"got \['y'\]"),
        ({"x": X.astype(np.float64)}, "got float64"),
        ({"x": X[:, :2]}, r"got float32\(2, 2\)"),
        ({"x": np.zeros((5, 3), np.float32)}, "batch=5, the engine takes 1 to 4"),
    ],
)
def test_wrong_feeds_are_refused_before_it_runs(engine: OrtEngine, feeds: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(FeedError, match=message):
        engine(feeds)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"inputs": (TensorSpec("y", ("batch", 3), "float32"),)}, id="input name"),
        pytest.param({"inputs": (TensorSpec("x", ("batch", 3), "uint8"),)}, id="input dtype"),
        pytest.param({"inputs": (TensorSpec("x", ("batch", 4), "float32"),)}, id="input side"),
        pytest.param({"inputs": (TensorSpec("x", ("batch", 3, 1), "float32"),)}, id="input rank"),
        pytest.param({"outputs": (TensorSpec("double", ("batch", 3), "float32"),)}, id="an output less"),
        pytest.param(
            {"outputs": (TensorSpec("double", ("batch", 5), "float32"), TensorSpec("total", ("batch",), "float32"))},
            id="output side",
        ),
    ],
)
def test_a_manifest_of_another_graph_is_refused(
    onnx_file: Callable[..., Path], spec: GraphSpec, change: dict[str, tuple[TensorSpec, ...]]
) -> None:
    with pytest.raises(BundleError, match=r"double\.onnx: the manifest says"):
        OrtEngine(onnx_file(), replace(spec, **change))


def test_a_graph_whose_free_axis_was_baked_in_is_refused(onnx_file: Callable[..., Path], spec: GraphSpec) -> None:
    """An export traced with one batch size runs, and fails only at the second photograph."""
    with pytest.raises(BundleError, match="the manifest says"):
        OrtEngine(onnx_file(batch=1), spec)


def test_a_truncated_file_is_named(onnx_file: Callable[..., Path], spec: GraphSpec) -> None:
    path = onnx_file()
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(BundleError, match=r"double\.onnx: ONNX Runtime cannot load it") as caught:
        OrtEngine(path, spec)
    assert caught.value.hint == "export the model again"


@pytest.mark.parametrize("data", [b"", b"no graph at all"])
def test_what_is_no_graph_is_named(tmp_path: Path, spec: GraphSpec, data: bytes) -> None:
    (tmp_path / "double.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=r"double\.onnx: ONNX Runtime cannot load it"):
        OrtEngine(tmp_path / "double.onnx", spec)


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA")
def test_cuda_without_a_cuda_build_says_what_to_install(onnx_file: Callable[..., Path], spec: GraphSpec) -> None:
    with pytest.raises(WsssError, match="no CUDA provider") as caught:
        OrtEngine(onnx_file(), spec, device="cuda")
    assert caught.value.hint.startswith(replace_onnxruntime("gpu"))


def test_a_call_without_memory_says_so(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    helper, types = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [helper.make_node("Expand", ["x", "shape"], ["wide"]), helper.make_node("ReduceSum", ["wide"], ["y"], keepdims=0)],
        "wide",
        [helper.make_tensor_value_info("x", types.FLOAT, [1]), helper.make_tensor_value_info("shape", types.INT64, [1])],
        [helper.make_tensor_value_info("y", types.FLOAT, [])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "wide.onnx")
    inputs = (TensorSpec("x", (1,), "float32"), TensorSpec("shape", (1,), "int64"))
    spec = GraphSpec(file="wide.onnx", inputs=inputs, outputs=(TensorSpec("y", (), "float32"),), axes={}, opset=18)
    engine = OrtEngine(tmp_path / "wide.onnx", spec, threads=1)
    ones = np.ones(1, np.float32)
    assert np.asarray(engine({"x": ones, "shape": np.array([7])})["y"]) == 7
    with pytest.raises(OutOfMemory, match="wide: the cpu has no memory for this call"):
        engine({"x": ones, "shape": np.array([1 << 45])})
    with pytest.raises(Exception, match="must be >= 0"):  # another failure is not called so
        engine({"x": ones, "shape": np.array([-2])})


@pytest.fixture
def weighted(tmp_path: Path) -> Path:
    """x + w for w = 1, 2, 3 in a file beside it."""
    onnx = pytest.importorskip("onnx")
    helper, types = onnx.helper, onnx.TensorProto
    folder = tmp_path / "snapshots" / "1" / "model"
    folder.mkdir(parents=True)
    (folder / "w.data").write_bytes(np.array([1, 2, 3], np.float32).tobytes())
    weights = types(name="w", data_type=types.FLOAT, dims=[3], data_location=types.EXTERNAL)
    weights.external_data.add(key="location", value="w.data")
    values = [helper.make_tensor_value_info(name, types.FLOAT, [3]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", values[:1], values[1:], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (folder / "add.onnx").write_bytes(model.SerializeToString())
    return folder / "add.onnx"


@pytest.mark.parametrize("linked", [[], ["w.data"], ["add.onnx", "w.data"]], ids=["files", "weights", "both"])
def test_weights_of_a_hub_s_cache(weighted: Path, linked: list[str]) -> None:
    """ONNX Runtime 1.24 opens no link that leads out of the folder, 1.32 only where the graph is one too."""
    blobs = weighted.parents[3] / "blobs"
    blobs.mkdir()
    for number, name in enumerate(linked):
        (weighted.parent / name).rename(blobs / str(number))
        (weighted.parent / name).symlink_to(blobs / str(number))
    outputs = (TensorSpec("y", (3,), "float32"),)
    spec = GraphSpec(file="add.onnx", inputs=(TensorSpec("x", (3,), "float32"),), outputs=outputs, axes={}, opset=18)
    assert np.array_equal(np.asarray(OrtEngine(weighted, spec)({"x": np.ones(3, np.float32)})["y"]), [2, 3, 4])


def test_idle_threads_sleep(onnx_file: Callable[..., Path], spec: GraphSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they hold the cores that other engines need; the options of a session are seen here alone."""
    used = {}
    session = onnxruntime.InferenceSession

    def spy(path: str, options: onnxruntime.SessionOptions, **how: object) -> object:
        used.update(how, spinning=options.get_session_config_entry("session.intra_op.allow_spinning"))
        return session(path, options, **how)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    OrtEngine(onnx_file(), spec)
    assert used == {"spinning": "0", "providers": ["CPUExecutionProvider"], "disabled_optimizers": []}
    OrtEngine(onnx_file(), replace(spec, precision="fp16"))
    assert used["disabled_optimizers"] == ["NchwcTransformer"], "it ends in a segmentation fault on float16 convolutions"


@pytest.mark.parametrize(
    "message",
    [
        "Failed to allocate memory for requested buffer of size 1",  # the CPU's arena
        "CUDA failure 2: out of memory",
        "Exception: std::bad_alloc",
        "Exception: bad allocation",  # Windows
    ],
)
def test_every_way_to_run_out_of_memory_is_told(
    onnx_file: Callable[..., Path], spec: GraphSpec, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    engine = OrtEngine(onnx_file(), spec)

    def fail(feeds: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(engine, "_run", fail)
    with pytest.raises(OutOfMemory, match="double: the cpu has no memory for this call"):
        engine({"x": X})


# ---- a GPU, whose session is played ----


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Sessions on a GPU are opened on the CPU; returns the providers that were asked for."""
    asked: list[Any] = []
    session = onnxruntime.InferenceSession

    class Session:
        def __init__(self, path: str, options: object, *, providers: list[Any], **how: object) -> None:
            asked.extend(providers)
            self.real = session(path, options, providers=["CPUExecutionProvider"], **how)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr("wsss.engines.ort.cuda_trouble", lambda: None)
    return asked


def test_a_session_that_fell_back_to_the_cpu_is_refused(
    onnx_file: Callable[..., Path], spec: GraphSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime only logs that CUDA's libraries are missing, and computes on the CPU."""
    session = onnxruntime.InferenceSession
    monkeypatch.setattr("wsss.engines.ort.cuda_trouble", lambda: None)
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *args, **how: session(*args, **{**how, "providers": ["CPUExecutionProvider"]})
    )
    with pytest.raises(WsssError, match=r"double\.onnx: asked for cuda:1, ONNX Runtime fell back to \['CPUExecutionProvider'\]"):
        OrtEngine(onnx_file(), spec, device="cuda:1")


@pytest.mark.parametrize(("variable", "tf32"), [(None, "0"), ("0", "0"), ("1", "1")])
def test_on_a_gpu_fp32_stays_fp32_unless_asked_for(
    on_cuda: list[Any],
    onnx_file: Callable[..., Path],
    spec: GraphSpec,
    monkeypatch: pytest.MonkeyPatch,
    variable: str | None,
    tf32: str,
) -> None:
    monkeypatch.delenv(TF32, raising=False) if variable is None else monkeypatch.setenv(TF32, variable)
    OrtEngine(onnx_file(), spec, device="cuda:1")
    (provider, options), *_ = on_cuda
    assert (provider, options["device_id"], options["use_tf32"]) == ("CUDAExecutionProvider", "1", tf32)
    assert options["arena_extend_strategy"] == "kSameAsRequested" and options["cudnn_conv_algo_search"] == "HEURISTIC"


@pytest.mark.parametrize(
    "text",
    [
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0",
        "CUDNN failure 4: CUDNN_STATUS_ALLOC_FAILED ; GPU=0",
        "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "CUDA failure 2: out of memory",
        "Failed to allocate memory for requested buffer of size 9",
    ],
)
def test_every_way_to_be_out_of_memory_is_one_error(
    onnx_file: Callable[..., Path], spec: GraphSpec, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    engine = OrtEngine(onnx_file(), spec)

    def fail(feeds: object) -> None:
        raise RuntimeError(f"[ONNXRuntimeError] : 1 : FAIL : {text}")

    monkeypatch.setattr(engine, "_run", fail)
    with pytest.raises(OutOfMemory):
        engine({"x": np.ones((1, 3), np.float32)})
