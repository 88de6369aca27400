"""Lowering to half precision: the type of every value, casts, FP32 nodes and what stays float32 by itself."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from wsss.errors import WsssError
from wsss.export.family import Feeds, Graph, Tolerance
from wsss.export.precision.lowering import TYPES, Fp32, Half, fp32_nodes, lower, name_nodes
from wsss.export.to_onnx import trace
from wsss.spec import AxisRange, TensorSpec

FLOAT, HALF, BRAIN = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16


def lowered(
    text: str, *keep: str, half: Half = "fp16", **io: str
) -> tuple[dict[str, ir.DataType | None], dict[str, list[ir.DataType | None]], onnx.ModelProto]:
    """Types of all values by name, and of each node's inputs by the node's name; and the model, which ONNX has checked."""
    model = ir.from_proto(onnx.parser.parse_model('<ir_version: 10, opset_import: ["": 18]>\n' + text))
    ends = {str(value.name): "float32" for value in (*model.graph.inputs, *model.graph.outputs)}
    lower(model, half, frozenset(keep), ends | io)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)  # infers all types again and refuses a node whose inputs do not agree
    values = [*model.graph.inputs, *model.graph.initializers.values(), *(value for node in model.graph for value in node.outputs)]
    reads = {str(node.name): [value.dtype for value in node.inputs if value is not None] for node in model.graph}
    return {str(value.name): value.dtype for value in values}, reads, proto


def casts(proto: onnx.ModelProto) -> list[tuple[str, int]]:
    """(input, target) of every Cast."""
    return [(node.input[0], node.attribute[0].i) for node in proto.graph.node if node.op_type == "Cast"]


def compute(proto: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"], disabled_optimizers=["NchwcTransformer"]
    )
    return session.run(None, dict(feeds))


CHAIN = """g (float[N, 4] x) => (float[N, 4] y) <float[4] w = {1, 2, 3, 4}> {
    [first] a = Mul(x, w)
    [second] b = Exp(a)
    [third] y = Add(b, w)
}"""


@pytest.mark.parametrize(("half", "type_"), [("fp16", HALF), ("bf16", BRAIN)])
def test_every_floating_point_value_becomes_half_between_float32_ends(half: Half, type_: ir.DataType) -> None:
    types, reads, proto = lowered(CHAIN, half=half)
    assert types["x"] == types["y"] == FLOAT
    assert types["a"] == types["b"] == types["w.half"] == type_ and "w" not in types
    assert reads["first"] == reads["third"] == [type_, type_]
    assert [target for _, target in casts(proto)] == [int(type_), int(FLOAT)]


@pytest.mark.parametrize("given", ["float32", "float16"])
@pytest.mark.parametrize("taken", ["float32", "float16"])
def test_inputs_and_outputs_have_the_types_that_were_asked(given: str, taken: str) -> None:
    types, _, proto = lowered(CHAIN, x=given, y=taken)
    assert [types[name] for name in "xy"] == [{"float32": FLOAT, "float16": HALF}[each] for each in (given, taken)]
    assert [value.name for value in proto.graph.output] == ["y"]
    assert len(casts(proto)) == (given, taken).count("float32")
    x = np.array([[0.5, -1, 0.25, 0]], given)
    (y,) = compute(proto, {"x": x})
    assert y.dtype == taken
    w = np.arange(1, 5)
    np.testing.assert_allclose(y, np.exp(x.astype(np.float32) * w) + w, rtol=2e-3)


def test_a_value_that_tracing_called_inner_keeps_its_name() -> None:
    types, _, proto = lowered('g (float[4] x) => (float[4] y) { [one] "y.inner" = Exp(x) [two] y = Neg("y.inner") }')
    assert types["y.inner"] == HALF and types["y"] == FLOAT
    np.testing.assert_allclose(compute(proto, {"x": np.zeros(4, np.float32)})[0], -1)


def test_a_kept_node_reads_and_writes_float32() -> None:
    types, reads, _ = lowered(CHAIN, "second")
    assert reads["second"] == [FLOAT] and types["b"] == FLOAT
    assert reads["first"] == reads["third"] == [HALF, HALF]


def test_neighboring_fp32_nodes_have_no_cast_between_them() -> None:
    _, reads, proto = lowered(CHAIN, "first", "second", "third")
    assert casts(proto) == [] and reads["first"] == [FLOAT, FLOAT]


def test_readers_of_one_value_share_its_cast() -> None:
    _, _, proto = lowered(
        """g (float[4] x) => (float[4] y, float[4] z) {
            [kept] a = Exp(x)
            [left] b = Neg(a)
            [right] c = Abs(a)
            [far] y = Mul(a, b)
            [other] z = Sqrt(c)
        }""",
        "kept",
        y="float16",
        z="float16",
    )
    assert casts(proto) == [("a", int(HALF))]


@pytest.mark.parametrize(
    ("constant", "stays"),
    [("70000", True), ("-3.4e38", True), ("0.000000000001", True), ("65504", False), ("0.00001", False), ("0", False)],
)
def test_a_node_whose_constant_half_would_lose_stays_float32(constant: str, stays: bool) -> None:
    types, reads, _ = lowered(
        f"g (float[4] x) => (float[4] y) <float c = {{{constant}}}> {{ [sum] a = Add(x, c) [out] y = Exp(a) }}"
    )
    assert reads["sum"] == [FLOAT if stays else HALF] * 2
    assert reads["out"] == [HALF] and ("c" in types) == stays


def test_infinity_and_small_weights_among_many_are_no_loss() -> None:
    many = ", ".join(["1"] * 16 + ["0.000000000001"])
    _, reads, _ = lowered(f"g (float[17] x) => (float[17] y) <float[17] c = {{{many}}}> {{ [sum] y = Add(x, c) }}")
    assert reads["sum"] == [HALF, HALF]
    _, reads, _ = lowered("g (float[1] x) => (float[1] y) <float[1] c = {-inf}> { [most] y = Max(x, c) }")
    assert reads["most"] == [HALF, HALF]


MOVES = """g (float[2, 3] x) => (float[3, 2] y) <int64[2] s = {3, 2}> {
    [before] a = Exp(x)
    [turn] b = Transpose(a)
    [shape] c = Reshape(b, s)
    [after] y = Neg(c)
}"""


def test_moves_between_fp32_nodes_do_not_round() -> None:
    types, _, proto = lowered(MOVES, "before", "after")
    assert {types[name] for name in "abc"} == {FLOAT} and casts(proto) == []


@pytest.mark.parametrize("kept", ["before", "after"])
def test_moves_with_an_fp32_node_on_one_side_are_half(kept: str) -> None:
    types, _, _ = lowered(MOVES, kept)
    assert types["b"] == types["c"] == HALF


def test_a_move_of_fp32_and_half_together_is_half() -> None:
    types, reads, _ = lowered(
        """g (float[2] x) => (float[4] y) {
            [kept] a = Exp(x)
            [rough] b = Neg(x)
            [join] c = Concat<axis = 0>(a, b)
            [after] y = Abs(c)
        }""",
        "kept",
        "after",
    )
    assert types["c"] == HALF and reads["join"] == [HALF, HALF] and reads["after"] == [FLOAT]


def test_scales_of_a_resize_stay_float32() -> None:
    _, reads, proto = lowered(
        """g (float[1, 1, 2, 2] x) => (float[1, 1, 4, 4] y) <float[4] scales = {1, 1, 2, 2}> {
            [resize] y = Resize<mode = "nearest">(x, , scales)
        }"""
    )
    assert reads["resize"] == [HALF, FLOAT]
    assert compute(proto, {"x": np.ones((1, 1, 2, 2), np.float32)})[0].shape == (1, 1, 4, 4)


@pytest.mark.parametrize(("source", "type_"), [("uint8", HALF), ("bool", HALF), ("int32", FLOAT), ("int64", FLOAT)])
def test_pixels_and_masks_become_half_but_counts_float32(source: str, type_: ir.DataType) -> None:
    types, _, _ = lowered(f"g ({source}[3] n) => (float[3] y) {{ [wide] a = Cast<to = 1>(n) [out] y = Neg(a) }}")
    assert types["a"] == type_


def test_whole_numbers_are_read_from_either_type() -> None:
    types, reads, _ = lowered("g (float[3] x) => (int64[3] n) { [e] a = Exp(x) [whole] n = Cast<to = 7>(a) }", "e")
    assert reads["whole"] == [FLOAT] and types["n"] == ir.DataType.INT64
    _, reads, _ = lowered("g (float[3] x) => (int64[3] n) { [e] a = Exp(x) [whole] n = Cast<to = 7>(a) }")
    assert reads["whole"] == [HALF]


def test_steps_of_a_range_are_counted_in_float32() -> None:
    types, _, _ = lowered(
        "g (float x) => (float[N] y) <float zero = {0}, float one = {1}> { [steps] a = Range(zero, x, one) [out] y = Neg(a) }"
    )
    assert types["a"] == FLOAT and types["y.uncast"] == HALF


def test_filled_tensors_take_the_type() -> None:
    types, _, proto = lowered(
        "g (int64[1] n) => (float[N] y) { [fill] a = ConstantOfShape<value = float[1] {0.1}>(n) [out] y = Neg(a) }"
    )
    assert types["a"] == HALF
    assert compute(proto, {"n": np.array([2])})[0].tolist() == [-np.float16(0.1)] * 2
    types, _, proto = lowered("g (int64[1] n) => (float[N] y) { [fill] a = ConstantOfShape(n) [out] y = Exp(a) }")
    assert types["a"] == HALF  # also where the zero is not written
    assert compute(proto, {"n": np.array([2])})[0].tolist() == [1, 1]


def test_an_unknown_fp32_node_is_refused() -> None:
    with pytest.raises(WsssError, match="no node 'nowhere'"):
        lowered(CHAIN, "nowhere")


class HasFp32(nn.Module):
    """Squares beyond float16 inside of an `Fp32`, and halves them again outside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Fp32(lambda x: (x * x).sum(-1, keepdim=True).sqrt(), why="a sum of squares")

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(-x) / self.norm(x)


def test_fp32_nodes_come_from_the_modules_with_their_reasons() -> None:
    def sample(rows: int, seed: int) -> Feeds:
        return {"x": np.random.default_rng(seed).uniform(300, 400, (rows, 8)).astype(np.float32)}

    graph = Graph(
        name="toy",
        module=HasFp32(),
        inputs=(TensorSpec("x", ("batch", 8), "float32"),),
        outputs=(TensorSpec("y", ("batch", 8), "float32"),),
        axes={"batch": AxisRange(1, 2, 4)},
        row_axis="batch",
        sample=sample,
        reference=lambda feeds, _: feeds,
        tolerance={"y": Tolerance(relative=1e-3, why="test")},
    )
    model = trace(graph)
    found = fp32_nodes(model, graph.module)
    ops = {str(node.name): node.op_type for node in model.graph}
    assert set(found.values()) == {"a sum of squares"}
    inside, outside = {ops[name] for name in found}, {ops[name] for name in ops.keys() - found.keys()}
    assert {"Mul", "Sqrt"} <= inside and {"Exp", "Div"} <= outside and not inside & {"Exp", "Div", "Neg"}


def test_every_node_gets_a_name_of_its_own() -> None:
    text = '<ir_version: 10, opset_import: ["": 18]> g (float x) => (float y) { [a] b = Neg(x) [a] c = Neg(b) y = Neg(c) }'
    model = ir.from_proto(onnx.parser.parse_model(text))
    name_nodes(model)
    names = [node.name for node in model.graph]
    assert names[0] == "a" and len(set(names)) == 3 and all(names)


@pytest.mark.parametrize(
    ("constant", "half", "stays"),
    [
        ([1, 2], "fp16", False),
        ([1, 1e5], "fp16", True),
        ([1, 1e5], "bf16", False),
        ([1e5, 1e5], "fp16", True),
        ([1, 1e-9], "fp16", True),
        ([1, 1e-9], "bf16", False),
        ([0, 1], "fp16", False),
        ([*range(15), 1e-9], "fp16", True),
        ([*range(16), 1e-9], "fp16", False),  # a weight, not an epsilon
        ([*range(16), 1e5], "fp16", True),
    ],
)
def test_a_node_stays_float32_if_one_value_of_its_constant_is_lost(constant: list[float], half: Half, stays: bool) -> None:
    model = ir.from_proto(
        onnx.parser.parse_model(
            f"""<ir_version: 10, opset_import: ["": 18]>
            g (float[N, {len(constant)}] x) => (float[N, {len(constant)}] y) {{ [scale] y = Mul(x, w) }}"""
        )
    )
    w = ir.Value(name="w", type=ir.TensorType(FLOAT), shape=ir.Shape([len(constant)]))
    w.const_value = ir.Tensor(np.array(constant, np.float32), name="w")
    (scale,) = model.graph
    old = scale.inputs[1]
    assert old is not None
    scale.replace_input_with(1, w)
    model.graph.register_initializer(w)
    lower(model, half, frozenset(), {"x": "float32", "y": "float32"})
    assert [value.dtype for value in scale.inputs if value is not None] == [FLOAT if stays else TYPES[half]] * 2
