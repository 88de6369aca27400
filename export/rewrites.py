"""Replacements for parts of the official models that cannot be exported as they are, with the same results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from .precision.lowering import Fp32

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
"""Of ImageNet's RGB on the 0-255 scale (segment_anything/build_sam.py, among others)."""


class Normalize(nn.Module):
    """Pixels (B, H, W, 3) uint8 RGB to (B, H, W, 3) float32, zero mean and unit deviation."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels.to(torch.float32) - self.mean) / self.std  # TensorRT accepts uint8 only as the input of a Cast


def normalize_in_fp32(mean: Sequence[float], std: Sequence[float]) -> Fp32:
    """`Normalize` that stays FP32 in half precision."""
    return Fp32(Normalize(mean, std), why="half precision cannot resolve the steps between pixel values")


def normalized(
    pixels: Tensor, size: Tensor, normalize: nn.Module, rows: Tensor | None = None, columns: Tensor | None = None
) -> Tensor:
    """(B, 3, H, W) float32: `Normalize` of photographs (B, H, W, 3) uint8, and 0 outside their valid (height, width) (B, 2).

    Args:
        rows, columns: int64 (1, H, 1) and (1, 1, W), the numbers of the pixels from 0; None makes them.
    """
    rows = torch.arange(pixels.shape[1], device=pixels.device)[None, :, None] if rows is None else rows
    columns = torch.arange(pixels.shape[2], device=pixels.device)[None, None, :] if columns is None else columns
    inside = (rows < size[:, 0, None, None]) & (columns < size[:, 1, None, None])
    return torch.where(inside[..., None], normalize(pixels), 0.0).permute(0, 3, 1, 2)


class ChannelNorm(nn.Module):
    """segment_anything's ``LayerNorm2d`` (over the channels of (B, C, H, W)) as a LayerNormalization.

    Required by half precision: the five official operations square in the tensor's type, which overflows float16 beyond 256.
    The ONNX operator computes its statistics in float32 (stash_type 1) for any input type, and is one kernel.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


def with_channel_norms(layers: nn.Sequential) -> nn.Sequential:
    """The same layers, each ``LayerNorm2d`` replaced by `ChannelNorm`."""
    return nn.Sequential(*(ChannelNorm(layer) if isinstance(layer, LayerNorm2d) else layer for layer in layers))


QUERIES = 1024
"""Queries of an attention that are processed at a time: the 4096 x 4096 maps of SAM ViT-B and a batch of 8 would need 6.4 GB."""


def windows_of(x: Tensor, side: int) -> Tensor:
    """Tokens (B, G, G, C), padded with zeros, to those of each window: (B windows^2, side^2, C), for any batch."""
    windows = -(-x.shape[1] // side)
    pad = windows * side - x.shape[1]
    if pad:
        x = F.pad(x, (0, 0, 0, pad, 0, pad))
    x = x.reshape(-1, windows, side, windows, side, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, side * side, x.shape[-1])


def merged(x: Tensor, side: int, grid: int) -> Tensor:
    """Tokens of windows (B windows^2, side^2, C) to (B, grid, grid, C), without the padding: the inverse of `windows_of`."""
    windows = -(-grid // side)
    x = x.reshape(-1, windows, windows, side, side, x.shape[-1])
    x = x.permute(0, 1, 3, 2, 4, 5).reshape(-1, windows * side, windows * side, x.shape[-1])
    return x[:, :grid, :grid]


def attention_in_parts(q: Tensor, k: Tensor, v: Tensor, most: int = QUERIES) -> Tensor:
    """Attention (B, heads, N, C) of scaled queries and transposed keys (B, heads, C, M), ``most`` queries at a time."""
    parts = [(some @ k).softmax(dim=-1) @ v for some in q.split(most, dim=2)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class SamBlock(nn.Module):
    """A block of SAM's image encoder (``ImageEncoderViT.blocks[i]``) with a free batch.

    Required by ``window_unpartition``, whose integer division of the batch torch.export cannot prove exact, and by the two
    broadcast additions of ``add_decomposed_rel_pos`` on the (N, N) attention map, which neither ONNX Runtime nor
    TensorRT fuses (measured on 2 cores, one global layer of ViT-B: 6.8 s; this form: 2.3 s).

    The relative position terms of MViTv2 (arXiv:2112.01526, section 4.1) are a dot product with one-hot key coordinates:
    ``q.k + rel_h + rel_w = [q, rel_h, rel_w] . [k, onehot(y), onehot(x)]``. The rest is standard attention over longer
    vectors. Queries are processed `QUERIES` at a time.

    Args:
        block: the official block; its parameters are shared, not copied.
        grid: tokens along one side of the image.
        one_width: pad queries, keys and values with zeros to one width, a multiple of 8. TensorRT compiles attention to one
            kernel, which never writes the map, only if values are as wide as keys. Other runtimes compute the zeros.
    """

    QUERIES = QUERIES
    rows: Tensor
    columns: Tensor
    places: Tensor

    def __init__(self, block: nn.Module, grid: int, *, one_width: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.qkv, self.proj = block.attn.qkv, block.attn.proj
        self.heads, self.scale = block.attn.num_heads, block.attn.scale
        self.grid = grid
        self.side = block.window_size or grid
        step = torch.arange(self.side)
        distance = step[:, None] - step[None, :] + self.side - 1  # as get_rel_pos for equal sizes
        rows, columns = (table[distance].transpose(1, 2) for table in (block.attn.rel_pos_h, block.attn.rel_pos_w))
        one_hot = torch.eye(self.side)
        places = torch.cat([one_hot.repeat_interleave(self.side, 0), one_hot.repeat(self.side, 1)], dim=1)
        width = rows.shape[1] + 2 * self.side
        self.width = -(-width // 8) * 8 if one_width else 0
        more = max(self.width - width, 0)
        self.register_buffer("rows", rows.contiguous())  # (query, channel, key)
        self.register_buffer("columns", F.pad(columns, (0, more)).contiguous())
        self.register_buffer("places", F.pad(places, (0, more))[None, None])  # (1, 1, side^2, 2 side and zeros)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, grid, grid, C) to tokens of the same shape."""
        x = x + merged(self._attend(windows_of(self.norm1(x), self.side)), self.side, self.grid)
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor) -> Tensor:
        tokens, width = x.shape[1:]
        qkv = self.qkv(x).reshape(-1, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, tokens, channels) each
        cells = q.reshape(-1, self.side, self.side, q.shape[-1])
        by_row = (cells @ self.rows).reshape(-1, self.heads, tokens, self.side)
        by_column = (cells.transpose(1, 2) @ self.columns).transpose(1, 2).reshape(-1, self.heads, tokens, self.columns.shape[2])
        q = torch.cat([q * self.scale, by_row, by_column], dim=-1)
        k = torch.cat([k, self.places.expand(k.shape[0], self.heads, -1, -1)], dim=-1).transpose(-2, -1)
        channels = v.shape[-1]
        if self.width:
            v = F.pad(v, (0, self.width - channels))
        out = attention_in_parts(q, k, v, self.QUERIES)
        if self.width:
            out = out[..., :channels]
        return self.proj(out.transpose(1, 2).reshape(-1, tokens, width))
