"""Stages replaced by what the user already knows: class names per image (``--labels``), boxes per image (``--boxes``)."""

from __future__ import annotations

import hashlib
import json
import math
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ..batch import MOST_BOXES, Boxes, Images, Labels
from ..classes import ClassList
from ..errors import WsssError


class GivenLabels:
    """Tags from a file instead of CLIP; every score is 1.

    Args:
        path: JSON, image name to a list of class names: ``{"a/dog.jpg": ["dog"]}``.
    """

    def __init__(self, path: Path, classes: ClassList) -> None:
        told = _read_json(path, "--labels")
        if not isinstance(told, dict) or not all(isinstance(v, list) for v in told.values()):
            raise WsssError(
                f"--labels {path}: expected a JSON object of image names to lists of class names", hint='{"a/dog.jpg": ["dog"]}'
            )
        self._path = path
        self._present = {
            name: [_label(classes, str(each), f"--labels {path}: {name}") for each in each_list]
            for name, each_list in told.items()
        }
        self._classes = len(classes.names)

    def missing(self, name: str) -> str | None:
        """Why this image cannot be labelled, or None."""
        return None if name in self._present else f"{name}: has no entry in {self._path}"

    def __call__(self, images: Images) -> Labels:
        score = np.zeros((len(images), self._classes), np.float32)
        for row, photo in enumerate(images):
            score[row, [label - 1 for label in self._present[photo.name]]] = 1
        return Labels(score, score > 0)


class GivenBoxes:
    """Boxes from files instead of Grounding-DINO; what the tags say does not matter to them.

    Args:
        path: a folder of PASCAL VOC XML files named as the images, or a JSON file: image name to a list of
            ``{"label": "dog", "xyxy": [x0, y0, x1, y1], "score": 0.9}`` in pixels, or a store's ``manifest.jsonl``.
    """

    def __init__(self, path: Path, classes: ClassList) -> None:
        self._path, self._classes = path, classes
        self._told: Mapping[str, list[dict[str, Any]]] | None = None
        if path.is_file():
            self._told = _boxes_file(path)
        elif not path.is_dir():
            raise WsssError(
                f"--boxes {path}: no such file or folder", hint="a folder of VOC XML files, a JSON file, or a manifest.jsonl"
            )

    def missing(self, name: str) -> str | None:
        """Why this image cannot be labelled, or None."""
        try:
            self._of(name)
        except WsssError as error:
            return f"{name}: {error.message}"
        return None

    def __call__(self, images: Images, labels: Labels) -> Boxes:
        parts = [Boxes.none()]
        for row, photo in enumerate(images):
            told = self._of(photo.name)
            if not told:
                continue
            height, width = photo.shape
            xyxy = np.array([each["xyxy"] for each in told], np.float32).clip(0, [width, height, width, height])
            solid = (xyxy[:, 2] > xyxy[:, 0]) & (xyxy[:, 3] > xyxy[:, 1])
            found = Boxes(
                xyxy,
                np.array([each.get("score", 1.0) for each in told], np.float32),
                np.array([_label(self._classes, each["label"], f"--boxes: {photo.name}") for each in told], np.int64),
                np.full(len(told), row, np.int64),
            )
            parts.append(found.keep(solid))
        return Boxes.join(parts)

    def _of(self, name: str) -> list[dict[str, Any]]:
        if self._told is None:
            path = self._path / PurePosixPath(name).with_suffix(".xml")
            flat = self._path / (PurePosixPath(name).stem + ".xml")
            boxes = read_voc_xml(path if path.is_file() else flat)
        elif name in self._told:
            boxes = self._told[name]
        else:
            raise WsssError(f"has no entry in {self._path}")
        if len(boxes) > MOST_BOXES:
            raise WsssError(f"has {len(boxes)} boxes in {self._path}, an image may have {MOST_BOXES}")
        for each in boxes:
            check_box(each, f"{self._path}: {name}")
            _label(self._classes, each["label"], f"{self._path}: {name}")
        return boxes


def given_hash(path: Path) -> str:
    """SHA-256 of what ``--labels`` or ``--boxes`` names: a file, or the XML files of a folder with their names.

    Raises:
        WsssError: it cannot be read.
    """
    total = hashlib.sha256()
    try:
        for each in sorted(path.rglob("*.xml")) if path.is_dir() else [path]:
            name = os.fsencode(each.relative_to(path)) if path.is_dir() else b""
            total.update(b"%d %s%d " % (len(name), name, each.stat().st_size) + each.read_bytes())
    except OSError as error:
        raise WsssError(f"{path}: cannot be read: {error.strerror}") from None
    return total.hexdigest()


def read_voc_xml(path: Path) -> list[dict[str, Any]]:
    """Boxes of a PASCAL VOC annotation: 1-based inclusive corners become 0-based, the far ones exclusive."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WsssError(
            f"{path}: cannot be read: {error.strerror}", hint="--boxes wants one XML file an image, of its name"
        ) from None
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise WsssError(f"{path}: declares entities, which a VOC annotation never does")
    try:
        boxes = []
        for thing in ElementTree.fromstring(data).iter("object"):
            corners = [float(thing.findtext(f"bndbox/{side}") or "missing") for side in ("xmin", "ymin", "xmax", "ymax")]
            boxes.append(
                {"label": (thing.findtext("name") or "").strip(), "xyxy": [corners[0] - 1, corners[1] - 1, *corners[2:]]}
            )
    except (ElementTree.ParseError, ValueError) as error:
        raise WsssError(f"{path}: not a VOC annotation: {error}") from None
    return boxes


def check_box(box: object, where: str) -> None:
    """Raises WsssError unless ``box`` is ``{"label": str, "xyxy": four finite numbers, "score": 0..1 or absent}``."""
    good = (
        isinstance(box, dict)
        and isinstance(box.get("label"), str)
        and isinstance(box.get("xyxy"), list)
        and len(box["xyxy"]) == 4
    )
    numbers = [*box["xyxy"], box.get("score", 1.0)] if good and isinstance(box, dict) else [None]
    if not all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in numbers):
        raise WsssError(
            f"{where}: expected a box, got {box!r}", hint='{"label": "dog", "xyxy": [48, 240, 195, 371], "score": 0.9}'
        )
    if not 0 <= float(numbers[-1] or 0) <= 1:
        raise WsssError(f"{where}: expected a score in 0..1, got {numbers[-1]}")


def _boxes_file(path: Path) -> dict[str, list[dict[str, Any]]]:
    if path.suffix != ".jsonl":
        told = _read_json(path, "--boxes")
    else:
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            told = {line["path"]: line["boxes"] for line in lines if "boxes" in line}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WsssError(f"--boxes {path}: not the manifest of a label store: {error}") from None
    if not isinstance(told, dict) or not all(isinstance(value, list) for value in told.values()):
        raise WsssError(f"--boxes {path}: expected a JSON object of image names to lists of boxes")
    return told


def _read_json(path: Path, flag: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WsssError(f"{flag} {path}: expected a JSON file: {error}") from None


def _label(classes: ClassList, name: str, where: str) -> int:
    if name not in classes.names:
        raise WsssError(
            f"{where}: the class {name!r} is not in this run's list: {', '.join(classes.names)}", hint="check --classes"
        )
    return classes.names.index(name) + 1
