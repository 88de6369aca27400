"""What half precision does to a graph, computed in float32 with explicit rounding.

ONNX Runtime's CPU has few float16 kernels: it computes in float32 from one node to the next and rounds only where it must
(``(x * 1000) / 1000`` in float16 stays finite for x = 100). A lowered graph therefore looks better there than it is.
Here every tensor that would be float16 on a GPU is rounded for certain, by a Cast there and back that no optimization
removes, and becomes infinite where float16 ends.

Not seen: what happens inside of a node. Sums are in float32 here, as they are in TensorRT's matrix products and norms
(stash_type 1); a kernel that adds in float16 would be worse. `INNER_PEAK` makes up for the operator that is known to hold
larger numbers than it gives.
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
from .lowering import FIXED_FLOAT, MOVES, TAKES_ANY, TYPES, Half, Widths

LARGEST = {"fp16": 65504.0, "bf16": float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)}
"""Largest finite values."""
TINY = 1e-30
"""Below this a norm is 0."""
ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8}
"""Largest relative error of rounding once."""
INNER_PEAK: Mapping[str, Callable[[float], float]] = {"ReduceL2": lambda peak: peak**2}
"""Ops that TensorRT takes apart into typed steps: the largest number inside, from the largest result."""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What one node does in half precision, from inputs that are right."""

    peak: float
    """Largest finite magnitude among its results in float32."""
    highest: float
    """Largest finite number, or 0: below ``peak`` where the largest magnitude is negative, as masks are."""
    local_error: float
    """Norm of the error of its results over their norm, its inputs and results rounded; inf or nan where rounding gave one
    that float32 does not have. 0 for nodes that only move values."""
    worst_error: float
    """Relative error of the worst single number among them."""


class Plan:
    """A float32 graph and which of its nodes may compute in half: what `Rounding` and `examine` work on.

    Args:
        source: float32, without subgraphs.
        half: fp16 or bf16.
    """

    def __init__(self, source: ir.Model | Path, half: Half) -> None:
        self.half = half
        self.model = open_copy(source)
        """To be read; what is built on is a clone of it."""
        self._widths = Widths(self.model, half)
        self.forced = frozenset(str(node.name) for node in self._widths.forced)
        """Names of nodes that `lower` keeps in FP32 by itself."""
        floats, allowed = self._widths.floats, [node for node in self.model.graph if node not in self._widths.forced]
        self.nodes = tuple(_name(node) for node in allowed if _writes(node, floats) or _reads(node, floats))
        """Names of the nodes that may compute in half, in the order of the graph."""

    def float32_nodes(self, keep: AbstractSet[str]) -> frozenset[str]:
        """Names of all nodes that compute in FP32 when ``keep`` do."""
        return frozenset(map(_name, self._widths.float32_nodes(keep)))

    def touching(self, values: Callable[[str], bool]) -> list[frozenset[str]]:
        """Groups of nodes that write or read the results of the nodes that ``values`` picks by name.

        A value stays FP32 only if the node that writes it and all that read it do, so nodes that share one are one group;
        `forced` nodes are left out.
        """
        groups: list[set[str]] = []
        for node in self.model.graph:
            if not values(_name(node)):
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

    One session serves all choices: every node reads its inputs, and gives its results, through a switch.

    Args:
        plan: of the graph.
        io: dtypes of the floating-point inputs and outputs: float32 or float16.
        choices: int64 outputs that name the best of near-equal values (top-k): readers inside the graph get the choice of
            the float32 graph, or ranks swapped by rounding would look like errors. How good that choice is by the
            rounded scores comes as an output more, see `__call__`.
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
        """Outputs with all nodes in half but ``keep`` and those that stay FP32 anyway.

        Args:
            feeds: floating-point inputs as float32, already rounded where they are float16 by contract.
            chosen: for each of ``choices`` the float32 graph's result.

        Returns:
            The graph's outputs; for each choice NAME also ``NAME.gap``, (1,) float64: how far the scores of the chosen lie
            from the best scores, at most, as a share of the largest.
        """
        wide = self._plan.float32_nodes(keep)
        switches = {switch: np.array(name not in wide) for name, switch in self._switches.items()}
        out = self._session({**feeds, **switches, **{pin: chosen[name] for name, pin in self._pins.items()}})
        for name, scores in self._scores.items():
            out[f"{name}.gap"] = _gap(out.pop(scores), chosen[name])
        return out

    def __enter__(self) -> Rounding:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.__exit__()


def examine(plan: Plan, feeds: Iterable[Feeds], threads: int = 0) -> tuple[dict[str, NodeFacts], list[Feeds]]:
    """Ranges and local errors of every node, and the float32 outputs, for each of the feeds.

    Every node is computed twice, exactly and from rounded inputs; the comparison happens inside the graph, which gives
    five numbers for each tensor, so that memory stays near that of the graph itself.

    Returns:
        Facts by node name, the worst over the feeds; one dict of outputs for each of the feeds.
    """
    model = clone(plan.model)
    outputs = [str(value.name) for value in model.graph.outputs]
    told = _add_shadows(model.graph, plan.half, frozenset(plan.nodes))
    facts: dict[str, NodeFacts] = {}
    reference = []
    with Session(model, threads=threads) as session:
        for each in feeds:
            found = session(each)
            reference.append({name: found[name] for name in outputs})
            for node, names in told.items():
                now = [_facts(*(float(found[name]) for name in five)) for five in names]
                facts[node] = _worst([*now, *([facts[node]] if node in facts else [])])
    return facts, reference


def _name(node: ir.Node) -> str:
    return str(node.name)


def _writes(node: ir.Node, floats: AbstractSet[ir.Value]) -> bool:
    return any(value in floats for value in node.outputs)


def _reads(node: ir.Node, floats: AbstractSet[ir.Value]) -> bool:
    return node.op_type not in TAKES_ANY and any(value in floats for value in node.inputs)


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
            if not rounded.exactly(value):
                node.replace_input_with(place, _switched(graph, node, flag, rounded(value, node), value))
        for value in filter(_is_float, node.outputs):
            readers, narrow = list(value.uses()), rounded(value, after)
            chosen = _switched(graph, after, flag, narrow, value)
            rounded.know(chosen, narrow)
            for use in readers:
                use.node.replace_input_with(use.idx, chosen)
            for place, output in enumerate(graph.outputs):
                if output is value:
                    graph.outputs[place] = chosen
    for place, (name, is_float) in enumerate(outputs):
        value = graph.outputs[place]
        _name_output(graph, place, name, rounded(value, None) if is_float and io[name] == "float16" else value)
    graph.inputs.extend(flags.values())


def _switched(graph: ir.Graph, before: ir.Node | None, flag: ir.Value, narrow: ir.Value, wide: ir.Value) -> ir.Value:
    return typed(insert(before, graph, "Where", [flag, narrow, wide]), like=wide)


def _rounded_places(node: ir.Node) -> list[int]:
    """Of the floating-point inputs that reach a node in its own type. What a moving node reads, it writes: rounded there."""
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
    """Every node and the one that followed it before anything was put between."""
    nodes = list(graph)
    return zip(nodes, [*nodes[1:], None], strict=True)


class _Rounded:
    """Values rounded to half and back, each once."""

    def __init__(self, graph: ir.Graph, half: Half) -> None:
        self._graph, self._type = graph, TYPES[half]
        self._made: dict[ir.Value, ir.Value] = {}

    def __call__(self, value: ir.Value, before: ir.Node | None) -> ir.Value:
        if value not in self._made:
            # In front of the first node that asks: early enough for all others, which come later in the graph.
            narrow = insert(before, self._graph, "Cast", [value], to=self._type)
            self._made[value] = typed(insert(before, self._graph, "Cast", [narrow], to=ir.DataType.FLOAT), like=value)
        return self._made[value]

    def know(self, value: ir.Value, rounded: ir.Value) -> None:
        """Says what a value rounds to."""
        self._made[value] = rounded

    def exactly(self, value: ir.Value) -> bool:
        """Whether a constant has no more digits than half."""
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
    found = {}
    outputs = {str(value.name): value for value in graph.outputs}
    for name in pins:
        chooser = outputs[name].producer()
        if chooser is None or chooser.op_type != "TopK":
            raise WsssError(f"precision: output {name!r} should be the indices of a TopK, it comes from {chooser}")
        scores = insert(None, graph, "Identity", [chooser.inputs[0]])
        scores.name, scores.type = f"{name}.scores", ir.TensorType(ir.DataType.FLOAT)
        graph.outputs.append(scores)
        found[name] = str(scores.name)
    return found


def _gap(scores: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Of scores (..., N) and the numbers of the K chosen (..., K)."""
    scores = scores.astype(np.float64)
    best = -np.sort(-scores, axis=-1)[..., : chosen.shape[-1]]
    apart = np.abs(np.take_along_axis(scores, chosen, -1) - best).max(initial=0.0)
    return np.array([apart / max(np.abs(best).max(initial=0.0), 1e-12)])


# ---- shadows ----


def _add_shadows(graph: ir.Graph, half: Half, candidates: AbstractSet[str]) -> dict[str, list[tuple[str, ...]]]:
    """Beside every node the same node from rounded inputs; names of the scalar outputs by node, in the order of `_facts`."""
    rounded, told = _Rounded(graph, half), {}
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
        told[_name(node)] = names
    return told


def _shadow(node: ir.Node, rounded: _Rounded, graph: ir.Graph, before: ir.Node | None) -> ir.Node:
    inputs = list(node.inputs)
    for place in _rounded_places(node):
        value = inputs[place]
        assert value is not None
        if not rounded.exactly(value):
            inputs[place] = rounded(value, before)
    twin = ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), num_outputs=len(node.outputs))
    place_node(twin, before, graph)
    for mine, its in zip(twin.outputs, node.outputs, strict=True):
        typed(mine, like=its)
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
    for value, called in zip((peak, highest, error, norm, worst), names, strict=True):
        value.name, value.type, value.shape = called, ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
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
    """Largest of each; nan counts as more than anything."""
    return NodeFacts(*(float(np.max(values)) for values in zip(*map(astuple, facts), strict=True)))
