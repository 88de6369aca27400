"""Every graph that ships, in FP16, through NVIDIA's own compiler: TensorRT-RTX builds without a GPU."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install 'wsss[trt-rtx]'")

from wsss.benchmarks.compiled import compiled, lines_of
from wsss.engines.plan import Gpu
from wsss.errors import BundleError, WsssError
from wsss.export import exporting, to_engine
from wsss.export.exporting import export_model, standing_model
from wsss.export.family import Graph, Options, family
from wsss.export.precision.instrumentation import open_copy
from wsss.export.sam import fuse
from wsss.export.to_engine import ALONE, FUSED, BuildOptions, build_plans, profile_of
from wsss.spec import AMPERE_OR_NEWER, AxisRange, Bundle, GraphSpec, Model, Parity, Preprocess, open_bundle, sha256_of

HALF = Options(batch=AxisRange(1, 2, 8), precision="fp16")
RTX = BuildOptions(flavour="trt-rtx")
NORMS = ("LayerNormalization", "InstanceNormalization")
CANVASES = ((144, 256), (256, 144))
NOT_GATED = {"image-256x144"}
"""The canvas of the small detector whose graph is built but not held against its reference here: that of the other is."""


def silent(line: str) -> None: ...


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The small models in FP16 as `wsss export --model all --precision fp16` makes them."""
    folder, gate = tmp_path_factory.mktemp("half"), exporting._gate

    def mostly(graph: Graph, *given: Any, **how: Any) -> Parity | None:
        return None if graph.name in NOT_GATED else gate(graph, *given, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "_gate", mostly)
        for name in ("clip", "grounding-dino", "sam"):
            options = replace(HALF, sizes=CANVASES) if name == "grounding-dino" else HALF
            export_model(family(name), variant="mini", weights="mini", bundle=folder, options=options, log=silent)
    return open_bundle(folder)


@pytest.fixture(scope="module")
def built(bundle: Bundle) -> dict[str, Model]:
    return {name: build_plans(bundle.model(name), RTX, silent) for name in bundle.models()}


def test_every_half_graph_agrees_with_its_fp32_reference(bundle: Bundle) -> None:
    for name in bundle.models():
        for graph_name, graph in bundle.model(name).manifest.graphs.items():
            assert graph.precision == "fp16"
            if graph_name in NOT_GATED:
                continue
            assert graph.parity is not None
            largest = next(axis.max for axis in graph.axes.values())
            assert {row.batch for row in graph.parity.rows} >= {1, 2} and max(row.batch for row in graph.parity.rows) >= min(
                8, largest
            )


def test_what_travels_between_engines_is_half_and_what_is_read_is_not(bundle: Bundle) -> None:
    dtypes = {
        f"{name}/{graph}.{tensor.name}": tensor.dtype
        for name in bundle.models()
        for graph, spec in bundle.model(name).manifest.graphs.items()
        for tensor in (*spec.inputs, *spec.outputs)
    }
    half = {name for name, dtype in dtypes.items() if dtype == "float16"}
    assert half == {
        *(f"grounding-dino/{graph}.text" for graph in ("image-144x256", *NOT_GATED)),
        *("grounding-dino/text.features", "sam/encoder.embedding"),
        *("sam/decoder.embedding", "sam/decoder.logits", "sam/fuse.logits"),
    }
    assert dtypes["sam/encoder.pixels"] == dtypes["clip/image.pixels"] == "uint8"
    assert dtypes["grounding-dino/image-144x256.boxes"] == dtypes["sam/decoder.quality"] == "float32"


def test_what_runs_through_the_detector_stays_float32(bundle: Bundle) -> None:
    model = bundle.model("grounding-dino")
    graph = open_copy(model.path("image-144x256")).graph
    wide = {op: sum(node.op_type == op and node.outputs[0].dtype == ir.DataType.FLOAT for node in graph) for op in NORMS}
    half = {op: sum(node.op_type == op and node.outputs[0].dtype == ir.DataType.FLOAT16 for node in graph) for op in NORMS}
    # 2 encoder layers of 2 + 2 + 2 norms, 2 decoder layers of 4, the norms before choosing and before scoring.
    assert wide == {"LayerNormalization": 22, "InstanceNormalization": 3}
    # Swin: 7 blocks of 2, 2 between stages, 2 of feature maps, 1 of patches.
    assert half == {"LayerNormalization": 19, "InstanceNormalization": 0}
    reasons = " ".join(model.graph("image-144x256").fp32_nodes)
    assert all(words in reasons for words in ("few tokens", "run through all layers", "shift all cells alike", "feature maps"))


def test_tensorrt_compiles_every_graph_with_its_contract(built: dict[str, Model]) -> None:
    graphs = [(model, name, spec) for model in built.values() for name, spec in model.manifest.graphs.items()]
    assert len(graphs) == 12, "four of them resize photographs"
    for model, name, spec in graphs:
        plan = spec.plans["trt-rtx"]
        path = model.folder / plan.file
        assert path.stat().st_size > 10_000, name
        assert sha256_of(path) == plan.sha256
        assert dict(plan.axes) == profile_of(spec)
        assert plan.parity is None and plan.precision == "fp16"
        assert "sm89" in plan.target.split() and "sm75" not in plan.target.split()
        if "batch" in plan.axes:
            assert plan.axes["batch"] == AxisRange(1, 2, 8)


def test_no_fusion_is_lost(built: dict[str, Model]) -> None:
    """Attentions that TensorRT compiles to one kernel, and softmaxes that are kernels of their own. Of the detector's, 4 are the
    weights of deformable attention, which are none of an attention; those of SAM's decoder are over the 7 tokens of a box."""
    counts = {
        f"{name}/{graph}": (plan.fused_attentions, plan.softmaxes_alone)
        for name, model in built.items()
        for graph, spec in model.manifest.graphs.items()
        for plan in spec.plans.values()
    }
    assert counts == {
        "clip/image": (1, 0),
        "clip/text": (1, 0),
        "grounding-dino/text": (2, 0),
        **dict.fromkeys((f"grounding-dino/image-{size}" for size in ("144x256", "256x144")), (17, 4)),
        "sam/encoder": (4, 0),
        "sam/decoder": (5, 2),
        "sam/fuse": (0, 0),
        **dict.fromkeys(("clip/resize-96x96", "sam/resize-256x256"), (0, 0)),
        **dict.fromkeys((f"grounding-dino/resize-{size}" for size in ("144x256", "256x144")), (0, 0)),
    }


MEGABYTES = {
    "clip/image": 3.357,
    "clip/text": 0.186,
    "grounding-dino/image-144x256": 61.56,
    "sam/encoder": 55.91,
    "sam/decoder": 6.459,
}
"""Memory traffic of one row (image, prompt, box) of the compiled graphs in the usual batch."""


@pytest.mark.parametrize("graph", MEGABYTES)
def test_compiled_graphs_move_no_more_bytes(bundle: Bundle, built: dict[str, Model], graph: str) -> None:
    name, _, part = graph.partition("/")
    found = compiled(bundle.model(name), part)
    assert found.bytes_per_row / 1e6 == pytest.approx(MEGABYTES[graph], rel=0.1)
    plan = built[name].graph(part).plans["trt-rtx"]
    assert (found.count(FUSED), found.count(ALONE)) == (plan.fused_attentions, plan.softmaxes_alone)
    first, *others = lines_of(graph, found)
    assert first.startswith(f"{graph}: ") and f"{plan.fused_attentions} attentions fused" in first
    assert sum(" x " in line for line in others) == len(found.kernels) + len(found.largest)


def test_the_manifest_on_disk_knows_the_plans(built: dict[str, Model], bundle: Bundle) -> None:
    for name, model in built.items():
        again = bundle.model(name)
        assert again.manifest.graphs == model.manifest.graphs
        assert again.manifest.identity() == replace(model.manifest, graphs={}).identity()  # engines change no identity


def test_what_stands_is_not_built_again(built: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_engine, "_build", lambda *_: pytest.fail("built again"))
    lines: list[str] = []
    build_plans(built["clip"], RTX, lines.append)
    assert lines == [f"clip: {graph}: trt-rtx engine is up to date" for graph in ("image", "text", "resize-96x96")]


def test_a_plan_of_another_profile_is_built_again(built: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = built["clip"].graph("text")
    plan = spec.plans["trt-rtx"]
    older = replace(spec, plans={"trt-rtx": replace(plan, axes={"batch": AxisRange(1, 2, 4)})})
    model = Model(built["clip"].folder, replace(built["clip"].manifest, graphs={"text": older}))
    monkeypatch.setattr(to_engine, "_build", lambda *_: plan)
    monkeypatch.setattr(to_engine, "with_plan", lambda model, *_: model)
    lines: list[str] = []
    build_plans(model, RTX, lines.append)
    assert len(lines) == 1 and "built in" in lines[0]


def test_a_tile_lies_within_the_graphs_range() -> None:
    axes = {"height": AxisRange(1, 10, 100), "width": AxisRange(600, 700, 800), "masks": AxisRange(1, 300, 400)}
    spec = GraphSpec(file="fuse.onnx", inputs=(), outputs=(), axes=axes, opset=18)
    assert profile_of(spec) == {
        "height": AxisRange(1, 100, 100),
        "width": AxisRange(600, 600, 800),
        "masks": AxisRange(1, 300, 400),
    }


def test_a_damaged_plan_is_built_again(built: dict[str, Model]) -> None:
    model = built["clip"]
    path = model.folder / model.graph("text").plans["trt-rtx"].file
    path.write_bytes(path.read_bytes()[:-7])
    lines: list[str] = []
    again = build_plans(model, RTX, lines.append)
    assert "up to date" in lines[0] and "built in" in lines[1]
    assert sha256_of(path) == again.graph("text").plans["trt-rtx"].sha256


def test_a_contract_that_tensorrt_reads_otherwise_is_refused(built: dict[str, Model]) -> None:
    model = built["clip"]
    spec = model.graph("image")
    wrong = replace(spec, outputs=(replace(spec.outputs[0], dtype="float16"),), plans={})
    changed = Model(model.folder, replace(model.manifest, graphs={"image": wrong}))
    with pytest.raises(BundleError, match=r"clip: image: the manifest says embedding float16.*TensorRT read"):
        build_plans(changed, RTX, silent)


def test_a_graph_that_tensorrt_cannot_read_is_named(built: dict[str, Model], tmp_path: Path) -> None:
    model = built["clip"]
    (tmp_path / "image.onnx").write_bytes(b"no graph")
    spec = replace(model.graph("image"), plans={})
    with pytest.raises(WsssError, match=r"clip: image: TensorRT \S+ cannot read image.onnx"):
        build_plans(Model(tmp_path, replace(model.manifest, graphs={"image": spec})), RTX, silent)


def test_an_unknown_compute_capability_lists_the_known(built: dict[str, Model]) -> None:
    with pytest.raises(WsssError, match="builds for .*sm89.*, not for sm90"):
        build_plans(built["clip"], replace(RTX, capabilities=("sm90",)), silent)


def test_float32_is_no_tf32_and_memory_is_given_to_the_engine(built: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorrt_rtx as trt

    found = []

    def look(config: Any, *_: object) -> None:
        flags = [config.get_flag(flag) for flag in (trt.BuilderFlag.TF32, trt.BuilderFlag.REQUIRE_USER_ALLOCATION)]
        found.append((*flags, config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) >> 20))

    monkeypatch.setattr(to_engine, "_timing_cache", look)
    spec = built["clip"].graph("text")
    model = Model(built["clip"].folder, replace(built["clip"].manifest, graphs={"text": replace(spec, plans={})}))
    build_plans(model, replace(RTX, workspace_mib=512), silent)
    assert found == [(False, True, 512)]


def test_building_for_one_gpu_generation_says_so(built: dict[str, Model]) -> None:
    model = Model(built["clip"].folder, replace(built["clip"].manifest, graphs={"text": built["clip"].graph("text")}))
    assert build_plans(model, replace(RTX, capabilities=("sm89",)), silent).graph("text").plans["trt-rtx"].target == "sm89"


class Wrapped:
    """An object of tensorrt_rtx whose settings are recorded, beside what only the full TensorRT has."""

    def __init__(self, real: Any, settings: dict[str, Any]) -> None:
        vars(self).update(real=real, settings=settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.settings[name] = value

    def create_builder_config(self) -> Wrapped:
        return Wrapped(self.real.create_builder_config(), self.settings)

    def build_serialized_network(self, network: Any, config: Wrapped) -> bytes:
        assert network.num_inputs
        return b"plan of " + str(self.settings["current"]).encode()

    def get_timing_cache(self) -> SimpleNamespace:
        return SimpleNamespace(serialize=lambda: b"times")


@pytest.fixture
def as_full(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """TensorRT-RTX in the place of the full TensorRT, and two GPUs that are none. Returns the settings of builds."""
    import tensorrt_rtx

    settings: dict[str, Any] = {"current": None}
    gpus = (Gpu(0, "NVIDIA A100", "8.0", "13.0", 0), Gpu(1, "NVIDIA L4", "8.9", "13.0", 0))
    names = [name for name in dir(tensorrt_rtx) if not name.startswith("_")]
    library = SimpleNamespace(**{name: getattr(tensorrt_rtx, name) for name in names}, __version__=tensorrt_rtx.__version__)
    library.Builder = lambda logger: Wrapped(tensorrt_rtx.Builder(logger), settings)
    monkeypatch.setattr(to_engine, "tensorrt_module", lambda flavour: library)
    monkeypatch.setattr(to_engine, "find_gpus", lambda: gpus)
    monkeypatch.setattr(to_engine, "_use", lambda gpu: settings.update(current=gpu.index, thread=threading.current_thread()))
    monkeypatch.setattr(to_engine, "_with_plugin", lambda *_: None)
    monkeypatch.setattr(to_engine, "_timing_cache", lambda *_: None)
    return settings


@pytest.fixture
def text(bundle: Bundle) -> Model:
    """CLIP's text graph alone, without engines."""
    model = bundle.model("clip")
    return Model(model.folder, replace(model.manifest, graphs={"text": replace(model.graph("text"), plans={})}))


def test_one_bundle_holds_engines_for_several_gpus(text: Model, as_full: dict[str, Any]) -> None:
    model = text
    for device in (0, 1):
        model = build_plans(model, BuildOptions(flavour="trt", device=device), silent)
        assert as_full["current"] == device and as_full["thread"] is not threading.main_thread()
    plans = model.graph("text").plans
    assert {key: plan.file for key, plan in plans.items()} == {
        "trt on NVIDIA A100": "text.trt-nvidia-a100.plan",
        "trt on NVIDIA L4": "text.trt-nvidia-l4.plan",
    }
    assert (model.folder / "text.trt-nvidia-l4.plan").read_bytes() == b"plan of 1"
    lines: list[str] = []
    build_plans(model, BuildOptions(flavour="trt"), lines.append)
    assert lines == ["clip: text: trt engine is up to date"]


def test_a_timing_cache_that_cannot_be_written_costs_no_plan(
    text: Model, as_full: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(to_engine, "_timing_cache", lambda *_: tmp_path / "file" / "timing.cache")
    lines: list[str] = []
    model = build_plans(text, BuildOptions(flavour="trt", device=1), lines.append)
    assert (model.folder / model.graph("text").plans["trt on NVIDIA L4"].file).read_bytes() == b"plan of 1"
    assert lines[0].startswith("warning: the next build takes as long") and "timing.cache: cannot be written" in lines[0]


def test_options_of_a_build_reach_tensorrt(text: Model, as_full: dict[str, Any]) -> None:
    options = BuildOptions(flavour="trt", optimization_level=5, hardware_compatible=True)
    plan = build_plans(text, options, silent).graph("text").plan_for("trt", AMPERE_OR_NEWER)
    assert plan is not None and plan.target == AMPERE_OR_NEWER
    assert plan.file == "text.trt-gpus-of-compute-capability-8-0-and-newer.plan"
    assert as_full["builder_optimization_level"] == 5
    assert as_full["hardware_compatibility_level"].name == "AMPERE_PLUS"
    build_plans(text, BuildOptions(flavour="trt"), silent)
    assert as_full["builder_optimization_level"] == 5, "not set again: the library's default"


def test_ctrl_c_is_heard_while_tensorrt_computes(capfd: pytest.CaptureFixture[str]) -> None:
    """The build is in another thread: this one is free to take the signal at once, and to leave on the second."""
    heard, before = threading.Event(), signal.getsignal(signal.SIGINT)

    def build(canceled: threading.Event) -> None:
        assert threading.current_thread() is not threading.main_thread()
        os.kill(os.getpid(), signal.SIGINT)
        assert canceled.wait(5)
        heard.set()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_engine._leaving_on_ctrl_c(build)
    assert heard.is_set() and signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_ends_a_build_and_leaves_nothing_half_done(built: dict[str, Model]) -> None:
    model = built["grounding-dino"]
    name = "image-144x256"
    spec = model.graph(name)
    plan = model.folder / spec.plans["trt-rtx"].file
    plan.unlink()
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        build_plans(Model(model.folder, replace(model.manifest, graphs={name: spec})), RTX, silent)
    assert not plan.exists() and not list(model.folder.glob(".*plan*"))


@pytest.mark.parametrize("longest", [256, 1024])
@pytest.mark.parametrize("masks", [1, 2, 16, 256])
def test_the_gates_masks_fit_the_tile_of_an_engine(longest: int, masks: int) -> None:
    preprocess = Preprocess(
        resize="longest",
        longest_px=longest,
        filter="bilinear",
        canvases=((longest, longest),),
        mean=(0, 0, 0),
        std=(1, 1, 1),
        source="test",
    )
    feeds = fuse.sample_masks(preprocess, longest // 4, 256, masks, 5)
    assert len(feeds["rows"]) <= to_engine.TILE["height"].max and len(feeds["columns"]) <= to_engine.TILE["width"].max


def test_the_full_tensorrt_needs_the_gpu_it_builds_for(built: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_engine, "tensorrt_module", lambda flavour: to_engine)
    monkeypatch.setattr(to_engine, "find_gpus", tuple)
    with pytest.raises(WsssError, match="asked for GPU 0, there are 0") as caught:
        build_plans(built["clip"], BuildOptions(flavour="trt"), silent)
    assert "--engine trt-rtx" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("typed", "stands"),
    [
        ({}, True),
        ({"variant": "mini", "weights": "mini"}, True),
        ({"variant": "ViT-B-16"}, False),
        ({"weights": "random:0"}, False),
        ({"options": Options(precision="fp32")}, False),
        ({"options": replace(HALF, batch=AxisRange(1, 2, 16))}, False),
        ({"options": replace(HALF, sampling="grid-sample")}, True),
        ({"options": replace(HALF, sampling="gather")}, False),
    ],
)
def test_graphs_that_agree_with_what_was_typed_stand(bundle: Bundle, typed: dict[str, object], stands: bool) -> None:
    flags: dict[str, object] = {"variant": None, "weights": None, "options": Options(precision="fp16"), **typed}
    assert (standing_model(bundle.folder, "clip", **flags) is not None) == stands  # type: ignore[arg-type]
