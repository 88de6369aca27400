"""The gate on engines whose fault is known."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
from torch import nn

from wsss.errors import ParityError
from wsss.export.family import (
    COARSER,
    Feeds,
    Graph,
    InHalf,
    Measure,
    Tolerance,
    gap_of_choices,
    miscount,
    relative_error,
    share_impossible,
)
from wsss.export.verify import References, arranged, gate, photograph
from wsss.spec import AxisRange, Parity, TensorSpec

Rule = Callable[[np.ndarray], np.ndarray]


def double(x: np.ndarray) -> np.ndarray:
    return 2 * x


class Computes:
    """An engine that is one function of ``x``; its output memory is reused, as the protocol allows."""

    axes: Mapping[str, AxisRange] = {"batch": AxisRange(1, 2, 5)}
    inputs: Mapping[str, TensorSpec] = {"x": TensorSpec("x", ("batch", 3), "float32")}
    outputs: Mapping[str, TensorSpec] = {"y": TensorSpec("y", ("batch", 3), "float32")}

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.memory = np.zeros((5, 3), np.float32)
        self.batches: list[int] = []

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> Feeds:
        rows = len(feeds["x"])
        self.batches.append(rows)
        self.memory[:rows] = self.rule(feeds["x"])
        return {"y": self.memory[:rows]}


def make_graph(
    *, relative: float = 1e-6, absolute: float | None = None, measure: Measure = relative_error, whole: bool = False
) -> Graph:
    def sample(rows: int, seed: int) -> Feeds:
        return {"x": np.random.default_rng(seed).normal(size=(rows, 3)).astype(np.float32)}

    return Graph(
        name="toy",
        module=nn.Identity(),
        inputs=tuple(Computes.inputs.values()),
        outputs=tuple(Computes.outputs.values()),
        axes=Computes.axes,
        row_axis="batch",
        whole=whole,
        sample=sample,
        reference=lambda feeds, _: {"y": double(feeds["x"])},
        tolerance={"y": Tolerance(relative=relative, absolute=absolute, measure=measure, why="test")},
    )


def run(rule: Rule, graph: Graph | None = None) -> Parity:
    return gate(graph or make_graph(), Computes(rule), engine_name="toy", reference_name="numpy", where="toy")


def in_place(x: np.ndarray, change: Callable[[np.ndarray], None]) -> np.ndarray:
    y = double(x)
    change(y)
    return y


def test_a_right_engine_passes_at_one_two_and_the_largest_batch() -> None:
    parity = run(double)
    assert {(row.batch, row.against) for row in parity.rows} == {
        (1, "reference"),
        (2, "reference"),
        (2, "alone"),
        (5, "reference"),
        (5, "alone"),
    }
    assert parity.worst("y").error == 0


def test_progress_ends_with_all_of_the_work() -> None:
    names = {"engine_name": "toy", "reference_name": "numpy", "where": "toy"}
    for graph in (make_graph(), replace(make_graph(), distinct=3), make_graph(whole=True), picking_graph([])):
        seen: list[tuple[int, int]] = []
        gate(graph, Picks() if graph.ties else Computes(double), **names, progress=lambda *each, seen=seen: seen.append(each))
        done, of = zip(*seen, strict=True)
        assert len(set(of)) == 1 and list(done) == sorted(done) and done[-1] == of[0], graph


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (lambda x: 2 * x + 1e-3, "row 0 of batch 1, against reference"),
        (lambda x: double(x)[::-1], "row 0 of batch 2, against reference"),
        (lambda x: double(x) + (x.mean(0) - x) * (len(x) > 2), "of batch 5, against reference"),
        (lambda x: in_place(x, lambda y: y.__setitem__((-1, -1), np.nan)), "row 0 of batch 1"),
        (lambda x: in_place(x, lambda y: y.__setitem__((-1, -1), np.inf)), "row 0 of batch 1"),
        (lambda x: np.where(np.arange(len(x))[:, None] == 4, 0, double(x)), "row 4 of batch 5"),
        (np.zeros_like, "error 1, "),
    ],
    ids=["shifted", "rows reversed", "rows leak", "nan", "inf", "last row empty", "all zero"],
)
def test_a_wrong_engine_is_refused_with_output_row_and_distance(rule: Rule, says: str) -> None:
    with pytest.raises(ParityError, match=r"toy: output 'y', row \d of batch \d") as error:
        run(rule)
    assert says in str(error.value)


# ---- few different inputs in a large batch ----


def wrong_reading(index: Callable[[np.ndarray], np.ndarray]) -> Rule:
    return lambda x: double(x)[index(np.arange(len(x))) % len(x)] if len(x) > 2 else double(x)


def mixed(one: int, other: int, share: float) -> Rule:
    def rule(x: np.ndarray) -> np.ndarray:
        y = double(x)
        if len(x) > 2:
            y[one] += share * (y[other] - y[one])
        return y

    return rule


ROWS = 8
WRONG: dict[str, Rule] = {
    **{f"row i reads i - {k}": wrong_reading(lambda i, k=k: i - k) for k in range(1, ROWS)},
    **{f"row i reads i - {k}, or the first": wrong_reading(lambda i, k=k: (i - k).clip(0)) for k in range(1, ROWS)},
    **{f"row i reads i + {k}, or the last": wrong_reading(lambda i, k=k: (i + k).clip(max=ROWS - 1)) for k in range(1, ROWS)},
    "reversed": wrong_reading(lambda i: -1 - i),
    **{f"all rows read row {k}": wrong_reading(lambda i, k=k: 0 * i + k) for k in range(ROWS)},
    **{f"row i reads {k} i": wrong_reading(lambda i, k=k: k * i) for k in (2, 3, 5, 7)},
    "pairs swapped": wrong_reading(lambda i: i ^ 1),
    "halves swapped": wrong_reading(lambda i: i ^ 4),
    "row i reads i // 2": wrong_reading(lambda i: i // 2),
    **{f"rows {k} and {k + 1} mix": mixed(k, k + 1, 1e-4) for k in range(ROWS - 1)},
    "the last row reads the first": mixed(ROWS - 1, 0, 1e-4),
    "the mean of all rows": lambda x: double(x) + 1e-4 * (x.mean(0) - x) * (len(x) > 2),
    "the last row empty": lambda x: np.where(np.arange(len(x))[:, None] == ROWS - 1, 0, double(x)),
}


class Large(Computes):
    axes: Mapping[str, AxisRange] = {"batch": AxisRange(1, 2, ROWS)}

    def __init__(self, rule: Rule) -> None:
        super().__init__(rule)
        self.memory = np.zeros((ROWS, 3), np.float32)


def few_inputs(distinct: int | None) -> Graph:
    return replace(make_graph(), axes=Large.axes, distinct=distinct)


@pytest.mark.parametrize("distinct", [None, 3])
@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_row_shows_though_inputs_repeat(fault: str, distinct: int | None) -> None:
    """All faults are right at batch 1 and 2."""
    with pytest.raises(ParityError, match=f"row . of batch {ROWS}, against"):
        gate(few_inputs(distinct), Large(WRONG[fault]), engine_name="toy", reference_name="numpy", where="toy")


@pytest.mark.parametrize(("rows", "inputs"), [(1, 1), (2, 2), (4, 3), (5, 3), (8, 3), (16, 3), (64, 3), (8, 4), (3, 8)])
def test_the_order_of_inputs_tells_every_distance(rows: int, inputs: int) -> None:
    order = arranged(rows, inputs)
    assert order == arranged(rows, inputs), "the same each time"
    assert order[: min(rows, inputs)] == list(range(min(rows, inputs))) and len(order) == rows
    assert all(one != next_one for one, next_one in itertools.pairwise(order))
    for distance in range(1, rows):
        assert any(order[row] != order[row + distance] for row in range(rows - distance))
        assert any(order[row] != order[(row + distance) % rows] for row in range(rows))


def test_inputs_that_repeat_are_computed_once() -> None:
    counted: list[bytes] = []

    def reference(feeds: Feeds, _: Feeds) -> Feeds:
        counted.append(feeds["x"].tobytes())
        return {"y": double(feeds["x"])}

    engine = Large(double)
    names = {"reference_name": "numpy", "where": "toy"}
    graph = replace(few_inputs(3), reference=reference)
    references = References(graph)
    parity = gate(graph, engine, engine_name="toy", **names, references=references)
    assert {row.batch for row in parity.rows} == {1, 2, ROWS}
    assert len(counted) == len(set(counted)) == 3
    assert sorted(engine.batches) == [1, 1, 1, 2, ROWS]
    gate(graph, Large(double), engine_name="another", **names, references=references)
    assert len(counted) == 3, "shared by the engines"
    assert {row.batch for row in gate(graph, engine, engine_name="toy", **names, largest=2).rows} == {1, 2}


def test_references_are_those_of_their_inputs_and_choices() -> None:
    chosen: list[int] = []
    references = References(picking_graph(chosen))
    x, pick = np.arange(3, dtype=np.float32)[None], np.array([[1]])
    assert references({"x": x}, {"pick": pick})["y"] == 1 and references({"x": x}, {"pick": pick, "y": x})["y"] == 1
    assert references({"x": x + 5}, {"pick": pick})["y"] == 6 and references({"x": x}, {"pick": pick + 1})["y"] == 2
    assert chosen == [1, 1, 2]


def test_references_of_equal_bytes_are_apart_where_their_shapes_or_types_differ() -> None:
    references = References(replace(make_graph(), reference=lambda feeds, _: {"y": feeds["x"]}))
    x = np.zeros((1, 4), np.float32)
    for each in (x, x.reshape(2, 2), x.view(np.int32)):
        y = references({"x": each}, {})["y"]
        assert (y.shape, y.dtype) == (each.shape, each.dtype)


# ---- more about one comparison ----


def test_an_output_of_another_shape_is_refused_though_it_could_be_broadcast() -> None:
    class Narrow(Computes):
        def __call__(self, feeds: Mapping[str, np.ndarray]) -> Feeds:
            return {"y": super().__call__(feeds)["y"][:, :1]}

    with pytest.raises(ParityError, match=r"row 0 of batch 1, against reference: shape \(1, 1\), expected \(1, 3\)"):
        gate(make_graph(), Narrow(double), engine_name="toy", reference_name="numpy", where="toy")


def test_a_leak_within_the_tolerance_of_the_reference_still_counts_against_the_row_alone() -> None:
    loose = make_graph(relative=0.1)
    with pytest.raises(ParityError, match="against alone"):
        run(lambda x: double(x) * (0.91 if len(x) == 1 else 1.09), loose)


def test_equal_infinities_do_not_differ() -> None:
    """Masked logits are minus infinity in the reference too."""
    want = {"y": np.array([-np.inf, 3, 4], np.float32)}
    assert relative_error(want, want, "y") == (0, 0)
    assert relative_error({"y": np.array([-np.inf, 3, 3], np.float32)}, want, "y") == (0.2, 1)
    assert relative_error({"y": np.array([-9e9, 3, 4], np.float32)}, want, "y") == (np.inf, np.inf)


def test_bfloat16_is_allowed_wider_ties_and_errors_than_float16() -> None:
    scales: list[float] = []

    def reference(scale: float) -> Callable[[Feeds, Feeds], Feeds]:
        scales.append(scale)
        return lambda feeds, _: {"y": double(feeds["x"])}

    half = InHalf(tolerance={"y": Tolerance(relative=1e-2, absolute=1e-3, why="test")}, reference=reference)
    graphs = [replace(make_graph(), half=half).at(precision) for precision in ("fp16", "bf16")]  # type: ignore[arg-type]
    assert scales == [1.0, COARSER]
    assert [(graph.tolerance["y"].relative, graph.tolerance["y"].absolute) for graph in graphs] == [
        (1e-2, 1e-3),
        (4e-2, 4e-3),
    ]


@pytest.mark.parametrize("worst", [np.inf, np.nan])
def test_a_difference_that_is_no_number_fails_under_any_tolerance(worst: float) -> None:
    graph = make_graph(relative=np.inf, measure=lambda got, want, name: (0.0, worst))
    with pytest.raises(ParityError, match=f"error 0, largest difference {worst}"):
        run(double, graph)


def test_the_absolute_limit_sees_one_value_among_many() -> None:
    def one_off(x: np.ndarray) -> np.ndarray:
        return in_place(x, lambda y: y.__setitem__((0, 0), y[0, 0] + 0.01))

    assert run(one_off, make_graph(relative=0.5))
    with pytest.raises(ParityError, match=r"largest difference 0\.01"):
        run(one_off, make_graph(relative=0.5, absolute=1e-3))


def test_a_whole_graph_is_compared_as_one() -> None:
    parity = run(double, make_graph(whole=True))
    assert [(row.batch, row.row, row.against) for row in parity.rows] == [(size, 0, "reference") for size in (1, 2, 5)]
    with pytest.raises(ParityError):
        run(lambda x: double(x)[::-1], make_graph(whole=True))


def test_the_verdict_holds_the_largest_error_of_each_batch() -> None:
    parity = run(lambda x: double(x) * np.linspace(1, 1 + 5e-4, len(x), dtype=np.float32)[:, None], make_graph(relative=1e-3))
    errors = {row.batch: (row.row, row.error) for row in parity.rows if row.against == "reference"}
    assert errors == {1: (0, 0.0), 2: (1, pytest.approx(5e-4, rel=1e-3)), 5: (4, pytest.approx(5e-4, rel=1e-3))}
    assert parity.worst("y").error == max(error for _, error in errors.values())


VALUES = np.array([[[3.0, 1.0], [3.0, 2.0], [-5.0, 2.00001]]])  # three choices at each of two places


@pytest.mark.parametrize(
    ("chosen", "gap"),
    [
        pytest.param([0, 2], 0.0, id="the same"),
        pytest.param([1, 2], 0.0, id="another of equal ones"),
        pytest.param([0, 1], 1e-5, id="another, less by rounding"),
        pytest.param([0, 0], 1.00001, id="one wrong among many"),
        pytest.param([2, 2], 8.0, id="the worst"),
        pytest.param([0, 3], np.inf, id="one that does not exist"),
        pytest.param([-1, 2], np.inf, id="a negative one"),
    ],
)
def test_choices_lie_as_far_apart_as_their_values(chosen: list[int], gap: float) -> None:
    want = {"y": np.array([[0, 2]])[:, : len(chosen)], "y.values": VALUES[..., : len(chosen)]}
    error, apart = gap_of_choices({"y": np.array([chosen], np.int64)}, want, "y")
    assert apart == pytest.approx(gap, abs=1e-9)
    assert error == pytest.approx(gap / np.sqrt(np.square(VALUES).mean()), abs=1e-9)


def test_a_name_is_right_if_it_is_one_of_the_options() -> None:
    want = {"y.options": np.array([[1, 1, 2, 3], [1, 0, 2, 3]])}
    assert share_impossible({"y": np.array([1, 0, 2, 3])}, want, "y") == (0, 0)
    assert share_impossible({"y": np.array([1, 2, 2, 0])}, want, "y") == (0.5, 0.5)


@pytest.mark.parametrize(("counts", "outside"), [([4, 10], 0), ([5, 10], 0), ([3, 10], 1), ([6, 10], 1), ([4, 13], 3)])
def test_a_count_is_right_within_its_range(counts: list[int], outside: int) -> None:
    want = {"y.range": np.array([[4, 10], [5, 10]])}
    assert miscount({"y": np.array(counts)}, want, "y") == (outside / 10, outside)


def test_ties_are_recognized_beside_the_row_alone_too() -> None:
    """One of two equal values, another in every batch."""

    class Chooses(Computes):
        def __call__(self, feeds: Mapping[str, np.ndarray]) -> Feeds:
            return {"y": np.full((len(feeds["x"]), 3), len(feeds["x"]) % 2)}

    def graph(values: list[float]) -> Graph:
        reference = {"y": np.zeros((1, 3), np.int64), "y.values": np.repeat(np.array(values)[None, :, None], 3, axis=2)}
        return Graph(**{**vars(make_graph(measure=gap_of_choices)), "reference": lambda feeds, _: reference})

    parity = gate(graph([1.0, 1.0, 0.0]), Chooses(double), engine_name="toy", reference_name="numpy", where="toy")
    assert {row.against for row in parity.rows} == {"reference", "alone"}
    with pytest.raises(ParityError, match="'y', row 0 of batch 1, against reference"):
        gate(graph([1.0, 0.9, 0.0]), Chooses(double), engine_name="toy", reference_name="numpy", where="toy")


class Picks(Computes):
    """Chooses another entry of ``x`` for every batch size; ``spoil`` changes rows computed alone."""

    def __init__(self, spoil: Rule = lambda y: y) -> None:
        super().__init__(double)
        self.spoil = spoil

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> Feeds:
        rows = len(feeds["x"])
        pick = np.full((rows, 1), rows % 3, np.int64)
        y = np.take_along_axis(feeds["x"], pick, axis=1)
        return {"y": self.spoil(y) if rows == 1 else y, "pick": pick}


def picking_graph(chosen: list[int]) -> Graph:
    def reference(feeds: Feeds, found: Feeds) -> Feeds:
        chosen.append(int(found["pick"][0, 0]))
        return {"y": np.take_along_axis(feeds["x"], found["pick"], axis=1)}

    return Graph(**{**vars(make_graph()), "reference": reference, "ties": "pick"})


def test_a_choice_between_near_equals_is_no_error() -> None:
    """The engine's own choice goes to the reference; comparison with the row alone is left out where it differs."""
    chosen: list[int] = []
    gate(picking_graph(chosen), Picks(), engine_name="toy", reference_name="numpy", where="toy")
    assert set(chosen) == {1, 2}


def test_a_choice_that_was_no_near_tie_is_an_error_of_its_row() -> None:
    def reference(feeds: Feeds, found: Feeds) -> Feeds:
        if found["pick"][0, 0] == 2:
            raise ParityError("pick 2 was not near")
        return {"y": np.take_along_axis(feeds["x"], found["pick"], axis=1)}

    graph = Graph(**{**vars(picking_graph([])), "reference": reference})
    with pytest.raises(ParityError, match=r"^toy: row 0 of batch 2: pick 2 was not near"):
        gate(graph, Picks(), engine_name="toy", reference_name="numpy", where="toy")


def test_a_row_alone_that_chose_otherwise_is_held_to_the_reference() -> None:
    engine = Picks(spoil=lambda y: y + 1e-3)
    graph = Graph(**{**vars(picking_graph([])), "axes": {"batch": AxisRange(2, 2, 5)}})  # no batch of one of its own
    with pytest.raises(ParityError, match="'y', row 0 of batch 1, against reference"):
        gate(graph, engine, engine_name="toy", reference_name="numpy", where="toy")


def test_photographs_are_all_different_and_not_gray() -> None:
    rng = np.random.default_rng(0)
    one, other = photograph(rng, 40, 60), photograph(rng, 40, 60)
    assert one.shape == (40, 60, 3) and one.dtype == np.uint8
    assert (one != other).mean() > 0.9
    assert np.abs(one[..., 0].astype(int) - one[..., 2]).mean() > 10
