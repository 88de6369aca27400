"""The trainer on a folder of real photographs and masks (JPEGImages/, SegmentationClass/).

A label store is made from the true masks and a small network trained on all of it from no weights. A hundred photographs
teach no network to see; what is asked is whether training runs on real files, nothing is skipped, the loss falls, and the
network comes to say what its own training images show. The run's page and curve are there to be looked at.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ....classes import ClassList, parse_classes
from ....photographs import read_photograph
from ....runtime.run.label_folder import label_folder
from ....store.local import LabelStore, read_records
from ....train.args import Config, config_from
from ....train.curve import read_curve
from ....train.data import Order
from ....train.evaluate.files import find_label_maps, pair_up, read_label_map
from ....train.evaluate.report import scores_from_counts
from ....train.evaluate.run import count_pairs
from ....train.loop import train
from ....train.presets import preset
from ....train.survey import read_survey
from ...recipe.predict import trained_labeler
from ..harness import RESULTS, about, study_parser, write_result

RESULT = RESULTS / "voc-pairs-training.json"
SETTINGS: dict[str, Any] = {
    "model": {"architecture": "deeplabv3plus", "encoder": "resnet18", "options": {"decoder_channels": 128}},
    "data": {"shorter_px": 0, "crop": 96, "largest_share": 1.0, "batch": 8, "scale": [0.25, 0.5], "validation_share": 0.0},
    "optimizer": {"rate": 1e-3, "warm_up": 20},
    "machine": {"log_steps": 5},
}
"""Over the preset ``mini``: photographs at a quarter to half their size, all of them to train on."""
SCALE = 0.4
"""At which the trained network looks at them."""
AVERAGED = 5
"""Points of the curve that the first and the last loss are means of."""


def measure(folder: Path, work: Path, classes: ClassList, *, steps: int) -> dict[str, Any]:
    """What a training on the folder's pairs comes to. Continues where it was stopped."""
    photographs, masks = folder / "JPEGImages", folder / "SegmentationClass"
    pairs = store_of_masks(photographs, masks, work / "store", classes)
    config = config_from(preset("mini"), SETTINGS, {"optimizer": {"steps": steps}})
    result = train(work / "store", photographs, work / "run", config, log=_log, watch=lambda now: _log(str(now)))
    survey = read_survey(work / "run" / "survey.json")
    losses = [loss for point in read_curve(work / "run") if (loss := point.get("loss")) is not None]
    predicted = work / "predicted"
    told = label_folder(
        trained_labeler(work / "run", precision=config.optimizer.precision, scales=(SCALE,)), photographs, predicted, warn=_log
    )
    found = find_label_maps(predicted)
    compared = pair_up(found, find_label_maps(masks))
    scores = scores_from_counts(count_pairs(compared, classes.names), classes.names)
    return {
        "pairs": pairs,
        "trained_on": result.images,
        "skipped": pairs - len(survey.items) + survey.failed,
        "seen_at_least": _fewest_draws(len(survey.items), config),
        "classes_in_masks": int(np.sum(np.any([item.pixels for item in survey.items], axis=0)[1:])),
        "steps": result.steps,
        "minutes": round(result.seconds / 60, 1),
        "first_loss": round(float(np.mean(losses[:AVERAGED])), 4),
        "last_loss": round(float(np.mean(losses[-AVERAGED:])), 4),
        "predicted": told.labelled + told.skipped,
        "not_predicted": told.failed + len(compared.missing),
        "miou_on_training_images": scores["miou"],
        "pixel_accuracy_on_training_images": scores["pixel_accuracy"],
        "classes_predicted": sum(each["predicted_px"] > 0 for each in scores["classes"][1:]),
    }


def store_of_masks(photographs: Path, masks: Path, store: Path, classes: ClassList) -> int:
    """A label store of true masks; continues where it was stopped. Returns the number of pairs."""
    names = sorted(path.stem for path in masks.glob("*.png"))
    done = {record["path"] for record in read_records(store)} if store.exists() else set()
    with LabelStore(store, classes, {"rule": "true masks"}) as out:
        for name in names:
            if f"{name}.jpg" in done:
                continue
            photo = read_photograph(photographs, f"{name}.jpg")
            label_map = read_label_map(masks / f"{name}.png")
            labels = [int(label) for label in np.unique(label_map) if 0 < label < 255]
            record = {
                "path": photo.name,
                "label": f"{name}.png",
                "bytes": photo.size_bytes,
                "sha256": hashlib.sha256((photographs / photo.name).read_bytes()).hexdigest(),
                "height": label_map.shape[0],
                "width": label_map.shape[1],
                "classes": {classes.names[label - 1]: 1.0 for label in labels},
                "boxes": [],
                "void_px": int((label_map == 255).sum()),
                "seconds": {},
            }
            out.write(record, label_map)
    return len(names)


def _fewest_draws(count: int, config: Config) -> int:
    """How often the least seen image came up in the training."""
    order = Order(count, config.seed)
    drawn = np.bincount([order[position] for position in range(config.optimizer.steps * config.data.batch)], minlength=count)
    return int(drawn.min())


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = study_parser(__spec__, __doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--classes", default="voc")
    parser.add_argument("--steps", type=int, default=280)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/voc-pairs"), help="kept, so that a second call goes on")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    told: dict[str, Any] = {**about()}
    told |= measure(arguments.folder, arguments.work, parse_classes(arguments.classes), steps=arguments.steps)
    write_result(arguments.out, told)


if __name__ == "__main__":
    main()
