"""OpenVINO as an engine for CPUs. It runs the graph files that ONNX Runtime and TensorRT's builder read, in FP32 or BF16.

OpenVINO could also round an FP32 graph to BF16 by itself. That is not used: it would do so in every node, also in those that
need FP32 (Grounding-DINO's queries and boxes were wrong), while a graph that is written in BF16 keeps them.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..batch import Tensor
from ..cores import cores
from ..errors import BundleError, OutOfMemory, WsssError
from ..extras import install_line
from ..spec import GraphSpec, Model, OpenVinoProof, TensorSpec
from .engine import check_feeds, contract

REQUEST_BYTES = 1 << 20
"""Inputs of one request of several rows. A canvas of Grounding-DINO or SAM is larger, and is a request of its own, because
memory grows with its rows; CLIP ViT-B/16 takes 3 % less time with 8 views in a request than with one."""
CORES_A_REQUEST = 4
"""Cores that compute one request, where the processor has several times as many."""

RESTRICTIONS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Environment variables by which oneDNN, of which OpenVINO has a copy, uses less than the processor has."""

_OUT_OF_MEMORY = ("bad_alloc", "bad allocation", "out of memory", "Cannot allocate memory", "could not allocate")
_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
"""Names in Linux's list, the newest first."""


class OpenVinoEngine:
    """One ONNX graph in OpenVINO on the CPU. Call it from one thread at a time.

    The rows of a batch are computed in several requests at the same time, each on a part of the cores, so that the threads of
    one do not wait for those of another. A request that is alone takes all cores, as long as no call had several.

    Args:
        path: the ``.onnx`` file, with its external weights in the same folder; hashes already checked (`Bundle.model`).
        spec: the graph's contract from its manifest; the file is checked against it. FP16 graphs are computed in FP32, and so
            are BF16 graphs on a processor without BF16.

    Raises:
        BundleError: the file is not an ONNX graph, or not the one that the manifest describes.
        WsssError: OpenVINO is missing.
    """

    def __init__(self, path: Path, spec: GraphSpec) -> None:
        try:
            self._model = _core().read_model(str(path))
        except RuntimeError as error:
            raise BundleError(f"{path}: OpenVINO cannot load it: {_first_line(error)}", hint="export the model again") from None
        self._where = f"{path.parent.name}/{path.stem}"
        self.inputs, self.outputs, self.axes = contract(spec)
        self._check_contract(path)
        self._rows = independent_rows(spec)
        self._queue: Any = None
        self._at_once = 0

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        check_feeds(self._where, self.inputs, self.axes, feeds)
        arrays = {name: np.ascontiguousarray(tensor) for name, tensor in feeds.items()}
        try:
            parts = list(self._parts(arrays))
            results = self._run(parts)
        except (RuntimeError, MemoryError) as error:  # OpenVINO has no class for this error
            if isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY):
                raise OutOfMemory(f"{self._where}: the cpu has no memory for this call") from None
            raise
        if len(results) == 1:
            return dict(zip(self.outputs, results[0], strict=True))
        return {name: np.concatenate(each) for name, each in zip(self.outputs, zip(*results, strict=True), strict=True)}

    def _parts(self, arrays: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """The feeds of each request."""
        split = [name for name, spec in self.inputs.items() if spec.shape and spec.shape[0] == self._rows]
        if not split:
            yield arrays
            return
        rows = len(arrays[split[0]])
        a_row = sum(arrays[name].nbytes for name in split) // rows
        most = max(1, REQUEST_BYTES // a_row)
        step = min(-(-rows // _requests_at_once()), most)
        for start in range(0, rows, step):
            yield arrays | {name: arrays[name][start : start + step] for name in split}

    def _run(self, parts: list[dict[str, np.ndarray]]) -> list[list[np.ndarray]]:
        """The outputs of each request, in the order of the contract."""
        at_once = min(len(parts), _requests_at_once())
        if at_once > self._at_once:  # never fewer again: compiling takes seconds, and another copy of the weights
            self._queue = None
            self._queue = self._compile(at_once)
            self._at_once = at_once
        results: list[list[np.ndarray]] = [[] for _ in parts]

        def collect(request: Any, number: int) -> None:
            # Copied, because the next request overwrites them.
            results[number] = [np.array(request.get_tensor(name).data) for name in self.outputs]

        self._queue.set_callback(collect)
        for number, part in enumerate(parts):
            self._queue.start_async(part, number, share_inputs=True)
        self._queue.wait_all()
        return results

    def _compile(self, at_once: int) -> Any:
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",  # each node in the precision that the graph gives it
            "NUM_STREAMS": at_once,
            "INFERENCE_NUM_THREADS": cores(),
            "ENABLE_CPU_PINNING": False,  # several processes would be pinned to the same cores
        }
        return openvino().AsyncInferQueue(_core().compile_model(self._model, "CPU", settings), at_once)

    def _check_contract(self, path: Path) -> None:
        for specs, ports in ((self.inputs, self._model.inputs), (self.outputs, self._model.outputs)):
            by_name = {port.get_any_name(): port for port in ports}
            if specs.keys() == by_name.keys() and all(_agree(spec, by_name[name]) for name, spec in specs.items()):
                continue
            graph = ", ".join(f"{name} {port.element_type.to_string()}{port.partial_shape}" for name, port in by_name.items())
            raise BundleError(
                f"{path}: the manifest says {', '.join(map(str, specs.values()))}; the graph has {graph}",
                hint="the manifest and the graph come from different exports; export the model again",
            )


def openvino() -> ModuleType:
    """Import OpenVINO without its telemetry, which would keep an identifier of the machine in the home folder and send events.

    Raises:
        WsssError: it is not installed or cannot be loaded; the hint is the command that installs it. Or the environment restricts
            the instructions it may use: with ``ONEDNN_MAX_CPU_ISA=AVX2`` on a processor with AVX-512, OpenVINO 2026.4 ends the
            process in Grounding-DINO's graph, and a proof names the processor's own instructions.
    """
    for name in RESTRICTIONS:
        if (value := os.environ.get(name, "")).upper() not in ("", "ALL", "DEFAULT"):
            raise WsssError(
                f"--engine openvino: {name}={value} restricts the processor, with which OpenVINO may end the process",
                hint=f"unset {name}, or take --engine ort",
            )
    try:
        with _hidden("openvino_telemetry"):
            return importlib.import_module("openvino")
    except ModuleNotFoundError:
        raise WsssError("--engine openvino: needs the package openvino", hint=install_line("openvino")) from None
    except ImportError as error:  # one of its libraries is missing
        raise WsssError(f"--engine openvino: the package openvino cannot be loaded: {error}") from None


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """As if a package were not installed, which OpenVINO provides for; a package that was imported before stays imported."""
    before = {name: sys.modules[name]} if name in sys.modules else {}
    sys.modules[name] = None  # type: ignore[assignment]  # what Python's import system documents
    try:
        yield
    finally:
        del sys.modules[name]
        sys.modules.update(before)


def version() -> str:
    """OpenVINO's version, ``2026.4.1``. Raises WsssError if it is missing."""
    return str(openvino().__version__).partition("-")[0]


def computes_in_bf16() -> bool:
    """Whether this processor multiplies BF16 numbers. Raises WsssError if OpenVINO is missing."""
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@lru_cache(maxsize=1)
def instructions() -> str:
    """The newest instructions of this processor by which OpenVINO chooses its kernels, for example ``avx512_bf16``; its
    architecture, ``arm64``, where it has none of x86 or the system does not list them."""
    with contextlib.suppress(OSError):
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if flags and (known := [name for name in _INSTRUCTIONS if name in flags[1].split()]):
            return known[0]
    return platform.machine().lower()


def independent_rows(spec: GraphSpec) -> str | None:
    """The free axis that is the first of every output, along which a call may be split: the gate has compared each row with the
    row alone. None for graphs of a whole image."""
    first = {tensor.shape[0] if tensor.shape else None for tensor in spec.outputs}
    axis = first.pop()
    return axis if not first and isinstance(axis, str) else None


def checked_proof(model: Model, graph: str) -> OpenVinoProof:
    """The comparison of OpenVINO's results for a graph with the official implementation, on a processor like this one.

    Raises:
        BundleError: there is none, or none for this version of OpenVINO; the hint is the command that makes it.
    """
    proofs = model.graph(graph).openvino
    proof = proofs.get(instructions())
    if proof and proof.version == version():
        return proof
    reason = "was never compared with PyTorch"
    if proof:
        reason = f"was compared with PyTorch in OpenVINO {proof.version}, installed is {version()}"
    elif proofs:
        reason = f"was compared with PyTorch on processors with {', '.join(sorted(proofs))}, this one has {instructions()}"
    raise BundleError(
        f"{model.folder.name}/{graph}: its result in OpenVINO {reason}",
        hint=f"wsss verify {model.folder.parent} --engine openvino   (or --unverified, which the label store records)",
    )


@lru_cache(maxsize=1)
def _core() -> Any:
    return openvino().Core()


def _requests_at_once() -> int:
    return cores() if cores() <= CORES_A_REQUEST else -(-cores() // CORES_A_REQUEST)


def _agree(spec: TensorSpec, port: Any) -> bool:
    """Same dtype and rank, same fixed axes; a free axis of the contract must not be a number in the graph."""
    shape = port.partial_shape
    if port.element_type.to_dtype() != np.dtype(spec.dtype) or len(shape) != len(spec.shape):
        return False
    return all(length.is_dynamic or length.get_length() == axis for length, axis in zip(shape, spec.shape, strict=True))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from")]
    return lines[0] if lines else type(error).__name__
