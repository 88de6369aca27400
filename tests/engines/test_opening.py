"""From a name after ``--engine`` to an engine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from wsss.engines import opening, openvino
from wsss.engines.opening import choose, open_graph
from wsss.engines.ort import OrtEngine
from wsss.errors import BundleError, UsageError, WsssError
from wsss.extras import install_line
from wsss.spec import GraphSpec, Manifest, Model, OpenVinoProof, Parity, Preprocess

if TYPE_CHECKING:
    from collections.abc import Mapping


@pytest.fixture
def model(onnx_file: Callable[..., Path], spec: GraphSpec) -> Model:
    graphs: Mapping[str, GraphSpec] = {"double": spec}
    preprocess = Preprocess(
        resize="squash", longest_px=3, filter="bilinear", canvases=((3, 3),), mean=(0, 0, 0), std=(1, 1, 1), source="test"
    )
    manifest = Manifest(family="sam", variant="test", preprocess=preprocess, graphs=graphs, weights={}, tools={})
    return Model(onnx_file().parent, manifest)


@pytest.mark.parametrize(
    ("engine", "device", "chosen"),
    [
        ("auto", "auto", ("ort", "cpu")),
        ("ort", "cpu", ("ort", "cpu")),
        ("eager", "auto", ("eager", "cpu")),
        ("ort", "cuda", ("ort", "cuda:0")),
        ("openvino", "auto", ("openvino", "cpu")),
        ("trt", "cuda:1", ("trt", "cuda:1")),
        ("trt-rtx", "auto", ("trt-rtx", "cuda:0")),
    ],
)
def test_names(model: Model, engine: str, device: str, chosen: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_ort_uses_gpu", lambda: False)
    assert choose(engine, device, [model]) == chosen


def test_onnx_runtime_takes_the_gpu_it_can_use(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_ort_uses_gpu", lambda: True)
    assert choose("auto", "auto", [model]) == ("ort", "cuda:0")
    assert choose("auto", "cpu", [model]) == ("ort", "cpu")
    assert choose("eager", "auto", [model]) == ("eager", "cpu"), "what PyTorch can use is another question"


@pytest.mark.parametrize("typed", ["", "ORT", "onnx", "tensorflow"])
def test_an_unknown_engine_lists_the_known_ones(typed: str) -> None:
    with pytest.raises(UsageError, match=f"--engine: expected one of auto, ort, openvino, trt, trt-rtx, eager, got '{typed}'"):
        choose(typed, "auto", [])


@pytest.mark.parametrize("typed", ["", "gpu", "cpu:1", "cuda:x", "auto:0"])
def test_an_unknown_device_lists_the_known_ones(typed: str) -> None:
    with pytest.raises(UsageError, match=f"--device: expected auto, cpu, cuda or cuda:N, got '{typed}'"):
        choose("ort", typed, [])


def test_tensorrt_does_not_run_on_the_cpu() -> None:
    with pytest.raises(UsageError, match="--device cpu: --engine trt runs on a GPU"):
        choose("trt", "cpu", [])


@pytest.mark.parametrize("engine", ["auto", "ort"])
def test_opens_a_graph_of_a_model(model: Model, engine: str) -> None:
    assert isinstance(open_graph(model, "double", engine), OrtEngine)


def test_onnx_runtime_does_not_compute_in_bf16(model: Model) -> None:
    graphs = {"double": replace(model.graph("double"), precision="bf16")}
    with pytest.raises(BundleError, match="double.onnx: is in bf16") as caught:
        open_graph(replace(model, manifest=replace(model.manifest, graphs=graphs)), "double", "ort")
    assert "--precision fp32" in str(caught.value.hint)


# ---- OpenVINO ----


def proven(model: Model, seconds: float | None, ort_seconds: float | None, processor: str = "") -> Model:
    proof = OpenVinoProof(
        version=openvino.version(),
        processor=processor or openvino.instructions(),
        seconds=seconds,
        ort_seconds=ort_seconds,
        parity=Parity(engine="OpenVINO", reference="r", tolerance={}, rows=()),
    )
    graphs = {"double": replace(model.graph("double"), openvino={proof.processor: proof})}
    return replace(model, manifest=replace(model.manifest, graphs=graphs))


@pytest.mark.usefixtures("needs_openvino")
@pytest.mark.parametrize(("seconds", "ort_seconds", "chosen"), [(1, 2, "openvino"), (2, 1, "ort")])
def test_auto_takes_the_faster_one_on_the_cpu(
    model: Model, monkeypatch: pytest.MonkeyPatch, seconds: float, ort_seconds: float, chosen: str
) -> None:
    monkeypatch.setattr(opening, "_ort_uses_gpu", lambda: False)
    assert choose("auto", "auto", [proven(model, seconds, ort_seconds)]) == (chosen, "cpu")
    assert choose("auto", "cpu", [proven(model, seconds, ort_seconds)]) == (chosen, "cpu")
    # Times of several models are added: one that is slower does not decide.
    assert choose("auto", "cpu", [proven(model, 1, 5), proven(model, 3, 2)]) == ("openvino", "cpu")
    assert choose("auto", "cpu", [proven(model, 1, 2), model]) == ("ort", "cpu"), "every graph has to be proven"
    assert choose("auto", "cuda", [proven(model, seconds, ort_seconds)])[0] == "ort", "it does not run on a GPU"
    monkeypatch.setattr(opening, "_ort_uses_gpu", lambda: True)
    assert choose("auto", "auto", [proven(model, seconds, ort_seconds)]) == ("ort", "cuda:0")


@pytest.mark.usefixtures("needs_openvino")
def test_auto_takes_openvino_for_bf16(model: Model) -> None:
    proven_model = proven(model, None, None)
    assert choose("auto", "cpu", [proven_model]) == ("ort", "cpu"), "not timed, so not known to be faster"
    graphs = {"double": replace(proven_model.graph("double"), precision="bf16")}
    in_bf16 = replace(proven_model, manifest=replace(model.manifest, graphs=graphs))
    assert choose("auto", "cpu", [in_bf16]) == ("openvino", "cpu")


@pytest.mark.usefixtures("needs_openvino")
def test_auto_says_why_a_proof_does_not_count(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert choose("auto", "cpu", [proven(model, 1, 2, "sse9")]) == ("ort", "cpu")
    assert "--engine auto: not openvino" in caplog.text and "processors with sse9" in caplog.text


@pytest.mark.usefixtures("needs_openvino")
def test_openvino_is_not_taken_where_instructions_are_restricted(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It would end the process."""
    compared = proven(model, 1, 2)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert choose("auto", "cpu", [compared]) == ("ort", "cpu")
    assert "ONEDNN_MAX_CPU_ISA=AVX2 restricts the processor" in caplog.text
    openvino._core.cache_clear()
    with pytest.raises(WsssError, match="ONEDNN_MAX_CPU_ISA=AVX2 restricts the processor") as caught:
        open_graph(model, "double", "openvino", unverified=True)
    assert caught.value.hint == "unset ONEDNN_MAX_CPU_ISA, or take --engine ort"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "all")
    assert choose("auto", "cpu", [compared]) == ("openvino", "cpu")


@pytest.mark.usefixtures("needs_openvino")
def test_openvino_opens_what_was_compared(model: Model) -> None:
    assert isinstance(open_graph(proven(model, 1, 2), "double", "openvino"), openvino.OpenVinoEngine)
    with pytest.raises(BundleError, match="never compared with PyTorch"):
        open_graph(model, "double", "openvino")
    assert isinstance(open_graph(model, "double", "openvino", unverified=True), openvino.OpenVinoEngine)


def test_openvino_does_not_run_on_a_gpu() -> None:
    with pytest.raises(UsageError, match="--device cuda: --engine openvino runs on the CPU"):
        choose("openvino", "cuda", [])


def test_a_graph_it_has_not(model: Model) -> None:
    with pytest.raises(BundleError, match="no graph 'triple', only double"):
        open_graph(model, "triple", "ort")


def test_eager_without_torch_says_what_to_install(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wsss.export.reference", raising=False)
    monkeypatch.delitem(sys.modules, "wsss.engines.eager", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(WsssError, match="--engine eager: needs torch") as caught:
        open_graph(model, "double", "eager")
    assert caught.value.hint == install_line("export")
