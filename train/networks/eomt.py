"""EoMT: masks and classes from a plain vision transformer alone (arXiv:2503.19108)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

ANNEALING_POWER = 0.9
"""``poly_power`` of tue-mps/eomt 7bd19dd, training/mask_classification_semantic.py:31."""
STRIDE = 4
"""Pixels per mask logit."""


class EoMT(nn.Module):
    """A vision transformer with queries among the tokens of its last blocks, which become the classes and the masks.

    Before each of these blocks, a query predicts its mask, and sees only the patches in it. The share of the queries that do so
    falls from 1 to 0 while the training proceeds (`anneal`), so that in the end the blocks are those of any vision transformer.
    In training, these queries are drawn at random for every image. In evaluation, they are the first ones, so that predictions
    and exported graphs are certain; the official code draws there too.

    Tensors have the names of the official code. A new network is at the end of its training.

    Args:
        encoder: a vision transformer of timm with ``dynamic_img_size``, changed to have queries in its last blocks.
        stride: pixels per patch: 8, 16, 32, ...
        classes: number of labels with background.
        queries: number of masks per image, Q. blocks: number of last blocks with queries.
        annealing: shares of the training at which the first of these blocks begins to lose its masks, and at which it has lost
            them; the same two for the next blocks. By default blocks follow each other, as in the official configurations with
            DINOv2.
    """

    probability: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        stride: int,
        classes: int,
        queries: int = 100,
        blocks: int = 4,
        annealing: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        depth, width = len(encoder.blocks), encoder.embed_dim
        if stride < 2 * STRIDE or stride & (stride - 1):
            raise ValueError(f"patch_size: expected a power of 2 from {2 * STRIDE} on, got {stride}")
        if queries < 1 or not 1 <= blocks <= depth:
            raise ValueError(f"expected queries from 1 on and 1 to {depth} blocks, got {queries} and {blocks}")
        annealing = annealing or [share / (blocks + 2) for block in range(1, blocks + 1) for share in (block, block + 1)]
        if len(annealing) != 2 * blocks or not all(0 <= a < b <= 1 for a, b in zip(annealing[::2], annealing[1::2], strict=True)):
            raise ValueError(f"annealing: expected {blocks} pairs of rising shares of the training, got {list(annealing)}")
        self.encoder, self.blocks, self.annealing = encoder, blocks, list(zip(annealing[::2], annealing[1::2], strict=True))
        self.q = nn.Embedding(queries, width)
        self.class_head = nn.Linear(width, classes + 1)
        self.mask_head = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )
        self.upscale = nn.Sequential(*(Upscale(width) for _ in range(int(math.log2(stride // STRIDE)))))
        for block in encoder.blocks[-blocks:]:
            if hasattr(block.attn, "num_prefix_tokens"):  # positions by rotation: queries have none, like class tokens
                block.attn.num_prefix_tokens += queries
        self.register_buffer("probability", torch.zeros(blocks), persistent=False)
        self.anneal(1.0)

    def anneal(self, done: float) -> None:
        """Set the masks of every block to those where a share ``done`` of the training's steps is done."""
        shares = [masked_share(done, start, end) for start, end in self.annealing]
        self.probability.copy_(torch.tensor(shares))  # a tensor, which torch.compile does not take for a constant
        self.masked = [round(share * self.q.num_embeddings) for share in shares]

    def forward(self, pixels: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Predictions before each block with masks, and after the last block.

        Args:
            pixels: (B, 3, H, W) float, normalized.

        Returns:
            Pairs of class logits (B, Q, C + 1), "no object" last, and mask logits (B, Q, H / 4, W / 4).
        """
        encoder = self.encoder
        x = encoder.patch_embed(pixels)  # (B, h, w, D)
        grid = x.shape[1], x.shape[2]
        x = encoder._pos_embed(x)
        x, rotation = x if isinstance(x, tuple) else (x, None)
        x = encoder.norm_pre(x)  # (B, N, D): class and register tokens, then those of the patches
        more = {} if rotation is None else {"rope": rotation}
        found = []
        for number, block in enumerate(encoder.blocks, self.blocks - len(encoder.blocks)):
            mask = None
            if number == 0:
                x = torch.cat((self.q.weight.expand(x.shape[0], -1, -1), x), dim=1)
            if number >= 0 and (self.training or self.masked[number]):
                found.append(self._predict(x, grid))
                mask = self._attention_mask(found[-1][1], number, grid, x.shape[1])
            x = block(x, attn_mask=mask, **more)
        return *found, self._predict(x, grid)

    def _predict(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        x = self.encoder.norm(x)
        queries, patches = x[:, : self.q.num_embeddings], x[:, -grid[0] * grid[1] :]
        features = self.upscale(patches.transpose(1, 2).unflatten(2, grid))  # (B, D, H / 4, W / 4)
        return self.class_head(queries), torch.einsum("bqd,bdhw->bqhw", self.mask_head(queries), features)

    def _attention_mask(self, mask_logits: Tensor, number: int, grid: tuple[int, int], tokens: int) -> Tensor:
        """(B, 1, N, N) bool: which token may see which. A masked query sees the patches in its mask, and all other tokens."""
        seen = F.interpolate(mask_logits, grid, mode="bilinear", align_corners=False).flatten(2) > 0  # (B, Q, h w)
        batch, queries, patches = seen.shape
        if self.training:
            seen |= torch.rand(batch, queries, 1, device=seen.device) > self.probability[number]
        else:
            seen |= (torch.arange(queries, device=seen.device) >= self.masked[number])[:, None]
        rows = torch.cat((seen.new_ones(batch, queries, tokens - patches), seen), dim=2)
        return torch.cat((rows, seen.new_ones(batch, tokens - queries, tokens)), dim=1)[:, None]


class Upscale(nn.Module):
    """Features (B, D, h, w) at twice the resolution, (B, D, 2 h, 2 w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = LayerNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv2(self.act(self.conv1(x))))


def masked_share(done: float, start: float, end: float) -> float:
    """The share of a block's queries that have a mask: 1 until ``start``, 0 from ``end`` on, in shares of the training.

    ``mask_annealing`` of tue-mps/eomt 7bd19dd, training/lightning_module.py:199.
    """
    return (1 - min(max((done - start) / (end - start), 0.0), 1.0)) ** ANNEALING_POWER
