"""Pixel losses.

A loss is a weighted sum over the pixels divided by the sum of the weights. That divisor is an argument: it is first summed over
all forward passes of a step and over all processes, so that a step's gradient does not depend on how its batch is divided. A
mean of means would depend on it, because void pixels are not distributed evenly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import VOID
from .args import LossArgs

Outputs: TypeAlias = Tensor | tuple[tuple[Tensor, Tensor], ...]
"""Outputs of a network in training: logits (B, C, H, W), or the masks of a set predictor (see `mask_loss`)."""

LOG_ZERO = -4.0
"""Value of log 0 in the reverse cross-entropy (arXiv:1908.06112, section 4.1, A = -4)."""


class Criterion(Protocol):
    """A loss with divisors that depend only on the labels."""

    def weights(self, label: Tensor, confidence: Tensor) -> Tensor:
        """(K,) float32: this batch's contribution to each divisor."""
        ...

    def __call__(self, outputs: Outputs, label: Tensor, confidence: Tensor, divisors: Tensor) -> Tensor:
        """The batch's share of the loss, a scalar.

        Args:
            outputs: outputs of the network in training.
            label: (B, H, W) uint8, 255 is ignored.
            confidence: (B, C) float32 >= 0, background first; 1 is the mean of a class (`wsss.train.data.ranked_confidence`). Or
                (B, H, W), of each pixel.
            divisors: (K,) sums of ``weights`` over the complete step.
        """
        ...


class PixelLoss(nn.Module):
    """Cross-entropy over pixels and its variants for noisy labels, weighted by class and by the store's confidence.

    - ``cross-entropy``: -log p(y).
    - ``bootstrapped``: the label is mixed with the network's own probabilities, Reed et al., arXiv:1412.6596, section 3.1
      (soft): -sum_k [b t_k + (1 - b) p_k] log p_k.
    - ``symmetric``: a CE + b RCE, where RCE = -sum_k p_k log t_k swaps the two and log 0 is `LOG_ZERO`, Wang et al.,
      arXiv:1908.06112, equation 7. RCE is bounded, so a wrong label cannot dominate.
    - ``generalized``: (1 - p(y)^q) / q, Zhang and Sabuncu, arXiv:1805.07836, equation 6.
    - ``hard``: -log p(y) where p(y) is below a threshold (online hard example mining, mmsegmentation's ``OHEMPixelSampler``,
      without its least number of pixels, which would depend on how a batch is divided). The mean stays one over all pixels.

    ``region`` adds the mean over images of the soft Dice loss (over the classes in the image), or of the Lovasz-softmax loss
    (arXiv:1705.08790), both of segmentation-models-pytorch. They have no weights by class or confidence.

    Args:
        class_weights: (C,) float32 or None.
    """

    class_weights: Tensor | None

    def __init__(self, args: LossArgs, class_weights: Tensor | None = None) -> None:
        super().__init__()
        self.args = args
        self.region = _region_loss(args.region)
        self.register_buffer("class_weights", class_weights, persistent=False)

    def pixel_weights(self, label: Tensor, confidence: Tensor) -> Tensor:
        """(B, H, W) float32, 0 where the label is void."""
        sure, known = sure_pixels(label, confidence, self.args), label != VOID
        if self.class_weights is not None:
            sure = sure * self.class_weights[torch.where(known, label, 0).long()]
        return torch.where(known, sure, 0)

    def weights(self, label: Tensor, confidence: Tensor) -> Tensor:
        labeled = (label != VOID).flatten(1).any(dim=1).sum()
        return torch.stack([self.pixel_weights(label, confidence).sum(), labeled])

    def forward(self, outputs: Outputs, label: Tensor, confidence: Tensor, divisors: Tensor) -> Tensor:
        assert isinstance(outputs, Tensor)
        logits, y = outputs.float(), label.long()  # (B, C, H, W), (B, H, W)
        cross_entropy = loss = F.cross_entropy(logits, y, ignore_index=VOID, reduction="none")  # (B, H, W)
        if self.args.kind == "bootstrapped":
            log_p = F.log_softmax(logits, dim=1)
            entropy = -(log_p.exp() * log_p).sum(dim=1)
            loss = self.args.bootstrap * cross_entropy + (1 - self.args.bootstrap) * entropy
        elif self.args.kind == "symmetric":
            forward, reverse = self.args.symmetric
            others = 1 - torch.exp(-cross_entropy)  # sum of p_k over k != y
            loss = forward * cross_entropy - reverse * LOG_ZERO * others
        elif self.args.kind == "generalized":
            loss = (1 - torch.exp(-self.args.generalized * cross_entropy)) / self.args.generalized
        elif self.args.kind == "hard":
            loss = cross_entropy * (cross_entropy > -math.log(self.args.hard))
        total = (loss * self.pixel_weights(label, confidence)).sum() / divisors[0].clamp(min=1e-6)
        if self.region is not None:
            rows = (label != VOID).flatten(1).any(dim=1).nonzero()[:, 0].tolist()  # waits for the device
            regions = [self.region(logits[row : row + 1], y[row : row + 1]) for row in rows]
            total = total + self.args.region_weight * sum(regions, start=0 * total) / divisors[1].clamp(min=1)
        return total


def sure_pixels(label: Tensor, confidence: Tensor, args: LossArgs) -> Tensor:
    """The weight of every pixel by its confidence, (B, H, W) float32; that of void pixels means nothing.

    Args:
        label, confidence: as in `Criterion`.
    """
    if args.confidence == "off":
        return torch.ones(label.shape, device=label.device)
    sure = confidence.clamp(min=args.confidence_floor)
    if sure.ndim == label.ndim:
        return sure
    by_value = F.pad(sure, (0, 256 - sure.shape[1]))  # (B, 256)
    return by_value.gather(1, label.flatten(1).long()).view(label.shape)


def _region_loss(kind: str) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Logits (1, C, H, W) and label (1, H, W) int64 to a scalar."""
    if kind == "none":
        return None
    from segmentation_models_pytorch.losses import DiceLoss, LovaszLoss

    return DiceLoss("multiclass", ignore_index=VOID) if kind == "dice" else LovaszLoss("multiclass", ignore_index=VOID)
