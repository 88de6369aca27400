"""What is said of a machine: with and without a GPU, with libraries missing, broken or in each other's way."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wsss.cli.doctor import lines_of
from wsss.engines import machine as facts
from wsss.engines.machine import Capability, GpuFacts, Library, Machine, abilities_of, machine, missing_extras
from wsss.engines.plan import Gpu
from wsss.errors import WsssError
from wsss.extras import install_line, replace_onnxruntime

RTX = Library(version="1.7.1", capabilities=("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"))
CPU_ONLY = Machine(
    system="Linux",
    processor="x",
    cores=2,
    memory_mib=1024,
    python="3.12",
    packages={"onnxruntime": "1.32", "cuda-bindings": "13", "torch": "2.15"},
    providers=("CPUExecutionProvider",),
    torch_cuda="13.0",
    extras={"export": ()},
)


def with_gpu(capability: str, **changes: Any) -> Machine:
    gpu = GpuFacts(index=0, name="GPU", capability=capability, memory_mib=24_000)
    return dataclasses.replace(CPU_ONLY, gpus=(gpu,), driver="580.1", cuda="13.0", **changes)


def ability(known: Machine, engine: str, device: str = "cuda") -> Capability:
    return next(each for each in abilities_of(known) if (each.engine, each.device) == (engine, device))


def test_the_best_engine_stands_first() -> None:
    assert [(each.engine, each.device) for each in abilities_of(CPU_ONLY)] == [
        ("trt", "cuda"),
        ("trt-rtx", "cuda"),
        ("ort", "cuda"),
        ("openvino", "cpu"),
        ("ort", "cpu"),
        ("eager", "cuda"),
        ("eager", "cpu"),
    ]


def test_openvino_runs_where_it_is_installed() -> None:
    missing = ability(CPU_ONLY, "openvino", "cpu")
    assert (missing.runs, missing.why, missing.fix) == (False, "openvino is not installed", install_line("openvino"))
    there = dataclasses.replace(CPU_ONLY, packages={"openvino": "2026.4"}, cpu_bf16=True)
    assert ability(there, "openvino", "cpu").runs
    assert "bf16       yes, on the CPU (OpenVINO)" in list(lines_of(there))
    assert "bf16       no, on the CPU (OpenVINO)" in list(lines_of(dataclasses.replace(there, cpu_bf16=False)))
    broken = ability(dataclasses.replace(there, openvino_trouble="openvino cannot be loaded: libx.so"), "openvino", "cpu")
    assert (broken.runs, broken.why) == (False, "openvino cannot be loaded: libx.so")
    assert "--force-reinstall" in broken.fix
    restricted = ability(dataclasses.replace(there, openvino_trouble="ONEDNN_MAX_CPU_ISA=AVX2 restricts it"), "openvino", "cpu")
    assert (restricted.runs, restricted.fix) == (False, "")


def test_without_a_gpu_rtx_still_builds() -> None:
    rtx = ability(dataclasses.replace(CPU_ONLY, tensorrt={"trt-rtx": RTX}), "trt-rtx")
    assert (rtx.builds, rtx.runs) == (True, False)
    assert "no NVIDIA GPU" in rtx.why
    full = ability(dataclasses.replace(CPU_ONLY, tensorrt={"trt": Library(version="10.14")}), "trt")
    assert (full.builds, full.runs) == (False, False)
    assert ability(CPU_ONLY, "ort", "cpu").runs


@pytest.mark.parametrize(("capability", "runs"), [("8.9", True), ("12.0", True), ("9.0", False), ("10.0", False)])
def test_rtx_knows_some_compute_capabilities(capability: str, runs: bool) -> None:
    rtx = ability(with_gpu(capability, tensorrt={"trt-rtx": RTX}), "trt-rtx")
    assert (rtx.builds, rtx.runs) == (True, runs)
    if not runs:
        assert f"this GPU is sm{capability.replace('.', '')}" in rtx.why and "sm89" in rtx.why
        assert install_line("trt") in rtx.fix


def test_full_tensorrt_needs_its_package_and_cuda_bindings() -> None:
    assert ability(with_gpu("9.0"), "trt").fix == install_line("trt")
    full = {"trt": Library(version="10.14")}
    assert ability(with_gpu("9.0", tensorrt=full), "trt").runs
    without = ability(with_gpu("9.0", tensorrt=full, packages={}), "trt")
    assert not without.runs and "cuda-bindings" in without.why
    broken = ability(with_gpu("9.0", tensorrt={"trt": Library(version="10.14", trouble="libnvinfer.so.10: no such file")}), "trt")
    assert not broken.runs and "libnvinfer.so.10" in broken.why


def test_onnxruntime_on_a_gpu() -> None:
    lacks = ability(with_gpu("9.0", ort_cuda_trouble="this onnxruntime 1.32 has no CUDA provider"), "ort")
    assert not lacks.runs and lacks.fix == replace_onnxruntime("gpu")
    assert ability(with_gpu("9.0", providers=("CUDAExecutionProvider", "CPUExecutionProvider")), "ort").runs
    nothing = ability(dataclasses.replace(CPU_ONLY, providers=()), "ort", "cpu")
    assert not nothing.runs and nothing.fix


def test_eager_needs_the_export_extra_and_a_torch_for_cuda() -> None:
    assert "onnxscript" in ability(dataclasses.replace(CPU_ONLY, extras={"export": ("onnxscript",)}), "eager", "cpu").why
    assert "torch" in ability(dataclasses.replace(CPU_ONLY, extras={}, packages={}), "eager", "cpu").why
    assert ability(with_gpu("9.0"), "eager").runs
    assert "built for the CPU" in ability(with_gpu("9.0", torch_cuda=None), "eager").why


def test_missing_extras_by_name() -> None:
    missing = missing_extras(
        [
            "numpy>=1.26",
            'numpy>=1; extra == "one"',
            'no-such-thing>=2; extra == "two"',
            'numpy; extra == "two"',
            'wsss[one,two]; extra == "three"',
            "also_no_such_thing[x]>=1; python_version > '3' and extra == 'four'",
        ]
    )
    assert missing == {"one": (), "two": ("no-such-thing",), "four": ("also_no_such_thing",)}


# ---- looking at this machine ----


def test_a_mix_of_two_onnxruntimes_is_said() -> None:
    _, _, troubles = facts._onnxruntime({"onnxruntime": "1.32", "onnxruntime-gpu": "1.32"})
    assert len(troubles) == 1 and "pip uninstall -y onnxruntime onnxruntime-gpu" in troubles[0]
    assert facts._onnxruntime({"onnxruntime": "1.32"})[2] == ()


def test_a_library_that_cannot_be_loaded_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> object:
        raise OSError("libcudart.so.12: cannot open shared object file\nmore")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(facts.importlib, "import_module", load)
    library = facts._tensorrt("trt")
    assert library is not None and library.trouble == "libcudart.so.12: cannot open shared object file"
    providers, _, troubles = facts._onnxruntime({})
    assert providers == () and "libcudart.so.12" in troubles[0]


def test_gpus_of_the_drivers_tool_without_cuda_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> tuple[object, ...]:
        raise WsssError("no cuda-bindings")

    monkeypatch.setattr(facts, "find_gpus", missing)
    row = dict(zip(facts._QUERIED, ("0", "NVIDIA H200", "9.0", "143771", "700.00", "580.1"), strict=True))
    gpus, _, trouble = facts._gpus([row, {**row, "power.limit": "[N/A]"}])
    assert trouble == "no cuda-bindings"
    assert [(gpu.index, gpu.name, gpu.target, gpu.memory_mib, gpu.power_limit_w) for gpu in gpus] == [
        (0, "NVIDIA H200", "sm90", 143771, 700.0),
        (1, "NVIDIA H200", "sm90", 143771, None),
    ]


@pytest.mark.parametrize(("count", "power"), [(1, 700.0), (2, None)])
def test_a_power_limit_is_of_a_gpu_that_is_surely_meant(monkeypatch: pytest.MonkeyPatch, count: int, power: float | None) -> None:
    """CUDA sees one GPU; where the driver's tool sees two, nobody knows which of them it is."""
    monkeypatch.setattr(facts, "find_gpus", lambda: (Gpu(0, "NVIDIA H200", "9.0", "13.0", 150_000 << 20),))
    row = dict(zip(facts._QUERIED, ("0", "NVIDIA H200", "9.0", "143771", "700.00", "580.1"), strict=True))
    gpus, cuda, _ = facts._gpus([row] * count)
    assert [(gpu.memory_mib, gpu.power_limit_w) for gpu in gpus] == [(150_000, power)] and cuda == "13.0"


def test_a_driver_older_than_the_bindings_is_no_missing_gpu() -> None:
    known = with_gpu(
        "8.9", tensorrt={"trt-rtx": RTX}, cuda_trouble="NVIDIA's driver serves CUDA 12.4, cuda-bindings 13 needs a newer one"
    )
    rtx = ability(known, "trt-rtx")
    assert (rtx.builds, rtx.runs, rtx.fix) == (True, False, install_line("trt-rtx-cu12"))
    assert "serves CUDA 12.4" in rtx.why


def test_the_drivers_tool_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '0, NVIDIA H200, 9.0, 143771, 700.00, 580.159.03'\necho 'unexpected'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (row,) = facts._nvidia_smi()
    assert row["driver_version"] == "580.159.03" and row["name"] == "NVIDIA H200"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert facts._nvidia_smi() == []


def test_this_machine_is_plain_data() -> None:
    record = json.loads(json.dumps(dataclasses.asdict(machine())))
    assert record["cores"] >= 1 and record["memory_mib"] > 0
    assert record["packages"]["numpy"]
    assert "CPUExecutionProvider" in record["providers"]
    assert {each["engine"] for each in record["abilities"]} == {"trt", "trt-rtx", "openvino", "ort", "eager"}


# ---- the command ----


@pytest.mark.parametrize(("line", "version"), [("cuda: Optional[str] = '12.8'", "12.8"), ("cuda = None", None), (None, None)])
def test_the_cuda_version_of_torch_is_that_of_its_file(
    line: str | None, version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if line is not None:
        (tmp_path / "version.py").write_text(f"debug = False\n{line}\nhip: Optional[str] = '6.4'\n")
    found = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    assert facts._torch_cuda() == version
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert facts._torch_cuda() is None


def test_doctor_needs_nothing_and_imports_no_torch() -> None:
    """With every optional package hidden it ends well; with all of them it has not imported torch."""
    hide = "\n".join(
        [
            "import importlib.metadata as m, importlib.util as u, sys",
            "hidden = ('torch', 'tensorrt', 'tensorrt_rtx', 'onnxruntime', 'cuda')",
            "find, version = u.find_spec, m.version",
            "u.find_spec = lambda name, *a: None if name.split('.')[0] in hidden else find(name, *a)",
            "def gone(name):",
            "    raise m.PackageNotFoundError(name)",
            "m.version = gone",
            "for name in hidden: sys.modules[name] = None",
        ]
    )
    run = "import sys; sys.argv = ['wsss', 'doctor'{}]; from wsss.cli.main import main; main()"
    bare = subprocess.run([sys.executable, "-c", f"{hide}\n{run.format('')}"], capture_output=True, text=True)
    assert bare.returncode == 0 and bare.stderr == "", bare.stderr
    assert install_line("trt-rtx") in bare.stdout
    at_exit = "import atexit; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); "
    here = subprocess.run([sys.executable, "-c", at_exit + run.format(", '--json'")], capture_output=True, text=True)
    assert here.returncode == 0, here.stderr
    assert here.stderr == "False\n"
    assert json.loads(here.stdout)["abilities"]


def test_doctor_says_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    known = with_gpu(
        "9.0", tensorrt={"trt-rtx": RTX}, extras={"export": (), "gpu": ("onnxruntime-gpu",), "ray": ("ray",)}, troubles=("a mix",)
    )
    text = "\n".join(lines_of(dataclasses.replace(known, abilities=abilities_of(known))))
    assert "GPU, sm90, 24000 MiB" in text and "580.1, CUDA up to 13.0" in text
    assert "this GPU is sm90" in text
    assert "trouble    a mix" in text
    assert f"ray: lacks ray   {install_line('ray')}" in text
    assert "export: lacks" not in text
    assert "gpu: lacks" not in text, "onnxruntime is there, and the two exclude each other"
