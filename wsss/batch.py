"""Batch types of the labeling chain: photographs, labels, boxes, masks and pseudo-labels, in flat arrays."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .frame import Frame

VOID = 255
"""Label of a pixel that is ignored in training and evaluation."""
MAX_BOXES = 256
"""Largest number of boxes per image: the limit of the fusion graph. The weakest detections beyond it are dropped."""


class DeviceTensor(Protocol):
    """A tensor on an engine's device; ``np.asarray`` copies it to the host."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[np.generic]: ...
    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[np.generic]: ...


Tensor = np.ndarray | DeviceTensor
"""An input or output of an engine. Outputs can be passed on to other engines; only ``np.asarray`` copies to the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Photograph:
    """A decoded image.

    pixels: (H, W, 3) uint8, RGB, EXIF rotation applied.
    """

    name: str
    """Path relative to the run's folder, with forward slashes; identifies the image everywhere."""
    pixels: np.ndarray
    size_bytes: int = 0
    mtime_ns: int = 0
    etag: str = ""
    sha256: str = ""
    """Of the image file."""
    warning: str = ""
    """A problem of the pixels, for example an almost blank image; empty if there is none."""
    orientation: int = 1
    """EXIF orientation that was applied: 1 (none) to 8; from 5 on, height and width are swapped in the stored image."""
    ahead: dict[str, tuple[Future[None], np.ndarray]] = field(default_factory=dict)
    """Inputs that are prepared in advance, by the stage's name: a future and the array it fills. Stages prepare missing ones."""

    on_device: dict[str, Tensor] = field(default_factory=dict)
    """Copies of its pixels on the engines' device, where stages make their inputs there (`wsss.runtime.resize`)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def raw_shape(self) -> tuple[int, int]:
        """(height, width) in pixels as stored, before EXIF rotation."""
        height, width = self.shape
        return (width, height) if self.orientation >= 5 else (height, width)


Images = Sequence[Photograph]


@dataclass(slots=True)
class Labels:
    """Which classes are in each image of a batch.

    score: (B, C) float32 in [0, 1]; column c is class c + 1 of the run's list.
    present: (B, C) bool.
    """

    score: np.ndarray
    present: np.ndarray


@dataclass(slots=True)
class Boxes:
    """Detections of a whole batch, flat: row i lies in image ``image[i]``. May be empty.

    xyxy_image: (N, 4) float32, pixels of the original photograph, x0 < x1 and y0 < y1.
    score: (N,) float32 in [0, 1].
    label: (N,) int64, 1-based index into the run's class list; 0 is background and never appears.
    image: (N,) int64, ascending, 0 <= image[i] < B.
    """

    xyxy_image: np.ndarray
    score: np.ndarray
    label: np.ndarray
    image: np.ndarray

    def __len__(self) -> int:
        return len(self.score)

    def keep(self, rows: np.ndarray) -> Boxes:
        """Select rows by an index or a mask, in order."""
        return Boxes(self.xyxy_image[rows], self.score[rows], self.label[rows], self.image[rows])

    @staticmethod
    def none() -> Boxes:
        """Zero boxes."""
        return Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), np.zeros(0, np.int64))

    @staticmethod
    def join(parts: Sequence[Boxes]) -> Boxes:
        """Concatenate parts, sorted by image; within an image, in the given order."""
        if not parts:
            return Boxes.none()
        fields = ("xyxy_image", "score", "label", "image")
        joined = Boxes(*(np.concatenate([getattr(part, field) for part in parts]) for field in fields))
        return joined.keep(np.argsort(joined.image, kind="stable"))


@dataclass(slots=True)
class Masks:
    """One mask per box, as low-resolution logits on the engine's device.

    logits: decoder outputs, each (n, L, L) float32, 0 is the edge.
    part, row: (N,) int64; box i's mask is ``logits[part[i]][row[i]]``.
    quality: (N,) float32, the IoU that the decoder predicts (SAM, arXiv:2304.02643, appendix A).
    frames: one per image of the batch, None for an image without boxes.
    stability: (N,) float32 in [0, 1], each mask's stability score; None of a decoder that does not give it.
    """

    logits: list[Tensor]
    part: np.ndarray
    row: np.ndarray
    quality: np.ndarray
    frames: list[Frame | None]
    stability: np.ndarray | None = None


@dataclass(slots=True)
class PseudoLabels:
    """The chain's result for a batch.

    label_maps: one (H, W) uint8 per image, original size: 0 background, 1..C classes, 255 void.
    labels, boxes: the image labels and boxes they were made from.
    quality: (N,) float32 per box, the mask's predicted IoU.
    area: (N,) int64 per box, pixels of its mask; won: those that have its label in the label map.
    confidence: one (H, W) uint8 per image, 255 is certain; None if the chain has no such maps.
    masks: the masks of the boxes before they were fused, with logits on the host; None if they are not kept.
    stability: (N,) float32 per box, the mask's stability score; None where it does not count.
    """

    names: list[str]
    label_maps: list[np.ndarray]
    labels: Labels
    boxes: Boxes
    quality: np.ndarray
    area: np.ndarray
    won: np.ndarray
    confidence: list[np.ndarray] | None = None
    masks: Masks | None = None
    stability: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.label_maps)
