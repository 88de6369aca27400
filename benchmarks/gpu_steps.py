"""What each step of `wsss.benchmarks.gpu_check` does, in a process of its own.

    python -m wsss.benchmarks.gpu_steps KIND [ARGUMENT ...] --result FILE [--record FILE]

The result is written as JSON to FILE; the shapes of all results are told in `gpu_check`. A step that ran but found
something wrong (a graph that fails the gate) writes its result and exits with 1.
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
from ..engines.opening import FLAVOURS, open_graph
from ..errors import BundleError, WeightsError, WsssError
from ..runtime.labeler import MINI
from ..spec import (
    AxisRange,
    Bundle,
    Flavour,
    GraphSpec,
    Manifest,
    Model,
    Parity,
    TensorSpec,
    open_bundle,
    sha256_of,
    write_manifest,
)
from .ceiling import Ceiling, measure_ceiling
from .latency import Opener, measure_graph
from .steps import LEFT_OUT
from .throughput import CHAIN_MODELS, measure_chain

if TYPE_CHECKING:
    from ..engines.engine import Engine
    from ..export.family import Family, Graph

ROOT = Path(__file__).resolve().parent.parent
MODULES = (
    *("torch", "torchvision", "numpy", "onnx", "onnxscript", "onnxruntime", "transformers", "open_clip", "segment_anything"),
    *("safetensors", "tokenizers", "PIL", "typer", "pytest", "cuda.bindings.runtime", "tensorrt_rtx", "tensorrt", "ml_dtypes"),
)
BATCHES = (1, 4, 8, 16)
"""Entries of a call, as far as the engine takes them, beside the graph's usual number."""
SCENES, REPEAT, CHAIN_BATCH = 64, 4, 16
PLACE = "cuda:0"


class LeftOut(Exception):
    """There is nothing to do here; the message says why."""


def step_machine() -> dict[str, Any]:
    """Facts of this machine, and what can be imported."""
    return {**dataclasses.asdict(machine()), "modules": {name: _importable(name) for name in MODULES}}


def step_ceiling() -> dict[str, Any]:
    """The best of this GPU."""
    return {each: dataclasses.asdict(measure_ceiling("ort", PLACE, each)) for each in ("fp16", "fp32")}


def step_probe(flavour: Flavour) -> dict[str, Any]:
    """Does a tiny engine of this library build, load and compute here?"""
    from ..engines.trt import load_modules

    trt, _ = load_modules(flavour)
    own = flavour == "trt-rtx" and hasattr(getattr(trt, "ComputeCapability", None), "CURRENT")
    attempts = [_attempt(trt, flavour, target) for target in ("portable", *(("this GPU",) if own else ()))]
    return {"version": trt.__version__, "capability": machine().gpus[0].target, "attempts": attempts}


def step_graphs_of_mini(bundle: Path, *brought: Path) -> dict[str, str]:
    """The small models' graphs: brought along, exported in FP16, or the shipped ones in FP32."""
    told = {}
    for name in CHAIN_MODELS:
        shutil.rmtree(bundle / name, ignore_errors=True)
        source = _find(brought, name, "mini")
        if source is not None:
            shutil.copytree(source, bundle / name)
            told[name] = f"{Bundle(bundle).model(name).manifest.precision}, brought along"
            continue
        try:
            _export_mini(name, bundle)
            told[name] = "fp16, exported here"
        except (ImportError, WsssError) as error:
            shutil.rmtree(bundle / name, ignore_errors=True)
            shutil.copytree(MINI / name, bundle / name)
            told[name] = f"fp32, as shipped: {error}"
    return told


def step_graphs(bundle: Path, name: str, variant: str, *brought: Path) -> dict[str, Any]:
    """A full-size model in FP16: brought along, or traced with random weights and not gated."""
    begun = time.monotonic()
    source = _find(brought, name, variant)
    try:
        if source is not None:
            shutil.rmtree(bundle / name, ignore_errors=True)
            shutil.copytree(source, bundle / name)
        else:
            from ..export.family import family

            _trace(family(name), variant, bundle)
    except ImportError as error:
        raise LeftOut(f"needs {error.name or error}") from None
    except WeightsError as error:  # a vocabulary that is not here
        raise LeftOut(f"{error}") from None
    size = sum(path.stat().st_size for path in (bundle / name).iterdir())
    told = {"seconds": round(time.monotonic() - begun, 1), "megabytes": round(size / 1e6)}
    return {**told, "brought": source is not None}


def step_engines(bundle: Path, flavour: Flavour) -> dict[str, Any]:
    """Engines of every graph of a bundle."""
    from ..export.to_engine import BuildOptions, build_plans

    told = {}
    for name in open_bundle(bundle).models():
        model = build_plans(open_bundle(bundle).model(name), BuildOptions(flavour=flavour), _say)
        for graph, spec in model.manifest.graphs.items():
            plan = spec.plans[flavour]
            size = (model.folder / plan.file).stat().st_size
            told[f"{name}/{graph}"] = {"seconds": plan.seconds, "megabytes": round(size / 1e6, 1), "target": plan.target}
    mark_of(bundle, flavour).touch()
    return told


def step_gate(bundle: Path, engine: str, rows: int) -> dict[str, Any]:
    """Every graph in this engine against the official modules.

    Args:
        rows: most rows of a call, without entering a verdict; 0 runs the whole gate, and enters it for TensorRT.
    """
    told: dict[str, Any] = {}
    for name in open_bundle(bundle).models():
        model = open_bundle(bundle).model(name)
        try:
            if rows == 0 and engine in FLAVOURS:
                told |= _gate_plans(model, engine)
            else:
                told |= _gate_rows(model, engine, rows)
        except ImportError as error:
            told[name] = {"passed": None, "why": f"left out: needs {error.name or error}"}
        except WsssError as error:
            told[name] = {"passed": False, "why": error.message}
    return told


def step_tests() -> dict[str, str]:
    """The tests marked ``gpu``."""
    if importlib.util.find_spec("pytest") is None:
        raise LeftOut("needs pytest")
    if not (ROOT / "tests").is_dir():
        raise LeftOut("needs a checkout with its tests")
    asked = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests"]
    run = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    last = (run.stdout.strip().splitlines() or [""])[-1]
    if run.returncode == 5:
        raise LeftOut("no test is marked gpu")
    if run.returncode:
        raise WsssError(f"{run.stdout[-1500:]}\n{run.stderr[-300:]}".strip())
    return {"pytest": last}


def step_latency(bundle: Path, engine: str, ceilings: Mapping[str, Ceiling]) -> dict[str, Any]:
    """Each graph at several batch sizes."""
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
                    device=PLACE,
                    ceiling=ceilings.get(spec.precision),
                    seconds=0.4,
                    open_engine=opener(engine),
                ):
                    rows.append(dataclasses.asdict(row))
            except (WsssError, RuntimeError, ImportError) as error:
                failed[f"{name}/{graph}"] = f"{error}".strip().split("\n")[0]
    if not rows:
        raise WsssError(f"no graph ran: {failed}")
    return {"rows": rows, "failed": failed}


def step_chain(bundle: Path, engine: str, ceilings: Mapping[str, Ceiling], boxes: int) -> dict[str, Any]:
    """The chain end to end; the small models' label maps against FP32 on the CPU."""
    if engine == "eager":
        raise LeftOut("PyTorch measures single graphs here")
    with tempfile.TemporaryDirectory() as folder:
        told = measure_chain(
            bundle,
            Path(folder),
            engine=engine,
            device=PLACE,
            batch=CHAIN_BATCH,
            classes="voc" if boxes else "mini",
            count=SCENES,
            repeat=REPEAT,
            boxes=boxes or None,
            ceiling=ceilings.get("fp16"),
            reference=None if boxes else MINI,
            unverified=True,
        )
    return dataclasses.asdict(told)


# ---- what the steps need ----


def _importable(name: str) -> str:
    try:
        module = importlib.import_module(name)
    except Exception as error:  # whatever a package that does not fit this machine raises
        return f"no: {type(error).__name__}: {error}".split("\n")[0]
    return f"yes {getattr(module, '__version__', '')}".strip()


def _attempt(trt: Any, flavour: Flavour, target: str) -> dict[str, Any]:
    """Builds a half-precision product of 8 rows with 64 x 32 weights, loads it, runs it, compares it with numpy."""
    from ..engines.trt import TrtEngine

    told: dict[str, Any] = {"target": target, "builds": False, "runs": False}
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(8, 64)).astype(np.float16), rng.normal(size=(64, 32)).astype(np.float16)
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "tiny.plan"
        try:
            plan.write_bytes(_tiny_plan(trt, weights, target))
            told["builds"] = True
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
            told["difference"] = float(np.abs(y - x.astype(np.float32) @ weights.astype(np.float32)).max())
            told["runs"] = told["difference"] < 0.1  # half of 64 products of about 1: rounding gives 0.02
        except Exception as error:  # every library says no in its own way, and its words are the result
            told["error"] = f"{type(error).__name__}: {error}"
    return told


def _tiny_plan(trt: Any, weights: np.ndarray, target: str) -> bytes:
    said: list[str] = []

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                said.append(message.split("\n")[0])

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
        raise WsssError(f"the builder refuses a matrix product: {'; '.join(said) or 'no reason given'}")
    return bytes(plan)


def _gate_plans(model: Model, flavour: Flavour) -> dict[str, Any]:
    from ..export.exporting import verify_plans

    graphs = verify_plans(model, flavour, None, _say).manifest.graphs
    return {f"{model.manifest.family}/{graph}": _verdict(spec.plans[flavour].parity) for graph, spec in graphs.items()}


def _gate_rows(model: Model, engine: str, rows: int) -> dict[str, Any]:
    from ..export.exporting import prepare_again
    from ..export.verify import gate

    told: dict[str, Any] = {}
    for make in prepare_again(model.manifest).graphs:
        graph = make().at(model.manifest.precision)
        where = f"{model.manifest.family}/{graph.name}"
        try:
            loaded = opener(engine)(model, graph.name)
            graph = dataclasses.replace(graph, axes=_fewer(graph, loaded, rows))
            told[where] = _verdict(gate(graph, loaded, engine_name=engine, reference_name="official", where=where))
            getattr(loaded, "close", lambda: None)()
        except WsssError as error:
            told[where] = {"passed": False, "why": error.message}
    return told


def _export_mini(name: str, bundle: Path) -> None:
    from ..export.exporting import export_model
    from ..export.family import Options, family

    export_model(family(name), variant="mini", weights="mini", bundle=bundle, options=Options(precision="fp16"), log=_say)


def _trace(exporter: Family, variant: str, bundle: Path) -> None:
    """As `wsss.export.exporting.export_model`, without the gate: on random weights, for timing, it would take the longest."""
    from ..export.exporting import TOKENIZER, WEIGHTS, tool_versions
    from ..export.family import Options
    from ..export.to_onnx import OPSET, WeightFile, export_onnx

    # As in use, but for larger batches where the GPUs that this is run on have room: Grounding-DINO's engine takes 550 MB a
    # photograph, and TensorRT-RTX refused to build it for sixteen within 8 GiB.
    most = AxisRange(1, 4, 8) if exporter.name == "grounding-dino" or variant == "vit_h" else AxisRange(1, 8, 16)
    prepared = exporter.prepare(variant, "random:0", Options(batch=most, precision="fp16"))
    folder = bundle / f".{exporter.name}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    store, graphs = WeightFile(folder / WEIGHTS), {}
    for make in prepared.graphs:
        graph = make().at("fp16")
        path = folder / f"{graph.name}.onnx"
        fp32_nodes = export_onnx(graph, path, store, precision="fp16")
        graphs[graph.name] = dataclasses.replace(graph.spec(path.name, OPSET), precision="fp16", fp32_nodes=fp32_nodes)
        _say(f"{exporter.name}: {graph.name} traced")
    if prepared.tokenizer is not None:
        prepared.tokenizer.save(str(folder / TOKENIZER))
    manifest = Manifest(
        family=exporter.name,
        variant=prepared.variant,
        precision="fp16",
        preprocess=prepared.preprocess,
        graphs=graphs,
        settings=dict(prepared.settings),
        tokenizer=None if prepared.tokenizer is None else TOKENIZER,
        weights=dict(prepared.weights),
        tools=tool_versions(),
        files={path.name: sha256_of(path) for path in sorted(folder.iterdir())},
    )
    write_manifest(folder, manifest)
    shutil.rmtree(bundle / exporter.name, ignore_errors=True)
    folder.rename(bundle / exporter.name)


def _fewer(graph: Graph, loaded: Engine, rows: int) -> dict[str, AxisRange]:
    """The axes of an engine with at most that many rows; all else as wide as it is. 0 changes nothing."""
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
    """The folder of a model among bundles that were brought along."""
    for bundle in brought:
        try:
            model = Bundle(bundle).model(name)
        except BundleError:
            continue
        if model.manifest.variant == variant:
            return model.folder
    return None


def mark_of(bundle: Path, flavour: str) -> Path:
    """A file that is there once the last engine of a bundle is built."""
    return bundle / f".engines-{flavour}"


def opener(engine: str) -> Opener:
    """How a graph is opened: as the runtime does, or in PyTorch with half-precision products."""
    if engine == "eager":
        from .autocast import AutocastEngine

        return lambda model, graph: AutocastEngine(model, graph, PLACE)
    return lambda model, graph: open_graph(model, graph, engine, device=PLACE, unverified=True)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# ---- the command line ----


def _joined(engine: str, ceilings: Mapping[str, Ceiling], boxes: int, folders: Sequence[Path]) -> dict[str, Any]:
    """The chain of models that lie in bundles of their own."""
    with tempfile.TemporaryDirectory() as folder:
        for bundle in folders:
            for name in Bundle(bundle).models():
                (Path(folder) / name).symlink_to((bundle / name).resolve(), target_is_directory=True)
        return step_chain(Path(folder), engine, ceilings, boxes)


def run(kind: str, arguments: Sequence[str], ceilings: Mapping[str, Ceiling]) -> Any:
    """One step by its kind; arguments as typed."""
    paths = [Path(each) for each in arguments]
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
    """What a result says went wrong: graphs that did not run, or did not pass the gate."""
    if not isinstance(result, dict):
        return []
    failed = (
        [f"{name}: {why}" for name, why in result.get("failed", {}).items()] if isinstance(result.get("failed"), dict) else []
    )
    gates = [
        f"{name}: {told.get('why')}" for name, told in result.items() if isinstance(told, dict) and told.get("passed") is False
    ]
    return failed + gates


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the module."""
    parser = argparse.ArgumentParser(prog="python -m wsss.benchmarks.gpu_steps")
    parser.add_argument("kind")
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--record", type=Path)
    told = parser.parse_args(arguments)
    ceilings: dict[str, Ceiling] = {}
    if told.record is not None and told.record.is_file():
        steps = json.loads(told.record.read_text(encoding="utf-8"))["steps"]
        measured = steps.get("ceiling", {}).get("result") or {}
        ceilings = {precision: Ceiling(**best) for precision, best in measured.items()}
    try:
        result = run(told.kind, told.arguments, ceilings)
    except LeftOut as reason:
        result = {LEFT_OUT: f"{reason}"}
    except WsssError as error:
        _say(f"{error.message}")
        raise SystemExit(1) from None
    told.result.write_text(json.dumps(result), encoding="utf-8")
    if wrong := wrong_in(result):
        _say("\n".join(wrong))
        raise SystemExit(1)


if __name__ == "__main__":
    main()
