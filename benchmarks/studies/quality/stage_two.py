"""The gain of training on pseudo-labels (stage two): ``python -m wsss.benchmarks.studies.quality.stage_two``.

The chain of small models labels drawn scenes. The same network is trained on these pseudo-labels, with the store's confidence as
weights and without, and, with the same schedule, on the truth. All of them, and the chain itself, are scored on held-out scenes.
All steps continue where they were stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ....mini.scenes import write_scenes
from ....photographs import read_photograph
from ....runtime.chain import Chain
from ....runtime.run.label_folder import label_folder
from ....train.args import config_from
from ....train.evaluate.metrics import mean_iou
from ....train.loop import train
from ....train.presets import preset
from ...confusion import total_confusion
from ..harness import RESULTS, about, log, set_threads, study_parser, write_result
from .mini_quality import label_maps
from .scene_stores import held_out_miou, true_labels, write_scene_store

RESULT = RESULTS / "stage-two.json"
RUNS = (
    ("trained on truth", "truth", "off", 1),
    ("trained on pseudo", "pseudo", "off", 2),
    ("trained on pseudo, by rank", "pseudo", "box", 2),
)
"""Name in the result, label store, ``loss.confidence``, number of seeds."""
TRAIN_SEED, HELD_OUT_SEED = 3_000_000, 2_000_000


def measure(work: Path, *, images: int, held_out: int, steps: int) -> dict[str, Any]:
    """Score the chain and both segmenters.

    Args:
        work: folder for scenes, stores and runs.
        images: scenes to train on. held_out: scenes to score on. steps: length of each training.
    """
    drawn = write_scenes(work / "train", images, seed=TRAIN_SEED, split="train")
    unseen = write_scenes(work / "held-out", held_out, seed=HELD_OUT_SEED)
    seeds_of = {path.name: TRAIN_SEED + number for number, path in enumerate(drawn)}
    photographs = work / "train" / "images"
    write_scene_store(work / "truth", photographs, seeds_of, lambda seed, scene: true_labels(scene), "truth")
    labeler = Chain.open("mini", classes="mini")
    summary = label_folder(labeler, photographs, work / "pseudo", warn=log)
    log(f"pseudo-labels: {summary.labelled} new, {summary.skipped} done before, {summary.failed} failed")

    result: dict[str, Any] = {"chain": {"miou": round(_chain_miou(labeler, work / "held-out", unseen), 4)}}
    log(f"chain: mIoU {result['chain']['miou']:.4f}")
    for name, store, confidence, seeds in RUNS:
        scores, minutes = [], []
        for seed in range(seeds):
            own = {"seed": seed, "optimizer": {"steps": steps}, "loss": {"confidence": confidence}}
            config, run = config_from(preset("mini"), own), work / f"run-{store}-{confidence}-{seed}"
            trained = train(work / store, photographs, run, config, log=log, watch=lambda status: log(str(status)))
            scores.append(held_out_miou(run, config, work / "held-out", unseen))
            minutes.append(trained.seconds / 60)
            log(f"{name}, seed {seed}: mIoU {scores[-1]:.4f}")
        mean = sum(scores) / seeds
        result[name] = {"miou": round(mean, 4), "seeds": [round(score, 4) for score in scores], "minutes": round(sum(minutes), 1)}
    result["pseudo / truth"] = round(result["trained on pseudo"]["miou"] / result["trained on truth"]["miou"], 4)
    result["pseudo - chain"] = round(result["trained on pseudo"]["miou"] - result["chain"]["miou"], 4)
    return result


def _chain_miou(labeler: Chain, folder: Path, paths: list[Path]) -> float:
    """mIoU of the chain's label maps on held-out scenes; void counts as a miss."""
    images = [read_photograph(folder / "images", path.name) for path in paths]
    truth = (np.array(Image.open(folder / "truth" / f"{path.stem}.png")) for path in paths)
    return mean_iou(total_confusion(zip(truth, label_maps(labeler, images), strict=True)))


def main() -> None:
    parser = study_parser(__spec__, __doc__, out=RESULT, work="build/stage-two", threads=True)
    parser.add_argument("--images", type=int, default=1800)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--steps", type=int, default=config_from(preset("mini")).optimizer.steps)
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    sizes = {"images": arguments.images, "held_out": arguments.held_out, "steps": arguments.steps}
    result = {**about(), **sizes, "threads": arguments.threads, **measure(arguments.work, **sizes)}
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
