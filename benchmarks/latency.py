"""Each graph of a bundle alone: latency by batch size, and the share of what the machine could do at best.

One row (`GraphRow`, and as JSON) for each graph and batch size:

``model``, ``variant``, ``graph``, ``precision``, ``engine``, ``device``
    What ran. ``precision`` is the graph's arithmetic.
``batch``, ``unit``
    Entries of one call, and what they are: images, prompts, phrases, boxes or masks.
``calls``
    Timed calls, after untimed ones.
``p50_ms``, ``p90_ms``, ``p99_ms``
    Of one call, inputs already on the device, until its outputs are ready there. Loading and building are not in it.
``per_second``
    Entries a second. On a GPU calls are queued one after the other and waited for once, as the chain does.
``gmacs``, ``bytes``
    Multiply-adds of one call in 1e9, counted from the graph; bytes of weights, inputs and outputs. None without onnx.
``bound_ms``, ``share_of_bound``
    What the call takes at least on this machine (`wsss.benchmarks.ceiling`), and that over what it took.
``parity``
    Largest error of the gate that the graph, or its TensorRT engine, has passed against the official FP32 module; None
    when it has not. Quality beside speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ..batch import Tensor
from ..engines.engine import Engine
from ..engines.opening import FLAVOURS, open_graph
from ..errors import WsssError
from ..spec import Flavour, Model, Parity
from .ceiling import Ceiling
from .feeds import feeds_for, load_of, row_axis
from .graph_work import Work, work_of

LEAST_CALLS, MAX_CALLS = 3, 1000
WARM_UP = {"cpu": 1, "cuda": 3}
"""Untimed calls. TensorRT captures its CUDA graph at the second one and replays it from the third on."""


@dataclass(frozen=True, kw_only=True)
class GraphRow:
    """One graph at one batch size; the fields are told at the top of this file."""

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
"""(model, graph) to its loaded engine."""


def opener_of(engine: str, device: str, *, unverified: bool = False) -> Opener:
    """The usual way to an engine, for names from `wsss.engines.opening.choose`."""
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
    """Times one graph.

    Args:
        batches: entries of a call; those outside the engine's range are left out. Empty takes one and the usual number.
        engine, device: from `wsss.engines.opening.choose`.
        ceiling: of this machine in the graph's precision; None leaves the bound out.
        seconds: time for each batch size, warm-up and pipelining not counted.
        unverified: TensorRT: take an engine whose gate has not run.
        open_engine: opens the engine another way.

    Raises:
        WsssError: the engine cannot be opened, or nobody knows what to feed it.
    """
    spec = model.graph(graph)
    loaded = (open_engine or opener_of(engine, device, unverified=unverified))(model, graph)
    counted = loaded.axes[row_axis(spec, loaded.axes)]
    sizes = sorted({each for each in batches if counted.min <= each <= counted.max} or {counted.min, counted.opt})
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
            p50, p90, p99 = (float(each) for each in np.percentile(times, (50, 90, 99)))
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
    """The largest error of the gate that this graph, in this engine, has passed; None when it has not."""
    spec = model.graph(graph)
    verdict: Parity | None = spec.parity
    if engine in FLAVOURS:
        plan = next((plan for flavour, plan in spec.plans.items() if flavour == engine), None)
        verdict = plan.parity if plan else None
    return None if verdict is None else max((row.error for row in verdict.rows), default=None)


Wait = Callable[[Mapping[str, Tensor]], None]
"""Returns once the device has computed these outputs."""


@contextmanager
def on_device(
    feeds: Mapping[str, np.ndarray], loaded: Engine, engine: str, device: str
) -> Iterator[tuple[Mapping[str, Tensor], Wait]]:
    """Feeds where the engine reads them without a copy, and how to wait for its outputs."""
    index = int(device.partition(":")[2] or 0)
    own = getattr(loaded, "resident", None)
    if own is not None:  # an engine of another kind, that of `autocast`
        yield own(feeds)
    elif device != "cpu" and engine == "ort":
        from ..engines.ort import OrtTensor
        from ..engines.ort_library import onnxruntime

        value = onnxruntime.OrtValue.ortvalue_from_numpy
        # ONNX Runtime itself waits at the end of each call.
        yield {name: OrtTensor(value(array, "cuda", index)) for name, array in feeds.items()}, lambda outputs: None
    elif device != "cpu" and engine in FLAVOURS:
        with _in_gpu_memory(feeds, engine, index) as told:
            yield told
    else:
        yield feeds, lambda outputs: None  # PyTorch's engine takes and gives arrays of the host


@contextmanager
def _in_gpu_memory(feeds: Mapping[str, np.ndarray], flavour: Flavour, index: int) -> Iterator[tuple[Mapping[str, Tensor], Wait]]:
    from ..engines import trt
    from ..engines.buffers import Cuda, StagingBuffer, Stream
    from ..engines.tensors import CudaTensor

    cuda = Cuda(trt.load_modules(flavour)[1], index)
    stream = Stream(cuda)
    landings = {name: StagingBuffer(cuda, array.nbytes) for name, array in feeds.items()}

    def wait(outputs: Mapping[str, Tensor]) -> None:
        for tensor in outputs.values():
            if isinstance(tensor, CudaTensor):
                tensor.block.before_read(stream)
        stream.finish()

    try:
        for name, array in feeds.items():
            landings[name].from_host(array, array.dtype, stream)
        stream.finish()
        yield {name: CudaTensor(landings[name].block, array.shape, array.dtype) for name, array in feeds.items()}, wait
    finally:
        for landing in landings.values():
            landing.free()
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
    told = getattr(tensor, "nbytes", None)  # tensors of torch have types of their own
    return int(np.prod(tensor.shape, dtype=np.int64)) * np.dtype(tensor.dtype).itemsize if told is None else int(told)


def _digits(value: float) -> float:
    """Four significant digits: what the next run would give again is fewer."""
    return float(f"{value:.4g}")
