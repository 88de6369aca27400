"""The cost of keeping SAM's masks, and what it buys: ``python -m wsss.benchmarks.studies.speed.mask_cost``.

Logits of SAM's size are drawn: outlines with random harmonics, as ragged as logits with noise of 0.3 make them, on boxes of 10 to
60 % of the photograph's sides. Values of `results/mask-cost.json`, by one core:

``costs``
    For each size of photograph and number of boxes: bytes of the label's PNG without masks and of the masks, also if they were
    in the manifest line or in a file of their own (which takes at least a block of the file system); milliseconds to compute the
    runs (``runs_ms``) and to compress them (``rle_ms``), to make the same masks by upsampling all of each (``dense_ms``), to
    write the PNG without masks, to read the manifest line with and without masks in it, and to write a second file with fsync.
``pairs``
    The photographs of VOC with truth boxes: how many objects overlap one of their class by its box, and the IoU of the objects in
    COCO with the masks that the small SAM gave their boxes, as written now and as cut out of the label map. Absent without
    ``--images``.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ....frame import Frame
from ....photographs import read_photograph
from ....rle import MaskRuns
from ....runtime.chain import Chain
from ....runtime.convert.labeled import Box, read_labelled
from ....runtime.convert.segments import segments_of
from ....runtime.detect import box_iou
from ....runtime.masks.runs import mask_runs
from ....runtime.run.label_folder import label_folder
from ....store.format import line_of, parse_line
from ....store.label_png import png_of
from ....store.local import label_file
from ..harness import RESULTS, about, run_part, study_parser, write_result

RESULT = RESULTS / "mask-cost.json"
FRAMES = {
    "VOC, 500 x 375": Frame((375, 500), (768, 1024), (1024, 1024)),
    "12 Mpx, 4000 x 3000": Frame((3000, 4000), (768, 1024), (1024, 1024)),
}
BOXES = (2, 10, 100)
SIDE = 256


def drawn_logits(random: np.random.Generator) -> np.ndarray:
    """(256, 256) float32: an object with a ragged outline; 0 is the edge."""
    radius = random.uniform(0.05, 0.3)
    x, y = random.uniform(radius, 1 - radius), random.uniform(radius, 0.75 - min(radius, 0.3))
    rows, columns = (np.indices((SIDE, SIDE)) + 0.5) / SIDE
    angle = np.arctan2(rows - y, columns - x)
    outline = radius * (
        1 + sum(random.normal(0, 0.2 / k) * np.cos(k * angle + random.uniform(0, 2 * np.pi)) for k in range(2, 16))
    )
    distance = (outline - np.hypot(columns - x, rows - y)) * SIDE
    return (0.5 * distance + random.normal(0, 0.3, (SIDE, SIDE))).astype(np.float32)


def milliseconds(call: Callable[[], object], repeats: int = 5, clock: Callable[[], float] = time.process_time) -> float:
    """Median time of a call: of its computing, whatever else the machine does, or by another clock."""
    taken = []
    for _ in range(repeats):
        start = clock()
        call()
        taken.append(clock() - start)
    return round(1e3 * float(np.median(taken)), 2)


def cost(frame: Frame, boxes: int) -> dict[str, Any]:
    """Bytes and milliseconds of one image with this many boxes."""
    random = np.random.default_rng(boxes)
    logits = [drawn_logits(random) for _ in range(boxes)]
    masks = [mask_runs(each, frame) for each in logits]
    counts = [mask.counts() for mask in masks]
    label_map = np.zeros(frame.image, np.uint8)
    for number, mask in enumerate(masks):
        label_map[mask.mask()] = 1 + number % 20
    line = line_of(
        {
            "path": "2007_000027.jpg",
            "label": "2007_000027.png",
            "height": frame.image[0],
            "width": frame.image[1],
            "classes": {"person": 0.9},
            "boxes": [
                {"label": "person", "score": 0.5, "quality": 0.9, "xyxy": [10.25, 20.5, 200.75, 300.25], "won_px": 12_345}
                for _ in masks
            ],
        }
    )
    longer = line_of({**json.loads(line), "masks": counts})
    down, across = frame.mask_rows(SIDE), frame.mask_columns(SIDE)
    with tempfile.TemporaryDirectory() as folder:

        def second_file() -> None:
            with open(Path(folder) / "masks.json", "wb") as file:
                file.write("\n".join(counts).encode())
                file.flush()
                os.fsync(file.fileno())

        second_ms = milliseconds(second_file, 20, time.perf_counter)
    plain = len(png_of(label_map))
    png_ms = milliseconds(lambda: label_file("", label_map, None), 3)
    return {
        "png_bytes": plain,
        "mask_bytes": len(label_file("", label_map, counts)) - plain,
        "line_bytes": len(line),
        "line_with_masks_bytes": len(longer),
        "runs_ms": milliseconds(lambda: [mask_runs(each, frame) for each in logits], 3),
        "rle_ms": round(
            milliseconds(lambda: [mask.counts() for mask in masks], 3)
            + max(milliseconds(lambda: label_file("", label_map, counts), 3) - png_ms, 0.0),
            2,
        ),
        "dense_ms": milliseconds(lambda: [MaskRuns.of(down @ each @ across.T > 0).counts() for each in logits], 1),
        "png_ms": png_ms,
        "read_line_ms": milliseconds(lambda: parse_line(line), 20),
        "read_line_with_masks_ms": milliseconds(lambda: parse_line(longer), 20),
        "second_file_ms": second_ms,
    }


def pairs(images: Path) -> dict[str, Any]:
    """Objects of a folder as PASCAL VOC's (JPEGImages, Annotations), labeled with its own boxes by the small SAM."""
    photographs = images / "JPEGImages"
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        labeler = Chain.open("mini", classes="voc", engine="ort", device="cpu", boxes=images / "Annotations")
        summary = label_folder(labeler, photographs, store, warn=lambda _: None)
        now: list[float] = []
        before: list[float] = []
        overlapping = 0
        for item in read_labelled(store, photographs):
            result = labeler.pseudo_label([read_photograph(photographs, item.path)])
            assert result.masks is not None
            frame, segments = result.masks.frames[0], segments_of(replace(item, masks=None))
            for box in item.boxes:
                logits = np.asarray(result.masks.logits[result.masks.part[box.number]])[result.masks.row[box.number]]
                assert frame is not None
                expected = frame.mask_rows(len(logits)) @ logits @ frame.mask_columns(len(logits)).T > 0
                if not expected.any():
                    continue
                now.append(_iou(item.mask(box).mask(), expected))
                of_class = [one for one in segments.segments if (one.label, one.score) == (box.label, box.score)]
                cut = [_iou(segments.map == one.number, expected) for one in of_class]
                before.append(max(cut, default=0.0))
            overlapping += _overlapping(item.boxes)
    return {
        "photographs": summary.labelled,
        "objects": len(now),
        "overlap_one_of_their_class": overlapping,
        "worst_iou": min(now),
        "cut_out_mean_iou": round(float(np.mean(before)), 4),
        "cut_out_below_0.9": round(float(np.mean(np.array(before) < 0.9)), 4),
    }


def _overlapping(boxes: Sequence[Box]) -> int:
    found = 0
    for one in boxes:
        others = [other.xyxy_image for other in boxes if other is not one and other.label == one.label]
        found += bool(others) and bool((box_iou(np.array([one.xyxy_image]), np.array(others)) > 0).any())
    return found


def _iou(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / max((one | other).sum(), 1))


def main() -> None:
    """Run the command line of the module."""
    parser = study_parser(__spec__, __doc__, out=RESULT)
    parser.add_argument("--images", type=Path, help="folder as PASCAL VOC's, with JPEGImages and Annotations")
    parser.add_argument("--part", nargs=2, help="measure one size and number of boxes only, and print its values as JSON")
    given = parser.parse_args()
    if given.part:
        print(json.dumps(cost(FRAMES[given.part[0]], int(given.part[1]))))
        return
    one_core = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    costs = {name: {str(boxes): run_part(__spec__, "--part", name, boxes, env=one_core) for boxes in BOXES} for name in FRAMES}
    result: dict[str, Any] = {**about(), "costs": costs}
    if given.images:
        result["pairs"] = pairs(given.images)
    write_result(given.out, result)


if __name__ == "__main__":
    main()
