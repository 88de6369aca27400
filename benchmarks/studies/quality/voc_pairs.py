"""The trainer on a folder of real photographs and masks (JPEGImages/, SegmentationClass/).

A label store is made from the true masks, and a small network is trained on all of it from random weights. A hundred photographs
are too few to train a useful network. The study checks that training runs on real files, that nothing is skipped, that the loss
falls, and that the network learns to reproduce the labels of its training images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ....classes import ClassList, parse_classes
from ....train.apply.inference import Inference
from ....train.apply.label_photographs import label_photographs
from ....train.apply.predictor import Predictor
from ....train.args import Config, config_from
from ....train.curve import read_curve
from ....train.data import Order
from ....train.dataset.survey import read_survey
from ....train.evaluate.files import find_label_maps, pair_up, read_label_map
from ....train.evaluate.report import scores_from_counts
from ....train.evaluate.run import count_pairs
from ....train.loop import train
from ....train.presets import preset
from ..harness import RESULTS, about, log, set_threads, study_parser, write_result
from .scene_stores import Labels, write_store

RESULT = RESULTS / "voc-pairs-training.json"
SETTINGS: dict[str, Any] = {
    "model": {"architecture": "deeplabv3plus", "encoder": "resnet18", "options": {"decoder_channels": 128}},
    "data": {"shorter_px": 0, "crop": 96, "largest_share": 1.0, "batch": 8, "scale": [0.25, 0.5], "validation_share": 0.0},
    "optimizer": {"rate": 1e-3, "warm_up": 20},
    "machine": {"log_steps": 5},
}
"""Changes to the preset ``mini``: photographs at a quarter to half their size, all of them for training."""
SCALE = 0.4
"""Scale of the photographs when the trained network predicts them."""
AVERAGED = 5
"""Points of the curve that are averaged for the first and the last loss."""


def measure(folder: Path, work: Path, classes: ClassList, *, steps: int) -> dict[str, Any]:
    """Train on the folder's pairs and score the training images. Continues where it was stopped."""
    photographs, masks = folder / "JPEGImages", folder / "SegmentationClass"
    pairs = store_of_masks(photographs, masks, work / "store", classes)
    config = config_from(preset("mini"), SETTINGS, {"optimizer": {"steps": steps}})
    result = train(work / "store", photographs, work / "run", config, log=log, watch=lambda now: log(str(now)))
    survey = read_survey(work / "run" / "survey.json")
    losses = [loss for point in read_curve(work / "run") if (loss := point.get("loss")) is not None]
    predicted = work / "predicted"
    predictor = Predictor(work / "run", Inference(scales=(SCALE,)), precision=config.optimizer.precision)
    summary = label_photographs(predictor, photographs, [item.path for item in survey.items], predicted, log=log)
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
        "predicted": summary.labeled + summary.skipped,
        "not_predicted": summary.failed + len(compared.missing),
        "miou_on_training_images": scores["miou"],
        "pixel_accuracy_on_training_images": scores["pixel_accuracy"],
        "classes_predicted": sum(row["predicted_px"] > 0 for row in scores["classes"][1:]),
    }


def store_of_masks(photographs: Path, masks: Path, store: Path, classes: ClassList) -> int:
    """Make a label store of true masks; continues where it was stopped. Returns the number of pairs."""
    names = sorted(f"{path.stem}.jpg" for path in masks.glob("*.png"))

    def labels_of(name: str) -> Labels:
        label_map = read_label_map(masks / f"{Path(name).stem}.png")
        present = [int(label) for label in np.unique(label_map) if 0 < label < 255]
        return label_map, [], {classes.names[label - 1]: 1.0 for label in present}

    write_store(store, photographs, names, labels_of, classes, "true masks")
    return len(names)


def _fewest_draws(count: int, config: Config) -> int:
    """How often the least drawn image was drawn in the training."""
    order = Order(count, config.seed)
    drawn = np.bincount([order[position] for position in range(config.optimizer.steps * config.data.batch)], minlength=count)
    return int(drawn.min())


def main() -> None:
    parser = study_parser(__spec__, __doc__, out=RESULT, work="build/voc-pairs", threads=True)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--classes", default="voc")
    parser.add_argument("--steps", type=int, default=280)
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    result = measure(arguments.folder, arguments.work, parse_classes(arguments.classes), steps=arguments.steps)
    write_result(arguments.out, {**about(), **result})


if __name__ == "__main__":
    main()
