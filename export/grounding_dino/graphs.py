"""The two modules that are traced for Grounding-DINO: the official layers with a different forward pass.

The layers and weights are transformers'. Only the forward pass is rewritten, because the official one cannot be traced with a
free batch (level shapes as tensors, data-dependent checks), subtracts a maximum over the whole batch, and runs BERT on whole
captions. The gate compares with the official forward pass.

The parts that stay FP32 in half precision were found by rounding every tensor of one part at a time (Swin-T, ``random:0``, a
photograph on 288 x 480). The largest error of a score is 0.036 with only coordinates, box heads, choice and scores in FP32. It
falls to 0.032 with all operations on the tokens in FP32 too, to 0.016 with the sums and norms of all layers, stays there with
the projections of the feature maps, and falls to 0.012 with the last projection of deformable attention. 64 to 84 % of the
input of that projection is common to all cells, so that rounding its weights shifts all cells alike and no later mean removes
the shift. Of the remaining error, Swin in half precision accounts for 0.006. Keeping the decoder, the other projections of
deformable attention or the fusion attention in FP32 too made little difference. In the tokens' self-attention, the products
and the softmax between the projections are in half precision.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection, MMGroundingDinoForObjectDetection
from transformers.models.grounding_dino import modeling_grounding_dino as official

from ..family import Sampling
from ..precision.lowering import Fp32
from ..rewrites import normalize_in_fp32, normalized
from .layers import (
    OFFICIAL_MARGIN,
    Levels,
    Margin,
    additive_mask,
    box_positions,
    call,
    deformable_attention,
    fusion_attention,
    inverse_sigmoid,
    multihead_attention,
    places_of,
    sampler,
    sine_positions,
    text_attention,
)
from .swin import SwinFeatures

MEAN = (123.675, 116.28, 103.53)
"""ImageNet RGB mean, 0-255 scale: (0.485, 0.456, 0.406) * 255 (GroundingDINO, groundingdino/util/inference.py)."""
STD = (58.395, 57.12, 57.375)
"""ImageNet RGB deviation, 0-255 scale: (0.229, 0.224, 0.225) * 255 (same file)."""
EDGE = 1e-6
"""Proposals must lie between 0.01 and 0.99. The outer cells of 50 lie exactly there, and do not count in the official model
(float32 division rounds 49.5 / 50 to 0.99). No other cell of up to 5,000 is so close, and no rounding of a division as large."""
Detector: TypeAlias = GroundingDinoForObjectDetection | MMGroundingDinoForObjectDetection
"""The official classes. MM-Grounding-DINO differs in its class head (`ImageGraph`) and in heads of its own for each layer."""
GROUPS = 32
"""Groups of the norms of the feature maps (transformers' GroundingDinoModel)."""
BEYOND = 1e4
"""Replaces the infinite logits of proposals outside the photo: its sigmoid is also 1, and float16 can represent it."""


class TextGraph(nn.Module):
    """Text features of sub-sentences: BERT, then the projection to the detector's width."""

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.bert = model.model.text_backbone
        self.projection = model.model.text_projection

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Compute the features of P independent sub-sentences.

        Args:
            tokens: (P, L) int64, the word pieces of one sub-sentence and its closing dot; or one [CLS] or [SEP] alone.
            mask: (P, L) bool, True on tokens, False on padding.

        Returns:
            (P, L, D) float32, zeros on padding.
        """
        hidden = self.bert.embeddings(input_ids=tokens, token_type_ids=torch.zeros_like(tokens), position_ids=places(tokens))
        hidden = self.bert.encoder(hidden, attention_mask=additive_mask(mask)[:, None, None, :]).last_hidden_state
        return self.projection(hidden) * mask[..., None]


def places(tokens: Tensor) -> Tensor:
    """(P, L) int64: 0, 1, 2, ... along each row of ``tokens``."""
    return torch.arange(tokens.shape[1], device=tokens.device)[None].expand(tokens.shape[0], -1)


class ImageGraph(nn.Module):
    """Detections of photos on one canvas: Swin, fusion encoder, two-stage queries, decoder.

    Args:
        model: official model; its layers are shared, not copied.
        canvas: (height, width) of the pixels.
        margin: those of ``inverse_sigmoid`` with which the weights were trained.
        sampling: how deformable attention reads between cells, see `sampler`.
        two_products: of `fusion_attention`, for half precision.
    """

    pixel_rows: Tensor
    pixel_columns: Tensor
    sides: Tensor

    def __init__(
        self,
        model: Detector,
        canvas: tuple[int, int],
        margin: Margin = OFFICIAL_MARGIN,
        sampling: Sampling = "grid-sample",
        two_products: bool = False,
    ) -> None:
        super().__init__()
        self.two_products = two_products
        self.margin = margin
        self.core = model.model
        self.class_head, self.box_heads = model.class_embed[-1], model.bbox_embed
        self.queries = model.config.num_queries
        self.shapes = level_shapes(model.config, canvas)
        self.level = Fp32(call, why="projection of the feature maps, whose group norms sum over whole maps")
        self.of_text = Fp32(call, why="the few tokens that all cells and queries read")
        self.stream = Fp32(call, why="sums and norms of the features that run through all layers")
        self.project = Fp32(
            call, why="deformable attention reads similar values everywhere: rounded weights shift all cells alike"
        )
        self.normalize = normalize_in_fp32(MEAN, STD)
        self.swin = SwinFeatures(self.core.backbone.conv_encoder.model, canvas)
        self.geometry = Fp32(self._geometry, why="coordinates and the sines of their multiples")
        self.choose = Fp32(self._choose, why="top-k of near-equal scores, and logits of coordinates")
        self.refine = Fp32(self._refine, why="box heads: the logit of a coordinate cancels near both ends")
        self.place = Fp32(self._place, why="coordinates and the sines of their multiples")
        self.sample = sampler(sampling)
        self.score = Fp32(self._score, why="scores are compared with a threshold in float32")
        table = torch.arange(model.config.max_text_len, dtype=torch.float32)[None, :, None]
        width = model.config.d_model
        self.register_buffer("places", official.encode_sinusoidal_position_embedding(table, width)[0], persistent=False)
        # The pixel rows and columns that the mask of each level reads: those of interpolate(mode="nearest"), so that the
        # masks equal the reference's in every cell.
        for level, shape in enumerate(self.shapes):
            for name, pixels, cells in (("row", canvas[0], shape[0]), ("column", canvas[1], shape[1])):
                index = torch.arange(pixels, dtype=torch.float32)[None, None]
                self.register_buffer(f"{name}{level}", functional.interpolate(index, size=cells)[0].long(), persistent=False)
            for name, values in places_of(shape).items():
                self.register_buffer(f"{name}{level}", values, persistent=False)
        self.register_buffer("pixel_rows", torch.arange(canvas[0])[None, :, None], persistent=False)
        self.register_buffer("pixel_columns", torch.arange(canvas[1])[None, None, :], persistent=False)
        sides = [torch.full((height * width, 2), 0.05 * 2.0**level) for level, (height, width) in enumerate(self.shapes)]
        self.register_buffer("sides", torch.cat(sides)[None], persistent=False)  # (1, N, 2), of the proposals

    def forward(
        self, pixels: Tensor, size: Tensor, text: Tensor, phrase: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Score every query against every token.

        Args:
            pixels: (B, H, W, 3) uint8 RGB, the photo at the top left; pixels outside it are ignored.
            size: (B, 2) int64, height and width of the photo on the canvas, px.
            text: (B, T, D) float32, features of [CLS], the phrases with their dots, [SEP]; padded at the end.
            phrase: (B, T) int64, number of the sub-sentence of each token ([CLS] and [SEP] have their own), -1 = padding.
            position: (B, T) int64, place of each token in its sub-sentence, 0 for [CLS] and [SEP].

        Returns:
            logits: (B, Q, T) float32 before the sigmoid, -inf on padding.
            boxes: (B, Q, 4) float32, center x, center y, width, height in 0..1 of the photo, not of the canvas.
            query: (B, Q) int64, the encoder cell from which each query starts, best first.
        """
        levels, places = self.geometry(size)
        is_token = phrase >= 0
        # ---- encode ----
        vision, vision_position = self._pyramid(pixels, size), places
        text_position = self.places[position]
        same_phrase = additive_mask(phrase[:, :, None] == phrase[:, None, :])[:, None]  # (B, 1, T, T)
        for layer in self.core.encoder.layers:
            vision, text = fusion_attention(
                layer.fusion_layer,
                vision,
                text,
                levels.valid,
                is_token,
                self.of_text,
                self.stream,
                two_products=self.two_products,
            )
            text = self._enhance_text(layer.text_enhancer_layer, text, text_position, same_phrase)
            vision = self._refine_vision(layer.deformable_layer, vision, vision_position, levels)
        # ---- choose queries ----
        query, boxes = self.choose(vision, text, is_token, levels)
        # ---- decode ----
        hidden = self.core.query_position_embeddings.weight[None].expand(boxes.shape[0], -1, -1)
        token_mask = additive_mask(is_token)[:, None, None, :]  # (B, 1, 1, T)
        for layer, head in zip(self.core.decoder.layers, self.core.decoder.bbox_embed, strict=True):
            before = boxes
            hidden = self._decode(layer, hidden, boxes, vision, text, token_mask, levels)
            boxes = self.refine(head, hidden, boxes, self.margin[0])
        # As in the reference, the last boxes come from the normed hidden state and the last layer's input boxes.
        hidden = self.stream(self.core.decoder.layer_norm, hidden)
        boxes = self.refine(self.box_heads[-1], hidden, before, self.margin[1])
        return self.score(hidden, text, is_token), boxes, query

    def _geometry(self, size: Tensor) -> tuple[Levels, Tensor]:
        """The cells that each photo covers, and the (B, N, D) position embeddings of all cells."""
        rows, columns = [], []
        for level in range(len(self.shapes)):
            rows.append(self.get_buffer(f"row{level}") < size[:, 0:1])  # (B, h)
            columns.append(self.get_buffer(f"column{level}") < size[:, 1:2])  # (B, w)
        names = ("row_number", "row_center", "column_number", "column_center")
        places = [{name: self.get_buffer(f"{name}{level}") for name in names} for level in range(len(self.shapes))]
        levels = Levels.from_valid(self.shapes, rows, columns, places)
        sine = self.core.backbone.position_embedding
        positions = [
            sine_positions(rows, columns, sine.embedding_dim, sine.temperature) + self.core.level_embed[level]
            for level, (rows, columns) in enumerate(levels.steps())
        ]
        return levels, torch.cat(positions, 1)

    def _pyramid(self, pixels: Tensor, size: Tensor) -> Tensor:
        """(B, N, D) features of all levels' cells."""
        maps = self.swin(normalized(pixels, size, self.normalize, self.pixel_rows, self.pixel_columns))
        features = [self.level(project, each) for project, each in zip(self.core.input_proj_vision, maps, strict=False)]
        for project in self.core.input_proj_vision[len(maps) :]:
            features.append(self.level(project, maps[-1] if len(features) == len(maps) else features[-1]))
        assert [tuple(each.shape[2:]) for each in features] == self.shapes
        return torch.cat([each.flatten(2).transpose(1, 2) for each in features], 1)

    def _choose(self, vision: Tensor, text: Tensor, is_token: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        """The best cells (B, Q), and their proposed boxes (B, Q, 4)."""
        proposals = torch.cat([levels.centers, self.sides.expand_as(levels.centers)], -1)  # (B, N, 4)
        usable = ((proposals > 0.01 + EDGE) & (proposals < 0.99 - EDGE)).all(-1) & levels.valid
        # Finite also for cells outside the photo; a usable proposal lies between 0.01 and 0.99 and is not clamped.
        proposals = inverse_sigmoid(proposals).masked_fill(~usable[..., None], BEYOND)
        cells = self.core.enc_output_norm(self.core.enc_output(vision * usable[..., None]))
        # Without the encoder's class head: MM-Grounding-DINO's scales all scores and adds a bias, which leaves their order.
        scores = (cells @ text.transpose(1, 2)).masked_fill(~is_token[:, None, :], float("-inf")).amax(-1)  # (B, N)
        query = scores.topk(self.queries, dim=1).indices
        chosen = query[..., None]
        cells = cells.gather(1, chosen.expand(-1, -1, cells.shape[-1]))
        boxes = self.core.encoder_output_bbox_embed(cells) + proposals.gather(1, chosen.expand(-1, -1, 4))
        return query, boxes.sigmoid()

    def _refine(self, head: nn.Module, hidden: Tensor, boxes: Tensor, margin: float) -> Tensor:
        """(B, Q, 4) boxes moved by a head's prediction from the hidden state."""
        return (head(hidden) + inverse_sigmoid(boxes, margin)).sigmoid()

    def _place(self, boxes: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        """The boxes (B, Q, L, 4) in 0..1 of the canvas, and the sines of their coordinates on the first level (B, Q, 2 D)."""
        reference = boxes[:, :, None] * torch.cat([levels.ratios, levels.ratios], -1)[:, None]
        return reference, box_positions(reference[:, :, 0], self.core.config.d_model // 2)

    def _score(self, hidden: Tensor, text: Tensor, is_token: Tensor) -> Tensor:
        logits = hidden @ text.transpose(1, 2)
        bias = getattr(self.class_head, "bias", None)  # only MM-Grounding-DINO has one, and scales
        if bias is not None:
            logits = logits / math.sqrt(hidden.shape[-1]) + bias
        return logits.masked_fill(~is_token[:, None, :], float("-inf"))

    def _enhance_text(self, layer: nn.Module, text: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        seen = text_attention(layer.self_attn, self.of_text(torch.add, text, position), text, mask, self.of_text)
        return self.of_text(_feed_forward, layer, self.of_text(_add_norm, layer.layer_norm_before, text, seen))

    def _refine_vision(self, layer: nn.Module, vision: Tensor, position: Tensor, levels: Levels) -> Tensor:
        seen = deformable_attention(
            layer.self_attn, vision + position, vision, levels.reference, levels, self.sample, self.project
        )
        vision = self.stream(_add_norm, layer.self_attn_layer_norm, vision, seen)
        return self.stream(_add_norm, layer.final_layer_norm, vision, layer.fc2(layer.activation_fn(layer.fc1(vision))))

    def _decode(
        self, layer: nn.Module, hidden: Tensor, boxes: Tensor, vision: Tensor, text: Tensor, token_mask: Tensor, levels: Levels
    ) -> Tensor:
        reference, waves = self.place(boxes, levels)
        place = self.core.decoder.reference_points_head(waves)
        placed = hidden + place
        seen = multihead_attention(layer.self_attn, placed, placed, hidden)
        hidden = self.stream(_add_norm, layer.self_attn_layer_norm, hidden, seen)
        seen = multihead_attention(layer.encoder_attn_text, hidden + place, text, text, token_mask)
        hidden = self.stream(_add_norm, layer.encoder_attn_text_layer_norm, hidden, seen)
        seen = deformable_attention(layer.encoder_attn, hidden + place, vision, reference, levels, self.sample, self.project)
        hidden = self.stream(_add_norm, layer.encoder_attn_layer_norm, hidden, seen)
        return self.stream(_add_norm, layer.final_layer_norm, hidden, layer.fc2(layer.activation_fn(layer.fc1(hidden))))


def _add_norm(norm: nn.Module, stream: Tensor, seen: Tensor) -> Tensor:
    normed: Tensor = norm(stream + seen)
    return normed


def _feed_forward(layer: nn.Module, text: Tensor) -> Tensor:
    return _add_norm(layer.layer_norm_after, text, layer.fc2(layer.activation(layer.fc1(text))))


def lengths_of(model: Detector, canvas: tuple[int, int]) -> tuple[dict[str, int], list[int]]:
    """All lengths in an `ImageGraph` that depend on its canvas, and its amounts of padding: `canvases.Lengths`.

    The sides of the canvas are multiples of Swin's patches; otherwise the first convolution has a padding of its own.
    """
    swin = model.model.backbone.conv_encoder.model.swin
    found: dict[str, int] = {}
    paddings: list[int] = []
    for axis, pixels in zip("hw", canvas, strict=True):
        cells = pixels // model.config.backbone_config.patch_size
        found[f"pixels {axis}"] = pixels
        for number, stage in enumerate(swin.encoder.layers):
            side = stage.blocks[0].window_size
            windows = -(-cells // side)
            found |= {
                f"cells {axis}{number}": cells,
                f"whole windows {axis}{number}": windows * side,
                f"before the shift {axis}{number}": windows * side - side // 2,
                f"windows {axis}{number}": windows,
            }
            paddings.append(windows * side - cells)
            if stage.downsample is not None:
                found[f"even cells {axis}{number}"] = cells + cells % 2
                paddings.append(cells % 2)
                cells = (cells + 1) // 2
    for number in range(len(swin.encoder.layers)):
        found[f"windows {number}"] = found[f"windows h{number}"] * found[f"windows w{number}"]
    start = 0
    for level, (height, width) in enumerate(level_shapes(model.config, canvas)):
        found |= {f"level h{level}": height, f"level w{level}": width, f"level {level}": height * width}
        found[f"group {level}"] = height * width * model.config.d_model // GROUPS
        found |= {f"last row {level}": height - 1, f"last column {level}": width - 1}
        start += height * width
        found[f"levels to {level}"] = start
    for heads in {model.config.encoder_attention_heads, model.config.decoder_attention_heads}:
        found[f"cells of {heads} heads"] = start * heads
    return found, paddings


def other_numbers(model: Detector) -> set[int]:
    """Numbers in an `ImageGraph` that do not depend on its canvas: sizes of weights and settings, and what follows from them."""
    swin, config = model.model.backbone.conv_encoder.model.swin, model.config
    numbers = {*range(9), config.d_model // config.decoder_attention_heads, config.d_model // config.encoder_attention_heads}
    numbers |= {length for weights in model.parameters() for length in weights.shape}
    for settings in (config, config.backbone_config):
        values = settings.to_dict().values()
        numbers |= {
            number
            for value in values
            for number in (value if isinstance(value, (list, tuple)) else [value])
            if isinstance(number, int)
        }
    for stage in swin.encoder.layers:
        block = stage.blocks[0]
        numbers |= {block.window_size**2, block.window_size // 2, block.attention.head_dim}
    points = {config.encoder_n_points, config.decoder_n_points}
    return numbers | {times * config.num_feature_levels * each for each in points for times in (1, 4)}


def level_shapes(config: GroundingDinoConfig, canvas: tuple[int, int]) -> list[tuple[int, int]]:
    """(height, width) in cells of each feature level: Swin's patches, halved and rounded up from stage to stage."""
    backbone = config.backbone_config
    shapes = [(-(-canvas[0] // backbone.patch_size), -(-canvas[1] // backbone.patch_size))]
    first, levels = min(backbone.out_indices) - 1, config.num_feature_levels
    while len(shapes) < first + levels:
        shapes.append(((shapes[-1][0] + 1) // 2, (shapes[-1][1] + 1) // 2))
    return shapes[first:]
