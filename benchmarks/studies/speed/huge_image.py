"""One huge photograph with many boxes: ``python -m wsss.benchmarks.studies.speed.huge_image``.

The small models label a photograph of 12,000 x 9,000 pixels with 150 given boxes into a store, in a separate process. Values of
`results/huge-image.json`:

``peak_mib``
    Peak resident memory of that process, with models and interpreter.
``seconds``
    Time of the whole run. Nearly all of it is fusion: 150 masks at 108 million pixels.
``tiles_agree``
    Whether the label map of the same photograph at a quarter of the size is the same, byte for byte, with tiles of a third of
    the size.
``differs``
    Share of the pixels of 40 windows, 300 x 300 each, that differ from SAM's two resizes and the fusion rule computed in double
    precision: pixels where a mask crosses zero, or exactly at the margin.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .... import __version__
from ....batch import Boxes, Labels, Masks
from ....photographs import read_photograph
from ....runtime import fuse
from ....runtime.chain import Chain
from ....runtime.run.label_folder import label_folder
from ....store.local import read_label, read_records
from ..harness import RESULTS, log, peak_memory_bytes, run_part, study_parser, write_result

RESULT = RESULTS / "huge-image.json"
NAME = "huge.jpg"
WINDOWS, WINDOW_PX = 40, 300


def write_inputs(folder: Path, size: tuple[int, int], boxes: int) -> None:
    """Write ``photos/huge.jpg`` of this size (height, width) in smooth colors, and ``boxes.json`` with boxes of three classes."""
    random = np.random.default_rng(0)
    (folder / "photos").mkdir(parents=True)
    coarse = Image.fromarray(random.integers(0, 256, (27, 36, 3)).astype(np.uint8))
    coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC).save(folder / "photos" / NAME, quality=90)
    center, half = random.uniform(0, 1, (boxes, 2)), random.uniform(0.02, 0.3, (boxes, 2))
    edges = np.concatenate([np.clip(center - half, 0, 1), np.clip(center + half, 0, 1)], axis=1) * ([size[1], size[0]] * 2)
    entries = [
        {"label": ("dog", "cat", "person")[number % 3], "score": round(0.3 + 0.6 * number / boxes, 3), "xyxy": xyxy.tolist()}
        for number, xyxy in enumerate(edges)
    ]
    (folder / "boxes.json").write_text(json.dumps({NAME: entries}))


def open_labeler(folder: Path) -> Chain:
    """A labeler of the small models with the boxes of ``folder``."""
    return Chain.open("mini", classes="dog, cat, person", engine="ort", device="cpu", boxes=folder / "boxes.json")


def run(folder: Path, tile_bytes: int) -> dict[str, Any]:
    """Label the photograph into a store; returns seconds, peak resident MiB, boxes, and a hash of the label map."""
    fuse.TILE_BYTES = tile_bytes
    out = folder / f"store-{tile_bytes}"
    begun = time.perf_counter()
    label_folder(open_labeler(folder), folder / "photos", out)
    seconds = time.perf_counter() - begun
    peak = peak_memory_bytes()
    (record,) = read_records(out)
    label_map = read_label(out / "labels" / record["label"])
    return {
        "peak_mib": round(peak / 1024**2),
        "seconds": round(seconds, 1),
        "boxes": len(record["boxes"]),
        "label_map": hashlib.sha256(label_map.tobytes()).hexdigest(),
    }


def differing(folder: Path, tile_bytes: int) -> float:
    """Share of the windows' pixels where the store's label map differs from the rule in double precision."""
    labeler = open_labeler(folder)
    photo = read_photograph(folder / "photos", NAME)
    labels = Labels(np.zeros((1, 3), np.float32), np.zeros((1, 3), bool))
    boxes = labeler.detect([photo], labels)
    masks = labeler.segment([photo], boxes)
    found = read_label(folder / f"store-{tile_bytes}" / "labels" / Path(NAME).with_suffix(".png"))
    random = np.random.default_rng(1)
    wrong = 0
    for _ in range(WINDOWS):
        y, x = (int(random.integers(0, length - WINDOW_PX)) for length in photo.shape)
        window = slice(y, y + WINDOW_PX), slice(x, x + WINDOW_PX)
        wrong += int(np.count_nonzero(found[window] != expected(masks, boxes, window)))
    return wrong / (WINDOWS * WINDOW_PX**2)


def expected(masks: Masks, boxes: Boxes, window: tuple[slice, slice], margin: float = 0.1) -> np.ndarray:
    """A window of the label map by SAM's ``postprocess_masks`` and the fusion rule, computed in float64."""
    (frame,) = masks.frames
    assert frame is not None
    logits = np.stack([np.asarray(masks.logits[p])[r] for p, r in zip(masks.part, masks.row, strict=True)]).astype(np.float64)
    side = logits.shape[1]
    for axis in (0, 1):
        ends = np.arange(window[axis].start, window[axis].stop)
        second = _bilinear(ends, frame.valid[axis], frame.image[axis])
        first = _bilinear(np.arange(frame.valid[axis]), side, frame.canvas[axis])
        logits = np.moveaxis(np.tensordot(second @ first, logits, (1, axis + 1)), 0, axis + 1)
    value = np.where(logits > 0, (boxes.score * np.clip(masks.quality, 1e-3, 1))[:, None, None] / (1 + np.exp(-logits)), 0)
    best, label = value.max(axis=0), boxes.label[value.argmax(axis=0)]
    rival = np.where(boxes.label[:, None, None] != label, value, 0).max(axis=0)
    contested = (rival > 0) & (best - rival < margin * best)
    return np.where(contested, 255, np.where(best > 0, label, 0)).astype(np.uint8)


def _bilinear(outputs: np.ndarray, length: int, resized: int) -> np.ndarray:
    """Weights (outputs, length) of ``F.interpolate(mode="bilinear", align_corners=False)`` along an axis."""
    scale, half = np.float32(length) / np.float32(resized), np.float32(0.5)  # in float32, to be exactly torch's positions
    source = np.maximum(scale * (outputs.astype(np.float32) + half) - half, 0).astype(np.float64)
    low = np.minimum(source.astype(int), length - 1)
    weights = np.zeros((len(outputs), length))
    rows = np.arange(len(outputs))
    np.add.at(weights, (rows, low), 1 - (source - low))
    np.add.at(weights, (rows, np.minimum(low + 1, length - 1)), source - low)
    return weights


def measure(folder: Path, size: tuple[int, int], boxes: int) -> dict[str, Any]:
    """Measure all values; photographs and stores are written below ``folder``."""

    def part(where: Path, tile_bytes: int) -> dict[str, Any]:
        return run_part(__spec__, "--part", where, "--tile-bytes", tile_bytes)

    write_inputs(folder / "quarter", (size[0] // 4, size[1] // 4), boxes)
    coarse, fine = (part(folder / "quarter", tile_bytes) for tile_bytes in (fuse.TILE_BYTES, fuse.TILE_BYTES // 3))
    write_inputs(folder / "whole", size, boxes)
    whole = part(folder / "whole", fuse.TILE_BYTES)
    log(json.dumps(whole))
    return {
        **{name: whole[name] for name in ("peak_mib", "seconds", "boxes")},
        "tiles_agree": coarse["label_map"] == fine["label_map"],
        "differs": differing(folder / "whole", fuse.TILE_BYTES),
    }


def main() -> None:
    """Run the command line of the module."""
    parser = study_parser(__spec__, __doc__)
    parser.add_argument("--size", type=int, nargs=2, default=(9_000, 12_000), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--boxes", type=int, default=150)
    parser.add_argument("--part", type=Path, help="make one run in this folder only, and print its values as JSON")
    parser.add_argument("--tile-bytes", type=int, default=fuse.TILE_BYTES, help="with --part")
    given = parser.parse_args()
    if given.part:
        print(json.dumps(run(given.part, given.tile_bytes)))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "version": __version__,
            "cores": os.cpu_count(),
            "photograph": {"height": given.size[0], "width": given.size[1]},
            **measure(Path(folder), tuple(given.size), given.boxes),
        }
    if tuple(given.size) == (9_000, 12_000):
        write_result(RESULT, result)
    else:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
