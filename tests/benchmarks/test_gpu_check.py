"""The plan of the check, what decides it, and the steps themselves as far as they need no GPU."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wsss.benchmarks import gpu_check, gpu_steps
from wsss.benchmarks.ceiling import Ceiling
from wsss.benchmarks.gpu_check import check, choose_engine, first_steps, identity_of, later_steps, summary
from wsss.benchmarks.gpu_steps import fusions_in, traffic_ms
from wsss.benchmarks.steps import Record, Step
from wsss.engines.machine import GpuFacts, Library, Machine, machine
from wsss.errors import WsssError
from wsss.export.family import family
from wsss.runtime.bundles import MINI
from wsss.spec import Bundle

RTX = Library(version="1.7.1", capabilities=("sm89",))
H200 = Machine(
    system="Linux",
    processor="x",
    cores=2,
    memory_mib=1024,
    python="3.12",
    gpus=(GpuFacts(index=0, name="NVIDIA H200 (x)", capability="9.0", memory_mib=143_000),),
    driver="580",
    tensorrt={"trt-rtx": RTX},
    providers=("CPUExecutionProvider",),
)


def record_with(tmp_path: Path, **steps: Any) -> Record:
    record = Record(tmp_path / "record.json", {})
    record.content["steps"] = steps
    return record


def probed(runs: bool, error: str | None = None) -> dict[str, Any]:
    attempt = {"target": "portable", "builds": True, "runs": runs} | ({"error": error} if error else {})
    return {"TensorRT-RTX runs here": {"status": "done", "result": {"attempts": [attempt]}}}


# ---- which engine ----


def test_rtx_where_it_runs(tmp_path: Path) -> None:
    engine, why = choose_engine(record_with(tmp_path, **probed(True)), H200)
    assert engine == "trt-rtx" and why == "TensorRT is not installed"


@pytest.mark.parametrize(("providers", "engine"), [(("CUDAExecutionProvider",), "ort"), (("CPUExecutionProvider",), "eager")])
def test_where_rtx_refuses_the_gpu_the_tool_says_so(tmp_path: Path, providers: tuple[str, ...], engine: str) -> None:
    known = dataclasses.replace(H200, providers=providers)
    chosen, why = choose_engine(record_with(tmp_path, **probed(False, "compute capability 9.0 is not supported")), known)
    assert chosen == engine
    assert "TensorRT-RTX 1.7.1 refuses this GPU (sm90): compute capability 9.0 is not supported" in why


def test_a_probe_that_crashed_counts_as_refusal(tmp_path: Path) -> None:
    record = record_with(tmp_path, **{"TensorRT-RTX runs here": {"status": "failed", "error": "ended by SIGSEGV"}})
    engine, why = choose_engine(record, H200)
    assert engine == "eager" and "SIGSEGV" in why


def test_missing_packages_are_named_first() -> None:
    """The GPU machine has no network: what is missing must be known before anything is carried there."""
    hide = "import sys, importlib.util as u; hidden = {'PIL', 'yaml', 'tokenizers', 'numpy', 'torch'}; find = u.find_spec\n"
    hide += "u.find_spec = lambda name, *more: None if name in hidden else find(name, *more)\n"
    hide += "sys.modules.update(dict.fromkeys(hidden))\nfrom wsss.benchmarks.gpu_check import main; main(['--out', 'x'])"
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "wsss: gpu-check: needs numpy, pillow, tokenizers, torch, pyyaml\n\n"
        "hint: pip install numpy pillow tokenizers torch pyyaml\n"
    )


# ---- the plan ----


def by_name(steps: list[Step]) -> dict[str, Step]:
    assert len({step.name for step in steps}) == len(steps)
    return {step.name: step for step in steps}


def test_every_need_is_a_step_before(tmp_path: Path) -> None:
    for engine in ("trt", "trt-rtx", "ort", "eager"):
        for full in (False, True):
            seen: set[str] = set()
            for step in later_steps(engine, [], full, tmp_path, tmp_path / "r.json"):
                assert set(step.needs) <= seen, f"{step.name} comes before {step.needs}"
                seen.add(step.name)


def test_the_default_set_and_the_full_one(tmp_path: Path) -> None:
    default = by_name(later_steps("trt-rtx", [], False, tmp_path, tmp_path))
    assert {
        "mini: engines",
        "mini: gate",
        "mini: chain",
        "gpu tests",
        "SAM vit_b: latency",
        "CLIP ViT-B-16: gate",
    } <= default.keys()
    assert not [name for name in default if "vit_h" in name or "Grounding" in name]
    full = list(by_name(later_steps("trt-rtx", [], True, tmp_path, tmp_path)))
    heavy = [name for name in full if name.startswith("SAM vit_h")]
    measured = [name for name in full if "chain with" not in name]
    assert heavy and measured[-len(heavy) :] == heavy, "the largest model comes last"
    assert {"chain with SAM vit_b", "chain with SAM 2.1 base_plus", "chain with SAM vit_h"} <= set(full)
    assert {"MM-Grounding-DINO tiny: gate", "SAM 2.1 base_plus: latency"} <= set(full)
    assert all(variant in family(name).variants for name, variant in gpu_check.FULL_SIZE.values())
    assert not [name for name in by_name(later_steps("ort", [], True, tmp_path, tmp_path)) if name.endswith("engines")]


def test_steps_of_all_kinds_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command's kind and arguments reach a function that takes them."""
    called = []
    for name in [name for name in vars(gpu_steps) if name.startswith("step_")] + ["_joined"]:
        monkeypatch.setattr(gpu_steps, name, lambda *args, name=name: called.append((name, args)) or {})
    steps = [*first_steps(H200, tmp_path), *later_steps("trt-rtx", [tmp_path / "b"], True, tmp_path, tmp_path / "r.json")]
    for step in steps:
        assert step.command[:3] == [sys.executable, "-m", "wsss.benchmarks.gpu_steps"]
        gpu_steps.main([*step.command[3:], "--result", str(tmp_path / "result")])
    assert len(called) == len(steps)
    assert ("step_graphs", (tmp_path / "sam-vit_b", "sam", "vit_b", tmp_path / "b")) in called
    assert ("step_gate", (tmp_path / "mini", "trt-rtx", 0)) in called


def test_the_identity_changes_with_the_gpu_and_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = identity_of(H200, [])
    assert one == identity_of(H200, [])
    assert one != identity_of(dataclasses.replace(H200, driver="590"), [])
    assert one != identity_of(H200, [Path("b")])
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    assert one["sources"] != identity_of(H200, [])["sources"]


# ---- the whole check, its steps played ----


class Played:
    """In place of the maker of steps: each writes the result that is given for its name, or fails."""

    results: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, record: Path) -> None:
        self.record = record

    def __call__(self, name: str, limit_s: float, kind: str, *arguments: str, needs: Any = (), product: Any = None) -> Step:
        ran = str(self.record.parent.parent / "ran")
        code = f"import sys; open({ran!r}, 'a').write({kind + ' '!r}); {self.results.get(kind, '')}"
        return Step(name=name, command=[sys.executable, "-c", code], limit_s=limit_s, needs=needs)


def test_a_check_goes_on_where_it_was_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    probe = probed(True)["TensorRT-RTX runs here"]["result"]
    monkeypatch.setattr(gpu_check, "machine", lambda: H200)
    monkeypatch.setattr(gpu_check, "_StepMaker", Played)
    monkeypatch.setattr(
        Played, "results", {"probe": f"open(sys.argv[-1], 'w').write({json.dumps(probe)!r})", "latency": "sys.exit('cut')"}
    )
    lines: list[str] = []
    record = check(tmp_path / "out", work=tmp_path / "work", log=lines.append)
    assert record.path.name == "gpu-nvidia-h200-x.json"
    written = json.loads(record.path.read_text())
    assert written["engine"] == {"name": "trt-rtx", "why_nothing_better": "TensorRT is not installed"}
    assert written["not_begun"] == [] and written["steps"]["mini: latency"]["status"] == "failed"
    first = (tmp_path / "ran").read_text().split()
    assert first.count("latency") == 3 and first.count("engines") == 3
    monkeypatch.setattr(Played, "results", {})
    check(tmp_path / "out", work=tmp_path / "work", log=lines.append)
    assert (tmp_path / "ran").read_text().split() == [*first, "latency", "latency", "latency"]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_check, "machine", lambda: dataclasses.replace(H200, gpus=()))
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(["--out", str(tmp_path)])
    assert stop.value.code == 1
    assert "expected an NVIDIA GPU" in (message := capsys.readouterr().err) and "hint:" in message
    assert not list(tmp_path.iterdir())


def test_the_summary_names_rates_and_shares(tmp_path: Path) -> None:
    row = {"model": "sam", "graph": "encoder", "variant": "vit_b", "batch": 8, "unit": "images", "p50_ms": 16.0}
    bounds = {"bound_ms": 10.5, "traffic_ms": 11.2}
    latency = {"rows": [{**row, **bounds, "per_second": 500.0, "share_of_bound": 0.655}], "failed": {}}
    engine = {"fused_attentions": 24, "softmaxes_alone": 0}
    engines = {"sam/encoder": engine, "sam/decoder": {"fused_attentions": None, "softmaxes_alone": None}}
    chain = {"per_second": 220.0, "share_of_bound": None, "agreement": 0.99987}
    results = {"SAM vit_b: engines": engines, "SAM vit_b: latency": latency, "mini: chain": chain}
    steps = {name: {"status": "done", "result": found} for name, found in results.items()}
    assert list(summary(record_with(tmp_path, **steps))) == [
        "SAM vit_b sam/encoder: 24 attentions fused, 0 softmaxes alone",
        (
            "sam/encoder vit_b, 8 images: 16 ms (at least 10.5 ms by products and tensors, 11.2 ms by compiled memory traffic), "
            "500 a second, 66 % of the bound"
        ),
        "mini: chain: 220 images a second, 99.987 % of pixels as in FP32",
    ]


# ---- the steps themselves ----


def test_what_the_inspector_says_of_fusions() -> None:
    names = ("_gemm_mha_v2_myl0_11", "__myl_MaxSubExpSumDivMul_myl0_3", "node_matmul_myl0_9")
    layers = [{"Name": name, "LayerType": kind} for name, kind in zip(names, ("kgen", "kgen", "gemm"), strict=True)]
    assert fusions_in(json.dumps({"Layers": layers})) == (1, 1)
    assert fusions_in(json.dumps({"Layers": ["only_a_name"]})) == (None, None)


def test_memory_traffic_needs_a_compiled_graph_and_a_bandwidth(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (known := tmp_path / "compiled.json").write_text(json.dumps({"sam vit_b: encoder": {"gigabytes": 6.0}}))
    monkeypatch.setattr(gpu_steps, "COMPILED", known)
    row = SimpleNamespace(model="sam", variant="vit_b", graph="encoder", precision="fp16", batch=4)
    ceiling = Ceiling(teraflops=790.0, gigabytes_per_second=4300.0, how="test")
    assert traffic_ms(row, ceiling) == 5.581  # type: ignore[arg-type]
    others = {"graph": "decoder"}, {"precision": "fp32"}
    for other in others:
        assert traffic_ms(SimpleNamespace(**(vars(row) | other)), ceiling) is None  # type: ignore[arg-type]
    assert traffic_ms(row, dataclasses.replace(ceiling, gigabytes_per_second=None)) is None  # type: ignore[arg-type]


def test_a_step_that_has_nothing_to_do_or_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def play(answer: Callable[[], Any]) -> int:
        monkeypatch.setattr(gpu_steps, "step_tests", answer)
        try:
            gpu_steps.main(["tests", "--result", str(tmp_path / "result")])
        except SystemExit as stop:
            return int(str(stop.code))
        return 0

    def leave() -> None:
        raise gpu_steps.LeftOut("needs pytest")

    def fail() -> None:
        raise WsssError("one test failed")

    assert play(leave) == 0
    assert json.loads((tmp_path / "result").read_text()) == {"left out": "needs pytest"}
    assert play(fail) == 1 and "one test failed" in capsys.readouterr().err
    assert play(lambda: {"sam/encoder": {"passed": False, "why": "0.3 > 0.005"}}) == 1
    assert "sam/encoder: 0.3 > 0.005" in capsys.readouterr().err
    assert play(lambda: {"rows": [1], "failed": {"sam/fuse": "no"}}) == 1
    assert play(lambda: {"sam/encoder": {"passed": True}, "clip": {"passed": None, "why": "needs torch"}}) == 0
    assert play(lambda: {"rows": [1], "failed": {}}) == 0


def test_ceilings_are_read_from_the_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    best = {"teraflops": 790.0, "gigabytes_per_second": 4300.0, "how": "torch"}
    record_with(tmp_path, ceiling={"status": "done", "result": {"fp16": best}}).save()
    seen = []
    monkeypatch.setattr(gpu_steps, "step_latency", lambda bundle, engine, ceilings: seen.append(ceilings))
    gpu_steps.main(["latency", "b", "ort", "--record", str(tmp_path / "record.json"), "--result", str(tmp_path / "result")])
    assert seen[0]["fp16"].teraflops == 790.0


def test_graphs_that_were_brought_along_are_taken(tmp_path: Path) -> None:
    result = gpu_steps.step_graphs(tmp_path / "one", "sam", "mini", tmp_path / "nothing", MINI)
    assert result["brought"] and (tmp_path / "one" / "sam" / "encoder.onnx").is_file()
    assert set(gpu_steps.step_graphs_of_mini(tmp_path / "two", MINI).values()) == {"fp32, brought along"}
    assert gpu_steps._find([MINI], "sam", "vit_b") is None


def test_full_size_models_are_exported_without_the_gate(tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    gpu_steps._export_without_gate("clip", "mini", tmp_path)
    graphs = Bundle(tmp_path).model("clip").manifest.graphs
    assert {(name, graph.precision, graph.parity) for name, graph in graphs.items()} == {
        ("image", "fp16", None),
        ("text", "fp16", None),
        ("resize-96x96", "fp16", None),
    }


def test_without_an_exporter_the_shipped_graphs_are_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str, bundle: Path) -> None:
        (bundle / name).mkdir(parents=True)
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr(gpu_steps, "_export_mini", missing)
    origins = gpu_steps.step_graphs_of_mini(tmp_path)
    assert origins["sam"] == "fp32, as shipped: No module named 'transformers'"
    assert (tmp_path / "sam" / "encoder.onnx").is_file()


def test_a_graph_is_gated_on_few_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    monkeypatch.setattr(gpu_steps, "DEVICE", "cpu")
    gpu_steps.step_graphs(tmp_path, "clip", "mini", MINI)
    verdicts = gpu_steps.step_gate(tmp_path, "ort", 2)
    assert set(verdicts) == {"clip/image", "clip/text"}
    assert all(verdict["passed"] for verdict in verdicts.values())
    assert 0 < verdicts["clip/image"]["errors"]["embedding"] < 1e-5


def test_rtx_builds_the_probe_and_cannot_run_it_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    if machine().gpus:
        pytest.skip("there is a GPU here")
    monkeypatch.setattr(gpu_steps, "machine", lambda: H200)
    portable, own = gpu_steps.step_probe("trt-rtx")["attempts"]
    assert (portable["builds"], portable["runs"]) == (True, False) and "GPU" in portable["error"]
    assert (own["builds"], own["runs"]) == (False, False) and "CUDA driver" in own["error"]
