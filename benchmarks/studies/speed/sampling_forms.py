"""Compare the three forms of Grounding-DINO's sampling between feature cells: GridSample, a gather with a product, a plugin.

    python -m wsss.benchmarks.studies.speed.sampling_forms [--variant swin_t --weights PATH] [--engine trt-rtx]

Exports the model in FP16 in all forms through the gate, and builds them with TensorRT-RTX where it is installed. The graphs are
then timed in turns in ONNX Runtime, or in ``--engine`` on a GPU, so that other work on the machine affects all alike.
``benchmarks/results/sampling-forms.json`` has the gate's errors, the build and the times of each form. The plugin itself runs
only with ``--engine trt``: other engines compute the ONNX function in its place.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from ....engines.opening import choose
from ....export.exporting import tool_versions
from ....export.family import Options, Sampling
from ....export.to_engine import BuildOptions, build_plans
from ....spec import AxisRange, Model
from ...latency import measure_graph
from ..harness import RESULTS, exported_model, study_parser, write_result

RESULT = RESULTS / "sampling-forms.json"
FORMS: tuple[Sampling, ...] = ("grid-sample", "gather", "plugin")
ROUNDS = 3


def main() -> None:
    """Run the command line of the module."""
    parser = study_parser(__spec__, __doc__, work="build/sampling-forms")
    parser.add_argument("--variant", default="mini")
    parser.add_argument("--weights", default="mini")
    parser.add_argument("--size", default="144x256", help="HxW of the canvas")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--engine", default="ort")
    options = parser.parse_args()
    height, width = map(int, options.size.split("x"))
    models = {}
    for form in FORMS:
        batch = AxisRange(1, min(2, options.batch), options.batch)
        settings = Options(batch=batch, sizes=((height, width),), precision="fp16", sampling=form)
        models[form] = exported_model("grounding-dino", options.variant, options.weights, options.work / form, settings)
        if importlib.util.find_spec("tensorrt_rtx"):
            models[form] = build_plans(models[form], BuildOptions(flavour="trt-rtx"), print)
    result = {
        "variant": options.variant,
        "canvas": [height, width],
        "engine": options.engine,
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 1),
        "tools": tool_versions(),
        "forms": measure(models, f"image-{options.size}", options.engine, options.batch),
    }
    write_result(RESULT, result)


def measure(models: dict[Sampling, Model], graph: str, engine: str, batch: int) -> dict[str, Any]:
    """Measure each form: errors of its gate, its build, and the best median of several rounds at batch 1 and the largest."""
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
        form: _gate_and_build(model, graph) | {"p50_ms": {n: ms for (f, n), ms in best.items() if f == form}}
        for form, model in models.items()
    }


def _gate_and_build(model: Model, graph: str) -> dict[str, Any]:
    spec = model.graph(graph)
    assert spec.parity is not None
    plan = spec.plan_for("trt-rtx")
    built = (
        {} if plan is None else {"build_s": plan.seconds, "plan_mb": round((model.folder / plan.file).stat().st_size / 1e6, 1)}
    )
    return {"gate_error": {name: spec.parity.worst(name).error for name in spec.parity.tolerance}, **built}


if __name__ == "__main__":
    main()
