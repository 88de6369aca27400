"""Checks whether a TensorRT engine may run: graph, weights, library, GPU and driver match, and the parity gate has passed.

A plan is native code for one library version and one GPU or a set of GPUs. It is checked before TensorRT reads any of it.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from types import ModuleType

from ..errors import BundleError, WsssError
from ..extras import install_line
from ..spec import AMPERE_OR_NEWER, Flavour, GraphSpec, Model, PlanSpec, check_file

MODULES: dict[Flavour, str] = {"trt": "tensorrt", "trt-rtx": "tensorrt_rtx"}


@dataclass(frozen=True, slots=True)
class Gpu:
    """A CUDA device of this machine."""

    index: int
    name: str
    capability: str
    """Compute capability, for example ``8.9``."""
    driver: str
    """Newest CUDA version that the driver supports, for example ``13.0``."""
    memory_bytes: int


def find_gpus() -> tuple[Gpu, ...]:
    """The CUDA devices of this machine; none without a driver.

    Raises:
        WsssError: cuda-bindings is missing, or is for a newer CUDA than the driver's; the hint is the command that helps.
    """
    try:
        from cuda.bindings import runtime
    except ModuleNotFoundError:
        raise WsssError("TensorRT engines need cuda-bindings", hint=install_line("trt-rtx")) from None
    _, version = runtime.cudaDriverGetVersion()
    status, count = runtime.cudaGetDeviceCount()
    if status == runtime.cudaError_t.cudaErrorInsufficientDriver and version:  # without a driver the version is 0
        raise too_old(f"{version // 1000}.{version % 1000 // 10}")
    if status != runtime.cudaError_t.cudaSuccess:
        return ()
    found = []
    for index in range(count):
        status, device = runtime.cudaGetDeviceProperties(index)
        if status != runtime.cudaError_t.cudaSuccess:
            continue
        name = device.name.decode() if isinstance(device.name, bytes) else str(device.name)
        driver = f"{version // 1000}.{version % 1000 // 10}"
        found.append(Gpu(index, name.rstrip("\0"), f"{device.major}.{device.minor}", driver, int(device.totalGlobalMem)))
    return tuple(found)


def too_old(cuda: str) -> WsssError:
    """The error for a driver that serves ``cuda``, for example ``12.4``, and not the newer CUDA of cuda-bindings."""
    hint = f"update the driver, or {install_line('trt-rtx-cu12')}   (with the full TensorRT: {install_line('trt-cu12')})"
    return WsssError(
        f"NVIDIA's driver serves CUDA {cuda}, cuda-bindings {metadata.version('cuda-bindings')} needs a newer one",
        hint=hint if cuda.startswith("12.") else "update the driver",
    )


def supports(library: ModuleType, capability: str) -> bool:
    """Whether a TensorRT library runs on GPUs of a compute capability, ``8.9``. TensorRT-RTX lists those that it knows."""
    known = getattr(library, "ComputeCapability", None)
    return known is None or f"SM{capability.replace('.', '')}" in known.__members__


def tensorrt_module(flavour: Flavour) -> ModuleType:
    """Import the library of a flavour. Raises WsssError with the command that installs it."""
    try:
        return importlib.import_module(MODULES[flavour])
    except ModuleNotFoundError:
        raise WsssError(f"--engine {flavour}: needs the package {MODULES[flavour]}", hint=install_line(flavour)) from None
    except ImportError as error:  # a CUDA library cannot be loaded
        raise WsssError(f"--engine {flavour}: {MODULES[flavour]} cannot be loaded: {error}") from None


def best_flavour() -> Flavour | None:
    """The flavour whose engines this machine can build and run on its first GPU, preferably the full TensorRT, or None.

    Raises:
        WsssError: TensorRT is installed, and the driver is too old for it.
    """
    installed = [flavour for flavour, name in MODULES.items() if importlib.util.find_spec(name) is not None]
    if not installed or importlib.util.find_spec("cuda") is None or not (gpus := find_gpus()):
        return None
    return next((each for each in installed if supports(tensorrt_module(each), gpus[0].capability)), None)


def why_not_here(flavour: Flavour, index: int = 0) -> str | None:
    """Why engines of a flavour cannot run on GPU ``index`` of this machine, as a clause; None if they can.

    Raises:
        WsssError: the library or cuda-bindings is missing, or does not fit the driver.
    """
    gpus = find_gpus()
    if index >= len(gpus):
        return f"this machine has no GPU {index}" if gpus else "this machine has no GPU"
    gpu = gpus[index]
    if not supports(tensorrt_module(flavour), gpu.capability):
        return f"{MODULES[flavour]} does not support this GPU ({gpu.name}, sm{gpu.capability.replace('.', '')})"
    return None


def checked_plan(model: Model, graph: str, flavour: Flavour, gpu: Gpu, *, unverified: bool = False) -> tuple[Path, GraphSpec]:
    """The plan of a graph, if it may run on ``gpu``, and the graph's contract with the axis ranges of the plan.

    Args:
        model: from ``Bundle.model``: the graph and weights are those of the manifest.
        unverified: accept a plan whose gate has not run.

    Raises:
        BundleError: there is no plan, or it does not match; says why, and the command that builds it again.
    """
    spec = model.graph(graph)
    command = "wsss export --model {} --engine {} --bundle {}".format
    rebuild = command(model.manifest.family, flavour, model.folder.parent)
    plan = spec.plan_for(flavour, gpu.name)
    where = f"{model.folder.name}/{graph}"
    if plan is None:
        raise BundleError(f"{where}: has no {flavour} engine", hint=f"build it: {rebuild}")
    check_file(model.folder, plan.file, plan.sha256, again=rebuild)
    library = tensorrt_module(flavour)
    again = f"build it again: {rebuild}"
    if not supports(library, gpu.capability):
        full = command(model.manifest.family, "trt", model.folder.parent)
        again = f"{MODULES[flavour]} does not support this GPU; the full TensorRT does: {full}"
    for reason in reasons_against(model, spec, plan, gpu, library.__version__):
        raise BundleError(f"{where}: its {flavour} engine {reason}", hint=again)
    other_driver = plan.driver not in (None, gpu.driver)
    if (plan.parity is None or other_driver) and not unverified:
        under = f" under this driver (CUDA {gpu.driver}; CUDA {plan.driver} then)" if other_driver else ""
        raise BundleError(
            f"{where}: its {flavour} engine was never compared with PyTorch{under}",
            hint=f"on this machine: wsss verify {model.folder.parent}   (or --unverified, which the label store records)",
        )
    return model.folder / plan.file, replace(spec, axes=dict(plan.axes))


def reasons_against(model: Model, spec: GraphSpec, plan: PlanSpec, gpu: Gpu | None, version: str) -> list[str]:
    """Reasons why a plan may not be used, each as the end of a sentence; without ``gpu`` the GPU is not checked."""
    reasons = []
    for name, expected, got in (
        ("the graph", model.manifest.files.get(spec.file), plan.graph_sha256),
        ("the weights", weights_sha256(model), plan.weights_sha256),
    ):
        if expected != got:
            reasons.append(f"was built from another state of {name} ({got[:12]}..., now {str(expected)[:12]}...)")
    if plan.precision != spec.precision:
        reasons.append(f"was built in {plan.precision}, the graph is {spec.precision}")
    if plan.builder != version:
        reasons.append(f"was built by version {plan.builder}, installed is {version}")
    if gpu is not None:
        if plan.driver is None and f"sm{gpu.capability.replace('.', '')}" not in plan.target.split():
            reasons.append(f"was built for {plan.target}, this is {gpu.name} (sm{gpu.capability.replace('.', '')})")
        if plan.driver is not None and plan.target != gpu.name and not (plan.target == AMPERE_OR_NEWER and _at_least(gpu, 8)):
            reasons.append(f"was built on {plan.target}, this is {gpu.name}")
    return reasons


def plan_here(spec: GraphSpec, flavour: Flavour, index: int = 0) -> PlanSpec | None:
    """The plan of a graph for GPU ``index`` of this machine, else any of that flavour; None without one."""
    gpus = find_gpus()
    return spec.plan_for(flavour, gpus[index].name if index < len(gpus) else "")


def _at_least(gpu: Gpu, major: int) -> bool:
    return int(gpu.capability.partition(".")[0]) >= major


def weights_sha256(model: Model) -> str:
    """The hash of the weights file that a model's graphs share; empty without one."""
    return model.manifest.files.get("weights.data", "")
