"""What all contenders are given: photographs, boxes, classes and a caption; and what a contender is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...batch import Boxes, Images, Photograph
from ...classes import parse_classes
from ...errors import ImageError
from ...frame import frame_for, resized
from ...photographs import read_photograph
from ...runtime.run.listing import Folder
from ...runtime.text import open_tokenizer, tokenize_phrases
from ...spec import Bundle, Model, Preprocess
from ..throughput import drawn_boxes

STAGES = ("tag", "detect", "segment", "fuse")


@dataclass(frozen=True, kw_only=True)
class Job:
    """The same for every contender."""

    bundles: dict[str, str]
    """Folder of the exported models by their precision; ``fp32`` also says which weights the peers load."""
    photographs: tuple[str, ...]
    """Files that fit the canvas, see `fitting`."""
    classes: str
    """As ``--classes``. All of them are in every caption."""
    boxes: int
    """Number of boxes of each photograph, see `boxes_of`."""
    batch: int
    """Photographs in a call of our engines. Peers take one at a time."""

    def read(self, numbers: Sequence[int]) -> list[Photograph]:
        """Decoded photographs by number; the numbers start again at the end of the list."""
        paths = [Path(self.photographs[number % len(self.photographs)]) for number in numbers]
        return [read_photograph(path.parent, path.name) for path in paths]

    def model(self, name: str, precision: str = "fp32") -> Model:
        """An exported model."""
        return Bundle(Path(self.bundles[precision])).model(name)


class Contender(Protocol):
    """A chain with loaded models. Its stages are timed; `embeddings`, `scores` and `label_maps` are not."""

    batch: int
    """Photographs that its stages take in one call."""
    about: dict[str, Any]
    """Its versions and settings, for the result file."""

    def tag(self, photos: Images) -> object:
        """Score all classes in all views."""
        ...

    def detect(self, photos: Images, wanted: np.ndarray) -> object:
        """Find boxes of all classes in the photographs that are ``wanted``, (B,) bool."""
        ...

    def segment(self, photos: Images, boxes: Boxes) -> object:
        """A mask of each box."""
        ...

    def fuse(self, photos: Images, boxes: Boxes, masks: Any) -> list[np.ndarray]:
        """Label maps, (H, W) uint8 each."""
        ...

    def embeddings(self, tagged: Any) -> np.ndarray:
        """(B, V, D) float32: of each view, with unit length."""
        ...

    def scores(self, detected: Any) -> np.ndarray:
        """(B, C) float32: the best score of each class."""
        ...


@dataclass(frozen=True)
class Caption:
    """All classes in one caption: its tokens, and for each phrase the class (from 1), first token and end."""

    tokens: list[int]
    spans: list[tuple[int, int, int]]

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """Scores of each query for each class, (Q, C) float64, from logits (Q, T), as `runtime.detect` defines them."""
        probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
        count = max(label for label, _, _ in self.spans)
        score = np.zeros((len(logits), count))
        for label, start, stop in self.spans:
            score[:, label - 1] = np.maximum(score[:, label - 1], probability[:, start:stop].mean(axis=1))
        return score


def caption_of(dino: Model, classes: str) -> Caption:
    """The caption of all classes, with the exported tokenizer."""
    settings = dino.manifest.settings
    most = int(settings["max_tokens"])
    tokens, spans = [int(settings["cls"])], []
    for label, phrases in enumerate(tokenize_phrases(open_tokenizer(dino), parse_classes(classes), most - 3)[0], 1):
        for phrase in phrases:
            spans.append((label, len(tokens), len(tokens) + len(phrase)))
            tokens += [*phrase, int(settings["dot"])]
    tokens.append(int(settings["sep"]))
    assert len(tokens) <= most, "the classes need more than one caption; peers compute only one"
    return Caption(tokens, spans)


def boxes_of(photos: Images, count: int, classes: int, wanted: np.ndarray) -> Boxes:
    """The same boxes for every contender: ``count`` random ones in each photograph that is wanted."""
    numbers = np.flatnonzero(wanted)
    return Boxes.join([drawn_boxes(number, *photos[number].shape, count, classes) for number in numbers.tolist()])


def official_resize(dino: Model) -> Preprocess:
    """How peers resize: the official limits, which a bundle with smaller canvases lowers."""
    from ...export.grounding_dino.family import FULL, MINI

    limits = MINI if dino.manifest.variant == "mini" else FULL
    return replace(dino.manifest.preprocess, short_px=limits.short_px, longest_px=limits.longest_px)


def fitting(folder: Path, count: int, dino: Model) -> tuple[list[str], int]:
    """The first photographs that the detector sees as large as its peers do, on one canvas; and how many were left out.

    Raises:
        ImageError: there are none.
    """
    preprocess, official = dino.manifest.preprocess, official_resize(dino)
    found: list[str] = []
    canvas: tuple[int, int] | None = None
    left_out = 0
    for each in Folder(folder):
        shape = read_photograph(folder, each.name).shape
        frame = frame_for(preprocess, *shape)
        if frame.valid == resized(official, *shape) and canvas in (None, frame.canvas):
            canvas = frame.canvas
            found.append(str(folder / each.name))
        else:
            left_out += 1
        if len(found) == count:
            break
    if not found:
        raise ImageError(f"{folder}: no photograph that fits the canvases of {dino.folder}", hint="landscape ones, 4 : 3")
    return found, left_out
