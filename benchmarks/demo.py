"""``wsss demo``: drawn scenes through the whole chain, scored against their exact truth."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import StoreError
from ..mini.scenes import CLASSES, write_scenes
from ..runtime.labeler import Labeler
from ..runtime.report.page import write_report
from ..runtime.run.label_folder import Progress, label_folder
from ..store.local import read_label, read_records
from ..train.evaluate.metrics import confusion_matrix, label_scores, mean_iou

SEED = 1_000_000
"""First of the demo's scenes; the training splits never draw from the held-out one."""


def run_demo(out: Path, count: int, engine: str, progress: Progress) -> dict[str, Any]:
    """Draws ``count`` held-out scenes, labels them with the bundle ``mini``, scores them and writes a page.

    Returns:
        ``miou``, ``label_f1``, ``images_per_second``, ``stage_seconds``, ``store``, ``page``.

    Raises:
        StoreError: ``out`` exists and was not made by this command.
    """
    if out.exists() and any(out.iterdir()) and not (out / "labels.json").is_file():
        raise StoreError(f"--out {out}: the folder is not empty and not a demo's", hint="give another --out")
    for name in ("images", "truth", "store"):
        shutil.rmtree(out / name, ignore_errors=True)
    write_scenes(out, count, seed=SEED)
    labeler = Labeler.open("mini", classes="mini", engine=engine)
    summary = label_folder(labeler, out / "images", out / "store", progress=progress)
    result = {
        **score_store(out / "store", out),
        "images_per_second": summary.labelled / summary.seconds,
        "stage_seconds": summary.stage_seconds,
        "store": str(out / "store"),
        "page": str(write_report(out / "store", out / "images", out / "report.html", limit=count)),
    }
    return result


def score_store(store: Path, scenes: Path) -> dict[str, float]:
    """mIoU of a store's label maps and F1 of its labels against drawn scenes (see `mini.scenes.write_scenes`)."""
    truth_labels: dict[str, list[str]] = json.loads((scenes / "labels.json").read_text(encoding="utf-8"))
    matrix = np.zeros((len(CLASSES) + 1, len(CLASSES) + 2), np.int64)
    said, there = [], []
    for record in read_records(store):
        truth = read_label(scenes / "truth" / Path(record["label"]).name)
        matrix += confusion_matrix(truth, read_label(store / "labels" / record["label"]), len(CLASSES) + 1)
        said.append([name in record["classes"] for name in CLASSES])
        there.append([name in truth_labels[record["path"]] for name in CLASSES])
    labels = label_scores(np.array(there), np.array(said))
    return {"miou": mean_iou(matrix), "label_f1": labels["f1"], "label_macro_f1": labels["macro_f1"]}
