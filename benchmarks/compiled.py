"""What TensorRT-RTX compiles a graph to: its kernels, fused attentions, and memory traffic. Needs no GPU.

With detailed verbosity, the builder's log ends in the compiled layers with their tensors. The bytes of a kernel are those of its
inputs and outputs: what crosses the GPU's memory when nothing stays in a cache. They are a bound, not a time.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from ..engines.plan import tensorrt_module
from ..errors import WsssError
from ..export.to_engine import ALONE, FUSED, build_logger, kind_of
from ..spec import Model
from .feeds import feeds_for, load_of, row_axis
from .graph_work import work_of

_BYTES = {"Half": 2, "BFloat16": 2, "Float": 4, "Int32": 4, "Int64": 8, "Bool": 1, "UInt8": 1, "Int8": 1}


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One compiled graph."""

    rows: int
    """Images (boxes, phrases) in the call that it was compiled for."""
    kernels: dict[str, tuple[int, int]]
    """Number and bytes of the kernels, by kind, those with the most bytes first."""
    largest: list[tuple[str, int, int]]
    """Kind and largest tensor, number and bytes, of the twelve groups of kernels with the most bytes."""
    multiply_adds: int | None
    """Of the whole call; None where the graph does not tell."""

    @property
    def bytes_per_row(self) -> float:
        """Memory traffic of one image (box, phrase)."""
        return sum(moved for _, moved in self.kernels.values()) / self.rows

    def count(self, kind: str) -> int:
        """The number of kernels of a kind."""
        return self.kernels.get(kind, (0, 0))[0]


def compiled(model: Model, graph: str, rows: int | None = None) -> Compiled:
    """Compile one graph for a call with ``rows`` images (boxes, phrases); None takes the usual number.

    Raises:
        WsssError: tensorrt_rtx is missing, or it cannot read or build the graph.
    """
    trt = tensorrt_module("trt-rtx")
    spec, where = model.graph(graph), f"{model.manifest.family}/{graph}"
    rows = rows or spec.axes[row_axis(spec, spec.axes)].opt
    feeds = feeds_for(model, graph, load_of(spec, spec.axes, rows))

    log = build_logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    read = parser.parse_from_file(str(model.path(graph)))
    for number in range(network.num_inputs if read else 0):
        tensor = network.get_input(number)
        tensor.shape = feeds[tensor.name].shape
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if not read or builder.build_serialized_network(network, config) is None:
        raise WsssError(f"{where}: TensorRT-RTX {trt.__version__} cannot compile it: {'; '.join(log.errors[-2:])}")
    kinds: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    groups: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for kind, largest, moved in map(_kernel, log.layers):
        for table, key in ((kinds, kind), (groups, f"{kind} {largest}")):
            table[key][0] += 1
            table[key][1] += moved
    try:
        multiply_adds = work_of(model.path(graph), feeds).multiply_adds
    except WsssError:
        multiply_adds = None
    by_bytes = sorted(groups.items(), key=lambda item: -item[1][1])[:12]
    return Compiled(
        rows=rows,
        kernels={kind: (count, moved) for kind, (count, moved) in sorted(kinds.items(), key=lambda item: -item[1][1])},
        largest=[(group, count, moved) for group, (count, moved) in by_bytes],
        multiply_adds=multiply_adds,
    )


def _kernel(line: str) -> tuple[str, str, int]:
    """Kind, largest tensor and bytes of a line of the builder's log."""
    tensors = []
    for shape, dtype in re.findall(r"Dimensions: \[([^\]]*)\].*?Datatype: (\w+)", line):
        lengths = [int(length) for length in shape.split(",") if length.strip()]
        tensors.append((math.prod(lengths) * _BYTES.get(dtype, 4), f"{lengths} {dtype}"))
    return kind_of(line), max(tensors, default=(0, ""))[1], sum(size for size, _ in tensors)


def lines_of(where: str, found: Compiled) -> Iterator[str]:
    """A table for a terminal."""
    yield (
        f"{where}: {sum(count for count, _ in found.kernels.values())} kernels, {found.count(FUSED)} attentions fused, "
        f"{found.count(ALONE)} softmaxes alone, {found.bytes_per_row / 1e6:,.1f} MB a row in a call of {found.rows}"
    )
    for kind, (count, moved) in found.kernels.items():
        yield f"  {moved / found.rows / 1e6:10,.2f} MB  {count:4} x {kind}"
    yield "  the largest:"
    for group, count, moved in found.largest:
        yield f"  {moved / found.rows / 1e6:10,.2f} MB  {count:4} x {group}"
