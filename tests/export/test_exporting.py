"""Publishing: a whole model or nothing, and the old one until then."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from wsss.batch import Tensor as TensorOnDevice
from wsss.engines import openvino
from wsss.engines.eager import EagerEngine
from wsss.engines.openvino import OpenVinoEngine
from wsss.engines.plan import Gpu
from wsss.errors import BundleError, ParityError, UsageError, WeightsError
from wsss.export import exporting
from wsss.export.family import Family, Graph, InHalf, Options, Prepared, Tolerance, family
from wsss.export.to_engine import with_plan
from wsss.export.to_onnx import WeightFile
from wsss.spec import AxisRange, Bundle, GraphSpec, Manifest, Model, PlanSpec, Preprocess, TensorSpec, open_bundle

PREPROCESS = Preprocess(
    resize="squash", longest_px=8, filter="bilinear", canvases=((8, 8),), mean=(0, 0, 0), std=(1, 1, 1), source="test"
)


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((400,), factor))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def scale_graph(factor: float, truth: float) -> Graph:
    return Graph(
        name="scale",
        module=Scale(factor),
        inputs=(TensorSpec("x", ("batch", 400), "float32"),),
        outputs=(TensorSpec("y", ("batch", 400), "float32"),),
        axes={"batch": AxisRange(1, 2, 3)},
        row_axis="batch",
        sample=lambda rows, seed: {"x": np.random.default_rng(seed).normal(size=(rows, 400)).astype(np.float32)},
        reference=lambda feeds, _: {"y": feeds["x"] * np.float32(truth)},
        tolerance={"y": Tolerance(relative=1e-6, why="test")},
    )


def make_family(*, factor: float = 3.0, truth: float = 3.0) -> Family:
    """A model that multiplies by ``factor`` where ``truth`` is right; ``weights`` is its own hash."""

    def prepare(variant: str, weights: str, options: Options) -> Prepared:
        return Prepared(
            variant=variant,
            graphs=(lambda: scale_graph(factor, truth),),
            preprocess=PREPROCESS,
            weights={"source": weights, "sha256": weights * 8},
        )

    return Family(name="toy", variants=("one",), default="one", prepare=prepare, official=lambda variant: variant)


def export(bundle: Path, family: Family, weights: str = "abcdefgh") -> Manifest:
    return exporting.export_model(family, variant="one", weights=weights, bundle=bundle, options=Options(), log=print)


def test_an_unknown_family_lists_the_known_ones() -> None:
    known = "clip, grounding-dino, sam, sam3, segmenter or all"
    with pytest.raises(UsageError, match=f"--model: expected one of {known}, got 'resnet'"):
        family("resnet")


def test_export_fail_replace_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "deep" / "bundle"
    export(bundle, make_family())
    model = open_bundle(bundle).model("toy")  # checks every hash
    assert model.manifest.tools["torch"] == torch.__version__.split("+")[0] or "+" in model.manifest.tools["torch"]
    assert sorted(path.name for path in bundle.iterdir()) == ["toy"]

    # A graph that is wrong leaves the old model, and nothing beside it.
    with pytest.raises(ParityError, match="toy scale: output 'y'"):
        export(bundle, make_family(factor=3.1))
    assert [path.name for path in bundle.iterdir()] == ["toy"]
    assert open_bundle(bundle).model("toy").manifest == model.manifest

    # Nor does Ctrl-C.
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(exporting, "write_manifest", interrupt)
        export(bundle, make_family())
    assert [path.name for path in bundle.iterdir()] == ["toy"]

    export(bundle, make_family(factor=5.0, truth=5.0), weights="other---")
    changed = open_bundle(bundle).model("toy")
    assert changed.manifest.identity() != model.manifest.identity()

    # The stored files against the module again: right weights, other weights, another truth.
    monkeypatch.setattr(exporting, "family", lambda name: make_family(factor=5.0, truth=5.0))
    assert exporting.verify_model(changed, None, print)["scale"].worst("y").error < 1e-6
    with pytest.raises(WeightsError, match="was exported from"):
        exporting.verify_model(changed, "elsewhere", print)
    monkeypatch.setattr(exporting, "family", lambda name: make_family(factor=3.0, truth=3.0))
    with pytest.raises(ParityError):
        exporting.verify_model(changed, None, print)


def export_for_openvino(bundle: Path, family: Family, precision: Literal["fp32", "bf16"] = "fp32") -> Manifest:
    options = Options(precision=precision, for_cpu=True)
    return exporting.export_model(
        family, variant="one", weights="abcdefgh", bundle=bundle, options=options, log=print, openvino=True
    )


@pytest.mark.usefixtures("needs_openvino")
def test_what_openvino_computes_is_proven_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = export_for_openvino(tmp_path, make_family())
    (proof,) = manifest.graphs["scale"].openvino.values()
    assert (proof.version, proof.processor) == (openvino.version(), openvino.instructions())
    assert proof.parity.worst("y").error < 1e-6 and "OpenVINO" in proof.parity.engine
    assert proof.seconds and proof.ort_seconds and manifest.graphs["scale"].parity
    assert open_bundle(tmp_path).model("toy").manifest == manifest, "as it is read again"

    # OpenVINO alone computes something else: the old model stays, and nothing beside it.
    class Wrong(OpenVinoEngine):
        def __call__(self, feeds: Mapping[str, TensorOnDevice]) -> dict[str, TensorOnDevice]:
            return {"y": np.asarray(super().__call__(feeds)["y"]) * np.float32(1.01)}

    monkeypatch.setattr(exporting, "OpenVinoEngine", Wrong)
    with pytest.raises(ParityError, match=r"toy scale \(openvino\): output 'y'"):
        export_for_openvino(tmp_path, make_family())
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]
    assert open_bundle(tmp_path).model("toy").manifest == manifest

    # Verified again, it has no proof any more.
    monkeypatch.setattr(exporting, "family", lambda name: make_family())
    with pytest.raises(ParityError):
        exporting.verify_openvino(open_bundle(tmp_path).model("toy"), None, print)
    assert not open_bundle(tmp_path).model("toy").graph("scale").openvino
    monkeypatch.setattr(exporting, "OpenVinoEngine", OpenVinoEngine)
    other = replace(proof, processor="sse9")
    model = exporting._with_proofs(open_bundle(tmp_path).model("toy"), "scale", {"sse9": other})
    assert exporting.verify_openvino(model, None, print)["scale"].worst("y").error < 1e-6
    proofs = open_bundle(tmp_path).model("toy").graph("scale").openvino
    assert set(proofs) == {"sse9", openvino.instructions()} and proofs["sse9"] == other


@pytest.mark.usefixtures("needs_openvino")
def test_a_bf16_graph_is_compared_in_openvino_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "OrtEngine", lambda *_: pytest.fail("ONNX Runtime does not run bf16"))
    half = InHalf(tolerance={"y": Tolerance(relative=2e-3, why="test")})
    toy = make_family()
    prepare = toy.prepare

    def with_half(variant: str, weights: str, options: Options) -> Prepared:
        prepared = prepare(variant, weights, options)
        return replace(prepared, graphs=(lambda: replace(prepared.graphs[0](), half=half),))

    graph = export_for_openvino(tmp_path, replace(toy, prepare=with_half), "bf16").graphs["scale"]
    (proof,) = graph.openvino.values()
    assert graph.precision == "bf16" and graph.parity is None and proof.seconds is proof.ort_seconds is None
    error = proof.parity.worst("y").error
    assert error < 8e-3 and (error > 1e-4) is openvino.computes_in_bf16(), "rounded to 8 bits where the processor does so"


def test_the_gate_runs_on_the_device_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(tmp_path, make_family())
    devices: list[str] = []

    def engine(path: Path, spec: GraphSpec, *, device: str) -> EagerEngine:
        devices.append(device)
        return EagerEngine(Scale(3.0), spec)

    monkeypatch.setattr(exporting, "family", lambda name: make_family())
    monkeypatch.setattr(exporting, "OrtEngine", engine)
    model = open_bundle(tmp_path).model("toy")
    assert exporting.verify_model(model, None, print)["scale"].engine.endswith("on the CPU")
    assert exporting.verify_model(model, None, print, device="cuda:1")["scale"].engine.endswith("on cuda:1")
    assert devices == ["cpu", "cuda:1"]


def test_a_bundle_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot be written"):
        export(tmp_path / "file", make_family())


def test_canvases_other_than_the_familys_own_are_prepared_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Options] = []
    plain = make_family()

    def prepare(variant: str, weights: str, options: Options) -> Prepared:
        asked.append(options)
        prepared = plain.prepare(variant, weights, options)
        return replace(prepared, preprocess=replace(PREPROCESS, canvases=options.sizes or PREPROCESS.canvases))

    monkeypatch.setattr(exporting, "family", lambda name: replace(plain, prepare=prepare))
    manifest = Manifest(
        family="toy",
        variant="one",
        preprocess=replace(PREPROCESS, canvases=((4, 9),)),
        graphs={},
        weights={"source": "abcdefgh", "sha256": "abcdefgh" * 8},
        tools={},
    )
    assert exporting.prepare_again(manifest).preprocess.canvases == ((4, 9),)
    assert [options.sizes for options in asked] == [(), ((4, 9),)]


@pytest.mark.parametrize(
    ("sizes", "stands"),
    [
        ((), True),
        (((8, 8), (4, 9)), True),
        (((4, 9), (8, 8)), True),
        (((8, 8),), False),
        (((8, 8), (4, 9), (9, 4)), False),
    ],
)
def test_a_model_stands_when_all_its_canvases_are_those_that_were_typed(
    at_once: None, tmp_path: Path, sizes: tuple[tuple[int, int], ...], stands: bool
) -> None:
    def prepare(variant: str, weights: str, options: Options) -> Prepared:
        prepared = make_family().prepare(variant, weights, options)
        return replace(prepared, preprocess=replace(PREPROCESS, canvases=((8, 8), (4, 9))))

    export(tmp_path, replace(make_family(), prepare=prepare))
    found = exporting.standing_model(tmp_path, "toy", variant=None, weights=None, options=Options(sizes=sizes))
    assert (found is not None) == stands


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("half", [None, InHalf(tolerance={})])
def test_the_search_runs_when_it_is_asked_for_and_the_graph_has_a_half_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: bool, half: InHalf | None
) -> None:
    chosen: list[object] = []

    def trace(*_: object, choose: object, **__: object) -> tuple[dict[str, int], int]:
        chosen.append(choose)
        return {}, 0

    monkeypatch.setattr(exporting, "export_onnx", trace)
    prepared = replace(
        make_family().prepare("one", "abcdefgh", Options()), graphs=(lambda: replace(scale_graph(3.0, 3.0), half=half),)
    )
    toy = replace(make_family(), prepare=lambda *_: prepared)
    options = Options(precision="fp16", measured=measured)
    exporting.export_model(toy, variant="one", weights="abcdefgh", bundle=tmp_path, options=options, log=print, gate=False)
    assert [choose is not exporting.marked for choose in chosen] == [measured and half is not None]


def write_at_once(graph: Graph, folder: Path, store: WeightFile, options: Options, **how: Any) -> GraphSpec:
    """In the place of tracing, which publishing knows nothing of: a graph file without a graph."""
    (folder / "scale.onnx").write_bytes(b"")
    return graph.spec("scale.onnx", 18)


def no_gate(*_: object, **how: object) -> None:
    """In the place of the gate."""


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_export_graph", write_at_once)
    monkeypatch.setattr(exporting, "_gate", no_gate)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_exporting
from wsss import files
test_exporting.exporting._export_graph = test_exporting.write_at_once
test_exporting.exporting._gate = test_exporting.no_gate
left = int(sys.argv[3])
def killed(call):
    def instead(*given):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return call(*given)
    return instead
Path.rename, files._delete = killed(Path.rename), killed(files._delete)
test_exporting.export(Path(sys.argv[2]), test_exporting.make_family(), weights="other---")
"""


@pytest.mark.parametrize(("calls", "survivor"), [(0, "abcdefgh"), (1, "abcdefgh"), (2, "other---")])
def test_an_export_that_is_killed_while_it_publishes_leaves_a_model(
    at_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int, survivor: str
) -> None:
    """Killed before the old model is moved away, before the new one takes its place, and before the old one is deleted."""
    export(tmp_path / "killed", make_family())
    script = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path / "killed"), str(calls)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=600)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "killed" / "toy").exists() == (calls != 1)
    for bundle in (tmp_path / "model", tmp_path / "list", tmp_path / "next"):
        shutil.copytree(tmp_path / "killed", bundle)
    assert Bundle(tmp_path / "model").model("toy").manifest.weights["source"] == survivor
    assert open_bundle(tmp_path / "list").models() == ["toy"]

    def fail(*_: object, **how: object) -> GraphSpec:
        raise ParityError("no")

    monkeypatch.setattr(exporting, "_export_graph", fail)
    with pytest.raises(ParityError):
        export(tmp_path / "next", make_family())
    assert [path.name for path in (tmp_path / "next").iterdir()] == ["toy"], "swept, though this export failed"
    assert open_bundle(tmp_path / "next").model("toy").manifest.weights["source"] == survivor


def test_two_exports_of_one_model_do_not_sweep_each_other(at_once: None, tmp_path: Path) -> None:
    def prepare(variant: str, weights: str, options: Options) -> Prepared:
        prepared = make_family().prepare(variant, weights, options)

        def second() -> Graph:
            with pytest.raises(BundleError, match="toy: another run"):
                export(tmp_path, make_family())
            return scale_graph(3.0, 3.0)

        return replace(prepared, graphs=(second,))

    export(tmp_path, replace(make_family(), prepare=prepare))
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_a_model_is_on_the_disk_before_it_has_its_name(at_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut after the rename would else leave names of empty files."""
    synced, at_rename = set[str](), set[str]()
    fsync, rename = os.fsync, Path.rename

    def noted(handle: int) -> None:
        synced.add(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def renamed(path: Path, target: Path) -> Path:
        at_rename.update(synced)
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", renamed)
    manifest = export(tmp_path, make_family())
    assert at_rename >= {*manifest.files, "manifest.json"}
    assert synced >= {tmp_path.name}, "and the folder after it"


def test_a_download_that_nothing_pins_is_said(at_once: None, tmp_path: Path) -> None:
    def prepare(variant: str, weights: str, options: Options) -> Prepared:
        prepared = make_family().prepare(variant, weights, options)
        return replace(prepared, weights={**prepared.weights, "pinned": pinned})

    lines: list[str] = []
    for pinned in ("sha256", "8 of 64 digits of its sha256"):
        exporting.export_model(
            replace(make_family(), prepare=prepare),
            variant="one",
            weights="tag",
            bundle=tmp_path,
            options=Options(),
            log=lines.append,
        )
        assert open_bundle(tmp_path).model("toy").manifest.weights["pinned"] == pinned
    assert [line for line in lines if "pinned" in line] == [
        "toy: the publisher gives no complete sha256 of tag (pinned: 8 of 64 digits of its sha256); the manifest records it"
    ]


def test_engines_are_judged_and_one_that_fails_loses_the_verdict_it_had(
    at_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two GPUs that are none, and in the place of TensorRT PyTorch, which multiplies by three and then by another number."""
    export(tmp_path, make_family())
    model = open_bundle(tmp_path).model("toy")
    narrow = {"batch": AxisRange(1, 1, 2)}
    plan = PlanSpec(
        file="scale.onnx",
        sha256=model.manifest.files["scale.onnx"],
        flavour="trt",
        graph_sha256="",
        weights_sha256="",
        precision="fp32",
        axes=narrow,
        builder="11.0",
        target="H200",
        driver="12.8",
        seconds=1.0,
    )
    model = with_plan(model, "scale", plan)
    opened: list[tuple[Path, int]] = []

    def engine(path: Path, spec: GraphSpec, *, flavour: str, device: int) -> EagerEngine:
        opened.append((path, device))
        return EagerEngine(Scale(factor), spec)

    def checked(model: Model, graph: str, flavour: str, gpu: Gpu, *, unverified: bool) -> tuple[Path, GraphSpec]:
        assert unverified and gpu.name == "H200"
        return model.folder / plan.file, replace(model.graph(graph), axes=dict(plan.axes))

    monkeypatch.setattr(exporting, "family", lambda name: make_family())
    monkeypatch.setattr(exporting, "find_gpus", lambda: (Gpu(0, "A100", "8.0", "13.0", 0), Gpu(1, "H200", "9.0", "13.0", 0)))
    monkeypatch.setattr(exporting, "checked_plan", checked)
    monkeypatch.setattr("wsss.engines.trt.TrtEngine", engine)
    factor, said = 3.0, list[str]()
    reports = exporting.verify_plans(model, "trt", None, said.append, device=1)
    assert opened == [(tmp_path / "toy" / "scale.onnx", 1)]
    assert "scale trt engine agrees (y " in said[0]
    parity = reports["scale"]
    assert parity.engine == "trt 11.0 on H200"
    assert {row.batch for row in parity.rows} == {1, 2}, "within the engine's range"
    judged = open_bundle(tmp_path).model("toy")
    assert judged.graph("scale").plans == {"trt on H200": replace(plan, parity=parity, driver="13.0")}

    factor = 3.1
    with pytest.raises(ParityError, match=r"toy scale \(trt\): output 'y'"):
        exporting.verify_plans(judged, "trt", None, said.append, device=1)
    assert open_bundle(tmp_path).model("toy").graph("scale").plans["trt on H200"] == replace(plan, driver="13.0")


# ---- canvases of one trace ----


def test_only_the_first_canvas_of_a_trace_passes_its_largest_batch(tmp_path: Path) -> None:
    """And another one only counts as the same graph if it has the same nodes."""
    export(tmp_path / "one", make_family())
    export(tmp_path / "two", make_family(factor=5.0, truth=5.0))
    first, second = (tmp_path / name / "toy" / "scale.onnx" for name in ("one", "two"))
    spoiled = tmp_path / "spoiled.onnx"
    model = ir.load(second)
    next(node for node in model.graph if node.op_type == "Mul").op_type = "Add"
    ir.save(model, spoiled)

    def of(shared: object) -> Any:
        return SimpleNamespace(template=None if shared is None else SimpleNamespace(shared=shared))

    trace, other, passed = object(), object(), exporting.Passed()
    assert passed.largest(of(trace), first) is None
    passed.add(of(trace), first)
    passed.add(of(None), first)
    assert passed.largest(of(trace), second) == 2
    assert [passed.largest(of(each), second) for each in (other, None)] == [None, None]
    assert passed.largest(of(trace), spoiled) is None
