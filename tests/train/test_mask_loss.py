"""The matching of the set loss against costs that are computed pair by pair."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from wsss.train.mask_loss import _matched


@pytest.mark.parametrize("seed", range(12))
def test_the_matching_weighs_the_means_over_pixels_as_mask2former_does(seed: int) -> None:
    """arXiv:2112.01527: 5 times the mean binary cross-entropy, 5 times the dice loss, less 2 times the probability."""
    draw = torch.Generator().manual_seed(seed)
    class_logits, logits = 3 * torch.randn(6, 5, generator=draw), 2 * torch.randn(6, 40, generator=draw)
    classes, masks = torch.tensor([0, 1, 3]), torch.eye(3)[torch.randint(0, 3, (40,), generator=draw)].T
    cost = torch.zeros(6, 3)
    for query in range(6):
        for row, label in enumerate(classes):
            entropy = F.binary_cross_entropy_with_logits(logits[query], masks[row])
            p = logits[query].sigmoid()
            dice = 1 - (2 * (p * masks[row]).sum() + 1) / (p.sum() + masks[row].sum() + 1)
            cost[query, row] = 5 * entropy + 5 * dice - 2 * class_logits[query].softmax(0)[label]
    want_query, want_mask = linear_sum_assignment(cost.numpy())
    query, mask = _matched(class_logits, logits, classes, masks)
    assert (query.tolist(), mask.tolist()) == (want_query.tolist(), want_mask.tolist())
