"""How long an export or a verification takes, and how much memory it needs, before it starts.

The gate needs the most: its largest batch holds the activations of all its rows. Rules that are linear in the size of the
weights, the pixels and the rows predict what `benchmarks/studies/speed/export_cost.py` measured; they say "about".
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..cores import UNKNOWN, cores, free_bytes
from ..errors import WsssError
from .family import Graph
from .verify import REFERENCE_ROWS, work_of

SKIP = "WSSS_SKIP_MEMORY_CHECK"
"""Environment variable that turns a refusal into a warning."""
CLEARLY = 0.75
"""Less memory than this share of the estimate is refused: estimates may be a quarter too high."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Costs of a model's image graph (float32, ONNX Runtime), fitted to ``benchmarks/results/export-cost.json``; those of
    Grounding-DINO to one export of Swin-T with five canvases (704 CPU seconds, 10.0 GB), those of the segmenter to one of
    DeepLabV3+ with ResNet-101 at 512 x 512 (55 CPU seconds, 2.6 GB); other networks differ by up to twice. That of Swin-L, which
    was not measured, follows from Swin-T's: four times the cells, 4.9 times the multiply-adds.
    Those of SAM hold for SAM 2.1 too (``tiny`` at batch 2: 203 CPU seconds and 4.1 GB, estimated 4.6 GB). Those of SAM 3 follow
    from its multiply-adds and, in memory, from SAM ViT-H's (8.8 GB were seen at batch 2, estimated 10.3 GB)."""

    above: float = 0.0
    """GB of weights from which on the rule applies, instead of one before it."""
    tracing: float
    """CPU seconds of tracing a graph."""
    row: float
    """CPU seconds of one row, for each GB of weights and million pixels."""
    activations: float
    """GB of one row, for each million pixels."""


RULES = {
    "clip": (Rule(tracing=9, row=15, activations=0.3),),
    "grounding-dino": (Rule(tracing=70, row=32, activations=0.875), Rule(above=1.2, tracing=100, row=79, activations=3.5)),
    "segmenter": (Rule(tracing=15, row=18, activations=0.53),),
    "sam3": (Rule(tracing=60, row=61, activations=1.3),),
    "sam": (Rule(tracing=14, row=35, activations=0.84), Rule(above=1, tracing=30, row=26, activations=1.31)),
}
SMALL_GRAPH = 30
"""CPU seconds of tracing and comparing a graph without pixels (text, decoder, fusion)."""
LIBRARIES = 0.8
"""GB of PyTorch, ONNX Runtime and the rest."""
COPIES = 2.3
"""Of the weights: the loaded model, the one in ONNX Runtime, and matrices that it keeps in another order."""
GIGAFLOPS = 50.0
"""Of a core, in `speed_of_core`, of the machine on which the rules were measured."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The cost of a graph. ``cpu_seconds`` are those of the machine of the rules."""

    graph: str
    cpu_seconds: float
    gigabytes: float


def estimate(model: str, graph: Graph, *, tracing: bool, largest: int | None = None) -> Estimate | None:
    """The cost of tracing (if ``tracing``) and gating a graph; None for models without a rule.

    Args:
        model: name of the family. largest: as for `verify.gate`.
    """
    weights = sum(each.numel() * each.element_size() for each in graph.module.parameters()) / 1e9
    rules = [rule for rule in RULES.get(model, ()) if rule.above <= weights]
    if not rules:
        return None
    rule = rules[-1]
    shape = next((spec.shape for spec in graph.inputs if spec.name == "pixels"), None)
    megapixels = float(shape[1]) * float(shape[2]) / 1e6 if shape else 0.0
    rows, inputs, most = work_of(graph, largest)
    seconds = rule.row * weights * megapixels * (rows + REFERENCE_ROWS * inputs) if shape else SMALL_GRAPH
    memory = LIBRARIES + COPIES * weights + rule.activations * megapixels * (most + REFERENCE_ROWS)
    return Estimate(graph=graph.name, cpu_seconds=seconds + (rule.tracing if tracing else 0), gigabytes=memory)


def announce(where: str, estimates: Sequence[Estimate | None], log: Callable[[str], None]) -> None:
    """Log how long an export takes and how much memory it needs and has. Nothing is logged for models without a rule.

    Raises:
        WsssError: the memory is clearly not enough.
    """
    known = [each for each in estimates if each is not None]
    if not known:
        return
    minutes = sum(each.cpu_seconds for each in known) * GIGAFLOPS / speed_of_core() / cores() / 60
    largest = max(known, key=lambda each: each.gigabytes)
    free = free_bytes()
    available = free / 1e9
    has = "" if free == UNKNOWN else f", {available:.1f} GB available"
    log(f"{where}: about {max(minutes, 1):.0f} min, and {largest.gigabytes:.1f} GB of memory for {largest.graph}{has}")
    if available >= CLEARLY * largest.gigabytes:
        return
    message = f"{where} {largest.graph}: needs about {largest.gigabytes:.1f} GB of memory, {available:.1f} GB are available"
    if os.environ.get(SKIP):
        log(f"{message}; continuing, because {SKIP} is set")
        return
    raise WsssError(
        message,
        hint=f"a smaller largest batch (--batch 1 1 2), a smaller --size, or close other programs; {SKIP}=1 tries it anyway",
    )


def speed_of_core(size: int = 768, repeats: int = 4) -> float:
    """GFLOP/s of a core of this machine in matrix products."""
    one = torch.rand(size, size)
    _ = one @ one
    begun = time.process_time()
    for _ in range(repeats):
        _ = one @ one
    return 2 * size**3 * repeats / 1e9 / max(time.process_time() - begun, 1e-6)
