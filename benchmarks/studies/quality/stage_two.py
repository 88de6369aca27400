"""What stage two gains: ``python -m wsss.benchmarks.studies.quality.stage_two``.

The chain of small models labels drawn scenes; the same network is trained on these pseudo-labels and, with the same schedule,
on the truth. Both, and the chain itself, are scored on held-out scenes. Everything continues where it was stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ....mini.scenes import CLASSES, write_scenes
from ....photographs import read_photograph
from ....runtime.labeler import Labeler
from ....runtime.run.label_folder import label_folder
from ....train.args import config_from
from ....train.evaluate.metrics import confusion_matrix, mean_iou
from ....train.loop import train
from ....train.presets import preset
from ..harness import RESULTS, about, study_parser, write_result
from .scene_stores import held_out_miou, true_labels, write_store

RESULT = RESULTS / "stage-two.json"
TRAIN_SEED, HELD_OUT_SEED = 3_000_000, 2_000_000


def measure(work: Path, *, images: int, held_out: int, steps: int, log: Any) -> dict[str, Any]:
    """Scores of the chain and of both segmenters.

    Args:
        work: folder of everything that is made on the way.
        images: scenes to train on. held_out: scenes to score on. steps: length of each training.
    """
    drawn = write_scenes(work / "train", images, seed=TRAIN_SEED, split="train")
    unseen = write_scenes(work / "held-out", held_out, seed=HELD_OUT_SEED)
    names = [(path.name, TRAIN_SEED + number) for number, path in enumerate(drawn)]
    photographs = work / "train" / "images"
    write_store(work / "truth", photographs, names, lambda seed, scene: true_labels(scene), "truth")
    labeler = Labeler.open("mini", classes="mini")
    labelled = label_folder(labeler, photographs, work / "pseudo", warn=log)
    log(f"pseudo-labels: {labelled.labelled} new, {labelled.skipped} done before, {labelled.failed} failed")

    config = config_from(preset("mini"), {"optimizer": {"steps": steps}})
    told: dict[str, Any] = {"chain": {"miou": round(_chain_miou(labeler, work / "held-out", unseen), 4)}}
    log(f"chain: mIoU {told['chain']['miou']:.4f}")
    for name in ("truth", "pseudo"):
        result = train(work / name, photographs, work / f"run-{name}", config, log=log, watch=lambda status: log(str(status)))
        miou = held_out_miou(work / f"run-{name}", config, work / "held-out", unseen)
        told[f"trained on {name}"] = {"miou": round(miou, 4), "minutes": round(result.seconds / 60, 1)}
        log(f"trained on {name}: mIoU {miou:.4f}")
    told["pseudo / truth"] = round(told["trained on pseudo"]["miou"] / told["trained on truth"]["miou"], 4)
    told["pseudo - chain"] = round(told["trained on pseudo"]["miou"] - told["chain"]["miou"], 4)
    return told


def _chain_miou(labeler: Labeler, folder: Path, paths: list[Path]) -> float:
    """mIoU of the pseudo-labels themselves on held-out scenes; void counts as a miss."""
    matrix = np.zeros((len(CLASSES) + 1, len(CLASSES) + 2), np.int64)
    for start in range(0, len(paths), 8):
        batch = paths[start : start + 8]
        result = labeler.pseudo_label([read_photograph(folder / "images", path.name) for path in batch])
        for path, label_map in zip(batch, result.label_maps, strict=True):
            truth = np.array(Image.open(folder / "truth" / f"{path.stem}.png"))
            matrix += confusion_matrix(truth, label_map, len(CLASSES) + 1)
    return mean_iou(matrix)


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = study_parser(__spec__, __doc__)
    parser.add_argument("--images", type=int, default=1800)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--steps", type=int, default=config_from(preset("mini")).optimizer.steps)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/stage-two"), help="kept, so that a second call goes on")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    told: dict[str, Any] = {
        **about(),
        "images": arguments.images,
        "held_out": arguments.held_out,
        "steps": arguments.steps,
        "threads": arguments.threads,
    }
    told |= measure(arguments.work, images=arguments.images, held_out=arguments.held_out, steps=arguments.steps, log=_log)
    write_result(arguments.out, told)


if __name__ == "__main__":
    main()
