"""Fuses masks into one label map per image. The arithmetic is a graph (`export/sam/fuse.py`); this module prepares its inputs.

A pixel goes to the mask with the largest value, box score x predicted IoU x sigmoid(logit), whatever the order of the masks or
the class ids; `mask_scores` is the part of it that belongs to a whole mask. Where the value of another class is within ``margin``
of the winner's, the pixel is void (255). An image without masks is background everywhere, with certainty.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np

from ..batch import Boxes, Images, Labels, Masks, PseudoLabels, Tensor
from ..engines.engine import Engine, Resident, uploaded
from ..engines.tensors import Gathered
from ..frame import upsample_matrix
from ..spec import Model
from .segment import lacks

TILE_BYTES = 64 << 20
"""Most bytes of upsampled logits in one call. Larger photographs are fused in tiles, with the same result."""
MATRICES = 32
"""Most upsampling matrices that stay on the device, one for each length of a photograph's side: 0.5 MB for 500 pixels."""


class Fuser:
    """Fuses masks with the fusion engine.

    Args:
        model: the bundle's ``sam``.
        engine: its ``fuse`` graph.
        margin: share of the winner's value; a pixel is void where another class comes closer than that. 0: no void.
        quality_exponent: exponent of the predicted IoU in a mask's value. 0: it does not count.
        stability_exponent: the same of its stability score.
        confidence: make the confidence of every pixel too (`wsss.export.sam.fuse.vote`).
        keep_masks: copy the logits of the masks to the host too, 256 KB a box, for `PseudoLabels.masks`.

    Raises:
        BundleError: ``confidence`` is asked of a graph that was exported without it.
    """

    def __init__(
        self,
        model: Model,
        engine: Engine,
        *,
        margin: float = 0.1,
        quality_exponent: float = 1.0,
        stability_exponent: float = 0.0,
        confidence: bool = False,
        keep_masks: bool = False,
    ) -> None:
        if confidence and "confidence" not in engine.outputs:
            raise lacks("--confidence", "the confidence of pixels", model)
        self._engine = engine
        self._side = int(model.manifest.settings["logits_side"])
        self.margin, self.keep_masks = margin, keep_masks
        self._exponents, self._confidence = (quality_exponent, stability_exponent), confidence
        self._matrix = lru_cache(maxsize=MATRICES)(partial(_uploaded_matrix, engine))

    def __call__(self, images: Images, labels: Labels, boxes: Boxes, masks: Masks) -> PseudoLabels:
        """Label maps at the photographs' size, and how many pixels each mask covers and wins.

        Of more masks than one call of the engine takes, an image keeps the best, by score x predicted IoU. The calls of all
        images are queued before the first result is read.
        """
        area, won = np.zeros(len(boxes), np.int64), np.zeros(len(boxes), np.int64)
        maps = [np.zeros(photo.shape, np.uint8) for photo in images]
        sure = [np.full(photo.shape, 255, np.uint8) for photo in images] if self._confidence else None
        stability = masks.stability if self._exponents[1] else None
        score = mask_scores(boxes.score, masks.quality, self._exponents[0], stability, self._exponents[1])
        chosen = [self._best(score, np.flatnonzero(boxes.image == number)) for number in range(len(images))]
        fused, places = Gathered(), []
        for number, tile, out in self._fused(chosen, score, boxes, masks):
            places.append((number, tile))
            for name in ("label_map", "area", "won", *(["confidence"] if self._confidence else [])):
                fused.add(out[name])
        logits = masks.logits if self.keep_masks else []
        for part in logits:
            fused.add(part)
        arrays = iter(fused.arrays())
        for number, tile in places:
            maps[number][tile] = next(arrays)
            area[chosen[number]] += next(arrays)
            won[chosen[number]] += next(arrays)
            if sure is not None:
                sure[number][tile] = next(arrays)
        kept = replace(masks, logits=list(arrays)) if self.keep_masks else None
        names = [photo.name for photo in images]
        return PseudoLabels(names, maps, labels, boxes, masks.quality, area, won, sure, kept, stability)

    def _best(self, score: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return rows[np.sort(np.argsort(-score[rows], kind="stable")[: self._engine.axes["picked"].max])]

    def _fused(
        self, chosen: list[np.ndarray], score: np.ndarray, boxes: Boxes, masks: Masks
    ) -> Iterator[tuple[int, tuple[slice, slice], dict[str, Tensor]]]:
        """The results of all calls: number of the image, place in it, outputs."""
        numbers = [number for number, rows in enumerate(chosen) if len(rows) and masks.frames[number] is not None]
        if not numbers:
            return
        found = [self._logits_of(masks, chosen[number]) for number in numbers]
        together = np.concatenate([chosen[number] for number in numbers])
        pick = uploaded(self._engine, np.concatenate([pick for _, pick in found]))
        scores, labels = uploaded(self._engine, score[together]), uploaded(self._engine, boxes.label[together])
        margin = uploaded(self._engine, np.array([self.margin], np.float32))
        start = 0
        for number, (logits, _) in zip(numbers, found, strict=True):
            frame, count = masks.frames[number], len(chosen[number])
            assert frame is not None
            rows, start = slice(start, start + count), start + count
            feeds = {"logits": logits, "pick": pick[rows], "score": scores[rows], "label": labels[rows], "margin": margin}
            down, across = (self._matrix(*lengths) for lengths in frame.mask_lengths(self._side))
            for tile in self._tiles(frame.image, count):
                yield number, tile, self._engine({**feeds, "rows": down[tile[0]], "columns": across[tile[1]]})

    def _tiles(self, size: tuple[int, int], masks: int) -> Iterator[tuple[slice, slice]]:
        axes = self._engine.axes
        width = min(size[1], axes["width"].max)
        height = min(max(1, TILE_BYTES // (4 * width * masks)), axes["height"].max)
        for top in range(0, size[0], height):
            for left in range(0, size[1], width):
                yield slice(top, top + height), slice(left, left + width)

    def _logits_of(self, masks: Masks, rows: np.ndarray) -> tuple[Tensor, np.ndarray]:
        parts = np.unique(masks.part[rows])
        if len(parts) == 1:
            return masks.logits[parts[0]], masks.row[rows]
        # An image has more boxes than a decoder call takes: the only case in which logits are copied to the host.
        on_host = {part: np.asarray(masks.logits[part]) for part in parts}
        gathered = [on_host[part][row] for part, row in zip(masks.part[rows], masks.row[rows], strict=True)]
        return uploaded(self._engine, np.stack(gathered)), np.arange(len(rows))


def mask_scores(
    score: np.ndarray,
    quality: np.ndarray,
    exponent: float,
    stability: np.ndarray | None = None,
    stability_exponent: float = 0.0,
) -> np.ndarray:
    """(N,) float32, what the masks' probabilities are multiplied by: box score x predicted IoU ** exponent, and the same of the
    stability score if it is given.

    Args:
        score, quality, stability: (N,) float32; SAM's predicted IoU may be outside of 0..1.
    """
    value = score * np.clip(quality, 1e-3, 1) ** exponent
    if stability is not None:
        value = value * np.clip(stability, 1e-3, 1) ** stability_exponent
    return value.astype(np.float32)


def _uploaded_matrix(engine: Engine, side: int, canvas: int, valid: int, image: int) -> np.ndarray | Resident:
    return uploaded(engine, upsample_matrix(side, canvas, valid, image))
