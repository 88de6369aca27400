"""``python -m wsss.mini``: trains the three small models, one after another, and exports them into the bundle `mini`.

Each training continues where it was stopped; weights that are there already are kept, unless ``--again``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from ..export.exporting import export_model
from ..export.family import Options, family

HERE = Path(__file__).resolve().parent
MINUTES = {"sam": 80, "grounding-dino": 90, "clip": 70}
"""Of one CPU core each: four hours in all, minutes on a GPU."""
SCRIPTS = {"sam": "train_sam", "grounding-dino": "train_detector", "clip": "train_clip"}
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
"""glibc gives freed pages back after every step otherwise: a fifth of the training time on a CPU."""


def _log(line: str) -> None:
    print(line, file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m wsss.mini", description=__doc__)
    parser.add_argument("--again", action="store_true", help="train even where weights are there")
    parser.add_argument("--only-export", action="store_true", help="export the weights that are there")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for model, minutes in MINUTES.items():
        weights = HERE / "weights" / f"{model}.safetensors"
        if arguments.again:
            weights.unlink(missing_ok=True)
        if not arguments.only_export and not weights.exists():
            train = [sys.executable, "-m", f"wsss.mini.{SCRIPTS[model]}", "--out", str(weights)]
            subprocess.run(
                [*train, "--minutes", str(minutes), "--seed", str(arguments.seed)], env={**os.environ, **KEEP_MEMORY}, check=True
            )
    for model in MINUTES:
        export_model(
            family(model),
            variant="mini",
            weights="mini",
            bundle=HERE / "bundle",
            options=Options(),
            log=_log,
        )


if __name__ == "__main__":
    main()
