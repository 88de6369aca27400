"""The only import of ONNX Runtime, which turns off its telemetry and its messages on stderr, and loads its CUDA libraries.

Its official builds send events to Microsoft and keep a database and an identifier of the machine in the home folder. Telemetry
starts during the import, when only the environment variable stops it (onnxruntime/Privacy.md, "Disabling Telemetry"). Errors
reach the user as exceptions, with the same text as the messages.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import sys
from functools import lru_cache
from pathlib import Path

from ..errors import WsssError
from ..extras import install_line

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

try:
    import onnxruntime
except ModuleNotFoundError as error:
    if error.name != "onnxruntime":
        raise
    raise WsssError(
        "ONNX Runtime is not installed", hint=f"{install_line('cpu')}   (with an NVIDIA GPU: {install_line('gpu')})"
    ) from None

onnxruntime.disable_telemetry_events()  # in case another package imported it before

SILENT = 4
"""The severity "fatal": as ``log_severity_level`` of a session, nothing is printed."""
onnxruntime.set_default_logger_severity(SILENT)

TF32 = "NVIDIA_TF32_OVERRIDE"
"""NVIDIA's variable: with 0, FP32 products keep 24 bits, also in cuDNN's convolutions, which ignore ONNX Runtime's option
(onnxruntime#19470); with 1, they may round their factors to the 10 bits of TF32."""

__all__ = ["SILENT", "TF32", "cuda_trouble", "onnxruntime"]


@lru_cache(maxsize=1)
def cuda_trouble() -> str | None:
    """Why ONNX Runtime cannot compute on a GPU here; None if it can. Loads the libraries of its CUDA provider.

    Without this check, ONNX Runtime takes the CPU in place of a provider that it cannot load, or fails when it loads a graph.
    Sets `TF32` to 0 in this process, unless the user has set it.
    """
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return f"this onnxruntime {onnxruntime.__version__} has no CUDA provider"
    os.environ.setdefault(TF32, "0")  # read when the libraries are loaded
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        onnxruntime.preload_dlls()  # of NVIDIA's wheels
    folder, pattern = Path(onnxruntime.__file__).parent / "capi", "libonnxruntime_providers_{}.so"
    if sys.platform == "win32":
        pattern = "onnxruntime_providers_{}.dll"
    try:
        ctypes.CDLL(str(folder / pattern.format("shared")), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / pattern.format("cuda")))
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        missing = str(error).partition(":")[0]
        if missing.startswith("libcuda."):
            return "no NVIDIA GPU with a working driver"
        return f"a library of ONNX Runtime's CUDA provider cannot be loaded: {error}"
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or not count.value:
        return "no NVIDIA GPU with a working driver"
    return None
