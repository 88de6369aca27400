"""Compare ``wsss eval`` with independent computations, and measure its cost.

    python -m wsss.benchmarks.studies.speed.eval_speed SegmentationClassAug.tar.gz --lists wsss_lists/voc12

Takes the 12,031 masks of SegmentationClassAug (SBD and VOC 2012), damages a copy of them with a fixed seed (shifted, holes,
swapped classes, void, missing files), scores the copy with the command and compares with

- torchmetrics' confusion matrix of all masks, with scores computed in exact fractions;
- scikit-learn's ``jaccard_score``, ``precision_score`` and ``recall_score`` on the pixels of 40 masks;
- the boundary IoU of the authors' code (arXiv:2103.16562), mask by mask with OpenCV, on the 1,449 masks of val;
- scikit-learn's ``average_precision_score`` on random scores with ties.

Then times the 1,449 masks of val. Needs scikit-learn, torchmetrics, opencv-python-headless and Linux (memory is read from /proc).
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import sklearn
import torch
import torchmetrics
from PIL import Image
from sklearn.metrics import average_precision_score, jaccard_score, precision_score, recall_score
from torchmetrics.classification import MulticlassConfusionMatrix

from .... import __version__
from ....train.evaluate.metrics import average_precision
from ..harness import RESULTS, study_parser, write_result

RESULT = RESULTS / "eval-speed.json"
CLASSES = 21
LEFT_OUT = 500
"""One in this many predictions is missing."""


def main() -> None:
    """Run the command line of the module."""
    parser = study_parser(__spec__, __doc__)
    parser.add_argument("masks", type=Path, help="SegmentationClassAug.tar.gz")
    parser.add_argument("--lists", type=Path, required=True, help="folder with val.txt")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with tarfile.open(arguments.masks) as archive:
            archive.extractall(folder / "truth", filter="data")
        truth = folder / "truth" / "SegmentationClassAug"
        names = sorted(path.stem for path in truth.glob("*.png"))
        damage(truth, folder / "predicted", names)
        val = [line.split()[0] for line in (arguments.lists / "val.txt").read_text().splitlines()]
        result: dict[str, Any] = {
            "wsss": __version__,
            "torchmetrics": torchmetrics.__version__,
            "scikit-learn": sklearn.__version__,
            "cores": len(os.sched_getaffinity(0)),
            "all": against_torchmetrics(folder, truth, names),
            "40 masks": against_sklearn(folder, truth, val[:40]),
            "boundary, val": against_opencv(folder, truth, val),
            "average precision": {"furthest": average_precision_difference()},
            "cost, val": [cost(folder, truth, val, workers) for workers in (2, 2, 1)],
        }
    write_result(RESULT, result)


def damage(truth: Path, out: Path, names: Sequence[str]) -> None:
    """Write a damaged copy of the masks: in turn unchanged, shifted, with holes, with a class swapped, with void."""
    out.mkdir()
    rng = np.random.default_rng(0)
    for number, name in enumerate(names):
        mask = _read(truth / f"{name}.png")
        classes = np.unique(mask[(mask > 0) & (mask < 255)])
        match number % 5:
            case 1:
                mask = np.roll(mask, int(rng.integers(1, 20)), axis=int(rng.integers(2)))
            case 2:
                mask = np.where(rng.random(mask.shape) < 0.1, 0, mask)
            case 3 if len(classes):
                mask = np.where(mask == classes[0], classes[0] % 20 + 1, mask)
            case 4:
                mask[: len(mask) // 4] = 255
                mask[-(len(mask) // 4) :] = rng.integers(CLASSES)
        if number % 2:  # the void along the outlines becomes background, since a segmenter predicts no void
            mask = np.where(mask == 255, 0, mask)
        if number % LEFT_OUT:
            Image.fromarray(mask.astype(np.uint8)).save(out / f"{name}.png")


def score(folder: Path, truth: Path, names: Sequence[str], workers: int = 2) -> dict[str, Any]:
    """The scores of ``wsss eval --json`` for these names."""
    command = _command(folder, truth, names, workers)
    scores: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return scores


def _command(folder: Path, truth: Path, names: Sequence[str], workers: int) -> list[str]:
    (folder / "list.txt").write_text("\n".join(names))
    command = [sys.executable, "-m", "wsss", "eval", str(folder / "predicted"), str(truth), "--classes", "voc", "--json"]
    return [*command, "--list", str(folder / "list.txt"), "--workers", str(workers)]


def against_torchmetrics(folder: Path, truth: Path, names: Sequence[str]) -> dict[str, Any]:
    """Compare the confusion matrix of all masks; void in a prediction is class 22."""
    metric = MulticlassConfusionMatrix(CLASSES + 1, ignore_index=255, validate_args=False)
    for target, predicted in _pairs(folder, truth, names):
        metric.update(torch.from_numpy(np.where(predicted == 255, CLASSES, predicted).ravel()), torch.from_numpy(target.ravel()))
    matrix = [[int(count) for count in row] for row in metric.compute().tolist()][:CLASSES]
    scores = score(folder, truth, names)
    expected: dict[str, list[Fraction]] = {"iou": [], "precision": [], "recall": []}
    for label in range(CLASSES):
        hit, true, predicted_px = matrix[label][label], sum(matrix[label]), sum(row[label] for row in matrix)
        expected["iou"].append(Fraction(hit, true + predicted_px - hit))
        expected["precision"].append(Fraction(hit, predicted_px))
        expected["recall"].append(Fraction(hit, true))
    pairs = ((key, pair) for key, values in expected.items() for pair in zip(values, scores["classes"], strict=True))
    differences = [abs(float(value) - row[key]) for key, (value, row) in pairs]
    differences.append(abs(float(sum(expected["iou"]) / CLASSES) - scores["miou"]))
    differences.append(abs(float(sum(expected["iou"][1:]) / (CLASSES - 1)) - scores["miou_without_background"]))
    return {
        "masks": scores["images"],
        "missing": len(scores["missing"]),
        "miou": scores["miou"],
        "matrix_is_equal": matrix == scores["confusion"],
        "pixels": sum(map(sum, matrix)),
        "furthest": max(differences),
    }


def against_sklearn(folder: Path, truth: Path, names: Sequence[str]) -> dict[str, Any]:
    """Compare the scores on all pixels of a few masks, as two long vectors."""
    pairs = [(t[t != 255], p[t != 255]) for t, p in _pairs(folder, truth, names)]
    target, predicted = (np.concatenate(vectors) for vectors in zip(*pairs, strict=True))
    scores = score(folder, truth, names)
    furthest = 0.0
    for key, function in (("iou", jaccard_score), ("precision", precision_score), ("recall", recall_score)):
        expected = function(target, predicted, labels=range(CLASSES), average=None, zero_division=0.0)
        seen = [(value, row[key]) for value, row in zip(expected, scores["classes"], strict=True) if row[key] is not None]
        furthest = max(furthest, *(abs(value - other) for value, other in seen))
    return {"classes_seen": scores["classes_seen"], "furthest": furthest}


def against_opencv(folder: Path, truth: Path, names: Sequence[str]) -> dict[str, Any]:
    """Compare the boundary IoU, with the erosion of the authors' ``mask_to_boundary``; the truth's void belongs to no mask."""
    intersection, union = np.zeros(CLASSES, np.int64), np.zeros(CLASSES, np.int64)
    for target, predicted in _pairs(folder, truth, names):
        distance = max(round(0.02 * math.hypot(*target.shape)), 1)
        for label in range(CLASSES):
            bands = [_band((mask == label) & (target != 255), distance) for mask in (target, predicted)]
            intersection[label] += (bands[0] & bands[1]).sum()
            union[label] += (bands[0] | bands[1]).sum()
    scores = score(folder, truth, names)
    found = [row["boundary_iou"] for row in scores["classes"]]
    return {"boundary_miou": scores["boundary_miou"], "furthest": float(np.abs(intersection / union - found).max())}


def average_precision_difference() -> float:
    """Largest difference of the average precision on 2,000 images of 20 classes, with scores in steps of a tenth."""
    rng = np.random.default_rng(0)
    truth, scores = rng.random((2000, 20)) < 0.1, rng.integers(0, 11, (2000, 20)) / 10
    expected = average_precision_score(truth, scores, average=None)
    return float(np.abs(average_precision(truth, scores) - expected).max())


def cost(folder: Path, truth: Path, names: Sequence[str], workers: int) -> dict[str, Any]:
    """Wall and CPU seconds of the whole command with its imports, and the peak memory of all its processes together."""
    command = _command(folder, truth, names, workers)
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    load = os.getloadavg()[0]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak_kib = 0
    while job.poll() is None:
        peak_kib = max(peak_kib, sum(map(_resident_kib, _tree(job.pid))))
        time.sleep(0.05)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "masks": len(names),
        "workers": workers,
        "wall_s": round(time.perf_counter() - start, 2),
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
        "memory_mib": round(peak_kib / 1024),
        "load_before": round(load, 1),
    }


def _pairs(folder: Path, truth: Path, names: Sequence[str]) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    for name in names:
        target, path = _read(truth / f"{name}.png"), folder / "predicted" / f"{name}.png"
        yield target, _read(path) if path.exists() else np.full_like(target, 255)


def _read(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def _band(mask: np.ndarray, distance: int) -> np.ndarray:
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=distance)[1:-1, 1:-1]
    return mask & (eroded == 0)


def _tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return [pid]
    return [pid, *(descendant for child in children for descendant in _tree(child))]


def _resident_kib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


if __name__ == "__main__":
    main()
