"""Rules of the chain, tuned on a few training images with their true label maps: ``--tune N``.

These images are then no longer scored as pseudo-labels, and the table counts their label maps as supervision. Val is never used.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ...batch import Photograph
from ...errors import UsageError
from ...files import write_atomically
from ...photographs import read_photograph
from ...runtime.chain import Chain, Rules
from ...runtime.tune.evidence import Evidence
from ...runtime.tune.tune import FOLDS, tune
from ...store.local import make_folder
from .data import DataSet, Split

KEPT = "tuned.json"


def rules_for(chain: Chain, data: DataSet, count: int, out: Path, log: Callable[[str], None]) -> Rules:
    """The rules that fit ``count`` images of the first scored split, or the defaults where those are better on images that were
    left out. Kept in ``out``; found again for other models.

    Raises:
        UsageError: fewer images than that, or too few.
    """
    names = names_of(data, count)
    models = {"models": chain.settings["models"], "engine": chain.settings["engine"], "names": names}
    kept = out / KEPT
    if kept.is_file():
        document = json.loads(kept.read_text(encoding="utf-8"))
        if {key: document[key] for key in models} == models:
            return Rules(**document["rules"])
    split = data.scored[0]

    def truth(name: str) -> np.ndarray:
        with Image.open(split.truth / f"{name}.png") as image:
            return np.array(image)

    def read(name: str) -> Photograph:
        return read_photograph(split.images[name].parent, split.images[name].name)

    found = tune(Evidence(chain, names, read, truth))
    log(f"rules tuned on {count} images of {split.name}: mIoU {found.default_miou:.4f}, {found.held_out} where left out")
    write_atomically(kept, (json.dumps({**models, "rules": vars(found.rules)}, indent=1) + "\n").encode())
    return found.rules


def names_of(data: DataSet, count: int) -> list[str]:
    """``count`` images of the first scored split, evenly spaced in its list. Raises UsageError."""
    names = list(data.scored[0].images)
    most = len(names) // 2
    if not FOLDS <= count <= most:
        raise UsageError(f"--tune {count}: expected {FOLDS} to {most}, half of the images of {data.scored[0].name}")
    return [names[number * len(names) // count] for number in range(count)]


def without(data: DataSet, names: list[str], folder: Path) -> DataSet:
    """The data set without these images in the scores of pseudo-labels. The shorter lists are written into ``folder``."""
    make_folder(folder)

    def shorter(split: Split) -> Split:
        images = {name: path for name, path in split.images.items() if name not in names}
        file = folder / f"{split.name}.txt"
        write_atomically(file, "".join(f"{name}\n" for name in images).encode("utf-8", "surrogatepass"))
        return dataclasses.replace(split, list=file, images=images)

    return dataclasses.replace(data, scored=tuple(map(shorter, data.scored)))
