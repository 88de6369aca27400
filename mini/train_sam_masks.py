"""Trains the parts of the mini SAM that one mask a box does not need: ``python -m wsss.mini.train_sam_masks --weights FILE``.

These are the heads of the three further masks with their predicted IoU, and the encoding of a mask that is given as a prompt
(`trained_parts`). All other weights stay as they are, to the bit, and with them the single mask of every box.
"""

from __future__ import annotations

import argparse
from collections import deque
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torch import Tensor, nn

from .train_sam import Batch, batch_of_step, load_sam_mini, losses, near_boxes
from .training import log, save_weights

STEPS, RATE = 700, 3e-3
OTHERS = 0.1
"""Weight of the loss of the two masks that are not the best: without it, a mask that is never the best learns nothing."""
REPORT_STEPS = 100


def trained_parts(sam: Sam) -> list[nn.Parameter]:
    """The parameters that are trained; of the last layer of the IoU head only the rows of the further masks count."""
    decoder = sam.mask_decoder
    return [
        *decoder.output_hypernetworks_mlps[1:].parameters(),
        *decoder.iou_prediction_head.layers[-1].parameters(),
        *sam.prompt_encoder.mask_downscaling.parameters(),
    ]


def keep_single_mask(sam: Sam) -> None:
    """Take the gradient from the row of the IoU head that belongs to the single mask."""
    for parameter in sam.mask_decoder.iou_prediction_head.layers[-1].parameters():
        assert parameter.grad is not None
        parameter.grad[0] = 0


def predicted(sam: Sam, embeddings: Tensor, xyxy_model: Tensor, image: Tensor, prompt: Tensor | None) -> tuple[Tensor, Tensor]:
    """All four masks of every box (N, 4, L, L) and their predicted IoU (N, 4), as ``MaskDecoder.predict_masks``.

    Args:
        embeddings: of all images. xyxy_model, image: the boxes (N, 4) and the image of each (N,).
        prompt: (N, 1, L, L) logits of a mask for each box; None: without.
    """
    decoder, encoder = sam.mask_decoder, sam.prompt_encoder
    sparse, dense = encoder(points=None, boxes=xyxy_model, masks=prompt)
    tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([tokens.expand(len(sparse), -1, -1), sparse], dim=1)
    source = embeddings[image] + dense
    hidden, keys = decoder.transformer(source, encoder.get_dense_pe().expand_as(source), tokens)
    upscaled = decoder.output_upscaling(keys.transpose(1, 2).reshape(source.shape))
    weights = torch.stack([head(hidden[:, 1 + n]) for n, head in enumerate(decoder.output_hypernetworks_mlps)], dim=1)
    return torch.einsum("nmc,nchw->nmhw", weights, upscaled), decoder.iou_prediction_head(hidden[:, 0])


def loss_of(sam: Sam, batch: Batch) -> tuple[Tensor, list[float]]:
    """The loss of a batch, and the mean IoU of the single mask, of the three's with the best prediction, and of the second pass.

    Of the three masks, almost only the one with the lowest loss is trained (arXiv:2304.02643, appendix A); all predict their IoU.
    """
    with torch.no_grad():
        embeddings = sam.image_encoder(batch.pixels)
    near = near_boxes(batch.xyxy_model, batch.pixels.shape[-1], batch.cover.shape[-1])
    boxes = batch.xyxy_model, batch.image
    logits, quality = predicted(sam, embeddings, *boxes, None)
    again, quality_again = predicted(sam, embeddings, *boxes, logits[:, :1].detach())
    single = iou_of(logits[:, 0], batch.cover)
    of_each = torch.stack([_by_box(logits[:, n], batch.cover, near) for n in (1, 2, 3)], dim=1)  # (N, 3)
    best = of_each.detach().argmin(dim=1)
    iou = torch.stack([iou_of(logits[:, n], batch.cover) for n in (1, 2, 3)], dim=1)
    share = torch.full_like(of_each, OTHERS).scatter(1, best[:, None], 1.0)
    of_again, iou_again = losses(again[:, 0], quality_again[:, 0], batch.cover, near)
    of_three = (of_each * share).sum(dim=1).mean() + (quality[:, 1:] - iou).square().mean()
    chosen = quality[:, 1:].detach().argmax(dim=1)
    return of_three + of_again, [float(single.mean()), float(iou.gather(1, chosen[:, None]).mean()), float(iou_again)]


def _by_box(logits: Tensor, cover: Tensor, near: Tensor) -> Tensor:
    """(N,) the loss of each mask, as `losses` without that of the predicted IoU."""
    size = cover.sum((1, 2)).clamp(min=16)
    entropy = F.binary_cross_entropy_with_logits(logits, cover, near, reduction="none").sum((1, 2)) / size
    probability = logits.sigmoid()
    return entropy + 1 - 2 * (probability * cover).sum((1, 2)) / (probability.square().sum((1, 2)) + cover.square().sum((1, 2)))


def iou_of(logits: Tensor, cover: Tensor) -> Tensor:
    """(N,) IoU of masks (N, L, L) with the cells of which an object covers more than half."""
    inside, true = logits.detach() > 0, cover > 0.5
    return (inside & true).sum((1, 2)) / (inside | true).sum((1, 2)).clamp(min=1)


def train(sam: Sam, *, steps: int, seed: int) -> None:
    """Train the parts of `trained_parts` in place."""
    sam.requires_grad_(False)
    parts = trained_parts(sam)
    for part in parts:
        part.requires_grad_(True)
    optimizer = torch.optim.Adam(parts, lr=RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    recent: deque[list[float]] = deque(maxlen=REPORT_STEPS)
    for step in range(steps):
        loss, ious = loss_of(sam, batch_of_step(sam, seed=seed + 1, step=step))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        keep_single_mask(sam)
        torch.nn.utils.clip_grad_norm_(parts, 1.0)
        optimizer.step()
        schedule.step()
        recent.append([float(loss.detach()), *ious])
        if (step + 1) % REPORT_STEPS == 0:
            mean = np.mean(recent, axis=0)
            log(
                f"step {step + 1}: loss {mean[0]:.3f}, IoU single {mean[1]:.3f}, best of three {mean[2]:.3f}, again {mean[3]:.3f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m wsss.mini.train_sam_masks", description=__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="weights of the single mask; replaced")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sam = load_sam_mini(arguments.weights)
    train(sam, steps=arguments.steps, seed=arguments.seed)
    save_weights(sam.state_dict(), arguments.weights)


if __name__ == "__main__":
    main()
