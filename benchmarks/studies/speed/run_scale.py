"""What a run over many images costs the process that drives it, alone and with labelers on a Ray cluster.

Engines compute nothing and photographs are tiny, so that only the bookkeeping is left: listing, comparing with the manifest,
Ray Data's calls, receipts and lines. ``docs/scale.md`` is written from the result. Needs ray.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ....runtime.run.label_folder import Summary, label_folder
from ....runtime.run.listing import Found
from ....runtime.run.sources import listing
from ....store.local import LabelStore, read_records
from ..harness import RESULTS, about, study_parser, write_result
from .fake_chain import SMALL, open_fake

RESULT = RESULTS / "run-scale.json"
FOLDERS = 100


def listing_cost(folder: Path, count: int) -> dict[str, float]:
    """CPU microseconds an image of listing a folder, and of comparing it with a whole manifest, from ``count`` empty files."""
    labeler = open_fake(SMALL)
    for number in range(count):
        path = folder / "photos" / f"{number % FOLDERS:02}" / f"{number:08}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    begun = time.process_time()
    images = list(listing(folder / "photos"))
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
        "error": json.dumps([box, box]),  # of the usual length, and current without a label
    }


def ray_cost(folder: Path, count: int, workers: int) -> dict[str, Any]:
    """CPU of the driver an image, images a second, and the driver's memory, with labelers that compute nothing."""
    from ....runtime.ray.executor import RayExecutor

    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / "photos" / f"{number % FOLDERS:02}" / f"{number:08}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(path)
    marks: list[tuple[float, float, int]] = []
    """Seconds of the clock and of this process's CPU, and images done, at the first and at the last progress."""

    def progress(summary: Summary) -> None:
        marks[1:] = [(time.perf_counter(), time.process_time(), summary.labelled + summary.failed)]

    with RayExecutor(partial(open_fake, SMALL), address="local", workers=workers, gpu=False, batch=8) as executor:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        label_folder(executor, folder / "photos", folder / "out", progress=progress)
    assert len(list(read_records(folder / "out"))) == count
    (start, start_cpu, already), (end, end_cpu, total) = marks
    return {
        "images": count,
        "workers": workers,
        "images_per_second": round((total - already) / (end - start), 1),
        "driver_us": round(1e6 * (end_cpu - start_cpu) / (total - already), 1),
        "driver_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
        "driver_memory_before_mb": round(before / 1e3),
    }


def _measured(name: str, count: int, workers: int) -> dict[str, Any]:
    """One measurement in a process of its own, whose memory is nobody else's."""
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--part", name, "--count", str(count)]
    done = subprocess.run([*command, "--workers", str(workers)], check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = study_parser(__spec__, __doc__)
    parser.add_argument("--count", type=int, default=20_000, help="images that are listed; a fifth of them are labeled")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1)))
    parser.add_argument("--part", choices=("listing", "ray"), help="one measurement only, as JSON")
    arguments = parser.parse_args()
    if arguments.part:
        with tempfile.TemporaryDirectory() as folder:
            if arguments.part == "listing":
                print(json.dumps(listing_cost(Path(folder), arguments.count)))
            else:
                print(json.dumps(ray_cost(Path(folder), arguments.count, arguments.workers)))
        return
    result: dict[str, Any] = {**about(), "listing": _measured("listing", arguments.count, 1)}
    fifth = arguments.count // 5
    result["ray"] = [_measured("ray", count, arguments.workers) for count in (fifth // 2, fifth)]
    write_result(RESULT, result)


if __name__ == "__main__":
    main()
