"""The extra ``gpu`` in an environment of its own, on a machine without an NVIDIA GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from wsss.runtime.bundles import MINI

pytestmark = [pytest.mark.network, pytest.mark.slow]  # installs 2 GB
ROOT = Path(__file__).parents[1]


def test_the_documented_line_gives_the_cuda_provider_and_the_cpu_is_a_choice(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "-e", f"{ROOT}[gpu]"], check=True)

    def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    listed = run(python, "-m", "pip", "list", "--format", "freeze").stdout
    assert "onnxruntime-gpu==" in listed and "onnxruntime==" not in listed
    assert "CUDAExecutionProvider" in run(python, "-m", "wsss", "doctor").stdout
    demo = run(python, "-m", "wsss", "demo", "--count", "2", "--out", "demo")
    assert demo.returncode == 0, demo.stderr
    assert "--device auto: takes the CPU: no NVIDIA GPU with a working driver" in demo.stderr
    label = [python, "-m", "wsss", "label", "demo/images", "--bundle", MINI, "--classes", "mini", "--out", "store"]
    refused = run(*label, "--device", "cuda")
    assert (refused.returncode, refused.stderr) == (
        1,
        "wsss: --engine ort on cuda: no NVIDIA GPU with a working driver\n\nhint: --device cpu\n",
    )
    run(python, "-m", "pip", "uninstall", "-y", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
    refused = run(*label, "--device", "cuda")
    assert "libcudnn.so.9: cannot open shared object file" in refused.stderr
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install" in refused.stderr
