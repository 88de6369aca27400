"""Read true image labels: which classes each image has, in common file formats."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from ...classes import Names
from ...errors import WsssError
from ...reading.documents import read_names_by_image
from .files import list_lines, plain_name
from .npy import read_label_dictionary

_FORMATS = 'JSON {"image": ["class", ...]}, lines of image id and 0-based class ids, or a cls_labels.npy'


def read_image_labels(path: Path, classes: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Read which classes are in each of the named images.

    Args:
        path: ``.json`` in the format of ``wsss label --labels``; ``.npy``, a dict of image ids to (C,) zeros and ones, read
            without executing its pickle; otherwise text, ``COCO_train2014_000000000009 45 49 50``.
        classes: the C names without background. names: the B names of the label maps.

    Returns:
        (B, C) bool.

    Raises:
        WsssError: unreadable, other classes, or images without an entry.
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
        key = next((alias for alias in _aliases(name) if alias in table), None)
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
                f"--labels {path}: vectors of {len(vector)} classes, --classes has {classes}",
                hint="use the same dataset for both",
            )
        name = key
        if isinstance(key, int):  # IRNet writes 2007_000032 as 2007000032; COCO's file names have ids of 12 digits
            name = f"{key // 1_000_000}_{key % 1_000_000:06}" if key >= 1_000_000_000 else f"{key:012}"
        table[str(name)] = np.flatnonzero(vector > 0).tolist()
    return table


def _from_lines(path: Path, classes: int) -> dict[str, list[int]]:
    table: dict[str, list[int]] = {}
    for number, line in list_lines(path, "--labels"):
        image, *ids = line.split()
        if not all(text.isdecimal() and int(text) < classes for text in ids):
            raise WsssError(
                f"--labels {path}: line {number}: expected an image id and class ids 0 to {classes - 1}, got {line[:60]!r}",
                hint=_FORMATS,
            )
        table[plain_name(image)] = list(map(int, ids))
    if not any(table.values()):
        raise WsssError(f"--labels {path}: a list of images without classes", hint=_FORMATS)
    return table


def _from_json(path: Path, classes: Sequence[str]) -> dict[str, list[int]]:
    labels_by_image = read_names_by_image(path, f"--labels {path}", hint=_FORMATS)
    known = Names(classes)
    table: dict[str, list[int]] = {}
    for name, labels in labels_by_image.items():
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
    """Possible names of an image in the file: its path, its file name, or COCO's number."""
    plain = PurePosixPath(name).name
    return name, plain, plain.rpartition("_")[2]
