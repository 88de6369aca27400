"""SAM 3's part that reads the phrase: DETR encoder and decoder, and masks, for rows of an image and a phrase.

From transformers' ``Sam3Model``, for prompts without boxes. Each row is an image of the call and a phrase: phrases of several
photographs share a call, and a photograph's features are gathered for its phrases inside the graph.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Sam3Model
from transformers.models.sam3.modeling_sam3 import Sam3DetrDecoder, Sam3DetrDecoderLayer, box_cxcywh_to_xyxy, inverse_sigmoid

from ..precision.lowering import Fp32
from .vision import Attention, SelfAttention, grid_of, places_of

MASKED = -1e4
"""Added to the attention of padded tokens: exp(-1e4) is 0 in float32 and float16."""


class Text(nn.Module):
    """Phrases (P, L) int64 and which tokens count (P, L) bool to features (P, L, D), 0 in the padding.

    The text encoder is causal, so that padding behind a phrase changes nothing in it.
    """

    later: Tensor

    def __init__(self, official: Sam3Model) -> None:
        super().__init__()
        self.encoder, self.project = official.text_encoder.text_model, official.text_projection
        config = official.config.text_config
        self.heads = config.num_attention_heads
        length = config.max_position_embeddings
        self.register_buffer("later", torch.full((length, length), MASKED).triu(1)[None, None])

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        tables = self.encoder.embeddings
        x = tables.token_embedding(tokens) + tables.position_embedding.weight
        for layer in self.encoder.encoder.layers:
            x = x + self._attend(layer.self_attn, layer.layer_norm1(x))
            x = x + layer.mlp(layer.layer_norm2(x))
        return torch.where(mask[..., None], self.project(self.encoder.final_layer_norm(x)), 0.0)

    def _attend(self, attention: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        out = ((q * attention.scale) @ k.transpose(-2, -1) + self.later).softmax(dim=-1) @ v
        projected: Tensor = attention.out_proj(out.transpose(1, 2).flatten(2))
        return projected


class Detector(nn.Module):
    """Embeddings of I images (I, G^2, D), and rows of a phrase's features (R, L, D), its tokens (R, L) bool and its image (R,).

    Returns:
        ``logits`` (R, Q) and ``presence`` (R,), whose sigmoids multiply to scores; ``boxes`` (R, Q, 4), x0, y0, x1, y1 in 0..1 of
        the image; ``queries`` (R, Q, D), mask embeddings, and ``encoded`` (R, G^2, D), the image in view of the phrase, for
        `Outline`.
    """

    places: Tensor

    def __init__(self, official: Sam3Model) -> None:
        super().__init__()
        encoder, decoder, masks = official.detr_encoder, official.detr_decoder, official.mask_decoder
        numbers = range(len(encoder.layers))
        self.selves = nn.ModuleList(SelfAttention(official, number) for number in numbers[1:])  # the first is in `Vision`
        self.text_norms = nn.ModuleList(layer.layer_norm2 for layer in encoder.layers)
        self.texts = nn.ModuleList(Attention(layer.cross_attn) for layer in encoder.layers)
        self.mlp_norms = nn.ModuleList(layer.layer_norm3 for layer in encoder.layers)
        self.mlps = nn.ModuleList(layer.mlp for layer in encoder.layers)
        self.decoder = Decoder(decoder, grid_of(official))
        self.scoring = official.dot_product_scoring
        self.prompt_norm, self.prompt = masks.prompt_cross_attn_norm, Attention(masks.prompt_cross_attn)
        self.mask_embedder = masks.mask_embedder
        self.register_buffer("places", places_of(official))

    def forward(self, embedding: Tensor, text: Tensor, mask: Tensor, image: Tensor) -> tuple[Tensor, ...]:
        padding = torch.where(mask, 0.0, MASKED)[:, None, None]  # (R, 1, 1, L)
        x = embedding.index_select(0, image)
        for number, (norm, attend) in enumerate(zip(self.text_norms, self.texts, strict=True)):
            if number:
                x = self.selves[number - 1](x)
            x = x + attend(norm(x), text, text, padding)
            x = x + self.mlps[number](self.mlp_norms[number](x))
        hidden, boxes, presence = self.decoder(x, self.places, text, padding)
        encoded = x + self.prompt(self.prompt_norm(x), text, text, padding)
        return self._scores(hidden, text, mask), presence, boxes, self.mask_embedder(hidden), encoded

    def _scores(self, hidden: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """As ``Sam3DotProductScoring``: (R, Q)."""
        scoring = self.scoring
        words = scoring.text_mlp_out_norm(scoring.text_mlp(text) + text)
        valid = mask[..., None].to(words.dtype)
        mean = (words * valid).sum(dim=1) / valid.sum(dim=1)
        products = scoring.query_proj(hidden) @ (scoring.text_proj(mean) * scoring.scale)[..., None]
        return products[..., 0].clamp(-scoring.clamp_max_val, scoring.clamp_max_val)


class Decoder(nn.Module):
    """``Sam3DetrDecoder``: (R, G^2, D) to queries (R, Q, D), boxes (R, Q, 4) x0, y0, x1, y1 in 0..1, presence logits (R,)."""

    tokens: Tensor
    start: Tensor
    coords: Tensor

    def __init__(self, official: Sam3DetrDecoder, grid: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(layer) for layer in official.layers)
        self.norm, self.box_head = official.output_layer_norm, official.box_head
        self.presence_norm, self.presence_head = official.presence_layer_norm, official.presence_head
        self.most = official.clamp_presence_logit_max_val
        self.position_head, self.bias_x, self.bias_y = official.ref_point_head, official.box_rpb_embed_x, official.box_rpb_embed_y
        encoding = official.position_encoding
        self.waves = Fp32(encoding.encode_boxes, why="phases of box corners")
        self.refine = Fp32(_refined, why="boxes are sums of steps, and near an edge of the photograph their logits are large")
        self.distances = Fp32(_distances, why="differences of near coordinates")
        self.corners = Fp32(box_cxcywh_to_xyxy, why="boxes are outputs")
        self.register_buffer("tokens", torch.cat([official.presence_token.weight, official.query_embed.weight])[None])
        self.register_buffer("start", official.reference_points.weight.sigmoid()[None])
        self.register_buffer("coords", torch.arange(grid, dtype=torch.float32) / grid)

    def forward(self, image: Tensor, places: Tensor, text: Tensor, padding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = image.shape[0]
        hidden, boxes = self.tokens.expand(rows, -1, -1), self.start.expand(rows, -1, -1)
        keys = image + places
        for layer in self.layers:
            position = F.pad(self.position_head(self.waves(boxes)), (0, 0, 1, 0))  # none for the presence token
            hidden = layer(hidden, position, text, padding, image, keys, self._bias(boxes))
            boxes = self.refine(self.box_head(self.norm(hidden[:, 1:])), boxes)
        presence = self.presence_head(self.presence_norm(hidden[:, 0]))[:, 0].clamp(-self.most, self.most)
        return self.norm(hidden[:, 1:]), self.corners(boxes), presence

    def _bias(self, boxes: Tensor) -> Tensor:
        """The bias of attention by a cell's place relative to a box, (R, heads, 1 + Q, G^2); none for the presence token."""
        x, y = self.distances(boxes, self.coords)  # (R, Q, G, 2) each
        bias = self.bias_y(y)[:, :, :, None] + self.bias_x(x)[:, :, None]  # (R, Q, G, G, heads)
        return F.pad(bias.flatten(2, 3).permute(0, 3, 1, 2), (0, 0, 1, 0))


def _refined(step: Tensor, boxes: Tensor) -> Tensor:
    return (step + inverse_sigmoid(boxes)).sigmoid()


def _distances(boxes: Tensor, coords: Tensor) -> tuple[Tensor, Tensor]:
    """Distances of cells to the edges of boxes on a logarithmic scale, as ``_get_rpb_matrix``: x and y, (R, Q, G, 2) each."""
    corners = box_cxcywh_to_xyxy(boxes)
    deltas = [8 * (coords[:, None] - edges[:, :, None]) for edges in (corners[..., 0::2], corners[..., 1::2])]
    x, y = (delta.sign() * torch.log2(delta.abs() + 1.0) / math.log2(8) for delta in deltas)
    return x, y


class DecoderLayer(nn.Module):
    """``Sam3DetrDecoderLayer``."""

    def __init__(self, official: Sam3DetrDecoderLayer) -> None:
        super().__init__()
        self.itself, self.text, self.image = (
            Attention(each) for each in (official.self_attn, official.text_cross_attn, official.vision_cross_attn)
        )
        self.norms = nn.ModuleList(
            (
                official.self_attn_layer_norm,
                official.text_cross_attn_layer_norm,
                official.vision_cross_attn_layer_norm,
                official.mlp_layer_norm,
            )
        )
        self.mlp = official.mlp

    def forward(
        self, hidden: Tensor, position: Tensor, text: Tensor, padding: Tensor, image: Tensor, keys: Tensor, bias: Tensor
    ) -> Tensor:
        placed = hidden + position
        hidden = self.norms[0](hidden + self.itself(placed, placed, hidden))
        hidden = self.norms[1](hidden + self.text(hidden + position, text, text, padding))
        hidden = self.norms[2](hidden + self.image(hidden + position, keys, image, bias))
        normed: Tensor = self.norms[3](hidden + self.mlp(hidden))
        return normed


class Outline(nn.Module):
    """Mask logits (N, 4 G, 4 G) of queries that were chosen among those of `Detector`.

    Inputs: ``encoded`` (R, G^2, D) and ``queries`` (R, Q, D) of the detector; ``features_2x`` (I, D, 2 G, 2 G) and
    ``features_4x`` (I, D, 4 G, 4 G) of its images; ``row`` (H,), those of the R rows that have a chosen query, and ``image``
    (H,), their images; ``query`` (H, K), the places of their chosen queries in (R Q), filled up with any; ``pick`` (N,), the
    places of those to return in (H K). Rows without a chosen query, classes that are not in a photograph, cost nothing here.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, official: Sam3Model) -> None:
        super().__init__()
        masks = official.mask_decoder
        self.grid = grid_of(official)
        self.convs, self.norms = masks.pixel_decoder.conv_layers, masks.pixel_decoder.norms
        # The projection is one matrix for all pixels: it is applied to the queries instead, which are fewer.
        self.register_buffer("weight", masks.instance_projection.weight.detach()[:, :, 0, 0])
        self.register_buffer("bias", masks.instance_projection.bias.detach())

    def forward(
        self,
        encoded: Tensor,
        queries: Tensor,
        features_2x: Tensor,
        features_4x: Tensor,
        row: Tensor,
        image: Tensor,
        query: Tensor,
        pick: Tensor,
    ) -> Tensor:
        x = encoded.index_select(0, row).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        for conv, norm, finer in zip(self.convs, self.norms, (features_2x, features_4x), strict=False):  # one more conv is unused
            x = group_norm(conv(doubled(x) + finer.index_select(0, image)), norm).relu()
        chosen = queries.flatten(0, 1)[query]  # (H, K, D)
        logits = (chosen @ self.weight) @ x.flatten(2) + (chosen @ self.bias)[..., None]  # (H, K, 16 G^2)
        side = 4 * self.grid
        return logits.reshape(-1, side, side).index_select(0, pick)


def doubled(x: Tensor) -> Tensor:
    """Maps (B, C, S, S), each pixel four times: (B, C, 2 S, 2 S)."""
    side = x.shape[2]
    return x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2).reshape(-1, x.shape[1], 2 * side, 2 * side)


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """``nn.GroupNorm`` as a LayerNormalization, whose statistics are in float32 for any input type."""
    groups = x.unflatten(1, (norm.num_groups, -1)).flatten(2)  # (B, groups, values)
    normal = F.layer_norm(groups, groups.shape[2:], eps=norm.eps).reshape(x.shape)
    return normal * norm.weight[:, None, None] + norm.bias[:, None, None]
