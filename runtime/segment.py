"""Predicts the mask of each box with SAM. Boxes of different images share a decoder call; embeddings stay on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..batch import Boxes, Images, Masks, Photograph, Tensor
from ..engines.engine import Engine, check_numbers, outliving, uploaded
from ..errors import BundleError
from ..frame import Frame, frame_for
from ..spec import Model
from .canvas import Rows, input_of, on_canvas, together
from .masks.regions import check_scipy, without_small_regions
from .resize import Resizer


@dataclass(frozen=True, slots=True)
class Embedded:
    """The encoder's embeddings of a batch, on its device.

    groups: numbers of the images of each encoder call. embeddings: each call's results by name, one row an image.
    frames: one per image of the batch, None for an image without boxes.
    """

    groups: list[np.ndarray]
    embeddings: list[dict[str, Tensor]]
    frames: list[Frame | None]


class MaskPredictor:
    """SAM's encoder and decoder engines. All outputs of the encoder are inputs of the decoder, by name.

    Args:
        model: the bundle's ``sam``.
        encoder, decoder: its engines.
        resizer: makes the canvases on the engines' device; None: the host does.
        multimask: take the best of three masks, by predicted IoU, in place of the one for an unambiguous prompt.
        min_region: holes and separate parts of a mask below so many pixels of the photograph are filled and removed
            (`wsss.runtime.masks.regions`). 0: none.
        stability: whether the masks' stability scores are needed; otherwise they are given where the decoder has them.

    Raises:
        BundleError: the decoder was exported without the best of three, or without stability scores.
        UsageError: ``min_region`` without scipy.
    """

    def __init__(
        self,
        model: Model,
        encoder: Engine,
        decoder: Engine,
        *,
        resizer: Resizer | None = None,
        multimask: bool = False,
        min_region: int = 0,
        stability: bool = False,
    ) -> None:
        self._preprocess = model.manifest.preprocess
        self._encoder, self._decoder, self._resizer = encoder, decoder, resizer
        self._multimask, self._min_region = multimask, min_region
        if multimask and "multimask" not in decoder.inputs:
            raise lacks("--multimask", "the best of three masks", model)
        if stability and "stability" not in decoder.outputs:
            raise lacks("--stability-exponent", "stability scores", model)
        if min_region:
            check_scipy()

    def __call__(self, images: Images, boxes: Boxes) -> Masks:
        """One mask per box; an image without a box is not encoded."""
        return self.decode(self.encode(images, boxes), boxes)

    def encode(self, images: Images, boxes: Boxes) -> Embedded:
        """Embed the images that have boxes."""
        with_boxes = np.unique(boxes.image)
        frames: list[Frame | None] = [None] * len(images)
        for number in with_boxes:
            frames[number] = frame_for(self._preprocess, *images[number].shape)
        step = min(self._encoder.axes["batch"].max, self._decoder.axes["images"].max)
        groups = [with_boxes[start : start + step] for start in range(0, len(with_boxes), step)]
        return Embedded(groups, [self._encode(images, group, frames) for group in groups], frames)

    def decode(self, embedded: Embedded, boxes: Boxes) -> Masks:
        """Predict one mask per box of the embedded images."""
        count = len(boxes)
        masks = Masks([], np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count, np.float32), embedded.frames)
        if "stability" in self._decoder.outputs:
            masks.stability = np.zeros(count, np.float32)
        for group, embeddings in zip(embedded.groups, embedded.embeddings, strict=True):
            self._decode(embeddings, group, boxes, masks)
        return masks

    def usual_batch(self) -> int:
        """The batch size that the encoder was built for."""
        return self._encoder.axes["batch"].opt

    def room(self, photo: Photograph) -> tuple[int, ...]:
        """(S, S, 3)."""
        return (*frame_for(self._preprocess, *photo.shape).canvas, 3)

    def prepare(self, photo: Photograph, out: np.ndarray) -> np.ndarray:
        """A photograph as the encoder takes it: (S, S, 3) uint8."""
        return on_canvas(photo.pixels, frame_for(self._preprocess, *photo.shape), self._preprocess.filter, out)

    def resizes(self, photo: Photograph) -> bool:
        """Whether the engine's device makes the canvas."""
        return self._resizer is not None and self._resizer.takes(photo, frame_for(self._preprocess, *photo.shape).canvas)

    def resized(self, photo: Photograph) -> Rows | None:
        """The canvas (1, S, S, 3) uint8 on the engine's device; None if that has no memory for it."""
        assert self._resizer is not None
        frame = frame_for(self._preprocess, *photo.shape)
        made = self._resizer(photo, [(0, frame.image[0], 0, frame.image[1])], frame.valid, frame.canvas)
        photo.on_device.clear()  # this stage is the last that reads its pixels
        return made

    def _encode(self, images: Images, group: np.ndarray, frames: list[Frame | None]) -> dict[str, Tensor]:
        pixels: list[Rows] = []
        sizes = []
        for number in group:
            frame = frames[number]
            assert frame is not None
            pixels.append(input_of(images[number], "segment", self))
            sizes.append(frame.valid)
        feeds: dict[str, Tensor] = {"pixels": together(pixels)}
        if "size" in self._encoder.inputs:  # of a model whose photographs do not fill the canvas
            feeds["size"] = np.array(sizes, np.int64)
        return {name: outliving(tensor) for name, tensor in self._encoder(feeds).items()}

    def _decode(self, embeddings: dict[str, Tensor], group: np.ndarray, boxes: Boxes, masks: Masks) -> None:
        rows = np.flatnonzero(np.isin(boxes.image, group))
        for call in calls_by_image(boxes.image[rows], self._decoder.axes["boxes"].max):
            chosen = rows[call]
            feeds = {
                **embeddings,
                "boxes": np.stack([self._to_model(boxes, row, masks.frames) for row in chosen]),
                "image": np.searchsorted(group, boxes.image[chosen]),
            }
            if "multimask" in self._decoder.inputs:  # not in bundles of earlier versions
                feeds["multimask"] = np.full(len(chosen), self._multimask)
            out = self._decoder(feeds)
            masks.part[chosen], masks.row[chosen] = len(masks.logits), np.arange(len(chosen))
            masks.quality[chosen] = np.asarray(out["quality"])
            check_numbers(masks.quality[chosen], boxes.image[chosen], "sam/decoder")
            if masks.stability is not None:
                masks.stability[chosen] = np.asarray(out["stability"])
            logits = outliving(out["logits"])
            if self._min_region:
                frames = [masks.frames[number] for number in boxes.image[chosen]]
                logits = uploaded(self._decoder, without_small_regions(np.array(logits), frames, self._min_region))
            masks.logits.append(logits)

    @staticmethod
    def _to_model(boxes: Boxes, row: int, frames: list[Frame | None]) -> np.ndarray:
        frame = frames[boxes.image[row]]
        assert frame is not None
        return frame.xyxy_model_from_image(boxes.xyxy_image[row])


def lacks(flag: str, what: str, model: Model) -> BundleError:
    """The error of a flag that needs what a bundle of an earlier version does not have."""
    return BundleError(
        f"{flag}: expected a bundle whose sam has {what}, got one that was exported before",
        hint=f"export it again: wsss export --model sam --variant {model.manifest.variant}",
    )


def calls_by_image(image: np.ndarray, most: int) -> list[np.ndarray]:
    """Group the rows of boxes into calls of at most ``most``, with an image's boxes in one call where they fit.

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
