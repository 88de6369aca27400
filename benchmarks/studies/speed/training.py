"""CPU time of a training: images prepared a second and core, and our step beside a plain loop.

    python -m wsss.benchmarks.studies.speed.training --photos VOCdevkit/VOC2012 [--rounds 5]

``--photos`` is a folder in VOC's layout (JPEGImages, SegmentationClass). Images are prepared as by one worker of the loader, with
the crops and colors of each preset. Steps of both loops have the same network, crops, loss, AdamW and clipping, and alternate.
The plain loop is what one writes by hand: normalize, ``F.cross_entropy``, ``clip_grad_norm_``, ``AdamW``.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ....train.args import Config, config_from
from ....train.data import Batch, Crops, Order, collate, ranked_confidence
from ....train.dataset.survey import Item
from ....train.distributed import World
from ....train.loss import PixelLoss
from ....train.model import build_from
from ....train.presets import preset
from ....train.run import Run
from ..harness import RESULTS, about, log, set_threads, study_parser, write_result

PRESETS = "segformer", "deeplabv3plus-voc", "deeplabv2-voc", "mask2former"
CLASSES = 21
NETWORKS: dict[str, dict[str, Any]] = {
    "segformer b0, 4 crops of 256": {
        "model": {"architecture": "segformer", "encoder": "b0"},
        "data": {"batch": 4, "crop": 256},
    },
    "deeplabv3plus mobilenet_v2, 8 crops of 128": {
        "model": {"architecture": "deeplabv3plus", "encoder": "mobilenet_v2"},
        "data": {"batch": 8, "crop": 128},
    },
    "unet resnet10t, 16 crops of 64": {
        "model": {
            "encoder": "tu-resnet10t",
            "architecture": "unet",
            "options": {"encoder_depth": 4, "decoder_channels": [64, 48, 32, 16]},
        },
        "data": {"batch": 16, "crop": 64},
    },
}
SHARED = {"optimizer": {"kind": "adamw", "rate": 1e-4, "clip_norm": 1.0}, "loss": {"confidence": False}}


def items_of(folder: Path, work: Path) -> tuple[Item, ...]:
    """The photographs of a folder in VOC's layout that have a mask; ``work/labels`` gets links to the masks."""
    (work / "labels").mkdir(parents=True, exist_ok=True)
    items = []
    for path in sorted((folder / "SegmentationClass").glob("*.png")):
        link = work / "labels" / path.name
        link.unlink(missing_ok=True)
        link.symlink_to(path.resolve())
        photo = folder / "JPEGImages" / f"{path.stem}.jpg"
        label = np.asarray(Image.open(path))
        items.append(
            Item(
                path=photo.name,
                label=path.name,
                sha256=hashlib.sha256(photo.read_bytes()).hexdigest(),
                confidence=(1.0,) * CLASSES,
                pixels=tuple(np.bincount(label.ravel(), minlength=256)[:CLASSES].tolist()),
                size=(label.shape[0], label.shape[1]),
            )
        )
    return tuple(items)


def crops_of(folder: Path, work: Path, items: tuple[Item, ...], config: Config) -> Crops:
    order = Order(len(items), 0)
    return Crops(work, folder / "JPEGImages", items, config.data, seed=0, order=order, confidence=ranked_confidence(items))


def seconds_of(call: Callable[[], object], times: int = 1) -> float:
    """CPU seconds of the process in so many calls."""
    begun = time.process_time()
    for _ in range(times):
        call()
    return time.process_time() - begun


def batch_of(crops: Crops, size: int, number: int = 0) -> Batch:
    batch = collate([crops[size * number + row] for row in range(size)])
    assert isinstance(batch, Batch)
    return batch


def plain_step(config: Config) -> Callable[[Batch], object]:
    """A step of a loop written by hand."""
    segmenter = build_from(config.model, CLASSES, 0).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(segmenter.parameters(), lr=config.optimizer.rate)
    mean, std = torch.tensor(config.data.mean), torch.tensor(config.data.std)

    def step(batch: Batch) -> float:
        pixels = ((batch.pixels.float() - mean) / std).permute(0, 3, 1, 2)
        optimizer.zero_grad()
        loss = F.cross_entropy(segmenter(pixels), batch.label.long(), ignore_index=255)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(segmenter.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        return loss.item()

    return step


def our_step(config: Config) -> Callable[[Batch], object]:
    """A step of `wsss.train`."""
    world = World(rank=0, size=1, device=torch.device("cpu"))
    run = Run.begin(build_from(config.model, CLASSES, 0), PixelLoss(config.loss), config, world, [""] * 10_000)

    def step(batch: Batch) -> None:
        run.advance([copy.copy(batch)])
        run.settle()

    return step


def main() -> None:
    parser = study_parser(__spec__, __doc__, out=RESULTS / "training-speed.json", work="build/training-speed", threads=True)
    parser.add_argument("--photos", type=Path, required=True, help="folder in VOC's layout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="in each round")
    arguments = parser.parse_args()
    set_threads(1)
    items = items_of(arguments.photos, arguments.work)
    found: dict[str, Any] = {**about(), "photographs": len(items)}
    rates: dict[str, list[float]] = {name: [] for name in PRESETS}
    for _ in range(arguments.rounds):
        for name in PRESETS:
            crops = crops_of(arguments.photos, arguments.work, items, config_from(preset(name)))
            rates[name].append(len(items) / seconds_of(lambda crops=crops: [crops[row] for row in range(len(items))]))  # type: ignore[misc]
    found["images a second and core"] = {name: round(float(np.median(rates[name])), 1) for name in PRESETS}
    log(str(found["images a second and core"]))
    set_threads(arguments.threads)
    found["CPU seconds of a plain step / ours"] = {}
    for name, settings in NETWORKS.items():
        config = config_from(settings, SHARED)
        batch = batch_of(crops_of(arguments.photos, arguments.work, items, config), config.data.batch)
        plain, ours = plain_step(config), our_step(config)
        steps = [partial(step, batch) for step in (plain, ours)]
        for step in steps:
            step()  # warm up
        ratios = []
        for _ in range(arguments.rounds):
            took = [seconds_of(step, arguments.steps) for step in steps]
            ratios.append(took[0] / took[1])
        found["CPU seconds of a plain step / ours"][name] = {
            "median": round(float(np.median(ratios)), 3),
            "lowest": round(min(ratios), 3),
            "highest": round(max(ratios), 3),
        }
        log(f"{name}: {found['CPU seconds of a plain step / ours'][name]}")
    write_result(arguments.out, found)


if __name__ == "__main__":
    main()
