"""SAM 3's image encoder (a ViT with windows and rotary positions, and a feature pyramid), from transformers' ``Sam3Model``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Sam3Model
from transformers.models.sam3.modeling_sam3 import Sam3Attention, Sam3ViTLayer

from ..rewrites import attention_in_parts, merged, normalize_in_fp32, windows_of

MEAN = STD = (127.5, 127.5, 127.5)
"""Of RGB on the 0-255 scale (sam3/model/sam3_image_processor.py; transformers ``IMAGENET_STANDARD_MEAN``)."""
TENSORS = ("embedding", "features_2x", "features_4x")
"""The outputs: of the image's cells, and maps with two and four times as many along each axis."""


class Vision(nn.Module):
    """Photographs (B, S, S, 3) uint8 RGB to `TENSORS`: (B, G^2, D), (B, D, 2 G, 2 G) and (B, D, 4 G, 4 G).

    As ``Sam3Model.get_vision_features``, and the first self-attention of the DETR encoder, which no text reaches: what all
    phrases of a photograph share is computed once.
    """

    position: Tensor

    def __init__(self, official: Sam3Model) -> None:
        super().__init__()
        backbone, neck = official.vision_encoder.backbone, official.vision_encoder.neck
        grid = grid_of(official)
        self.patches = backbone.embeddings.patch_embeddings.projection
        table = backbone.embeddings.position_embeddings
        position = backbone.embeddings._tile_position_embeddings(table, grid, grid)
        self.register_buffer("position", position.unflatten(1, (grid, grid)).contiguous())
        self.norm = backbone.layer_norm
        self.blocks = nn.ModuleList(Block(layer, grid) for layer in backbone.layers)
        self.finest, self.finer, self.coarse, _ = neck.fpn_layers  # the last is for videos
        self.first = SelfAttention(official)
        self.normalize = normalize_in_fp32(MEAN, STD)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.patches(self.normalize(pixels).permute(0, 3, 1, 2)).permute(0, 2, 3, 1) + self.position
        x = self.norm(x)
        for block in self.blocks:
            x = block(x)
        maps = x.permute(0, 3, 1, 2)
        coarse = self.coarse(maps).flatten(2).transpose(1, 2)
        return self.first(coarse), self.finer(maps), self.finest(maps)


class Block(nn.Module):
    """A layer of the ViT (``Sam3ViTLayer``) with a free batch and explicit attention.

    Explicit products, which half precision on the CPU and the gate can follow. TensorRT may compile them to a fused kernel, whose
    float16 results were reported to be wrong for this network on GPUs of one generation (NVIDIA/TensorRT#4837): as for every
    engine, its comparison on the GPU decides whether it may be used.

    The official rotation turns pairs of neighboring channels; here the channels of queries and keys are in
    another order, the first of each pair before the second, which changes no product of a query with a key.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, layer: Sam3ViTLayer, grid: int) -> None:
        super().__init__()
        attention = layer.attention
        self.norm1, self.norm2, self.mlp, self.proj = layer.layer_norm1, layer.layer_norm2, layer.mlp, attention.o_proj
        self.heads, self.scale = attention.num_attention_heads, attention.scaling
        self.grid, self.side = grid, layer.window_size or grid
        order = torch.arange(attention.hidden_size).reshape(self.heads, -1, 2).transpose(1, 2).flatten()
        self.qkv = joined(
            *(reordered(each, order) for each in (attention.q_proj, attention.k_proj)),
            attention.v_proj,
        )
        cos, sin = layer.rotary_emb(layer.position_ids, layer.position_ids)  # (1, side^2, channels), each value twice
        self.register_buffer("cos", cos[..., ::2].contiguous())
        self.register_buffer("sin", sin[..., ::2].contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, grid, grid, C) to tokens of the same shape."""
        x = x + merged(self._attend(windows_of(self.norm1(x), self.side)), self.side, self.grid)
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(2, (self.heads, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, dim=2))
        out = attention_in_parts(self._turned(q) * self.scale, self._turned(k).transpose(-2, -1), v)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _turned(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * self.cos - second * self.sin, second * self.cos + first * self.sin], dim=-1)


class SelfAttention(nn.Module):
    """The residual self-attention of a layer of the DETR encoder: (B, G^2, D) to (B, G^2, D).

    Args:
        number: of the layer.
    """

    places: Tensor

    def __init__(self, official: Sam3Model, number: int = 0) -> None:
        super().__init__()
        layer = official.detr_encoder.layers[number]
        self.norm, self.attend = layer.layer_norm1, Attention(layer.self_attn)
        self.register_buffer("places", places_of(official))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        placed = normed + self.places
        attended: Tensor = self.attend(placed, placed, normed)
        return x + attended


class Attention(nn.Module):
    """``Sam3Attention`` with explicit products, `rewrites.QUERIES` queries at a time."""

    def __init__(self, official: Sam3Attention) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = official.q_proj, official.k_proj, official.v_proj, official.o_proj
        self.heads, self.scale = official.num_attention_heads, official.scaling

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        """Queries (B, N, D), keys and values (B, M, D) to (B, N, D).

        Args:
            bias: added to the products, (B, heads or 1, N or 1, M).
        """
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.q, queries), (self.k, keys), (self.v, values))
        )
        q, k = q * self.scale, k.transpose(-2, -1)
        out = attention_in_parts(q, k, v) if bias is None else (q @ k + bias).softmax(dim=-1) @ v
        return self.out(out.transpose(1, 2).flatten(2))


def grid_of(official: Sam3Model) -> int:
    """Cells along one side of the image."""
    backbone = official.config.vision_config.backbone_config
    return int(backbone.image_size // backbone.patch_size)


def places_of(official: Sam3Model) -> Tensor:
    """The sine embedding of the image's cells: (1, G^2, D)."""
    grid, width = grid_of(official), official.config.vision_config.fpn_hidden_size
    encoding = official.vision_encoder.neck.position_encoding((1, width, grid, grid), torch.device("cpu"), torch.float32)
    return encoding.flatten(2).transpose(1, 2).contiguous()


def reordered(linear: nn.Linear, order: Tensor) -> nn.Linear:
    """A linear layer with its output channels in another order."""
    other = nn.Linear(linear.in_features, linear.out_features, device="meta")
    other.weight = nn.Parameter(linear.weight.detach()[order], requires_grad=False)
    other.bias = nn.Parameter(linear.bias.detach()[order], requires_grad=False)
    return other


def joined(*layers: nn.Linear) -> nn.Linear:
    """Linear layers with the same input as one, outputs one behind the other."""
    wide = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers), device="meta")
    wide.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]), requires_grad=False)
    wide.bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in layers]), requires_grad=False)
    return wide
