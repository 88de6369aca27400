"""Loads the engine that ``--engine`` and ``--device`` select."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Literal, cast

from ..errors import BundleError, UsageError, WsssError
from ..extras import install_line
from ..spec import Flavour, Model
from .engine import Engine
from .openvino import OpenVinoEngine, checked_proof
from .plan import MODULES, Gpu, checked_plan, find_gpus

_log = logging.getLogger("wsss")

EngineName = Literal["ort", "openvino", "trt", "trt-rtx", "eager"]
ENGINES = ("auto", "ort", "openvino", "trt", "trt-rtx", "eager")


def open_graph(model: Model, graph: str, engine: str, *, device: str = "cpu", unverified: bool = False) -> Engine:
    """Load one graph of a model.

    Args:
        model: from ``Bundle.model``, with checked files.
        graph: a name in its manifest.
        engine, device: as typed, or from `choose`.
        unverified: TensorRT and OpenVINO: accept an engine whose gate has not run.

    Raises:
        UsageError: no such engine or device.
        BundleError: TensorRT: the model has no engine that may run here; says why and how to build it. OpenVINO: its results
            were not compared on such a processor. ONNX Runtime: the graph is in bf16.
        WsssError: the engine's package or a GPU is missing; the hint is the command that helps.
    """
    name, place = choose(engine, device, [model])
    if name in MODULES:
        gpu = _gpu(place, name)
        path, spec = checked_plan(model, graph, name, gpu, unverified=unverified)
        from .trt import TrtEngine

        return TrtEngine(path, spec, flavour=name, device=gpu.index)
    if name == "openvino":
        if not unverified:
            checked_proof(model, graph)
        return OpenVinoEngine(model.path(graph), model.graph(graph))
    if name == "ort":
        from .ort import OrtEngine

        spec = model.graph(graph)
        if spec.precision == "bf16":
            raise BundleError(
                f"{model.path(graph)}: is in bf16, which ONNX Runtime does not support",
                hint="--engine openvino (or trt, trt-rtx); for ONNX Runtime: wsss export --precision fp32",
            )
        return OrtEngine(model.path(graph), spec, device=place)
    # PyTorch modules are rebuilt from weights by `export`, which imports this package; hence the import by name.
    try:
        reference = importlib.import_module("wsss.export.reference")
    except ModuleNotFoundError as error:
        raise WsssError(f"--engine eager: needs {error.name}", hint=install_line("export")) from None
    return cast(Callable[..., Engine], reference.open_eager)(model, graph, device=place)


def choose(engine: str, device: str, models: Iterable[Model]) -> tuple[EngineName, str]:
    """Resolve ``auto`` to an engine and a device of this machine.

    Args:
        engine: ``auto`` takes TensorRT if every graph of the models has an engine that may run here; on the CPU OpenVINO, if
            every graph was compared in it and it was faster; else ONNX Runtime.
        device: ``cpu``, ``cuda``, ``cuda:1``; ``auto`` takes the first GPU if the engine can use it, else the CPU.

    Returns:
        The engine's name, and ``cpu`` or ``cuda:N``.

    Raises:
        UsageError: no such engine or device, or the engine does not run on it.
    """
    if engine not in ENGINES:
        raise UsageError(f"--engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and (kind != "cuda" or not number.isdigit())):
        raise UsageError(f"--device: expected auto, cpu, cuda or cuda:N, got {device!r}")
    if engine in MODULES and kind == "cpu":
        raise UsageError(f"--device cpu: --engine {engine} runs on a GPU", hint="--engine ort runs on the CPU")
    if engine == "openvino" and kind == "cuda":
        raise UsageError(f"--device {device}: --engine openvino runs on the CPU", hint="--engine ort runs on a GPU")
    place = f"cuda:{number or 0}"
    if engine == "auto":
        models = _all_of(models)
        if kind != "cpu" and (best := _best_flavour(models, int(number or 0))):
            return best, place
        on_gpu = kind == "cuda" or (kind == "auto" and _ort_uses_gpu())
        return ("ort", place) if on_gpu else (_best_on_cpu(models), "cpu")
    if engine in MODULES or kind == "cuda":
        return cast(EngineName, engine), place
    return cast(EngineName, engine), place if kind == "auto" and engine == "ort" and _ort_uses_gpu() else "cpu"


def _all_of(models: Iterable[Model]) -> list[Model]:
    """The models; none if one is damaged: if the run needs it, opening it raises the error."""
    try:
        return list(models)
    except WsssError:
        return []


def _best_on_cpu(models: list[Model]) -> Literal["ort", "openvino"]:
    """OpenVINO if every graph was compared in it on a processor like this one, and it took less time in sum."""
    graphs = [(model, graph) for model in models for graph in model.manifest.graphs]
    if not graphs or not all(model.graph(graph).openvino for model, graph in graphs):
        return "ort"
    try:
        proofs = [checked_proof(model, graph) for model, graph in graphs]
    except WsssError as error:  # also without OpenVINO
        _log.warning("--engine auto: not openvino: %s", error.message)
        return "ort"
    if any(model.graph(graph).precision == "bf16" for model, graph in graphs):  # which ONNX Runtime does not run
        return "openvino"
    seconds = [sum(getattr(proof, name) or 0 for proof in proofs) for name in ("seconds", "ort_seconds")]
    return "openvino" if seconds[0] < seconds[1] else "ort"


def _best_flavour(models: list[Model], index: int) -> Flavour | None:
    """The flavour for which every graph has a plan that may run on this GPU."""
    for flavour in MODULES if models else ():
        if not all(graph.plan_for(flavour) for model in models for graph in model.manifest.graphs.values()):
            continue
        if importlib.util.find_spec("cuda") is None:
            continue
        try:
            gpus = find_gpus()
            if index >= len(gpus):
                continue
            for model in models:
                for graph in model.manifest.graphs:
                    checked_plan(model, graph, flavour, gpus[index])
        except WsssError as error:
            _log.warning("--engine auto: not %s: %s", flavour, error.message)
            continue
        return flavour
    return None


def _gpu(place: str, flavour: Flavour) -> Gpu:
    index, gpus = int(place.partition(":")[2]), find_gpus()
    if index >= len(gpus):
        raise WsssError(
            f"--engine {flavour}: needs an NVIDIA GPU; asked for number {index}, there are {len(gpus)} with a working driver",
            hint="wsss doctor says what this machine can run; --engine ort runs on the CPU",
        )
    return gpus[index]


@lru_cache(maxsize=1)
def _ort_uses_gpu() -> bool:
    """Whether ``--device auto`` takes a GPU with ONNX Runtime; warns once where it has a CUDA provider and cannot use it."""
    from .ort_library import cuda_trouble, onnxruntime

    trouble = cuda_trouble()
    if trouble and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        _log.warning("--device auto: takes the CPU: %s", trouble)
    return trouble is None
