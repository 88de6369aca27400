"""What `Labeler` gives back: plain dataclasses of numpy arrays, and their way to other libraries.

supervision and matplotlib are imported only by the methods that need them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from ..batch import VOID, PseudoLabels
from ..classes import palette
from ..errors import WsssError
from ..files import write_atomically
from ..rle import MaskRuns
from ..store.format import is_label
from ..store.local import label_file
from .masks.runs import masks_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from supervision import Detections as SupervisionDetections

_SHOWN_PX = 800
"""Longer side of the picture that a notebook shows."""


@dataclass(frozen=True, kw_only=True)
class Detections:
    """Boxes of one image; may be empty.

    boxes: (N, 4) float32, x0, y0, x1, y1 in pixels of the photograph, x0 < x1 and y0 < y1.
    scores: (N,) float32 in [0, 1]. labels: (N,) int64, the value of each box's class in a label map, 1..C.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    """The run's classes: label 1 is ``names[0]``."""

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def classes(self) -> list[str]:
        """The name of each box's class."""
        return [self.names[label - 1] for label in self.labels]

    def to_supervision(self) -> SupervisionDetections:
        """As ``supervision.Detections``; ``class_id`` counts from 0. Raises WsssError: supervision is not installed."""
        return _to_supervision(self, None)


@dataclass(frozen=True, kw_only=True, repr=False)
class Result(Detections):
    """One labeled image. A notebook shows it as a picture.

    label_map: (H, W) uint8, the photograph's size: 0 background, 1..C ``names``, 255 void.
    quality: (N,) float32, the IoU that SAM predicts for each mask.
    confidence: (H, W) uint8, 255 is certain and void is 0; None if the labeler was opened without.
    pixels: (H, W, 3) uint8 RGB, the photograph, EXIF rotation applied.
    """

    name: str
    """The file's name, or the image's number in the list."""
    label_map: np.ndarray
    quality: np.ndarray
    tags: dict[str, float]
    """The classes that the image contains, with their scores in 0..1, best first."""
    pixels: np.ndarray
    runs: tuple[MaskRuns, ...] | None
    """SAM's mask of each box as runs, which take little memory; None with ``masks=False``."""
    confidence: np.ndarray | None = None

    @cached_property
    def masks(self) -> np.ndarray:
        """(N, H, W) bool: SAM's mask of each box, before the masks competed for pixels. Decoded when it is first asked for.

        Raises:
            WsssError: the labeler was opened with ``masks=False``.
        """
        if self.runs is None:
            raise WsssError(
                f"{self.name}: masks: not kept, because the labeler was opened with masks=False", hint="leave masks out"
            )
        return np.array([mask.mask() for mask in self.runs], bool).reshape(-1, *self.label_map.shape)

    def __repr__(self) -> str:
        height, width = self.label_map.shape
        found = ", ".join(f"{name} {score:.2f}" for name, score in zip(self.classes, self.scores, strict=True))
        return f"<Result {self.name}: {width} x {height}, {found or 'nothing found'}>"

    def to_supervision(self) -> SupervisionDetections:
        """As ``supervision.Detections`` with the masks; ``class_id`` counts from 0.

        Raises:
            WsssError: supervision is not installed.
        """
        return _to_supervision(self, None if self.runs is None else self.masks)

    def picture(self) -> Image.Image:
        """The photograph with its label map over it, half transparent, and the boxes, as a PIL image."""
        colors = palette()[self.label_map]
        shown = np.where((self.label_map == 0)[..., None], self.pixels, (self.pixels // 2 + colors // 2).astype(np.uint8))
        image = Image.fromarray(shown)
        draw = ImageDraw.Draw(image)
        width = max(1, max(image.size) // 300)
        for corners, label, name, score in zip(self.boxes.tolist(), self.labels, self.classes, self.scores, strict=True):
            color = tuple(palette()[label].tolist())
            draw.rectangle(corners, outline=color, width=width)
            draw.text((corners[0] + 2 * width, corners[1] + 2 * width), f"{name} {score:.2f}".encode("ascii", "replace"), "white")
        return image

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the photograph, its label map and boxes with matplotlib, and name the classes.

        Args:
            ax: where to draw; None makes a figure.

        Raises:
            WsssError: matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot
            from matplotlib.patches import Patch
        except ModuleNotFoundError:
            raise WsssError("plot() needs matplotlib, which is not installed", hint="pip install matplotlib") from None
        if ax is None:
            _, ax = pyplot.subplots()
        ax.imshow(np.asarray(self.picture()))
        ax.set_axis_off()
        ax.set_title(self.name)
        values = [int(value) for value in np.unique(self.label_map) if value]
        names = {VOID: "void", **dict(enumerate(self.names, 1))}
        if values:
            patches = [Patch(color=tuple(palette()[value] / 255), label=names[value]) for value in values]
            ax.legend(handles=patches, loc="upper right", fontsize="small")
        return ax

    def save(self, folder: str | Path) -> Path:
        """Write ``NAME.png``, the label map as in a label store, and ``NAME.json``, boxes, scores and masks (COCO's RLE).

        Files of these names are replaced. Sub-folders of the image's name are made.

        Returns:
            The path of the label map.

        Raises:
            WsssError: the folder cannot be written.
        """
        height, width = self.label_map.shape
        counts = None if self.runs is None else [mask.counts() for mask in self.runs]
        objects = [
            {
                "label": name,
                "score": round(float(score), 4),
                "quality": round(float(quality), 4),
                "xyxy": [round(float(edge), 2) for edge in corners],
                **({} if counts is None else {"segmentation": {"size": [height, width], "counts": counts[number]}}),
            }
            for number, (name, score, quality, corners) in enumerate(
                zip(self.classes, self.scores, self.quality, self.boxes, strict=True)
            )
        ]
        document = {"image": self.name, "height": height, "width": width, "tags": self.tags, "objects": objects}
        name = PurePosixPath(self.name).with_suffix(".png").as_posix()
        if not is_label(name):
            raise WsssError(f"{self.name}: leads out of {folder}")
        path = Path(folder) / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, bytes(label_file(path.name, self.label_map, counts)))
            text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
            write_atomically(path.with_suffix(".json"), text.encode("utf-8", "surrogatepass"))
        except OSError as error:
            raise WsssError(f"folder {folder}: cannot be written: {error.strerror or error}") from None
        return path

    def _repr_png_(self) -> bytes:
        picture = self.picture()
        picture.thumbnail((_SHOWN_PX, _SHOWN_PX))
        file = io.BytesIO()
        picture.save(file, "PNG")
        return file.getvalue()


def results_of(batch: PseudoLabels, pixels: Sequence[np.ndarray], names: tuple[str, ...]) -> list[Result]:
    """One result for each image of a batch.

    Args:
        pixels: of each image, (H, W, 3) uint8. names: the run's classes.
    """
    results = []
    for row, name in enumerate(batch.names):
        mine = np.flatnonzero(batch.boxes.image == row)
        score = batch.labels.score[row]
        present = sorted(np.flatnonzero(batch.labels.present[row]).tolist(), key=lambda label: -score[label])
        results.append(
            Result(
                name=name,
                names=names,
                label_map=batch.label_maps[row],
                boxes=batch.boxes.xyxy_image[mine],
                scores=batch.boxes.score[mine],
                labels=batch.boxes.label[mine],
                quality=batch.quality[mine],
                tags={names[label]: round(float(score[label]), 4) for label in present},
                pixels=pixels[row],
                confidence=None if batch.confidence is None else batch.confidence[row],
                runs=tuple(masks_of(batch.masks, batch.boxes, row)) if batch.masks is not None else None if len(mine) else (),
            )
        )
    return results


def _to_supervision(found: Detections, masks: np.ndarray | None) -> SupervisionDetections:
    try:
        import supervision
    except ModuleNotFoundError:
        raise WsssError("to_supervision() needs supervision, which is not installed", hint="pip install supervision") from None
    return supervision.Detections(
        xyxy=found.boxes.reshape(-1, 4),
        mask=masks,
        confidence=found.scores,
        class_id=found.labels - 1,
        data={"class_name": np.array(found.classes, str)},
    )
