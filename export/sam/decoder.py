"""What the decoders of SAM and SAM 2 share: box corners, upscaling, and the feeds of boxes of several images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...batch import MAX_BOXES
from ...spec import AxisRange
from ..family import Feeds, take_rows

BOXES = AxisRange(1, 16, 64)
"""Boxes per decoder call."""
IMAGES = 16
"""Most embeddings per decoder call (more if the encoder's batch is larger)."""
MASKS = AxisRange(1, 16, MAX_BOXES)
"""Masks fused in one image; more than a decoder call returns, because a photograph may need several calls."""


def images_per_call(batch: AxisRange) -> AxisRange:
    """Embeddings per decoder call, for an encoder's range of images."""
    return AxisRange(1, max(batch.opt, IMAGES // 2), max(batch.max, IMAGES))


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
    """Decoder feeds: boxes of 4 px to the whole side, with interleaved images; the embeddings are smooth, as real ones are.

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
    }


def take_boxes(feeds: Feeds, rows: Sequence[int]) -> Feeds:
    """Select boxes, and only the embeddings that they refer to."""
    some = take_rows({"boxes": feeds["boxes"], "image": feeds["image"]}, rows)
    used, image = np.unique(some["image"], return_inverse=True)
    embeddings = {name: array[used] for name, array in feeds.items() if name not in some}
    return {**embeddings, "boxes": some["boxes"], "image": image.astype(np.int64)}
