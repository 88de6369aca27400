"""The steps of `wsss.benchmarks.gpu_check`, each run in a separate process.

    python -m wsss.benchmarks.gpu_steps KIND [ARGUMENT ...] --result FILE [--record FILE]

The result is written as JSON to FILE; `gpu_check` describes the results of all steps. A step that ran but found an error (a
graph that fails the gate) writes its result and exits with 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..engines.machine import machine
from ..engines.opening import open_graph
from ..engines.plan import MODULES, plan_here, tensorrt_module
from ..errors import BundleError, WeightsError, WsssError
from ..runtime.bundles import MINI
from ..spec import AxisRange, Bundle, Flavour, GraphSpec, Model, Parity, TensorSpec, open_bundle
from .ceiling import Ceiling, measure_ceiling
from .gpu_check import mark_of
from .latency import GraphRow, Opener, measure_graph
from .steps import LEFT_OUT, ROOT, log
from .throughput import CHAIN_MODELS, measure_chain

if TYPE_CHECKING:
    from ..engines.engine import Engine
    from ..export.family import Graph

IMPORTED = (
    *("torch", "torchvision", "numpy", "onnx", "onnxscript", "onnxruntime", "transformers", "open_clip", "segment_anything"),
    *("safetensors", "tokenizers", "PIL", "typer", "pytest", "cuda.bindings.runtime", "tensorrt_rtx", "tensorrt", "ml_dtypes"),
)
BATCHES = (1, 4, 8, 16)
"""Batch sizes to time, where the engine supports them, in addition to the graph's usual one."""
SCENES, REPEAT, CHAIN_BATCH = 64, 4, 16
DEVICE = "cuda:0"
COMPILED = ROOT / "benchmarks" / "results" / "compiled-graphs.json"


class LeftOut(Exception):
    """A step does not apply to this machine; the message gives the reason."""


def step_machine() -> dict[str, Any]:
    """Describe this machine and the packages that can be imported."""
    return {**dataclasses.asdict(machine()), "modules": {name: _importable(name) for name in IMPORTED}}


def step_ceiling() -> dict[str, Any]:
    """Measure the maximum compute rate and bandwidth of this GPU."""
    return {precision: dataclasses.asdict(measure_ceiling("ort", DEVICE, precision)) for precision in ("fp16", "fp32")}


def step_probe(flavour: Flavour) -> dict[str, Any]:
    """Check whether a tiny engine of this library builds, loads and computes here."""
    from ..engines.trt import load_modules

    trt, _ = load_modules(flavour)
    can_target_gpu = flavour == "trt-rtx" and hasattr(getattr(trt, "ComputeCapability", None), "CURRENT")
    attempts = [_attempt(trt, flavour, target) for target in ("portable", *(("this GPU",) if can_target_gpu else ()))]
    return {"version": trt.__version__, "capability": machine().gpus[0].target, "attempts": attempts}


def step_graphs_of_mini(bundle: Path, *brought: Path) -> dict[str, str]:
    """Put the small models' graphs into ``bundle``: from a given bundle, exported in FP16, or the shipped ones in FP32."""
    origins = {}
    for name in CHAIN_MODELS:
        shutil.rmtree(bundle / name, ignore_errors=True)
        source = _find(brought, name, "mini")
        if source is not None:
            shutil.copytree(source, bundle / name)
            origins[name] = f"{Bundle(bundle).model(name).manifest.precision}, brought along"
            continue
        try:
            _export_mini(name, bundle)
            origins[name] = "fp16, exported here"
        except (ImportError, WsssError) as error:
            shutil.rmtree(bundle / name, ignore_errors=True)
            shutil.copytree(MINI / name, bundle / name)
            origins[name] = f"fp32, as shipped: {error}"
    return origins


def step_graphs(bundle: Path, name: str, variant: str, *brought: Path) -> dict[str, Any]:
    """Put a full-size model in FP16 into ``bundle``: from a given bundle, or exported with random weights without the gate."""
    begun = time.monotonic()
    source = _find(brought, name, variant)
    try:
        if source is not None:
            shutil.rmtree(bundle / name, ignore_errors=True)
            shutil.copytree(source, bundle / name)
        else:
            _export_without_gate(name, variant, bundle)
    except ImportError as error:
        raise LeftOut(f"needs {error.name or error}") from None
    except WeightsError as error:  # BERT's vocabulary is missing
        raise LeftOut(f"{error}") from None
    size = sum(path.stat().st_size for path in (bundle / name).iterdir())
    seconds = round(time.monotonic() - begun, 1)
    return {"seconds": seconds, "megabytes": round(size / 1e6), "brought": source is not None}


def step_engines(bundle: Path, flavour: Flavour) -> dict[str, Any]:
    """Build an engine for every graph of a bundle."""
    from ..export.to_engine import BuildOptions, build_plans

    built = {}
    for name in open_bundle(bundle).models():
        model = build_plans(open_bundle(bundle).model(name), BuildOptions(flavour=flavour), log)
        for graph, spec in model.manifest.graphs.items():
            plan = plan_here(spec, flavour)
            assert plan is not None
            size = (model.folder / plan.file).stat().st_size
            fused, alone = plan.fused_attentions, plan.softmaxes_alone
            if fused is None:
                fused, alone = fusions_in(_layers_of(model.folder / plan.file, flavour))
            built[f"{name}/{graph}"] = {
                "seconds": plan.seconds,
                "megabytes": round(size / 1e6, 1),
                "target": plan.target,
                "fused_attentions": fused,
                "softmaxes_alone": alone,
            }
    mark_of(bundle, flavour).touch()
    return built


def step_gate(bundle: Path, engine: str, rows: int) -> dict[str, Any]:
    """Compare every graph in this engine with the official modules.

    Args:
        rows: largest batch; no verdict is recorded. 0 runs the whole gate, and records the verdict of TensorRT engines.
    """
    verdicts: dict[str, Any] = {}
    for name in open_bundle(bundle).models():
        model = open_bundle(bundle).model(name)
        try:
            if rows == 0 and engine in MODULES:
                verdicts |= _gate_plans(model, engine)
            else:
                verdicts |= _gate_rows(model, engine, rows)
        except ImportError as error:
            verdicts[name] = {"passed": None, "why": f"left out: needs {error.name or error}"}
        except WsssError as error:
            verdicts[name] = {"passed": False, "why": error.message}
    return verdicts


def step_tests() -> dict[str, str]:
    """Run the tests marked ``gpu``."""
    if importlib.util.find_spec("pytest") is None:
        raise LeftOut("needs pytest")
    if not (ROOT / "tests").is_dir():
        raise LeftOut("needs a checkout with its tests")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = (run.stdout.strip().splitlines() or [""])[-1]
    if run.returncode == 5:
        raise LeftOut("no test is marked gpu")
    if run.returncode:
        raise WsssError(f"{run.stdout[-1500:]}\n{run.stderr[-300:]}".strip())
    return {"pytest": last}


def step_latency(bundle: Path, engine: str, ceilings: Mapping[str, Ceiling]) -> dict[str, Any]:
    """Time each graph at several batch sizes."""
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for name in open_bundle(bundle).models():
        model = open_bundle(bundle).model(name)
        for graph, spec in model.manifest.graphs.items():
            usual = max((range_.opt for range_ in spec.axes.values()), default=1)
            try:
                for row in measure_graph(
                    model,
                    graph,
                    (*BATCHES, min(usual, 64)),
                    engine=engine,
                    device=DEVICE,
                    ceiling=ceilings.get(spec.precision),
                    seconds=0.4,
                    open_engine=opener(engine),
                ):
                    traffic = traffic_ms(row, ceilings.get(spec.precision))
                    rows.append(dataclasses.asdict(row) | {"traffic_ms": traffic})
            except (WsssError, RuntimeError, ImportError) as error:
                failed[f"{name}/{graph}"] = f"{error}".strip().split("\n")[0]
    if not rows:
        raise WsssError(f"no graph ran: {failed}")
    return {"rows": rows, "failed": failed}


def step_chain(bundle: Path, engine: str, ceilings: Mapping[str, Ceiling], boxes: int) -> dict[str, Any]:
    """Time the chain end to end; the small models' label maps are compared with FP32 on the CPU."""
    if engine == "eager":
        raise LeftOut("with PyTorch only single graphs are measured")
    with tempfile.TemporaryDirectory() as folder:
        result = measure_chain(
            bundle,
            Path(folder),
            engine=engine,
            device=DEVICE,
            batch=CHAIN_BATCH,
            classes="voc" if boxes else "mini",
            count=SCENES,
            repeat=REPEAT,
            boxes=boxes or None,
            ceiling=ceilings.get("fp16"),
            reference=None if boxes else MINI,
            unverified=True,
        )
    return dataclasses.asdict(result)


# ---- helpers of the steps ----


def _layers_of(path: Path, flavour: Flavour) -> str:
    """What the engine inspector says of an engine, JSON. The full TensorRT does not list compiled layers in its log."""
    trt = tensorrt_module(flavour)
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    return engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)


def fusions_in(layers: str) -> tuple[int | None, int | None]:
    """Attentions fused and softmaxes alone among an engine's layers, the inspector's JSON; None where it gives no names."""
    from ..export.to_engine import ALONE, FUSED, kind_of

    told = [layer for layer in json.loads(layers).get("Layers", []) if isinstance(layer, dict)]
    kinds = [kind_of(f"Name: {layer.get('Name')}, LayerType: {layer.get('LayerType')}") for layer in told]
    return (kinds.count(FUSED), kinds.count(ALONE)) if kinds else (None, None)


def traffic_ms(row: GraphRow, ceiling: Ceiling | None) -> float | None:
    """Time that the memory traffic of a graph takes at least, if it is compiled as TensorRT-RTX does (`compiled_graphs`); None
    for graphs that were not compiled there, or where the bandwidth is unknown."""
    known = json.loads(COMPILED.read_text(encoding="utf-8")) if COMPILED.is_file() else {}
    found = known.get(f"{row.model} {row.variant}: {row.graph}")
    if found is None or row.precision == "fp32" or ceiling is None or not ceiling.gigabytes_per_second:
        return None
    return round(1e3 * row.batch * found["gigabytes"] / ceiling.gigabytes_per_second, 3)


def _importable(name: str) -> str:
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a package that does not fit this machine may raise anything
        return f"no: {type(error).__name__}: {error}".split("\n")[0]
    return f"yes {getattr(module, '__version__', '')}".strip()


def _attempt(trt: Any, flavour: Flavour, target: str) -> dict[str, Any]:
    """Build a half-precision product of 8 rows with 64 x 32 weights, load it, run it, and compare it with numpy."""
    from ..engines.trt import TrtEngine

    attempt: dict[str, Any] = {"target": target, "builds": False, "runs": False}
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(8, 64)).astype(np.float16), rng.normal(size=(64, 32)).astype(np.float16)
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "tiny.plan"
        try:
            plan.write_bytes(_tiny_plan(trt, weights, target))
            attempt["builds"] = True
            spec = GraphSpec(
                file="tiny.onnx",
                inputs=(TensorSpec("x", (8, 64), "float16"),),
                outputs=(TensorSpec("y", (8, 32), "float16"),),
                axes={},
                opset=18,
                precision="fp16",
            )
            with TrtEngine(plan, spec, flavour=flavour) as engine:
                for _ in range(4):  # enqueued, captured, replayed
                    y = np.asarray(engine({"x": x})["y"]).astype(np.float32)
            attempt["difference"] = float(np.abs(y - x.astype(np.float32) @ weights.astype(np.float32)).max())
            attempt["runs"] = attempt["difference"] < 0.1  # rounding of 64 products of about 1 in FP16 gives 0.02
        except Exception as error:  # each library raises its own classes; the result records the message
            attempt["error"] = f"{type(error).__name__}: {error}"
    return attempt


def _tiny_plan(trt: Any, weights: np.ndarray, target: str) -> bytes:
    errors: list[str] = []

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                errors.append(message.split("\n")[0])

    logger = Logger()
    builder = trt.Builder(logger)
    strongly = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly is None else 1 << int(strongly))
    x = network.add_input("x", trt.float16, (8, 64))
    matrix = network.add_constant(weights.shape, trt.Weights(weights))
    none = trt.MatrixOperation.NONE
    product = network.add_matrix_multiply(x, none, matrix.get_output(0), none)
    product.get_output(0).name = "y"
    network.mark_output(product.get_output(0))
    config = builder.create_builder_config()
    if target != "portable":
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise WsssError(f"the builder refuses a matrix product: {'; '.join(errors) or 'no reason given'}")
    return bytes(plan)


def _gate_plans(model: Model, flavour: Flavour) -> dict[str, Any]:
    from ..export.exporting import verify_plans

    reports = verify_plans(model, flavour, None, log)
    return {f"{model.manifest.family}/{graph}": _verdict(parity) for graph, parity in reports.items()}


def _gate_rows(model: Model, engine: str, rows: int) -> dict[str, Any]:
    from ..export.exporting import prepare_again
    from ..export.verify import gate

    verdicts: dict[str, Any] = {}
    for make in prepare_again(model.manifest).graphs:
        graph = make().at(model.manifest.precision)
        where = f"{model.manifest.family}/{graph.name}"
        try:
            loaded = opener(engine)(model, graph.name)
            graph = dataclasses.replace(graph, axes=_axes_with_rows(graph, loaded, rows))
            verdicts[where] = _verdict(gate(graph, loaded, engine_name=engine, reference_name="official", where=where))
            getattr(loaded, "close", lambda: None)()
        except WsssError as error:
            verdicts[where] = {"passed": False, "why": error.message}
    return verdicts


def _export_mini(name: str, bundle: Path) -> None:
    from ..export.exporting import export_model
    from ..export.family import Options, family

    export_model(family(name), variant="mini", weights="mini", bundle=bundle, options=Options(precision="fp16"), log=log)


def _export_without_gate(name: str, variant: str, bundle: Path) -> None:
    """Export a full-size model in FP16 with random weights, for timing only; the gate would take most of the time."""
    from ..export.exporting import export_model
    from ..export.family import Options, family

    # Batch ranges as in use, but larger where the GPUs that run this check have room. Grounding-DINO's engine takes 550 MB a
    # photograph, and TensorRT-RTX refused to build it for sixteen within 8 GiB.
    batch = AxisRange(1, 4, 8) if name == "grounding-dino" or variant == "vit_h" else AxisRange(1, 8, 16)
    options = Options(batch=batch, precision="fp16")
    export_model(family(name), variant=variant, weights="random:0", bundle=bundle, options=options, log=log, gate=False)


def _axes_with_rows(graph: Graph, loaded: Engine, rows: int) -> dict[str, AxisRange]:
    """The axis ranges of an engine, with its batch limited to ``rows``; 0 sets no limit."""
    axes = dict(loaded.axes)
    if rows:
        most = min(axes[graph.row_axis].max, rows)
        axes[graph.row_axis] = AxisRange(1, most, most)
    return axes


def _verdict(parity: Parity | None) -> dict[str, Any]:
    assert parity is not None
    outputs = dict.fromkeys(row.output for row in parity.rows)
    return {"passed": True, "errors": {name: float(f"{parity.worst(name).error:.3g}") for name in outputs}}


def _find(brought: Sequence[Path], name: str, variant: str) -> Path | None:
    """The folder of a model in one of the given bundles, None where no bundle holds it."""
    for bundle in brought:
        try:
            model = Bundle(bundle).model(name)
        except BundleError:
            continue
        if model.manifest.variant == variant:
            return model.folder
    return None


def opener(engine: str) -> Opener:
    """How to open a graph: as the runtime does, or in PyTorch under autocast for ``eager``."""
    if engine == "eager":
        from .autocast import AutocastEngine

        return lambda model, graph: AutocastEngine(model, graph, DEVICE)
    return lambda model, graph: open_graph(model, graph, engine, device=DEVICE, unverified=True)


# ---- the command line ----


def _joined(engine: str, ceilings: Mapping[str, Ceiling], boxes: int, folders: Sequence[Path]) -> dict[str, Any]:
    """Time the chain with models from several bundles."""
    with tempfile.TemporaryDirectory() as folder:
        for bundle in folders:
            for name in Bundle(bundle).models():
                (Path(folder) / name).symlink_to((bundle / name).resolve(), target_is_directory=True)
        return step_chain(Path(folder), engine, ceilings, boxes)


def run(kind: str, arguments: Sequence[str], ceilings: Mapping[str, Ceiling]) -> Any:
    """Run one step by its kind, with the arguments of the command line."""
    paths = [Path(argument) for argument in arguments]
    if "ort" in arguments and importlib.util.find_spec("torch") is not None:
        importlib.import_module("torch")  # loads the CUDA libraries of its wheels, which onnxruntime-gpu then finds
    steps: dict[str, Callable[[], Any]] = {
        "machine": step_machine,
        "ceiling": step_ceiling,
        "probe": lambda: step_probe(cast(Flavour, arguments[0])),
        "graphs-of-mini": lambda: step_graphs_of_mini(*paths),
        "graphs": lambda: step_graphs(paths[0], arguments[1], arguments[2], *paths[3:]),
        "engines": lambda: step_engines(paths[0], cast(Flavour, arguments[1])),
        "gate": lambda: step_gate(paths[0], arguments[1], int(arguments[2])),
        "tests": step_tests,
        "latency": lambda: step_latency(paths[0], arguments[1], ceilings),
        "chain": lambda: _joined(arguments[0], ceilings, int(arguments[1]), paths[2:]),
    }
    return steps[kind]()


def wrong_in(result: Any) -> list[str]:
    """The errors in a step's result: graphs that did not run, or did not pass the gate."""
    if not isinstance(result, dict):
        return []
    failed = result.get("failed")  # a number in the result of a chain
    errors = [f"{name}: {why}" for name, why in failed.items()] if isinstance(failed, dict) else []
    verdicts = ((name, verdict) for name, verdict in result.items() if isinstance(verdict, dict))
    return errors + [f"{name}: {verdict.get('why')}" for name, verdict in verdicts if verdict.get("passed") is False]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line of the module."""
    parser = argparse.ArgumentParser(prog="python -m wsss.benchmarks.gpu_steps")
    parser.add_argument("kind")
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args(arguments)
    ceilings: dict[str, Ceiling] = {}
    if options.record is not None and options.record.is_file():
        steps = json.loads(options.record.read_text(encoding="utf-8"))["steps"]
        measured = steps.get("ceiling", {}).get("result") or {}
        ceilings = {precision: Ceiling(**best) for precision, best in measured.items()}
    try:
        result = run(options.kind, options.arguments, ceilings)
    except LeftOut as reason:
        result = {LEFT_OUT: f"{reason}"}
    except WsssError as error:
        log(error.message)
        raise SystemExit(1) from None
    options.result.write_text(json.dumps(result), encoding="utf-8")
    if wrong := wrong_in(result):
        log("\n".join(wrong))
        raise SystemExit(1)


if __name__ == "__main__":
    main()
