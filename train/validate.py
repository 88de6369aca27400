"""How well a segmenter does on images that were kept out of its training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import WsssError
from .args import Config, DataArgs
from .data import normalized, read_pair, resized, working_size
from .distributed import World
from .evaluate.metrics import confusion_matrix, mean_iou
from .model import Segmenter
from .run import DTYPES, autocast
from .survey import Item


@torch.inference_mode()
def validate(
    segmenter: Segmenter, store: Path, images: Path, items: Sequence[Item], config: Config, world: World
) -> float | None:
    """mIoU with background over whole images at their own size, against the store's labels, as one confusion matrix.

    Each process takes its share of the items; all return the same. None where no pixel of the images is labeled.

    Raises:
        WsssError: the network's output is not a number.
    """
    segmenter.eval()
    labels = segmenter.classes
    matrix = np.zeros((labels, labels + 1), np.int64)
    for _, label, predicted in predictions(segmenter, store, images, items[world.rank :: world.size], config, world.device):
        matrix += confusion_matrix(label, predicted, labels)
    total = world.total(torch.from_numpy(matrix).to(world.device))
    return mean_iou(total.cpu().numpy()) if total.any() else None


def predictions(
    segmenter: Segmenter, store: Path, images: Path, items: Sequence[Item], config: Config, device: torch.device
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pixels (H, W, 3), label (H, W) and predicted label (H, W) of each item, all uint8. Raises WsssError for NaN."""
    dtype = DTYPES[config.optimizer.precision]
    for item in items:
        pixels, label = read_pair(store, images, item)
        with autocast(device, dtype):
            logits = whole_image_logits(segmenter, pixels, config.data, device)
        if logits.isnan().any():
            raise WsssError(
                f"{item.path}: the network's output is not a number",
                hint="a smaller optimizer.rate, a longer optimizer.warm_up, or --set optimizer.precision=fp32",
            )
        yield pixels, label, logits.argmax(dim=0).to(torch.uint8).cpu().numpy()


def whole_image_logits(
    segmenter: Segmenter, pixels: np.ndarray, args: DataArgs, device: torch.device, *, scale: float = 1.0, mirrored: bool = False
) -> Tensor:
    """(C, H, W) logits of one photograph (H, W, 3) uint8, as it was trained on: resized to ``shorter_px``, padded to the right
    and below with the mean color. What was resized comes back bilinearly (as mmsegmentation's ``resize`` of the logits).

    Args:
        scale: a further factor of the photograph's size. mirrored: seen from left to right.
    """
    image = normalized(resized(pixels, working_size(pixels.shape[:2], args, scale)), args).to(device)
    image = image.flip(-1) if mirrored else image
    height, width = image.shape[1:]
    right, below = -width % segmenter.multiple_of, -height % segmenter.multiple_of
    padded = F.pad(image, (0, right, 0, below))  # normalized: zero is the mean
    logits: Tensor = segmenter(padded[None])[..., :height, :width]
    logits = logits.flip(-1) if mirrored else logits
    if (height, width) != pixels.shape[:2]:
        logits = F.interpolate(logits, pixels.shape[:2], mode="bilinear", align_corners=False)
    return logits[0]


def averaged_probabilities(
    segmenter: Segmenter,
    pixels: np.ndarray,
    args: DataArgs,
    device: torch.device,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Tensor:
    """(C, H, W) float32 probabilities of one photograph (H, W, 3) uint8, the mean over test-time copies of it.

    Args:
        scales: factors by which the photograph is resized, as in training; logits go back to its own size, then softmax
            (as mmsegmentation's ``aug_test``).
        flip: each copy also mirrored.
    """
    total = torch.zeros(segmenter.classes, *pixels.shape[:2], device=device)
    for scale in scales:
        for mirrored in (False, True) if flip else (False,):
            logits = whole_image_logits(segmenter, pixels, args, device, scale=scale, mirrored=mirrored)
            total += logits.float().softmax(dim=0)
    return total / (len(scales) * (2 if flip else 1))
