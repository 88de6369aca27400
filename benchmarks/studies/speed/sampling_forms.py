"""Grounding-DINO's ways to read between feature cells, beside each other: GridSample, a gather with a product, and a plugin.

    python -m wsss.benchmarks.studies.speed.sampling_forms [--variant swin_t --weights PATH] [--engine trt-rtx]

Exports the model in FP16 in all forms, through the gate, and has TensorRT-RTX build them, where it is installed. Each
graph is then timed in ONNX Runtime, or on a GPU in ``--engine``, in turns, so that the machine's other work falls on all
alike. ``benchmarks/results/sampling-forms.json`` keeps, for each form and graph, the gate's errors, the build and the times.
The plugin itself runs under ``--engine trt`` alone: others compute the function that stands in for it.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from ....engines.opening import choose
from ....export.exporting import export_model, tool_versions
from ....export.family import Options, Sampling, family
from ....export.to_engine import BuildOptions, build_plans
from ....spec import AxisRange, Model, open_bundle
from ...latency import measure_graph
from ..harness import RESULTS, study_parser, write_result

RESULT = RESULTS / "sampling-forms.json"
FORMS: tuple[Sampling, ...] = ("grid-sample", "gather", "plugin")
ROUNDS = 3


def main() -> None:
    """The command line of the module."""
    parser = study_parser(__spec__, __doc__)
    parser.add_argument("--variant", default="mini")
    parser.add_argument("--weights", default="mini")
    parser.add_argument("--size", default="144x256", help="HxW of the one canvas")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--engine", default="ort")
    parser.add_argument("--work", type=Path, default=Path("build/sampling-forms"), help="kept: a second run measures again")
    options = parser.parse_args()
    height, width = map(int, options.size.split("x"))
    models = {}
    for form in FORMS:
        folder = options.work / form
        if not (folder / "grounding-dino").is_dir():
            wanted = Options(
                batch=AxisRange(1, min(2, options.batch), options.batch),
                sizes=((height, width),),
                precision="fp16",
                sampling=form,
            )
            export_model(
                family("grounding-dino"),
                variant=options.variant,
                weights=options.weights,
                bundle=folder,
                options=wanted,
                log=print,
            )
        models[form] = open_bundle(folder).model("grounding-dino")
        if importlib.util.find_spec("tensorrt_rtx"):
            models[form] = build_plans(models[form], BuildOptions(flavour="trt-rtx"), print)
    told = {
        "variant": options.variant,
        "canvas": [height, width],
        "engine": options.engine,
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 1),
        "tools": tool_versions(),
        "forms": measure(models, f"image-{options.size}", options.engine, options.batch),
    }
    write_result(RESULT, told)
    print(json.dumps(told["forms"], indent=1))


def measure(models: dict[Sampling, Model], graph: str, engine: str, batch: int) -> dict[str, Any]:
    """Per form: errors of its gate, its build, and the best median of several rounds at batch 1 and the largest."""
    chosen, device = choose(engine, "auto", models.values())
    best: dict[tuple[Sampling, int], float] = {}
    for _ in range(ROUNDS):
        for form, model in models.items():
            rows = measure_graph(
                model, graph, (1, batch), engine=chosen, device=device, ceiling=None, seconds=5.0, unverified=True
            )
            for row in rows:
                best[form, row.batch] = min(row.p50_ms, best.get((form, row.batch), row.p50_ms))
    return {
        form: _told(model, graph) | {"p50_ms": {n: ms for (f, n), ms in best.items() if f == form}}
        for form, model in models.items()
    }


def _told(model: Model, graph: str) -> dict[str, Any]:
    spec = model.graph(graph)
    assert spec.parity is not None
    plan = spec.plans.get("trt-rtx")
    built = (
        {} if plan is None else {"build_s": plan.seconds, "plan_mb": round((model.folder / plan.file).stat().st_size / 1e6, 1)}
    )
    return {"gate_error": {name: spec.parity.worst(name).error for name in spec.parity.tolerance}, **built}


if __name__ == "__main__":
    main()
