"""Image-level truth from files: which classes each image has, as the field ships it."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from ...classes import Names
from ...errors import WsssError
from ...reading.documents import read_json
from .files import list_lines, plain_name
from .npy import read_label_dictionary

_FORMATS = 'JSON {"image": ["class", ...]}, lines of image id and 0-based class ids, or the field\'s cls_labels.npy'


def read_image_labels(path: Path, classes: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Which classes are in each of the named images.

    Args:
        path: ``.json`` as ``wsss label --labels`` takes it; ``.npy``, a dict of image ids to (C,) zeros and ones, which is
            read without executing its pickle; else text, ``COCO_train2014_000000000009 45 49 50``.
        classes: the C names without background. names: of the label maps, B of them.

    Returns:
        (B, C) bool.

    Raises:
        WsssError: unreadable, other classes, or images that have no entry.
    """
    if path.suffix == ".npy":
        table = _from_dictionary(path, len(classes))
    elif path.suffix == ".json":
        table = _from_json(path, classes)
    else:
        table = _from_lines(path, len(classes))
    present = np.zeros((len(names), len(classes)), bool)
    unknown = []
    for row, name in enumerate(names):
        key = next((each for each in _aliases(name) if each in table), None)
        if key is None:
            unknown.append(name)
        else:
            present[row, table[key]] = True
    if unknown:
        raise WsssError(
            f"--labels {path}: has no entry for {len(unknown)} of {len(names)} images, for example {unknown[0]}",
            hint="give the file of this split, or only its images with --list",
        )
    return present


def _from_dictionary(path: Path, classes: int) -> dict[str, list[int]]:
    table = {}
    for key, vector in read_label_dictionary(path).items():
        if len(vector) != classes:
            raise WsssError(
                f"--labels {path}: vectors of {len(vector)} classes, --classes has {classes}", hint="give both of one dataset"
            )
        name = key
        if isinstance(key, int):  # IRNet writes 2007_000032 as the number 2007000032; COCO's ids have 12 digits in file names
            name = f"{key // 1_000_000}_{key % 1_000_000:06}" if key >= 1_000_000_000 else f"{key:012}"
        table[str(name)] = np.flatnonzero(vector > 0).tolist()
    return table


def _from_lines(path: Path, classes: int) -> dict[str, list[int]]:
    table: dict[str, list[int]] = {}
    for number, line in list_lines(path, "--labels"):
        image, *ids = line.split()
        if not all(each.isdecimal() and int(each) < classes for each in ids):
            raise WsssError(
                f"--labels {path}: line {number}: expected an image id and class ids 0 to {classes - 1}, got {line[:60]!r}",
                hint=_FORMATS,
            )
        table[plain_name(image)] = [int(each) for each in ids]
    if not any(table.values()):
        raise WsssError(f"--labels {path}: a list of images without classes", hint=_FORMATS)
    return table


def _from_json(path: Path, classes: Sequence[str]) -> dict[str, list[int]]:
    told = read_json(path, where=f"--labels {path}", hint=_FORMATS)
    if not isinstance(told, dict) or not all(isinstance(each, list) for each in told.values()):
        raise WsssError(f"--labels {path}: expected a JSON object of image names to lists of class names", hint=_FORMATS)
    known = Names(classes)
    table: dict[str, list[int]] = {}
    for name, labels in told.items():
        table[name] = []
        for label in labels:
            found = known.find(label) if isinstance(label, str) else None
            if found is None:
                near = known.nearest(label) if isinstance(label, str) else None
                raise WsssError(
                    f"--labels {path}: {name[:200]}: the class {reprlib.repr(label)} is not in --classes",
                    hint=f"did you mean {near!r}?" if near else f"it has {', '.join(classes)}",
                )
            table[name].append(found - 1)
        table.setdefault(plain_name(name), table[name])
    return table


def _aliases(name: str) -> tuple[str, ...]:
    """What an image may be called in the file: its path, its file name, COCO's number alone."""
    plain = PurePosixPath(name).name
    return name, plain, plain.rpartition("_")[2]
