"""ONNX Runtime as an engine, on any machine. On a GPU, outputs stay there and are passed to the next graph by IO binding."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..batch import Tensor
from ..errors import BundleError, OutOfMemory, WsssError
from ..extras import replace_onnxruntime
from ..reading.onnx_files import external_files
from ..spec import GraphSpec, TensorSpec
from .engine import check_feeds, contract
from .ort_library import SILENT, TF32, cuda_trouble, onnxruntime

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}

_OUT_OF_MEMORY = (
    *("Failed to allocate memory", "out of memory", "bad_alloc", "bad allocation"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "DEVICE_ALLOCATION_FAILED"),
)
"""Texts of onnxruntime's errors when its arena, CUDA, cuBLAS, cuDNN or the C++ library is out of memory."""


class OrtTensor:
    """An ``OrtValue`` as a `Tensor` of the runtime; ``np.asarray`` copies it to the host (no copy on the CPU)."""

    def __init__(self, value: onnxruntime.OrtValue) -> None:
        self.value = value

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape())

    @property
    def dtype(self) -> np.dtype[np.generic]:
        return np.dtype(_DTYPES[self.value.data_type()])

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[np.generic]:
        array: npt.NDArray[np.generic] = self.value.numpy()
        if dtype is not None and array.dtype != dtype:
            return array.astype(dtype)
        return array.copy() if copy else array


class OrtEngine:
    """One ONNX graph in ONNX Runtime.

    Args:
        path: the ``.onnx`` file, with its external weights in the same folder; hashes already checked (`Bundle.model`).
        spec: the graph's contract from its manifest; the file is checked against it.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        threads: intra-op threads on the CPU, 0 for all cores.

    Raises:
        BundleError: the file is not an ONNX graph, or not the one that the manifest describes.
        WsssError: ``cuda`` was asked for, and this onnxruntime cannot compute on a GPU here.
    """

    def __init__(self, path: Path, spec: GraphSpec, *, device: str = "cpu", threads: int = 0) -> None:
        kind, _, number = device.partition(":")
        if kind == "cuda" and (trouble := cuda_trouble()):
            raise WsssError(
                f"--engine ort on cuda: {trouble}",
                hint="--device cpu" if "no NVIDIA GPU" in trouble else f"{replace_onnxruntime('gpu')}   (or --device cpu)",
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Idle threads sleep instead of spinning, so that other engines, readers and writers get the cores.
        # The chain of small models on two cores: 6.0 to 7.0 images/s with spinning, 7.7 to 10.7 without.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = SILENT
        options.add_session_config_entry("session.load_model_format", "ONNX")  # for any file name
        self._device, self._number = kind, int(number or 0)
        provider = ("CUDAExecutionProvider", cuda_options(self._number)) if kind == "cuda" else "CPUExecutionProvider"
        # onnxruntime 1.32 crashes with a segmentation fault in this pass on float16 graphs; it only speeds up float32.
        disabled = [] if spec.precision == "fp32" else ["NchwcTransformer"]
        weights = _give_linked_weights(options, path)
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=[provider], disabled_optimizers=disabled)
        except Exception as error:  # onnxruntime raises its own classes for each way a file can be broken
            raise BundleError(f"{path}: ONNX Runtime cannot load it: {error}", hint="export the model again") from None
        del weights  # the session has copied them
        if kind not in {p.removesuffix("ExecutionProvider").lower() for p in self._session.get_providers()}:
            raise WsssError(
                f"{path}: asked for {device}, ONNX Runtime fell back to {self._session.get_providers()}",
                hint="check that the CUDA and cuDNN libraries that this onnxruntime-gpu needs are installed",
            )
        self._where = f"{path.parent.name}/{path.stem}"
        self.inputs, self.outputs, self.axes = contract(spec)
        self._check_contract(path)

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        check_feeds(self._where, self.inputs, self.axes, feeds)
        try:
            return self._run(feeds)
        except Exception as error:  # onnxruntime has no class for this error
            if any(text in str(error) for text in _OUT_OF_MEMORY):
                raise OutOfMemory(f"{self._where}: the {self._device} has no memory for this call") from None
            raise

    def _run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        binding = self._session.io_binding()
        # Referenced until the run has ended: onnxruntime 1.24 binds the memory of a contiguous copy without keeping the copy.
        values = {name: self._value(tensor) for name, tensor in feeds.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, self._device, self._number)
        self._session.run_with_iobinding(binding)
        return {name: OrtTensor(value) for name, value in zip(self.outputs, binding.get_outputs(), strict=True)}

    def _value(self, tensor: Tensor) -> onnxruntime.OrtValue:
        if isinstance(tensor, OrtTensor):
            return tensor.value
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tensor), self._device, self._number)

    def _check_contract(self, path: Path) -> None:
        for specs, nodes in ((self.inputs, self._session.get_inputs()), (self.outputs, self._session.get_outputs())):
            by_name = {node.name: node for node in nodes}
            if specs.keys() == by_name.keys() and all(_agree(spec, by_name[name]) for name, spec in specs.items()):
                continue
            graph = ", ".join(f"{node.name} {node.type}{node.shape}" for node in nodes)
            raise BundleError(
                f"{path}: the manifest says {', '.join(map(str, specs.values()))}; the graph has {graph}",
                hint="the manifest and the graph come from different exports; export the model again",
            )


def cuda_options(number: int) -> dict[str, str]:
    """The options of ONNX Runtime's CUDA provider for GPU ``number``."""
    return {
        "device_id": str(number),
        "use_tf32": os.environ.get(TF32, "0"),
        "cudnn_conv_algo_search": "HEURISTIC",  # EXHAUSTIVE, the default, searches again for every new shape
        "arena_extend_strategy": "kSameAsRequested",  # the default doubles the arena, of each graph
    }


def _give_linked_weights(options: onnxruntime.SessionOptions, path: Path) -> list[mmap.mmap]:
    """Pass the bytes of weights that are symbolic links, as in a hub's cache, because ONNX Runtime does not follow links that
    leave the folder."""
    links = {each.name for each in path.parent.iterdir() if each.is_symlink() and each.is_file() and each.stat().st_size}
    names = sorted(links & external_files(path)) if links else []
    buffers = []
    for name in names:
        with (path.parent / name).open("rb") as file:
            buffers.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    if names:
        options.add_external_initializers_from_files_in_memory(names, buffers, [len(each) for each in buffers])
    return buffers


def _agree(spec: TensorSpec, node: onnxruntime.NodeArg) -> bool:
    """Same dtype and rank, same fixed axes; a free axis of the contract must not be a number in the graph."""
    if np.dtype(_DTYPES.get(node.type, np.void)) != np.dtype(spec.dtype) or len(node.shape) != len(spec.shape):
        return False
    return all(not isinstance(length, int) or length == axis for axis, length in zip(spec.shape, node.shape, strict=True))
