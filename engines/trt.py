"""TensorRT and TensorRT-RTX as engines: one class for both, which differ in name and compilation.

Outputs of other engines, and tensors of libraries with ``__cuda_array_interface__``, are read in place. Host arrays are
copied through pinned memory. Outputs stay on the GPU, in memory that the next call overwrites.
"""

from __future__ import annotations

import importlib
import math
import threading
import weakref
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from ..batch import Tensor
from ..errors import BundleError, FeedError, WsssError
from ..extras import install_line
from ..spec import Flavour, GraphSpec, TensorSpec
from .buffers import Block, Cuda, Event, StagingBuffer, Stream
from .contexts import Contexts
from .engine import check_feeds, contract
from .plan import tensorrt_module
from .tensors import CudaTensor, ForeignTensor, foreign_tensor

ALIGNMENT = 256
"""Bytes. Alignment of ``cudaMalloc``, on which the kernels of a plan may rely; other tensors are copied first."""


def load_modules(flavour: Flavour) -> tuple[ModuleType, ModuleType]:
    """Import the library of a flavour and ``cuda.bindings.runtime``. Raises WsssError with the command that installs them."""
    try:
        runtime = importlib.import_module("cuda.bindings.runtime")
    except ModuleNotFoundError:
        raise WsssError(f"--engine {flavour}: needs the package cuda-bindings", hint=install_line(flavour)) from None
    except (ImportError, RuntimeError) as error:  # older versions load the driver on import
        raise WsssError(f"--engine {flavour}: cuda-bindings cannot be loaded: {error}") from None
    return tensorrt_module(flavour), runtime


class TrtEngine:
    """One plan in TensorRT.

    Args:
        plan: the plan file, which is native code and must have passed `plan.checked_plan`.
        spec: the graph's contract, with axes within the plan's profile.
        device: the GPU's number.
        cuda_graphs: replay calls with the same shapes and addresses as before.

    Raises:
        BundleError: TensorRT rejects the plan, or it has another contract.
        OutOfMemory: the GPU has no memory for it.
        WsssError: a package or the GPU is missing.
    """

    def __init__(self, plan: Path, spec: GraphSpec, *, flavour: Flavour, device: int = 0, cuda_graphs: bool = True) -> None:
        trt, runtime = load_modules(flavour)
        self.inputs, self.outputs, self.axes = contract(spec)
        self._where = f"{plan.parent.name}/{plan.stem}"
        self._lock = threading.Lock()
        self._staging: dict[str, StagingBuffer] = {}
        self._blocks: dict[str, Block] = {}
        with ExitStack() as opened:
            self._cuda = cuda = Cuda(runtime, device)
            opened.callback(cuda.close)
            self._stream = Stream(cuda)
            opened.callback(self._stream.close)
            self._done = Event(cuda)
            opened.callback(_free, self._staging, self._blocks)
            self._contexts = Contexts(
                trt,
                cuda,
                self._stream,
                plan,
                flavour=flavour,
                where=self._where,
                inputs=self.inputs,
                outputs=self.outputs,
                cuda_graphs=cuda_graphs,
            )
            opened.callback(self._contexts.close)
            self._check_contract(trt, plan)
            largest = self._contexts.output_shapes({name: self._largest(each) for name, each in self.inputs.items()})
            for name, shape in largest.items():
                self._blocks[name] = Block(cuda, _size_bytes(shape, self.outputs[name]))
            self._contexts.bind_outputs({name: block.address for name, block in self._blocks.items()})
            # Runs on close(), when the engine is collected, or at the end of the program.
            self._finalizer = weakref.finalize(self, _close, cuda, opened.pop_all())

    @property
    def copied(self) -> Mapping[str, int]:
        """Bytes copied so far by direction: ``host_to_device``, ``device_to_host``, ``device_to_device``."""
        return self._cuda.copied

    @property
    def cuda_graphs(self) -> int:
        """Number of captured CUDA graphs."""
        return len(self._contexts.graphs)

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self._finalizer.alive:
            raise RuntimeError(f"{self._where}: called after it was closed")
        self._cuda.use()
        tensors = {name: self._readable(name, tensor) for name, tensor in feeds.items()}
        check_feeds(self._where, self.inputs, self.axes, tensors)
        with self._lock:
            try:
                shapes = self._run(tensors)
            except BaseException:
                with suppress(WsssError):  # the first error is reported; work that was queued still runs
                    self._record_use(tensors)
                raise
            self._record_use(tensors)
            return {
                name: CudaTensor(self._blocks[name], shapes[name], np.dtype(self.outputs[name].dtype)) for name in self.outputs
            }

    def close(self) -> None:
        """Wait for queued work and free everything. Outputs become invalid, clones of them stay valid."""
        with self._lock:
            self._finalizer()

    def __enter__(self) -> TrtEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ---- one call ----

    def _readable(self, name: str, tensor: Any) -> np.ndarray | CudaTensor | ForeignTensor:
        if isinstance(tensor, CudaTensor):
            tensor.check()
            self._check_device(name, tensor.block.cuda.device)
            return tensor
        if isinstance(tensor, np.ndarray):
            return tensor
        if hasattr(tensor, "__cuda_array_interface__"):
            foreign = foreign_tensor(tensor, name)
            self._check_device(name, self._cuda.device_of(foreign.address))
            return foreign
        return np.asarray(tensor)

    def _check_device(self, name: str, device: int) -> None:
        if device != self._cuda.device:
            there = f"cuda:{device}" if device >= 0 else "the host"
            raise FeedError(f"{self._where}: {name!r} is on {there}, the engine runs on cuda:{self._cuda.device}")

    def _run(self, tensors: Mapping[str, np.ndarray | CudaTensor | ForeignTensor]) -> dict[str, tuple[int, ...]]:
        inputs = tuple((tuple(tensors[name].shape), self._address(name, tensors[name])) for name in self.inputs)
        for block in self._blocks.values():
            block.before_write(self._stream)
        return self._contexts.run(inputs)

    def _address(self, name: str, tensor: np.ndarray | CudaTensor | ForeignTensor) -> int:
        """The address of an input, copied if needed; the engine's stream waits until it is written."""
        if isinstance(tensor, np.ndarray):
            return self._staging_buffer(name).from_host(tensor, np.dtype(self.inputs[name].dtype), self._stream)
        if isinstance(tensor, CudaTensor):
            tensor.block.before_read(self._stream)
            address = tensor.block.address
        else:
            self._stream.wait_for(tensor.stream)
            address = tensor.address
        is_output = any(block.overlaps(address, tensor.size_bytes) for block in self._blocks.values())
        if is_output or address % ALIGNMENT:  # an output of this engine would be overwritten while it is read
            return self._staging_buffer(name).from_device(address, tensor.size_bytes, self._stream)
        return address

    def _record_use(self, tensors: Mapping[str, np.ndarray | CudaTensor | ForeignTensor]) -> None:
        """Make everything that overwrites an input or reads an output from now on wait for this call."""
        self._done.record(self._stream)
        for block in self._blocks.values():
            block.after_write(self._done)
        for tensor in tensors.values():
            if isinstance(tensor, ForeignTensor):
                self._cuda.call("cudaStreamWaitEvent", tensor.stream, self._done.handle, 0)
            elif isinstance(tensor, CudaTensor) and tensor.block not in self._blocks.values():
                tensor.block.after_read(self._done)
        for tensor in tensors.values():
            if isinstance(tensor, CudaTensor) and tensor.block not in self._blocks.values():
                tensor.check()  # again: another thread may have called its engine in the meantime

    def _staging_buffer(self, name: str) -> StagingBuffer:
        if name not in self._staging:
            spec = self.inputs[name]
            self._staging[name] = StagingBuffer(self._cuda, _size_bytes(self._largest(spec), spec))
        return self._staging[name]

    # ---- the contract ----

    def _largest(self, spec: TensorSpec) -> tuple[int, ...]:
        return tuple(axis if isinstance(axis, int) else self.axes[axis].max for axis in spec.shape)

    def _check_contract(self, trt: ModuleType, plan: Path) -> None:
        engine = self._contexts.engine
        found = {engine.get_tensor_name(number) for number in range(engine.num_io_tensors)}
        wrong = sorted(found ^ (self.inputs.keys() | self.outputs.keys()))
        for specs, mode in ((self.inputs, trt.TensorIOMode.INPUT), (self.outputs, trt.TensorIOMode.OUTPUT)):
            wrong += [str(spec) for name, spec in specs.items() if name in found and not self._agrees(trt, spec, mode)]
        if wrong:
            tensors = ", ".join(
                f"{name} {engine.get_tensor_dtype(name)}{tuple(engine.get_tensor_shape(name))}" for name in sorted(found)
            )
            raise BundleError(
                f"{plan}: the manifest and the engine differ in {', '.join(wrong)}; the engine has {tensors}",
                hint="they come from different exports; build the engine again",
            )

    def _agrees(self, trt: ModuleType, spec: TensorSpec, mode: Any) -> bool:
        engine, name = self._contexts.engine, spec.name
        dtypes = {"float32": "FLOAT", "float16": "HALF", "uint8": "UINT8", "int64": "INT64", "bool": "BOOL"}
        shape = tuple(engine.get_tensor_shape(name))
        if engine.get_tensor_mode(name) != mode or engine.get_tensor_dtype(name) != getattr(trt.DataType, dtypes[spec.dtype]):
            return False
        if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE or engine.is_shape_inference_io(name):
            return False  # a tensor on the host whose values set shapes, which no graph of a bundle has
        low = [axis if isinstance(axis, int) else self.axes[axis].min for axis in spec.shape]
        high = self._largest(spec)
        if len(shape) != len(low) or any(has != -1 and (a, b) != (has, has) for has, a, b in zip(shape, low, high, strict=True)):
            return False
        if mode == trt.TensorIOMode.INPUT and -1 in shape:
            least, _, most = engine.get_tensor_profile_shape(name, 0)
            return all(a <= b for a, b in zip(least, low, strict=True)) and all(a >= b for a, b in zip(most, high, strict=True))
        return True


def _size_bytes(shape: tuple[int, ...], spec: TensorSpec) -> int:
    return math.prod(shape) * np.dtype(spec.dtype).itemsize


def _free(*kinds: Mapping[str, Block] | Mapping[str, StagingBuffer]) -> None:
    for memory in kinds:
        for each in memory.values():
            each.free()


def _close(cuda: Cuda, opened: ExitStack) -> None:
    cuda.use()
    opened.close()
