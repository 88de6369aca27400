"""How long TensorRT-RTX builds full-size FP16 engines ahead of time, and in how much memory; no GPU needed.

    WSSS_BERT_VOCAB=vocab.txt python -m wsss.benchmarks.studies.speed.engine_builds [--model "sam vit_b"]

Graphs are traced with weights ``random:0`` and not gated: they are never used for labels. Each model is built in a process of
its own. ``benchmarks/results/engine-builds.json`` keeps for each model its engines (seconds, megabytes, target) and the
peak memory of the builder; models already there are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from ...gpu_steps import step_engines, step_graphs
from ..harness import RESULTS, read_result, study_parser, write_result

RESULT = RESULTS / "engine-builds.json"
MODELS = ("sam vit_b", "clip ViT-B-16", "clip ViT-L-14-336", "grounding-dino swin_t", "sam vit_h")


def main() -> None:
    """The command line of the module."""
    parser = study_parser(__spec__, __doc__)
    parser.add_argument("--work", type=Path, default=Path("build/engine-builds"))
    parser.add_argument("--model", action="append", choices=MODELS, help="default: all")
    parser.add_argument("--build", choices=MODELS, help=argparse.SUPPRESS)  # one model, in this process
    options = parser.parse_args()
    if options.build:
        print(json.dumps(build(options.work / options.build.replace(" ", "-"))))
        return
    told: dict[str, Any] = read_result(RESULT)
    for name in options.model or MODELS:
        if name in told:
            continue
        folder = options.work / name.replace(" ", "-")
        if not (folder / "traced").exists():
            family, _, variant = name.partition(" ")
            step_graphs(folder, family, variant)
            (folder / "traced").touch()
        load = os.getloadavg()[0]
        command = [
            sys.executable,
            "-m",
            "wsss.benchmarks.studies.speed.engine_builds",
            "--work",
            str(options.work),
            "--build",
            name,
        ]
        built = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        told[name] = {**json.loads(built.splitlines()[-1]), "cores": os.cpu_count(), "load_before": round(load, 1)}
        write_result(RESULT, told)
        print(f"{name}: {told[name]}", file=sys.stderr)


def build(folder: Path) -> dict[str, Any]:
    """The engines of one traced model, and the peak memory of this process."""
    engines = step_engines(folder, "trt-rtx")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"engines": engines, "peak_memory_gb": round(peak, 2)}


if __name__ == "__main__":
    main()
