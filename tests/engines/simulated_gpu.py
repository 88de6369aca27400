"""The part of CUDA and TensorRT that the engine uses, on the host, built to punish.

Memory: a "device address" is a number that no host code can follow; new memory is full of rubbish, freed memory faults.
Order: a stream is a queue of which nothing runs until something makes it run. Synchronizing runs that stream alone, and of
others just as much as its waits ask for: whoever forgot to wait reads rubbish or is overwritten. ``shuffle`` runs random
streams a little at every call instead, always in an order that a GPU might choose.
Graphs: a capture records what would have been queued, with the pointers of that moment. As TensorRT warns, a graph whose
context was touched or released since computes rubbish.
Networks are numpy functions; what they compute passes through the context's activation memory, as it would.
"""

from __future__ import annotations

import ctypes
import math
import random
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

from wsss.spec import AxisRange, TensorSpec

Recorded = tuple[Callable[[], None], list[int] | None]
RUBBISH = 0xA5
LEGACY = 1


class Status(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorInvalidResourceHandle = 400
    cudaErrorNotReady = 600
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class Refusal(Exception):
    """Ends a call with this status."""


@dataclass(eq=False)
class Mark:
    """A point in a stream."""

    stream: Stream | None
    done: bool = False


@dataclass(eq=False)
class Stream:
    handle: int
    device: int
    queue: deque[Callable[[], None] | tuple[str, Mark]] = field(default_factory=deque)
    capture: list[Recorded] | None = None
    capturing_thread: int = 0
    broken: bool = False


@dataclass
class Network:
    """What a plan computes: ``function`` from arrays by input name to arrays by output name."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: Mapping[str, AxisRange]
    function: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
    allocates: bool = False
    """It allocates while it is enqueued: a capture does not survive that."""
    refuses: bool = False
    """It is not enqueued in a capture."""
    weights_fit: bool = True
    activations_bytes: int = 1 << 16
    """Of the largest call."""
    activations_of: Callable[[Mapping[str, tuple[int, ...]]], int] | None = None
    """Of a call with these shapes of inputs; None: each needs those of the largest."""
    context_bytes: int = 0
    """GPU memory of each execution context, without activations."""


class Gpu:
    """One machine with GPUs: ``runtime`` and ``tensorrt`` stand for the modules.

    Args:
        devices: how many.
        memory_bytes: of each; more is refused.
        shuffle: seed of a random order; None for the laziest.
        rtx: TensorRT-RTX's additions are there.
    """

    def __init__(self, *, devices: int = 1, memory_bytes: int = 1 << 30, shuffle: int | None = None, rtx: bool = False) -> None:
        self.devices, self.memory_bytes, self.rtx = devices, memory_bytes, rtx
        self.random = None if shuffle is None else random.Random(shuffle)
        self.plans: dict[bytes, Network] = {}
        self.memory: dict[int, np.ndarray] = {}
        self.device_at: dict[int, int] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.streams: dict[int, Stream] = {LEGACY: Stream(LEGACY, 0)}
        self.events: dict[int, tuple[int, Mark]] = {}
        self.graphs: dict[int, list[Recorded]] = {}
        self.executables: dict[int, list[Recorded]] = {}
        self.calls: list[str] = []
        """Names of the calls so far."""
        self.fail: dict[str, Status] = {}
        """Calls that fail from now on, by name."""
        self.released: list[str] = []
        self.plugins = False
        """TensorRT's objects in the order of their release."""
        self.compiled: set[str] = set()
        self.host_waits = 0
        """How often the host had to wait."""
        self.faults: list[str] = []
        """What would crash a real GPU, sooner or later."""
        self.last_error = Status.cudaSuccess
        self._next = 0x7_0000_0000_0000
        self._handle = 1000
        self._thread = threading.local()
        self.runtime: Any = Runtime(self)
        self.tensorrt: Any = tensorrt_of(self)

    # ---- running ----

    def step(self, stream: Stream) -> None:
        """Runs the first thing in a stream, and what it waits for."""
        first = stream.queue[0]
        if isinstance(first, tuple):
            kind, mark = first
            if kind == "wait":
                self.reach(mark)
                if not stream.queue or stream.queue[0] is not first:
                    return
            else:
                mark.done = True
            stream.queue.popleft()
        else:
            stream.queue.popleft()
            first()

    def reach(self, mark: Mark) -> None:
        while not mark.done:
            assert mark.stream is not None
            self.step(mark.stream)

    def finish(self, stream: Stream) -> None:
        while stream.queue:
            self.step(stream)

    def drift(self) -> None:
        """Time passes: with ``shuffle``, some streams get on with what they can do without waiting."""
        if self.random is None:
            return
        for _ in range(self.random.randrange(4)):
            ready = [s for s in self.streams.values() if s.queue and not self.is_blocked(s)]
            if ready:
                self.step(self.random.choice(ready))

    @staticmethod
    def is_blocked(stream: Stream) -> bool:
        first = stream.queue[0]
        return isinstance(first, tuple) and first[0] == "wait" and not first[1].done

    def put(self, handle: int, work: Callable[[], None], running: list[int] | None = None) -> None:
        """Queues work, or records it; ``running`` counts what its context has queued."""
        stream = self.stream(handle)
        if stream.capture is not None:
            stream.capture.append((work, running))
            return
        if running is None:
            stream.queue.append(work)
            return
        running[0] += 1

        def counted() -> None:
            running[0] -= 1
            work()

        stream.queue.append(counted)

    # ---- memory ----

    def bytes_at(self, address: int, size: int) -> np.ndarray:
        """Memory, device or pinned, by its address."""
        for memory in (self.memory, self.pinned):
            for base, data in memory.items():
                if base <= address and address + size <= base + len(data):
                    return data[address - base : address - base + size]
        raise AssertionError(f"illegal address {address:#x}, {size} bytes")

    def stream(self, handle: Any) -> Stream:
        stream = self.streams.get(int(handle))
        if stream is None or stream.device != self.current:
            raise Refusal(Status.cudaErrorInvalidResourceHandle)
        return stream

    def handle(self) -> int:
        self._handle += 1
        return self._handle

    @property
    def current(self) -> int:
        """The calling thread's GPU."""
        return getattr(self._thread, "device", 0)

    def capturing_here(self) -> list[Stream]:
        here = threading.get_ident()
        return [s for s in self.streams.values() if s.capture is not None and s.capturing_thread == here]

    def unsafe(self) -> None:
        """A call that a thread-local capture does not survive."""
        if broken := self.capturing_here():
            for stream in broken:
                stream.broken = True
            raise Refusal(Status.cudaErrorStreamCaptureUnsupported)

    def used_bytes(self, device: int) -> int:
        return sum(len(data) for base, data in self.memory.items() if self.device_at[base] == device)


class Runtime:
    """``cuda.bindings.runtime``: functions return a tuple that begins with a status."""

    cudaStreamNonBlocking = 1
    cudaEventDisableTiming = 2
    cudaEventBlockingSync = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    cudaStreamCaptureMode = SimpleNamespace(
        cudaStreamCaptureModeGlobal=0, cudaStreamCaptureModeThreadLocal=1, cudaStreamCaptureModeRelaxed=2
    )
    cudaMemoryType = SimpleNamespace(
        cudaMemoryTypeUnregistered=0, cudaMemoryTypeHost=1, cudaMemoryTypeDevice=2, cudaMemoryTypeManaged=3
    )

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        function = getattr(Calls, name)
        gpu, bare = self._gpu, function.__annotations__["return"] == "None"

        def call(*args: Any) -> tuple[Any, ...]:
            gpu.calls.append(name)
            gpu.drift()
            try:
                if name in gpu.fail:
                    raise Refusal(gpu.fail[name])
                value = function(gpu, *args)
            except Refusal as refusal:
                (status,) = refusal.args
                if status != Status.cudaErrorNotReady:
                    gpu.last_error = status
                return (status,) if bare else (status, None)
            return (Status.cudaSuccess,) if bare else (Status.cudaSuccess, value)

        return call


class Calls:
    """One function a call; what it returns comes after the status."""

    @staticmethod
    def cudaGetDeviceCount(gpu: Gpu) -> int:
        if not gpu.devices:
            raise Refusal(Status.cudaErrorInsufficientDriver)
        return gpu.devices

    @staticmethod
    def cudaSetDevice(gpu: Gpu, device: int) -> None:
        gpu._thread.device = device

    @staticmethod
    def cudaGetLastError(gpu: Gpu) -> None:
        gpu.last_error = Status.cudaSuccess

    @staticmethod
    def cudaGetErrorName(gpu: Gpu, status: Status) -> bytes:
        return Status(status).name.encode()

    @staticmethod
    def cudaGetErrorString(gpu: Gpu, status: Status) -> bytes:
        return b"said by the simulation"

    @staticmethod
    def cudaMalloc(gpu: Gpu, size: int) -> int:
        gpu.unsafe()
        assert size > 0
        if gpu.used_bytes(gpu.current) + size > gpu.memory_bytes:
            raise Refusal(Status.cudaErrorMemoryAllocation)
        address = gpu._next
        gpu._next += (size + 0xFFFF) & ~0xFFFF
        gpu.memory[address] = np.full(size, RUBBISH, np.uint8)
        gpu.device_at[address] = gpu.current
        return address

    @staticmethod
    def cudaFree(gpu: Gpu, address: int) -> None:
        gpu.unsafe()
        for stream in gpu.streams.values():
            gpu.finish(stream)
        if gpu.memory.pop(address, None) is None:
            raise Refusal(Status.cudaErrorInvalidValue)

    @staticmethod
    def cudaHostAlloc(gpu: Gpu, size: int, flags: int) -> int:
        gpu.unsafe()
        data = np.full(size, RUBBISH, np.uint8)
        gpu.pinned[data.ctypes.data] = data
        return data.ctypes.data

    @staticmethod
    def cudaFreeHost(gpu: Gpu, address: int) -> None:
        gpu.unsafe()
        for stream in gpu.streams.values():
            gpu.finish(stream)
        del gpu.pinned[address]

    @staticmethod
    def cudaPointerGetAttributes(gpu: Gpu, address: int) -> SimpleNamespace:
        for base, data in gpu.memory.items():
            if base <= address < base + len(data):
                return SimpleNamespace(type=2, device=gpu.device_at[base])
        return SimpleNamespace(type=0, device=-2)

    @staticmethod
    def cudaMemcpyAsync(gpu: Gpu, target: int, source: int, size: int, kind: int, stream: Any) -> None:
        on_host = {1: (False, True), 2: (True, False), 3: (False, False)}[kind]
        assert tuple(any(base <= a < base + len(d) for base, d in gpu.pinned.items()) for a in (target, source)) == on_host

        def copy() -> None:
            gpu.bytes_at(target, size)[:] = gpu.bytes_at(source, size)

        gpu.put(stream, copy)

    @staticmethod
    def cudaMemsetAsync(gpu: Gpu, target: int, byte: int, size: int, stream: Any) -> None:
        assert 0 <= byte < 256 and size > 0

        def fill() -> None:
            gpu.bytes_at(target, size)[:] = byte

        gpu.put(stream, fill)

    @staticmethod
    def cudaStreamCreateWithFlags(gpu: Gpu, flags: int) -> int:
        assert flags == Runtime.cudaStreamNonBlocking
        handle = gpu.handle()
        gpu.streams[handle] = Stream(handle, gpu.current)
        return handle

    @staticmethod
    def cudaStreamDestroy(gpu: Gpu, stream: int) -> None:
        gpu.stream(stream)
        del gpu.streams[stream]

    @staticmethod
    def cudaStreamSynchronize(gpu: Gpu, stream: int) -> None:
        if gpu.stream(stream).capture is not None:
            gpu.unsafe()
        gpu.finish(gpu.stream(stream))

    @staticmethod
    def cudaEventCreateWithFlags(gpu: Gpu, flags: int) -> int:
        handle = gpu.handle()
        gpu.events[handle] = gpu.current, Mark(None, done=True)
        return handle

    @staticmethod
    def cudaEventRecord(gpu: Gpu, event: int, stream: int) -> None:
        into = gpu.stream(stream)
        if gpu.events[event][0] != into.device:
            raise Refusal(Status.cudaErrorInvalidResourceHandle)
        assert into.capture is None
        mark = Mark(into)
        gpu.events[event] = into.device, mark
        into.queue.append(("record", mark))

    @staticmethod
    def cudaStreamWaitEvent(gpu: Gpu, stream: int, event: int, flags: int) -> None:
        gpu.stream(stream).queue.append(("wait", gpu.events[event][1]))

    @staticmethod
    def cudaEventSynchronize(gpu: Gpu, event: int) -> None:
        gpu.unsafe()
        gpu.host_waits += not gpu.events[event][1].done
        gpu.reach(gpu.events[event][1])

    @staticmethod
    def cudaEventQuery(gpu: Gpu, event: int) -> None:
        gpu.unsafe()
        if not gpu.events[event][1].done:
            raise Refusal(Status.cudaErrorNotReady)

    @staticmethod
    def cudaEventDestroy(gpu: Gpu, event: int) -> None:
        del gpu.events[event]

    @staticmethod
    def cudaStreamBeginCapture(gpu: Gpu, stream: int, mode: int) -> None:
        assert mode == Runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        into = gpu.stream(stream)
        into.capture, into.broken, into.capturing_thread = [], False, threading.get_ident()

    @staticmethod
    def cudaStreamEndCapture(gpu: Gpu, stream: int) -> int:
        into = gpu.stream(stream)
        assert into.capture is not None
        recorded, into.capture = into.capture, None
        if into.broken:
            raise Refusal(Status.cudaErrorStreamCaptureInvalidated)
        handle = gpu.handle()
        gpu.graphs[handle] = recorded
        return handle

    @staticmethod
    def cudaGraphInstantiate(gpu: Gpu, graph: int, flags: int) -> int:
        handle = gpu.handle()
        gpu.executables[handle] = list(gpu.graphs[graph])
        return handle

    @staticmethod
    def cudaGraphDestroy(gpu: Gpu, graph: int) -> None:
        del gpu.graphs[graph]

    @staticmethod
    def cudaGraphLaunch(gpu: Gpu, executable: int, stream: int) -> None:
        for work, running in gpu.executables[executable]:
            gpu.put(stream, work, running)

    @staticmethod
    def cudaGraphExecDestroy(gpu: Gpu, executable: int) -> None:
        del gpu.executables[executable]


# ---- TensorRT ----


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


def tensorrt_of(gpu: Gpu) -> SimpleNamespace:
    """The module, bound to one machine."""

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = Severity

    class TensorRuntime:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, data: bytes) -> Any:
            network = gpu.plans.get(bytes(data))
            if network is None:
                self._logger.log(Severity.ERROR, "header.magicTag == kEXPECTED_MAGIC_TAG failed\nat runtime.cpp:48")
                return None
            if not network.weights_fit:
                self._logger.log(Severity.ERROR, "Error Code 1: Cuda Runtime (out of memory)")
                return None
            if not (gpu.plugins or gpu.rtx):
                self._logger.log(Severity.ERROR, "a plan may call plugins, and none are registered")
                return None
            return Engine(gpu, network, self._logger)

        def __del__(self) -> None:
            gpu.released.append("runtime")

    names = ["FLOAT", "HALF", "UINT8", "INT64", "BOOL", "INT32"]
    return SimpleNamespace(
        __version__="11.0",
        ILogger=ILogger,
        Runtime=TensorRuntime,
        init_libnvinfer_plugins=lambda logger, namespace: setattr(gpu, "plugins", True),
        DataType=SimpleNamespace(**{name: name for name in names}),
        TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
        TensorLocation=SimpleNamespace(DEVICE="device", HOST="host"),
        ExecutionContextAllocationStrategy=SimpleNamespace(STATIC="static", USER_MANAGED="user"),
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(LAZY="lazy", EAGER="eager", NONE="none"),
    )


DTYPES = {"float32": "FLOAT", "float16": "HALF", "uint8": "UINT8", "int64": "INT64", "bool": "BOOL"}


class Engine:
    def __init__(self, gpu: Gpu, network: Network, logger: Any) -> None:
        self._gpu, self._network, self._logger = gpu, network, logger
        self._tensors = {each.name: each for each in (*network.inputs, *network.outputs)}
        self.device_memory_size_v2 = network.activations_bytes

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, number: int) -> str:
        return list(self._tensors)[number]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if any(name == each.name for each in self._network.inputs) else "out"

    def get_tensor_dtype(self, name: str) -> str:
        return DTYPES[self._tensors[name].dtype]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(axis if isinstance(axis, int) else -1 for axis in self._tensors[name].shape)

    def get_tensor_location(self, name: str) -> str:
        return "device"

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        shape = self._tensors[name].shape
        return [
            tuple(axis if isinstance(axis, int) else getattr(self._network.axes[axis], kind) for axis in shape)
            for kind in ("min", "opt", "max")
        ]

    def create_runtime_config(self) -> Any:
        assert self._gpu.rtx, "TensorRT-RTX only"
        return RuntimeConfig(self._gpu)

    def create_execution_context(self, config: Any) -> Any:
        own = 0
        if self._network.context_bytes:
            status, own = self._gpu.runtime.cudaMalloc(self._network.context_bytes)
            self._gpu.last_error = Status.cudaSuccess
            if status != Status.cudaSuccess:
                self._logger.log(Severity.ERROR, "Error Code 2: OutOfMemory (Requested size was 9 bytes.)")
                return None
        if self._gpu.rtx:
            assert isinstance(config, RuntimeConfig) and config.allocation == "user" and config.cache is not None
            return RtxContext(self._gpu, self._network, self._logger, own, config)
        assert config == "user"
        return Context(self._gpu, self._network, self._logger, own)

    def __del__(self) -> None:
        self._gpu.released.append("engine")


class RuntimeConfig:
    def __init__(self, gpu: Gpu) -> None:
        self._gpu, self.cache, self.allocation = gpu, None, "static"
        self.dynamic_shapes_kernel_specialization_strategy = "lazy"

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.allocation = strategy

    def create_runtime_cache(self) -> Any:
        return RuntimeCache()

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = cache
        return True


class RuntimeCache:
    """``kernels`` is what was compiled, one word a shape."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def serialize(self) -> Any:
        return memoryview(" ".join(sorted(self.kernels)).encode())

    def deserialize(self, data: bytes) -> bool:
        words = set(data.decode().split())
        if "other-gpu" in words:
            return False
        self.kernels = words
        return True


class Context:
    def __init__(self, gpu: Gpu, network: Network, logger: Any, own: int) -> None:
        self._gpu, self._network, self._logger, self._own = gpu, network, logger, own
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory = (0, 0)
        self._needed = network.activations_bytes
        self._warm = False
        self.state = [0]  # shared with what was captured from it
        self.general = False
        self._running = [0]

    def update_device_memory_size_for_shapes(self) -> int:
        assert self._shapes.keys() == {each.name for each in self._network.inputs}
        if self._network.activations_of is not None:
            self._needed = self._network.activations_of(self._shapes)
        return self._needed

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self._needed and address % 256 == 0
        self._memory = address, size
        self.state[0] += 1

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        spec = next(each for each in self._network.inputs if each.name == name)
        for axis, length in zip(spec.shape, shape, strict=True):
            fits = (
                length == axis
                if isinstance(axis, int)
                else self._network.axes[axis].min <= length <= self._network.axes[axis].max
            )
            if not fits:
                self._logger.log(Severity.ERROR, f"shape {shape} of {name} is outside of the profile")
                return False
        if self._shapes.get(name) != shape:
            self._shapes[name], self._warm, self._needed = shape, False, self._network.activations_bytes
        self.state[0] += 1
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if address % 256:
            self._logger.log(Severity.ERROR, f"address of {name} is not aligned")
            return False
        self._addresses[name] = address
        self.state[0] += 1
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        lengths = {
            axis: length
            for spec in self._network.inputs
            for axis, length in zip(spec.shape, self._shapes.get(spec.name, ()), strict=False)
        }
        spec = next(each for each in self._network.outputs if each.name == name)
        return tuple(axis if isinstance(axis, int) else lengths.get(axis, -1) for axis in spec.shape)

    def execute_async_v3(self, stream: int) -> bool:
        gpu, network = self._gpu, self._network
        gpu.calls.append("execute_async_v3")
        gpu.drift()
        capturing = gpu.stream(stream).capture is not None
        if capturing and (not self._warm or network.allocates or network.refuses):
            self._logger.log(Severity.ERROR, "operation not permitted when stream is capturing")
            gpu.stream(stream).broken = network.allocates
            return False
        tensors = (*network.inputs, *network.outputs)
        if self._addresses.keys() != {each.name for each in tensors} or self._memory[1] < self._needed or gpu.last_error:
            self._logger.log(Severity.ERROR, f"not ready: {sorted(self._addresses)}, {self._memory}, {gpu.last_error!r}")
            return False
        shapes = {each.name: self._shapes.get(each.name) or self.get_tensor_shape(each.name) for each in tensors}
        addresses, activations, needed = dict(self._addresses), self._memory[0], self._needed
        state, expected, stale = self.state, self.state[0], self.general and capturing

        def array(spec: TensorSpec) -> np.ndarray:
            dtype = np.dtype(spec.dtype)
            data = gpu.bytes_at(addresses[spec.name], math.prod(shapes[spec.name]) * dtype.itemsize)
            return data.view(dtype).reshape(shapes[spec.name])

        def compute() -> None:
            answers = network.function({each.name: array(each).copy() for each in network.inputs})
            data = b"".join(np.ascontiguousarray(answers[each.name]).astype(each.dtype).tobytes() for each in network.outputs)
            assert len(data) <= needed, "a simulated network needs more activation memory"
            if capturing and (stale or state[0] != expected):
                data = bytes([RUBBISH]) * len(data)
            gpu.bytes_at(activations, len(data))[:] = np.frombuffer(data, np.uint8)

        def write() -> None:
            start = activations
            for each in network.outputs:
                size = array(each).nbytes
                gpu.bytes_at(addresses[each.name], size)[:] = gpu.bytes_at(start, size)
                start += size

        gpu.put(stream, compute, self._running)
        gpu.put(stream, write, self._running)
        self._warm = True
        return True

    def __del__(self) -> None:
        self.state[0] += 1
        if self._running[0]:
            self._gpu.faults.append("a context was released while it ran")
        if self._own:
            del self._gpu.memory[self._own]
        self._gpu.released.append("context")


class RtxContext(Context):
    """Compiles kernels for new shapes: before the run, or in the background while general ones run."""

    def __init__(self, gpu: Gpu, network: Network, logger: Any, own: int, config: RuntimeConfig) -> None:
        super().__init__(gpu, network, logger, own)
        self._cache = config.cache
        self.general = config.dynamic_shapes_kernel_specialization_strategy == "lazy"

    def is_stream_capturable(self, stream: int) -> bool:
        assert isinstance(stream, int)
        return not self._network.allocates

    def execute_async_v3(self, stream: int) -> bool:
        kernel = "x".join(str(shape) for shape in self._shapes.values()).replace(" ", "")
        if kernel not in self._cache.kernels:
            self._gpu.compiled.add(kernel)
            self._cache.kernels.add(kernel)
        return super().execute_async_v3(stream)


# ---- another library on the same GPU ----


class Foreign:
    """A tensor of a library that computes in a stream of its own; its values come when that stream gets there.

    Args:
        stream: what the interface says; ``...`` leaves it out, as version 2 does.
        offset: bytes between the start of its memory and the tensor.
    """

    def __init__(self, gpu: Gpu, values: np.ndarray, *, stream: Any = None, runs_in: int = LEGACY, offset: int = 0) -> None:
        self.gpu, self.stream, self.runs_in, self.offset = gpu, stream, runs_in, offset
        self.shape, self.dtype = values.shape, values.dtype
        self.strides: tuple[int, ...] | None = None
        self.address = gpu.runtime.cudaMalloc(values.nbytes + offset)[1]
        self.write(values)

    def write(self, values: np.ndarray) -> None:
        """Queues the writing of new values in place."""
        values = np.ascontiguousarray(values).copy()
        where = self.address + self.offset

        def work() -> None:
            self.gpu.bytes_at(where, values.nbytes)[:] = values.reshape(-1).view(np.uint8)

        self.gpu.put(self.runs_in, work)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        interface = {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address + self.offset, False),
            "strides": self.strides,
            "version": 3,
            "stream": self.stream,
        }
        if self.stream is ...:
            del interface["stream"]
        return interface


def read_by_library(gpu: Gpu, tensor: Any, *, stream: int = LEGACY) -> np.ndarray:
    """An array that another library fills from a tensor's interface, in its stream, when that gets there."""
    interface = tensor.__cuda_array_interface__
    result = np.zeros(interface["shape"], np.dtype(interface["typestr"]))
    if interface["stream"] not in (None, stream):
        event = gpu.runtime.cudaEventCreateWithFlags(0)[1]
        gpu.runtime.cudaEventRecord(event, interface["stream"])
        gpu.runtime.cudaStreamWaitEvent(stream, event, 0)

    def work() -> None:
        data = gpu.bytes_at(interface["data"][0], result.nbytes)
        ctypes.memmove(result.ctypes.data, data.ctypes.data, result.nbytes)

    gpu.put(stream, work)
    return result
