"""Facts about this machine: GPUs, driver, libraries, and for each engine whether it can be built and run here.

Nothing here raises an exception: unknown facts are None, empty, or a sentence in ``troubles``. torch is not imported.
``wsss doctor --json`` prints a `Machine`, and every benchmark stores one with its results.
"""

from __future__ import annotations

import csv
import ctypes
import importlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from ..cores import cores
from ..errors import WsssError
from ..extras import install_line, replace_onnxruntime
from ..spec import Flavour
from .plan import MODULES, find_gpus

PACKAGES = (
    *("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx", "cuda-bindings", "torch", "torchvision"),
    *("transformers", "open_clip_torch", "segment-anything", "onnx", "onnxscript", "numpy", "pillow"),
)
"""Distributions whose versions affect the results or the speed of a run."""


@dataclass(frozen=True, kw_only=True)
class GpuFacts:
    """An NVIDIA GPU of this machine."""

    index: int
    name: str
    capability: str
    """Compute capability, ``9.0``; empty when unknown."""
    memory_mib: int
    power_limit_w: float | None = None

    @property
    def target(self) -> str:
        """As TensorRT-RTX writes compute capabilities: ``sm90``."""
        return f"sm{self.capability.replace('.', '')}"


@dataclass(frozen=True, kw_only=True)
class Library:
    """An installed TensorRT library."""

    version: str
    capabilities: tuple[str, ...] = ()
    """TensorRT-RTX: compute capabilities for which it builds, ``sm89``."""
    trouble: str = ""
    """Why it cannot be loaded; empty when it can."""


@dataclass(frozen=True, kw_only=True)
class Capability:
    """Whether one engine can be built and run on this machine."""

    engine: str
    """Value of ``--engine``."""
    device: str
    builds: bool
    """TensorRT: engines can be built here. ONNX Runtime and PyTorch have nothing to build."""
    runs: bool
    why: str = ""
    """What is missing; empty if nothing is."""
    fix: str = ""
    """The command that helps; empty if there is none."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """All facts about this machine. ``abilities`` follows from the others (`abilities_of`)."""

    system: str
    processor: str
    cores: int
    """Cores that this process may use."""
    memory_mib: int
    python: str
    gpus: tuple[GpuFacts, ...] = ()
    driver: str | None = None
    """Version of NVIDIA's driver, ``580.159.03``; None without one."""
    cuda: str | None = None
    """Newest CUDA version that the driver supports."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Versions of the installed packages of `PACKAGES`."""
    torch_cuda: str | None = None
    """The CUDA version that torch was built for; None for a CPU build, or without torch."""
    providers: tuple[str, ...] = ()
    """ONNX Runtime's execution providers."""
    ort_cuda_trouble: str = ""
    """Why ONNX Runtime cannot compute on a GPU; empty if it can."""
    cuda_trouble: str = ""
    """Why cuda-bindings, and so TensorRT, cannot use the driver; empty if it can, or there is none."""
    cpu_bf16: bool | None = None
    """Whether the processor computes in BF16; None without OpenVINO, which tells."""
    openvino_trouble: str = ""
    """Why OpenVINO cannot be loaded; empty if it can, or is not installed."""
    tensorrt: Mapping[Flavour, Library] = field(default_factory=dict)
    """The TensorRT libraries that are installed."""
    extras: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Missing packages of each extra of wsss; empty if it is complete."""
    troubles: tuple[str, ...] = ()
    """Problems other than missing packages, each with its solution."""
    abilities: tuple[Capability, ...] = ()


@lru_cache(maxsize=1)
def machine() -> Machine:
    """The facts about this machine, collected once."""
    packages = {name: version for name in PACKAGES if (version := version_of(name))}
    smi = _nvidia_smi()
    gpus, cuda, cuda_trouble = _gpus(smi)
    providers, ort_cuda_trouble, troubles = _onnxruntime(packages)
    cpu_bf16, openvino_trouble = _openvino(packages)
    facts = {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": cores(),
        "memory_mib": _memory_mib(),
        "python": platform.python_version(),
        "gpus": gpus,
        "driver": smi[0]["driver_version"] if smi else None,
        "cuda": cuda,
        "packages": packages,
        "torch_cuda": _torch_cuda(),
        "providers": providers,
        "ort_cuda_trouble": ort_cuda_trouble,
        "cuda_trouble": cuda_trouble,
        "cpu_bf16": cpu_bf16,
        "openvino_trouble": openvino_trouble,
        "tensorrt": {flavour: found for flavour in MODULES if (found := _tensorrt(flavour))},
        "extras": missing_extras(_requirements()),
        "troubles": troubles,
    }
    return Machine(**facts, abilities=abilities_of(Machine(**facts)))  # type: ignore[arg-type]


def abilities_of(known: Machine) -> tuple[Capability, ...]:
    """Whether each engine can be built and run on a machine, the fastest engine first."""
    return (
        _ability_of_tensorrt(known, "trt"),
        _ability_of_tensorrt(known, "trt-rtx"),
        _ability_of_ort(known, "cuda"),
        _ability_of_openvino(known),
        _ability_of_ort(known, "cpu"),
        _ability_of_eager(known, "cuda"),
        _ability_of_eager(known, "cpu"),
    )


def _ability_of_tensorrt(known: Machine, flavour: Flavour) -> Capability:
    library, ahead = known.tensorrt.get(flavour), flavour == "trt-rtx"
    why, fix, builds = "", "", False
    if library is None:
        why, fix = f"{MODULES[flavour]} is not installed", install_line(flavour)
    elif library.trouble:
        why, fix = (
            f"{MODULES[flavour]} cannot be loaded: {library.trouble}",
            install_line(flavour).replace("install", "install --force-reinstall", 1),
        )
    elif "cuda-bindings" not in known.packages:
        why, fix, builds = "cuda-bindings is not installed", install_line(flavour), ahead
    elif not known.gpus:
        why, builds = _without_gpu(known), ahead
    elif known.cuda_trouble:
        why, fix, builds = known.cuda_trouble, install_line(f"{flavour}-cu12"), ahead
    elif ahead and known.gpus[0].target not in library.capabilities:
        knows = ", ".join(library.capabilities)
        why = f"TensorRT-RTX {library.version} knows {knows}, this GPU is {known.gpus[0].target}"
        fix, builds = f"{install_line('trt')}, or wsss label --engine ort", True
    else:
        builds = True
    return Capability(engine=flavour, device="cuda", builds=builds, runs=not why, why=why, fix=fix)


def _ability_of_ort(known: Machine, device: str) -> Capability:
    why = fix = ""
    if device == "cuda" and not known.gpus:
        why = _without_gpu(known)
    elif device == "cuda" and known.ort_cuda_trouble:
        why, fix = known.ort_cuda_trouble, replace_onnxruntime("gpu")
    elif device == "cpu" and "CPUExecutionProvider" not in known.providers:
        why, fix = "onnxruntime is missing or cannot be loaded", replace_onnxruntime("cpu")
    return Capability(engine="ort", device=device, builds=False, runs=not why, why=why, fix=fix)


def _ability_of_openvino(known: Machine) -> Capability:
    why = fix = ""
    if "openvino" not in known.packages:
        why, fix = "openvino is not installed", install_line("openvino")
    elif known.openvino_trouble:
        why = known.openvino_trouble
        if "cannot be loaded" in why:
            fix = install_line("openvino").replace("install", "install --force-reinstall", 1)
    return Capability(engine="openvino", device="cpu", builds=False, runs=not why, why=why, fix=fix)


def _ability_of_eager(known: Machine, device: str) -> Capability:
    why = fix = ""
    lacks = known.extras.get("export", () if "torch" in known.packages else ("torch",))
    if lacks:
        why, fix = f"needs {', '.join(lacks)}", install_line("export")
    elif device == "cuda" and not known.gpus:
        why = _without_gpu(known)
    elif device == "cuda" and known.torch_cuda is None:
        why, fix = "this torch was built for the CPU", "pip install --force-reinstall torch torchvision"
    return Capability(engine="eager", device=device, builds=False, runs=not why, why=why, fix=fix)


def _without_gpu(known: Machine) -> str:
    return "no NVIDIA GPU" if known.driver or known.cuda else "no NVIDIA GPU with a working driver"


# ---- GPUs ----

_QUERIED = ("index", "name", "compute_cap", "memory.total", "power.limit", "driver_version")


def _nvidia_smi() -> list[dict[str, str]]:
    """The output of nvidia-smi for each GPU; empty without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={','.join(_QUERIED)}", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = csv.reader(output.splitlines(), skipinitialspace=True)
    return [dict(zip(_QUERIED, row, strict=True)) for row in rows if len(row) == len(_QUERIED)]


def _gpus(smi: list[dict[str, str]]) -> tuple[tuple[GpuFacts, ...], str | None, str]:
    """The GPUs according to CUDA, else to nvidia-smi; the newest CUDA version that the driver supports; and what keeps CUDA
    from using them (empty if nothing does)."""
    powers = [_number(row["power.limit"]) for row in smi]
    try:
        gpus = find_gpus()
    except (WsssError, ImportError, OSError) as error:  # without cuda-bindings, with a broken one, or one too new for the driver
        listed = tuple(
            GpuFacts(
                index=n,
                name=row["name"],
                capability=row["compute_cap"],
                memory_mib=int(_number(row["memory.total"]) or 0),
                power_limit_w=power,
            )
            for n, (row, power) in enumerate(zip(smi, powers, strict=True))
        )
        return listed, _cuda_of_driver(), str(getattr(error, "message", error))
    found = tuple(
        GpuFacts(
            index=gpu.index,
            name=gpu.name,
            capability=gpu.capability,
            memory_mib=gpu.memory_bytes >> 20,
            # $CUDA_VISIBLE_DEVICES hides GPUs from CUDA but not from nvidia-smi: then their order may differ.
            power_limit_w=powers[gpu.index] if len(powers) == len(gpus) else None,
        )
        for gpu in gpus
    )
    return found, gpus[0].driver if gpus else _cuda_of_driver(), ""


def _cuda_of_driver() -> str | None:
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        version = ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None


# ---- libraries ----


def version_of(distribution: str) -> str | None:
    """Version of an installed distribution, None when it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _tensorrt(flavour: Flavour) -> Library | None:
    name = MODULES[flavour]
    if importlib.util.find_spec(name) is None:
        return None
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a CUDA library is missing or of another version: each loader raises its own class
        return Library(version=version_of(name) or "unknown", trouble=f"{error}".strip().split("\n")[0])
    names = module.ComputeCapability.__members__ if flavour == "trt-rtx" and hasattr(module, "ComputeCapability") else ()
    capabilities = tuple(each.lower() for each in names if re.fullmatch(r"SM\d+", each))
    return Library(version=str(module.__version__), capabilities=capabilities)


def _onnxruntime(packages: Mapping[str, str]) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
    """ONNX Runtime's providers, why it cannot use a GPU (empty if it can), and problems of its installation."""
    troubles = []
    if "onnxruntime" in packages and "onnxruntime-gpu" in packages:
        fix = f"{replace_onnxruntime('gpu')}   (or cpu)"
        troubles.append(f"onnxruntime and onnxruntime-gpu are both installed and overwrite each other: {fix}")
    if importlib.util.find_spec("onnxruntime") is None:
        return (), "", tuple(troubles)
    try:
        library = importlib.import_module("wsss.engines.ort_library")
        providers = tuple(library.onnxruntime.get_available_providers())
        cuda_trouble = library.cuda_trouble() or ""
    except Exception as error:  # an incomplete package, after one of the two was removed
        fix = f"{replace_onnxruntime('cpu')}   (or gpu)"
        return (), "", (*troubles, f"onnxruntime cannot be loaded: {f'{error}'.strip().split(chr(10))[0]}: {fix}")
    return providers, cuda_trouble, tuple(troubles)


def _openvino(packages: Mapping[str, str]) -> tuple[bool | None, str]:
    """Whether the processor computes in BF16 according to OpenVINO, and why that cannot be loaded (empty if it can)."""
    if "openvino" not in packages:
        return None, ""
    try:
        from .openvino import computes_in_bf16  # needs numpy, without which the other facts are still told

        return computes_in_bf16(), ""
    except WsssError as error:
        return None, error.message.removeprefix("--engine openvino: ")
    except Exception as error:  # an incomplete package, a missing library: each raises its own class
        return None, f"openvino cannot be loaded: {f'{error}'.strip().split(chr(10))[0]}"


def _torch_cuda() -> str | None:
    """The CUDA version that torch was built for, from its version file, because importing torch takes seconds."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    try:
        text = (Path(found.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^cuda\b.*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match.group(1) if match else None


def _requirements() -> list[str]:
    """The requirements of wsss; empty in a checkout that was never installed."""
    try:
        return metadata.requires("wsss") or []
    except metadata.PackageNotFoundError:
        return []


def missing_extras(requirements: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Missing distributions of each extra.

    Args:
        requirements: lines of a package's metadata, ``torch>=2.10; extra == "export"``.

    Returns:
        Names of missing distributions by extra, in the given order; empty for a complete extra.
    """
    missing: dict[str, list[str]] = {}
    for line in requirements:
        name, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        if name is None or extra is None or name.group() == "wsss":  # wsss: an extra that combines others
            continue
        names = missing.setdefault(extra.group(1), [])
        if version_of(name.group()) is None:
            names.append(name.group())
    return {extra: tuple(names) for extra, names in missing.items()}


# ---- the machine itself ----


def _processor() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def _memory_mib() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    except (AttributeError, OSError, ValueError):
        return 0
