"""Feeds from manifests, work from graph files, and times of graphs; on ONNX Runtime, scripted engines and a simulated GPU."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from wsss.benchmarks import ceiling as best
from wsss.benchmarks import latency
from wsss.benchmarks.ceiling import Ceiling, copied_by, measure_ceiling, product_by_graph
from wsss.benchmarks.feeds import Load, feeds_for, load_of, row_axis
from wsss.benchmarks.graph_work import work_of
from wsss.benchmarks.latency import measure_graph, on_device, parity_of
from wsss.engines.fake import FakeEngine
from wsss.engines.openvino import instructions
from wsss.engines.ort import OrtEngine
from wsss.errors import WsssError
from wsss.runtime.bundles import MINI
from wsss.spec import AxisRange, GraphSpec, Model, OpenVinoProof, PlanSpec, TensorSpec, open_bundle

GRAPHS = [(name, graph) for name in open_bundle(MINI).models() for graph in open_bundle(MINI).model(name).manifest.graphs]
SMALL = [("clip", "image"), ("clip", "text"), ("grounding-dino", "text"), ("sam", "decoder")]


def mini(name: str) -> Model:
    return open_bundle(MINI).model(name)


# ---- feeds ----


@pytest.mark.parametrize(("name", "graph"), GRAPHS)
def test_every_shipped_graph_can_be_fed(name: str, graph: str) -> None:
    from wsss.engines.engine import check_feeds

    spec = mini(name).graph(graph)
    for rows in (1, 3):
        load = load_of(spec, spec.axes, rows)
        feeds = feeds_for(mini(name), graph, load)
        check_feeds("test", {each.name: each for each in spec.inputs}, spec.axes, feeds)
        assert load.lengths[row_axis(spec, spec.axes)] == rows
        assert all(array.flags.writeable for array in feeds.values())


def test_units_and_lengths() -> None:
    decoder, fuse, text = mini("sam").graph("decoder"), mini("sam").graph("fuse"), mini("clip").graph("text")
    assert load_of(decoder, decoder.axes, 20) == Load(20, "boxes", {"images": 3, "boxes": 20})
    tile = {**fuse.axes, "height": AxisRange(1, 128, 256)}
    assert load_of(fuse, tile, 2).lengths == {"masks": 2, "picked": 2, "height": 256, "width": 500}, "within the engine's range"
    assert load_of(text, text.axes, 2).unit == "prompts"


def test_a_caption_is_made_of_phrases() -> None:
    spec = mini("grounding-dino").graph("image-192x192")
    feeds = feeds_for(mini("grounding-dino"), "image-192x192", load_of(spec, {**spec.axes, "tokens": AxisRange(4, 11, 256)}, 1))
    assert feeds["phrase"][0].tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 4]
    assert feeds["position"][0].tolist() == [0, 0, 1, 2, 3, 0, 1, 2, 3, 0, 0]


def test_an_unknown_input_is_named() -> None:
    model = mini("clip")
    spec = replace(model.graph("image"), inputs=(TensorSpec("thing", ("batch", 3), "float32"),))
    odd = Model(model.folder, replace(model.manifest, graphs={"image": spec}))
    with pytest.raises(WsssError, match=r"clip/image: there is no rule to make the input thing float32\(batch, 3\)"):
        feeds_for(odd, "image", Load(1, "images", {"batch": 1}))
    with pytest.raises(WsssError, match=r"none of its axes .* counts"):
        row_axis(spec, {"something": AxisRange(1, 1, 1)})


# ---- work ----


@pytest.mark.parametrize(("name", "graph"), SMALL)
def test_work_is_what_a_run_of_the_graph_counts(name: str, graph: str) -> None:
    pytest.importorskip("onnx_ir")
    from wsss.export.precision.work import multiply_adds

    model = mini(name)
    feeds = feeds_for(model, graph, load_of(model.graph(graph), model.graph(graph).axes, 3))
    assert work_of(model.path(graph), feeds).multiply_adds == sum(multiply_adds(model.path(graph), feeds).values()) > 0


def test_a_product_is_counted_by_hand(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    model = best._product_model(tmp_path / "product", "fp16", 8, 3)
    work = work_of(model.path("product"), {"scale": np.ones((1, 1), np.float16)})
    assert work.multiply_adds == 3 * 8**3
    assert work.weight_bytes == 2 * 8 * 8
    (tmp_path / "no.onnx").write_bytes(b"no")
    with pytest.raises(WsssError, match=r"no\.onnx: expected an ONNX graph"):
        work_of(tmp_path / "no.onnx", {})


# ---- the best of a machine ----


def test_bounds() -> None:
    known = Ceiling(teraflops=100.0, gigabytes_per_second=1000.0, how="")
    assert known.bound_ms(1e12, 0) == pytest.approx(20)
    assert known.bound_ms(1e9, 5e9) == pytest.approx(5), "the copy takes longer"
    assert Ceiling(teraflops=None, gigabytes_per_second=1.0, how="").bound_ms(1, 1) is None


def test_a_graph_of_products_runs_on_any_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    assert product_by_graph("ort", "cpu", "fp32", 64, 2) > 0
    monkeypatch.setattr(best, "CPU_SIDE", 64)
    monkeypatch.setattr(best, "CPU_COPY_BYTES", 1 << 16)
    measured = measure_ceiling("ort", "cpu", "fp32")
    assert measured.teraflops and measured.gigabytes_per_second and "numpy" in measured.how
    # Processors with half precision are faster in it, others are not.
    monkeypatch.setattr(best, "_cpu_product", lambda: 2.0)
    for half, rate, library in ((3.0, 3.0, "torch, bf16"), (1.0, 2.0, "numpy")):
        monkeypatch.setattr(best, "_cpu_half_product", lambda precision, half=half: half)
        measured = measure_ceiling("ort", "cpu", "bf16")
        assert measured.teraflops == rate and library in measured.how
        assert measure_ceiling("ort", "cpu", "fp32").teraflops == 2.0


# ---- times ----


def test_a_graph_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    known = Ceiling(teraflops=1.0, gigabytes_per_second=10.0, how="")
    rows = list(measure_graph(mini("clip"), "text", (1, 4, 1000), engine="ort", device="cpu", ceiling=known, seconds=0.02))
    assert [(row.batch, row.unit) for row in rows] == [(1, "prompts"), (4, "prompts")], "1000 is beyond its range"
    for row in rows:
        assert row.calls >= 3 and 0 < row.p50_ms <= row.p90_ms <= row.p99_ms
        assert row.gmacs == pytest.approx(0.0008233 * row.batch, rel=1e-3)
        assert row.bound_ms is not None and row.share_of_bound == pytest.approx(
            row.bound_ms / (row.batch / row.per_second * 1e3), rel=1e-2
        )
        assert row.parity is not None and row.parity < 1e-5
    usual = measure_graph(mini("clip"), "text", (), engine="ort", device="cpu", ceiling=None, seconds=0)
    assert [(row.batch, row.share_of_bound) for row in usual] == [(1, None), (32, None)]


def test_percentiles_and_rate_of_known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = GraphSpec(
        file="x.onnx",
        inputs=(TensorSpec("margin", ("batch", 1), "float32"),),
        outputs=(TensorSpec("y", ("batch", 1), "float32"),),
        axes={"batch": AxisRange(1, 2, 4)},
        opset=18,
    )
    clock = SimpleNamespace(now=0.0)
    took = iter([9.0, *range(1, 101), *[0.5] * 100])  # warm-up, calls
    engine = FakeEngine(spec, lambda feeds: {"y": feeds["margin"]})

    def call(feeds: Mapping[str, Any]) -> dict[str, Any]:
        clock.now += next(took)
        return FakeEngine.__call__(engine, feeds)

    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock.now)
    timed = latency._timed
    times, rate = timed(call, {"margin": np.ones((1, 1), np.float32)}, lambda outputs: None, 5049.5, queued=False)  # type: ignore[arg-type]
    assert times == [1000.0 * each for each in range(1, 101)]
    assert rate == pytest.approx(100 / 5050)


def test_parity_belongs_to_the_engine() -> None:
    model = mini("sam")
    spec = model.graph("encoder")
    assert parity_of(model, "encoder", "ort") == max(row.error for row in spec.parity.rows)  # type: ignore[union-attr]
    assert parity_of(model, "encoder", "trt-rtx") is None
    plan = PlanSpec(
        file="x.plan",
        sha256="",
        flavour="trt-rtx",
        graph_sha256="",
        weights_sha256="",
        precision="fp32",
        axes={},
        builder="1",
        target="",
        seconds=1.0,
        parity=replace(spec.parity, rows=(replace(spec.parity.rows[0], error=0.25),)),  # type: ignore[union-attr,type-var]
    )
    built = replace(model.manifest, graphs={"encoder": replace(spec, plans={"trt-rtx": plan})})
    assert parity_of(Model(model.folder, built), "encoder", "trt-rtx") == 0.25
    assert plan.parity is not None
    proof = OpenVinoProof(version="1", processor=instructions(), seconds=1.0, ort_seconds=1.0, parity=plan.parity)
    proven = replace(model.manifest, graphs={"encoder": replace(spec, openvino={proof.processor: proof})})
    assert parity_of(Model(model.folder, proven), "encoder", "openvino") == 0.25
    assert parity_of(model, "encoder", "openvino") is None


# ---- on a GPU, which is simulated ----


@pytest.fixture
def sim(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The simulated GPU of the engines' tests: it runs nothing that is not waited for."""
    path = Path(__file__).parents[1] / "engines" / "simulated_gpu.py"
    spec = importlib.util.spec_from_file_location("simulated_gpu_of_benchmarks", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_feeds_lie_on_the_gpu_and_outputs_are_waited_for(sim: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from wsss.engines.trt import TrtEngine

    gpu = sim.Gpu()
    monkeypatch.setattr("wsss.engines.trt.load_modules", lambda flavour: (gpu.tensorrt, gpu.runtime))
    inputs, outputs = (TensorSpec("boxes", ("boxes", 4), "float32"),), (TensorSpec("y", ("boxes", 4), "float32"),)
    axes = {"boxes": AxisRange(1, 2, 4)}
    computed: list[np.ndarray] = []

    def double(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        computed.append(feeds["boxes"].copy())
        return {"y": 2 * feeds["boxes"]}

    gpu.plans[b"plan"] = sim.Network(inputs, outputs, axes, double)
    (tmp_path / "x.plan").write_bytes(b"plan")
    spec = GraphSpec(file="x.onnx", inputs=inputs, outputs=outputs, axes=axes, opset=18)
    feeds = {"boxes": np.arange(8, dtype=np.float32).reshape(2, 4)}
    with (
        TrtEngine(tmp_path / "x.plan", spec, flavour="trt") as engine,
        on_device(feeds, engine, "trt", "cuda:0") as (resident, wait),
    ):
        sent = engine.copied["host_to_device"]
        wait(engine(resident))
        assert len(computed) == 1 and np.array_equal(computed[0][:2], feeds["boxes"])
        times, rate = latency._timed(engine, resident, wait, 0.0, queued=True)
        assert len(computed) == 1 + 3 + 3 + 3, "warm-up, timed, queued: all have run when the clock stops"
        assert engine.copied["host_to_device"] == sent, "nothing is copied from the host"
        assert len(times) == 3 and rate > 0
    assert copied_by(gpu.runtime, 0, 1 << 12) > 0


def test_onnxruntime_reads_arrays_where_they_are() -> None:
    model = mini("clip")
    loaded = OrtEngine(model.path("text"), model.graph("text"))
    feeds = feeds_for(model, "text", load_of(model.graph("text"), loaded.axes, 2))
    with on_device(feeds, loaded, "ort", "cpu") as (resident, _):
        assert resident is feeds
