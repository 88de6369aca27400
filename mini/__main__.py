"""``python -m wsss.mini``: train the three small models, two at a time, and export them into the bundle `mini`.

Each training continues where it was stopped. Existing weights are kept, unless ``--again`` is given.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from ..export.exporting import export_model
from ..export.family import Options, family
from .training import log

HERE = Path(__file__).resolve().parent
MINUTES = {"grounding-dino": 150, "sam": 140, "clip": 75}
"""Training time on one CPU core each, two at a time: under four hours on two cores. A GPU needs minutes."""
SCRIPTS = {"sam": "train_sam", "grounding-dino": "train_detector", "clip": "train_clip"}
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
"""Without these settings glibc returns freed pages after every step, which costs a fifth of the training time on a CPU."""


def _weights(model: str) -> Path:
    return HERE / "weights" / f"{model}.safetensors"


def _train(model: str, seed: int) -> None:
    weights = _weights(model)
    train = [sys.executable, "-m", f"wsss.mini.{SCRIPTS[model]}", "--out", str(weights)]
    budget = ["--minutes", str(MINUTES[model]), "--seed", str(seed)]
    environment = {**os.environ, **KEEP_MEMORY}
    subprocess.run([*train, *budget], env=environment, check=True)
    if model == "sam":
        further = [sys.executable, "-m", "wsss.mini.train_sam_masks", "--weights", str(weights), "--seed", str(seed)]
        subprocess.run(further, env=environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m wsss.mini", description=__doc__)
    parser.add_argument("--again", action="store_true", help="train again where weights exist")
    parser.add_argument("--only-export", action="store_true", help="export existing weights without training")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    missing = []
    for model in MINUTES:
        if arguments.again:
            _weights(model).unlink(missing_ok=True)
        if not arguments.only_export and not _weights(model).exists():
            missing.append(model)
    # One core each: CLIP starts when the first of the others ends.
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        list(pool.map(partial(_train, seed=arguments.seed), missing))
    for model in MINUTES:
        export_model(family(model), variant="mini", weights="mini", bundle=HERE / "bundle", options=Options(), log=log)


if __name__ == "__main__":
    main()
