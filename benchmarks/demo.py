"""``wsss demo``: drawn scenes through the whole chain, scored against their exact truth."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import StoreError
from ..mini.scenes import CLASSES, write_scenes
from ..runtime.chain import Chain
from ..runtime.report.page import write_report
from ..runtime.run.label_folder import Progress, label_folder
from ..store.local import read_label, read_records
from ..train.evaluate.metrics import label_scores, mean_iou
from .confusion import total_confusion

SEED = 1_000_000
"""First of the demo's scenes, in the held-out split, which no training uses."""


def run_demo(out: Path, count: int, engine: str, progress: Progress) -> dict[str, Any]:
    """Draw ``count`` held-out scenes, label them with the bundle ``mini``, score them and write a report page.

    Returns:
        ``miou``, ``label_f1``, ``images_per_second``, ``stage_seconds``, ``store``, ``page``.

    Raises:
        StoreError: ``out`` exists and was not made by this command.
    """
    if out.exists() and any(out.iterdir()) and not (out / "labels.json").is_file():
        raise StoreError(f"--out {out}: the folder is not empty and was not made by wsss demo", hint="give another --out")
    for name in ("images", "truth", "store"):
        shutil.rmtree(out / name, ignore_errors=True)
    write_scenes(out, count, seed=SEED)
    labeler = Chain.open("mini", classes="mini", engine=engine)
    summary = label_folder(labeler, out / "images", out / "store", progress=progress)
    return {
        **score_store(out / "store", out),
        "images_per_second": summary.labelled / summary.seconds,
        "stage_seconds": summary.stage_seconds,
        "store": str(out / "store"),
        "page": str(write_report(out / "store", out / "images", out / "report.html", limit=count)),
    }


def score_store(store: Path, scenes: Path) -> dict[str, float]:
    """mIoU of a store's label maps and F1 of its labels against drawn scenes (see `mini.scenes.write_scenes`)."""
    truth_labels: dict[str, list[str]] = json.loads((scenes / "labels.json").read_text(encoding="utf-8"))
    records = list(read_records(store))
    matrix = total_confusion(
        (read_label(scenes / "truth" / Path(record["label"]).name), read_label(store / "labels" / record["label"]))
        for record in records
    )
    predicted = np.array([[name in record["classes"] for name in CLASSES] for record in records])
    present = np.array([[name in truth_labels[record["path"]] for name in CLASSES] for record in records])
    labels = label_scores(present, predicted)
    return {"miou": mean_iou(matrix), "label_f1": labels["f1"], "label_macro_f1": labels["macro_f1"]}
