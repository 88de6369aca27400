"""What TensorRT-RTX compiles the full-size FP16 graphs to; no GPU needed.

    WSSS_BERT_VOCAB=vocab.txt python -m wsss.benchmarks.studies.speed.compiled_graphs [--model "sam vit_b"] [--fp32-accumulation]

Graphs are exported with weights ``random:0`` and without the gate. ``benchmarks/results/compiled-graphs.json`` has for each graph
the kernels, the attentions fused to one kernel, the softmaxes that are kernels of their own, gigabytes of memory traffic and
multiply-adds an image (a box for SAM's decoder), and the milliseconds that both take at least on an H200 (790 TFLOP/s in FP16
and 4.3 TB/s, as measured there by torch). The keys under ``before`` are those of commit b9f864c, compiled by the same tool.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ....export.exporting import export_model
from ....export.family import Options, family
from ....export.to_engine import ALONE, FUSED
from ....spec import AxisRange, Bundle
from ...compiled import Compiled, compiled
from ..harness import RESULTS, log, read_result, study_parser, write_result

RESULT = RESULTS / "compiled-graphs.json"
MODELS = ("clip ViT-B-16", "grounding-dino swin_t", "sam vit_b", "sam vit_h")
LEFT_OUT = ("clip/text", "grounding-dino/text", "sam/fuse")
"""Run once for a run, or have no attention."""
FLOPS, BYTES_PER_SECOND = 790e12, 4.3e12
ROWS = {"decoder": 64}
"""Rows in a call; of other graphs 4."""
CANVASES = ((1024, 1024), (800, 1088))


def main() -> None:
    """Run the command line of the module."""
    parser = study_parser(__spec__, __doc__, work="build/compiled-graphs")
    parser.add_argument("--model", action="append", choices=MODELS, help="default: all")
    parser.add_argument("--fp32-accumulation", action="store_true", help="add long products in FP32")
    options = parser.parse_args()
    result = read_result(RESULT)
    for name in options.model or MODELS:
        kind, _, variant = name.partition(" ")
        export = partial(export_model, family(kind), variant=variant, weights="random:0", gate=False, log=log)
        sizes = CANVASES if kind == "grounding-dino" else ()
        sums = options.fp32_accumulation
        bundle = options.work / (name.replace(" ", "-") + sums * "-fp32-accumulation")
        settings = Options(precision="fp16", batch=AxisRange(1, 4, 8), sizes=sizes, fp32_accumulation=sums)
        export(bundle=bundle, options=settings)
        model = Bundle(bundle).model(kind)
        for graph in model.manifest.graphs:
            if f"{kind}/{graph}" not in LEFT_OUT:
                result[f"{name}: {graph}{sums * ', FP32 accumulation'}"] = row_of(compiled(model, graph, ROWS.get(graph, 4)))
                write_result(RESULT, result)


def row_of(found: Compiled) -> dict[str, Any]:
    """The result of one graph."""
    assert found.multiply_adds is not None
    gemm = found.multiply_adds / found.rows
    return {
        "rows": found.rows,
        "kernels": sum(count for count, _ in found.kernels.values()),
        "gemm": found.count("gemm"),
        "fused_attentions": found.count(FUSED),
        "softmaxes_alone": found.count(ALONE),
        "gigabytes": round(found.bytes_per_row / 1e9, 3),
        "gmacs": round(gemm / 1e9, 1),
        "ms_of_bytes": round(1e3 * found.bytes_per_row / BYTES_PER_SECOND, 3),
        "ms_of_products": round(2e3 * gemm / FLOPS, 3),
    }


if __name__ == "__main__":
    main()
