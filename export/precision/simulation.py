"""Simulation of half precision: a graph computed in float32 with explicit rounding.

ONNX Runtime's CPU has few float16 kernels: it computes in float32 from one node to the next and rounds only where it must
(``(x * 1000) / 1000`` in float16 stays finite for x = 100). A lowered graph is therefore more accurate there than on a GPU.
The simulation rounds every tensor that would be float16 on a GPU, by a Cast there and back that no optimization removes, and
values beyond the range of float16 become infinite.

The simulation does not cover what happens inside a node. Sums are in float32 here, as they are in TensorRT's matrix products
and norms (stash_type 1); a kernel that adds in float16 would be less accurate. `INNER_PEAK` lists the operator that is known
to hold larger numbers than its result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import astuple, dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ...errors import WsssError
from ..family import Feeds
from .instrumentation import Session, clone, insert, open_copy, place_node, typed
from .lowering import FIXED_FLOAT, MOVES, TAKES_ANY, TYPES, Half, NodePrecisions

LARGEST = {"fp16": 65504.0, "bf16": float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)}
"""Largest finite values."""
TINY = 1e-30
"""Norms below this count as 0."""
ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8}
"""Largest relative error of rounding once."""
INNER_PEAK: Mapping[str, Callable[[float], float]] = {"ReduceL2": lambda peak: peak**2}
"""Ops that TensorRT splits into typed steps: a function from the largest result to the largest number inside."""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """Range and error of one node in half precision, given exact inputs."""

    peak: float
    """Largest finite magnitude among its results in float32."""
    highest: float
    """Largest finite number, or 0; less than ``peak`` where the largest magnitude belongs to a negative number, as in masks."""
    local_error: float
    """Norm of the error of its results over their norm, with inputs and results rounded; inf or nan where rounding produced
    an inf or nan that float32 does not have. 0 for nodes that only move values."""
    worst_error: float
    """Largest relative error of a single number among its results."""


class Plan:
    """A float32 graph and the nodes of it that may compute in half precision; input of `Rounding` and `examine`.

    Args:
        source: float32, without subgraphs.
        half: fp16 or bf16.
    """

    def __init__(self, source: ir.Model | Path, half: Half) -> None:
        self.half = half
        self.model = open_copy(source)
        """Read-only; the instrumented graphs are built on clones of it."""
        self._precisions = NodePrecisions(self.model, half)
        forced, floats = self._precisions.forced, self._precisions.floats
        self.forced = frozenset(map(_name, forced))
        """Names of nodes that `lower` keeps in FP32 anyway."""
        self.nodes = tuple(_name(node) for node in self.model.graph if node not in forced and _reads_or_writes(node, floats))
        """Names of the nodes that may compute in half, in the order of the graph."""

    def fp32_nodes(self, keep: AbstractSet[str]) -> frozenset[str]:
        """Names of all nodes that compute in FP32 when those in ``keep`` do."""
        return frozenset(map(_name, self._precisions.fp32_nodes(keep)))

    def touching(self, selects: Callable[[str], bool]) -> list[frozenset[str]]:
        """Group the nodes that write or read the results of the nodes that ``selects`` accepts by name.

        A value stays FP32 only if the node that writes it and all nodes that read it do, so nodes that share a value are one
        group. `forced` nodes are left out.
        """
        groups: list[set[str]] = []
        for node in self.model.graph:
            if not selects(_name(node)):
                continue
            group = {_name(node)} | {_name(use.node) for value in node.outputs for use in value.uses()}
            for other in [other for other in groups if other & group]:
                groups.remove(other)
                group |= other
            groups.append(group)
        allowed = frozenset(self.nodes)
        return [frozenset(group) & allowed for group in groups if group & allowed]


class Rounding:
    """A graph that can be run with any of its nodes in half precision; a context manager.

    One session serves all combinations: every node reads its inputs and writes its results through a switch.

    Args:
        plan: of the graph.
        io: dtypes of the floating-point inputs and outputs by name: float32 or float16.
        choices: int64 outputs that name the best of near-equal values (top-k). Readers inside the graph get the choice of
            the float32 graph, because ranks swapped by rounding would look like errors. How good that choice is by the
            rounded scores is an additional output, see `__call__`.
        threads: of ONNX Runtime, 0 for all cores.
    """

    def __init__(self, plan: Plan, io: Mapping[str, str], choices: Sequence[str] = (), threads: int = 0) -> None:
        self._plan = plan
        self._switches = {name: f"half.{number}" for number, name in enumerate(plan.nodes)}
        model = clone(plan.model)
        self._pins = _pin(model.graph, choices)
        _add_switches(model.graph, plan.half, io, self._switches)
        self._scores = _expose_scores(model.graph, self._pins)
        self._session = Session(model, threads=threads)

    def __call__(self, feeds: Feeds, keep: AbstractSet[str], chosen: Mapping[str, np.ndarray]) -> Feeds:
        """Run the graph with all nodes in half precision except those in ``keep`` and those that stay FP32 anyway.

        Args:
            feeds: floating-point inputs as float32, already rounded where they are float16 by contract.
            chosen: for each of ``choices`` the float32 graph's result.

        Returns:
            The graph's outputs; for each choice NAME also ``NAME.gap``, (1,) float64: the largest difference between the
            scores of the chosen and the best scores, as a share of the largest.
        """
        in_fp32 = self._plan.fp32_nodes(keep)
        switches = {switch: np.array(name not in in_fp32) for name, switch in self._switches.items()}
        out = self._session({**feeds, **switches, **{pin: chosen[name] for name, pin in self._pins.items()}})
        for name, scores in self._scores.items():
            out[f"{name}.gap"] = _gap(out.pop(scores), chosen[name])
        return out

    def __enter__(self) -> Rounding:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.__exit__()


def examine(plan: Plan, feeds: Iterable[Feeds], threads: int = 0) -> tuple[dict[str, NodeFacts], list[Feeds]]:
    """Measure the range and the local error of every node.

    Every node is computed twice, exactly and from rounded inputs. The comparison is part of the graph, which outputs five
    numbers for each tensor, so that memory stays close to that of the graph itself.

    Returns:
        Facts by node name, the worst over all feeds; the float32 outputs for each of the feeds.
    """
    model = clone(plan.model)
    outputs = [str(value.name) for value in model.graph.outputs]
    fact_outputs = _add_shadows(model.graph, plan.half, frozenset(plan.nodes))
    facts: dict[str, NodeFacts] = {}
    reference = []
    with Session(model, threads=threads) as session:
        for each in feeds:
            results = session(each)
            reference.append({name: results[name] for name in outputs})
            for node, tensors in fact_outputs.items():
                measured = [_facts(*(float(results[name]) for name in names)) for names in tensors]
                facts[node] = _worst([*measured, *([facts[node]] if node in facts else [])])
    return facts, reference


def _name(node: ir.Node) -> str:
    return str(node.name)


def _reads_or_writes(node: ir.Node, floats: AbstractSet[ir.Value]) -> bool:
    inputs = () if node.op_type in TAKES_ANY else node.inputs
    return any(value in floats for value in (*inputs, *node.outputs))


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT


# ---- switches ----


def _add_switches(graph: ir.Graph, half: Half, io: Mapping[str, str], switches: Mapping[str, str]) -> None:
    rounded, outputs = _Rounded(graph, half), [(str(value.name), _is_float(value)) for value in graph.outputs]
    scalar = {"type": ir.TensorType(ir.DataType.BOOL), "shape": ir.Shape([])}
    flags = {name: ir.Value(name=switch, **scalar) for name, switch in switches.items()}
    for node, after in _with_next(graph):
        flag = flags.get(_name(node))
        if flag is None:
            continue
        for place in _rounded_places(node):
            value = node.inputs[place]
            assert value is not None
            if not rounded.is_exact(value):
                node.replace_input_with(place, _switched(graph, node, flag, rounded(value, node), value))
        for value in filter(_is_float, node.outputs):
            readers, half_value = list(value.uses()), rounded(value, after)
            chosen = _switched(graph, after, flag, half_value, value)
            rounded.register(chosen, half_value)
            for use in readers:
                use.node.replace_input_with(use.idx, chosen)
            for place, output in enumerate(graph.outputs):
                if output is value:
                    graph.outputs[place] = chosen
    for place, (name, is_float) in enumerate(outputs):
        value = graph.outputs[place]
        _name_output(graph, place, name, rounded(value, None) if is_float and io[name] == "float16" else value)
    graph.inputs.extend(flags.values())


def _switched(graph: ir.Graph, before: ir.Node | None, flag: ir.Value, half_value: ir.Value, exact: ir.Value) -> ir.Value:
    return typed(insert(before, graph, "Where", [flag, half_value, exact]), like=exact)


def _rounded_places(node: ir.Node) -> list[int]:
    """Positions of the floating-point inputs that a node reads in its own type; none for moves, whose results are rounded."""
    if node.op_type in TAKES_ANY or node.op_type in MOVES:
        return []
    fixed = FIXED_FLOAT.get(node.op_type, ())
    return [place for place, value in enumerate(node.inputs) if place not in fixed and _is_float(value)]


def _name_output(graph: ir.Graph, place: int, name: str, value: ir.Value) -> None:
    for other in [each for node in graph for each in node.outputs if each.name == name]:
        other.name = f"{name}.exact"
    value.name = name
    graph.outputs[place] = value


def _with_next(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node | None]]:
    """Every node and the one that followed it before nodes are inserted between them."""
    nodes = list(graph)
    return zip(nodes, [*nodes[1:], None], strict=True)


class _Rounded:
    """Adds values rounded to half and back to a graph, each once."""

    def __init__(self, graph: ir.Graph, half: Half) -> None:
        self._graph, self._type = graph, TYPES[half]
        self._made: dict[ir.Value, ir.Value] = {}

    def __call__(self, value: ir.Value, before: ir.Node | None) -> ir.Value:
        if value not in self._made:
            # Before the first node that reads it; all other readers come later in the graph.
            narrow = insert(before, self._graph, "Cast", [value], to=self._type)
            self._made[value] = typed(insert(before, self._graph, "Cast", [narrow], to=ir.DataType.FLOAT), like=value)
        return self._made[value]

    def register(self, value: ir.Value, rounded: ir.Value) -> None:
        """Use an existing value of the graph as the rounded form of ``value``."""
        self._made[value] = rounded

    def is_exact(self, value: ir.Value) -> bool:
        """Whether half precision represents a constant exactly."""
        if value.const_value is None:
            return False
        values = value.const_value.numpy()
        with np.errstate(over="ignore"):
            return bool(np.array_equal(values.astype(self._type.numpy()).astype(np.float32), values))


# ---- choices ----


def _pin(graph: ir.Graph, choices: Sequence[str]) -> dict[str, str]:
    pins = {}
    outputs = {str(value.name): value for value in graph.outputs}
    for name in choices:
        pin = ir.Value(name=f"{name}.pinned", type=ir.TensorType(ir.DataType.INT64), shape=outputs[name].shape)
        for use in list(outputs[name].uses()):
            use.node.replace_input_with(use.idx, pin)
        graph.inputs.append(pin)
        pins[name] = str(pin.name)
    return pins


def _expose_scores(graph: ir.Graph, pins: Mapping[str, str]) -> dict[str, str]:
    score_outputs = {}
    outputs = {str(value.name): value for value in graph.outputs}
    for name in pins:
        chooser = outputs[name].producer()
        if chooser is None or chooser.op_type != "TopK":
            raise WsssError(f"precision: output {name!r} should be the indices of a TopK, it comes from {chooser}")
        scores = insert(None, graph, "Identity", [chooser.inputs[0]])
        scores.name, scores.type = f"{name}.scores", ir.TensorType(ir.DataType.FLOAT)
        graph.outputs.append(scores)
        score_outputs[name] = str(scores.name)
    return score_outputs


def _gap(scores: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """`Rounding`'s ``NAME.gap`` of scores (..., N) and the K chosen indices (..., K)."""
    scores = scores.astype(np.float64)
    best = -np.sort(-scores, axis=-1)[..., : chosen.shape[-1]]
    apart = np.abs(np.take_along_axis(scores, chosen, -1) - best).max(initial=0.0)
    return np.array([apart / max(np.abs(best).max(initial=0.0), 1e-12)])


# ---- shadows ----


def _add_shadows(graph: ir.Graph, half: Half, candidates: AbstractSet[str]) -> dict[str, list[tuple[str, ...]]]:
    """Add a copy of every node that reads rounded inputs, and scalar outputs that compare the two.

    Returns:
        By node name, for each of its results the names of the five outputs that `_facts` takes.
    """
    rounded, fact_outputs = _Rounded(graph, half), {}
    numbers = {"zero": 0.0, "tiny": TINY, "largest": LARGEST[half], "finite": float(np.finfo(np.float32).max)}
    constants = [_constant(graph, f"half.{name}", value) for name, value in numbers.items()]
    for node, after in _with_next(graph):
        if not any(map(_is_float, node.outputs)):
            continue
        exact_anyway = node.op_type in MOVES or _name(node) not in candidates
        shadow = None if exact_anyway else _shadow(node, rounded, graph, after)
        names = []
        for place, value in enumerate(node.outputs):
            if _is_float(value):
                lowered = value if shadow is None else rounded(shadow.outputs[place], after)
                names.append(_compared(graph, after, value, lowered, constants, f"{node.name}.{place}"))
        fact_outputs[_name(node)] = names
    return fact_outputs


def _shadow(node: ir.Node, rounded: _Rounded, graph: ir.Graph, before: ir.Node | None) -> ir.Node:
    inputs = list(node.inputs)
    for place in _rounded_places(node):
        value = inputs[place]
        assert value is not None
        if not rounded.is_exact(value):
            inputs[place] = rounded(value, before)
    twin = ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), num_outputs=len(node.outputs))
    place_node(twin, before, graph)
    for copied, original in zip(twin.outputs, node.outputs, strict=True):
        typed(copied, like=original)
    return twin


def _compared(
    graph: ir.Graph,
    before: ir.Node | None,
    exact: ir.Value,
    lowered: ir.Value,
    constants: Sequence[ir.Value],
    name: str,
) -> tuple[str, ...]:
    def put(op: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        return insert(before, graph, op, inputs, **attributes)

    zero, tiny, largest, finite = constants
    size = put("Abs", exact)
    is_finite = put("LessOrEqual", size, finite)
    peak = put("ReduceMax", put("Where", is_finite, size, zero), keepdims=0)
    highest = put("ReduceMax", put("Where", is_finite, exact, zero), keepdims=0)
    fits = put("LessOrEqual", size, largest)
    apart = put("Where", fits, put("Sub", lowered, exact), zero)
    error = put("ReduceSumSquare", apart, keepdims=0)
    norm = put("ReduceSumSquare", put("Where", fits, exact, zero), keepdims=0)
    worst = put("ReduceMax", put("Div", put("Abs", apart), put("Max", size, tiny)), keepdims=0)
    names = tuple(f"{name}.{fact}" for fact in ("peak", "highest", "error", "norm", "worst"))
    for value, output_name in zip((peak, highest, error, norm, worst), names, strict=True):
        value.name, value.type, value.shape = output_name, ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
        graph.outputs.append(value)
    return names


def _constant(graph: ir.Graph, name: str, value: float) -> ir.Value:
    constant = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
    constant.const_value = ir.Tensor(np.array(value, np.float32), name=name)
    graph.register_initializer(constant)
    return constant


def _facts(peak: float, highest: float, error: float, norm: float, worst: float) -> NodeFacts:
    with np.errstate(invalid="ignore"):
        local = float(np.sqrt(error) / max(np.sqrt(norm), TINY)) if error != 0 else 0.0
    return NodeFacts(peak=peak, highest=highest, local_error=local, worst_error=worst)


def _worst(facts: Sequence[NodeFacts]) -> NodeFacts:
    """Largest of each fact; nan is larger than any number."""
    return NodeFacts(*(float(np.max(values)) for values in zip(*map(astuple, facts), strict=True)))
