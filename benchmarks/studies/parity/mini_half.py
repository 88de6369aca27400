"""Compare the chain of small models in FP16 with the same chain in FP32, on held-out drawn scenes.

    wsss export --model all --variant mini --weights mini --precision fp16 --engine onnx --bundle build/mini-half
    python -m wsss.benchmarks.studies.parity.mini_half --bundle build/mini-half

Prints and writes to ``benchmarks/results/mini-half.json``: mIoU of both chains against the truth; IoU of their masks of the same
true boxes at the decoder's resolution; and mIoU of the FP16 chain's label maps against those of the FP32 chain.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ....batch import Images, Masks
from ....runtime.chain import Chain
from ....train.evaluate.metrics import mean_iou
from ...confusion import mask_iou, total_confusion
from ..harness import RESULTS, about, study_parser, write_result
from ..quality.mini_quality import held_out_scenes, label_maps

RESULT = RESULTS / "mini-half.json"
BATCH = 8


def measure(bundle: str, count: int, folder: Path, engine: str) -> dict[str, Any]:
    """Run both chains on ``count`` scenes, written below ``folder``."""
    images, scenes, boxes = held_out_scenes(count, folder)
    full, half = (label_maps(Chain.open(name, classes="mini", engine=engine), images) for name in ("mini", bundle))
    truth = [scene.label for scene in scenes]
    masks = [_masks(Chain.open(name, classes="mini", engine=engine, boxes=boxes), images) for name in ("mini", bundle)]
    overlaps = np.array([mask_iou(one, other) for one, other in zip(*masks, strict=True)])
    miou_fp32, miou_fp16 = _miou(truth, full), _miou(truth, half)
    return {
        **about(),
        "engine": engine,
        "scenes": count,
        "miou_fp32": round(miou_fp32, 5),
        "miou_fp16": round(miou_fp16, 5),
        "miou_loss": round(miou_fp32 - miou_fp16, 5),
        "masks": len(overlaps),
        "mask_iou_mean": round(float(overlaps.mean()), 5),
        "mask_iou_worst": round(float(overlaps.min()), 5),
        "label_map_miou": round(_miou(full, half), 5),
        "share_of_pixels_equal": round(float(np.mean([(a == b).mean() for a, b in zip(full, half, strict=True)])), 6),
    }


def _masks(labeler: Chain, images: Images) -> list[np.ndarray]:
    """(L, L) bool of every true box of every image."""
    found: list[np.ndarray] = []
    for start in range(0, len(images), BATCH):
        some = images[start : start + BATCH]
        boxes = labeler.detect(some, labeler.tag(some))
        masks: Masks = labeler.segment(some, boxes)
        found += [np.asarray(masks.logits[part])[row] > 0 for part, row in zip(masks.part, masks.row, strict=True)]
    return found


def _miou(truth: list[np.ndarray], predicted: list[np.ndarray]) -> float:
    return mean_iou(total_confusion(zip(truth, predicted, strict=True)))


def main() -> None:
    """Run the command line of the module."""
    parser = study_parser(__spec__, __doc__, out=RESULT)
    parser.add_argument("--bundle", required=True, help="the small models in FP16")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--engine", default="ort")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options.bundle, options.count, Path(folder), options.engine)
    write_result(options.out, result)


if __name__ == "__main__":
    main()
