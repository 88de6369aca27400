"""The set loss of Mask2Former (arXiv:2112.01527, section 3; MaskFormer, arXiv:2107.06278, section 3.2), for semantic labels.

Every class in an image, including background, is one mask. Masks are matched to queries one to one; then, after every decoder
layer, each query learns its class and each matched query its mask. Unlike the official code, masks are compared on all pixels of
the logits' grid instead of 12,544 random ones, so that void and the store's confidence are exact: void pixels belong to no mask
and have no weight.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ..batch import VOID
from .args import LossArgs
from .loss import Outputs, sure_pixels

CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT, NO_OBJECT_WEIGHT = 2.0, 5.0, 5.0, 0.1
"""arXiv:2112.01527, section 4 (training settings)."""
STRIDE = 4
"""Pixels of the crop per mask logit."""


class MaskLoss(nn.Module):
    """Cross-entropy over queries, binary cross-entropy and dice over matched masks.

    Outputs are a pair for each decoder layer: class logits (B, Q, C + 1), "no object" last, and mask logits (B, Q, h, w).
    """

    def __init__(self, args: LossArgs, queries: int) -> None:
        super().__init__()
        self.args, self.queries = args, queries

    def weights(self, label: Tensor, confidence: Tensor) -> Tensor:
        """(2,): sum of the query weights, and number of masks."""
        masks = torch.stack([_present(image).sum() for image in _on_grid(label)]).float()
        return torch.stack([(masks + NO_OBJECT_WEIGHT * (self.queries - masks)).sum(), masks.sum()])

    def forward(self, outputs: Outputs, label: Tensor, confidence: Tensor, divisors: Tensor) -> Tensor:
        assert isinstance(outputs, tuple)
        small = _on_grid(label)  # (B, h, w)
        sure = sure_pixels(small, _on_grid(confidence) if confidence.ndim == label.ndim else confidence, self.args)
        total = torch.zeros((), device=label.device)
        for class_logits, mask_logits in outputs:
            for row in range(len(label)):
                classes = _present(small[row]).nonzero()[:, 0]
                total = total + self._image_loss(
                    class_logits[row].float(), mask_logits[row].float(), small[row], classes, sure[row], divisors
                )
        return total

    def _image_loss(
        self, class_logits: Tensor, mask_logits: Tensor, label: Tensor, classes: Tensor, sure: Tensor, divisors: Tensor
    ) -> Tensor:
        """The loss of one image and one layer: (Q, C + 1), (Q, h, w), (h, w), (M,), (h, w), (2,) to a scalar."""
        nothing = class_logits.shape[-1] - 1
        target = torch.full((self.queries,), nothing, device=label.device)
        known = (label != VOID).flatten()
        z = mask_logits.flatten(1)[:, known]  # (Q, P)
        masks = (label.flatten()[known][None] == classes[:, None]).float()  # (M, P)
        query, mask = _matched(class_logits, z, classes, masks)
        target[query] = classes[mask]
        weight = torch.ones(nothing + 1, device=label.device)
        weight[nothing] = NO_OBJECT_WEIGHT
        loss = CLASS_WEIGHT * (F.cross_entropy(class_logits, target, reduction="none") * weight[target]).sum() / divisors[0]
        if len(query) and z.shape[1]:
            z, masks = z[query], masks[mask]
            pixel = sure.flatten()[known][None]  # (1, P)
            entropy = (F.binary_cross_entropy_with_logits(z, masks, reduction="none") * pixel).sum(1) / pixel.sum()
            p = z.sigmoid()
            dice = 1 - (2 * (p * masks * pixel).sum(1) + 1) / (((p + masks) * pixel).sum(1) + 1)
            loss = loss + (MASK_WEIGHT * entropy + DICE_WEIGHT * dice).sum() / divisors[1].clamp(min=1)
        return loss


def _on_grid(label: Tensor) -> Tensor:
    """A map (B, H, W) on the grid of the mask logits: every `STRIDE`-th pixel."""
    return label[:, STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE]


def _present(label: Tensor) -> Tensor:
    """(255,) bool: which label values other than void occur."""
    return torch.bincount(label.flatten().long(), minlength=256)[:VOID] > 0


@torch.no_grad()
def _matched(class_logits: Tensor, z: Tensor, classes: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of query and mask of each pair in the cheapest one-to-one matching, with the weights of the losses."""
    pixels = max(z.shape[1], 1)
    entropy = (F.softplus(-z) @ masks.T + F.softplus(z) @ (1 - masks).T) / pixels  # (Q, M)
    p = z.sigmoid()
    dice = 1 - (2 * p @ masks.T + 1) / (p.sum(1)[:, None] + masks.sum(1)[None] + 1)
    cost = MASK_WEIGHT * entropy + DICE_WEIGHT * dice - CLASS_WEIGHT * class_logits.softmax(-1)[:, classes]
    query, mask = linear_sum_assignment(np.nan_to_num(cost.cpu().numpy(), nan=1e6, posinf=1e6, neginf=-1e6))
    return torch.as_tensor(query, device=z.device), torch.as_tensor(mask, device=z.device)
