"""ONNX Runtime sends nothing, writes nothing into the home folder, and prints nothing."""

from __future__ import annotations

import ast
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from wsss.engines import opening, ort_library
from wsss.extras import install_line
from wsss.spec import GraphSpec

ROOT = Path(__file__).parents[2]
FOLDERS = ("wsss", "engines", "export", "runtime", "train", "mini", "benchmarks")
SESSION = """
import sys, time
from pathlib import Path
import numpy as np
from wsss.spec import AxisRange, GraphSpec, TensorSpec
from wsss.engines.ort import OrtEngine
spec = GraphSpec(
    file="double.onnx",
    inputs=(TensorSpec("x", ("batch", 3), "float32"),),
    outputs=(TensorSpec("double", ("batch", 3), "float32"), TensorSpec("total", ("batch",), "float32")),
    axes={"batch": AxisRange(1, 2, 4)},
    opset=18,
)
engine = OrtEngine(Path(sys.argv[1]), spec, threads=1)
print(np.asarray(engine({"x": np.ones((1, 3), np.float32)})["total"]))
"""


@pytest.mark.parametrize("path", [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))], ids=str)
def test_one_module_imports_it(path: Path) -> None:
    """Whoever imports it elsewhere may be the first, and its telemetry begins while it is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    names += [  # importlib.import_module("onnxruntime")
        str(node.args[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and "import_module" in ast.dump(node)
    ]
    used = any(name.split(".")[0] == "onnxruntime" for name in names)
    assert used == (path == ROOT / "engines" / "ort_library.py")


def run(path: Path, home: Path, *before: str) -> subprocess.CompletedProcess[str]:
    """A session in a process of its own whose home folder is empty, in the environment of a user's shell."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "XDG_"))}
    for name in ("CI", "GITHUB_ACTIONS", "TF_BUILD"):  # ONNX Runtime is silent in some of these
        inherited.pop(name, None)
    command = [*before, sys.executable, "-c", SESSION, str(path)]
    return subprocess.run(command, capture_output=True, text=True, env={**inherited, "HOME": str(home)}, timeout=120)


def test_a_session_leaves_no_file_in_the_home_folder(onnx_file: Callable[..., Path], spec: GraphSpec, tmp_path: Path) -> None:
    """Where telemetry runs it makes ``.cache/Microsoft/DeveloperTools/.onnxruntime`` while it is imported."""
    home = tmp_path / "home"
    home.mkdir()
    done = run(onnx_file(), home)
    assert (done.stdout, done.stderr, done.returncode) == ("[3.]\n", "", 0)
    assert list(home.rglob("*")) == []


@pytest.mark.skipif(shutil.which("strace") is None, reason="system calls are seen through strace, which is not installed")
def test_a_session_opens_no_socket(onnx_file: Callable[..., Path], spec: GraphSpec, tmp_path: Path) -> None:
    """Seen from the kernel: an audit hook of Python does not see what C++ opens."""
    home, trace = tmp_path / "home", tmp_path / "trace"
    home.mkdir()
    done = run(onnx_file(), home, "strace", "-f", "-qq", "-e", "trace=network", "-o", str(trace))
    if done.returncode and not done.stdout:
        pytest.skip(f"strace may not trace here: {done.stderr[:100]}")
    assert done.stdout == "[3.]\n"
    calls = [line for line in trace.read_text().splitlines() if re.search(r"\b(socket|connect|sendto|sendmsg)\(", line)]
    assert calls == []


def test_failures_reach_the_caller_and_not_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    onnx = pytest.importorskip("onnx")
    import numpy as np

    from wsss.engines.ort import OrtEngine
    from wsss.errors import BundleError, OutOfMemory
    from wsss.spec import TensorSpec

    helper, types = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [helper.make_node("Expand", ["x", "shape"], ["y"])],
        "wide",
        [helper.make_tensor_value_info("x", types.FLOAT, [1]), helper.make_tensor_value_info("shape", types.INT64, [1])],
        [helper.make_tensor_value_info("y", types.FLOAT, ["n"])],
    )
    path = tmp_path / "wide.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    inputs = (TensorSpec("x", (1,), "float32"), TensorSpec("shape", (1,), "int64"))
    spec = GraphSpec(file=path.name, inputs=inputs, outputs=(TensorSpec("y", ("n",), "float32"),), axes={}, opset=18)
    engine = OrtEngine(path, spec, threads=1)
    with pytest.raises(OutOfMemory):
        engine({"x": np.ones(1, np.float32), "shape": np.array([1 << 45])})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(BundleError, match="ONNX Runtime cannot load it"):
        OrtEngine(path, spec, threads=1)
    assert capfd.readouterr() == ("", "")


def test_without_onnxruntime_both_ways_to_install_it_are_named(tmp_path: Path) -> None:
    code = "import sys; sys.modules['onnxruntime'] = None; from wsss.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "demo", "--out", "x"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith(
        f"wsss: ONNX Runtime is not installed\n\nhint: {install_line('cpu')}   (with an NVIDIA GPU: {install_line('gpu')})\n"
    )


# ---- CUDA ----


@pytest.fixture
def with_provider(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An onnxruntime-gpu whose libraries are C files in a folder, which is returned."""
    (tmp_path / "capi").mkdir()
    monkeypatch.setattr(ort_library.onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort_library.onnxruntime, "preload_dlls", lambda: print("Failed to load"), raising=False)
    monkeypatch.setattr(ort_library.onnxruntime, "__file__", str(tmp_path / "__init__.py"))
    ort_library.cuda_trouble.cache_clear()
    opening._ort_uses_gpu.cache_clear()
    return tmp_path / "capi"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    ort_library.cuda_trouble.cache_clear()
    opening._ort_uses_gpu.cache_clear()


def compiled(folder: Path, **sources: str) -> None:
    for name, source in sources.items():
        subprocess.run(
            ["cc", "-shared", "-x", "c", "-", "-o", str(folder / f"libonnxruntime_providers_{name}.so")],
            input=source.encode(),
            check=True,
        )


def test_a_missing_cuda_library_is_named(
    with_provider: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ort_library.TF32, "0")  # so that it is restored
    monkeypatch.delenv(ort_library.TF32)
    assert "libonnxruntime_providers_shared.so: cannot open" in str(ort_library.cuda_trouble())
    assert os.environ[ort_library.TF32] == "0"
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_with_all_libraries_a_gpu_is_still_needed(
    with_provider: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if any(Path(folder, "libcuda.so.1").exists() for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib64")):
        pytest.skip("needs a machine without NVIDIA's driver")
    compiled(with_provider, shared="", cuda="")
    assert ort_library.cuda_trouble() == "no NVIDIA GPU with a working driver"
    monkeypatch.setattr(logging.getLogger("wsss"), "propagate", True)
    with caplog.at_level(logging.WARNING, "wsss"):
        assert opening.choose("auto", "auto", []) == opening.choose("ort", "auto", []) == ("ort", "cpu")
    messages = {record.message for record in caplog.records}
    assert messages == {"--device auto: takes the CPU: no NVIDIA GPU with a working driver"}
