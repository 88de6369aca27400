"""The set loss of Mask2Former (arXiv:2112.01527, section 3; MaskFormer, arXiv:2107.06278, section 3.2), for semantic labels.

Every class present in an image is one mask, background too. Masks are matched to queries one to one, then each query
learns its class and each matched one its mask, after every decoder layer. Other than in the official code, masks are
compared on all pixels of the logits' grid instead of a random 12,544, so that void and the store's confidence count in
them exactly: void pixels belong to no mask and weigh nothing.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ..batch import VOID
from .args import LossArgs
from .loss import Outputs

CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT, NO_OBJECT_WEIGHT = 2.0, 5.0, 5.0, 0.1
"""arXiv:2112.01527, section 4 (training settings)."""
STRIDE = 4
"""Pixels of the crop for each mask logit."""


class MaskLoss(nn.Module):
    """Cross-entropy over queries, binary cross-entropy and dice over matched masks.

    Outputs are pairs of each decoder layer: class logits (B, Q, C + 1), "no object" last, and mask logits (B, Q, h, w).
    """

    def __init__(self, args: LossArgs, queries: int) -> None:
        super().__init__()
        self.args, self.queries = args, queries

    def weights(self, label: Tensor, confidence: Tensor) -> Tensor:
        """(2,): weighted queries, and masks."""
        masks = torch.stack([_present(each).sum() for each in _on_grid(label)]).float()
        return torch.stack([(masks + NO_OBJECT_WEIGHT * (self.queries - masks)).sum(), masks.sum()])

    def forward(self, outputs: Outputs, label: Tensor, confidence: Tensor, divisors: Tensor) -> Tensor:
        assert isinstance(outputs, tuple)
        small = _on_grid(label)  # (B, h, w)
        total = torch.zeros((), device=label.device)
        for class_logits, mask_logits in outputs:
            for row in range(len(label)):
                classes = _present(small[row]).nonzero()[:, 0]
                total = total + self._image_loss(
                    class_logits[row].float(), mask_logits[row].float(), small[row], classes, confidence[row], divisors
                )
        return total

    def _image_loss(
        self, class_logits: Tensor, mask_logits: Tensor, label: Tensor, classes: Tensor, confidence: Tensor, divisors: Tensor
    ) -> Tensor:
        """One image after one layer: (Q, C + 1), (Q, h, w), (h, w), (M,), (C,), (2,) to a scalar."""
        nothing = class_logits.shape[-1] - 1
        target = torch.full((self.queries,), nothing, device=label.device)
        known = (label != VOID).flatten()
        z = mask_logits.flatten(1)[:, known]  # (Q, P)
        masks = (label.flatten()[known][None] == classes[:, None]).float()  # (M, P)
        sure = confidence.clamp(min=self.args.confidence_floor) if self.args.confidence else torch.ones_like(confidence)
        query, mask = _matched(class_logits, z, classes, masks)
        target[query] = classes[mask]
        weight = torch.ones(nothing + 1, device=label.device)
        weight[nothing] = NO_OBJECT_WEIGHT
        loss = CLASS_WEIGHT * (F.cross_entropy(class_logits, target, reduction="none") * weight[target]).sum() / divisors[0]
        if len(query) and z.shape[1]:
            z, masks = z[query], masks[mask]
            pixel = sure[label.flatten()[known].long()][None]  # (1, P)
            entropy = (F.binary_cross_entropy_with_logits(z, masks, reduction="none") * pixel).sum(1) / pixel.sum()
            p = z.sigmoid()
            dice = 1 - (2 * (p * masks * pixel).sum(1) + 1) / (((p + masks) * pixel).sum(1) + 1)
            loss = loss + (MASK_WEIGHT * entropy + DICE_WEIGHT * dice).sum() / divisors[1].clamp(min=1)
        return loss


def _on_grid(label: Tensor) -> Tensor:
    """(B, H, W) uint8 on the grid of the mask logits: every `STRIDE`-th pixel."""
    return label[:, STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE]


def _present(label: Tensor) -> Tensor:
    """Label values to (255,) bool: which of them occur, void aside."""
    return torch.bincount(label.flatten().long(), minlength=256)[:VOID] > 0


@torch.no_grad()
def _matched(class_logits: Tensor, z: Tensor, classes: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Query and mask of each pair of the cheapest one-to-one matching, costs as the losses are weighed."""
    pixels = max(z.shape[1], 1)
    entropy = (F.softplus(-z) @ masks.T + F.softplus(z) @ (1 - masks).T) / pixels  # (Q, M)
    p = z.sigmoid()
    dice = 1 - (2 * p @ masks.T + 1) / (p.sum(1)[:, None] + masks.sum(1)[None] + 1)
    cost = MASK_WEIGHT * entropy + DICE_WEIGHT * dice - CLASS_WEIGHT * class_logits.softmax(-1)[:, classes]
    query, mask = linear_sum_assignment(np.nan_to_num(cost.cpu().numpy(), nan=1e6, posinf=1e6, neginf=-1e6))
    return torch.as_tensor(query, device=z.device), torch.as_tensor(mask, device=z.device)
