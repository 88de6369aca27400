"""Swin's feature maps, with constant biases of attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SwinFeatures(nn.Module):
    """The feature maps of transformers' ``SwinBackbone`` for one canvas.

    Required by its merging of batch and windows, which tracing with a free batch must split again in every layer, and by
    masks repeated for every row of the batch. Here the windows are a separate axis.

    Relative position biases and the masks of shifted windows are buffers. TensorRT compiles attention to one kernel only if
    what is added to the scores is a constant: of Swin-T at 1024 x 1024 in half precision all 12, and 11.4 GB of memory traffic
    an image (2 and 12.2 GB with operations on the weights and on a mask of cells). The biases depend only on the weights, the
    masks only on the canvas; blocks of a stage share their mask.

    Args:
        backbone: a ``SwinBackbone``, whose windows never shrink (``always_partition``); its layers are shared, not copied.
        canvas: (height, width) of the pixels.
    """

    @torch.no_grad()
    def __init__(self, backbone: nn.Module, canvas: tuple[int, int]) -> None:
        super().__init__()
        self.backbone = backbone
        patch = backbone.swin.embeddings.patch_embeddings.patch_size
        shape = [-(-pixels // size) for pixels, size in zip(canvas, patch, strict=True)]  # cells of the first stage
        for number, stage in enumerate(backbone.swin.encoder.layers):
            for place, block in enumerate(stage.blocks):
                bias = block.attention.relative_position_bias().detach()  # (1, heads, side^2, side^2)
                self.register_buffer(f"bias{number}_{place}", bias[None].clone(), persistent=False)
                whole = [-(-cells // block.window_size) * block.window_size for cells in shape]
                mask = block.get_attn_mask(*whole, bias.dtype, bias.device)  # (windows, side^2, side^2), None without a shift
                if mask is not None:
                    self.register_buffer(f"mask{number}", mask[None, :, None], persistent=False)
            shape = [(cells + 1) // 2 for cells in shape]

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """A list of (B, C, h, w), finest first, from ``pixels`` (B, 3, H, W) float32, normalized."""
        swin, maps = self.backbone.swin, []
        pad = swin.embeddings.patch_embeddings.maybe_pad(pixels, pixels.shape[2], pixels.shape[3])
        cells = swin.embeddings.norm(swin.embeddings.patch_embeddings.projection(pad).permute(0, 2, 3, 1))  # (B, h, w, C)
        for number, stage in enumerate(swin.encoder.layers):
            for place, block in enumerate(stage.blocks):
                names = [f"bias{number}_{place}", *([f"mask{number}"] if block.shift_size else [])]
                cells = _block(block, cells, [self.get_buffer(name) for name in names])
            if (name := f"stage{number + 1}") in self.backbone.out_features:
                maps.append(self.backbone.hidden_states_norms[name](cells).permute(0, 3, 1, 2))
            if stage.downsample is not None:
                merge = stage.downsample
                even = merge.maybe_pad(cells, cells.shape[1], cells.shape[2])
                quarters = [even[:, row::2, column::2] for column in range(2) for row in range(2)]
                cells = merge.reduction(merge.norm(torch.cat(quarters, -1)))
        return maps


def _block(block: nn.Module, cells: Tensor, biases: Sequence[Tensor]) -> Tensor:
    """One ``SwinLayer`` on (B, h, w, C)."""
    batch, height, width, channels = cells.shape
    side, shift = block.window_size, block.shift_size
    padded, _ = block.maybe_pad(block.layernorm_before(cells), height, width)
    whole_height, whole_width = padded.shape[1:3]
    if shift:
        padded = padded.roll((-shift, -shift), (1, 2))
    rows, columns = whole_height // side, whole_width // side
    windows = padded.reshape(batch, rows, side, columns, side, channels).transpose(2, 3)
    windows = windows.reshape(batch, rows * columns, side * side, channels)
    windows = _attention(block.attention, windows, biases).reshape(batch, rows, columns, side, side, channels)
    merged = windows.transpose(2, 3).reshape(batch, whole_height, whole_width, channels)
    if shift:
        merged = merged.roll((shift, shift), (1, 2))
    cells = cells + merged[:, :height, :width]
    return cells + block.mlp(block.layernorm_after(cells))


def _attention(attention: nn.Module, windows: Tensor, biases: Sequence[Tensor]) -> Tensor:
    """``SwinAttention`` on (B, windows, side^2, C); ``biases`` broadcast to (B, windows, heads, side^2, side^2)."""

    def heads(values: Tensor) -> Tensor:  # (B, windows, heads, side^2, d)
        return values.unflatten(-1, (attention.num_attention_heads, attention.head_dim)).transpose(2, 3)

    queries, keys = heads(attention.q_proj(windows) * attention.scaling), heads(attention.k_proj(windows))
    scores = queries @ keys.transpose(3, 4)
    for bias in biases:
        scores = scores + bias
    return attention.o_proj((scores.softmax(-1) @ heads(attention.v_proj(windows))).transpose(2, 3).flatten(3))
