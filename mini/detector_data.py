"""Training and test data of the mini detector: drawn scenes in its frame, and captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import tokenizers
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.ops import box_convert

from .scenes import CLASSES, draw_scene

SHORT_PX, LONG_PX = 144, 256
"""Short side of the resized image, and the maximum of its long side: about a fifth of the official 800 and 1333."""

BUCKETS: tuple[tuple[int, int], ...] = ((192, 192), (144, 256), (256, 144))
"""(height, width) to which images are padded, smallest area first."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet mean and deviation of RGB in 0..1 (preprocessor_config.json of IDEA-Research/grounding-dino-tiny)."""


# ---- frame ----


def resized_shape(height: int, width: int) -> tuple[int, int]:
    """(height, width) of an image in the detector's frame, by the official rule: short side first, long side limited."""
    short = float(SHORT_PX)
    if max(height, width) / min(height, width) * short > LONG_PX:
        short = round(LONG_PX * min(height, width) / max(height, width))
    if height <= width:
        return int(short), int(short * width / height)
    return int(short * height / width), int(short)


def bucket_of(height: int, width: int) -> tuple[int, int]:
    """The smallest bucket that holds a resized image."""
    return next(bucket for bucket in BUCKETS if height <= bucket[0] and width <= bucket[1])


@dataclass(slots=True)
class Pool:
    """Scenes of one bucket, at the detector's resolution."""

    pixels: Tensor
    """(S, H, W, 3) uint8 RGB, zero outside the image."""
    owner: Tensor
    """(S, H, W) uint8: 0 is no object, k is object k - 1; nearest neighbor."""
    valid: Tensor
    """(S, 2) int64, height and width of the image within the bucket."""
    labels: Tensor
    """(S, 5) int64, class of each object from 1, 0 where there is none."""
    boxes: Tensor
    """(S, 5, 4) float32, cxcywh in 0..1 of the image without its padding."""


def draw_pool(count: int, *, first: int = 0, split: Literal["train", "held-out"] = "train") -> dict[tuple[int, int], Pool]:
    """Draw scenes ``first`` to ``first + count - 1``; returns the pool of each bucket."""
    rows: dict[tuple[int, int], list[tuple[Tensor, ...]]] = {bucket: [] for bucket in BUCKETS}
    for seed in range(first, first + count):
        scene = draw_scene(seed, split=split)
        height, width = resized_shape(*scene.pixels.shape[:2])
        bucket = bucket_of(height, width)
        pixels = torch.zeros(*bucket, 3, dtype=torch.uint8)
        owner = torch.zeros(*bucket, dtype=torch.uint8)
        resized = Image.fromarray(scene.pixels).resize((width, height), Image.Resampling.BILINEAR)
        pixels[:height, :width] = torch.from_numpy(np.array(resized))
        nearest = Image.fromarray(scene.instance).resize((width, height), Image.Resampling.NEAREST)
        owner[:height, :width] = torch.from_numpy(np.array(nearest))
        labels, boxes = torch.zeros(5, dtype=torch.int64), torch.zeros(5, 4)
        number = len(scene.labels)
        labels[:number] = torch.from_numpy(scene.labels)
        scale = torch.tensor(scene.pixels.shape[1::-1] * 2, dtype=torch.float32)  # (w, h, w, h)
        boxes[:number] = box_convert(torch.from_numpy(scene.xyxy_image) / scale, "xyxy", "cxcywh")
        rows[bucket].append((pixels, owner, torch.tensor([height, width]), labels, boxes))
    return {bucket: Pool(*(torch.stack(column) for column in zip(*some, strict=True))) for bucket, some in rows.items() if some}


def shrunk(batch: Pool, scale: float) -> Pool:
    """The same scenes at a smaller scale."""
    pixels = batch.pixels.permute(0, 3, 1, 2).float()
    pixels = functional.interpolate(pixels, scale_factor=scale, mode="bilinear", antialias=True)
    owner = functional.interpolate(batch.owner[:, None], size=pixels.shape[2:], mode="nearest-exact")[:, 0]
    pixels = pixels.permute(0, 2, 3, 1).round().to(torch.uint8)
    return Pool(pixels, owner, (batch.valid * scale).round().long(), batch.labels, batch.boxes)


def normalized(pixels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The model's input from padded pixels.

    Args:
        pixels: (B, H, W, 3) uint8.
        valid: (B, 2) int64, height and width of each image.

    Returns:
        (B, 3, H, W) float32, normalized, exactly 0 in the padding; and (B, H, W) int64, 1 on the image.
    """
    height, width = pixels.shape[1:3]
    rows = torch.arange(height, device=pixels.device)[None, :, None] < valid[:, 0, None, None]
    mask = rows & (torch.arange(width, device=pixels.device)[None, None, :] < valid[:, 1, None, None])  # (B, H, W)
    values = pixels.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(channels, device=pixels.device)[:, None, None] for channels in (MEAN, STD))
    return (values - mean) / std * mask[:, None], mask.long()


def drawn_batch(pools: dict[tuple[int, int], Pool], size: int, rng: np.random.Generator) -> Pool:
    """Random scenes of one bucket, each mirrored at random, the batch transposed at random."""
    buckets = list(pools)
    counts = np.array([len(pools[bucket].labels) for bucket in buckets])
    pool = pools[buckets[int(rng.choice(len(buckets), p=counts / counts.sum()))]]
    rows = torch.from_numpy(rng.integers(len(pool.labels), size=size))
    pixels, owner, valid = pool.pixels[rows], pool.owner[rows], pool.valid[rows]
    labels, boxes = pool.labels[rows], pool.boxes[rows].clone()
    for row in range(size):
        height, width = valid[row].tolist()
        for axis in (0, 1):
            if rng.random() < 0.5:  # flip the image alone, so that the padding stays at the right and the bottom
                for values in (pixels, owner):
                    image = values[row, :height, :width]
                    image.copy_(image.flip(axis))
                center = boxes[row, :, 1 - axis]
                boxes[row, :, 1 - axis] = torch.where(labels[row] > 0, 1 - center, center)
    if rng.random() < 0.5:
        pixels, owner, valid = pixels.transpose(1, 2), owner.transpose(1, 2), valid.flip(1)
        boxes = boxes[..., [1, 0, 3, 2]]
    return Pool(pixels.contiguous(), owner.contiguous(), valid, labels, boxes)


# ---- captions ----


@dataclass(slots=True)
class Captions:
    """Captions of a batch, padded to one length T."""

    ids: Tensor
    """(B, T) int64."""
    mask: Tensor
    """(B, T) int64, 1 on tokens."""
    spans: Tensor
    """(B, 13, T) float32: 1 on the tokens of class c in row b's caption, all 0 for a class that is not in it."""


def encoded_captions(classes: Sequence[Sequence[int]], tokenizer: tokenizers.Tokenizer) -> Captions:
    """Captions of the given classes (from 1) in the given order, ``"red disc . blue ring ."``."""
    encodings = [tokenizer.encode("".join(f"{CLASSES[label - 1]} . " for label in row).strip()) for row in classes]
    longest = max(len(encoding.ids) for encoding in encodings)
    ids = torch.zeros(len(classes), longest, dtype=torch.int64)
    mask, spans = torch.zeros_like(ids), torch.zeros(len(classes), len(CLASSES) + 1, longest)
    dot = tokenizer.token_to_id(".")
    for row, encoding in enumerate(encodings):
        ids[row, : len(encoding.ids)] = torch.tensor(encoding.ids)
        mask[row, : len(encoding.ids)] = 1
        phrase = 0
        for place, token in enumerate(encoding.ids[1:-1], start=1):
            if token == dot:
                phrase += 1
            else:
                spans[row, classes[row][phrase], place] = 1
    return Captions(ids, mask, spans)


def drawn_caption(labels: Tensor, rng: np.random.Generator) -> list[int]:
    """Classes of one training caption, shuffled: the present ones (one is left out in a tenth of the draws) and some absent."""
    present = np.unique(labels[labels > 0].numpy())
    absent = np.setdiff1d(np.arange(1, len(CLASSES) + 1), present)
    if len(present) > 1 and rng.random() < 0.1:
        present = rng.permutation(present)[1:]
    draw = rng.random()
    extra = 0 if draw < 0.2 else len(absent) if draw > 0.85 else int(rng.integers(1, 5))
    if len(present) == 0:
        extra = max(extra, 1)
    named = np.concatenate([present, rng.permutation(absent)[:extra]])
    return [int(label) for label in rng.permutation(named)]


def moved(captions: Captions, device: torch.device) -> Captions:
    """The same captions on a device."""
    return Captions(captions.ids.to(device), captions.mask.to(device), captions.spans.to(device))
