"""Load labeled images as training batches.

The image at a position, and its augmentation, depend only on (seed, position), where position counts images since the start of
the run. So a resumed run sees the same images as an uninterrupted one, and two processes with half the batch each see the same
images as one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..batch import VOID
from ..errors import StoreError, WsssError
from ..frame import scaled, shorter_factor
from ..photographs import read_photograph
from ..pixels.pictures import picture_of
from .args import DataArgs
from .evaluate.files import read_label_map
from .survey import Item

# First part of the seed sequences: each purpose has its own random stream.
_ORDER, _AUGMENT, _STEP = 0, 1, 2
_BLOCK = 4096
"""Weighted draws are made in blocks of this size."""
_CROPS_TRIED = 10


@dataclass(slots=True, kw_only=True)
class Batch:
    """Crops of one forward pass."""

    pixels: Tensor
    """(B, 3, crop, crop) float32, RGB, normalized."""
    label: Tensor
    """(B, crop, crop) uint8, 255 is ignored."""
    confidence: Tensor
    """(B, C + 1) float32 in [0, 1]: the store's confidence in each label value in each image."""
    item: Tensor
    """(B,) int64, index into the training items."""

    def to(self, device: torch.device, memory_format: torch.memory_format) -> Batch:
        """Copy to a device."""
        return Batch(
            pixels=self.pixels.to(device, memory_format=memory_format, non_blocking=True),
            label=self.label.to(device, non_blocking=True),
            confidence=self.confidence.to(device, non_blocking=True),
            item=self.item,
        )


def step_seed(seed: int, step: int, accumulated: int, rank: int) -> int:
    """The seed of the network's randomness (dropout, drop path) in a forward pass."""
    return _seed(_STEP, seed, step, accumulated, rank)


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


class Order:
    """Maps positions to items.

    Args:
        count: number of items. weights: (count,) draw with replacement in proportion to these; without them, every epoch is
            a new permutation of the items.
    """

    def __init__(self, count: int, seed: int, weights: np.ndarray | None = None) -> None:
        self._count, self._seed = count, seed
        self._share = None if weights is None else weights / weights.sum()
        self._block: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __getitem__(self, position: int) -> int:
        number, row = divmod(position, self._count if self._share is None else _BLOCK)
        if number != self._block[0]:
            rng = np.random.default_rng([_ORDER, self._seed, number])
            drawn = rng.permutation(self._count) if self._share is None else rng.choice(self._count, _BLOCK, p=self._share)
            self._block = number, drawn
        return int(self._block[1][row])


class Positions:
    """Batch sampler: the positions of one process's forward passes, from step ``first`` to the last.

    A step's positions are ordered [forward pass][process][row], so that steps do not depend on the number of processes.
    """

    def __init__(self, args: DataArgs, *, first: int, steps: int, rank: int, world: int) -> None:
        self._args, self._first, self._steps, self._rank, self._world = args, first, steps, rank, world
        self.rows = args.batch // (world * args.accumulate)

    def __len__(self) -> int:
        return (self._steps - self._first) * self._args.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self._first, self._steps):
            for part in range(self._args.accumulate):
                start = step * self._args.batch + (part * self._world + self._rank) * self.rows
                yield list(range(start, start + self.rows))


class Crops(Dataset[Batch | WsssError]):
    """Augmented crops by position. An unreadable image is returned as its error, since DataLoader would lose the message."""

    def __init__(self, store: Path, images: Path, items: Sequence[Item], args: DataArgs, *, seed: int, order: Order) -> None:
        self._store, self._images, self._items = store, images, items
        self._args, self._seed, self._order = args, seed, order
        self._augment = augmentation(args)

    def __getitem__(self, position: int) -> Batch | WsssError:
        row = self._order[position]
        item = self._items[row]
        try:
            pixels, label = read_pair(self._store, self._images, item)
        except WsssError as error:
            return error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed(_AUGMENT, self._seed, position))
            scale = float(torch.empty(1).uniform_(*self._args.scale))
            size = working_size(label.shape, self._args, scale)
            crop = random_crop(resized(pixels, size), resized_label(label, size), self._args)
            image, mask = self._augment(*crop)
        return Batch(
            pixels=normalized(image, self._args)[None],
            label=mask[None],
            confidence=torch.tensor([item.confidence]),
            item=torch.tensor([row]),
        )


def read_pair(store: Path, images: Path, item: Item) -> tuple[np.ndarray, np.ndarray]:
    """Read a photograph (H, W, 3) uint8 RGB and its label map (H, W) uint8. Raises StoreError if they changed."""
    photo = read_photograph(images, item.path)
    if photo.sha256 != item.sha256:
        raise StoreError(f"{images / item.path}: the image has changed since it was labeled", hint="label it again")
    label = read_label_map(store / "labels" / item.label)  # an absolute path, of a mask, stays as it is
    if label.shape != photo.shape:
        raise StoreError(f"{item.path}: the image is {photo.shape} pixels, its label {label.shape}", hint="label it again")
    return photo.pixels, label


def working_size(shape: tuple[int, ...], args: DataArgs, scale: float = 1.0) -> tuple[int, int]:
    """(height, width) to which a photograph of (height, width) is resized for the network, times ``scale``."""
    height, width = shape
    return scaled(height, width, scale * (shorter_factor(height, width, args.shorter_px) if args.shorter_px else 1))


def resized(pixels: np.ndarray, size: tuple[int, int]) -> tv_tensors.Image:
    """Resize (H, W, 3) uint8 to (3, h, w) with Pillow's antialiased bilinear filter, as the runtime does."""
    if pixels.shape[:2] != size:
        pixels = np.array(picture_of(pixels).resize(size[::-1], Image.Resampling.BILINEAR))
    return tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))


def resized_label(label: np.ndarray, size: tuple[int, int]) -> tv_tensors.Mask:
    """Resize (H, W) uint8 to (h, w) by nearest neighbor."""
    mask = torch.from_numpy(label)[None]
    return tv_tensors.Mask(v2.functional.resize(mask, list(size), v2.InterpolationMode.NEAREST_EXACT)[0])


def random_crop(image: tv_tensors.Image, label: tv_tensors.Mask, args: DataArgs) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """Crop a random square of ``args.crop`` pixels, padded with the mean color and void; see ``args.largest_share``."""
    side = args.crop
    across, down = (max(side - length, 0) for length in (label.shape[1], label.shape[0]))
    if across or down:  # on both sides, so that the image may be anywhere in the crop
        image = v2.functional.pad(image, [across, down], fill=[round(value) for value in args.mean])
        label = v2.functional.pad(label, [across, down], fill=VOID)
    height, width = label.shape
    for _ in range(_CROPS_TRIED):
        top, left = (int(torch.randint(length - side + 1, ())) for length in (height, width))
        cut = label[top : top + side, left : left + side]
        if args.largest_share == 1:
            break
        known = cut[cut != VOID]
        if known.bincount(minlength=1).max() < args.largest_share * len(known):
            break
    return tv_tensors.Image(image[:, top : top + side, left : left + side]), tv_tensors.Mask(cut)


def augmentation(args: DataArgs) -> v2.Transform:
    """Random flip and color jitter."""
    flip = v2.RandomHorizontalFlip(args.flip)
    return v2.Compose([flip, v2.ColorJitter(*args.jitter)]) if any(args.jitter) else flip


def normalized(image: Tensor, args: DataArgs) -> Tensor:
    """Normalize (..., 3, H, W) uint8 to float32."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (args.mean, args.std))
    return (image.as_subclass(Tensor).float() - mean) / std


def collate(rows: Sequence[Batch | WsssError]) -> Batch | WsssError:
    """Concatenate rows into a batch, or return the first error among them."""
    good = []
    for row in rows:
        if isinstance(row, WsssError):
            return row
        good.append(row)
    return Batch(
        pixels=torch.cat([row.pixels for row in good]),
        label=torch.cat([row.label.as_subclass(Tensor) for row in good]),
        confidence=torch.cat([row.confidence for row in good]),
        item=torch.cat([row.item for row in good]),
    )


def batches(crops: Crops, positions: Positions, *, workers: int, pin: bool) -> Iterator[Batch]:
    """The batches of a run's forward passes, in order. Raises the error of an unreadable image."""
    loader = DataLoader(
        crops, batch_sampler=positions, collate_fn=collate, num_workers=workers, pin_memory=pin, worker_init_fn=_one_thread
    )
    for loaded in loader:
        if isinstance(loaded, WsssError):
            raise loaded
        yield loaded


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)  # workers share the cores


def class_weights(items: Sequence[Item]) -> np.ndarray:
    """(C + 1) float32 loss weights against class imbalance: 1 / log(1.02 + share of pixels), scaled to a mean of 1 over pixels.

    ENet, arXiv:1606.02147, section 5.2. A class without a pixel has weight 0.
    """
    pixels = np.sum([item.pixels for item in items], axis=0, dtype=np.float64)
    share = pixels / max(pixels.sum(), 1)
    weights = np.where(pixels > 0, 1 / np.log(1.02 + share), 0)
    scaled: np.ndarray = (weights / max((weights * share).sum(), 1e-9)).astype(np.float32)
    return scaled


def repeat_factors(items: Sequence[Item], threshold: float) -> np.ndarray:
    """(N,) float64 relative frequency of drawing each image: the largest max(1, sqrt(threshold / f)) of its classes.

    f is the share of images with that class. LVIS, arXiv:1908.03195, appendix B.1.
    """
    present = np.array([item.pixels for item in items])[:, 1:] > 0  # (N, C)
    frequency = present.mean(axis=0)
    factor = np.maximum(1, np.sqrt(threshold / np.maximum(frequency, 1e-9)))
    factors: np.ndarray = np.where(present, factor, 1).max(axis=1, initial=1)
    return factors
