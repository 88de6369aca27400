"""Probabilities of every label at every pixel, averaged over scales, mirror images and sliding windows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..args import DataArgs
from ..augment import resized, working_size
from ..model import Segmenter
from ..validate import whole_image_logits
from .inference import Inference


def averaged_probabilities(
    segmenter: Segmenter, pixels: np.ndarray, args: DataArgs, device: torch.device, inference: Inference
) -> Tensor:
    """(C, H, W) float32 probabilities of one photograph (H, W, 3) uint8, the mean over its test-time copies.

    Logits are resized to the photograph's size before the softmax (as in mmsegmentation's ``aug_test``). The CRF is not applied.
    """
    total = torch.zeros(segmenter.classes, *pixels.shape[:2], device=device)
    for scale in inference.scales:
        for mirrored in (False, True) if inference.flip else (False,):
            if inference.window:
                logits = window_logits(segmenter, pixels, args, device, inference, scale=scale, mirrored=mirrored)
            else:
                logits = whole_image_logits(segmenter, pixels, args, device, scale=scale, mirrored=mirrored)
            total += logits.float().softmax(dim=0)
    return total / (len(inference.scales) * (2 if inference.flip else 1))


def window_logits(
    segmenter: Segmenter,
    pixels: np.ndarray,
    args: DataArgs,
    device: torch.device,
    inference: Inference,
    *,
    scale: float = 1.0,
    mirrored: bool = False,
) -> Tensor:
    """(C, H, W) float32 logits of one photograph (H, W, 3) uint8, the mean over the windows that contain each pixel.

    As mmsegmentation's ``slide_inference``: the resized photograph is covered by squares of ``inference.window`` pixels, the last
    ones moved back inside; the mean logits are resized to the photograph's size.

    Args:
        scale, mirrored: as of `whole_image_logits`.
    """
    size = working_size(pixels.shape[:2], args, scale)
    picture = resized(pixels, size)  # (h, w, 3)
    as_it_is = DataArgs(mean=args.mean, std=args.std)
    total = torch.zeros(segmenter.classes, *size, device=device)
    count = torch.zeros(size, device=device)
    for top, bottom in window_spans(size[0], inference.window, inference.step):
        for left, right in window_spans(size[1], inference.window, inference.step):
            logits = whole_image_logits(
                segmenter, picture[top:bottom, left:right], as_it_is, device, mirrored=mirrored, is_whole=False
            )
            total[:, top:bottom, left:right] += logits.float()
            count[top:bottom, left:right] += 1
    mean = total / count
    if size != pixels.shape[:2]:
        mean = F.interpolate(mean[None], pixels.shape[:2], mode="bilinear", align_corners=False)[0]
    return mean


def window_spans(length: int, window: int, stride: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the windows along a side of ``length`` pixels; one that is as long as the side if that is shorter."""
    for number in range(max(-(-(length - window) // stride), 0) + 1):
        end = min(number * stride + window, length)
        yield max(end - window, 0), end
