"""ONNX graphs to TensorRT engines, with `tensorrt` or `tensorrt_rtx`, which share their API.

Networks are strongly typed: the graph sets the precision, and no builder flag changes it. TensorRT builds on the GPU that
will run the engine; TensorRT-RTX builds ahead of time on any machine, for a set of compute capabilities.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, TypeVar

from ..engines.plan import Gpu, find_gpus, reasons_against, tensorrt_module, weights_sha256
from ..errors import BundleError, WsssError
from ..files import cache_folder, write_atomically
from ..progress import progress_line
from ..spec import AMPERE_OR_NEWER, AxisRange, Flavour, GraphSpec, Model, PlanSpec, TensorSpec, sha256_of, write_manifest
from .deformable_plugin import PLUGIN, VERSIONS, plugin_called

FUSED, ALONE = "fused attention", "softmax alone"
"""Kinds of compiled layers: an attention in one kernel, and a softmax that is a kernel of its own."""
T = TypeVar("T")
Log = Callable[[str], None]
"""Called with one line of progress."""

TILE = {"height": AxisRange(1, 128, 256), "width": AxisRange(1, 512, 1024)}
"""The fusing graph's range of pixels in an engine, which reserves memory for its largest call: the runtime fuses in tiles of
this size, with the same result."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Settings of an engine build."""

    flavour: Flavour
    workspace_mib: int = 8192
    """Most scratch memory that a layer of the engine may use."""
    capabilities: tuple[str, ...] = ()
    """TensorRT-RTX: compute capabilities to build for, ``sm89``; empty takes the library's default."""
    device: int = 0
    """TensorRT: the GPU to build on."""
    optimization_level: int | None = None
    """0 (fast build) to 5 (fast engine); None takes the library's default."""
    hardware_compatible: bool = False
    """TensorRT: the engine runs on all GPUs from Ampere on, slower than one for a single GPU."""


def build_plans(model: Model, options: BuildOptions, log: Log) -> Model:
    """Build the engines that are missing or out of date, and record each in the manifest as soon as it is complete.

    Returns:
        The model with its plans.

    Raises:
        WsssError: the library or a GPU is missing, or TensorRT rejects a graph; says which and why.
        KeyboardInterrupt: the running build was canceled; plans built before stay.
    """
    trt = tensorrt_module(options.flavour)
    gpu = _gpu_for(options)
    target = "" if gpu is None else AMPERE_OR_NEWER if options.hardware_compatible else gpu.name
    for name, spec in model.manifest.graphs.items():
        where = f"{model.manifest.family}: {name}"
        old = spec.plan_for(options.flavour, target)
        if old is not None and target in ("", old.target) and _is_current(model, spec, old, gpu, options, trt.__version__):
            log(f"{where}: {options.flavour} engine is up to date")
            continue
        plan = _leaving_on_ctrl_c(partial(_build, trt, model, spec, options, gpu, where, log))
        fused = ""
        if plan.fused_attentions or plan.softmaxes_alone:
            fused = f"; {plan.fused_attentions} attentions fused, {plan.softmaxes_alone} softmaxes alone"
        size = _size(model.folder / plan.file)
        log(f"{where}: {options.flavour} engine built in {plan.seconds:.0f} s, {size}{_memory()}{fused}")
        model = with_plan(model, name, plan)
    return model


def with_plan(model: Model, graph: str, plan: PlanSpec) -> Model:
    """Record ``plan`` for a graph, in the manifest on disk too, and return the changed model."""
    spec = model.manifest.graphs[graph]
    others = {key: other for key, other in spec.plans.items() if other.key != plan.key}
    graphs = {**model.manifest.graphs, graph: replace(spec, plans={**others, plan.key: plan})}
    manifest = replace(model.manifest, graphs=graphs)
    write_manifest(model.folder, manifest)
    return Model(model.folder, manifest)


def profile_of(spec: GraphSpec) -> dict[str, AxisRange]:
    """The optimization profile of a graph: the range of every free axis in its engine."""
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


def _is_current(model: Model, spec: GraphSpec, plan: PlanSpec, gpu: Gpu | None, options: BuildOptions, version: str) -> bool:
    path = model.folder / plan.file
    same = path.is_file() and sha256_of(path) == plan.sha256 and dict(plan.axes) == profile_of(spec)
    same_target = not options.capabilities or plan.target == " ".join(options.capabilities)
    return same and same_target and not reasons_against(model, spec, plan, gpu, version)


# ---- one build ----


def _build(
    trt: ModuleType,
    model: Model,
    spec: GraphSpec,
    options: BuildOptions,
    gpu: Gpu | None,
    where: str,
    log: Log,
    canceled: threading.Event,
) -> PlanSpec:
    begun = time.monotonic()
    axes = profile_of(spec)
    if gpu is not None:
        _use(gpu)
    logger = build_logger(trt)
    builder = trt.Builder(logger)
    network = _parsed(trt, builder, logger, model.folder / spec.file, options.flavour, where)
    _check_contract(trt, network, spec, where)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    config.clear_flag(trt.BuilderFlag.TF32)  # its mantissa has the 10 bits of half, which would undo the nodes kept in FP32
    if options.flavour == "trt-rtx":
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # required for capturing TensorRT-RTX in a CUDA graph
    if hasattr(trt, "PreviewFeature") and hasattr(trt.PreviewFeature, "RUNTIME_ACTIVATION_RESIZE_10_10"):
        # Otherwise an engine asks for the activation memory of its largest shapes at every call (`engines.arena`).
        config.set_preview_feature(trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the log of TensorRT-RTX then ends in the compiled layers
    config.add_optimization_profile(_profile(builder, spec, axes))
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    target = gpu.name if gpu else _set_capabilities(trt, config, options.capabilities)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        target = AMPERE_OR_NEWER
    cache = _timing_cache(config, gpu, trt.__version__)
    config.progress_monitor = _monitor(trt, where, canceled, begun)
    serialized = builder.build_serialized_network(network, config)
    if canceled.is_set():
        raise KeyboardInterrupt
    if serialized is None:
        raise WsssError(
            f"{where}: TensorRT {trt.__version__} cannot build this graph: {'; '.join(logger.errors[-3:]) or 'no reason given'}",
            hint=f"--workspace {2 * options.workspace_mib} (MiB) gives its layers more memory; a smaller --batch needs less",
        )
    kinds = [kind_of(layer) for layer in logger.layers]
    on = f"-{_slug(target)}" if gpu else ""
    path = model.folder / f"{Path(spec.file).stem}.{options.flavour}{on}.plan"
    _write(path, serialized)
    if cache is not None:
        try:
            _write(cache, config.get_timing_cache().serialize())
        except BundleError as error:
            log(f"warning: the next build takes as long: {error.message}")
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
        fused_attentions=kinds.count(FUSED) if kinds else None,
        softmaxes_alone=kinds.count(ALONE) if kinds else None,
    )


def _parsed(trt: ModuleType, builder: Any, logger: Any, path: Path, flavour: Flavour, where: str) -> Any:
    # In TensorRT 11 all networks are strongly typed, and the flag is gone.
    strongly = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly is None else 1 << int(strongly))
    parser = trt.OnnxParser(network, logger)
    # TensorRT-RTX has no plugins: it computes the function that replaces the plugin.
    with_plugin = _with_plugin(trt, logger, path, where) if flavour == "trt" else None
    # In both cases weights are read from the separate file, which may exceed 2 GB.
    if not (parser.parse_from_file(str(path)) if with_plugin is None else parser.parse(with_plugin, str(path))):
        errors = [parser.get_error(number).desc().split("\n")[0] for number in range(parser.num_errors)]
        raise WsssError(f"{where}: TensorRT {trt.__version__} cannot read {path.name}: {'; '.join(errors + logger.errors[-2:])}")
    return network


def _with_plugin(trt: ModuleType, logger: Any, path: Path, where: str) -> bytes | None:
    """The graph with calls of the newest plugin version that this TensorRT has; None for a graph without such calls."""
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
    """Raise BundleError unless the parsed network has the names, types and fixed axes of the manifest."""
    dtypes = {"float32": trt.float32, "float16": trt.float16, "uint8": trt.uint8, "int64": trt.int64, "bool": trt.bool}
    inputs = [network.get_input(number) for number in range(network.num_inputs)]
    outputs = [network.get_output(number) for number in range(network.num_outputs)]
    for specs, found in ((spec.inputs, inputs), (spec.outputs, outputs)):
        tensors = {tensor.name: tensor for tensor in found}
        for each in specs:
            tensor = tensors.get(each.name)
            if tensor is None or tensor.dtype != dtypes[each.dtype] or not _same_shape(each, tuple(tensor.shape)):
                got = "nothing" if tensor is None else f"{tensor.dtype}{tuple(tensor.shape)}"
                raise BundleError(f"{where}: the manifest says {each}, TensorRT read {got}", hint="export the model again")


def _same_shape(spec: TensorSpec, shape: tuple[int, ...]) -> bool:
    return len(shape) == len(spec.shape) and all(
        length in (-1, axis) if isinstance(axis, int) else length == -1 for axis, length in zip(spec.shape, shape, strict=True)
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
    """Set TensorRT-RTX's targets and return them, as ``sm80 sm86``."""
    known = {name.lower(): value for name, value in trt.ComputeCapability.__members__.items() if name.startswith("SM")}
    if not capabilities:
        # A plan without targets holds portable code, which is compiled on the GPU that runs it, from Ampere on.
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


def _use(gpu: Gpu) -> None:
    """Make ``gpu`` the device of this thread: TensorRT builds for the device that is current."""
    from cuda.bindings import runtime

    (status,) = runtime.cudaSetDevice(gpu.index)
    if status != runtime.cudaError_t.cudaSuccess:
        raise WsssError(f"GPU {gpu.index} ({gpu.name}) cannot be used: {status.name}", hint="nvidia-smi shows its state")


def _timing_cache(config: Any, gpu: Gpu | None, version: str) -> Path | None:
    """Load the full TensorRT's timing cache and return its path; None for TensorRT-RTX, which would need a GPU for it."""
    if gpu is None:
        return None
    path = cache_folder() / f"timing-{_slug(f'{gpu.name} {gpu.driver} {version}')}.cache"
    config.set_timing_cache(config.create_timing_cache(path.read_bytes() if path.is_file() else b""), ignore_mismatch=False)
    return path


# ---- progress, messages, Ctrl-C ----


def build_logger(trt: ModuleType) -> Any:
    """A TensorRT logger that prints nothing.

    It collects ``errors``, and in ``layers`` the lines in which TensorRT-RTX lists the compiled layers with their tensors, at the
    end of a build with detailed verbosity.
    """

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.layers: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message.split("\n")[0])
            elif "LayerType" in message:
                self.layers += re.findall(r"^Name: .*LayerType.*$", message, re.MULTILINE)

    return Logger()


def kind_of(layer: str) -> str:
    """The kind of a compiled layer, from its line: `FUSED`, `ALONE`, or TensorRT's own word."""
    match = re.match(r"Name: ([^,]+), LayerType: (\w+)", layer)
    name, kind = match.groups() if match else ("", "unknown")
    return FUSED if "mha" in name else ALONE if "SubExp" in name else kind


def _monitor(trt: ModuleType, where: str, canceled: threading.Event, begun: float) -> Any:
    """A progress monitor that prints to a terminal and ends the build when ``canceled`` is set. Called by TensorRT's threads."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            seconds = time.monotonic() - begun
            progress_line(f"{where}: {phase[:60]} {step + 1}/{self._steps.get(phase, 0)}, {seconds:.0f} s{_memory()}")
            return not canceled.is_set()

        def phase_finish(self, phase: str) -> None:
            if self._steps.pop(phase, None) and not self._steps:
                progress_line("")

    return Monitor()


def _leaving_on_ctrl_c(build: Callable[[threading.Event], T]) -> T:
    """Call ``build`` in another thread, so that this one hears Ctrl-C while TensorRT computes.

    The first Ctrl-C sets the event, on which the build ends at its next step; the second ends the process.

    Raises:
        KeyboardInterrupt: the build was canceled.
    """
    if threading.current_thread() is not threading.main_thread():
        return build(threading.Event())
    canceled = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if canceled.is_set():
            os._exit(130)  # files are written whole or not at all
        canceled.set()
        progress_line("ending the build at its next step; press Ctrl-C again to stop now")

    before = signal.signal(signal.SIGINT, note)
    try:
        with ThreadPoolExecutor(1) as thread:
            result = thread.submit(build, canceled)
            while not result.done():
                wait([result], timeout=0.2)
            return result.result()
    finally:
        signal.signal(signal.SIGINT, before)


def _memory() -> str:
    """This process's memory as the end of a line; empty where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError):
        return ""
    return f", {pages * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB of memory"


def _write(path: Path, data: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        raise BundleError(
            f"{path}: cannot be written: {error.strerror}", hint="give a --bundle folder you may write to"
        ) from None


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.0f} MB"
