"""Layers of Grounding-DINO in a form that exports; each says which op or habit forced it.

They take the official layer and use its weights; the parity gate compares them with the official layer at work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

MASKED = -1e4
"""Added to what attention must not see. ``exp`` of it is exactly 0 beside any score within 9,000 of it, in float32 and
float16 alike; the type's minimum, which transformers adds, becomes -inf in float16 once a negative score joins it."""


def additive_mask(seen: Tensor) -> Tensor:
    """(...) float32: 0 where ``seen`` (bool), ``MASKED`` elsewhere."""
    return (~seen).float() * MASKED


def inverse_sigmoid(values: Tensor, margin: float = 1e-5) -> Tensor:
    """Logits of values in 0..1, kept ``margin`` from both ends: ``torch.special.logit``, which ONNX has no op for."""
    values = values.clamp(margin, 1 - margin)
    return torch.log(values / (1 - values))


@dataclass(frozen=True)
class Levels:
    """The cells of all feature levels, one after the other: N = sum of h * w over L levels, for B photos.

    The reference carries shapes as tensors and derives positions by cumulative sums over masks. A photo lies top left,
    so its mask is a rectangle and everything follows from two counts a level; shapes are Python ints, so that reshapes
    and splits are static.
    """

    shapes: Sequence[tuple[int, int]]
    """(height, width) in cells of each level."""
    counts: Tensor
    """(B, L, 2) float32, columns and rows of cells that the photo covers."""
    valid: Tensor
    """(B, N) bool, cells that the photo covers."""
    centres: Tensor
    """(B, N, 2) float32, x and y of each cell's centre in 0..1 of the photo (beyond 1 outside it)."""
    ratios: Tensor
    """(B, L, 2) float32, share of the canvas that the photo covers, across and down."""

    @staticmethod
    def from_valid(shapes: Sequence[tuple[int, int]], rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Levels:
        """From the rows (B, h) and columns (B, w) of cells that the photo covers, bool, a level each."""
        counts = torch.stack([torch.stack([c.sum(1), r.sum(1)], -1) for r, c in zip(rows, columns, strict=True)], 1).float()
        valid = torch.cat([(r[:, :, None] & c[:, None, :]).flatten(1) for r, c in zip(rows, columns, strict=True)], 1)
        cells = counts.new_tensor([[width, height] for height, width in shapes])  # (L, 2)
        centres = []
        for level, (height, width) in enumerate(shapes):
            x = (torch.arange(width, device=valid.device) + 0.5) / counts[:, level, 0:1]  # (B, w)
            y = (torch.arange(height, device=valid.device) + 0.5) / counts[:, level, 1:2]  # (B, h)
            centres.append(torch.cat(_of_cells(x[..., None], y[..., None]), -1))
        return Levels(shapes, counts, valid, torch.cat(centres, 1), counts / cells)

    def steps(self) -> Iterator[tuple[Tensor, Tensor]]:
        """A level's rows (B, h) and columns (B, w) numbered from 1 and divided by how many the photo covers."""
        for level, (height, width) in enumerate(self.shapes):
            # The reference's guard against empty masks; without it the last position would differ by 1e-8.
            across, down = self.counts[:, level, 0:1] + 1e-6, self.counts[:, level, 1:2] + 1e-6
            rows = torch.arange(1, height + 1, device=down.device)
            columns = torch.arange(1, width + 1, device=across.device)
            yield rows / down, columns / across


def _of_cells(columns: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(B, h * w, C) twice: each cell's vector of its column, from (B, w, C), and of its row, from (B, h, C)."""
    width, height = columns.shape[1], rows.shape[1]
    across = columns[:, None].expand(-1, height, -1, -1).flatten(1, 2)
    return across, rows[:, :, None].expand(-1, -1, width, -1).flatten(1, 2)


def sine_positions(rows: Tensor, columns: Tensor, width: int, temperature: float) -> Tensor:
    """Sine positions of a level's cells: (B, h * w, 2 * width) float32, the row's part first.

    As ``GroundingDinoSinePositionEmbedding``, whose cumulative sums over the mask TensorRT runs slowly: here from
    ``Levels.steps``, with the sines of h + w positions instead of h * w.

    Args:
        rows, columns: (B, h) and (B, w) float32, positions in 0..1.
        width: values per coordinate.
        temperature: of the frequencies (20 in Grounding-DINO's configurations).
    """
    channel = torch.arange(width, device=rows.device)
    period = float(temperature) ** (2 * torch.div(channel, 2, rounding_mode="floor").float() / width)

    def waves(position: Tensor) -> Tensor:
        angle = position[..., None] * (2 * math.pi) / period
        return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), -1).flatten(2)

    across, down = _of_cells(waves(columns), waves(rows))
    return torch.cat([down, across], -1)


def multihead_attention(layer: nn.Module, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """The official ``GroundingDinoMultiheadAttention`` without the tuple around its result.

    Args:
        queries, keys, values: (B, Q, D), (B, K, D), (B, K, D).
        mask: additive, broadcast to (B, heads, Q, K).
    """
    attended: Tensor = layer(queries=queries, keys=keys, values=values, attention_mask=mask)[0]
    return attended


def fusion_attention(layer: nn.Module, vision: Tensor, text: Tensor, cells: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The official fusion layer: image cells look at tokens and tokens at cells, both added to their own.

    Forced by ``attn_weights.max()`` over the whole batch, which makes a row's rounding depend on its neighbours, and by
    ``masked_fill_`` in place; a softmax subtracts its row's maximum anyway.

    Args:
        layer: a ``GroundingDinoFusionLayer``.
        vision: (B, N, D); text: (B, T, D).
        cells: (B, N) bool, cells of the photo; tokens: (B, T) bool, tokens that are no padding.

    Returns:
        vision and text of the same shapes.
    """
    vision, text, attention = layer.layer_norm_vision(vision), layer.layer_norm_text(text), layer.attn

    def heads(values: Tensor) -> Tensor:
        return values.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)  # (B, heads, *, d)

    scores = heads(attention.vision_proj(vision) * attention.scale) @ heads(attention.text_proj(text)).transpose(2, 3)
    to_text = (scores + additive_mask(tokens)[:, None, None, :]).softmax(-1)  # (B, heads, N, T)
    to_vision = (scores.transpose(2, 3) + additive_mask(cells)[:, None, None, :]).softmax(-1)  # (B, heads, T, N)
    seen_text = (to_text @ heads(attention.values_text_proj(text))).transpose(1, 2).flatten(2)
    seen_vision = (to_vision @ heads(attention.values_vision_proj(vision))).transpose(1, 2).flatten(2)
    return (
        vision + layer.vision_param * attention.out_vision_proj(seen_text),
        text + layer.text_param * attention.out_text_proj(seen_vision),
    )


def deformable_attention(layer: nn.Module, queries: Tensor, vision: Tensor, reference: Tensor, levels: Levels) -> Tensor:
    """Multi-scale deformable attention (arXiv 2010.04159, equation 3).

    Forced by level shapes given as tensors and a data-dependent check of them; also keeps one level's samples in memory
    at a time instead of all of them stacked.

    Args:
        layer: a ``GroundingDinoMultiscaleDeformableAttention``.
        queries: (B, Q, D), positions added.
        vision: (B, N, D) the cells' features.
        reference: (B, Q, L, 2) points or (B, Q, L, 4) boxes (centre, sides), in 0..1 of the canvas.

    Returns:
        (B, Q, D).
    """
    heads, points, count = layer.n_heads, layer.n_points, len(levels.shapes)
    values = layer.value_proj(vision) * levels.valid[..., None]
    offsets = layer.sampling_offsets(queries).unflatten(-1, (heads, count, points, 2))  # (B, Q, heads, L, P, 2)
    weights = layer.attention_weights(queries).unflatten(-1, (heads, count * points)).softmax(-1)
    weights = weights.unflatten(-1, (count, points))
    if reference.shape[-1] == 2:
        cells = offsets.new_tensor([[width, height] for height, width in levels.shapes])
        places = reference[:, :, None, :, None] + offsets / cells[:, None]
    else:
        places = reference[:, :, None, :, None, :2] + offsets / points * reference[:, :, None, :, None, 2:] * 0.5
    parts = values.split([height * width for height, width in levels.shapes], 1)
    attended = torch.zeros_like(queries)
    for level, (part, shape) in enumerate(zip(parts, levels.shapes, strict=True)):
        attended = attended + _sampled(part, shape, places[:, :, :, level], weights[:, :, :, level])
    output: Tensor = layer.output_proj(attended)
    return output


def _sampled(values: Tensor, shape: tuple[int, int], places: Tensor, weights: Tensor) -> Tensor:
    """Weighted bilinear samples of one level: (B, Q, heads * d) from values (B, h * w, heads * d), places
    (B, Q, heads, P, 2) in 0..1 and weights (B, Q, heads, P)."""
    heads = places.shape[2]
    image = values.unflatten(2, (heads, -1)).permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, shape)  # (B heads, d, h, w)
    grid = (2 * places - 1).transpose(1, 2).flatten(0, 1)  # (B heads, Q, P, 2)
    samples = functional.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    summed = (samples * weights.transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)  # (B heads, d, Q)
    return summed.unflatten(0, (-1, heads)).permute(0, 3, 1, 2).flatten(2)
