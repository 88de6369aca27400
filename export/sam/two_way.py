"""SAM's two-way transformer, with the projections of image cells moved to the tokens.

For each box, 7 tokens and 4096 image cells attend to each other. The official module projects all cells for each attention, which
is two thirds of the decoder's work. Attention is linear in these projections, so that they can be applied to the few tokens
instead (as in DeepSeek-V2, arXiv:2405.04434, section 2.1.2): with h heads, a cell then meets 7 h = 56 vectors, instead of being
projected to 128 channels. In the first layer cells do not depend on the box yet, and are projected once for each image.
"""

from __future__ import annotations

import torch
from segment_anything.modeling.transformer import Attention, TwoWayTransformer
from torch import Tensor, nn


class TwoWay(nn.Module):
    """``TwoWayTransformer`` for boxes of several images; its parameters are shared, not copied."""

    def __init__(self, official: TwoWayTransformer) -> None:
        super().__init__()
        first, *others = official.layers
        last = official.final_attn_token_to_image
        self.layers, self.last_norm = official.layers, official.norm_final_attn
        self.to_image = nn.ModuleList([ToCells(first.cross_attn_token_to_image, projected=True)])
        self.to_image.extend(ToCells(each) for each in (*(layer.cross_attn_token_to_image for layer in others), last))
        self.to_tokens = nn.ModuleList([OfCells(first.cross_attn_image_to_token, projected=True)])
        self.to_tokens.extend(OfCells(layer.cross_attn_image_to_token) for layer in others)

    def forward(self, cells: Tensor, places: Tensor, tokens: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Cells of I images (I, N, C), their positions (1, N, C), tokens of B boxes (B, T, C) and each box's image (B,) to
        tokens (B, T, C) and cells (B, N, C)."""
        placed = cells + places
        first = self.layers[0]
        keys = first.cross_attn_token_to_image.k_proj(placed).index_select(0, image)
        values = first.cross_attn_token_to_image.v_proj(cells).index_select(0, image)
        asking = first.cross_attn_image_to_token.q_proj(placed).index_select(0, image)
        cells = cells.index_select(0, image)
        queries = tokens
        for number, layer in enumerate(self.layers):
            if number == 0:
                queries = layer.self_attn(q=tokens, k=tokens, v=tokens)
            else:
                asking = keys = cells + places
                values = cells
                queries = queries + layer.self_attn(q=queries + tokens, k=queries + tokens, v=queries)
            queries = layer.norm1(queries)
            queries = layer.norm2(queries + self.to_image[number](queries + tokens, keys, values))
            queries = layer.norm3(queries + layer.mlp(queries))
            cells = layer.norm4(cells + self.to_tokens[number](asking, queries + tokens, queries))
        return self.last_norm(queries + self.to_image[-1](queries + tokens, cells + places, cells)), cells


class ToCells(nn.Module):
    """``attention(q=queries, k=keys, v=values)`` for a few queries (B, T, C) and many keys and values (B, N, C).

    The bias of the keys is left out: it adds the same number to all scores of a query, which changes no softmax.

    Args:
        projected: keys and values are (B, N, D), projected by the caller.
    """

    def __init__(self, attention: Attention, *, projected: bool = False) -> None:
        super().__init__()
        self.attention, self.projected = attention, projected

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        attention = self.attention
        by_head = _heads(attention, attention.q_proj(queries)) * _scale(attention)  # (B, h, T, d)
        wide = by_head @ _of_heads(attention, attention.k_proj, self.projected)  # (B, h, T, C)
        seen = (wide.flatten(1, 2) @ keys.transpose(1, 2)).softmax(dim=-1) @ values  # (B, h T, C)
        of_values = _of_heads(attention, attention.v_proj, self.projected).transpose(-2, -1)
        joined = (seen.unflatten(1, (attention.num_heads, -1)) @ of_values).transpose(1, 2).flatten(2)  # (B, T, D)
        return attention.out_proj(joined if self.projected else joined + attention.v_proj.bias)


class OfCells(nn.Module):
    """``attention(q=cells, k=keys, v=tokens)`` for many cells (B, N, C) and a few keys and tokens (B, T, C).

    Args:
        projected: cells are (B, N, D), projected by the caller.
    """

    def __init__(self, attention: Attention, *, projected: bool = False) -> None:
        super().__init__()
        self.attention, self.projected = attention, projected

    def forward(self, cells: Tensor, keys: Tensor, tokens: Tensor) -> Tensor:
        attention = self.attention
        by_head = _heads(attention, attention.k_proj(keys)) * _scale(attention)  # (B, h, T, d)
        wide = (by_head @ _of_heads(attention, attention.q_proj, self.projected)).flatten(1, 2)  # (B, h T, C)
        scores = cells @ wide.transpose(1, 2)  # (B, N, h T)
        if not self.projected:
            scores = scores + (by_head @ attention.q_proj.bias.reshape(1, attention.num_heads, -1, 1)).flatten(1)[:, None]
        share = scores.unflatten(2, (attention.num_heads, -1)).softmax(dim=-1).flatten(2)
        of_outputs = attention.out_proj.weight.transpose(0, 1).reshape(1, attention.num_heads, -1, tokens.shape[-1])
        return share @ (_heads(attention, attention.v_proj(tokens)) @ of_outputs).flatten(1, 2) + attention.out_proj.bias


def _heads(attention: Attention, projected: Tensor) -> Tensor:
    return projected.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)  # (B, T, D) to (B, h, T, d)


def _of_heads(attention: Attention, linear: nn.Linear, projected: bool) -> Tensor:
    """The part of each head in a projection, (1, h, d, C); of one that is done already, the head's channels, (1, h, d, D)."""
    weight = torch.eye(linear.out_features) if projected else linear.weight
    return weight.reshape(1, attention.num_heads, -1, weight.shape[1])


def _scale(attention: Attention) -> float:
    return (attention.internal_dim // attention.num_heads) ** -0.5
