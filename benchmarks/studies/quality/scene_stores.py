"""Label stores with given labels, and the score of a trained segmenter on held-out scenes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ....classes import ClassList, named_list
from ....files import write_atomically
from ....mini.scenes import CLASSES, Scene, draw_scene
from ....photographs import read_photograph
from ....spec import sha256_of
from ....store.local import LabelStore, read_records
from ....train.args import Config
from ....train.checkpoint import load_run, weights_file
from ....train.evaluate.metrics import mean_iou
from ....train.run import DTYPES, autocast
from ....train.validate import whole_image_logits
from ...confusion import total_confusion

Labels = tuple[np.ndarray, list[dict[str, Any]], dict[str, float]]
"""A label map (H, W) uint8, the records of its boxes, and the score of each tagged class."""


def true_labels(scene: Scene) -> Labels:
    """The scene's truth, with score 1 for every object."""
    boxes = [box_record(scene, row, 1.0, int((scene.instance == row + 1).sum())) for row in range(len(scene.labels))]
    return scene.label, boxes, {CLASSES[label - 1]: 1.0 for label in scene.labels.tolist()}


def box_record(scene: Scene, row: int, score: float, won_px: int) -> dict[str, Any]:
    """A box in the format of a label store's manifest."""
    return {
        "label": CLASSES[int(scene.labels[row]) - 1],
        "score": round(score, 4),
        "xyxy": [round(float(edge), 2) for edge in scene.xyxy_image[row]],
        "quality": 1.0,
        "area_px": won_px,
        "won_px": won_px,
    }


def write_store(
    store: Path, images: Path, names: Iterable[str], label: Callable[[str], Labels], classes: ClassList, rule: str
) -> None:
    """Write a label store of images with given labels; continues where it was stopped.

    Args:
        names: of the images below ``images``.
        label: gives the labels of an image by its name.
        rule: describes how the labels were made.
    """
    done = {record["path"] for record in read_records(store)} if store.exists() else set()
    with LabelStore(store, classes, {"rule": rule}) as out:
        for name in names:
            if name in done:
                continue
            label_map, boxes, tags = label(name)
            data = (images / name).read_bytes()
            record = {
                "path": name,
                "label": f"{Path(name).stem}.png",
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "height": label_map.shape[0],
                "width": label_map.shape[1],
                "classes": tags,
                "boxes": boxes,
                "void_px": int((label_map == 255).sum()),
                "seconds": {},
            }
            out.write(record, label_map)


def write_scene_store(
    store: Path, images: Path, seeds: Mapping[str, int], label: Callable[[int, Scene], Labels], rule: str
) -> None:
    """Write a label store of training scenes, as `write_store`.

    Args:
        seeds: seed of each image's scene, by name.
        label: gives the labels of a seed and its scene.
    """
    write_store(store, images, seeds, lambda name: label(seeds[name], draw_scene(seeds[name])), named_list("mini"), rule)


@torch.inference_mode()
def held_out_miou(run: Path, config: Config, folder: Path, paths: list[Path]) -> float:
    """mIoU with background of a run's best weights on scenes of ``wsss.mini.scenes.write_scenes``, from one confusion matrix.

    The score is kept in the run's folder for the same weights and scenes.
    """
    kept, key = run / "held-out.json", f"{sha256_of(weights_file(run))} on {len(paths)} scenes from {paths[0].stem}"
    if kept.is_file() and (stored := json.loads(kept.read_text()))["key"] == key:
        return float(stored["miou"])
    segmenter, _ = load_run(run)
    cpu = torch.device("cpu")

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for path in paths:
            pixels = read_photograph(folder / "images", path.name).pixels
            with autocast(cpu, DTYPES[config.optimizer.precision]):
                logits = whole_image_logits(segmenter, pixels, config.data, cpu)
            truth = np.array(Image.open(folder / "truth" / f"{path.stem}.png"))
            yield truth, logits.argmax(dim=0).to(torch.uint8).numpy()

    miou = mean_iou(total_confusion(pairs()))
    write_atomically(kept, (json.dumps({"key": key, "miou": miou}) + "\n").encode())
    return miou
