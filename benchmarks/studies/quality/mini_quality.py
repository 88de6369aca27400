"""Quality of the small models, and what each stage loses: ``python -m wsss.benchmarks.studies.quality.mini_quality``.

The chain labels 200 held-out scenes, then again with one stage after another replaced by the truth. The differences are each
stage's share of the loss. Also compares labels of each scene alone with those in a batch of other scenes.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ....batch import Images
from ....mini.scenes import CLASSES, Scene, draw_scene, write_scenes
from ....photographs import read_photograph
from ....runtime.chain import Chain, Rules
from ....train.evaluate.metrics import class_iou, label_scores, mean_iou
from ...confusion import total_confusion
from ..harness import RESULTS, about, log, study_parser, write_result

RESULT = RESULTS / "mini-quality.json"
SEED = 2_000_000


def measure(count: int, folder: Path) -> dict[str, Any]:
    """mIoU and label F1 of the chain and of its variants on ``count`` held-out JPEG scenes, written below ``folder``."""
    images, scenes, boxes = held_out_scenes(count, folder)
    variants: dict[str, dict[str, Any]] = {
        "chain": {},
        "without the CLIP gate": {"rules": Rules(gate=False)},
        "true labels": {"labels": folder / "labels.json"},
        "true boxes": {"boxes": boxes},
    }
    result: dict[str, Any] = {}
    for name, options in variants.items():
        start = time.perf_counter()
        labeler = Chain.open("mini", classes="mini", **options)
        matrix, labels = _score(labeler, images, scenes)
        result[name] = {"miou": round(mean_iou(matrix), 4), "seconds": round(time.perf_counter() - start, 1)}
        if name == "chain":
            result[name] |= {key: round(value, 4) for key, value in labels.items()}
            result[name]["stage_seconds"] = {stage: round(taken, 1) for stage, taken in labeler.take_seconds().items()}
            result[name]["iou"] = dict(zip(("background", *CLASSES), np.round(class_iou(matrix), 3).tolist(), strict=True))
        log(f"{name:24} mIoU {result[name]['miou']:.3f}")
    result["share of the loss"] = {
        "labels (CLIP)": round(result["true labels"]["miou"] - result["chain"]["miou"], 4),
        "boxes (Grounding-DINO)": round(result["true boxes"]["miou"] - result["true labels"]["miou"], 4),
        "masks and fusion (SAM)": round(1 - result["true boxes"]["miou"], 4),
    }
    result["alone against a batch of 8"] = _alone_against_batch(images[:64])
    return result


def _score(labeler: Chain, images: Images, scenes: list[Scene]) -> tuple[np.ndarray, dict[str, float]]:
    results = [labeler.pseudo_label(images[start : start + 8]) for start in range(0, len(images), 8)]
    predicted_maps = [label_map for result in results for label_map in result.label_maps]
    present = np.array([np.isin(np.arange(1, len(CLASSES) + 1), scene.labels) for scene in scenes])
    predicted = np.concatenate([result.labels.present for result in results])
    truth = (scene.label for scene in scenes)
    return total_confusion(zip(truth, predicted_maps, strict=True)), label_scores(present, predicted)


def held_out_scenes(count: int, folder: Path) -> tuple[Images, list[Scene], Path]:
    """Write held-out scenes below ``folder``; returns their images, the scenes, and a file of their true boxes."""
    paths = write_scenes(folder, count, seed=SEED)
    images = [read_photograph(folder / "images", path.name) for path in paths]
    scenes = [draw_scene(SEED + number, split="held-out") for number in range(count)]
    boxes = {path.name: _true_boxes(scene) for path, scene in zip(paths, scenes, strict=True)}
    (folder / "boxes.json").write_text(json.dumps(boxes))
    return images, scenes, folder / "boxes.json"


def label_maps(labeler: Chain, images: Images, batch: int = 8) -> list[np.ndarray]:
    """The chain's label maps of some images."""
    starts = range(0, len(images), batch)
    return [label_map for start in starts for label_map in labeler.pseudo_label(images[start : start + batch]).label_maps]


def _true_boxes(scene: Scene) -> list[dict[str, Any]]:
    """The true boxes of a scene, in the format of ``wsss label --boxes``."""
    pairs = zip(scene.labels.tolist(), scene.xyxy_image.tolist(), strict=True)
    return [{"label": CLASSES[label - 1], "xyxy": xyxy, "score": 1.0} for label, xyxy in pairs]


def _alone_against_batch(images: Images) -> dict[str, float]:
    labeler = Chain.open("mini", classes="mini")
    together, alone = label_maps(labeler, images), label_maps(labeler, images, batch=1)
    different = [int((a != b).sum()) for a, b in zip(alone, together, strict=True)]
    return {
        "images": len(images),
        "images_that_differ": sum(1 for count in different if count),
        "share_of_pixels": sum(different) / sum(image.pixels.shape[0] * image.pixels.shape[1] for image in images),
    }


def main() -> None:
    parser = study_parser(__spec__, __doc__, out=RESULT)
    parser.add_argument("--count", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = {**about(), "scenes": arguments.count, **measure(arguments.count, Path(folder))}
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
