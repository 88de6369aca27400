"""How good the small models are, and which stage costs what: ``python -m wsss.benchmarks.studies.quality.mini_quality``.

The chain on 200 held-out scenes, then again with one stage after another replaced by the truth. The differences are each
stage's share of the loss. Also: each scene alone against the same scene in a batch of strangers.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ....batch import Images
from ....mini.scenes import CLASSES, Scene, draw_scene, write_scenes
from ....photographs import read_photograph
from ....runtime.labeler import Labeler, Rules
from ....train.evaluate.metrics import class_iou, confusion_matrix, label_scores, mean_iou
from ..harness import RESULTS, about, study_parser, write_result

RESULT = RESULTS / "mini-quality.json"
SEED = 2_000_000


def measure(count: int, folder: Path) -> dict[str, Any]:
    """mIoU and label F1 of the chain and of its variants on ``count`` held-out JPEG scenes, written below ``folder``."""
    paths = write_scenes(folder, count, seed=SEED)
    images = [read_photograph(folder / "images", path.name) for path in paths]
    scenes = [draw_scene(SEED + number, split="held-out") for number in range(count)]
    (folder / "boxes.json").write_text(json.dumps({p.name: true_boxes(s) for p, s in zip(paths, scenes, strict=True)}))
    variants: dict[str, dict[str, Any]] = {
        "chain": {},
        "without the CLIP gate": {"rules": Rules(gate=False)},
        "true labels": {"labels": folder / "labels.json"},
        "true boxes": {"boxes": folder / "boxes.json"},
    }
    told: dict[str, Any] = {}
    for name, options in variants.items():
        start = time.perf_counter()
        labeler = Labeler.open("mini", classes="mini", **options)
        matrix, labels = _score(labeler, images, scenes)
        told[name] = {"miou": round(mean_iou(matrix), 4), "seconds": round(time.perf_counter() - start, 1)}
        if name == "chain":
            told[name] |= {key: round(value, 4) for key, value in labels.items()}
            told[name]["stage_seconds"] = {stage: round(taken, 1) for stage, taken in labeler.take_seconds().items()}
            told[name]["iou"] = dict(zip(("background", *CLASSES), np.round(class_iou(matrix), 3).tolist(), strict=True))
        print(f"{name:24} mIoU {told[name]['miou']:.3f}", file=sys.stderr)
    told["share of the loss"] = {
        "labels (CLIP)": round(told["true labels"]["miou"] - told["chain"]["miou"], 4),
        "boxes (Grounding-DINO)": round(told["true boxes"]["miou"] - told["true labels"]["miou"], 4),
        "masks and fusion (SAM)": round(1 - told["true boxes"]["miou"], 4),
    }
    told["alone against a batch of 8"] = _alone_against_batch(images[:64])
    return told


def _score(labeler: Labeler, images: Images, scenes: list[Scene]) -> tuple[np.ndarray, dict[str, float]]:
    matrix = np.zeros((len(CLASSES) + 1, len(CLASSES) + 2), np.int64)
    there, said = [], []
    for start in range(0, len(images), 8):
        result = labeler.pseudo_label(images[start : start + 8])
        said.append(result.labels.present)
        for scene, label_map in zip(scenes[start : start + 8], result.label_maps, strict=True):
            matrix += confusion_matrix(scene.label, label_map, len(CLASSES) + 1)
            there.append(np.isin(np.arange(1, len(CLASSES) + 1), scene.labels))
    return matrix, label_scores(np.array(there), np.concatenate(said))


def true_boxes(scene: Scene) -> list[dict[str, Any]]:
    pairs = zip(scene.labels.tolist(), scene.xyxy_image.tolist(), strict=True)
    return [{"label": CLASSES[label - 1], "xyxy": xyxy, "score": 1.0} for label, xyxy in pairs]


def _alone_against_batch(images: Images) -> dict[str, float]:
    labeler = Labeler.open("mini", classes="mini")
    together = [m for start in range(0, len(images), 8) for m in labeler.pseudo_label(images[start : start + 8]).label_maps]
    alone = [labeler.pseudo_label([image]).label_maps[0] for image in images]
    different = [int((a != b).sum()) for a, b in zip(alone, together, strict=True)]
    return {
        "images": len(images),
        "images_that_differ": sum(1 for count in different if count),
        "share_of_pixels": sum(different) / sum(image.pixels.shape[0] * image.pixels.shape[1] for image in images),
    }


def main() -> None:
    parser = study_parser(__spec__, __doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        told = measure(arguments.count, Path(folder))
    told = {**about(), "scenes": arguments.count, **told}
    write_result(arguments.out, told)


if __name__ == "__main__":
    main()
