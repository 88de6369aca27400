"""ONNX graphs to TensorRT engines, by `tensorrt` or `tensorrt_rtx`: one code, the libraries share their API.

Networks are strongly typed: precision is what the graph says, no builder flag changes it. TensorRT builds on the GPU that
will run the engine; TensorRT-RTX builds anywhere, ahead of time, for a set of compute capabilities.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from ..engines.plan import Gpu, find_gpus, reasons_against, tensorrt_module, weights_sha256
from ..errors import BundleError, WsssError
from ..files import write_atomically
from ..spec import AxisRange, Flavour, GraphSpec, Model, PlanSpec, TensorSpec, sha256_of, write_manifest
from .deformable_plugin import PLUGIN, VERSIONS, plugin_called
from .weights import cache_folder

Log = Callable[[str], None]

TILE = {"height": AxisRange(1, 128, 256), "width": AxisRange(1, 512, 1024)}
"""The profile of the fusing graph's pixels. An engine reserves memory for its largest call: the runtime fuses in tiles of
this size, with the same result."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How engines are built."""

    flavour: Flavour
    workspace_mib: int = 8192
    """Most scratch memory a layer of the engine may use."""
    capabilities: tuple[str, ...] = ()
    """TensorRT-RTX: compute capabilities to build for, ``sm89``; empty takes those the library takes by itself."""
    device: int = 0
    """TensorRT: the GPU to build on."""


def build_plans(model: Model, options: BuildOptions, log: Log) -> Model:
    """Builds what is missing or no longer holds, graph by graph, and enters it in the manifest as soon as it is whole.

    Returns:
        The model with its plans.

    Raises:
        WsssError: the library or a GPU is missing, or TensorRT refuses a graph; says which and why.
        KeyboardInterrupt: after the running build was canceled; plans already built stay.
    """
    trt = tensorrt_module(options.flavour)
    gpu = _gpu_for(options)
    for name, spec in model.manifest.graphs.items():
        where = f"{model.manifest.family}: {name}"
        old = spec.plans.get(options.flavour)
        if old is not None and _holds(model, spec, old, gpu, options, trt.__version__):
            log(f"{where}: {options.flavour} engine is up to date")
            continue
        plan = _build(trt, model, spec, options, gpu, where)
        log(f"{where}: {options.flavour} engine built in {plan.seconds:.0f} s, {_size(model.folder / plan.file)}")
        model = with_plan(model, name, plan)
    return model


def with_plan(model: Model, graph: str, plan: PlanSpec) -> Model:
    """The model with ``plan`` entered for a graph, in its manifest on disk too."""
    spec = model.manifest.graphs[graph]
    graphs = {**model.manifest.graphs, graph: replace(spec, plans={**spec.plans, plan.flavour: plan})}
    manifest = replace(model.manifest, graphs=graphs)
    write_manifest(model.folder, manifest)
    return Model(model.folder, manifest)


def profile_of(spec: GraphSpec) -> dict[str, AxisRange]:
    """The range of every free axis in an engine of this graph."""
    return {axis: _within(TILE[axis], range_) if axis in TILE else range_ for axis, range_ in spec.axes.items()}


def _within(inner: AxisRange, outer: AxisRange) -> AxisRange:
    low, high = max(inner.min, outer.min), min(inner.max, outer.max)
    return AxisRange(low, min(max(inner.opt, low), high), high)


def _gpu_for(options: BuildOptions) -> Gpu | None:
    if options.flavour == "trt-rtx":
        return None
    gpus = find_gpus()
    if options.device >= len(gpus):
        raise WsssError(
            f"--engine trt: builds on the GPU that will run the engine; asked for GPU {options.device}, there are {len(gpus)}",
            hint="--engine trt-rtx builds without a GPU",
        )
    return gpus[options.device]


def _holds(model: Model, spec: GraphSpec, plan: PlanSpec, gpu: Gpu | None, options: BuildOptions, version: str) -> bool:
    path = model.folder / plan.file
    same = path.is_file() and sha256_of(path) == plan.sha256 and dict(plan.axes) == profile_of(spec)
    wanted = not options.capabilities or plan.target == " ".join(options.capabilities)
    return same and wanted and not reasons_against(model, spec, plan, gpu, version)


# ---- one build ----


def _build(trt: ModuleType, model: Model, spec: GraphSpec, options: BuildOptions, gpu: Gpu | None, where: str) -> PlanSpec:
    begun = time.monotonic()
    axes = profile_of(spec)
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = _parsed(trt, builder, logger, model.folder / spec.file, options.flavour, where)
    _check_contract(trt, network, spec, where)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    config.clear_flag(trt.BuilderFlag.TF32)  # its 10 bits of mantissa are those of half: FP32 islands would be for nothing
    if options.flavour == "trt-rtx":
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # or TensorRT-RTX cannot be captured in a CUDA graph
    config.add_optimization_profile(_profile(builder, spec, axes))
    target = gpu.name if gpu else _set_capabilities(trt, config, options.capabilities)
    cache = _timing_cache(config, options, gpu, trt.__version__)
    with _cancelled_by_ctrl_c() as canceled:
        config.progress_monitor = _monitor(trt, where, canceled)
        serialized = builder.build_serialized_network(network, config)
    if canceled.is_set():
        raise KeyboardInterrupt
    if serialized is None:
        raise WsssError(
            f"{where}: TensorRT {trt.__version__} cannot build this graph: {'; '.join(logger.errors[-3:]) or 'no reason given'}",
            hint=f"--workspace {2 * options.workspace_mib} (MiB) gives its layers more memory; a smaller --batch needs less",
        )
    if cache is not None:
        _write(cache, config.get_timing_cache().serialize())
    path = model.folder / f"{Path(spec.file).stem}.{options.flavour}.plan"
    _write(path, serialized)
    return PlanSpec(
        file=path.name,
        sha256=sha256_of(path),
        flavour=options.flavour,
        graph_sha256=model.manifest.files[spec.file],
        weights_sha256=weights_sha256(model),
        precision=spec.precision,
        axes=axes,
        builder=trt.__version__,
        target=target,
        driver=gpu.driver if gpu else None,
        seconds=round(time.monotonic() - begun, 1),
    )


def _parsed(trt: ModuleType, builder: Any, logger: Any, path: Path, flavour: Flavour, where: str) -> Any:
    # TensorRT 11 knows no other kind of network and has dropped the flag.
    strongly = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly is None else 1 << int(strongly))
    parser = trt.OnnxParser(network, logger)
    # TensorRT-RTX has no plugins: it takes the function that stands in for one.
    with_plugin = _with_plugin(trt, logger, path, where) if flavour == "trt" else None
    # Either way weights come from the file beside, which may exceed 2 GB.
    if not (parser.parse_from_file(str(path)) if with_plugin is None else parser.parse(with_plugin, str(path))):
        said = [parser.get_error(number).desc().split("\n")[0] for number in range(parser.num_errors)]
        raise WsssError(f"{where}: TensorRT {trt.__version__} cannot read {path.name}: {'; '.join(said + logger.errors[-2:])}")
    return network


def _with_plugin(trt: ModuleType, logger: Any, path: Path, where: str) -> bytes | None:
    """The graph calling the newest version of the plugin that this TensorRT has; None for a graph that calls none."""
    trt.init_libnvinfer_plugins(logger, "")
    registry = trt.get_plugin_registry()
    version = next((each for each in VERSIONS if registry.get_creator(PLUGIN, each, "") is not None), None)
    graph = plugin_called(path, version or VERSIONS[0])
    if graph is not None and version is None:
        raise WsssError(
            f"{where}: TensorRT {trt.__version__} has no plugin {PLUGIN}",
            hint="export with --sampling grid-sample, which needs none",
        )
    return graph


def _check_contract(trt: ModuleType, network: Any, spec: GraphSpec, where: str) -> None:
    """What TensorRT understood must be what the manifest says: names, types, fixed axes."""
    told = {"float32": trt.float32, "float16": trt.float16, "uint8": trt.uint8, "int64": trt.int64, "bool": trt.bool}
    inputs = [network.get_input(number) for number in range(network.num_inputs)]
    outputs = [network.get_output(number) for number in range(network.num_outputs)]
    for specs, found in ((spec.inputs, inputs), (spec.outputs, outputs)):
        tensors = {tensor.name: tensor for tensor in found}
        for each in specs:
            tensor = tensors.get(each.name)
            if tensor is None or tensor.dtype != told[each.dtype] or not _same_shape(each, tuple(tensor.shape)):
                came = "nothing" if tensor is None else f"{tensor.dtype}{tuple(tensor.shape)}"
                raise BundleError(f"{where}: the manifest says {each}, TensorRT read {came}", hint="export the model again")


def _same_shape(spec: TensorSpec, shape: tuple[int, ...]) -> bool:
    return len(shape) == len(spec.shape) and all(
        has in (-1, wants) if isinstance(wants, int) else has == -1 for wants, has in zip(spec.shape, shape, strict=True)
    )


def _profile(builder: Any, spec: GraphSpec, axes: Mapping[str, AxisRange]) -> Any:
    profile = builder.create_optimization_profile()
    for tensor in spec.inputs:
        if any(isinstance(axis, str) for axis in tensor.shape):
            shapes = (
                tuple(axis if isinstance(axis, int) else int(getattr(axes[axis], kind)) for axis in tensor.shape)
                for kind in ("min", "opt", "max")
            )
            profile.set_shape(tensor.name, *shapes)
    return profile


def _set_capabilities(trt: ModuleType, config: Any, capabilities: tuple[str, ...]) -> str:
    """Sets TensorRT-RTX's targets; returns them, as ``sm80 sm86``."""
    known = {name.lower(): value for name, value in trt.ComputeCapability.__members__.items() if name.startswith("SM")}
    if not capabilities:
        # A plan without targets holds portable code that is finished on the GPU itself, from Ampere on.
        return " ".join(name for name in known if name != "sm75")
    if unknown := [each for each in capabilities if each not in known]:
        raise WsssError(
            f"--compute-capability: this TensorRT-RTX builds for {', '.join(known)}, not for {', '.join(unknown)}",
            hint="take the full TensorRT on that GPU: --engine trt",
        )
    config.num_compute_capabilities = len(capabilities)
    for index, name in enumerate(capabilities):
        config.set_compute_capability(known[name], index)
    return " ".join(capabilities)


def _timing_cache(config: Any, options: BuildOptions, gpu: Gpu | None, version: str) -> Path | None:
    """The full TensorRT's memory of measured kernels. With TensorRT-RTX a timing cache makes the builder look for a GPU."""
    if gpu is None:
        return None
    name = "".join(letter if letter.isalnum() else "-" for letter in f"{gpu.name} {gpu.driver} {version}")
    path = cache_folder() / f"timing-{name}.cache"
    config.set_timing_cache(config.create_timing_cache(path.read_bytes() if path.is_file() else b""), ignore_mismatch=False)
    return path


# ---- progress, messages, Ctrl-C ----


def _logger(trt: ModuleType) -> Any:
    """Keeps TensorRT's errors for our own messages, and prints nothing itself."""

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message.split("\n")[0])

    return Logger()


def _monitor(trt: ModuleType, where: str, canceled: threading.Event) -> Any:
    """Says on a terminal how far a build is, and ends it when ``canceled`` is set. Called from TensorRT's threads."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            if sys.stderr.isatty():
                print(
                    f"\r\x1b[K{where}: {phase[:60]} {step + 1}/{self._steps.get(phase, 0)}", end="", file=sys.stderr, flush=True
                )
            return not canceled.is_set()

        def phase_finish(self, phase: str) -> None:
            if self._steps.pop(phase, None) and not self._steps and sys.stderr.isatty():
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    return Monitor()


@contextlib.contextmanager
def _cancelled_by_ctrl_c() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets instead of raising in the middle of TensorRT's code."""
    canceled = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        canceled.set()

    if threading.current_thread() is not threading.main_thread():
        yield canceled
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield canceled
    finally:
        signal.signal(signal.SIGINT, before)


def _write(path: Path, data: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        raise BundleError(
            f"{path}: cannot be written: {error.strerror}", hint="give a --bundle folder you may write to"
        ) from None


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.0f} MB"
