"""DINOv2's linear head on a plain vision transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class VisionTransformer(nn.Module):
    """A plain vision transformer and DINOv2's linear head: a batch norm and a 1 x 1 convolution on its last layers' tokens.

    DINOv2, arXiv:2304.07193, section 7.4 ("linear" with the last four layers). Logits have a patch's stride.

    Args:
        encoder: a model of timm with ``forward_intermediates``. layers: number of last layers whose tokens are concatenated.
    """

    def __init__(self, encoder: nn.Module, width: int, classes: int, layers: int = 4) -> None:
        super().__init__()
        self.encoder, self.layers = encoder, layers
        self.norm = nn.BatchNorm2d(width * layers)
        self.head = nn.Conv2d(width * layers, classes, 1)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.encoder.forward_intermediates(pixels, indices=self.layers, norm=True, intermediates_only=True)
        return self.head(self.norm(torch.cat(features, dim=1)))  # (B, C, H / patch, W / patch)
