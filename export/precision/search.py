"""Search for the nodes that must stay FP32 so that a half-precision graph meets its tolerance.

The search measures the graph on calibration feeds, in three steps:

1. *Range.* The float32 graph runs once with a half-precision copy of every node (`simulation.examine`). Nodes that write or
   read a value beyond the type's largest number are candidates.
2. *Cost.* If the tolerance is missed with the candidates in FP32, segments of the graph are put in half precision one at a
   time, with everything else in FP32; the cost of a segment is the outputs' error over the tolerance. The costliest
   segments are split until they are small. As many of them stay FP32 as the tolerance needs.
3. *Need.* Every group found so far is put back in half precision, divided again and again down to single nodes, and stays
   there if the outputs meet the tolerance.

A candidate whose value comes near the limit without passing it (`HEADROOM`) stays FP32 without a trial, because calibration
uses few photographs. `simulation` says what these measurements do not cover.

Cost: one run with copies (as long as 15 to 20 float32 runs), then trials of the whole graph with simulated rounding (3 to 5
float32 runs each) on every feed, about ``runs`` of them at most: 1 where nothing fails, 3 to 30 for an overflow, up to 160
where digits are missing. SAM ViT-B at 1024 pixels: 170 s of processor time with copies, 49 s a trial. Memory: four to five
times the working memory of the float32 graph (measured on the mini encoder), at any depth, and its weights, of which a copy
goes to the temporary folder.
"""

from __future__ import annotations

import ast
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ...errors import WsssError
from ..family import Feeds, Graph, Tolerance
from .accumulation import LONG, add_in_fp16, long_products
from .instrumentation import clone, open_copy
from .lowering import SCOPES, Half
from .simulation import INNER_PEAK, LARGEST, ROUNDING, NodeFacts, Plan, Rounding, examine
from .work import COUNTED, count

AIM = 0.8
"""Share of each tolerance that calibration may use: the gate uses other feeds."""
HEADROOM = 2.0
"""A value within this factor of the largest number is treated as beyond it."""
NEAR_TIE = Tolerance(
    relative=2e-2,
    measure=lambda got, want, name: (float(got[name].max()), float(got[name].max())),
    why="scores of the chosen lie that near to the best, as a share of the largest",
)
"""How good the float32 choice must be by the half-precision scores; equals ``HALF_TIE`` of the Grounding-DINO gate."""
CALIBRATION_SEED = 20_240_511
"""Seed of the samples of `examine_graph`; the gate and tracing use others."""
SEGMENTS = 16
"""Parts that the graph is first divided into."""
SMALL = 0.005
"""Share of all multiply-adds below which a segment is tried in half precision without splitting it."""
SUMS = frozenset({*COUNTED, "ReduceSum", "ReduceMean", "ReduceL2", "LayerNormalization", "InstanceNormalization", "AveragePool"})
"""Ops that add up many numbers: their error is an accumulation."""
DIFFERENCES = frozenset({"Add", "Sub", "Sum"})
"""Ops whose result may be much smaller than its terms."""

OVERFLOW, NAN = "overflow", "nan"
CANCELLATION, ACCUMULATION, RESOLUTION = "cancellation", "accumulation", "resolution"
REASONS: Mapping[str, str] = {
    OVERFLOW: "values beyond what half holds, or near it",
    NAN: "all that a mask leaves of a row is infinite in half, and the result not a number",
    CANCELLATION: "some results are small beside their terms, the terms' rounding is not",
    ACCUMULATION: "rounding of many terms adds up",
    RESOLUTION: "the tolerance needs more digits of this value than half has",
}
"""Why a node stays FP32."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A node that must stay FP32."""

    name: str
    op: str
    where: str
    """Path of the module it was traced from; empty when the graph does not record it."""
    reason: str
    """A key of `REASONS`."""
    peak: float
    """Largest magnitude of its results."""
    local_error: float
    """`NodeFacts.local_error`."""
    multiply_adds: int
    tried: bool
    """Whether a trial with this single node in half precision missed the tolerance."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Result of the search."""

    half: Half
    kept: tuple[Kept, ...]
    """In the order of the graph."""
    nodes: int
    """Number of nodes that could compute in half precision."""
    forced: int
    """Number of nodes that `lower` keeps in FP32 anyway: constants lost in half, counts."""
    tolerance: Mapping[str, str]
    before: Mapping[str, tuple[float, float]]
    """Error and largest difference of each output with every node in half; nan where the output is not a number."""
    after: Mapping[str, tuple[float, float]]
    """The same with ``kept`` in FP32."""
    share: float
    """Share of the multiply-adds in FP32, in 0..1."""
    runs: int
    """Number of trials of the whole graph, each on all feeds."""
    in_fp16_sums: Mapping[str, tuple[float, float]]
    """As ``after``, with long products added in FP16 (`accumulation.add_in_fp16`); empty in bf16, or without long products."""
    fp32_accumulation: frozenset[str]
    """Products that must add in FP32 because those sums miss the tolerance, for `lowering.lower`; all long ones, or none."""

    @property
    def keep(self) -> frozenset[str]:
        """Names of ``kept``, for `lowering.lower`."""
        return frozenset(node.name for node in self.kept)

    @property
    def reasons(self) -> dict[str, str]:
        """The reason by node name, as from `lowering.fp32_nodes`."""
        return {node.name: f"{node.reason}: {REASONS[node.reason]}" for node in self.kept}

    def report(self) -> str:
        """A report in lines of plain text."""
        kept = f"{len(self.kept)} of {self.nodes} nodes stay FP32, with {100 * self.share:.1f} % of the multiply-adds"
        lines = [f"{kept}; {self.forced} more do anyway (constants that {self.half} loses, counts). {self.runs} trials."]
        for name, allowed in self.tolerance.items():
            before, after = (_error_text(errors[name]) for errors in (self.before, self.after))
            lines.append(f"  {name}: error {before} in {self.half}, {after} now; {allowed}")
        for name, error in self.in_fp16_sums.items():
            number = len(self.fp32_accumulation)
            verdict = f"{number} products of {LONG} and more terms add in FP32" if number else "any accumulation will do"
            lines.append(f"  {name}: error {_error_text(error)} on a GPU that adds in FP16; {verdict}")
        for reason, number in Counter(node.reason for node in self.kept).most_common():
            lines.append(f"  {reason} ({number}): {REASONS[reason]}")
            lines += [f"    {_line(node)}" for node in self.kept if node.reason == reason]
        return "\n".join(lines)


def diagnose(
    source: ir.Model | Path,
    feeds: Sequence[Feeds],
    tolerance: Mapping[str, Tolerance],
    *,
    half: Half = "fp16",
    float16: AbstractSet[str] = frozenset(),
    choices: Sequence[str] = (),
    ties: Callable[[Feeds, Feeds], Feeds] = lambda feeds, outputs: {},
    runs: int = 200,
    threads: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> Diagnosis:
    """Find the nodes that must stay FP32.

    Args:
        source: a float32 graph, in memory or a file; not changed.
        feeds: realistic values, with different rows in each; each is measured separately.
        tolerance: of outputs by name, against the float32 graph.
        half: fp16 or bf16.
        float16: inputs and outputs that are float16 by contract.
        choices: outputs of a TopK, see `simulation.Rounding`.
        ties: (one of ``feeds``, the float32 graph's outputs) to the additional arrays that the measures of ``tolerance`` read.
        runs: most trials of the whole graph; when they run out, the nodes found so far are returned, which may be too many.
        threads: of ONNX Runtime, 0 for all cores.
        log: called with lines of progress.

    Raises:
        WsssError: the tolerance is missed with every node in FP32.
    """
    plan = Plan(source, half)
    feeds = [_rounded_inputs(each, float16) for each in feeds]
    ends = (*plan.model.graph.inputs, *plan.model.graph.outputs)
    io = {str(value.name): "float16" if value.name in float16 else "float32" for value in ends}
    facts, outputs = examine(plan, feeds, threads)
    reference = [{**ties(inputs, exact), **exact} for inputs, exact in zip(feeds, outputs, strict=True)]
    work = count(clone(plan.model), feeds[0])
    with Rounding(plan, io, choices, threads) as rounding:
        trials = _Trials(
            rounding, feeds, reference, {**tolerance, **{f"{name}.gap": NEAR_TIE for name in choices}}, choices, runs
        )
        search = _Search(plan, facts, work, trials, log)
        before = trials.errors(frozenset())
        keep = search.run()
        after = trials.errors(keep)
    sums = long_products(plan.model) - plan.fp32_nodes(keep) if half == "fp16" else frozenset()
    in_fp16_sums: dict[str, tuple[float, float]] = {}
    missed = False
    if sums:
        coarse = open_copy(source)
        add_in_fp16(coarse, sums)
        with Rounding(Plan(coarse, half), io, choices, threads) as rounding:
            rough = _Trials(rounding, feeds, reference, trials.tolerance, choices, 1)
            in_fp16_sums = {name: rough.errors(keep)[name] for name in tolerance}
            missed = not rough.pass_with(keep)
    return Diagnosis(
        half=half,
        kept=tuple(search.kept_node(name) for name in plan.nodes if name in keep),
        nodes=len(plan.nodes),
        forced=len(plan.forced),
        tolerance={name: str(allowed) for name, allowed in tolerance.items()},
        before={name: before[name] for name in tolerance},
        after={name: after[name] for name in tolerance},
        share=sum(work.get(name, 0) for name in plan.fp32_nodes(keep)) / max(sum(work.values()), 1),
        runs=trials.done,
        in_fp16_sums=in_fp16_sums,
        fp32_accumulation=sums if missed else frozenset(),
    )


def examine_graph(graph: Graph, model: ir.Model, *, rows: int = 3, log: Callable[[str], None] = lambda line: None) -> Diagnosis:
    """Run `diagnose` on a family's graph, with rows of its samples and its half-precision tolerance.

    Args:
        graph: with its half-precision contract (`Graph.at`).
        model: traced from it, float32.
        rows: number of rows, each measured separately; other rows than those of the gate.
    """
    if graph.whole:
        feeds = [graph.sample(min(rows, graph.axes[graph.row_axis].max), CALIBRATION_SEED)]
    else:
        rows = min(rows, graph.axes[graph.row_axis].max)
        sample = graph.sample(rows, CALIBRATION_SEED)
        feeds = [graph.take(sample, [row]) for row in range(rows)]
    float16 = {spec.name for spec in (*graph.inputs, *graph.outputs) if spec.dtype == "float16"}
    choices = (graph.ties,) if graph.ties else ()
    return diagnose(model, feeds, graph.tolerance, float16=float16, choices=choices, ties=graph.reference, log=log)


class _Trials:
    """Runs of the whole graph, with cached results."""

    def __init__(
        self,
        rounding: Rounding,
        feeds: Sequence[Feeds],
        reference: Sequence[Feeds],
        tolerance: Mapping[str, Tolerance],
        choices: Sequence[str],
        most: int,
    ) -> None:
        self._rounding, self._feeds, self._reference = rounding, feeds, reference
        self.tolerance, self._choices, self._most = tolerance, choices, most
        self._errors: dict[frozenset[str], dict[str, tuple[float, float]]] = {}
        self.done = 0

    @property
    def left(self) -> int:
        return self._most - self.done

    def errors(self, keep: frozenset[str]) -> dict[str, tuple[float, float]]:
        """Error and largest difference by output, the worst over all feeds."""
        if keep not in self._errors:
            self.done += 1
            self._errors[keep] = self._measured(keep)
        return self._errors[keep]

    def _measured(self, keep: frozenset[str]) -> dict[str, tuple[float, float]]:
        worst = {name: (0.0, 0.0) for name in self.tolerance}
        for feeds, want in zip(self._feeds, self._reference, strict=True):
            got = self._rounding(feeds, keep, {name: want[name] for name in self._choices})
            with np.errstate(invalid="ignore", over="ignore"):
                for name, allowed in self.tolerance.items():
                    worst[name] = _larger(worst[name], allowed.measure(got, want, name))
        return worst

    def cost(self, keep: frozenset[str]) -> float:
        """Largest error over its tolerance; infinite where an output is not a number."""
        costs = [
            cost
            for (error, worst), allowed in zip(self.errors(keep).values(), self.tolerance.values(), strict=True)
            for cost in (_share_used(error, allowed.relative), worst / (allowed.absolute or math.inf))
        ]
        return math.inf if any(map(math.isnan, costs)) else max(costs)

    def pass_with(self, keep: frozenset[str]) -> bool:
        return self.cost(keep) <= AIM


class _Search:
    def __init__(
        self, plan: Plan, facts: Mapping[str, NodeFacts], work: Mapping[str, int], trials: _Trials, log: Callable[[str], None]
    ) -> None:
        self.plan, self.facts, self.work, self.trials, self.log = plan, facts, work, trials, log
        self.order = {name: number for number, name in enumerate(plan.nodes)}
        self.ops = {str(node.name): node for node in plan.model.graph}
        limit = LARGEST[plan.half]
        self.beyond = plan.touching(lambda name: self._peak(name) > limit)
        near = plan.touching(lambda name: limit / HEADROOM < self._peak(name) <= limit)
        inner = {frozenset({name}) for name in plan.nodes if self._inner(name) > limit / HEADROOM}
        self.near: frozenset[str] = frozenset().union(*near, *inner)
        self.tried: set[str] = set()

    def run(self) -> frozenset[str]:
        keep = self.near
        if self.trials.pass_with(keep):
            return keep
        groups = [group - keep for group in self.beyond if group - keep]
        keep = keep.union(*groups)
        self.log(f"{len(keep)} of {len(self.order)} nodes touch values beyond {LARGEST[self.plan.half]:g}")
        if not self.trials.pass_with(keep):
            costly = self._costly(keep)
            groups += costly
            keep = keep.union(*costly)
        return self._needed(keep, groups)

    def kept_node(self, name: str) -> Kept:
        node, facts = self.ops[name], self.facts.get(name, NodeFacts(0.0, 0.0, 0.0, 0.0))
        return Kept(
            name=name,
            op=node.op_type,
            where=_module_of(node.metadata_props),
            reason=self._reason(name, facts),
            peak=facts.peak,
            local_error=facts.local_error,
            multiply_adds=self.work.get(name, 0),
            tried=name in self.tried,
        )

    def _reason(self, name: str, facts: NodeFacts) -> str:
        if math.isnan(facts.local_error) and self._reads_mask(name):
            return NAN
        if name in self.near or any(name in group for group in self.beyond):
            return OVERFLOW
        op, large = self.ops[name].op_type, 8 * ROUNDING[self.plan.half]
        if op in SUMS and facts.local_error > large:
            return ACCUMULATION
        if op in DIFFERENCES and facts.worst_error > large:
            return CANCELLATION
        return RESOLUTION

    def _reads_mask(self, name: str) -> bool:
        """Whether all values beyond the limit that it reads are negative."""
        limit, sources = LARGEST[self.plan.half], [value.producer() for value in self.ops[name].inputs if value is not None]
        facts = [self.facts[str(node.name)] for node in sources if node is not None and str(node.name) in self.facts]
        return any(each.peak > limit for each in facts) and all(each.highest <= limit for each in facts)

    def _peak(self, name: str) -> float:
        return self.facts[name].peak if name in self.facts else 0.0

    def _inner(self, name: str) -> float:
        inner = INNER_PEAK.get(self.ops[name].op_type)
        return inner(self._peak(name)) if inner else 0.0

    def _share(self, nodes: Iterable[str]) -> float:
        return sum(self.work.get(name, 0) for name in nodes) / max(sum(self.work.values()), 1)

    def _costly(self, keep: frozenset[str]) -> list[frozenset[str]]:
        """Segments of the graph that must stay FP32 besides ``keep`` for the outputs to meet their tolerance."""
        everything = frozenset(self.order)
        if not self.trials.pass_with(everything):
            raise WsssError(
                f"precision: with every node in FP32 the outputs are {self.trials.cost(everything):.2g} of their tolerance",
                hint="the outputs' own type, or constants and inputs in half, cost more than the tolerance allows",
            )
        segments = _parts([name for name in self.order if name not in keep], SEGMENTS)
        costs = {segment: self._cost_alone(segment) for segment in segments}
        while self.trials.left > self.trials.done // 2:  # the others are left for `_needed`
            coarse = [each for each in _costliest(costs) if len(each) > 1 and (len(each) > SEGMENTS or self._share(each) > SMALL)]
            if not coarse:
                break
            worst = max(coarse, key=lambda each: (self._share(each), len(each)))
            del costs[worst]
            costs |= {part: self._cost_alone(part) for part in _parts(sorted(worst, key=self.order.__getitem__), 2)}
        ranked = sorted(costs, key=lambda each: costs[each], reverse=True)
        taken = len(_costliest(costs))
        while not self.trials.pass_with(keep.union(*ranked[:taken])):
            taken += 1
        self.log(f"{taken} segments of {sum(map(len, ranked[:taken]))} nodes cost the most")
        return ranked[:taken]

    def _cost_alone(self, segment: frozenset[str]) -> float:
        return self.trials.cost(frozenset(self.order) - segment)

    def _needed(self, keep: frozenset[str], groups: Sequence[frozenset[str]]) -> frozenset[str]:
        """``keep`` without the nodes that can go back to half precision; the most multiply-adds are tried first."""
        by_range = frozenset().union(*self.beyond)  # tried last: all are needed, except those whose large values only mask
        waiting = list(groups)
        while waiting and self.trials.left > 1:
            group = max(waiting, key=lambda each: (not each & by_range, self._share(each), len(each)))
            waiting.remove(group)
            if self.trials.pass_with(keep - group):
                keep -= group
            elif len(group) == 1:
                self.tried |= group
            else:
                waiting += _parts(sorted(group, key=self.order.__getitem__), 2)
        return keep


def _share_used(error: float, allowed: float) -> float:
    if not math.isfinite(error) or allowed == 0 < error:
        return math.inf
    return error / allowed if error else 0.0


def _costliest(costs: Mapping[frozenset[str], float]) -> list[frozenset[str]]:
    """The costliest segments, without which the estimated error of the others (a root of summed squares) is within `AIM`."""
    ranked = sorted(costs, key=lambda each: costs[each], reverse=True)
    rest = 0.0
    for place in range(len(ranked) - 1, -1, -1):
        rest = math.hypot(rest, costs[ranked[place]])
        if rest > AIM:
            return ranked[: place + 1]
    return ranked[:1]


def _parts(names: Sequence[str], number: int) -> list[frozenset[str]]:
    cuts = [round(place * len(names) / number) for place in range(number + 1)]
    return [frozenset(names[low:high]) for low, high in pairwise(cuts) if high > low]


def _larger(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return tuple(math.nan if math.isnan(a) or math.isnan(b) else max(a, b) for a, b in zip(one, other, strict=True))  # type: ignore[return-value]


def _rounded_inputs(feeds: Feeds, float16: AbstractSet[str]) -> Feeds:
    rounded = {name: value.astype(np.float16) if name in float16 else value for name, value in feeds.items()}
    return {name: value.astype(np.float32) if value.dtype == np.float16 else value for name, value in rounded.items()}


def _module_of(metadata: Mapping[str, str]) -> str:
    """Path of the innermost module that torch.onnx recorded for a node."""
    scopes = [str(each) for each in ast.literal_eval(metadata.get(SCOPES, "[]"))]
    return scopes[-2] if len(scopes) > 1 else ""


def _error_text(error: tuple[float, float]) -> str:
    return "no number" if math.isnan(error[0]) else f"{error[0]:.2g}"


def _line(node: Kept) -> str:
    where = f" in {node.where}" if node.where else ""
    work = f", {node.multiply_adds / 1e6:.3g} M multiply-adds" if node.multiply_adds else ""
    proof = "" if node.tried else "; not tried by itself"
    return f"{node.op} {node.name}{where}: up to {node.peak:.3g}, local error {node.local_error:.1e}{work}{proof}"
