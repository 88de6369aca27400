"""DeepLab v2's head on a dilated encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DeepLabV2(nn.Module):
    """An encoder with dilation instead of strides in the last stages, and a sum of four parallel dilated convolutions.

    ASPP-L of arXiv:1606.00915, section 3.2 and figure 4. Logits have an eighth of the input's size.
    """

    def __init__(self, encoder: nn.Module, width: int, classes: int, rates: tuple[int, ...] = (6, 12, 18, 24)) -> None:
        super().__init__()
        self.encoder = encoder
        self.branches = nn.ModuleList(nn.Conv2d(width, classes, 3, padding=rate, dilation=rate) for rate in rates)
        for branch in self.branches:
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(branch.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.encoder(pixels)[-1]  # (B, width, H / 8, W / 8)
        return torch.stack([branch(features) for branch in self.branches]).sum(dim=0)
