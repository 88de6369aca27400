"""Exportable forms of Grounding-DINO's layers; each docstring names the operation that made it necessary.

The functions take the official layer and use its weights; the parity gate compares them with the official layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..deformable_plugin import plugin_sampled
from ..family import Sampling
from ..precision.lowering import Fp32

MASKED = -1e4
"""Added to masked attention scores. Its ``exp`` is exactly 0 beside any score within 9,000 of it, in float32 and float16. The
type's minimum, which transformers adds, becomes -inf in float16 when a negative score is added."""


def additive_mask(seen: Tensor) -> Tensor:
    """(...) float32: 0 where ``seen`` (bool), ``MASKED`` elsewhere."""
    return (~seen).float() * MASKED


Margin = tuple[float, float]
"""Distances from 0 and 1 at which coordinates are clamped before taking their logits: between layers, and for the last boxes."""
OFFICIAL_MARGIN: Margin = (1e-3, 1e-3)
"""GroundingDINO, ``util/misc.py``."""
MMDET_MARGIN: Margin = (1e-3, 1e-5)
"""mmdetection: ``DinoTransformerDecoder`` (``layers/transformer/dino_layers.py``), and ``GroundingDINOHead.forward``."""
TRANSFORMERS_MARGIN: Margin = (1e-5, 1e-5)
"""transformers, ``torch.special.logit(eps=1e-5)``."""


def inverse_sigmoid(values: Tensor, margin: float = OFFICIAL_MARGIN[0]) -> Tensor:
    """Logits of values in 0..1, finite at both ends: ``inverse_sigmoid`` of GroundingDINO's ``util/misc.py``.

    With transformers' margin, for a box as wide or high as the photo (a side beyond 0.999), boxes and scores differ from those
    for which the official weights were trained.
    """
    return torch.log(values.clamp(min=margin) / (1 - values).clamp(min=margin))


Places = Mapping[str, Tensor]
"""Of one level, float32: ``row_number`` (h,) and ``column_number`` (w,) from 1, ``row_center`` and ``column_center`` from 0.5."""


def places_of(shape: tuple[int, int]) -> Places:
    """The `Places` of a level with (height, width) cells."""
    rows, columns = (torch.arange(1, cells + 1, dtype=torch.float32) for cells in shape)
    return {"row_number": rows, "row_center": rows - 0.5, "column_number": columns, "column_center": columns - 0.5}


@dataclass(frozen=True)
class Levels:
    """The cells of all feature levels, one after the other: N = sum of h * w over L levels, for B photos.

    The reference has shapes as tensors and computes positions by cumulative sums over masks. A photo is at the top left of
    the canvas, so its mask is a rectangle and all values follow from two counts per level. Shapes are Python ints, so that
    reshapes and splits are static.
    """

    shapes: Sequence[tuple[int, int]]
    """(height, width) in cells of each level."""
    counts: Tensor
    """(B, L, 2) float32, columns and rows of cells that the photo covers."""
    valid: Tensor
    """(B, N) bool, cells that the photo covers."""
    centers: Tensor
    """(B, N, 2) float32, x and y of each cell's center in 0..1 of the photo (beyond 1 outside it)."""
    ratios: Tensor
    """(B, L, 2) float32, share of the canvas that the photo covers, across and down."""
    reference: Tensor
    """(B, N, L, 2) float32, x and y of each cell's center in 0..1 of each level's canvas."""
    places: Sequence[Places]
    """Where the cells of each level are."""

    @staticmethod
    def from_valid(
        shapes: Sequence[tuple[int, int]], rows: Sequence[Tensor], columns: Sequence[Tensor], places: Sequence[Places]
    ) -> Levels:
        """Create from the rows (B, h) and columns (B, w) of cells that the photo covers, bool, one for each level."""
        counts = torch.stack([torch.stack([c.sum(1), r.sum(1)], -1) for r, c in zip(rows, columns, strict=True)], 1).float()
        valid = torch.cat([(r[:, :, None] & c[:, None, :]).flatten(1) for r, c in zip(rows, columns, strict=True)], 1)
        cells = counts.new_tensor([[width, height] for height, width in shapes])  # (L, 2)
        centers = []
        for level, place in enumerate(places):
            x = place["column_center"] / counts[:, level, 0:1]  # (B, w)
            y = place["row_center"] / counts[:, level, 1:2]  # (B, h)
            centers.append(torch.cat(_of_cells(x[..., None], y[..., None]), -1))
        points, ratios = torch.cat(centers, 1), counts / cells
        return Levels(shapes, counts, valid, points, ratios, points[:, :, None] * ratios[:, None], places)

    def steps(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each level's rows (B, h) and columns (B, w), numbered from 1 and divided by the number that the photo covers."""
        for level, place in enumerate(self.places):
            # The reference adds 1e-6 against empty masks; without it the last position would differ by 1e-8.
            across, down = self.counts[:, level, 0:1] + 1e-6, self.counts[:, level, 1:2] + 1e-6
            yield place["row_number"] / down, place["column_number"] / across


def _of_cells(columns: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Expand vectors of columns (B, w, C) and rows (B, h, C) to vectors of cells, (B, h * w, C) each."""
    width, height = columns.shape[1], rows.shape[1]
    across = columns[:, None].expand(-1, height, -1, -1).flatten(1, 2)
    return across, rows[:, :, None].expand(-1, -1, width, -1).flatten(1, 2)


def sine_positions(rows: Tensor, columns: Tensor, width: int, temperature: float) -> Tensor:
    """Sine positions of a level's cells: (B, h * w, 2 * width) float32, the row's part first.

    Replaces ``GroundingDinoSinePositionEmbedding``, whose cumulative sums over the mask are slow in TensorRT, by the sines of
    the h + w positions of ``Levels.steps``, instead of h * w.

    Args:
        rows, columns: (B, h) and (B, w) float32, positions in 0..1.
        width: values per coordinate.
        temperature: of the frequencies (20 in Grounding-DINO's configurations).
    """
    across, down = _of_cells(_waves(columns, width, temperature), _waves(rows, width, temperature))
    return torch.cat([down, across], -1)


def box_positions(boxes: Tensor, width: int) -> Tensor:
    """Sine positions of boxes (B, Q, 4) in 0..1: (B, Q, 4 * width) float32, in the order y, x, width, height.

    Replaces ``encode_sinusoidal_position_embedding`` (temperature 10,000), with a quarter of its nodes.
    """
    return _waves(boxes[..., [1, 0, 2, 3]], width, 10_000.0).flatten(2)


def _waves(position: Tensor, width: int, temperature: float) -> Tensor:
    """(..., width): alternating sines and cosines of (...) positions."""
    channel = torch.arange(width, device=position.device)
    period = temperature ** (2 * torch.div(channel, 2, rounding_mode="floor").float() / width)
    angle = position[..., None] * (2 * math.pi) / period
    return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), -1).flatten(-2)


Call = Callable[..., Tensor]
"""(function, its arguments) to its result. As ``Fp32(call, why=...)``, all functions called with it stay FP32."""


def call(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """``function(*arguments)``."""
    return function(*arguments)


def multihead_attention(layer: nn.Module, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """The official ``GroundingDinoMultiheadAttention`` without the tuple around its result.

    Args:
        queries, keys, values: (B, Q, D), (B, K, D), (B, K, D).
        mask: additive, broadcast to (B, heads, Q, K).
    """
    attended: Tensor = layer(queries=queries, keys=keys, values=values, attention_mask=mask)[0]
    return attended


def text_attention(layer: nn.Module, placed: Tensor, text: Tensor, mask: Tensor, of_text: Call) -> Tensor:
    """The official self-attention of tokens, ``GroundingDinoMultiheadAttention``, with `of_text` around the projections only.

    Required by TensorRT, which compiles attention to one kernel only in half precision.

    Args:
        placed, text: (B, T, D), with and without positions added.
        mask: additive, broadcast to (B, heads, T, T).
        of_text: calls the projections.
    """

    def heads(values: Tensor) -> Tensor:
        return values.unflatten(-1, (layer.num_attention_heads, layer.attention_head_size)).transpose(1, 2)  # (B, heads, T, d)

    queries, keys = of_text(layer.query, placed) / math.sqrt(layer.attention_head_size), of_text(layer.key, placed)
    attended = (heads(queries) @ heads(keys).transpose(2, 3) + mask).softmax(-1) @ heads(of_text(layer.value, text))
    return of_text(layer.out_proj, attended.transpose(1, 2).flatten(2))


def fusion_attention(
    layer: nn.Module,
    vision: Tensor,
    text: Tensor,
    cells: Tensor,
    tokens: Tensor,
    of_text: Call,
    stream: Call,
    *,
    two_products: bool = False,
) -> tuple[Tensor, Tensor]:
    """The official fusion layer: cross-attention from image cells to tokens and back, each added to its input.

    Required by ``attn_weights.max()`` over the whole batch, which makes a row's rounding depend on its neighbors, and by
    ``masked_fill_`` in place; a softmax subtracts its row's maximum anyway.

    Args:
        layer: a ``GroundingDinoFusionLayer``.
        vision: (B, N, D); text: (B, T, D).
        cells: (B, N) bool, cells of the photo; tokens: (B, T) bool, tokens that are not padding.
        of_text, stream: call the functions of the tokens, and the norms and sums.
        two_products: compute the scores once for each direction. TensorRT compiles attention to one kernel, which never
            writes the scores, only if nothing else reads them: with `text_attention`, of Swin-T at 1024 x 1024 in half
            precision 42 fused attentions and 11.1 GB of memory traffic an image (24 and 11.4 GB without both). Other runtimes
            compute them twice.

    Returns:
        vision and text of the same shapes.
    """
    attention = layer.attn
    vision, text = stream(layer.layer_norm_vision, vision), of_text(layer.layer_norm_text, text)

    def heads(values: Tensor) -> Tensor:
        return values.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)  # (B, heads, *, d)

    by_cell, by_token = heads(attention.vision_proj(vision) * attention.scale), heads(of_text(attention.text_proj, text))
    scores = by_cell @ by_token.transpose(2, 3)
    of_tokens = by_token @ by_cell.transpose(2, 3) if two_products else scores.transpose(2, 3)
    to_text = (scores + additive_mask(tokens)[:, None, None, :]).softmax(-1)  # (B, heads, N, T)
    to_vision = (of_tokens + additive_mask(cells)[:, None, None, :]).softmax(-1)  # (B, heads, T, N)
    seen_text = (to_text @ heads(of_text(attention.values_text_proj, text))).transpose(1, 2).flatten(2)
    seen_vision = (to_vision @ heads(attention.values_vision_proj(vision))).transpose(1, 2).flatten(2)
    return (
        stream(_added, vision, layer.vision_param, attention.out_vision_proj(seen_text)),
        of_text(_added, text, layer.text_param, of_text(attention.out_text_proj, seen_vision)),
    )


def _added(stream: Tensor, gain: Tensor, seen: Tensor) -> Tensor:
    return stream + gain * seen


def deformable_attention(
    layer: nn.Module, queries: Tensor, vision: Tensor, reference: Tensor, levels: Levels, sample: Sampler, project: Call
) -> Tensor:
    """Multi-scale deformable attention (arXiv 2010.04159, equation 3).

    Required by level shapes given as tensors and a data-dependent check of them.

    Args:
        layer: a ``GroundingDinoMultiscaleDeformableAttention``.
        queries: (B, Q, D), positions added.
        vision: (B, N, D), the cells' features.
        reference: (B, Q, L, 2) points or (B, Q, L, 4) boxes (center, sides), in 0..1 of the canvas.
        sample: interpolates between the cells, see `sampler`.
        project: calls the layer's last projection.

    Returns:
        (B, Q, D).
    """
    heads, points, count = layer.n_heads, layer.n_points, len(levels.shapes)
    values = torch.where(levels.valid[..., None], layer.value_proj(vision), 0.0)
    offsets = layer.sampling_offsets(queries).unflatten(-1, (heads, count, points, 2))  # (B, Q, heads, L, P, 2)
    weights = layer.attention_weights(queries).unflatten(-1, (heads, count * points)).softmax(-1)
    weights = weights.unflatten(-1, (count, points))
    return project(layer.output_proj, sample(values, offsets, reference, weights, levels.shapes))


Sampler = Callable[[Tensor, Tensor, Tensor, Tensor, Sequence[tuple[int, int]]], Tensor]
"""(values (B, N, heads * d), offsets (B, Q, heads, L, P, 2) in cells, reference (B, Q, L, 2 or 4), weights
(B, Q, heads, L, P), level shapes) to the weighted bilinear samples (B, Q, heads * d); 0 outside a level."""


def sampler(sampling: Sampling) -> Sampler:
    """The implementation with which deformable attention interpolates between cells.

    ``grid-sample`` is one GridSample per level. All of it stays FP32: TensorRT requires one type for pixels and places
    ("`input` and `grid` must be of same type"), and places in half precision are up to 0.04 cells off.
    ``gather`` reads four corners of all levels and sums them, values in half, places and sums in FP32. TensorRT compiles it to
    kernels that never write the samples: of Swin-T at 1024 x 1024 in half precision, 12 GB of memory traffic an image (30 with
    GridSample). Other runtimes write the samples twice. It is also for runtimes whose GridSample is wrong (TensorRT#4813) or
    falls back to the CPU (ONNX Runtime on CUDA).
    ``plugin`` is one node for all levels, for which the full TensorRT has a kernel (`deformable_plugin`). It stays FP32 for
    the same reason as GridSample.
    """
    if sampling == "gather":
        return GatherSampler()
    one_type = "coordinates need more than 11 bits, and {} has one type for all"
    if sampling == "plugin":
        return Fp32(_sampled_by_plugin, why=one_type.format("the plugin"))
    return Fp32(_grid_sampled, why=one_type.format("GridSample"))


def _places(offsets: Tensor, reference: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """(B, Q, heads, L, P, 2) where to read, x and y in 0..1 of each level."""
    if reference.shape[-1] == 2:
        cells = offsets.new_tensor([[width, height] for height, width in shapes])
        return reference[:, :, None, :, None] + offsets / cells[:, None]
    points = offsets.shape[-2]
    return reference[:, :, None, :, None, :2] + offsets / points * reference[:, :, None, :, None, 2:] * 0.5


def _grid_sampled(
    values: Tensor, offsets: Tensor, reference: Tensor, weights: Tensor, shapes: Sequence[tuple[int, int]]
) -> Tensor:
    # Queries are the last axis, along which processors compute: with the points there, as in the official code, OpenVINO takes
    # 1.6 times as long for products and sums. Shapes are explicit: to split a merged axis again, tracing would have to prove
    # each time that the division is exact.
    batch, queries, heads, _, points = weights.shape
    width = values.shape[2] // heads
    grids = (2 * _places(offsets, reference, shapes) - 1).permute(0, 2, 3, 4, 1, 5)  # (B, heads, L, P, Q, 2)
    shares = weights.permute(0, 2, 3, 4, 1)  # (B, heads, L, P, Q)
    attended = values.new_zeros(())
    for level, (part, shape) in enumerate(zip(values.split([h * w for h, w in shapes], 1), shapes, strict=True)):
        image = part.reshape(batch, -1, heads, width).permute(0, 2, 3, 1).reshape(batch * heads, width, *shape)
        grid = grids[:, :, level].reshape(batch * heads, points, queries, 2)
        samples = functional.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        # Only one level's samples (B heads, d, P, Q) are in memory at a time.
        attended = attended + (samples * shares[:, :, level].reshape(batch * heads, 1, points, queries)).sum(2)
    return attended.reshape(batch, heads * width, queries).transpose(1, 2)


def _sampled_by_plugin(
    values: Tensor, offsets: Tensor, reference: Tensor, weights: Tensor, shapes: Sequence[tuple[int, int]]
) -> Tensor:
    if not torch.compiler.is_exporting():  # the node computes nothing in torch
        return _grid_sampled(values, offsets, reference, weights, shapes)
    by_head = values.unflatten(2, (weights.shape[2], -1))
    return plugin_sampled(by_head, _places(offsets, reference, shapes), weights, shapes).flatten(2)


class GatherSampler(nn.Module):
    """Bilinear samples without GridSample, see `sampler`."""

    def __init__(self) -> None:
        super().__init__()
        self.corners = Fp32(_corners, why="coordinates need more than 11 bits")
        self.sum = Fp32(_weighted_sum, why="a sum of 64 products, which costs nothing where it is part of the kernel that reads")

    def forward(
        self, values: Tensor, offsets: Tensor, reference: Tensor, weights: Tensor, shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        batch, heads = weights.shape[0], weights.shape[2]
        width = values.shape[2] // heads
        index, share = self.corners(offsets, reference, weights, shapes)  # (B, Q, heads, K) each, K = 4 L P
        table = values.reshape(-1, width)  # (B N heads, d)
        image = torch.arange(batch, device=index.device)[:, None, None, None]
        head = torch.arange(heads, device=index.device)[:, None]
        row = (image * values.shape[1] + index) * heads + head
        return self.sum(functional.embedding(row, table), share).flatten(2)


def _weighted_sum(read: Tensor, share: Tensor) -> Tensor:
    """(B, Q, heads, d) from (B, Q, heads, K, d) and (B, Q, heads, K)."""
    return (read * share[..., None]).sum(-2)


def _corners(offsets: Tensor, reference: Tensor, weights: Tensor, shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """The four cells around each place: their indices among all cells, and their share of the attended value, 0 outside."""
    sides = offsets.new_tensor([[width, height] for height, width in shapes])  # (L, 2)
    ends = [height * width for height, width in shapes]
    starts = torch.tensor([sum(ends[:level]) for level in range(len(ends))], device=offsets.device)  # (L,)
    at = _places(offsets, reference, shapes) * sides[:, None] - 0.5  # (B, Q, heads, L, P, 2), in cells
    low = at.floor()
    rest = at - low
    index, share = [], []
    for right in (0, 1):
        for below in (0, 1):
            corner = low + low.new_tensor([right, below])
            inside = ((corner >= 0) & (corner < sides[:, None])).all(-1)
            x, y = torch.minimum(corner.clamp(min=0), sides[:, None] - 1).long().unbind(-1)
            across = rest[..., 0] if right else 1 - rest[..., 0]
            down = rest[..., 1] if below else 1 - rest[..., 1]
            index.append(starts[:, None] + y * sides[:, :1].long() + x)
            share.append(torch.where(inside, across * down * weights, 0.0))
    both = [torch.stack(each, -1).flatten(3) for each in (index, share)]
    return both[0], both[1]
