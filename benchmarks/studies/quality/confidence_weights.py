"""Loss weights from the store's confidence, on drawn scenes: ``python -m wsss.benchmarks.studies.quality.confidence_weights``.

Objects have scores like a detector's: normally distributed with a deviation of 0.08 around 0.3, 0.45 or 0.8. In one half of the
cells all labels are right, and the scores mean nothing. In the other half three in ten objects have a wrong label: dilated by a
sixth of their size, dropped (background, though the class stays tagged), or swapped for another class. Their scores are lower by
0.16, so that the score tells the two apart with an AUC of 0.92. Each way of weighting is trained with three seeds and scored on
held-out truth; the runs of a seed share their first weights and their crops. All layers but the last start from weights trained
on the truth of other scenes, as segmenters start from ImageNet: from random weights, the results of 500 steps differ by 0.03
between seeds, more than any weighting changes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from ....mini.scenes import CLASSES, Scene, write_scenes
from ....train import loop
from ....train.args import config_from
from ....train.data import ranked_confidence
from ....train.dataset.survey import Item
from ....train.presets import preset
from ..harness import RESULTS, about, log, read_result, set_threads, study_parser, write_result
from .scene_stores import Labels, box_record, held_out_miou, write_scene_store

TRAIN_SEED, HELD_OUT_SEED, FIRST_SEED = 8_000_000, 4_000_000, 9_000_000
MEANS = (0.45, 0.3, 0.8)
SPREAD, LOWER = 0.08, 0.16
CORRUPTED = 0.3


def by_scores(items: Sequence[Item]) -> np.ndarray:
    """The confidence itself, which prefers the background."""
    return np.array([item.confidence for item in items], np.float32)


def by_mean(items: Sequence[Item]) -> np.ndarray:
    """The confidence relative to the mean of its class over all pixels."""
    confidence = np.array([item.confidence for item in items])
    pixels = np.array([item.pixels for item in items], np.float64)
    mean = (confidence * pixels).sum(axis=0) / np.maximum(pixels.sum(axis=0), 1)
    relative: np.ndarray = np.where(mean > 0, confidence / np.where(mean > 0, mean, 1), 1).astype(np.float32)
    return relative


WEIGHTS: dict[str, Callable[[Sequence[Item]], np.ndarray] | None] = {
    "none": None,
    "rank in the class": ranked_confidence,
    "relative to the class's mean": by_mean,
    "scores": by_scores,
}


def labels_for(mean: float, *, is_corrupted: bool) -> Callable[[int, Scene], Labels]:
    """The labels of a scene, with scores around ``mean``; they depend on the seed alone."""

    def label(seed: int, scene: Scene) -> Labels:
        rng = np.random.default_rng([9, seed])

        def score(is_wrong: bool) -> float:
            return float(np.clip(rng.normal(mean - LOWER * is_wrong, SPREAD), 0.05, 1))

        if is_corrupted:
            return corrupted(seed, scene, score)
        boxes = [box_record(scene, row, score(False), int((scene.instance == row + 1).sum())) for row in range(len(scene.labels))]
        return scene.label, boxes, {box["label"]: 1.0 for box in boxes}

    return label


def corrupted(seed: int, scene: Scene, score_of: Callable[[bool], float]) -> Labels:
    """The scene's truth with three in ten objects wrong: dilated, dropped, or of another class. Depends on the seed alone.

    Args:
        score_of: gives the score of an object by whether its label is wrong.
    """
    rng = np.random.default_rng([6, seed])
    label, boxes, tags = scene.label.copy(), [], {}
    for row, true in enumerate(scene.labels.tolist()):
        mask = scene.instance == row + 1
        name, wrong = CLASSES[true - 1], rng.random() < CORRUPTED
        score = score_of(bool(wrong))
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


def train_first(work: Path, run: Path, arguments: argparse.Namespace) -> None:
    """Train the weights that all runs start from."""
    drawn = write_scenes(work / "first", arguments.images, seed=FIRST_SEED, split="train")
    seeds_of = {path.name: FIRST_SEED + number for number, path in enumerate(drawn)}
    truth = labels_for(MEANS[0], is_corrupted=False)
    write_scene_store(work / "first-labels", work / "first" / "images", seeds_of, truth, "first")
    changed: dict[str, Any] = {
        "loss": {"confidence": "off"},
        "optimizer": {"steps": arguments.first_steps},
        "data": {"validation_share": 0.0, "batch": arguments.batch},
    }
    loop.train(work / "first-labels", work / "first" / "images", run, config_from(preset("mini"), changed))


def main() -> None:
    parser = study_parser(
        __spec__, __doc__, out=RESULTS / "confidence-weights.json", work="build/confidence-weights", threads=True
    )
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--first-steps", type=int, default=900, help="of the weights that all runs start from")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=tuple(WEIGHTS), default=tuple(WEIGHTS), help="of weighting")
    parser.add_argument("--labels", nargs="+", choices=("corrupted", "right"), default=("corrupted", "right"))
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    work: Path = arguments.work
    sizes = {name: getattr(arguments, name) for name in ("images", "held_out", "first_steps", "steps", "rate", "batch")}
    found: dict[str, Any] = read_result(arguments.out)
    found |= {**about(), **sizes, "corrupted_share": CORRUPTED}
    drawn = write_scenes(work / "train", arguments.images, seed=TRAIN_SEED, split="train")
    unseen = write_scenes(work / "held-out", arguments.held_out, seed=HELD_OUT_SEED)
    seeds_of = {path.name: TRAIN_SEED + number for number, path in enumerate(drawn)}
    first = work / "run-first"
    train_first(work, first, arguments)
    for is_corrupted in (kind == "corrupted" for kind in arguments.labels):
        # ranks do not depend on the mean, and once is enough for the scores
        for mean in MEANS if "relative to the class's mean" in arguments.ways else MEANS[:1]:
            cell = f"{'corrupted' if is_corrupted else 'right'}, mean score {mean:g}"
            store = work / cell.replace(", ", "-").replace(" ", "-")
            write_scene_store(store, work / "train" / "images", seeds_of, labels_for(mean, is_corrupted=is_corrupted), cell)
            for name in arguments.ways:
                weights = WEIGHTS[name]
                if name in ("scores", "rank in the class") and mean != MEANS[0]:
                    continue
                scores: list[float] = []
                for seed in range(arguments.seeds):
                    # no validation, so that the last weights are scored
                    changed: dict[str, Any] = {
                        "seed": seed,
                        "loss": {"confidence": "off" if weights is None else "box"},
                        "model": {"init": str(first), "new_head": True},
                        "optimizer": {"steps": arguments.steps, "rate": arguments.rate},
                        "data": {"validation_share": 0.0, "batch": arguments.batch},
                    }
                    config = config_from(preset("mini"), changed)
                    # without weights, the scores do not matter: the runs of the first mean are those of all
                    used = store if weights else work / f"{'corrupted' if is_corrupted else 'right'}-mean-score-{MEANS[0]:g}"
                    run = work / f"run-{used.name}-{name.replace(' ', '-')}-{seed}"
                    loop.ranked_confidence = weights or ranked_confidence  # type: ignore[assignment,attr-defined]
                    loop.train(used, work / "train" / "images", run, config)
                    scores.append(round(held_out_miou(run, config, work / "held-out", unseen), 4))
                    log(f"{cell:30} {name:30} seed {seed}: mIoU {scores[-1]:.4f}")
                found.setdefault(cell, {})[name] = {"miou": scores, "mean": round(float(np.mean(scores)), 4)}
                write_result(arguments.out, found)


if __name__ == "__main__":
    main()
