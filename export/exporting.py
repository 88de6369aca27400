"""One model from official weights to a proven folder of a bundle: trace, store, gate, publish; and the proof again later."""

from __future__ import annotations

import contextlib
import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path

import onnx_ir as ir
import torch

from .. import __version__
from ..engines.ort import OrtEngine
from ..engines.plan import checked_plan, find_gpus
from ..errors import BundleError, WeightsError
from ..files import publishing
from ..spec import Bundle, Flavour, GraphSpec, Manifest, Model, Parity, sha256_of, write_manifest
from . import verify
from .family import Family, Graph, Options, Prepared, family
from .precision.bf16 import write_bf16_emulation
from .precision.search import examine_graph
from .to_engine import with_plan
from .to_onnx import OPSET, WeightFile, export_onnx, marked

Log = Callable[[str], None]
"""Takes one line of progress."""

TOOLS = ("torch", "torchvision", "transformers", "open_clip_torch", "segment-anything", "onnx", "onnxscript", "onnxruntime")
WEIGHTS = "weights.data"
REPORT = ".precision.txt"
"""What a graph's precision report is called after the graph's name."""
TOKENIZER = "tokenizer.json"


def export_model(family: Family, *, variant: str, weights: str, bundle: Path, options: Options, log: Log) -> Manifest:
    """Exports one model into ``bundle/<family>``, replacing what was there; a failure leaves everything as it was.

    Raises:
        ParityError: a graph does not compute what its reference computes.
        WeightsError, UsageError: from the family, before anything is written.
        BundleError: the bundle cannot be written.
    """
    prepared = family.prepare(variant, weights, options)
    if (pinned := prepared.weights.get("pinned", "sha256")) != "sha256":
        log(f"{family.name}: nothing says what {weights} must hold (pinned: {pinned}); its sha256 is in the manifest from now on")
    with written(bundle), publishing(bundle / family.name, error=BundleError) as folder:
        store = WeightFile(folder / WEIGHTS)
        graphs = {}
        for make in prepared.graphs:
            graph = make()
            graphs[graph.name] = _export_graph(graph, folder, store, options, where=family.name, log=log)
            del graph
            gc.collect()
        if prepared.tokenizer is not None:
            prepared.tokenizer.save(str(folder / TOKENIZER))
        manifest = Manifest(
            family=family.name,
            variant=prepared.variant,
            precision=options.precision,
            preprocess=prepared.preprocess,
            graphs=graphs,
            settings=dict(prepared.settings),
            tokenizer=None if prepared.tokenizer is None else TOKENIZER,
            weights=dict(prepared.weights),
            tools=tool_versions(),
            files={path.name: sha256_of(path) for path in sorted(folder.iterdir())},
        )
        write_manifest(folder, manifest)
    return manifest


def verify_model(model: Model, weights: str | None, log: Log) -> dict[str, Parity]:
    """Runs the parity gate again on a model's stored files.

    Args:
        weights: where the weights are now; None looks where the manifest says they were.

    Returns:
        The new verdict on each graph.

    Raises:
        ParityError: a graph no longer passes.
        WeightsError: the weights are gone, or others than it was exported from.
    """
    prepared = prepare_again(model.manifest, weights)
    verdicts = {}
    for make in prepared.graphs:
        graph = make().at(model.manifest.precision)
        spec = model.graph(graph.name)
        verdicts[graph.name] = _gate(replace(graph, axes=spec.axes), spec, model.folder, where=model.manifest.family, log=log)
        del graph
        gc.collect()
    return verdicts


def verify_plans(model: Model, flavour: Flavour, weights: str | None, log: Log, *, device: int = 0) -> Model:
    """Runs the parity gate on the TensorRT engines of a model, on a GPU, and enters each verdict in the manifest.

    Returns:
        The model with the verdicts.

    Raises:
        ParityError: an engine does not compute what its reference computes; it loses the verdict it had.
        BundleError: an engine that may not run here. WsssError: no GPU, or its library is missing.
    """
    prepared = prepare_again(model.manifest, weights)
    gpu = find_gpus()[device]
    for make in prepared.graphs:
        graph = make().at(model.manifest.precision)
        path, spec = checked_plan(model, graph.name, flavour, gpu, unverified=True)
        plan = replace(model.graph(graph.name).plans[flavour], parity=None)
        model = with_plan(model, graph.name, plan)
        from ..engines.trt import TrtEngine

        begun = time.monotonic()
        parity = verify.gate(
            replace(graph, axes=dict(plan.axes)),
            TrtEngine(path, spec, flavour=flavour, device=gpu.index),
            engine_name=f"{flavour} {plan.builder} on {gpu.name}",
            reference_name=f"official modules in torch {torch.__version__} on the CPU, row by row",
            where=f"{model.manifest.family} {graph.name} ({flavour})",
        )
        model = with_plan(model, graph.name, replace(plan, parity=parity))
        errors = ", ".join(f"{name} {parity.worst(name).error:.1e}" for name in graph.tolerance)
        log(f"{model.manifest.family}: {graph.name} {flavour} engine agrees ({errors}), {time.monotonic() - begun:.0f} s")
        del graph
        gc.collect()
    return model


def standing_model(bundle: Path, name: str, *, variant: str | None, weights: str | None, options: Options) -> Model | None:
    """The model that an export with these flags would make again, when the bundle holds it whole; None otherwise.

    What is None or empty was not typed, and agrees with whatever stands there.
    """
    try:
        model = Bundle(bundle).model(name)
    except BundleError:
        return None
    manifest = model.manifest
    batches = [graph.axes[axis] for graph in manifest.graphs.values() for axis in ("batch", "phrases") if axis in graph.axes]
    agrees = (
        variant in (None, manifest.variant),
        weights in (None, manifest.weights["source"]),
        options.precision == manifest.precision,
        options.measured == any(file.endswith(REPORT) for file in manifest.files),
        options.batch is None or options.batch in batches,
        not options.sizes or set(options.sizes) == set(manifest.preprocess.canvases),
        options.sampling in (None, manifest.settings.get("sampling", "grid-sample")),
    )
    return model if all(agrees) else None


def prepare_again(manifest: Manifest, weights: str | None = None) -> Prepared:
    """The official model an export was made from. Raises WeightsError when its weights are gone or changed."""
    prepare = family(manifest.family).prepare
    source = weights or manifest.weights["source"]
    prepared = prepare(manifest.variant, source, Options())
    if prepared.preprocess.canvases != manifest.preprocess.canvases:
        prepared = prepare(manifest.variant, source, Options(sizes=manifest.preprocess.canvases))
    expected, got = manifest.weights["sha256"], prepared.weights["sha256"]
    if got != expected:
        raise WeightsError(
            f"{source}: has sha256 {got[:12]}..., {manifest.family} was exported from {expected[:12]}...",
            hint="give the weights it was exported from with --weights, or export it again",
        )
    return prepared


def tool_versions() -> dict[str, str]:
    """Versions of whatever of `TOOLS` is installed, and of wsss."""
    found = {"wsss": __version__}
    for name in TOOLS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _export_graph(graph: Graph, folder: Path, store: WeightFile, options: Options, *, where: str, log: Log) -> GraphSpec:
    path, precision = folder / f"{graph.name}.onnx", options.precision
    begun = time.monotonic()
    graph = graph.at(precision)
    choose = partial(_measured, path.with_name(f"{graph.name}{REPORT}"), log) if options.measured and graph.half else marked
    islands = export_onnx(graph, path, store, precision=precision, choose=choose)
    log(f"{where}: {graph.name} traced in {time.monotonic() - begun:.0f} s")
    gc.collect()  # the traced program holds a copy of the weights
    spec = replace(graph.spec(path.name, OPSET), precision=precision, islands=islands)
    return replace(spec, parity=_gate(graph, spec, folder, where=where, log=log))


def _measured(report: Path, log: Log, model: ir.Model, graph: Graph) -> Mapping[str, str]:
    """What the precision doctor keeps in FP32; its report goes beside the graph."""
    found = examine_graph(graph, model, log=log)
    report.write_text(f"{graph.name}: {found.report()}\n", encoding="utf-8")
    log(f"{graph.name}: {found.report().splitlines()[0]}")
    return found.reasons


@contextlib.contextmanager
def written(bundle: Path) -> Iterator[None]:
    """Turn a disk that cannot be written into a BundleError."""
    try:
        yield
    except OSError as error:
        raise BundleError(
            f"{bundle}: cannot be written: {error.strerror or error}", hint="give another --bundle folder"
        ) from None


def _gate(graph: Graph, spec: GraphSpec, folder: Path, *, where: str, log: Log) -> Parity:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="wsss-gate-") as scratch:
        # ONNX Runtime's CPU computes nothing in bfloat16.
        path = write_bf16_emulation(folder / spec.file, Path(scratch)) if spec.precision == "bf16" else folder / spec.file
        how = ", bfloat16 rounded in float32" if spec.precision == "bf16" else ""
        parity = verify.gate(
            graph,
            OrtEngine(path, spec),
            engine_name=f"onnxruntime {metadata.version('onnxruntime')} on the CPU{how}",
            reference_name=f"official modules in torch {torch.__version__} on the CPU, row by row",
            where=f"{where} {graph.name}",
        )
    errors = ", ".join(f"{name} {parity.worst(name).error:.1e}" for name in graph.tolerance)
    log(f"{where}: {graph.name} agrees with its reference ({errors}), {time.monotonic() - begun:.0f} s")
    return parity
