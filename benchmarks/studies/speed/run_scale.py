"""The cost of a run over many images in the process that drives it, alone and with labelers on a Ray cluster.

Engines compute nothing and photographs are tiny, which leaves only the administration: listing, comparing with the manifest, Ray
Data's calls, receipts and lines. ``docs/scale.md`` shows the result. Needs ray.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ....runtime.run.label_folder import Summary, label_folder
from ....runtime.run.listing import Found
from ....runtime.run.sources import LocalImages
from ....store.local import LabelStore, read_records
from ..harness import RESULTS, about, peak_memory_bytes, run_part, study_parser, write_result
from .fake_chain import SMALL, open_fake

RESULT = RESULTS / "run-scale.json"
FOLDERS = 100


def listing_cost(folder: Path, count: int) -> dict[str, float]:
    """CPU microseconds an image to list ``count`` empty files, and to compare them with a complete manifest."""
    labeler = open_fake(SMALL)
    for number in range(count):
        path = folder / "photos" / f"{number % FOLDERS:02}" / f"{number:08}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    begun = time.process_time()
    images = list(LocalImages(folder / "photos").listing())
    listed = time.process_time() - begun
    with LabelStore(folder / "out", labeler.classes, labeler.settings) as store:
        for start in range(0, count, 1000):
            store.append([_line(folder / "photos", image) for image in images[start : start + 1000]])
    begun = time.process_time()
    summary = label_folder(labeler, folder / "photos", folder / "out")
    assert summary.skipped == count
    compared = time.process_time() - begun
    return {
        "images": count,
        "listing_us": round(1e6 * listed / count, 1),
        "resumed_run_us": round(1e6 * compared / count, 1),
        "line_bytes": round((folder / "out" / "manifest.jsonl").stat().st_size / count),
    }


def _line(folder: Path, image: Found) -> dict[str, Any]:
    box = {
        "label": "dog",
        "score": 0.4321,
        "xyxy": [48.25, 240.5, 195.75, 371.0],
        "quality": 0.9512,
        "area_px": 12345,
        "won_px": 12000,
    }
    return {
        "path": image.name,
        "label": image.label,
        "bytes": 0,
        "mtime_ns": (folder / image.name).stat().st_mtime_ns,
        "sha256": hashlib.sha256(b"").hexdigest(),
        "error": json.dumps([box, box]),  # gives the line the usual length, and makes it current without a label file
    }


def ray_cost(folder: Path, count: int, workers: int) -> dict[str, Any]:
    """The driver's CPU time an image, its memory, and images a second, with labelers that compute nothing."""
    from ....runtime.ray.executor import RayExecutor

    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / "photos" / f"{number % FOLDERS:02}" / f"{number:08}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(path)
    marks: list[tuple[float, float, int]] = []
    """Wall seconds, CPU seconds of this process, and images done, at the first and at the last progress."""

    def progress(summary: Summary) -> None:
        marks[1:] = [(time.perf_counter(), time.process_time(), summary.labelled + summary.failed)]

    with RayExecutor(partial(open_fake, SMALL), address="local", workers=workers, gpu=False, batch=8) as executor:
        before = peak_memory_bytes()
        label_folder(executor, folder / "photos", folder / "out", progress=progress)
    assert len(list(read_records(folder / "out"))) == count
    (start, start_cpu, already), (end, end_cpu, total) = marks
    return {
        "images": count,
        "workers": workers,
        "images_per_second": round((total - already) / (end - start), 1),
        "driver_us": round(1e6 * (end_cpu - start_cpu) / (total - already), 1),
        "driver_memory_mb": round(peak_memory_bytes() / 1e6),
        "driver_memory_before_mb": round(before / 1e6),
    }


def _measured(name: str, count: int, workers: int) -> dict[str, Any]:
    """One measurement in a separate process, so that its memory can be measured."""
    return run_part(__spec__, "--part", name, "--count", count, "--workers", workers)


def main() -> None:
    parser = study_parser(__spec__, __doc__)
    parser.add_argument("--count", type=int, default=20_000, help="images to list; a fifth of them are labeled")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--part", choices=("listing", "ray"), help="make one measurement only, and print it as JSON")
    arguments = parser.parse_args()
    if arguments.part:
        with tempfile.TemporaryDirectory() as name:
            folder, count, workers = Path(name), arguments.count, arguments.workers
            cost = listing_cost(folder, count) if arguments.part == "listing" else ray_cost(folder, count, workers)
        print(json.dumps(cost))
        return
    result: dict[str, Any] = {**about(), "listing": _measured("listing", arguments.count, 1)}
    fifth = arguments.count // 5
    result["ray"] = [_measured("ray", count, arguments.workers) for count in (fifth // 2, fifth)]
    write_result(RESULT, result)


if __name__ == "__main__":
    main()
