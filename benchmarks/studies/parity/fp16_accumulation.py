"""What sums in FP16 cost, simulated: by the length of a sum, and in the full-size graphs.

    WSSS_BERT_VOCAB=vocab.txt python -m wsss.benchmarks.studies.parity.fp16_accumulation [--model "sam vit_b"]

``benchmarks/results/fp16-accumulation.json`` has the relative error of products of random matrices whose sums are rounded to FP16
after every 16 terms, beside that of rounding the result once; and the error of each graph's outputs against FP32 with all long
products added in FP32 and in FP16, with weights ``random:0`` and one of the gate's samples. Models that are already in it are
left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from ....export.family import Graph, Options, family
from ....export.precision.accumulation import add_in_fp16, long_products
from ....export.precision.instrumentation import Session, open_copy
from ....export.precision.search import CALIBRATION_SEED
from ....export.precision.simulation import Plan, Rounding
from ....export.to_onnx import marked, trace
from ..harness import RESULTS, log, read_result, study_parser, write_result

RESULT = RESULTS / "fp16-accumulation.json"
LENGTHS = (16, 32, 64, 128, 256, 768, 3072, 4096)
GRAPHS = {"clip ViT-B-16": "image", "sam vit_b": "encoder", "grounding-dino swin_t": "image-800x1088"}


def main() -> None:
    """Run the command line of the module."""
    parser = study_parser(__spec__, __doc__)
    parser.add_argument("--model", action="append", choices=list(GRAPHS), help="default: all")
    options = parser.parse_args()
    result = read_result(RESULT)
    if "lengths" not in result:
        result["lengths"] = {str(length): errors_of_sums(length) for length in LENGTHS}
        write_result(RESULT, result)
    for name in options.model or GRAPHS:
        if name not in result:
            kind, _, variant = name.partition(" ")
            result[name] = errors_of_graph(kind, variant, GRAPHS[name])
            log(f"{name}: {result[name]}")
            write_result(RESULT, result)


def errors_of_sums(length: int) -> dict[str, float]:
    """Relative errors of a product of random matrices that FP16 represents exactly."""
    random = np.random.default_rng(length)
    x, weights = (random.normal(size=shape).astype(np.float16).astype(np.float32) for shape in ((256, length), (length, 256)))
    values = [ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT)) for name in ("x", "w", "y")]
    values[1].const_value = ir.Tensor(weights, name="w")
    node = ir.Node("", "MatMul", values[:2], outputs=values[2:], name="product")
    graph = ir.Graph(values[:1], values[2:], nodes=[node], initializers=values[1:2], opset_imports={"": 18}, name="sum")
    values[0].shape, values[1].shape = ir.Shape(["N", length]), ir.Shape(weights.shape)
    model = open_copy(ir.Model(graph, ir_version=10))
    add_in_fp16(model, {"product"})
    with Session(model) as session:
        (got,) = session({"x": x}).values()
    exact = x.astype(np.float64) @ weights
    sums, rounding = (float(np.linalg.norm(each - exact) / np.linalg.norm(exact)) for each in (got, exact.astype(np.float16)))
    return {"sums_in_fp16": sums, "rounding": rounding, "ratio": round(sums / rounding, 2)}


def errors_of_graph(kind: str, variant: str, name: str) -> dict[str, Any]:
    """Errors of the outputs of a graph in FP16, one row, against FP32, with both kinds of sums."""
    sizes = (tuple(map(int, name.partition("-")[2].split("x"))),) if kind == "grounding-dino" else ()
    prepared = family(kind).prepare(variant, "random:0", Options(sizes=sizes))  # type: ignore[arg-type]
    graph = next(graph for graph in (make() for make in prepared.graphs) if graph.name == name).at("fp16")
    model = trace(graph)
    keep = frozenset(marked(model, graph).nodes)
    feeds = graph.take(graph.sample(2, CALIBRATION_SEED), [0])
    feeds = {name: value.astype(np.float32) if value.dtype == np.float16 else value for name, value in feeds.items()}
    with Session(open_copy(model)) as session:
        exact = session(feeds)
    exact = {**graph.reference(feeds, exact), **exact}
    errors: dict[str, Any] = {"products": len(long_products(model) - keep)}
    for sums in ("fp32", "fp16"):
        copy = open_copy(model)
        if sums == "fp16":
            add_in_fp16(copy, long_products(model) - keep)
        errors[f"sums in {sums}"] = _errors(graph, copy, keep, feeds, exact)
    return errors | {"allowed": {output: tolerance.relative for output, tolerance in graph.tolerance.items()}}


def _errors(
    graph: Graph, model: ir.Model, keep: frozenset[str], feeds: dict[str, np.ndarray], exact: dict[str, np.ndarray]
) -> dict[str, float]:
    io = {spec.name: spec.dtype for spec in (*graph.inputs, *graph.outputs)}
    choices = (graph.ties,) if graph.ties else ()
    with Rounding(Plan(model, "fp16"), io, choices) as rounding:
        got = rounding(feeds, keep, {name: exact[name] for name in choices})
    return {output: tolerance.measure(got, exact, output)[0] for output, tolerance in graph.tolerance.items()}


if __name__ == "__main__":
    main()
