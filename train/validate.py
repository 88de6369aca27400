"""Score a segmenter on images held out of its training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import VOID
from ..errors import WsssError
from ..frame import fitting_canvas
from .args import Config, DataArgs
from .augment import resized, working_size
from .data import WholeImages, normalized, whole_images, workers_of
from .dataset.survey import Item
from .distributed import World
from .evaluate.boundary import boundary_counts
from .evaluate.checks import FACTS
from .evaluate.metrics import confusion_matrix, mean_iou
from .evaluate.report import Scores, scores_from_counts
from .evaluate.run import Counts
from .model import Segmenter
from .run import DTYPES, autocast


@torch.inference_mode()
def validate(
    segmenter: Segmenter, store: Path, images: Path, items: Sequence[Item], config: Config, world: World
) -> float | None:
    """mIoU with background against the store's labels, from one confusion matrix over complete images at their own size.

    Each process scores its share of the items; all return the same. None if the images have no labeled pixel.

    Raises:
        WsssError: the network's output is NaN.
    """
    segmenter.eval()
    labels = segmenter.classes
    matrix = np.zeros((labels, labels + 1), np.int64)
    for _, label, predicted in predictions(segmenter, store, images, items[world.rank :: world.size], config, world):
        matrix += confusion_matrix(label, predicted, labels)
    total = world.total(torch.from_numpy(matrix).to(world.device))
    return mean_iou(total.cpu().numpy()) if total.any() else None


@torch.inference_mode()
def scored(
    segmenter: Segmenter,
    store: Path,
    images: Path,
    items: Sequence[Item],
    config: Config,
    world: World,
    classes: Sequence[str],
    shown: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]],
    most_shown: int,
) -> Scores:
    """All scores against the items' labels, as `validate` compares them, in this process.

    Args:
        classes: names of labels 1, 2, ...
        shown: is filled with name, pixels, label and predicted label of the first ``most_shown`` items.

    Raises:
        WsssError: the network's output is NaN.
    """
    segmenter.eval()
    labels = segmenter.classes
    matrix, bands = np.zeros((labels, labels + 1), np.int64), np.zeros((2, labels), np.int64)
    present, pixel_counts = np.zeros((len(items), labels - 1), bool), np.zeros(2, np.int64)
    found = predictions(segmenter, store, images, items, config, world)
    for row, (item, (pixels, label, predicted)) in enumerate(zip(items, found, strict=True)):
        counts = confusion_matrix(label, predicted, labels)
        matrix += counts
        bands += boundary_counts(label, predicted, labels)
        present[row] = counts[1:].any(axis=1)
        pixel_counts += np.array([label.size, np.count_nonzero(label == VOID)])
        if row < most_shown:
            shown.append((item.path, pixels, label, predicted))
    facts = np.zeros((2, len(FACTS)), np.int64)
    return scores_from_counts(Counts(matrix=matrix, boundary=bands, present=present, facts=facts, pixels=pixel_counts), classes)


def predictions(
    segmenter: Segmenter, store: Path, images: Path, items: Sequence[Item], config: Config, world: World
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pixels (H, W, 3), label (H, W) and predicted label (H, W) of each item, all uint8. Raises WsssError for NaN."""
    dtype, device = DTYPES[config.optimizer.precision], world.device
    loaded = whole_images(WholeImages(store, images, items), workers=workers_of(config.machine, world))
    for item, (pixels, label) in zip(items, loaded, strict=True):
        with autocast(device, dtype):
            logits = whole_image_logits(segmenter, pixels, config.data, device)
        if logits.isnan().any():
            raise WsssError(
                f"{item.path}: the network's output is not a number",
                hint="a smaller optimizer.rate, a longer optimizer.warm_up, or --set optimizer.precision=fp32",
            )
        yield pixels, label, logits.argmax(dim=0).to(torch.uint8).cpu().numpy()


def whole_image_logits(
    segmenter: Segmenter,
    pixels: np.ndarray,
    args: DataArgs,
    device: torch.device,
    *,
    scale: float = 1.0,
    mirrored: bool = False,
    is_whole: bool = True,
) -> Tensor:
    """(C, H, W) logits of one photograph (H, W, 3) uint8.

    As in training it is resized to ``shorter_px``; then it is padded at the right and below with the mean color: at scale 1 to
    the smallest of the segmenter's canvases that holds it, as the exported segmenter does, otherwise to its ``multiple_of``.
    Logits of a resized photograph are resized back bilinearly (as mmsegmentation's ``resize`` of the logits).

    Args:
        scale: a further factor of the photograph's size. mirrored: flip the photograph, and the logits back.
        is_whole: whether ``pixels`` are a whole photograph. Parts of one do not go on a canvas.
    """
    working = np.array(resized(pixels, working_size(pixels.shape[:2], args, scale)))  # a copy, which PyTorch may write to
    mean, std = (torch.tensor(values, device=device) for values in (args.mean, args.std))
    image = normalized(torch.from_numpy(working).to(device), mean, std)  # (3, h, w)
    image = image.flip(-1) if mirrored else image
    height, width = image.shape[1:]
    canvas = fitting_canvas(segmenter.canvases, (height, width)) if is_whole and scale == 1 else None
    if canvas is None:
        canvas = height + -height % segmenter.multiple_of, width + -width % segmenter.multiple_of
    padded = F.pad(image, (0, canvas[1] - width, 0, canvas[0] - height))  # normalized: zero is the mean
    logits: Tensor = segmenter(padded[None])[..., :height, :width]
    logits = logits.flip(-1) if mirrored else logits
    if (height, width) != pixels.shape[:2]:
        logits = F.interpolate(logits, pixels.shape[:2], mode="bilinear", align_corners=False)
    return logits[0]
