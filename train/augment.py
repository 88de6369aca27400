"""Random crops of a labeled photograph: its scale, place, mirror image and colors.

Only the part of the photograph that the crop shows is resized.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..batch import VOID
from ..frame import scaled, shorter_factor
from ..pixels.pictures import picture_of
from .args import DataArgs

_CROPS_TRIED = 10
_LEVELS = np.arange(256, dtype=np.float32)
Window = tuple[int, int, int, int]
"""Left, top, right and bottom edge, in pixels."""


def working_size(shape: tuple[int, ...], args: DataArgs, scale: float = 1.0) -> tuple[int, int]:
    """(height, width) to which a photograph of (height, width) is resized for the network, times ``scale``."""
    height, width = shape
    return scaled(height, width, scale * (shorter_factor(height, width, args.shorter_px) if args.shorter_px else 1))


def random_crop(
    pixels: np.ndarray, label: np.ndarray, args: DataArgs, rng: np.random.Generator, confidence: np.ndarray | None = None
) -> tuple[np.ndarray, ...]:
    """Cut an augmented square out of a photograph that is resized by a random factor.

    The square may lie anywhere in the resized photograph. One that is too small lies anywhere in the square, which is filled up
    with the mean color and void. See `DataArgs` for the settings.

    Args:
        pixels: (H, W, 3) uint8 RGB. label: (H, W) uint8. confidence: (H, W) uint8 of the label, or None.

    Returns:
        Pixels (crop, crop, 3) and label (crop, crop), uint8, C-contiguous; and the confidence (crop, crop) if there is one.
    """
    size = working_size(label.shape, args, random_scale(args, rng))
    window = random_window(label, size, args, rng)
    crop = np.empty((args.crop, args.crop, 3), np.uint8)
    maps = [label] if confidence is None else [label, confidence]
    masks = [np.full((args.crop, args.crop), VOID, np.uint8) for _ in maps]
    left, top, right, bottom = inside = _intersection(window, size)
    place = np.s_[top - window[1] : bottom - window[1], left - window[0] : right - window[0]]
    if inside != window:
        crop[:] = [round(value) for value in args.mean]
    crop[place] = distorted(resized(pixels, size, inside), args.jitter, rng)
    for mask, each in zip(masks, maps, strict=True):
        mask[place] = resized_label(each, size, inside)
    if rng.random() < args.flip:
        return tuple(np.ascontiguousarray(each[:, ::-1]) for each in (crop, *masks))
    return crop, *masks


def random_scale(args: DataArgs, rng: np.random.Generator) -> float:
    """One of ``args.scales``, or, if there are none, a factor in ``args.scale``."""
    return float(rng.choice(args.scales) if args.scales else rng.uniform(*args.scale))


def random_window(label: np.ndarray, size: tuple[int, int], args: DataArgs, rng: np.random.Generator) -> Window:
    """A random square of ``args.crop`` pixels in a photograph of ``size``, or around it where that is smaller.

    Squares in which one label covers more than ``args.largest_share`` are drawn again, up to ten times.
    """
    rooms = [length - args.crop for length in size]
    for _ in range(_CROPS_TRIED):
        top, left = (int(rng.integers(min(room, 0), max(room, 0) + 1)) for room in rooms)
        window = left, top, left + args.crop, top + args.crop
        if args.largest_share == 1:
            break
        known = np.bincount(resized_label(label, size, _intersection(window, size)).ravel(), minlength=256)[:VOID]
        if known.max() < args.largest_share * known.sum():
            break
    return window


def _intersection(window: Window, size: tuple[int, int]) -> Window:
    left, top, right, bottom = window
    return max(left, 0), max(top, 0), min(right, size[1]), min(bottom, size[0])


def resized(pixels: np.ndarray, size: tuple[int, int], window: Window | None = None) -> np.ndarray:
    """Resize a photograph with Pillow's antialiased bilinear filter, as the runtime does.

    Args:
        pixels: (H, W, 3) uint8. size: (height, width) of the resized photograph.
        window: the part of it that is computed; at most one gray level from the same part of the whole. None: all of it.

    Returns:
        (height, width, 3) uint8, or the size of ``window``.
    """
    left, top, right, bottom = window or (0, 0, size[1], size[0])
    if pixels.shape[:2] == size:
        return pixels[top:bottom, left:right]
    down, across = pixels.shape[0] / size[0], pixels.shape[1] / size[1]
    box = left * across, top * down, min(right * across, pixels.shape[1]), min(bottom * down, pixels.shape[0])
    return np.asarray(picture_of(pixels).resize((right - left, bottom - top), Image.Resampling.BILINEAR, box))


def resized_label(label: np.ndarray, size: tuple[int, int], window: Window | None = None) -> np.ndarray:
    """Resize (H, W) uint8 to ``size`` by taking the label at the center of each pixel; or only a part, as `resized`."""
    left, top, right, bottom = window or (0, 0, size[1], size[0])
    if label.shape == size:
        return label[top:bottom, left:right]
    rows, columns = (
        (2 * np.arange(first, last) + 1) * length // (2 * new)
        for first, last, length, new in ((top, bottom, label.shape[0], size[0]), (left, right, label.shape[1], size[1]))
    )
    return label[rows][:, columns]


def distorted(pixels: np.ndarray, jitter: tuple[float, float, float, float], rng: np.random.Generator) -> np.ndarray:
    """Change the colors at random as mmsegmentation's ``PhotoMetricDistortion``: each of four changes with probability 0.5.

    In their order: a brightness that is added; a contrast that multiplies the values, here or at the end; a saturation that
    multiplies HSV's; a hue that is added to HSV's. HSV has 8 bits a channel.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        jitter: largest change of brightness (as a share of 255), of the factors of contrast and saturation from 1, and of hue
            (as a share of the circle).

    Returns:
        (H, W, 3) uint8.
    """
    if not any(jitter):
        return pixels
    added, contrast, saturation, hue = rng.uniform(-1, 1, 4) * jitter * (rng.random(4) < 0.5)
    is_contrast_last = rng.random() < 0.5
    first = _clipped(_LEVELS + 255 * added)
    last = _clipped(_LEVELS * (1 + contrast))
    if not is_contrast_last:
        first, last = last[first], _clipped(_LEVELS)
    picture = _mapped(picture_of(pixels), first)
    if saturation or hue:
        turned = (np.arange(256) + round(256 * hue)) % 256
        scaled_saturation = _clipped(_LEVELS * (1 + saturation))
        tables = [*turned.tolist(), *scaled_saturation.tolist(), *range(256)]
        picture = picture.convert("HSV").point(tables).convert("RGB")
    return np.asarray(_mapped(picture, last))


def _mapped(picture: Image.Image, table: np.ndarray) -> Image.Image:
    """The picture with ``table`` applied to the values of all channels."""
    return picture if (table == _LEVELS).all() else picture.point(table.tolist() * 3)


def _clipped(levels: np.ndarray) -> np.ndarray:
    return levels.clip(0, 255).astype(np.uint8)  # truncated, as mmsegmentation does
