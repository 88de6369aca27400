"""Time and memory that TensorRT-RTX needs to build full-size FP16 engines ahead of time; no GPU needed.

    WSSS_BERT_VOCAB=vocab.txt python -m wsss.benchmarks.studies.speed.engine_builds [--model "sam vit_b"]

Graphs are exported with weights ``random:0`` and without the gate, since they are never used for labels. Each model is built in
a separate process. ``benchmarks/results/engine-builds.json`` has the engines of each model (seconds, megabytes, target) and the
peak memory of the builder. Models that are already in it are left out.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from ...gpu_steps import step_engines, step_graphs
from ..harness import RESULTS, log, peak_memory_bytes, read_result, run_part, study_parser, write_result

RESULT = RESULTS / "engine-builds.json"
MODELS = (
    *("sam vit_b", "clip ViT-B-16", "clip ViT-L-14-336", "grounding-dino swin_t", "sam vit_h", "sam sam2.1_tiny"),
    *(f"grounding-dino mm_{size}" for size in ("tiny", "base", "large")),
)


def main() -> None:
    """Run the command line of the module."""
    parser = study_parser(__spec__, __doc__, work="build/engine-builds")
    parser.add_argument("--model", action="append", choices=MODELS, help="default: all")
    parser.add_argument("--build", choices=MODELS, help=argparse.SUPPRESS)  # one model, in this process
    options = parser.parse_args()
    if options.build:
        print(json.dumps(build(options.work / options.build.replace(" ", "-"))))
        return
    result = read_result(RESULT)
    for name in options.model or MODELS:
        if name in result:
            continue
        folder = options.work / name.replace(" ", "-")
        if not (folder / "traced").exists():
            family, _, variant = name.partition(" ")
            step_graphs(folder, family, variant)
            (folder / "traced").touch()
        load = os.getloadavg()[0]
        built = run_part(__spec__, "--work", options.work, "--build", name)
        result[name] = {**built, "cores": os.cpu_count(), "load_before": round(load, 1)}
        write_result(RESULT, result)
        log(f"{name}: {result[name]}")


def build(folder: Path) -> dict[str, Any]:
    """Build the engines of one exported model; returns them with the peak memory of this process."""
    engines = step_engines(folder, "trt-rtx")
    return {"engines": engines, "peak_memory_gb": round(peak_memory_bytes() / 1e9, 2)}


if __name__ == "__main__":
    main()
