"""TensorRT's execution contexts for one plan: calls are enqueued, or captured as a CUDA graph and replayed.

Enqueuing a network costs the host one launch per kernel, a replay one launch in total. A CUDA graph contains the shapes and
addresses with which it was captured. Shapes are its key. Addresses are always the same, because inputs are copied to fixed
memory; that of the activations changes where the arena grows, which ends all graphs. A graph also contains the state of its
execution context, so a captured context is never used again otherwise (TensorRT's developer guide, "CUDA Graphs").
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import BundleError, OutOfMemory, WsssError
from ..spec import Flavour
from .arena import shared_arena
from .buffers import Cuda, Event, Stream, no_garbage_collection
from .kernel_cache import cache_beside, load_kernels, save_kernels

log = logging.getLogger(__name__)

Shape = tuple[int, ...]
Inputs = tuple[Shape, ...]
"""Shape of every input, in the order of the engine's names."""

MAX_GRAPHS = 16
"""Most CUDA graphs of one engine. Each needs its own context: TensorRT's memory besides weights and activations."""
CREDIT = 8
"""Number of new inputs after which an unused graph may be replaced."""
SAVE_SECONDS = 120.0
"""Least time between two saves of compiled kernels while an engine is in use, so that a run that is killed loses few."""
MAX_SEEN = 256
"""Most inputs that are remembered after their first call."""


@dataclass(slots=True)
class Captured:
    """A captured CUDA graph."""

    executable: Any
    """None if the context could not be captured."""
    context: Any
    shapes: dict[str, Shape]
    """Of the outputs."""
    credit: int = CREDIT


class Contexts:
    """A deserialized plan that computes in one stream.

    Args:
        trt: ``tensorrt`` or ``tensorrt_rtx``.
        inputs, outputs: names.
        cuda_graphs: replay calls with the same shapes as before.

    Raises:
        BundleError: TensorRT rejects the plan; includes its message.
        OutOfMemory: the GPU has no memory for the weights.
    """

    def __init__(
        self,
        trt: ModuleType,
        cuda: Cuda,
        stream: Stream,
        plan: Path,
        *,
        flavour: Flavour,
        where: str,
        inputs: Iterable[str],
        outputs: Iterable[str],
        cuda_graphs: bool,
    ) -> None:
        self._trt, self._cuda, self._stream, self._where = trt, cuda, stream, where
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        self.cuda_graphs = cuda_graphs
        """Whether graphs are captured; becomes False if TensorRT or CUDA does not allow it."""
        self.graphs: OrderedDict[Inputs, Captured] = OrderedDict()
        """Captured so far, the most recently used last."""
        self._max_graphs = MAX_GRAPHS
        self._retired: list[tuple[Event, Captured]] = []
        self._seen: OrderedDict[Inputs, int] = OrderedDict()
        self._addresses: Mapping[str, int] = {}
        self._cache_file = cache_beside(plan)
        self._logger = _logger(trt)
        self.engine: Any = None
        self._cache: Any = None
        self._saved_at = time.monotonic()
        self._may_have_compiled = False
        self._configs: dict[bool, Any] = {}
        self._context: Any = None
        if flavour == "trt":
            trt.init_libnvinfer_plugins(self._logger, "")  # a plan may use one (`export.deformable_plugin`)
        self._runtime = trt.Runtime(self._logger)
        self._arena = shared_arena(cuda)
        self._generation = self._arena.generation
        try:
            self.engine = self._deserialized(plan)
            if flavour == "trt-rtx":
                self._configure()
            self._context = self._new_context(fixed=False)
        except BaseException:
            self._release()
            raise

    def output_shapes(self, inputs: Mapping[str, Shape]) -> dict[str, Shape]:
        """Output shapes for given input shapes. Raises WsssError if they depend on values of inputs."""
        self._set_shapes(self._context, inputs)
        return self._shapes(self._context)

    def bind(self, addresses: Mapping[str, int]) -> None:
        """Set the addresses of all inputs and outputs, for all runs."""
        self._addresses = addresses
        self._bind(self._context)

    def run(self, inputs: Inputs) -> dict[str, Shape]:
        """Queue one run and return the shapes of its outputs.

        The first run with given shapes is enqueued, as TensorRT requires before a capture. The second is enqueued, then
        captured. From the third on, the graph is replayed. Graphs are an extra: without memory for them, runs are enqueued.

        Raises:
            OutOfMemory: the GPU has no memory for the activations of these shapes.
        """
        self._destroy_retired()
        with self._arena.turn(self._stream):
            shapes = self._run(inputs)
        if self._may_have_compiled and time.monotonic() >= self._saved_at + SAVE_SECONDS:
            self._save_kernels()
        return shapes

    def _run(self, inputs: Inputs) -> dict[str, Shape]:
        self._retire_outdated()
        if (graph := self.graphs.get(inputs)) is not None:
            self.graphs.move_to_end(inputs)
            graph.credit = CREDIT
            self._cuda.call("cudaGraphLaunch", graph.executable, self._stream.handle)
            return graph.shapes
        context = self._extra_context() if self._is_worth_a_graph(inputs) else None
        if context is None:
            return self._enqueue(self._context, inputs)
        self._bind(context)
        try:
            shapes = self._enqueue(context, inputs)
        except OutOfMemory as error:
            self._disable_graphs(error.message)
            return self._enqueue(self._context, inputs)
        captured = Captured(self._capture(context), context, shapes)
        if captured.executable is None:
            self._retire(captured)
        else:
            self.graphs[inputs] = captured
        return shapes

    def close(self) -> None:
        """Wait for the stream, then release contexts, engine and runtime in this order, as TensorRT requires."""
        if self._runtime is None:
            return
        self._stream.finish()
        self._save_kernels()
        self._release()

    def _save_kernels(self) -> None:
        if self._cache is not None:
            save_kernels(self._cache_file, self._cache)
        self._saved_at, self._may_have_compiled = time.monotonic(), False

    def _release(self) -> None:
        while self.graphs:
            self._destroy(self.graphs.popitem()[1])
        while self._retired:
            self._destroy(self._retired.pop()[1])
        self._context = None
        self._configs, self._cache = {}, None
        self.engine = None
        self._runtime = None
        self._arena.leave()

    # ---- graphs ----

    def _is_worth_a_graph(self, inputs: Inputs) -> bool:
        """Whether to capture these inputs, which came for the second time; retires the least recently used graph if needed.

        A graph is only retired when its credit is used up. Otherwise photographs in more than `MAX_GRAPHS` sizes would cause a
        capture at every call.
        """
        if not self.cuda_graphs:
            return False
        seen = self._seen.pop(inputs, 0) + 1
        self._seen[inputs] = seen
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        if seen < 2:
            return False
        if len(self.graphs) >= self._max_graphs:
            oldest = next(iter(self.graphs))
            self.graphs[oldest].credit -= 1
            if self.graphs[oldest].credit > 0:
                return False
            self._retire(self.graphs.pop(oldest))
        del self._seen[inputs]
        return True

    def _extra_context(self) -> Any:
        """A context for another graph. If memory is short, older graphs are given up for it, and as many as fit then are the
        most from now on; None if not even one fits."""
        while True:
            try:
                return self._new_context(fixed=True)
            except OutOfMemory as error:
                if not self._retired:
                    if not self.graphs:
                        return self._disable_graphs(error.message)
                    if self._max_graphs == MAX_GRAPHS:
                        log.warning("%s: keeps fewer CUDA graphs: %s", self._where, error.message)
                    self._retire(self.graphs.popitem(last=False)[1])
                    self._max_graphs = len(self.graphs) + 1
                self._retired[-1][0].wait_on_host()
                self._destroy_retired()

    def _capture(self, context: Any) -> Any:
        """Capture a context that has just been enqueued; None if that is not possible."""
        call, handle = self._cuda.call, self._stream.handle
        if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(int(handle)):
            return self._disable_graphs("TensorRT-RTX allocates while this engine runs")
        # Thread-local: CUDA calls of other threads are allowed. An allocation by TensorRT in this thread, whose memory would be
        # freed when the graph is replayed, ends the capture.
        mode = self._cuda.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        graph = None
        try:
            with no_garbage_collection():
                call("cudaStreamBeginCapture", handle, mode)
                try:
                    queued = context.execute_async_v3(int(handle))
                finally:
                    graph = call("cudaStreamEndCapture", handle)
            if queued:
                return call("cudaGraphInstantiate", graph, 0)
            return self._disable_graphs("TensorRT refused the capture")
        except WsssError as error:
            return self._disable_graphs(error.message)
        finally:
            if graph is not None:
                call("cudaGraphDestroy", graph)

    def _disable_graphs(self, reason: str) -> None:
        self.cuda_graphs = False
        errors = self._logger.take_errors()
        log.warning("%s: runs without CUDA graphs: %s", self._where, f"{reason}: {errors}" if errors else reason)

    def _retire_outdated(self) -> None:
        """Give up all graphs if the activations have moved. Their shapes count as seen, so that the next run is captured."""
        if self._generation == self._arena.generation:
            return
        self._generation = self._arena.generation
        for inputs, captured in self.graphs.items():
            self._seen[inputs] = 1
            self._retire(captured)
        self.graphs.clear()

    def _retire(self, captured: Captured) -> None:
        """Destroy a graph in a later call, because its last run may still be queued."""
        done = Event(self._cuda)
        done.record(self._stream)
        self._retired.append((done, captured))

    def _destroy_retired(self) -> None:
        while self._retired and self._retired[0][0].passed():
            self._destroy(self._retired.pop(0)[1])

    def _destroy(self, captured: Captured) -> None:
        if captured.executable is not None:
            self._cuda.call("cudaGraphExecDestroy", captured.executable)

    # ---- contexts ----

    def _new_context(self, *, fixed: bool) -> Any:
        """Create a context for one set of shapes, or for any shapes.

        TensorRT-RTX compiles kernels for the shapes of each call. In a context for any shapes it compiles in the background
        and runs generic kernels until then. A CUDA graph must not contain those, so a context for fixed shapes compiles first.
        """
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self.engine.create_execution_context(self._configs.get(fixed, strategy))
        if context is None:
            raise self._error("no execution context")
        return context

    def _configure(self) -> None:
        """Create TensorRT-RTX's settings for both kinds of context, with a common cache of compiled kernels."""
        strategies = self._trt.DynamicShapesKernelSpecializationStrategy
        for fixed, strategy in ((False, strategies.LAZY), (True, strategies.EAGER)):
            config = self.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            config.dynamic_shapes_kernel_specialization_strategy = strategy
            if self._cache is None:
                self._cache = config.create_runtime_cache()
                load_kernels(self._cache_file, self._cache)
            config.set_runtime_cache(self._cache)
            self._configs[fixed] = config

    def _enqueue(self, context: Any, inputs: Inputs) -> dict[str, Shape]:
        self._set_shapes(context, dict(zip(self._inputs, inputs, strict=True)))
        shapes = self._shapes(context)
        self._arena.reserve(self._activation_bytes(context))
        self._retire_outdated()
        context.set_device_memory(self._arena.address, self._arena.size_bytes)
        self._may_have_compiled = True
        if not context.execute_async_v3(int(self._stream.handle)):
            raise self._error("the run failed")
        return shapes

    def _activation_bytes(self, context: Any) -> int:
        """For the shapes that are set; of the whole profile, where TensorRT cannot tell or says 0, as it does after an error."""
        update = getattr(context, "update_device_memory_size_for_shapes", lambda: 0)
        return int(update()) or int(self.engine.device_memory_size_v2)

    def _set_shapes(self, context: Any, inputs: Mapping[str, Shape]) -> None:
        for name, shape in inputs.items():
            if not context.set_input_shape(name, shape):
                raise self._error(f"{name!r} of shape {shape} refused")

    def _bind(self, context: Any) -> None:
        for name, address in self._addresses.items():
            if not context.set_tensor_address(name, address):
                raise self._error(f"the address of {name!r} refused")

    def _shapes(self, context: Any) -> dict[str, Shape]:
        shapes = {name: tuple(context.get_tensor_shape(name)) for name in self._outputs}
        for name, shape in shapes.items():
            if min(shape, default=0) < 0:
                raise self._error(f"the shape of {name!r} depends on values: {shape}")
        return shapes

    def _deserialized(self, plan: Path) -> Any:
        try:
            data = plan.read_bytes()
        except OSError as error:
            raise BundleError(f"{plan}: cannot be read: {error.strerror}", hint="build the engine again") from None
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            refusal = self._error("not loaded")
            if isinstance(refusal, OutOfMemory):
                raise refusal
            why = "; ".join(why_invalid(self._trt, self._runtime, data)) or refusal.message
            raise BundleError(f"{plan}: refused: {why}", hint="build the engine again; wsss doctor says what runs here")
        return engine

    def _error(self, what: str) -> WsssError:
        errors = self._logger.take_errors()
        if "out of memory" in errors.lower() or "OutOfMemory" in errors:
            return OutOfMemory(f"{self._where}: {what}: {errors}", hint="a smaller --batch, or a GPU that nothing else uses")
        return WsssError(f"{self._where}: TensorRT {self._trt.__version__}: {what}: {errors or 'no reason given'}")


_INVALID = {
    "VERSION_MISMATCH": "another version of the library built it",
    "UNSUPPORTED_CC": "it has no code for this GPU",
    "OLD_CUDA_DRIVER": "the driver is too old for it",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory for it",
    "MALFORMED_ENGINE": "the file is damaged",
    "CUDA_ERROR": "CUDA does not work here",
}


def why_invalid(trt: ModuleType, runtime: Any, plan: bytes) -> list[str]:
    """TensorRT's own reasons against a plan, where the library (TensorRT-RTX) tells them."""
    if not hasattr(runtime, "get_engine_validity"):
        return []
    _, diagnostics = runtime.get_engine_validity(plan)
    return [
        _INVALID.get(name, name) for name, bit in trt.EngineInvalidityDiagnostics.__members__.items() if diagnostics & int(bit)
    ]


def _logger(trt: ModuleType) -> Any:
    """A TensorRT logger that collects errors and logs warnings. It must outlive all objects that use it."""

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self._errors.append(message.split("\n")[0])
            elif severity <= trt.ILogger.WARNING:
                log.info("TensorRT: %s", message)

        def take_errors(self) -> str:
            """The errors since the last call."""
            errors, self._errors = self._errors, []
            return "; ".join(errors[-3:])

    return Logger()
