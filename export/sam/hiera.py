"""SAM 2's image encoder (Hiera, arXiv:2306.00989, and a feature pyramid) with a free batch, from transformers' ``Sam2Model``."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.sam2.modeling_sam2 import Sam2Model, Sam2MultiScaleBlock

from ..rewrites import MEAN, STD, attention_in_parts, merged, normalize_in_fp32, windows_of

TENSORS = ("embedding", "features_8", "features_4")
"""The encoder's outputs: of the image's cells (stride 16), and of the pixels of strides 8 and 4 in each cell."""


class Hiera(nn.Module):
    """Photographs (B, S, S, 3) uint8 RGB to `TENSORS`: (B, G^2, D), (B, G^2, 4, D / 4) and (B, G^2, 16, D / 8), G = S / 16.

    As ``Sam2Model.get_image_embeddings``, with channels last throughout. Pixels of the finer maps are in the order of the cells
    that they lie in, in which the decoder adds them (`decoder.Upscale`). The pyramid's projections of these maps, and the
    decoder's of the results, are one matrix each, as nothing lies between them.
    """

    position: Tensor
    no_memory: Tensor

    def __init__(self, official: Sam2Model) -> None:
        super().__init__()
        vision = official.config.vision_config
        assert vision.fpn_top_down_levels == [2, 3] and vision.num_feature_levels == 3 and vision.fpn_kernel_size == 1
        encoder, decoder = official.vision_encoder, official.mask_decoder
        backbone = encoder.backbone
        side = 4 * official.prompt_encoder.image_embedding_size[0]
        self.patches = backbone.patch_embed.projection
        self.register_buffer("position", backbone._get_pos_embed((side, side)).contiguous())
        blocks = []
        for block in backbone.blocks:
            blocks.append(HieraBlock(block, side))
            side = blocks[-1].grid
        self.blocks, self.ends = nn.ModuleList(blocks), tuple(backbone.stage_ends)
        self.top, self.middle, *finer = (linear_of(each) for each in encoder.neck.convs)
        self.features_8, self.features_4 = (
            joined(neck, linear_of(conv)) for neck, conv in zip(finer, (decoder.conv_s1, decoder.conv_s0), strict=True)
        )
        self.register_buffer("no_memory", official.no_memory_embedding)
        self.normalize = normalize_in_fp32(MEAN, STD)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.patches(self.normalize(pixels).permute(0, 3, 1, 2)).permute(0, 2, 3, 1) + self.position
        stages = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in self.ends:
                stages.append(x)
        fine, half, middle, top = stages
        embedding = self.middle(middle) + doubled(self.top(top))  # (B, G, G, D)
        grid = embedding.shape[1]
        return (
            embedding.flatten(1, 2) + self.no_memory,
            in_cells(self.features_8(half), grid),
            in_cells(self.features_4(fine), grid),
        )


class HieraBlock(nn.Module):
    """A block of Hiera (``Sam2MultiScaleBlock``) with a free batch.

    Required by ``window_unpartition``, as in `rewrites.SamBlock`. The official attention also computes a map that it does not
    use. Queries of a long attention are processed in parts.

    Args:
        block: the official block; its parameters are shared, not copied.
        grid: tokens along one side of its input.
    """

    def __init__(self, block: Sam2MultiScaleBlock, grid: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = block.layer_norm1, block.layer_norm2, block.mlp
        self.qkv, self.proj = block.attn.qkv, block.attn.proj
        self.heads, self.scale = block.attn.num_attention_heads, block.attn.scale
        self.widen = block.proj if block.dim != block.dim_out else None
        self.stride = block.query_stride[0] if block.query_stride else 1
        assert self.stride in (1, 2) and (self.stride == 1 or self.widen is not None)
        self.side = block.window_size or grid
        self.grid = grid // self.stride
        """Tokens along one side of the result."""

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, S, S, C) to tokens (B, grid, grid, D)."""
        normed = self.norm1(x)
        if self.widen is not None:
            x = self.widen(normed)
            x = x if self.stride == 1 else pooled(x)
        x = x + merged(self._attend(windows_of(normed, self.side)), self.side // self.stride, self.grid)
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, -1)).unbind(2)  # (B, tokens, heads x channels) each
        if self.stride == 2:
            q = pooled(q.unflatten(1, (self.side, self.side))).flatten(1, 2)
        q, k, v = (each.unflatten(2, (self.heads, -1)).transpose(1, 2) for each in (q, k, v))
        out = attention_in_parts(q * self.scale, k.transpose(-2, -1), v)
        return self.proj(out.transpose(1, 2).flatten(2))


def pooled(x: Tensor) -> Tensor:
    """The largest of each 2 x 2 tokens of (B, S, S, C), one axis at a time: (B, S / 2, S / 2, C), as ``do_pool``."""
    return x.unflatten(2, (-1, 2)).amax(3).unflatten(1, (-1, 2)).amax(2)


def doubled(x: Tensor) -> Tensor:
    """Each of (B, G, G, D) four times: (B, 2 G, 2 G, D)."""
    rows, columns, channels = x.shape[1:]
    return x[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1).reshape(-1, 2 * rows, 2 * columns, channels)


def in_cells(maps: Tensor, grid: int) -> Tensor:
    """Maps (B, S, S, C) to the pixels of each cell (B, G^2, (S / G)^2, C): its quarters, and theirs in turn."""
    halvings = (maps.shape[1] // grid).bit_length() - 1
    sides = [grid, *[2] * halvings]
    axes = [axis for level in range(len(sides)) for axis in (1 + level, 1 + len(sides) + level)]
    split = maps.reshape(-1, *sides, *sides, maps.shape[3]).permute(0, *axes, 2 * len(sides) + 1)
    return split.reshape(-1, grid * grid, 4**halvings, maps.shape[3])


def linear_of(conv: nn.Conv2d) -> nn.Linear:
    """A 1 x 1 convolution for channels that come last."""
    linear = nn.Linear(conv.in_channels, conv.out_channels, device="meta")
    linear.weight = nn.Parameter(conv.weight.detach()[:, :, 0, 0], requires_grad=False)
    linear.bias = conv.bias
    return linear


def joined(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """Two linear layers as one."""
    linear = nn.Linear(first.in_features, second.out_features, device="meta")
    weight, bias = (value.detach().double() for value in (second.weight, second.bias))
    linear.weight = nn.Parameter((weight @ first.weight.double()).float(), requires_grad=False)
    linear.bias = nn.Parameter((weight @ first.bias.double() + bias).float(), requires_grad=False)
    return linear
