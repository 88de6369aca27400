"""TensorRT and TensorRT-RTX as engines: one class for both, which differ in name and compilation.

Inputs are copied to memory of the engine, so that their addresses never change, which CUDA graphs need: outputs of other
engines, and tensors of libraries with ``__cuda_array_interface__``, on the GPU; host arrays through pinned memory. Free axes are
padded (`padding`), and outputs are cut accordingly. Outputs stay on the GPU, in memory that the next call overwrites.
"""

from __future__ import annotations

import importlib
import logging
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
from ..errors import BundleError, FeedError, OutOfMemory, WsssError
from ..extras import install_line
from ..spec import Flavour, GraphSpec, TensorSpec
from .buffers import Block, Cuda, Event, PinnedRing, StagingBuffer, Stream
from .contexts import Contexts
from .engine import check_feeds, contract
from .padding import FILL, padded_length
from .plan import tensorrt_module
from .tensors import CudaTensor, ForeignTensor, foreign_tensor, new_tensor

log = logging.getLogger(__name__)


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

    It takes memory for its weights, and for inputs and outputs of its largest call. Activations lie in memory that all engines
    of the GPU share, as large as the largest call so far needs (`arena`).

    Args:
        plan: the plan file, which is native code and must have passed `plan.checked_plan`.
        spec: the graph's contract, with axes within the plan's profile.
        device: the GPU's number.
        cuda_graphs: replay calls with the same shapes as before.

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
        self._pads = True  # until a call fits in memory only without padding
        with ExitStack() as opened:
            self._cuda = cuda = Cuda(runtime, device)
            opened.callback(cuda.close)
            self._stream = Stream(cuda)
            opened.callback(self._stream.close)
            self._done = Event(cuda)
            opened.callback(_free, self._staging, self._blocks)
            self._uploads = PinnedRing(cuda, 4, 1 << 16)
            opened.callback(self._uploads.free)
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
            inputs = {name: self._largest(each) for name, each in self.inputs.items()}
            for name, shape in inputs.items():
                self._staging[name] = StagingBuffer(cuda, _size_bytes(shape, self.inputs[name]))
            for name, shape in self._contexts.output_shapes(inputs).items():
                self._blocks[name] = Block(cuda, _size_bytes(shape, self.outputs[name]))
            blocks = {name: buffer.block for name, buffer in self._staging.items()} | self._blocks
            self._contexts.bind({name: block.address for name, block in blocks.items()})
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
        self._use()
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
            return self._cut(shapes, tensors)

    def upload(self, array: np.ndarray) -> CudaTensor:
        """A copy of an array on the GPU, for several calls. The host does not wait for it."""
        self._use()
        with self._lock:
            tensor = new_tensor(self._cuda, self._stream, array.shape, array.dtype)
            self._uploads.send(array, array.dtype, tensor.address, self._stream)
            written = Event(self._cuda)
            written.record(self._stream)
            tensor.block.after_write(written)
            return tensor

    def close(self) -> None:
        """Wait for queued work and free everything. Outputs become invalid, clones of them stay valid."""
        with self._lock:
            self._finalizer()

    def __enter__(self) -> TrtEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ---- one call ----

    def _use(self) -> None:
        if not self._finalizer.alive:
            raise RuntimeError(f"{self._where}: called after it was closed")
        self._cuda.use()

    def _readable(self, name: str, tensor: Any) -> np.ndarray | CudaTensor | ForeignTensor:
        if isinstance(tensor, CudaTensor) and not tensor.is_contiguous:
            return np.asarray(tensor)
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
        inputs = tuple(self._stage(name, tensors) for name in self.inputs)
        for block in self._blocks.values():
            block.before_write(self._stream)
        try:
            return self._contexts.run(inputs)
        except OutOfMemory as error:
            if inputs == tuple(tensors[name].shape for name in self.inputs):
                raise
            log.warning("%s: pads its inputs no more: %s", self._where, error.message)
        self._pads = False
        return self._run(tensors)

    def _stage(self, name: str, tensors: Mapping[str, np.ndarray | CudaTensor | ForeignTensor]) -> tuple[int, ...]:
        """Queue the copy of an input to where the graph reads it, padded, and return its padded shape."""
        tensor, buffer, fill = tensors[name], self._staging[name], FILL.get(name, 0)
        lengths = {axis: self._padded(axis, length, tensors) for axis, length in self._axes_of(name, tensor.shape).items()}
        shape = tuple(axis if isinstance(axis, int) else lengths[axis] for axis in self.inputs[name].shape)
        if isinstance(tensor, np.ndarray):
            buffer.from_host(tensor, np.dtype(self.inputs[name].dtype), self._stream, shape, fill)
            return shape
        padded_bytes, source = _size_bytes(shape, self.inputs[name]), None
        if isinstance(tensor, CudaTensor):
            tensor.block.before_read(self._stream)
            if not tensor.block.is_lent:
                source = tensor.block, tensor.version, tensor.address, tensor.size_bytes, padded_bytes
        else:
            self._stream.wait_for(tensor.stream)
        buffer.from_device(tensor.address, tensor.size_bytes, self._stream, padded_bytes, fill, source)
        return shape

    def _cut(
        self, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, np.ndarray | CudaTensor | ForeignTensor]
    ) -> dict[str, Tensor]:
        """The outputs, of these padded shapes, without what belongs to the padding of the inputs."""
        lengths: dict[int | str, int] = {}
        for name in self.inputs:
            lengths.update(self._axes_of(name, tensors[name].shape))
        cut = {
            name: tuple(lengths.get(axis, length) for axis, length in zip(spec.shape, shapes[name], strict=True))
            for name, spec in self.outputs.items()
        }
        return {
            name: CudaTensor(self._blocks[name], cut[name], np.dtype(spec.dtype), shapes[name])
            for name, spec in self.outputs.items()
        }

    def _padded(self, axis: str, length: int, tensors: Mapping[str, np.ndarray | CudaTensor | ForeignTensor]) -> int:
        """The padded length of an axis. A tensor on the GPU is only padded at its end, that is, along its first axis."""
        if not self._pads:
            return length
        if any(not isinstance(tensors[name], np.ndarray) and axis in spec.shape[1:] for name, spec in self.inputs.items()):
            return length
        return padded_length(axis, length, self.axes)

    def _axes_of(self, name: str, shape: tuple[int, ...]) -> dict[str, int]:
        """The free axes of an input and their lengths."""
        return {axis: length for axis, length in zip(self.inputs[name].shape, shape, strict=True) if isinstance(axis, str)}

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
