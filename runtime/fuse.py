"""Fuses masks into one label map per image. The arithmetic is a graph (`export/fuse.py`); this module prepares its inputs.

A pixel goes to the mask with the largest value, box score x predicted IoU x sigmoid(logit), whatever the order of the masks or
the class ids. Where the value of another class is within ``margin`` of the winner's, the pixel is void (255). An image without
masks is background everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..batch import Boxes, Images, Labels, Masks, PseudoLabels, Tensor
from ..engines.engine import Engine
from ..frame import Frame
from ..spec import Model

TILE_BYTES = 64 << 20
"""Most bytes of upsampled logits in one call. Larger photographs are fused in tiles, with the same result."""


class Fuser:
    """Fuses masks with the fusion engine.

    Args:
        model: the bundle's ``sam``.
        engine: its ``fuse`` graph.
        margin: share of the winner's value; a pixel is void where another class comes closer than that. 0: no void.
    """

    def __init__(self, model: Model, engine: Engine, *, margin: float = 0.1) -> None:
        self._engine = engine
        self._side = int(model.manifest.settings["logits_side"])
        self.margin = margin

    def __call__(self, images: Images, labels: Labels, boxes: Boxes, masks: Masks) -> PseudoLabels:
        """Label maps at the photographs' size, and how many pixels each mask covers and wins.

        Of more masks than one call of the engine takes, an image keeps the best, by score x predicted IoU.
        """
        area, won = np.zeros(len(boxes), np.int64), np.zeros(len(boxes), np.int64)
        maps = []
        for number, photo in enumerate(images):
            rows, frame = np.flatnonzero(boxes.image == number), masks.frames[number]
            if len(rows) == 0 or frame is None:
                maps.append(np.zeros(photo.shape, np.uint8))
                continue
            label_map, area[rows], won[rows] = self._fuse(frame, rows, boxes, masks)
            maps.append(label_map)
        return PseudoLabels([photo.name for photo in images], maps, labels, boxes, masks.quality, area, won)

    def _fuse(self, frame: Frame, rows: np.ndarray, boxes: Boxes, masks: Masks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        score = (boxes.score[rows] * np.clip(masks.quality[rows], 1e-3, 1)).astype(np.float32)
        best = np.sort(np.argsort(-score, kind="stable")[: self._engine.axes["picked"].max])
        logits, pick = _logits_of(masks, rows[best])
        feeds: dict[str, Tensor] = {
            "logits": logits,
            "pick": pick,
            "score": score[best],
            "label": boxes.label[rows[best]],
            "margin": np.array([self.margin], np.float32),
        }
        down, across = frame.mask_rows(self._side), frame.mask_columns(self._side)
        label_map = np.empty(frame.image, np.uint8)
        area, won = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        for tile in self._tiles(frame.image, len(best)):
            out = self._engine({**feeds, "rows": down[tile[0]], "columns": across[tile[1]]})
            label_map[tile] = np.asarray(out["label_map"])
            area[best] += np.asarray(out["area"])
            won[best] += np.asarray(out["won"])
        return label_map, area, won

    def _tiles(self, size: tuple[int, int], masks: int) -> Iterator[tuple[slice, slice]]:
        axes = self._engine.axes
        width = min(size[1], axes["width"].max)
        height = min(max(1, TILE_BYTES // (4 * width * masks)), axes["height"].max)
        for top in range(0, size[0], height):
            for left in range(0, size[1], width):
                yield slice(top, top + height), slice(left, left + width)


def _logits_of(masks: Masks, rows: np.ndarray) -> tuple[Tensor, np.ndarray]:
    parts = np.unique(masks.part[rows])
    if len(parts) == 1:
        return masks.logits[parts[0]], masks.row[rows]
    # An image has more boxes than a decoder call takes: the only case in which logits are copied to the host.
    on_host = {part: np.asarray(masks.logits[part]) for part in parts}
    gathered = [on_host[part][row] for part, row in zip(masks.part[rows], masks.row[rows], strict=True)]
    return np.stack(gathered), np.arange(len(rows))
