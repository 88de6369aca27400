"""Margin and the trainer's confidence, on hard drawn scenes: ``python -m wsss.benchmarks.studies.quality.pixel_confidence``.

The models that come with wsss label scenes of seven kinds (`wsss.mini.hard_scenes`), which they get wrong in the ways that larger
models do: look-alikes, overlap, small and cut objects. A segmenter is trained on the labels of each margin, with no weights, with
those of each class in an image (``loss.confidence=box``), and with those of each pixel (``pixel``), and scored on the truth of
other such scenes. The runs of a seed share their first weights and their crops. As in `confidence_weights`, all layers but the
last start from weights trained on the truth of plain scenes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np

from ....mini.hard_scenes import KINDS, Kind, draw_hard_scene
from ....mini.scenes import Scene, draw_scene, write_scenes
from ....runtime.chain import Rules
from ....runtime.labeler import Labeler
from ....train import loop
from ....train.args import config_from
from ....train.presets import preset
from ..harness import RESULTS, about, log, read_result, set_threads, study_parser, write_result
from .confidence_weights import train_first
from .scene_stores import held_out_miou

MIXED = ("plain", *(kind for kind in KINDS if kind not in ("empty", "shifted")))
MARGINS = (0.0, 0.1, 0.3)
WAYS = ("off", "box", "pixel")
TRAIN_SEED, HELD_OUT_SEED = 10_000, 20_000
"""Above the seeds of the other studies of hard scenes."""


def mixed_scene(number: int) -> Scene:
    """A scene of each kind in turn."""
    kind = MIXED[number % len(MIXED)]
    return draw_scene(number, split="held-out") if kind == "plain" else draw_hard_scene(number, cast(Kind, kind))


def main() -> None:
    parser = study_parser(__spec__, __doc__, out=RESULTS / "pixel-confidence.json", work="build/pixel-confidence", threads=True)
    parser.add_argument("--images", type=int, default=280)
    parser.add_argument("--held-out", type=int, default=70)
    parser.add_argument("--first-steps", type=int, default=800, help="of the weights that all runs start from")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    work: Path = arguments.work
    sizes = {name: getattr(arguments, name) for name in ("images", "held_out", "first_steps", "steps", "rate", "batch")}
    found: dict[str, Any] = {**read_result(arguments.out), **about(), **sizes}
    write_scenes(work / "train", arguments.images, seed=TRAIN_SEED, draw=mixed_scene)
    unseen = write_scenes(work / "held-out", arguments.held_out, seed=HELD_OUT_SEED, draw=mixed_scene)
    photos = work / "train" / "images"
    train_first(work, work / "run-first", arguments)
    scores: dict[str, dict[str, list[float]]] = {f"margin {margin:g}": {way: [] for way in WAYS} for margin in MARGINS}
    for margin in MARGINS:
        labeler = Labeler.open("mini", classes="mini", engine="ort", rules=Rules(margin=margin), confidence=True)
        labeler.label_folder(photos, work / f"margin-{margin:g}", progress=False)
    for seed in range(arguments.seeds):
        for margin in MARGINS:
            for way in WAYS:
                # no validation, so that the last weights are scored
                changed: dict[str, Any] = {
                    "seed": seed,
                    "loss": {"confidence": way},
                    "model": {"init": str(work / "run-first"), "new_head": True},
                    "optimizer": {"steps": arguments.steps, "rate": arguments.rate},
                    "data": {"validation_share": 0.0, "batch": arguments.batch},
                    "machine": {"workers": 0},
                }
                config = config_from(preset("mini"), changed)
                run = work / f"run-{margin:g}-{way}-{seed}"
                loop.train(work / f"margin-{margin:g}", photos, run, config)
                miou = round(held_out_miou(run, config, work / "held-out", unseen), 4)
                scores[f"margin {margin:g}"][way].append(miou)
                log(f"margin {margin:g}, {way:6} seed {seed}: mIoU {miou:.4f}")
        found |= {"seeds": seed + 1, "mIoU": scores}
        found["mean"] = {cell: {way: round(float(np.mean(each)), 4) for way, each in row.items()} for cell, row in scores.items()}
        write_result(arguments.out, found)


if __name__ == "__main__":
    main()
