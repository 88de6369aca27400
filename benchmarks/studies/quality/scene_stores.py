"""Label stores of drawn scenes with labels of our own making, and the score of a trained segmenter on scenes it never saw."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ....classes import named_list
from ....mini.scenes import CLASSES, Scene, draw_scene
from ....photographs import read_photograph
from ....spec import sha256_of
from ....store.local import LabelStore, read_records, write_atomically
from ....train.args import Config
from ....train.checkpoint import load_run, weights_file
from ....train.evaluate.metrics import confusion_matrix, mean_iou
from ....train.run import DTYPES, autocast
from ....train.validate import whole_image_logits

Labels = tuple[np.ndarray, list[dict[str, Any]], dict[str, float]]
"""A label map (H, W) uint8, the boxes' records, and the score of each tagged class."""


def true_labels(scene: Scene) -> Labels:
    """The scene's truth, every object found and sure."""
    boxes = [box_record(scene, row, 1.0, int((scene.instance == row + 1).sum())) for row in range(len(scene.labels))]
    return scene.label, boxes, {CLASSES[label - 1]: 1.0 for label in scene.labels.tolist()}


def box_record(scene: Scene, row: int, score: float, won_px: int) -> dict[str, Any]:
    """A box as a label store's manifest has it."""
    return {
        "label": CLASSES[int(scene.labels[row]) - 1],
        "score": round(score, 4),
        "xyxy": [round(float(edge), 2) for edge in scene.xyxy_image[row]],
        "quality": 1.0,
        "area_px": won_px,
        "won_px": won_px,
    }


def write_store(
    store: Path, images: Path, names: Iterable[tuple[str, int]], label: Callable[[int, Scene], Labels], rule: str
) -> None:
    """Labels images of training scenes, each name with its scene's seed; continues where it was stopped.

    Args:
        label: from a seed and its scene to what is stored.
        rule: says how the labels were made.
    """
    done = {record["path"] for record in read_records(store)} if store.exists() else set()
    with LabelStore(store, named_list("mini"), {"rule": rule}) as out:
        for name, seed in names:
            if name in done:
                continue
            scene = draw_scene(seed)
            label_map, boxes, tags = label(seed, scene)
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


@torch.inference_mode()
def held_out_miou(run: Path, config: Config, folder: Path, paths: list[Path]) -> float:
    """mIoU with background of a run's best weights on scenes of ``wsss.mini.scenes.write_scenes``, as one confusion matrix.

    Kept in the run's folder as long as weights and scenes are the same.
    """
    kept, key = run / "held-out.json", f"{sha256_of(weights_file(run))} on {len(paths)} scenes from {paths[0].stem}"
    if kept.is_file() and (told := json.loads(kept.read_text()))["key"] == key:
        return float(told["miou"])
    segmenter, _ = load_run(run)
    matrix = np.zeros((len(CLASSES) + 1, len(CLASSES) + 2), np.int64)
    cpu = torch.device("cpu")
    for path in paths:
        pixels = read_photograph(folder / "images", path.name).pixels
        truth = np.array(Image.open(folder / "truth" / f"{path.stem}.png"))
        with autocast(cpu, DTYPES[config.optimizer.precision]):
            logits = whole_image_logits(segmenter, pixels, config.data, cpu)
        matrix += confusion_matrix(truth, logits.argmax(dim=0).to(torch.uint8).numpy(), len(CLASSES) + 1)
    miou = mean_iou(matrix)
    write_atomically(kept, (json.dumps({"key": key, "miou": miou}) + "\n").encode())
    return miou
