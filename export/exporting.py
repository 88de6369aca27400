"""Export of one model from official weights to a folder of a bundle: trace, store, run the parity gate, publish, verify."""

from __future__ import annotations

import contextlib
import gc
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx_ir as ir
import torch

from .. import __version__
from ..cores import cores
from ..engines.engine import Engine
from ..engines.machine import version_of
from ..engines.openvino import OpenVinoEngine, instructions, version
from ..engines.ort import OrtEngine
from ..engines.plan import checked_plan, find_gpus
from ..errors import BundleError, WeightsError
from ..files import publishing
from ..progress import end_progress, progress_line
from ..spec import Bundle, Flavour, GraphSpec, Manifest, Model, OpenVinoProof, Parity, sha256_of, write_manifest
from . import cost, verify
from .canvases import same_nodes
from .family import Family, Graph, Options, Prepared, family
from .precision.accumulation import long_products
from .precision.bf16 import write_bf16_emulation
from .precision.search import examine_graph
from .to_engine import Log, with_plan
from .to_onnx import OPSET, Fp32Choice, WeightFile, export_onnx, marked, marked_with_accumulation

TOOLS = ("torch", "torchvision", "transformers", "open_clip_torch", "segment-anything", "onnx", "onnxscript", "onnxruntime")
WEIGHTS = "weights.data"
REPORT = ".precision.txt"
"""Ending of the file name of a graph's precision report, after the graph's name."""
TOKENIZER = "tokenizer.json"
REFERENCE = f"official modules in torch {torch.__version__} on the CPU, row by row"
"""What the gate compares with, for its report."""


def export_model(
    family: Family,
    *,
    variant: str,
    weights: str,
    bundle: Path,
    options: Options,
    log: Log,
    gate: bool = True,
    openvino: bool = False,
) -> Manifest:
    """Export one model into ``bundle/<family>``, replacing the previous export; a failure leaves the bundle unchanged.

    Args:
        gate: False leaves out the parity gate, to time graphs that are never used for labels; they get no parity report.
        openvino: also compare OpenVINO's results, and record them with its times; graphs in bf16 are compared only there.

    Raises:
        ParityError: a graph does not compute what its reference computes.
        WeightsError, UsageError: from the family, before anything is written.
        BundleError: the bundle cannot be written.
    """
    prepared = family.prepare(variant, weights, options)
    if (pinned := prepared.weights.get("pinned", "sha256")) != "sha256":
        log(f"{family.name}: the publisher gives no complete sha256 of {weights} (pinned: {pinned}); the manifest records it")
    _announce(family.name, prepared, log, tracing=True, gate=gate)
    with write_errors(bundle), publishing(bundle / family.name, error=BundleError) as folder:
        store = WeightFile(folder / WEIGHTS)
        graphs = {}
        passed, passed_openvino = Passed(), Passed()
        for make in prepared.graphs:
            graph = make().at(options.precision)
            spec = _export_graph(graph, folder, store, options, where=family.name, log=log)
            references = verify.References(graph)
            if gate and not (openvino and options.precision == "bf16"):
                spec = replace(spec, parity=_gate(graph, spec, folder, passed, references, where=family.name, log=log))
            if openvino:
                proof = _prove_in_openvino(graph, spec, folder, passed_openvino, references, where=family.name, log=log)
                spec = replace(spec, openvino={proof.processor: proof})
            graphs[graph.name] = spec
            del graph, references
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


def verify_model(model: Model, weights: str | None, log: Log, *, device: str = "cpu") -> dict[str, Parity]:
    """Run the parity gate again on a model's stored files, in ONNX Runtime.

    Args:
        weights: where the weights are now; None takes the source in the manifest.
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Returns:
        The new parity report of each graph.

    Raises:
        ParityError: a graph no longer passes.
        WeightsError: the weights are missing, or not those of the export.
        WsssError: ONNX Runtime cannot compute on this device.
    """
    prepared = prepare_again(model.manifest, weights)
    _announce(model.manifest.family, prepared, log, tracing=False, gate=device == "cpu", axes=model.manifest.graphs)
    reports = {}
    passed = Passed()
    for make in prepared.graphs:
        graph = make().at(model.manifest.precision)
        spec = model.graph(graph.name)
        graph = graph.as_exported(spec)
        reports[graph.name] = _gate(graph, spec, model.folder, passed, where=model.manifest.family, log=log, device=device)
        del graph
        gc.collect()
    return reports


def verify_plans(model: Model, flavour: Flavour, weights: str | None, log: Log, *, device: int = 0) -> dict[str, Parity]:
    """Run the parity gate on the TensorRT engines of a model, on a GPU, and record each report in the manifest.

    Returns:
        The reports by graph.

    Raises:
        ParityError: an engine does not compute what its reference computes; its previous report is removed.
        BundleError: an engine may not run here. WsssError: no GPU, or its library is missing.
    """
    prepared = prepare_again(model.manifest, weights)
    gpu = find_gpus()[device]
    reports: dict[str, Parity] = {}
    for make in prepared.graphs:
        graph = make().at(model.manifest.precision)
        path, spec = checked_plan(model, graph.name, flavour, gpu, unverified=True)
        built = model.graph(graph.name).plan_for(flavour, gpu.name)
        assert built is not None
        plan = replace(built, parity=None, driver=built.driver and gpu.driver)
        model = with_plan(model, graph.name, plan)
        from ..engines.trt import TrtEngine

        begun = time.monotonic()
        parity = verify.gate(
            replace(graph.as_exported(model.graph(graph.name)), axes=dict(plan.axes)),
            TrtEngine(path, spec, flavour=flavour, device=gpu.index),
            engine_name=f"{flavour} {plan.builder} on {gpu.name}",
            reference_name=REFERENCE,
            where=f"{model.manifest.family} {graph.name} ({flavour})",
            progress=partial(_show, f"{model.manifest.family}: {graph.name} ({flavour})", begun),
        )
        model = with_plan(model, graph.name, replace(plan, parity=parity))
        reports[graph.name] = parity
        log(f"{model.manifest.family}: {graph.name} {flavour} engine agrees {_errors_and_time(parity, graph, begun)}")
        del graph
        gc.collect()
    return reports


def verify_openvino(model: Model, weights: str | None, log: Log) -> dict[str, Parity]:
    """Run the parity gate on a model's graphs in OpenVINO, and record each report, and the time, in the manifest.

    Returns:
        The reports by graph.

    Raises:
        ParityError: OpenVINO does not compute what a graph's reference computes; its previous report is removed.
        WsssError: OpenVINO is missing.
    """
    prepared = prepare_again(model.manifest, weights)
    _announce(model.manifest.family, prepared, log, tracing=False, gate=True, axes=model.manifest.graphs)
    reports: dict[str, Parity] = {}
    passed = Passed()
    for make in prepared.graphs:
        graph = make().at(model.manifest.precision)
        spec = model.graph(graph.name)
        others = {processor: proof for processor, proof in spec.openvino.items() if processor != instructions()}
        model = _with_proofs(model, graph.name, others)
        graph = graph.as_exported(spec)
        proof = _prove_in_openvino(graph, spec, model.folder, passed, where=model.manifest.family, log=log)
        model = _with_proofs(model, graph.name, {**others, proof.processor: proof})
        reports[graph.name] = proof.parity
        del graph
        gc.collect()
    return reports


def _prove_in_openvino(
    graph: Graph,
    spec: GraphSpec,
    folder: Path,
    passed: Passed,
    references: verify.References | None = None,
    *,
    where: str,
    log: Log,
) -> OpenVinoProof:
    begun = time.monotonic()
    engine, largest = OpenVinoEngine(folder / spec.file, spec), passed.largest(graph, folder / spec.file)
    parity = verify.gate(
        graph,
        engine,
        engine_name=f"OpenVINO {version()} on a CPU with {instructions()}",
        reference_name=REFERENCE,
        where=f"{where} {graph.name} (openvino)",
        progress=partial(_show, f"{where}: {graph.name} (openvino)", begun),
        references=references,
        largest=largest,
    )
    passed.add(graph, folder / spec.file)
    proof = OpenVinoProof(version=version(), processor=instructions(), parity=parity)
    agrees, faster = _errors_and_time(parity, graph, begun), ""
    if largest is None and spec.precision != "bf16":  # of canvases with one trace, the first is timed
        seconds, ort_seconds = _alternating(graph, engine, OrtEngine(folder / spec.file, spec))
        proof = replace(proof, seconds=seconds, ort_seconds=ort_seconds)
        faster = f"; {ort_seconds / seconds:.1f} times as fast as ONNX Runtime"
    log(f"{where}: {graph.name} in OpenVINO agrees with its reference {agrees}{faster}")
    return proof


def _with_proofs(model: Model, graph: str, proofs: Mapping[str, OpenVinoProof]) -> Model:
    """Record the proofs of a graph, in the manifest on disk too, and return the changed model."""
    graphs = {**model.manifest.graphs, graph: replace(model.graph(graph), openvino=dict(proofs))}
    manifest = replace(model.manifest, graphs=graphs)
    write_manifest(model.folder, manifest)
    return Model(model.folder, manifest)


def _alternating(graph: Graph, *engines: Engine) -> list[float]:
    """Seconds of a call of each engine, with as many rows as the processor has cores: the best of two, or one long call."""
    rows = graph.axes[graph.row_axis]
    feeds = graph.sample(min(max(cores(), rows.min), rows.max), verify.SEED)
    best = [float("inf")] * len(engines)
    for _ in range(2):
        for place, engine in enumerate(engines):
            begun = time.perf_counter()
            engine(feeds)
            best[place] = min(best[place], time.perf_counter() - begun)
        if sum(best) > 2:
            break
    return best


def standing_model(bundle: Path, name: str, *, variant: str | None, weights: str | None, options: Options) -> Model | None:
    """The bundle's model if an export with these flags would produce the same and its files are intact; None otherwise.

    Flags that are None or empty were not given and match any value.
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
        options.measured or options.fp32_accumulation == any(graph.fp32_accumulation for graph in manifest.graphs.values()),
        options.batch is None or options.batch in batches,
        not options.sizes or set(options.sizes) == set(manifest.preprocess.canvases),
        options.sampling in (None, manifest.settings.get("sampling", "grid-sample")),
    )
    return model if all(agrees) else None


def prepare_again(manifest: Manifest, weights: str | None = None) -> Prepared:
    """Load the official model that an export was made from. Raises WeightsError when its weights are missing or changed."""
    prepare = family(manifest.family).prepare
    source = weights or manifest.weights["source"]
    resizes = any(name.startswith("resize-") for name in manifest.graphs)
    options = Options(precision=manifest.precision, for_cpu=not resizes)
    prepared = prepare(manifest.variant, source, options)
    if prepared.preprocess.canvases != manifest.preprocess.canvases:
        prepared = prepare(manifest.variant, source, replace(options, sizes=manifest.preprocess.canvases))
    expected, got = manifest.weights["sha256"], prepared.weights["sha256"]
    if got != expected:
        raise WeightsError(
            f"{source}: has sha256 {got[:12]}..., {manifest.family} was exported from {expected[:12]}...",
            hint="give the weights it was exported from with --weights, or export it again",
        )
    return prepared


def _announce(
    model: str,
    prepared: Prepared,
    log: Log,
    *,
    tracing: bool,
    gate: bool,
    axes: Mapping[str, GraphSpec] | None = None,
) -> None:
    """Say how long the work takes and what memory it needs. Raises WsssError when there is clearly not enough."""
    if not gate or model not in cost.RULES or prepared.variant == "mini":
        return
    estimates = []
    traced = set[int]()
    for make in prepared.graphs:
        graph = make()
        if axes is not None:
            graph = replace(graph, axes=axes[graph.name].axes)
        shared = id(graph.template.shared) if graph.template else 0
        again = shared in traced
        estimates.append(cost.estimate(model, graph, tracing=tracing and not again, largest=2 if again else None))
        traced |= {shared} - {0}
    cost.announce(model, estimates, log)


def tool_versions() -> dict[str, str]:
    """Versions of wsss and of the packages of `TOOLS` that are installed."""
    return {"wsss": __version__} | {name: version for name in TOOLS if (version := version_of(name))}


def _export_graph(graph: Graph, folder: Path, store: WeightFile, options: Options, *, where: str, log: Log) -> GraphSpec:
    path, precision = folder / f"{graph.name}.onnx", options.precision
    begun = time.monotonic()
    choose = marked_with_accumulation if options.fp32_accumulation else marked
    if options.measured and graph.half:
        choose = partial(_measured, path.with_name(f"{graph.name}{REPORT}"), options.fp32_accumulation, log)
    reasons, accumulation = export_onnx(graph, path, store, precision=precision, choose=choose)
    log(f"{where}: {graph.name} traced in {time.monotonic() - begun:.0f} s")
    gc.collect()  # the traced program holds a copy of the weights
    spec = graph.spec(path.name, OPSET)
    return replace(spec, precision=precision, fp32_nodes=reasons, fp32_accumulation=accumulation)


def _measured(report: Path, accumulation: bool, log: Log, model: ir.Model, graph: Graph) -> Fp32Choice:
    """What the precision search keeps in FP32, and with ``accumulation`` that of all long products; its report is written beside
    the graph."""
    diagnosis = examine_graph(graph, model, log=log)
    text = f"{graph.name}: {diagnosis.report()}\n"
    report.write_text(text, encoding="utf-8")
    log(text.splitlines()[0])
    return Fp32Choice(diagnosis.reasons, long_products(model) if accumulation else diagnosis.fp32_accumulation)


@contextlib.contextmanager
def write_errors(bundle: Path) -> Iterator[None]:
    """Turn an OSError into a BundleError that names the bundle."""
    try:
        yield
    except OSError as error:
        raise BundleError(
            f"{bundle}: cannot be written: {error.strerror or error}", hint="give another --bundle folder"
        ) from None


class Passed:
    """The graphs that passed the gate, of those that share a trace with others.

    The graphs of a second and of further canvases have the nodes of the first, which passed at its largest batch: how rows are
    kept apart is proven, except for wrong numbers in shapes, which show in two rows. They pass at batch 1 and 2.
    """

    def __init__(self) -> None:
        self._files: dict[int, Path] = {}

    def largest(self, graph: Graph, path: Path) -> int | None:
        """The largest batch that has something to prove about the graph in a file; None for that of the graph."""
        first = self._files.get(id(graph.template.shared)) if graph.template else None
        return 2 if first is not None and same_nodes(first, path) else None

    def add(self, graph: Graph, path: Path) -> None:
        """Record that the graph in a file passed."""
        if graph.template:
            self._files.setdefault(id(graph.template.shared), path)


def _gate(
    graph: Graph,
    spec: GraphSpec,
    folder: Path,
    passed: Passed,
    references: verify.References | None = None,
    *,
    where: str,
    log: Log,
    device: str = "cpu",
) -> Parity:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="wsss-gate-") as scratch:
        # ONNX Runtime has no bfloat16 kernels for most operators.
        path = write_bf16_emulation(folder / spec.file, Path(scratch)) if spec.precision == "bf16" else folder / spec.file
        how = ", bfloat16 rounded in float32" if spec.precision == "bf16" else ""
        place = "the CPU" if device == "cpu" else device
        parity = verify.gate(
            graph,
            OrtEngine(path, spec, device=device),
            engine_name=f"onnxruntime {version_of('onnxruntime') or version_of('onnxruntime-gpu')} on {place}{how}",
            reference_name=REFERENCE,
            where=f"{where} {graph.name}",
            progress=partial(_show, f"{where}: {graph.name}", begun),
            references=references,
            largest=passed.largest(graph, folder / spec.file) if device == "cpu" else None,  # GPUs' kernels depend on shapes
        )
    passed.add(graph, folder / spec.file)
    log(f"{where}: {graph.name} agrees with its reference {_errors_and_time(parity, graph, begun)}")
    return parity


def _show(where: str, begun: float, done: int, of: int) -> None:
    """Show how far a comparison is, and the time left, which assumes that the rest is as slow."""
    left = (time.monotonic() - begun) * (of - done) / done
    progress_line(f"{where}: {done / of:.0%} compared, {left:.0f} s left")
    if done == of:
        end_progress()


def _errors_and_time(parity: Parity, graph: Graph, begun: float) -> str:
    errors = ", ".join(f"{name} {parity.worst(name).error:.1e}" for name in graph.tolerance)
    return f"({errors}), {time.monotonic() - begun:.0f} s"
