"""What the decoders of SAM and SAM 2 share: box corners, upscaling, and the feeds of boxes of several images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from segment_anything.utils.amg import calculate_stability_score
from torch import Tensor, nn

from ...batch import MAX_BOXES
from ...errors import ParityError
from ...spec import AxisRange, TensorSpec
from ..family import Feeds, Tolerance, miscount, take_rows

BOXES = AxisRange(1, 16, 64)
"""Boxes per decoder call."""
IMAGES = 16
"""Most embeddings per decoder call (more if the encoder's batch is larger)."""
MASKS = AxisRange(1, 16, MAX_BOXES)
"""Masks fused in one image; more than a decoder call returns, because a photograph may need several calls."""


MULTIMASK = TensorSpec("multimask", ("boxes",), "bool")
"""Input: whether a box gets the best of the three masks of an ambiguous prompt, by predicted IoU, as ``argmax`` over those of
``SamPredictor.predict(multimask_output=True)``, in place of the one mask of ``multimask_output=False``."""
CHOSEN = (TensorSpec("token", ("boxes",), "int64"), TensorSpec("stability", ("boxes",), "float32"))
"""Outputs: which of the four masks a box got, and its stability score."""
STABILITY = Tolerance(
    relative=1e-5, measure=miscount, why="a ratio of counts, to which cells within rounding of the thresholds may add or not"
)
COUNTS = "counts of up to 65,536 cells"
"""Why a stability score is computed in FP32."""
TIE = 2e-5
"""Share of the largest logit, and of the predicted IoU's range, by which values may differ that choose a mask."""
HALF_TIE = 3e-3
"""The same in float16."""


def images_per_call(batch: AxisRange) -> AxisRange:
    """Embeddings per decoder call, for an encoder's range of images."""
    return AxisRange(1, max(batch.opt, IMAGES // 2), max(batch.max, IMAGES))


def stability(logits: Tensor, *, delta: float = 1.0) -> Tensor:
    """How little masks (N, P) depend on their threshold (N,), in 0..1: their area at ``+delta`` over that at ``-delta``.

    As segment_anything's ``calculate_stability_score(masks, 0.0, 1.0)``, and SAM 2's ``_get_stability_scores``, which gives 1 for
    a mask without any area.
    """
    inside, around = (logits > delta).float().sum(dim=1), (logits > -delta).float().sum(dim=1)
    return torch.where(around > 0, inside / around, 1.0)


def stability_range(logits: Tensor, tie: float, delta: float = 1.0) -> tuple[float, float]:
    """The lowest and highest stability score of logits (L, L), each of which may be off by ``tie`` of the largest."""
    off = tie * float(logits.abs().max())
    (inside_least, inside_most), (around_least, around_most) = (
        [int((logits > bound + shift).sum()) for shift in (off, -off)] for bound in (delta, -delta)
    )
    return (
        inside_least / around_most if around_most else 1.0,
        min(inside_most / around_least, 1.0) if around_least else 1.0,
    )


def best_of(quality: Tensor, tie: float) -> list[int]:
    """The masks, 1 to 3, with the largest of the predicted IoUs (4,), each of which may be off by ``tie``."""
    return [1 + number for number in range(len(quality) - 1) if quality[1 + number] >= quality[1:].max() - 2 * tie]


def chosen_mask(logits: Tensor, quality: Tensor, allowed: Sequence[int], tie: float, outputs: Feeds) -> Feeds:
    """The reference of a box: of the official masks (4, L, L) and predicted IoUs (4,), the one that the graph took.

    Args:
        allowed: the masks that the official rule takes, near ties included.
        outputs: the graph's for this box; those of earlier versions do not say which mask it took: the first.

    Raises:
        ParityError: the graph took another one.
    """
    token = int(outputs["token"][0]) if "token" in outputs else 0
    if token not in allowed:
        raise ParityError(f"output 'token': mask {token} was taken, the official rule takes {' or '.join(map(str, allowed))}")
    lowest, highest = stability_range(logits[token], tie)
    return {
        "logits": logits[token][None].numpy(),
        "quality": quality[token][None].numpy(),
        "token": np.array([token]),
        "stability": calculate_stability_score(logits[token][None], 0.0, 1.0).nan_to_num(1.0).numpy(),
        "stability.range": np.array([[lowest], [highest]]),
    }


class CornerWaves(nn.Module):
    """Random Fourier features of box corners: (N, 4) pixels of the model's input to (N, 2, D), as ``PositionEmbeddingRandom``."""

    frequencies: Tensor

    def __init__(self, frequencies: Tensor, side_px: int) -> None:
        super().__init__()
        self.side_px = side_px
        self.register_buffer("frequencies", frequencies)

    def forward(self, boxes: Tensor) -> Tensor:
        centered = 2 * ((boxes.reshape(-1, 2, 2) + 0.5) / self.side_px) - 1
        angle = 2 * math.pi * (centered @ self.frequencies)
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class Upscale(nn.Module):
    """``MaskDecoder.output_upscaling`` and the product with a box's mask weights: cells (B, G^2, D) and weights (B, D / 8) to
    logits (B, 4 G, 4 G).

    The official transposed convolutions have kernels as large as their strides: each cell becomes 2 x 2 by one matrix product.
    So channels stay last, and only the logits are brought into the order of pixels, not all channels between the layers.
    """

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        first, norm, activation, second, _ = layers
        self.norm, self.activation = norm, activation
        for name, layer in (("first", first), ("second", second)):
            assert layer.kernel_size == layer.stride == (2, 2)
            self.register_buffer(name, layer.weight.permute(0, 2, 3, 1).flatten(1))  # (in, 2 x 2 x out)
            self.register_buffer(f"{name}_bias", layer.bias)

    def forward(self, cells: Tensor, weights: Tensor) -> Tensor:
        return in_pixels(self.channels(cells) @ weights[..., None])

    def channels(self, cells: Tensor, finer: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Upscaled channels (B, 16 G^2, D / 8), in the order of cells.

        Args:
            finer: SAM 2 adds its features of the image, (B, G^2, 4, D / 4) and (B, G^2, 16, D / 8).
        """
        x = (cells @ self.first).unflatten(2, (4, -1)) + self.first_bias  # (B, G^2, 4, D / 4)
        if finer is not None:
            x = x + finer[0]
        x = self.activation(F.layer_norm(x, self.norm.weight.shape, self.norm.weight, self.norm.bias, self.norm.eps))
        x = (x @ self.second).unflatten(3, (4, -1)) + self.second_bias  # (B, G^2, 4, 4, D / 8)
        if finer is not None:
            x = x + finer[1].unflatten(2, (4, 4))
        return self.activation(x).flatten(1, 3)


def in_pixels(values: Tensor) -> Tensor:
    """Values in the order of cells, 4 x 4 of each, to maps (B, 4 G, 4 G)."""
    grid = math.isqrt(values.shape[1] // 16)
    pixels = values.reshape(-1, grid, grid, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4, 6)  # rows, then columns
    return pixels.reshape(-1, 4 * grid, 4 * grid)


def cells_of(maps: Tensor) -> Tensor:
    """(I, D, G, G) to (I, G^2, D)."""
    return maps.flatten(2).transpose(1, 2)


def sample_boxes(side: int, maps: Mapping[str, tuple[int, int, int]], most: int, rows: int, seed: int) -> Feeds:
    """Decoder feeds: boxes of 4 px to the whole side, with interleaved images, half of them with `MULTIMASK`; the embeddings are
    smooth, as real ones are.

    Args:
        maps: names of the embeddings, and their (channels, height, width).
        most: largest number of images.
    """
    rng = np.random.default_rng(seed)
    images = min(most, max(rows - 1, 1))
    embeddings = {}
    for name, shape in maps.items():
        coarse = rng.normal(size=(images, shape[0], -(-shape[1] // 4), -(-shape[2] // 4)))
        smooth = coarse.repeat(4, axis=2).repeat(4, axis=3)[:, :, : shape[1], : shape[2]]
        embeddings[name] = (smooth + 0.3 * rng.normal(size=(images, *shape))).astype(np.float32)
    extent = np.exp(rng.uniform(np.log(4), np.log(side), (rows, 2)))
    corner = rng.uniform(0, 1, (rows, 2)) * (side - extent)
    return {
        **embeddings,
        "boxes": np.concatenate([corner, corner + extent], axis=1).astype(np.float32),
        "image": (np.arange(rows, dtype=np.int64) * 7 + 1) % images,
        "multimask": rng.permutation(np.arange(rows) % 2 == 1),
    }


def take_boxes(feeds: Feeds, rows: Sequence[int]) -> Feeds:
    """Select boxes, and only the embeddings that they refer to."""
    some = take_rows({name: feeds[name] for name in ("boxes", "image", "multimask") if name in feeds}, rows)
    used, image = np.unique(some["image"], return_inverse=True)
    embeddings = {name: array[used] for name, array in feeds.items() if name not in some}
    return {**embeddings, **some, "image": image.astype(np.int64)}
