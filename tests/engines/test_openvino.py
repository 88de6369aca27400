"""OpenVINO on small graphs: right numbers, batches in several requests, proofs, and files it must refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from wsss.engines import openvino as module
from wsss.engines.openvino import OpenVinoEngine, checked_proof, independent_rows, instructions, version
from wsss.errors import BundleError, FeedError, OutOfMemory, WsssError
from wsss.extras import install_line
from wsss.spec import AxisRange, GraphSpec, Manifest, Model, OpenVinoProof, Parity, Preprocess, TensorSpec

pytestmark = pytest.mark.usefixtures("needs_openvino")

X = np.array([[1, 2, 3], [4, 5, -6]], np.float32)


@pytest.fixture
def engine(onnx_file: Callable[..., Path], spec: GraphSpec) -> OpenVinoEngine:
    return OpenVinoEngine(onnx_file(), spec)


@pytest.mark.parametrize("rows", [1, 2])
def test_values_by_name(engine: OpenVinoEngine, rows: int) -> None:
    out = engine({"x": X[:rows]})
    assert list(out) == ["double", "total"]
    assert np.array_equal(out["double"], 2 * X[:rows]) and out["double"].dtype == np.float32
    assert np.array_equal(out["total"], X[:rows].sum(axis=1))


def test_outputs_of_two_calls_are_apart(engine: OpenVinoEngine) -> None:
    first = engine({"x": X})["double"]
    second = engine({"x": X + 1})["double"]
    assert np.array_equal(first, 2 * X)
    assert np.array_equal(second, 2 * X + 2)


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 50])
def test_rows_of_a_batch_come_back_in_their_order(
    onnx_file: Callable[..., Path], spec: GraphSpec, monkeypatch: pytest.MonkeyPatch, cores: int, rows: int
) -> None:
    monkeypatch.setattr(module, "cores", lambda: cores)
    monkeypatch.setattr(module, "REQUEST_BYTES", 5 * 3 * 4)  # five rows
    engine = OpenVinoEngine(onnx_file(), replace(spec, axes={"batch": AxisRange(1, 2, 50)}))
    x = np.arange(3 * rows, dtype=np.float32).reshape(rows, 3)
    for _ in range(2):
        out = engine({"x": x})
        assert np.array_equal(out["double"], 2 * x) and np.array_equal(out["total"], x.sum(axis=1))


@pytest.mark.parametrize(
    ("cores", "rows", "most", "sizes"),
    [
        (2, 1, 100, [1]),
        (2, 2, 100, [1, 1]),
        (2, 5, 100, [3, 2]),
        (2, 5, 2, [2, 2, 1]),
        (2, 4, 0, [1, 1, 1, 1]),  # a row larger than the limit goes alone
        (4, 5, 100, [2, 2, 1]),
        (16, 8, 100, [2, 2, 2, 2]),  # four cores for each
        (1, 5, 100, [5]),
    ],
)
def test_sizes_of_requests(
    onnx_file: Callable[..., Path],
    spec: GraphSpec,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    rows: int,
    most: int,
    sizes: list[int],
) -> None:
    monkeypatch.setattr(module, "cores", lambda: cores)
    monkeypatch.setattr(module, "REQUEST_BYTES", most * 3 * 4)
    engine = OpenVinoEngine(onnx_file(), replace(spec, axes={"batch": AxisRange(1, 2, 50)}))
    parts = list(engine._parts({"x": np.zeros((rows, 3), np.float32)}))
    assert [len(part["x"]) for part in parts] == sizes


def test_a_call_of_one_request_takes_all_cores(
    onnx_file: Callable[..., Path], spec: GraphSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams share the cores, so that a graph compiled for two of them would leave half of the cores idle."""
    monkeypatch.setattr(module, "cores", lambda: 2)
    engine = OpenVinoEngine(onnx_file(), spec)
    compiled: list[int] = []
    compile_ = engine._compile
    monkeypatch.setattr(engine, "_compile", lambda at_once: compiled.append(at_once) or compile_(at_once))
    for rows in (1, 1, 2, 1, 2):
        engine({"x": X[:rows]})
    assert compiled == [1, 2], "and no third time for a single row"


def test_settings(onnx_file: Callable[..., Path], spec: GraphSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """FP32 stays FP32, and processes do not pin their threads to the same cores."""
    used: dict[str, Any] = {}
    engine = OpenVinoEngine(onnx_file(), spec)
    core = module._core()
    compile_model = core.compile_model

    def spy(model: object, device: str, settings: dict[str, Any]) -> object:
        used.update(settings, device=device)
        return compile_model(model, device, settings)

    monkeypatch.setattr(module, "_core", lambda: SimpleNamespace(compile_model=spy))
    monkeypatch.setattr(module, "cores", lambda: 2)
    engine({"x": X})
    expected = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 2, "INFERENCE_NUM_THREADS": 2, "ENABLE_CPU_PINNING": False}
    assert used == {**expected, "device": "CPU"}


def test_the_graphs_of_a_whole_image_are_not_split() -> None:
    def of(*outputs: tuple[int | str, ...]) -> str | None:
        tensors = tuple(TensorSpec(f"{number}", shape, "float32") for number, shape in enumerate(outputs))
        return independent_rows(GraphSpec(file="x.onnx", inputs=(), outputs=tensors, axes={}, opset=18))

    assert of(("batch", 3), ("batch",)) == "batch"
    assert of(("height", "width"), ("picked",)) is None  # SAM's fuse
    assert of((3,)) is None and of(()) is None


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, r"expected the inputs \['x'\], got \[\]"),
        ({"x": X.astype(np.float64)}, "got float64"),
        ({"x": np.zeros((5, 3), np.float32)}, "batch=5, the engine takes 1 to 4"),
    ],
)
def test_wrong_feeds_are_refused_before_it_runs(engine: OpenVinoEngine, feeds: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(FeedError, match=message):
        engine(feeds)


def test_views_and_read_only_arrays_are_fed_right(onnx_file: Callable[..., Path], spec: GraphSpec) -> None:
    many = OpenVinoEngine(onnx_file(), replace(spec, axes={"batch": AxisRange(1, 2, 1000)}))
    turned = np.arange(3000, dtype=np.float32).reshape(3, 1000).T
    turned.flags.writeable = False
    assert np.array_equal(many({"x": turned})["double"], 2 * turned)
    straight = np.arange(3000, dtype=np.float32).reshape(1000, 3)
    straight.flags.writeable = False
    assert np.array_equal(many({"x": straight})["double"], 2 * straight)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"inputs": (TensorSpec("y", ("batch", 3), "float32"),)}, id="input name"),
        pytest.param({"inputs": (TensorSpec("x", ("batch", 3), "uint8"),)}, id="input dtype"),
        pytest.param({"inputs": (TensorSpec("x", ("batch", 4), "float32"),)}, id="input side"),
        pytest.param({"inputs": (TensorSpec("x", ("batch", 3, 1), "float32"),)}, id="input rank"),
        pytest.param({"outputs": (TensorSpec("double", ("batch", 3), "float32"),)}, id="an output less"),
    ],
)
def test_a_manifest_of_another_graph_is_refused(
    onnx_file: Callable[..., Path], spec: GraphSpec, change: dict[str, tuple[TensorSpec, ...]]
) -> None:
    with pytest.raises(BundleError, match=r"double\.onnx: the manifest says"):
        OpenVinoEngine(onnx_file(), replace(spec, **change))


def test_a_graph_whose_free_axis_was_baked_in_is_refused(onnx_file: Callable[..., Path], spec: GraphSpec) -> None:
    with pytest.raises(BundleError, match="the manifest says"):
        OpenVinoEngine(onnx_file(batch=1), spec)


@pytest.mark.parametrize("data", [b"", b"no graph at all", None])
def test_what_is_no_graph_is_named(onnx_file: Callable[..., Path], spec: GraphSpec, data: bytes | None) -> None:
    path = onnx_file()
    path.write_bytes(path.read_bytes()[:-40] if data is None else data)
    with pytest.raises(BundleError, match=r"double\.onnx: OpenVINO cannot load it: \w+") as caught:
        OpenVinoEngine(path, spec)
    assert caught.value.hint == "export the model again" and "\n" not in caught.value.message


@pytest.mark.parametrize("message", ["std::bad_alloc", "could not allocate memory"])
def test_every_way_to_run_out_of_memory_is_told(engine: OpenVinoEngine, monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    def fail(parts: object) -> None:
        raise RuntimeError(f"Exception from src/x.cpp:1:\n{message}")

    monkeypatch.setattr(engine, "_run", fail)
    with pytest.raises(OutOfMemory, match="double: the cpu has no memory for this call"):
        engine({"x": X})


def test_another_failure_is_not_called_so(engine: OpenVinoEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(parts: object) -> None:
        raise RuntimeError("a shape does not fit")

    monkeypatch.setattr(engine, "_run", fail)
    with pytest.raises(RuntimeError, match="a shape does not fit"):
        engine({"x": X})


def test_without_the_package_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(WsssError, match="needs the package openvino") as caught:
        module.openvino()
    assert caught.value.hint == install_line("openvino")


def test_its_telemetry_is_off(onnx_file: Callable[..., Path], tmp_path: Path) -> None:
    """The package brings openvino-telemetry, which writes an identifier to the home folder when it is imported."""
    home = tmp_path / "home"
    home.mkdir()
    script = (
        "import socket, sys\n"
        "def no(*a, **k): raise AssertionError('a socket')\n"
        "socket.socket.connect = socket.getaddrinfo = no\n"
        "from wsss.engines import openvino\n"
        f"openvino._core().compile_model({str(onnx_file())!r}, 'CPU')\n"
        "assert 'openvino_telemetry' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "HOME": str(home)})
    assert not list(home.rglob("*")), "a file in HOME"


# ---- proofs ----

PARITY = Parity(engine="OpenVINO", reference="r", tolerance={}, rows=())


def proven(model_file: Path, spec: GraphSpec, **proof: Any) -> Model:
    """A model whose graph has a proof with these fields, or none."""
    fields: dict[str, Any] = {"version": version(), "processor": instructions(), "seconds": 1.0, "ort_seconds": 2.0}
    made = OpenVinoProof(**fields | proof, parity=PARITY)
    graphs = {"double": replace(spec, openvino={made.processor: made} if proof.get("seconds") != 0 else {})}
    preprocess = Preprocess(
        resize="squash", longest_px=3, filter="bilinear", canvases=((3, 3),), mean=(0, 0, 0), std=(1, 1, 1), source="test"
    )
    manifest = Manifest(family="sam", variant="test", preprocess=preprocess, graphs=graphs, weights={}, tools={})
    return Model(model_file.parent, manifest)


@pytest.mark.parametrize(
    ("proof", "message"),
    [
        ({"seconds": 0}, "was never compared with PyTorch"),
        ({"version": "2020.1"}, "was compared with PyTorch in OpenVINO 2020.1, installed is 20"),
        ({"processor": "sse9"}, f"was compared with PyTorch on processors with sse9, this one has {instructions()}"),
    ],
)
def test_only_a_proof_for_this_machine_counts(
    onnx_file: Callable[..., Path], spec: GraphSpec, proof: dict[str, Any], message: str
) -> None:
    path = onnx_file()
    with pytest.raises(BundleError, match=message) as caught:
        checked_proof(proven(path, spec, **proof), "double")
    assert f"wsss verify {path.parent.parent} --engine openvino" in str(caught.value.hint)
    assert checked_proof(proven(path, spec), "double").seconds == 1


@pytest.mark.parametrize(
    ("flags", "machine", "expected"),
    [
        ("fpu avx avx2 fma", "x86_64", "avx2"),
        ("fpu avx2 avx512f avx512_bf16 avx512bw", "x86_64", "avx512_bf16"),
        ("fpu avx2 avx512f avx512_bf16 amx_bf16 amx_tile", "x86_64", "amx_bf16"),
        ("fpu sse2", "x86_64", "x86_64"),
        (None, "arm64", "arm64"),
    ],
)
def test_the_newest_instructions_count(monkeypatch: pytest.MonkeyPatch, flags: str | None, machine: str, expected: str) -> None:
    def read(path: Path, encoding: str) -> str:
        if flags is None:
            raise FileNotFoundError(path)
        return f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: none\n"

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(module.platform, "machine", lambda: machine)
    assert instructions.__wrapped__() == expected
