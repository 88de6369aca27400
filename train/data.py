"""Load labeled images as training batches.

The image at a position, and its augmentation, depend only on (seed, position), where position counts images since the start of
the run. So a resumed run sees the same images as an uninterrupted one, and two processes with half the batch each see the same
images as one process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..batch import VOID
from ..cores import cores
from ..errors import StoreError, WsssError
from ..photographs import read_photograph
from ..store.local import read_confidence
from .args import DataArgs, MachineArgs
from .augment import random_crop
from .dataset.survey import Item
from .distributed import World
from .evaluate.files import read_label_map

MAX_WORKERS = 8
"""A process with one GPU rarely needs more."""
Pair: TypeAlias = tuple[np.ndarray, np.ndarray]
"""A photograph (H, W, 3) uint8 RGB and its label map (H, W) uint8."""
Loaded = TypeVar("Loaded")

# First part of the seed sequences: each purpose has its own random stream.
_ORDER, _AUGMENT, _STEP = 0, 1, 2
_BLOCK = 4096
"""Weighted draws are made in blocks of this size."""


@dataclass(slots=True, kw_only=True)
class Batch:
    """Crops of one forward pass."""

    pixels: Tensor
    """(B, crop, crop, 3) uint8, RGB."""
    label: Tensor
    """(B, crop, crop) uint8, 255 is ignored."""
    confidence: Tensor
    """float32 >= 0: the weight of each label value in each image (B, C + 1), see `ranked_confidence`; or of each pixel
    (B, crop, crop), see `ranked_pixels`."""
    item: Tensor
    """(B,) int64, index into the training items. Stays on the CPU."""

    def to(self, device: torch.device) -> Batch:
        """Copy to a device."""
        pixels, label, confidence = (each.to(device, non_blocking=True) for each in (self.pixels, self.label, self.confidence))
        return Batch(pixels=pixels, label=label, confidence=confidence, item=self.item)

    def pin_memory(self) -> Batch:
        """Copy to page-locked memory; called by DataLoader."""
        pixels, label, confidence = (each.pin_memory() for each in (self.pixels, self.label, self.confidence))
        return Batch(pixels=pixels, label=label, confidence=confidence, item=self.item)


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
    """Augmented crops by position. An unreadable image is returned as its error, since DataLoader would lose the message.

    Args:
        confidence: (N, C + 1) float32 for the items, `ranked_confidence`.
        of_pixels: (C + 1, 256) float32, `ranked_pixels`: the weight of a pixel by its label and its confidence in the store, in
            place of ``confidence``.
    """

    def __init__(
        self,
        store: Path,
        images: Path,
        items: Sequence[Item],
        args: DataArgs,
        *,
        seed: int,
        order: Order,
        confidence: np.ndarray,
        of_pixels: np.ndarray | None = None,
    ) -> None:
        self._store, self._images, self._items = store, images, items
        self._args, self._seed, self._order = args, seed, order
        self._confidence, self._of_pixels = torch.from_numpy(confidence), of_pixels

    def __getitem__(self, position: int) -> Batch | WsssError:
        row = self._order[position]
        try:
            item = self._items[row]
            pair = read_pair(self._store, self._images, item)
            sure = None if self._of_pixels is None else read_confidence(self._store, item.label, shape=item.size)
        except WsssError as error:
            return error
        rng = np.random.default_rng([_AUGMENT, self._seed, position])
        pixels, label, *sures = random_crop(*pair, self._args, rng, sure)
        weights = self._confidence[row]
        if self._of_pixels is not None:
            weights = torch.from_numpy(self._of_pixels[np.where(label == VOID, 0, label), sures[0]])
        pixels, label = torch.from_numpy(pixels), torch.from_numpy(label)
        return Batch(pixels=pixels[None], label=label[None], confidence=weights[None], item=torch.tensor([row]))


class WholeImages(Dataset[tuple[Tensor, Tensor] | WsssError]):
    """Photographs and label maps of items, by their row. An unreadable image is returned as its error."""

    def __init__(self, store: Path, images: Path, items: Sequence[Item]) -> None:
        self._store, self._images, self._items = store, images, items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor] | WsssError:
        try:
            pixels, label = read_pair(self._store, self._images, self._items[row])
        except WsssError as error:
            return error
        return torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(label)  # sent by shared memory


def read_pair(store: Path, images: Path, item: Item) -> Pair:
    """Read a photograph and its label map. Raises StoreError if they changed."""
    photo = read_photograph(images, item.path)
    if photo.sha256 != item.sha256:
        raise StoreError(f"{images / item.path}: the image has changed since it was labeled", hint="label it again")
    label = read_label_map(store / "labels" / item.label)  # an absolute path, of a mask, stays as it is
    if label.shape != photo.shape:
        raise StoreError(f"{item.path}: the image is {photo.shape} pixels, its label {label.shape}", hint="label it again")
    return photo.pixels, label


def normalized(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(..., H, W, 3) uint8 to (..., 3, H, W) float32, whose channels stay last in memory: (pixels - mean) / std.

    Args:
        mean, std: (3,) float32 on the 0-255 scale, on the pixels' device.
    """
    return ((pixels.float() - mean) / std).movedim(-1, -3)


def collate(rows: Sequence[Batch | WsssError]) -> Batch | WsssError:
    """Concatenate rows into a batch, or return the first error among them."""
    good = []
    for row in rows:
        if isinstance(row, WsssError):
            return row
        good.append(row)
    return Batch(
        pixels=torch.cat([row.pixels for row in good]),
        label=torch.cat([row.label for row in good]),
        confidence=torch.cat([row.confidence for row in good]),
        item=torch.cat([row.item for row in good]),
    )


def workers_of(args: MachineArgs, world: World) -> int:
    """Number of processes that load images for this one; see `MachineArgs.workers`."""
    return args.workers if args.workers >= 0 else min(max(cores() // world.local_size, 1), MAX_WORKERS)


def batches(crops: Crops, positions: Positions, *, workers: int, pin: bool) -> Iterator[Batch]:
    """The batches of a run's forward passes, in order. Raises the error of an unreadable image."""
    loader = DataLoader(
        crops, batch_sampler=positions, collate_fn=collate, num_workers=workers, pin_memory=pin, worker_init_fn=_one_thread
    )
    yield from _without_errors(loader)


def whole_images(images: WholeImages, *, workers: int) -> Iterator[Pair]:
    """Photographs and their label maps, in order. Raises the error of an unreadable image."""
    loader = DataLoader(
        images, batch_size=None, collate_fn=_as_it_is, num_workers=min(workers, len(images)), worker_init_fn=_one_thread
    )
    for pixels, label in _without_errors(loader):
        yield pixels.numpy(), label.numpy()


def _without_errors(loaded: Iterable[Loaded | WsssError]) -> Iterator[Loaded]:
    for each in loaded:
        if isinstance(each, WsssError):
            raise each
        yield each


def _as_it_is(loaded: Loaded) -> Loaded:
    return loaded


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)  # workers share the cores


def ranked_confidence(items: Sequence[Item]) -> np.ndarray:
    """(N, C + 1) float32 weights in 0..2 by the rank of the store's confidence among the images with the same class.

    A class weighs twice the share of its pixels that lie in images of lower confidence, with half of those of the same: 1 on
    average over its pixels, whatever the scores. A detector is less sure of some classes than of others, and of all of them less
    than the store is of the background: with the scores themselves as weights, a network would learn to prefer the background,
    which weighs 1 here. So does a class without pixels.
    """
    confidence = np.array([item.confidence for item in items])
    pixels = np.array([item.pixels for item in items], np.float64)
    weights = np.ones_like(confidence, np.float32)
    for label in np.flatnonzero(pixels[:, 1:].any(axis=0)) + 1:
        _, value = np.unique(confidence[:, label], return_inverse=True)
        share = np.bincount(value, pixels[:, label]) / pixels[:, label].sum()
        weights[:, label] = (2 * np.cumsum(share) - share)[value]
    return weights


def ranked_pixels(counted: Sequence[Sequence[int]]) -> np.ndarray:
    """(C + 1, 256) float32 weights in 0..2 by the rank of a pixel's confidence among the pixels with the same label.

    A pixel weighs twice the share of its label's pixels with a lower confidence, with half of those with the same: as
    `ranked_confidence` with pixels in place of images, and for background too. A label without pixels weighs 1.

    Args:
        counted: (C + 1, 256), `Survey.confidence`.
    """
    pixels = np.array(counted, np.float64)
    total = pixels.sum(axis=1, keepdims=True)
    share = pixels / np.where(total > 0, total, 1)
    return np.where(total > 0, 2 * np.cumsum(share, axis=1) - share, 1).astype(np.float32)


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
