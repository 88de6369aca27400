"""Losses for noisy labels on drawn scenes: ``python -m wsss.benchmarks.studies.quality.noisy_labels``.

Three in ten objects get a wrong label: dilated by a sixth of their size, dropped (background, though the class stays tagged),
or swapped for another class. The confidence is made from box scores, which are drawn like a detector's: Beta(8, 2) for right
objects, Beta(4, 4) for wrong ones. The score therefore tells the two apart with an AUC of 0.92, not perfectly. A dropped
object's class keeps a CLIP score from Beta(8, 2). Each loss is trained with three seeds and scored on held-out truth.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from ....mini.scenes import CLASSES, Scene, write_scenes
from ....train.args import config_from
from ....train.loop import train
from ....train.presets import preset
from ..harness import RESULTS, about, log, set_threads, study_parser, write_result
from .scene_stores import Labels, box_record, held_out_miou, write_scene_store

RESULT = RESULTS / "noisy-labels.json"
TRAIN_SEED, HELD_OUT_SEED = 5_000_000, 4_000_000
CORRUPTED = 0.3
LOSSES: dict[str, dict[str, Any]] = {
    "cross-entropy": {"confidence": False},
    "cross-entropy, confidence": {"confidence": True},
    "bootstrapped": {"kind": "bootstrapped", "confidence": False},
    "symmetric": {"kind": "symmetric", "confidence": False},
    "symmetric, confidence": {"kind": "symmetric", "confidence": True},
}


def corrupted(seed: int, scene: Scene) -> Labels:
    """The scene's truth with three in ten objects wrong; depends on the seed alone."""
    rng = np.random.default_rng([6, seed])
    label, boxes, tags = scene.label.copy(), [], {}
    for row, true in enumerate(scene.labels.tolist()):
        mask = scene.instance == row + 1
        name, wrong = CLASSES[true - 1], rng.random() < CORRUPTED
        score = float(rng.beta(4, 4) if wrong else rng.beta(8, 2))
        tags[name] = round(float(rng.beta(8, 2)), 4)
        box = box_record(scene, row, score, int(mask.sum()))
        kind = rng.choice(("dilated", "dropped", "swapped")) if wrong else ""
        if kind == "dropped":
            label[mask] = 0
            continue
        if kind == "swapped":
            other = (true - 1 + int(rng.integers(1, len(CLASSES)))) % len(CLASSES)
            label[mask], box["label"] = other + 1, CLASSES[other]
            tags[CLASSES[other]] = tags.pop(name)
        elif kind == "dilated":
            grown = _dilated(mask) & (scene.instance == 0)
            label[grown] = true
            box["won_px"] += int(grown.sum())
        boxes.append(box)
    return label, boxes, tags


def _dilated(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool, grown by a sixth of the square root of its area on every side."""
    px = max(2, round(float(np.sqrt(mask.sum())) / 6))
    picture = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(2 * px + 1))
    grown: np.ndarray = np.array(picture) > 127
    return grown


def measure(work: Path, *, images: int, held_out: int, steps: int, seeds: int, losses: Iterable[str]) -> dict[str, Any]:
    """Measure the held-out mIoU of each loss: one value for each seed, and their mean. Continues where it was stopped."""
    drawn = write_scenes(work / "train", images, seed=TRAIN_SEED, split="train")
    unseen = write_scenes(work / "held-out", held_out, seed=HELD_OUT_SEED)
    seeds_of = {path.name: TRAIN_SEED + number for number, path in enumerate(drawn)}
    write_scene_store(work / "store", work / "train" / "images", seeds_of, corrupted, f"{CORRUPTED} of the objects corrupted")
    result: dict[str, Any] = {}
    for name in losses:
        scores = []
        for seed in range(seeds):
            # No validation, so that the last weights are scored: choosing them by noisy labels would affect the comparison.
            settings = {"seed": seed, "loss": LOSSES[name], "optimizer": {"steps": steps}, "data": {"validation_share": 0.0}}
            config = config_from(preset("mini"), settings)
            run = work / f"run-{name.replace(', ', '-')}-{seed}"
            train(work / "store", work / "train" / "images", run, config)
            scores.append(round(held_out_miou(run, config, work / "held-out", unseen), 4))
            log(f"{name:28} seed {seed}: mIoU {scores[-1]:.4f}")
        result[name] = {"miou": scores, "mean": round(float(np.mean(scores)), 4), "std": round(float(np.std(scores)), 4)}
    for name in ("cross-entropy", "symmetric"):
        if name in result and f"{name}, confidence" in result:
            pairs = zip(result[f"{name}, confidence"]["miou"], result[name]["miou"], strict=True)
            result[f"{name}, gain by confidence"] = [round(with_it - without, 4) for with_it, without in pairs]
    return result


def main() -> None:
    parser = study_parser(__spec__, __doc__, out=RESULT, work="build/noisy-labels", threads=True)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--held-out", type=int, default=150)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--losses", nargs="+", choices=tuple(LOSSES), default=tuple(LOSSES))
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    sizes = {"images": arguments.images, "held_out": arguments.held_out, "steps": arguments.steps}
    scores = measure(arguments.work, **sizes, seeds=arguments.seeds, losses=arguments.losses)
    write_result(arguments.out, {**about(), "corrupted_share": CORRUPTED, **sizes, **scores})


if __name__ == "__main__":
    main()
