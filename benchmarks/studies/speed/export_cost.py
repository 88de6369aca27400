"""CPU time and peak memory of `wsss export` and `wsss verify`, graph by graph, from which `wsss.export.cost` estimates them.

    WSSS_BERT_VOCAB=vocab.txt python -m wsss.benchmarks.studies.speed.export_cost [--model "sam vit_b"] [--batch 1 1 2]

Each model is exported with random weights in a process of its own. The peak of the gate is that of ``wsss verify``, which loads
the model and runs the gate. The largest batch of the gate decides its memory: ``--batch`` measures a large model on a small
machine.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..harness import RESULTS, about, log, peak_memory_bytes, read_result, run_part, study_parser, write_result

MODELS = {
    "clip ViT-B-16": ("clip", "ViT-B-16", ()),
    "clip ViT-L-14": ("clip", "ViT-L-14", ()),
    "grounding-dino swin_t": ("grounding-dino", "swin_t", ((800, 1088), (1088, 800))),
    "grounding-dino swin_b": ("grounding-dino", "swin_b", ((800, 1088),)),
    "sam vit_b": ("sam", "vit_b", ()),
    "sam vit_l": ("sam", "vit_l", ()),
    "sam vit_h": ("sam", "vit_h", ()),
}


def main() -> None:
    """Command line of the study."""
    parser = study_parser(__spec__, __doc__, out=RESULTS / "export-cost.json", work="build/export-cost")
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all that are not in the result file")
    parser.add_argument("--batch", type=int, nargs=3, metavar=("MIN", "OPT", "MAX"), help="default: the usual one")
    parser.add_argument("--part", help="used by the study itself")
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(measure(arguments.part, arguments.batch, arguments.work)))
        return
    found = read_result(arguments.out)
    for name in arguments.model or [name for name in MODELS if name not in found]:
        batch = ["--batch", *arguments.batch] if arguments.batch else []
        found[name] = run_part(__spec__, "--part", name, "--work", arguments.work, *batch)
        write_result(arguments.out, found)


def measure(name: str, batch: list[int] | None, work: Path) -> dict[str, Any]:
    """The costs of one export: of loading, and of tracing and gating each graph."""
    from ....export import exporting
    from ....export.family import Options, family
    from ....spec import AxisRange

    model, variant, sizes = MODELS[name]
    chosen = family(model)
    options = Options(batch=AxisRange(*batch) if batch else None, sizes=sizes)
    graphs: dict[str, dict[str, Any]] = {}
    loaded = cost(lambda: chosen.prepare(variant, "random:0", options))
    export_onnx, gate = exporting.export_onnx, exporting._gate  # type: ignore[attr-defined]

    def traced(graph: Any, *given: Any, **named: Any) -> Any:
        result: list[Any] = []
        found = cost(lambda: result.append(export_onnx(graph, *given, **named)))
        graphs[graph.name] = {"pixels": pixels_of(graph), "rows": graph.axes[graph.row_axis].max, "trace": found}
        return result[0]

    def gated(graph: Any, *given: Any, **named: Any) -> Any:
        result: list[Any] = []
        graphs[graph.name]["gate"] = cost(lambda: result.append(gate(graph, *given, **named)))
        graphs[graph.name]["batches"] = sorted({row.batch for row in result[0].rows})
        return result[0]

    exporting.export_onnx, exporting._gate = traced, gated  # type: ignore[attr-defined]
    manifest = exporting.export_model(chosen, variant=variant, weights="random:0", bundle=work, options=options, log=log)
    weights = (work / model / "weights.data").stat().st_size
    return {**about(), "variant": manifest.variant, "weights_bytes": weights, "loading": loaded, "graphs": graphs}


def pixels_of(graph: Any) -> int:
    """Pixels of one row of an image graph's input; 0 of other graphs."""
    shapes = [spec.shape for spec in graph.inputs if spec.name == "pixels"]
    return int(shapes[0][1] * shapes[0][2]) if shapes else 0


def cost(call: Callable[[], object]) -> dict[str, float]:
    """CPU seconds of a call, and the peak memory of the process during it, GB."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    begun = time.process_time()
    call()
    return {"cpu_seconds": round(time.process_time() - begun, 1), "peak_gb": round(peak_memory_bytes() / 1e9, 2)}


if __name__ == "__main__":
    main()
