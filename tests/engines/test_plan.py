"""Which TensorRT engines are refused, and what the user is told."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from wsss.engines import opening, plan
from wsss.engines.contexts import why_invalid
from wsss.engines.plan import Gpu, checked_plan
from wsss.errors import BundleError, WsssError
from wsss.extras import install_line
from wsss.spec import AMPERE_OR_NEWER, AxisRange, GraphSpec, Manifest, Model, Parity, PlanSpec, Preprocess, sha256_of

HERE = Gpu(0, "NVIDIA Test 4090", "8.9", "13.0", 24 << 30)
PARITY = Parity(engine="trt-rtx", reference="torch", tolerance={}, rows=())


@pytest.fixture
def model(onnx_file: Callable[..., Path], spec: GraphSpec, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model with a plan built ahead of time, for this GPU among others, whose gate has passed."""
    monkeypatch.setattr(plan, "tensorrt_module", lambda flavour: SimpleNamespace(__version__="1.7.1"))
    graph = onnx_file()
    (graph.parent / "double.trt-rtx.plan").write_bytes(b"native code" * 100)
    (graph.parent / "weights.data").write_bytes(b"weights")
    files = {name: sha256_of(graph.parent / name) for name in (graph.name, "weights.data")}
    spec = replace(spec, file=graph.name)
    built = PlanSpec(
        file="double.trt-rtx.plan",
        sha256=sha256_of(graph.parent / "double.trt-rtx.plan"),
        flavour="trt-rtx",
        graph_sha256=files[graph.name],
        weights_sha256=files["weights.data"],
        precision="fp32",
        axes={axis: AxisRange(1, 1, 2) for axis in spec.axes},
        builder="1.7.1",
        target="sm86 sm89",
        seconds=1.0,
        parity=PARITY,
    )
    preprocess = Preprocess(
        resize="squash", longest_px=3, filter="bilinear", canvases=((3, 3),), mean=(0, 0, 0), std=(1, 1, 1), source="test"
    )
    graphs = {"double": replace(spec, plans={"trt-rtx": built})}
    manifest = Manifest(family="sam", variant="test", preprocess=preprocess, graphs=graphs, weights={}, tools={}, files=files)
    return Model(graph.parent, manifest)


def changed(model: Model, **changes: object) -> Model:
    """The model whose plan says something else."""
    spec = model.graph("double")
    other = replace(spec.plans["trt-rtx"], **changes)  # type: ignore[arg-type]
    return Model(model.folder, replace(model.manifest, graphs={"double": replace(spec, plans={"trt-rtx": other})}))


def test_a_plan_that_fits_is_taken_with_its_own_profile(model: Model) -> None:
    path, spec = checked_plan(model, "double", "trt-rtx", HERE)
    assert path == model.folder / "double.trt-rtx.plan"
    assert set(spec.axes.values()) == {AxisRange(1, 1, 2)}


REBUILD = "wsss export --model sam --engine trt-rtx --bundle "


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"graph_sha256": "0" * 64}, "another state of the graph"),
        ({"weights_sha256": "0" * 64}, "another state of the weights"),
        ({"precision": "fp16"}, "was built in fp16, the graph is fp32"),
        ({"builder": "1.6.0"}, "built by version 1.6.0, installed is 1.7.1"),
        ({"target": "sm80 sm86"}, r"was built for sm80 sm86, this is NVIDIA Test 4090 \(sm89\)"),
        ({"target": "NVIDIA H200", "driver": "13.0"}, "was built on NVIDIA H200, this is NVIDIA Test 4090"),
    ],
)
def test_a_plan_bound_to_something_else_is_refused(model: Model, changes: dict[str, object], message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        checked_plan(changed(model, **changes), "double", "trt-rtx", HERE)
    assert REBUILD + str(model.folder.parent) in str(caught.value.hint)


def test_a_plan_built_here_is_taken(model: Model) -> None:
    checked_plan(changed(model, target=HERE.name, driver=HERE.driver), "double", "trt-rtx", HERE)


@pytest.mark.parametrize("driver", ["12.8", "13.1"])
def test_another_driver_voids_the_verdict_and_not_the_plan(model: Model, driver: str) -> None:
    other = changed(model, target=HERE.name, driver=driver)
    with pytest.raises(BundleError, match=rf"never compared .* under this driver \(CUDA 13.0; CUDA {driver} then\)") as caught:
        checked_plan(other, "double", "trt-rtx", HERE)
    assert "wsss verify" in caught.value.hint
    checked_plan(other, "double", "trt-rtx", HERE, unverified=True)


def test_a_bundle_serves_several_gpus(model: Model) -> None:
    spec = model.graph("double")
    built = replace(spec.plans["trt-rtx"], flavour="trt", driver=HERE.driver)
    plans = [replace(built, target=name, file=f"{name}.plan") for name in ("NVIDIA L4", HERE.name, AMPERE_OR_NEWER)]
    spec = replace(spec, plans={plan.key: plan for plan in plans})
    assert list(spec.plans) == ["trt on NVIDIA L4", f"trt on {HERE.name}", f"trt on {AMPERE_OR_NEWER}"]
    assert spec.plan_for("trt", HERE.name) == plans[1]
    assert spec.plan_for("trt", "NVIDIA A100") == plans[2], "which runs there too"
    assert spec.plan_for("trt-rtx") is None
    several = Model(model.folder, replace(model.manifest, graphs={"double": spec}))
    for each in plans:
        shutil.copy(model.folder / "double.trt-rtx.plan", model.folder / each.file)
    assert checked_plan(several, "double", "trt", HERE)[0].name == f"{HERE.name}.plan"
    a100 = replace(HERE, name="NVIDIA A100", capability="8.0")
    assert checked_plan(several, "double", "trt", a100)[0].name == f"{AMPERE_OR_NEWER}.plan"
    with pytest.raises(BundleError, match="was built on GPUs of compute capability 8.0 and newer, this is T4"):
        checked_plan(several, "double", "trt", replace(HERE, name="T4", capability="7.5"))


@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: bytes([data[0] ^ 1]) + data[1:], lambda data: b""])
def test_a_plan_truncated_or_with_a_flipped_bit_is_refused(model: Model, spoil: Callable[[bytes], bytes]) -> None:
    path = model.folder / "double.trt-rtx.plan"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(BundleError, match="changed or truncated") as caught:
        checked_plan(model, "double", "trt-rtx", HERE)
    assert REBUILD in str(caught.value.hint)


@pytest.mark.parametrize("name", ["../double.trt-rtx.plan", "gone.plan", ""])
def test_a_plan_that_is_missing_or_elsewhere_is_refused(model: Model, name: str) -> None:
    with pytest.raises(BundleError, match=r"missing|plain file"):
        checked_plan(changed(model, file=name), "double", "trt-rtx", HERE)


def test_a_plan_without_a_gate_is_refused_unless_typed(model: Model) -> None:
    bare = changed(model, parity=None)
    with pytest.raises(BundleError, match="never compared with PyTorch") as caught:
        checked_plan(bare, "double", "trt-rtx", HERE)
    assert "wsss verify" in str(caught.value.hint) and "--unverified" in str(caught.value.hint)
    checked_plan(bare, "double", "trt-rtx", HERE, unverified=True)


def test_no_plan_says_how_to_build_one(model: Model) -> None:
    with pytest.raises(BundleError, match="has no trt engine") as caught:
        checked_plan(model, "double", "trt", HERE)
    assert "--engine trt --bundle" in str(caught.value.hint)


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan.MODULES, "trt", "a_library_that_is_not_there")
    with pytest.raises(WsssError, match="needs the package") as caught:
        plan.tensorrt_module("trt")
    assert caught.value.hint == install_line("trt")


# ---- GPUs ----


def cuda(monkeypatch: pytest.MonkeyPatch, *, driver: int, status: str) -> None:
    """Replace cuda-bindings by ones that answer so."""
    from cuda.bindings import runtime

    monkeypatch.setattr(runtime, "cudaDriverGetVersion", lambda: (runtime.cudaError_t.cudaSuccess, driver))
    monkeypatch.setattr(runtime, "cudaGetDeviceCount", lambda: (getattr(runtime.cudaError_t, status), 0))


def test_a_driver_older_than_the_bindings_is_named_with_the_line_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings", reason="needs cuda-bindings")
    cuda(monkeypatch, driver=12040, status="cudaErrorInsufficientDriver")
    with pytest.raises(WsssError, match=r"driver serves CUDA 12\.4, cuda-bindings .* needs a newer one") as caught:
        plan.find_gpus()
    assert install_line("trt-cu12") in caught.value.hint and install_line("trt-rtx-cu12") in caught.value.hint
    cuda(monkeypatch, driver=11080, status="cudaErrorInsufficientDriver")
    with pytest.raises(WsssError) as caught:
        plan.find_gpus()
    assert caught.value.hint == "update the driver"


def test_gpus_are_those_that_the_driver_answers_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of three does not answer; the others keep their numbers."""
    pytest.importorskip("cuda.bindings", reason="needs cuda-bindings")
    from cuda.bindings import runtime

    fine, broken = runtime.cudaError_t.cudaSuccess, runtime.cudaError_t.cudaErrorUnknown

    def properties(index: int) -> tuple[object, object]:
        facts = SimpleNamespace(name=b"NVIDIA Test\0" if index else "NVIDIA Test\0", major=8, minor=9, totalGlobalMem=24 << 30)
        return (broken, None) if index == 1 else (fine, facts)

    monkeypatch.setattr(runtime, "cudaDriverGetVersion", lambda: (fine, 13010))
    monkeypatch.setattr(runtime, "cudaGetDeviceCount", lambda: (fine, 3))
    monkeypatch.setattr(runtime, "cudaGetDeviceProperties", properties)
    assert plan.find_gpus() == tuple(Gpu(index, "NVIDIA Test", "8.9", "13.1", 24 << 30) for index in (0, 2))


@pytest.mark.parametrize("status", ["cudaErrorInsufficientDriver", "cudaErrorNoDevice"])
def test_without_a_driver_there_are_no_gpus(status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings", reason="needs cuda-bindings")
    cuda(monkeypatch, driver=0, status=status)
    assert plan.find_gpus() == ()


@pytest.mark.parametrize(
    ("installed", "capability", "best"),
    [
        (("trt", "trt-rtx"), "9.0", "trt"),
        (("trt-rtx",), "8.9", "trt-rtx"),
        (("trt-rtx",), "12.0", "trt-rtx"),
        (("trt-rtx",), "9.0", None),
        ((), "8.9", None),
    ],
)
def test_the_best_flavour_supports_the_gpu(
    installed: tuple[str, ...], capability: str, best: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX has no code for data-center GPUs from Hopper on."""
    rtx = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    libraries = {"trt": SimpleNamespace(__version__="10.14"), "trt-rtx": rtx}
    monkeypatch.setattr(plan, "MODULES", {flavour: "json" for flavour in installed})  # a module that is there
    monkeypatch.setattr(plan, "tensorrt_module", libraries.__getitem__)
    monkeypatch.setattr(plan, "find_gpus", lambda: (replace(HERE, capability=capability),))
    assert plan.best_flavour() == best


def test_on_a_gpu_that_rtx_does_not_support_the_hint_is_the_full_tensorrt(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(__version__="1.7.1", ComputeCapability=SimpleNamespace(__members__={"SM86": 0, "SM89": 1}))
    monkeypatch.setattr(plan, "tensorrt_module", lambda flavour: library)
    h100 = Gpu(0, "NVIDIA H100", "9.0", "13.0", 80 << 30)
    with pytest.raises(BundleError, match="was built for sm86 sm89, this is NVIDIA H100") as caught:
        checked_plan(model, "double", "trt-rtx", h100)
    assert "does not support this GPU" in caught.value.hint and "--engine trt --bundle" in caught.value.hint
    other = changed(model, target="sm86")
    with pytest.raises(BundleError, match="was built for sm86, this is") as caught:
        checked_plan(other, "double", "trt-rtx", HERE)
    assert "--engine trt-rtx --bundle" in caught.value.hint


def test_where_engines_cannot_run_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(ComputeCapability=SimpleNamespace(__members__={"SM89": 1}))
    monkeypatch.setattr(plan, "tensorrt_module", lambda flavour: library)
    monkeypatch.setattr(plan, "find_gpus", tuple)
    assert plan.why_not_here("trt-rtx") == "this machine has no GPU"
    monkeypatch.setattr(plan, "find_gpus", lambda: (replace(HERE, name="H100", capability="9.0"),))
    assert plan.why_not_here("trt-rtx") == "tensorrt_rtx does not support this GPU (H100, sm90)"
    monkeypatch.setattr(plan, "find_gpus", lambda: (HERE,))
    assert plan.why_not_here("trt-rtx") is None


def test_the_library_says_why_a_plan_is_invalid() -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    runtime = rtx.Runtime(rtx.Logger(rtx.Logger.INTERNAL_ERROR))
    assert why_invalid(rtx, runtime, b"no plan at all" * 100) == ["the file is damaged"]
    both = SimpleNamespace(get_engine_validity=lambda plan: (2, 2 | 4))
    assert why_invalid(rtx, both, b"") == ["it has no code for this GPU", "the driver is too old for it"]
    assert why_invalid(rtx, SimpleNamespace(), b"") == []


# ---- --engine auto ----


@pytest.mark.parametrize(("gpus", "chosen"), [((), "ort"), ((HERE,), "trt-rtx")])
def test_auto_takes_tensorrt_where_every_engine_may_run(
    model: Model, gpus: tuple[Gpu, ...], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "find_gpus", lambda: gpus)
    assert opening.choose("auto", "auto", [model])[0] == chosen
    assert opening.choose("auto", "cpu", [model]) == ("ort", "cpu")


def test_auto_leaves_an_unproven_engine_alone_and_says_so(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("wsss"), "propagate", True)
    monkeypatch.setattr(opening, "find_gpus", lambda: (HERE,))
    with caplog.at_level(logging.WARNING, "wsss"):
        assert opening.choose("auto", "auto", [model, changed(model, parity=None)])[0] == "ort"
    assert "--engine auto: not trt-rtx: " in caplog.text and "never compared with PyTorch" in caplog.text


def test_auto_does_not_speak_of_a_flavour_that_lacks_engines(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("wsss"), "propagate", True)
    monkeypatch.setattr(opening, "find_gpus", lambda: (HERE,))
    graphs = {**model.manifest.graphs, "other": replace(model.graph("double"), plans={})}
    with caplog.at_level(logging.WARNING, "wsss"):
        assert opening.choose("auto", "auto", [replace(model, manifest=replace(model.manifest, graphs=graphs))])[0] == "ort"
    assert not caplog.text, "this machine's ONNX Runtime computes the model as it was exported"


def test_without_a_gpu_tensorrt_says_what_to_do(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "find_gpus", tuple)
    with pytest.raises(WsssError, match="needs an NVIDIA GPU; asked for number 1, there are 0") as caught:
        opening.open_graph(model, "double", "trt-rtx", device="cuda:1")
    assert "wsss doctor" in str(caught.value.hint)
