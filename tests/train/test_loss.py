"""Losses against their papers' formulas, written out pixel by pixel; void; and that a batch may be divided anyhow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.train.args import LossArgs
from wsss.train.loss import PixelLoss
from wsss.train.mask_loss import MaskLoss, _matched

CLASSES = 4


def example(rows: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, CLASSES, 8, 12, generator=rng) * 2
    label = torch.randint(0, CLASSES, (rows, 8, 12), generator=rng, dtype=torch.uint8)
    label[0, :6] = 255
    label[1, 0, 0] = 255
    return logits, label, torch.rand(rows, CLASSES, generator=rng)


def value(criterion: Any, outputs: Any, label: Tensor, confidence: Tensor) -> Tensor:
    result: Tensor = criterion(outputs, label, confidence, criterion.weights(label, confidence))
    return result


def by_hand(args: LossArgs, class_weights: list[float] | None = None) -> float:
    """The mean over known pixels, in float64 and in words."""
    logits, label, confidence = (each.double().numpy() for each in example())
    total = weights = 0.0
    for b, y, x in np.argwhere(label != 255):
        k = int(label[b, y, x])
        p = np.exp(logits[b, :, y, x] - logits[b, :, y, x].max())
        p /= p.sum()
        if args.kind == "cross-entropy":
            loss = -np.log(p[k])
        elif args.kind == "bootstrapped":
            target = args.bootstrap * np.eye(CLASSES)[k] + (1 - args.bootstrap) * p
            loss = -(target * np.log(p)).sum()
        elif args.kind == "generalized":
            loss = (1 - p[k] ** args.generalized) / args.generalized
        elif args.kind == "hard":
            loss = -np.log(p[k]) if p[k] < args.hard else 0.0
        else:
            log_target = np.where(np.arange(CLASSES) == k, 0.0, -4.0)
            loss = args.symmetric[0] * -np.log(p[k]) + args.symmetric[1] * -(p * log_target).sum()
        weight = max(confidence[b, k], args.confidence_floor) if args.confidence != "off" else 1.0
        weight *= class_weights[k] if class_weights else 1.0
        total, weights = total + weight * loss, weights + weight
    return total / weights


@pytest.mark.parametrize("confidence", ["off", "box"])
@pytest.mark.parametrize("kind", ["cross-entropy", "bootstrapped", "symmetric", "generalized", "hard"])
def test_a_loss_is_its_papers_formula(kind: Any, confidence: Any) -> None:
    args = LossArgs(kind=kind, confidence=confidence, confidence_floor=0.3, bootstrap=0.7, symmetric=(0.5, 1.5))
    assert float(value(PixelLoss(args), *example())) == pytest.approx(by_hand(args), rel=1e-5)


@pytest.mark.parametrize("kind", ["cross-entropy", "bootstrapped", "symmetric"])
def test_logits_in_half_precision_have_a_loss_in_float32(kind: Any) -> None:
    logits, label, confidence = example()
    criterion = PixelLoss(LossArgs(kind=kind))
    half = value(criterion, logits.half(), label, confidence)
    torch.testing.assert_close(half, value(criterion, logits.half().float(), label, confidence), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["cross-entropy", "masks"])
def test_weights_of_pixels_are_those_of_their_labels_where_these_are_the_same(kind: Any) -> None:
    """And others change the loss; void pixels have none."""
    logits, label, confidence = example()
    criterion: Any = PixelLoss(LossArgs(confidence="pixel", confidence_floor=0.3))
    outputs: Any = logits
    if kind == "masks":
        label, confidence = scene()
        criterion, (class_logits, mask_logits) = (
            MaskLoss(LossArgs(kind="masks", confidence="pixel"), QUERIES),
            masks_of(label, 1.0),
        )
        outputs = ((class_logits, mask_logits),)
    of_pixels = F.pad(confidence, (0, 256 - confidence.shape[1])).gather(1, label.flatten(1).long()).view(label.shape)
    want = value(criterion, outputs, label, confidence)
    torch.testing.assert_close(value(criterion, outputs, label, of_pixels), want)
    void = torch.where(label == 255, 7.0, of_pixels)
    torch.testing.assert_close(value(criterion, outputs, label, void), want)
    columns = torch.linspace(0.2, 2, label.shape[2]).expand(label.shape)
    assert abs(float(value(criterion, outputs, label, of_pixels * columns) - want)) > 1e-3


def test_class_weights_are_those_of_cross_entropy() -> None:
    weights = [0.5, 2.0, 0.0, 1.0]
    args = LossArgs(confidence="off")
    logits, label, confidence = example()
    ours = value(PixelLoss(args, torch.tensor(weights)), logits, label, confidence)
    assert float(ours) == pytest.approx(by_hand(args, weights), rel=1e-5)
    torch.testing.assert_close(ours, F.cross_entropy(logits, label.long(), torch.tensor(weights), ignore_index=255))


@pytest.mark.parametrize("kind", ["cross-entropy", "bootstrapped", "symmetric"])
def test_nothing_is_learned_from_void(kind: Any) -> None:
    logits, label, confidence = example()
    logits.requires_grad_()
    torch.autograd.backward(value(PixelLoss(LossArgs(kind=kind)), logits, label, confidence))
    assert logits.grad is not None
    void = (label == 255)[:, None].expand_as(logits)
    assert not logits.grad[void].any()
    assert logits.grad[~void].all()


def test_a_batch_of_void_alone_is_zero_and_no_nan() -> None:
    logits, label, confidence = example()
    assert float(value(PixelLoss(LossArgs()), logits, torch.full_like(label, 255), confidence)) == 0


def test_a_sure_wrong_label_pulls_less_under_the_robust_losses() -> None:
    """Gradient on a pixel that the network is sure of and the label contradicts, at the same scale."""
    logits = torch.tensor([8.0, 0, 0, 0]).view(1, 4, 1, 1).requires_grad_()
    label, sure = torch.ones(1, 1, 1, dtype=torch.uint8), torch.ones(1, 4)
    pull = {}
    for kind, options in (
        ("cross-entropy", {}),
        ("bootstrapped", {}),
        ("symmetric", {"symmetric": (0.1, 1.0)}),
        ("generalized", {}),
    ):
        args = LossArgs(kind=kind, **options)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(value(PixelLoss(args), logits, label, sure), logits)
        pull[kind] = float(gradient.abs().max())
    assert pull["bootstrapped"] < 0.85 * pull["cross-entropy"]
    assert pull["symmetric"] < 0.15 * pull["cross-entropy"]
    assert pull["generalized"] < 0.05 * pull["cross-entropy"]


@pytest.mark.parametrize("region", ["dice", "lovasz"])
def test_a_region_loss_is_the_mean_over_images(region: Any) -> None:
    """Of images with labels: the second row is void, and has neither loss nor gradient."""
    logits, label, confidence = example()
    label[1] = 255
    logits.requires_grad_()
    args = LossArgs(region=region, region_weight=0.5, confidence="off")
    found = value(PixelLoss(args), logits, label, confidence)
    plain = value(PixelLoss(LossArgs(confidence="off")), logits, label, confidence)
    regions = [by_region(region, logits[row].detach().double().softmax(0).numpy(), label[row].numpy()) for row in (0, 2)]
    assert float((found - plain).detach()) == pytest.approx(0.5 * np.mean(regions), rel=1e-4)
    torch.autograd.backward(found)
    assert logits.grad is not None and logits.grad.isfinite().all() and not logits.grad[1].any()


def by_region(region: str, p: np.ndarray, label: np.ndarray) -> float:
    """Dice: 1 - 2 |pt| / (|p| + |t|) of each class in the image. Lovasz-softmax: arXiv:1705.08790, equations 8 and 9."""
    known = label != 255
    p, label = p[:, known], label[known]
    losses = []
    for k in range(CLASSES):
        t = (label == k).astype(float)
        if not t.any():
            if region == "dice":
                losses.append(0.0)
            continue
        if region == "dice":
            losses.append(1 - 2 * (p[k] * t).sum() / (p[k] + t).sum())
            continue
        errors = np.abs(t - p[k])
        order = np.argsort(-errors)
        jaccard = [1 - (t.sum() - t[order[:n]].sum()) / (t.sum() + (1 - t[order[:n]]).sum()) for n in range(1, len(t) + 1)]
        losses.append(float((errors[order] * np.diff([0.0, *jaccard])).sum()))
    return float(np.mean(losses))


def divided(criterion: Any, outputs_of: Any, label: Tensor, confidence: Tensor) -> Tensor:
    """The loss of a batch whose rows came in passes of one and two."""
    parts = [slice(0, 1), slice(1, 3)]
    divisors = torch.stack([criterion.weights(label[part], confidence[part]) for part in parts]).sum(0)
    return torch.stack([criterion(outputs_of(part), label[part], confidence[part], divisors) for part in parts]).sum()


@pytest.mark.parametrize("region", ["none", "dice", "lovasz"])
def test_a_batch_may_be_divided_anyhow(region: Any) -> None:
    logits, label, confidence = example()
    criterion = PixelLoss(LossArgs(kind="symmetric", region=region), torch.tensor([0.5, 2.0, 1.0, 1.0]))
    parts = divided(criterion, lambda part: logits[part], label, confidence)
    torch.testing.assert_close(parts, value(criterion, logits, label, confidence))
    mean_of_means = torch.stack([value(criterion, logits[p], label[p], confidence[p]) for p in (slice(0, 1), slice(1, 3))]).mean()
    assert abs(float(mean_of_means - parts)) > 1e-3, "the example tells the two apart"


# ---- masks ----

QUERIES = 6


def masks_of(label: Tensor, sure: float = 12.0) -> tuple[Tensor, Tensor]:
    """The right answer: query k says class k where there is one, the others nothing."""
    small = label[:, 2::4, 2::4]
    class_logits = torch.full((len(label), QUERIES, CLASSES + 1), -sure)
    mask_logits = torch.full((len(label), QUERIES, *small.shape[1:]), -sure)
    for b in range(len(label)):
        present = [k for k in range(CLASSES) if (small[b] == k).any()]
        for q in range(QUERIES):
            class_logits[b, q, q if q in present else CLASSES] = sure
        for k in present:
            mask_logits[b, k][small[b] == k] = sure
    return class_logits, mask_logits


def scene() -> tuple[Tensor, Tensor]:
    label = torch.zeros(3, 32, 48, dtype=torch.uint8)
    label[0, 8:20, 8:30] = 2
    label[1, :16], label[1, 16:, 24:] = 3, 1
    label[1, 12:20] = 255
    label[2, 4:28, 4:44] = 1
    return label, torch.rand(3, CLASSES, generator=torch.Generator().manual_seed(1))


def test_the_right_masks_cost_nothing() -> None:
    label, confidence = scene()
    criterion = MaskLoss(LossArgs(kind="masks"), QUERIES)
    assert float(value(criterion, (masks_of(label),), label, confidence)) < 1e-3
    wrong = masks_of(label.roll(8, dims=2))
    assert float(value(criterion, (wrong,), label, confidence)) > 1


def test_the_loss_of_masks_is_its_papers_formula() -> None:
    """Mask2Former, arXiv:2112.01527, section 4.1: 2 x classes, "no object" a tenth, 5 x entropy + 5 x dice of masks."""
    label = torch.zeros(1, 16, 16, dtype=torch.uint8)
    label[:, 4:12, 6:] = 3
    masks = torch.stack([label[0, 2::4, 2::4] == k for k in (0, 3)]).double()
    noise = torch.Generator().manual_seed(0)
    class_logits = torch.randn(1, 3, CLASSES + 1, generator=noise)
    mask_logits = torch.randn(1, 3, 4, 4, generator=noise)
    mask_logits[0, :2] += 3 * masks - 1.5  # so that the first two queries are matched, and the third is not

    entropy_of_classes = -class_logits[0].double().log_softmax(-1)[range(3), [0, 3, CLASSES]]
    z = mask_logits[0, :2].double()
    p = z.sigmoid()
    entropy = -(masks * p.log() + (1 - masks) * (1 - p).log()).mean((1, 2))
    dice = 1 - (2 * (p * masks).sum((1, 2)) + 1) / (p.sum((1, 2)) + masks.sum((1, 2)) + 1)
    expected = 2 * (entropy_of_classes @ torch.tensor([1, 1, 0.1]).double()) / 2.1 + (5 * entropy + 5 * dice).sum() / 2

    criterion = MaskLoss(LossArgs(kind="masks", confidence="off"), 3)
    found = value(criterion, ((class_logits, mask_logits),), label, torch.ones(1, CLASSES))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_the_order_of_queries_does_not_matter() -> None:
    label, confidence = scene()
    criterion = MaskLoss(LossArgs(kind="masks"), QUERIES)
    class_logits, mask_logits = (each + torch.randn(each.shape) for each in masks_of(label, 2.0))
    order = torch.randperm(QUERIES)
    torch.testing.assert_close(
        value(criterion, ((class_logits[:, order], mask_logits[:, order]),), label, confidence),
        value(criterion, ((class_logits, mask_logits),), label, confidence),
    )


def test_masks_learn_nothing_from_void() -> None:
    label, confidence = scene()
    class_logits, mask_logits = masks_of(label, 1.0)
    mask_logits.requires_grad_()
    torch.autograd.backward(value(MaskLoss(LossArgs(kind="masks"), QUERIES), ((class_logits, mask_logits),), label, confidence))
    assert mask_logits.grad is not None
    void = label[:, 2::4, 2::4] == 255
    assert void.any() and not mask_logits.grad.transpose(1, 0)[:, void].any()
    assert mask_logits.grad.any()


def test_confidence_weighs_the_pixels_of_masks() -> None:
    label, _ = scene()
    class_logits, mask_logits = masks_of(label, 1.0)
    criterion, pulls = MaskLoss(LossArgs(kind="masks", confidence="box", confidence_floor=0.0), QUERIES), {}
    for sure in (1.0, 0.1):
        confidence = torch.ones(3, CLASSES)
        confidence[0, 2] = sure
        mask_logits.grad = None
        mask_logits.requires_grad_()
        torch.autograd.backward(value(criterion, ((class_logits, mask_logits),), label, confidence))
        assert mask_logits.grad is not None
        object_pixels = label[0, 2::4, 2::4] == 2
        pulls[sure] = float(
            mask_logits.grad[0, 2][object_pixels].abs().mean() / mask_logits.grad[0, 2][~object_pixels].abs().mean()
        )
    assert pulls[0.1] < 0.35 * pulls[1.0]


def test_masks_of_a_divided_batch() -> None:
    label, confidence = scene()
    class_logits, mask_logits = (each + torch.randn(each.shape) for each in masks_of(label, 2.0))
    criterion = MaskLoss(LossArgs(kind="masks"), QUERIES)
    parts = divided(criterion, lambda part: ((class_logits[part], mask_logits[part]),), label, confidence)
    torch.testing.assert_close(parts, value(criterion, ((class_logits, mask_logits),), label, confidence))


def test_matching_is_one_to_one_and_finds_the_masks() -> None:
    label, _ = scene()
    class_logits, mask_logits = masks_of(label)
    small = label[1, 2::4, 2::4].flatten()
    classes = torch.tensor([0, 1, 3])
    masks = (small[None] == classes[:, None]).float()
    query, mask = _matched(class_logits[1], mask_logits[1].flatten(1), classes, masks)
    assert dict(zip(mask.tolist(), query.tolist(), strict=True)) == {0: 0, 1: 1, 2: 3}


def test_of_equal_masks_that_of_the_query_which_says_the_class_is_matched() -> None:
    class_logits = torch.zeros(3, CLASSES + 1)
    class_logits[1, 2] = 3.0
    masks = torch.tensor([[1.0, 1.0, 0.0]])
    query, mask = _matched(class_logits, (4 * masks - 2).repeat(3, 1), torch.tensor([2]), masks)
    assert (query.tolist(), mask.tolist()) == ([1], [0])


def test_an_image_of_void_alone_has_queries_of_nothing() -> None:
    label, confidence = scene()
    void = torch.full_like(label, 255)
    outputs = masks_of(void)
    assert float(value(MaskLoss(LossArgs(kind="masks"), QUERIES), (outputs,), void, confidence)) < 1e-3
