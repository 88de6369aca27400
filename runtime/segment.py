"""The outline of each box: SAM. Boxes of different images share a decoder call; embeddings stay on the device."""

from __future__ import annotations

import numpy as np

from ..batch import Boxes, Images, Masks, Tensor
from ..engines.engine import Engine
from ..frame import Frame, frame_for
from ..spec import Model
from .images import on_canvas


class Outliner:
    """SAM's encoder and decoder engines.

    Args:
        model: the bundle's ``sam``.
        encoder, decoder: its engines.
    """

    def __init__(self, model: Model, encoder: Engine, decoder: Engine) -> None:
        self._preprocess = model.manifest.preprocess
        self._encoder, self._decoder = encoder, decoder

    def __call__(self, images: Images, boxes: Boxes) -> Masks:
        """One mask per box; an image without a box is not encoded."""
        wanted = np.unique(boxes.image)
        frames: list[Frame | None] = [None] * len(images)
        for number in wanted:
            frames[number] = frame_for(self._preprocess, *images[number].shape)
        masks = Masks(
            [], np.zeros(len(boxes), np.int64), np.zeros(len(boxes), np.int64), np.zeros(len(boxes), np.float32), frames
        )
        step = min(self._encoder.axes["batch"].max, self._decoder.axes["images"].max)
        for start in range(0, len(wanted), step):
            group = wanted[start : start + step]
            self._decode(self._encode(images, group, frames), group, boxes, masks)
        return masks

    def _encode(self, images: Images, group: np.ndarray, frames: list[Frame | None]) -> Tensor:
        pixels, sizes = [], []
        for number in group:
            frame = frames[number]
            assert frame is not None
            pixels.append(on_canvas(images[number].pixels, frame, self._preprocess.filter))
            sizes.append(frame.valid)
        return self._encoder({"pixels": np.stack(pixels), "size": np.array(sizes, np.int64)})["embedding"]

    def _decode(self, embedding: Tensor, group: np.ndarray, boxes: Boxes, masks: Masks) -> None:
        rows = np.flatnonzero(np.isin(boxes.image, group))
        for call in calls_by_image(boxes.image[rows], self._decoder.axes["boxes"].max):
            chosen = rows[call]
            out = self._decoder(
                {
                    "embedding": embedding,
                    "boxes": np.stack([self._to_model(boxes, row, masks.frames) for row in chosen]),
                    "image": np.searchsorted(group, boxes.image[chosen]),
                }
            )
            masks.part[chosen], masks.row[chosen] = len(masks.logits), np.arange(len(chosen))
            masks.quality[chosen] = np.asarray(out["quality"])
            masks.logits.append(out["logits"])

    @staticmethod
    def _to_model(boxes: Boxes, row: int, frames: list[Frame | None]) -> np.ndarray:
        frame = frames[boxes.image[row]]
        assert frame is not None
        return frame.xyxy_model_from_image(boxes.xyxy_image[row])


def calls_by_image(image: np.ndarray, most: int) -> list[np.ndarray]:
    """Rows of boxes in calls of at most ``most``, an image's boxes in one call wherever they fit.

    Args:
        image: (N,) ascending image number of each box.
    """
    calls: list[list[int]] = []
    for number in np.unique(image):
        rows = np.flatnonzero(image == number).tolist()
        for start in range(0, len(rows), most):
            piece = rows[start : start + most]
            if calls and len(calls[-1]) + len(piece) <= most:
                calls[-1] += piece
            else:
                calls.append(piece)
    return [np.array(call, np.int64) for call in calls]
