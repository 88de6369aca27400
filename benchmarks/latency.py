"""Latency of each graph of a bundle by batch size, and its share of the machine's measured maximum.

Fields of `GraphRow`, one for each graph and batch size, also in JSON:

``model``, ``variant``, ``graph``, ``precision``, ``engine``, ``device``
    What was measured. ``precision`` is that of the graph.
``batch``, ``unit``
    Batch size of a call, and its unit: images, prompts, phrases, boxes or masks.
``calls``
    Number of timed calls, after the warm-up.
``p50_ms``, ``p90_ms``, ``p99_ms``
    Percentiles of the time of a call, from inputs on the device to outputs on the device, without loading and building.
``per_second``
    Entries of the batch a second. On a GPU, calls are queued and waited for once, as the chain does.
``gmacs``, ``bytes``
    Multiply-adds of one call in 1e9, counted from the graph; bytes of weights, inputs and outputs. None without onnx.
``bound_ms``, ``share_of_bound``
    The minimum time of the call on this machine (`wsss.benchmarks.ceiling`), and its share of the measured time.
``parity``
    Largest error in the parity gate of the graph, or of its TensorRT engine, against the official FP32 module; None when it
    has not passed the gate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ..batch import Tensor
from ..engines.engine import Engine
from ..engines.opening import open_graph
from ..engines.openvino import instructions
from ..engines.plan import MODULES, plan_here
from ..errors import WsssError
from ..spec import Flavour, Model, Parity
from .ceiling import Ceiling
from .feeds import feeds_for, load_of, row_axis
from .graph_work import Work, work_of

LEAST_CALLS, MAX_CALLS = 3, 1000
WARM_UP = {"cpu": 1, "cuda": 3}
"""Untimed calls. TensorRT captures its CUDA graph at the second call and replays it from the third on."""


@dataclass(frozen=True, kw_only=True)
class GraphRow:
    """One graph at one batch size; the module docstring describes the fields."""

    model: str
    variant: str
    graph: str
    precision: str
    engine: str
    device: str
    batch: int
    unit: str
    calls: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    per_second: float
    gmacs: float | None
    bytes: int | None
    bound_ms: float | None
    share_of_bound: float | None
    parity: float | None


Opener = Callable[[Model, str], Engine]
"""Opens an engine, given a model and the name of a graph."""


def opener_of(engine: str, device: str, *, unverified: bool = False) -> Opener:
    """Open engines as the runtime does, for names from `wsss.engines.opening.choose`."""
    return lambda model, graph: open_graph(model, graph, engine, device=device, unverified=unverified)


def measure_graph(
    model: Model,
    graph: str,
    batches: Sequence[int],
    *,
    engine: str,
    device: str,
    ceiling: Ceiling | None,
    seconds: float,
    unverified: bool = False,
    open_engine: Opener | None = None,
) -> Iterator[GraphRow]:
    """Time one graph.

    Args:
        batches: batch sizes; those outside the engine's range are left out. Empty takes 1 and the usual batch.
        engine, device: from `wsss.engines.opening.choose`.
        ceiling: of this machine in the graph's precision; None leaves out the bound.
        seconds: time for each batch size, without warm-up and queued calls.
        unverified: TensorRT: accept an engine whose gate has not run.
        open_engine: another way to open the engine.

    Raises:
        WsssError: the engine cannot be opened, or there is no rule for one of its inputs.
    """
    spec = model.graph(graph)
    loaded = (open_engine or opener_of(engine, device, unverified=unverified))(model, graph)
    counted = loaded.axes[row_axis(spec, loaded.axes)]
    sizes = sorted({size for size in batches if counted.min <= size <= counted.max} or {counted.min, counted.opt})
    try:
        for size in sizes:
            load = load_of(spec, loaded.axes, size)
            feeds = feeds_for(model, graph, load)
            work = _work(model, graph, feeds)
            with on_device(feeds, loaded, engine, device) as (resident, wait):
                times, rate = _timed(loaded, resident, wait, seconds, queued=device != "cpu")
                outputs = loaded(resident)
                wait(outputs)
                moved = sum(_size_bytes(tensor) for tensor in (*feeds.values(), *outputs.values()))
            total = None if work is None else work.weight_bytes + moved
            bound = ceiling.bound_ms(work.multiply_adds, total or 0) if ceiling and work else None
            p50, p90, p99 = (float(value) for value in np.percentile(times, (50, 90, 99)))
            yield GraphRow(
                model=model.manifest.family,
                variant=model.manifest.variant,
                graph=graph,
                precision=spec.precision,
                engine=engine,
                device=device,
                batch=size,
                unit=load.unit,
                calls=len(times),
                p50_ms=_digits(p50),
                p90_ms=_digits(p90),
                p99_ms=_digits(p99),
                per_second=_digits(size * rate),
                gmacs=None if work is None else _digits(work.multiply_adds * 1e-9),
                bytes=total,
                bound_ms=None if bound is None else _digits(bound),
                share_of_bound=None if bound is None else _digits(bound * rate * 1e-3),
                parity=parity_of(model, graph, engine),
            )
    finally:
        close = getattr(loaded, "close", None)  # TensorRT engines hold memory of the GPU
        if close is not None:
            close()


def parity_of(model: Model, graph: str, engine: str) -> float | None:
    """The largest error of this graph in this engine in the parity gate; None when it has not passed the gate."""
    spec = model.graph(graph)
    verdict: Parity | None = spec.parity
    if engine in MODULES:
        plan = plan_here(spec, engine)
        verdict = plan.parity if plan else None
    elif engine == "openvino":
        proof = spec.openvino.get(instructions())
        verdict = proof.parity if proof else None
    return None if verdict is None else max((row.error for row in verdict.rows), default=None)


Wait = Callable[[Mapping[str, Tensor]], None]
"""Returns once the device has computed these outputs."""


@contextmanager
def on_device(
    feeds: Mapping[str, np.ndarray], loaded: Engine, engine: str, device: str
) -> Iterator[tuple[Mapping[str, Tensor], Wait]]:
    """Put feeds where the engine reads them without the host; yields them with a function that waits for outputs."""
    index = int(device.partition(":")[2] or 0)
    resident = getattr(loaded, "resident", None)
    if resident is not None:  # the engine of `autocast`
        yield resident(feeds)
    elif device != "cpu" and engine == "ort":
        from ..engines.ort import OrtTensor
        from ..engines.ort_library import onnxruntime

        value = onnxruntime.OrtValue.ortvalue_from_numpy
        # ONNX Runtime waits at the end of each call.
        yield {name: OrtTensor(value(array, "cuda", index)) for name, array in feeds.items()}, lambda outputs: None
    elif device != "cpu" and engine in MODULES:
        with _in_gpu_memory(feeds, engine, index) as resident_feeds_and_wait:
            yield resident_feeds_and_wait
    else:
        yield feeds, lambda outputs: None  # PyTorch's engine takes and returns arrays in host memory


@contextmanager
def _in_gpu_memory(feeds: Mapping[str, np.ndarray], flavour: Flavour, index: int) -> Iterator[tuple[Mapping[str, Tensor], Wait]]:
    from ..engines import trt
    from ..engines.buffers import Cuda, StagingBuffer, Stream
    from ..engines.tensors import CudaTensor

    cuda = Cuda(trt.load_modules(flavour)[1], index)
    stream = Stream(cuda)
    buffers = {name: StagingBuffer(cuda, array.nbytes) for name, array in feeds.items()}

    def wait(outputs: Mapping[str, Tensor]) -> None:
        for tensor in outputs.values():
            if isinstance(tensor, CudaTensor):
                tensor.block.before_read(stream)
        stream.finish()

    try:
        for name, array in feeds.items():
            buffers[name].from_host(array, array.dtype, stream)
        stream.finish()
        yield {name: CudaTensor(buffers[name].block, array.shape, array.dtype) for name, array in feeds.items()}, wait
    finally:
        for buffer in buffers.values():
            buffer.free()
        stream.close()
        cuda.close()


def _timed(engine: Engine, feeds: Mapping[str, Tensor], wait: Wait, seconds: float, *, queued: bool) -> tuple[list[float], float]:
    """Milliseconds of each call, and calls a second."""
    for _ in range(WARM_UP["cuda" if queued else "cpu"]):
        wait(engine(feeds))
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < LEAST_CALLS or (time.perf_counter() - begun < seconds and len(times) < MAX_CALLS):
        start = time.perf_counter()
        wait(engine(feeds))
        times.append((time.perf_counter() - start) * 1e3)
    if not queued:
        return times, 1e3 * len(times) / sum(times)
    begun = time.perf_counter()
    for _ in times:
        outputs = engine(feeds)
    wait(outputs)
    return times, len(times) / (time.perf_counter() - begun)


def _work(model: Model, graph: str, feeds: Mapping[str, np.ndarray]) -> Work | None:
    try:
        return work_of(model.path(graph), feeds)
    except (ImportError, WsssError):
        return None


def _size_bytes(tensor: Tensor) -> int:
    size = getattr(tensor, "nbytes", None)  # for torch tensors, whose dtype numpy does not know
    return int(np.prod(tensor.shape, dtype=np.int64)) * np.dtype(tensor.dtype).itemsize if size is None else int(size)


def _digits(value: float) -> float:
    """Round to four significant digits, more than a second run would reproduce."""
    return float(f"{value:.4g}")
