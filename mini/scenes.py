"""Drawn scenes with exact truth, on which the mini models are trained and tested. Needs numpy and Pillow only.

A class is a shape with a texture or a color ("red disc", "striped box"). A distractor has the color, texture or shape of a
class, but never all that defines it, and belongs to no class. A scene depends on ``(split, seed)`` alone, through PCG64.
"""

from __future__ import annotations

import colorsys
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from ..classes import MINI_CLASSES, palette

Split = Literal["train", "held-out"]
Points = np.ndarray  # (P, 2) float64, x and y within the unit circle

CLASSES = MINI_CLASSES
"""The object classes; label i is ``CLASSES[i - 1]``."""

GROUNDS: tuple[str, ...] = ("plain ground", "gradient ground", "noisy ground", "faint stripes")
DISTRACTORS: tuple[str, ...] = ("grey polygon", "coloured blob", "brown bar", "dark squiggle")
BACKGROUNDS: tuple[str, ...] = GROUNDS + DISTRACTORS
"""Names of everything that belongs to no class: kinds of ground, then kinds of distractor."""

ASPECTS: tuple[float, ...] = (4 / 3, 3 / 4, 1.0, 16 / 9, 9 / 16)
SHORTEST_PX, LONGEST_PX = 160, 640
OBJECT_COUNT_SHARES = (0.08, 0.24, 0.27, 0.20, 0.13, 0.08)
"""Share of scenes with 0, 1, ... 5 objects."""
LEAST_VISIBLE_SHARE, LEAST_VISIBLE_PX = 0.25, 80
JPEG_QUALITY = 92

# First part of the random generator's seed: scenes of the two splits never share a stream.
_SPLIT_ID: dict[str, int] = {"train": 0, "held-out": 1}

# (hue in degrees, its jitter), saturation range, value range
_COLORS: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((357, 6), (0.78, 0.95), (0.70, 0.95)),
    "orange": ((25, 5), (0.82, 0.98), (0.85, 1.00)),
    "yellow": ((53, 4), (0.75, 0.95), (0.85, 1.00)),
    "green": ((128, 14), (0.60, 0.90), (0.45, 0.80)),
    "teal": ((178, 6), (0.70, 0.95), (0.55, 0.80)),
    "blue": ((223, 10), (0.70, 0.95), (0.60, 0.95)),
    "purple": ((276, 8), (0.60, 0.85), (0.50, 0.85)),
    "pink": ((330, 7), (0.38, 0.58), (0.92, 1.00)),
    "white": ((0, 180), (0.00, 0.05), (0.93, 1.00)),
    "grey": ((0, 180), (0.00, 0.06), (0.25, 0.70)),
    "brown": ((24, 5), (0.50, 0.70), (0.25, 0.42)),
    "dark": ((0, 180), (0.00, 0.30), (0.04, 0.16)),
}
_TEXTURES = ("striped", "checkered", "dotted")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A drawn photograph and its truth. The caller owns the arrays."""

    pixels: np.ndarray
    """(H, W, 3) uint8, RGB."""
    label: np.ndarray
    """(H, W) uint8: 0 is background and distractors, i is ``CLASSES[i - 1]``."""
    instance: np.ndarray
    """(H, W) uint8: 0 is no object, k marks the visible pixels of object k - 1."""
    labels: np.ndarray
    """(N,) int64, class of each object, from 1. N may be 0."""
    xyxy_image: np.ndarray
    """(N, 4) float32, tight box of each object's visible pixels; x2 and y2 are exclusive."""
    ground: str
    """Kind of ground, from ``GROUNDS``."""
    distractors: tuple[str, ...]
    """Kinds of the scene's distractors, from ``DISTRACTORS``."""


@dataclass(frozen=True, slots=True)
class Item:
    """A drawn item in a window of its size: color (h, w, 3) float32 in 0-255, cover (h, w) float32 in 0-1."""

    color: np.ndarray
    cover: np.ndarray
    area_px: int


Place = Callable[[np.random.Generator, np.ndarray, Item, list[tuple[int, int]]], tuple[int, int]]
"""Gives the left and top edge of an item, from the owner map (H, W) and the centers (x, y) of the items already placed."""


# ---- shapes: outlines within the unit circle, x to the right and y down ----


def _arc(start: float, stop: float, count: int, radius: float = 1.0) -> Points:
    angle = np.linspace(start, stop, count)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _regular(corners: int) -> Points:
    return _arc(0, 2 * np.pi * (corners - 1) / corners, corners)


def _star() -> Points:
    points = _regular(10)
    points[1::2] *= 0.45
    return points


def _crescent() -> Points:
    outer, inner = _arc(0.62, 2 * np.pi - 0.62, 48), _arc(2 * np.pi - 0.95, 0.95, 40, 0.78)
    return np.concatenate([outer, inner + np.array([0.36, 0.0])])


def _heart() -> Points:
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2.5], axis=1) / 17.0


def _drop() -> Points:
    round_end = _arc(-0.25 * np.pi, 1.25 * np.pi, 48, 0.64) + np.array([0.0, 0.34])
    return np.concatenate([round_end, [[0.0, -1.0]]])


def _cross() -> Points:
    a, b = 0.95, 0.31
    return np.array([[-b, -a], [b, -a], [b, -b], [a, -b], [a, b], [b, b], [b, a], [-b, a], [-b, b], [-a, b], [-a, -b], [-b, -b]])


def _arrow() -> Points:
    return np.array([[1, 0], [0.15, 0.75], [0.15, 0.3], [-0.95, 0.3], [-0.95, -0.3], [0.15, -0.3], [0.15, -0.75]])


_SHAPES: dict[str, Callable[[], Points]] = {
    "disc": lambda: _regular(64),
    "triangle": lambda: _regular(3),
    "ring": lambda: _regular(64),
    "star": _star,
    "hexagon": lambda: _regular(6),
    "crescent": _crescent,
    "cross": _cross,
    "arrow": _arrow,
    "drop": _drop,
    "box": lambda: _regular(4),
    "diamond": lambda: _regular(4) * [0.68, 1.0],
    "heart": _heart,
}
_UPRIGHT_SHAPES: dict[str, float] = {"triangle": -90, "star": -90, "box": 45}
"""Degrees that turn the outline upright; random rotations are added to it."""


# ---- one item in its window ----


def _rgb(rng: np.random.Generator, color: str) -> np.ndarray:
    (hue, spread), saturation, value = _COLORS[color]
    hsv = ((hue + rng.uniform(-spread, spread)) % 360 / 360, rng.uniform(*saturation), rng.uniform(*value))
    return np.array(colorsys.hsv_to_rgb(*hsv), dtype=np.float32) * 255


def _textured(rng: np.random.Generator, texture: str, u: np.ndarray, v: np.ndarray, softness: float) -> np.ndarray:
    """Mix a light and a dark color of random hue by a pattern; u and v (h, w) run from -1 to 1 in the object."""
    light = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.0, 0.45), rng.uniform(0.9, 1.0)))
    dark = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.5, 0.9), rng.uniform(0.15, 0.5)))
    if texture == "striped":
        wave = np.sin(u * np.pi * rng.uniform(3.6, 4.6) + rng.uniform(0, 6))
    elif texture == "checkered":
        beat = np.pi * rng.uniform(2.6, 3.2)
        wave = np.sin((u + v) * beat / 1.2) * np.sin((u - v) * beat / 1.2) * 1.6
    else:
        beat = np.pi * rng.uniform(3.0, 3.6)
        wave = (np.cos(u * beat) + np.cos(v * beat)) * 0.8 - 0.55
    share = np.clip(wave / softness + 0.5, 0, 1)[..., None]
    mixed = light * share + dark * (1 - share)  # (h, w, 3)
    return mixed.astype(np.float32) * 255


def _painted(rng: np.random.Generator, outline: Points, diameter: float, degrees: float, fill: str, hole: float = 0.0) -> Item:
    """Draw an outline of this diameter, filled with a named color or texture; ``hole`` is the share of its radius left open."""
    turn = np.deg2rad(degrees)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    points = outline @ rotation.T * (diameter / 2)
    side = np.ceil(np.abs(points).max(axis=0)).astype(int) * 2 + 2  # (w, h), the object's center in the middle
    scale = 4 if diameter < 100 else 2  # supersampling
    canvas = Image.new("L", (int(side[0]) * scale, int(side[1]) * scale))
    pen, center = ImageDraw.Draw(canvas), side * scale / 2 - 0.5
    pen.polygon([(float(x), float(y)) for x, y in points * scale + center], fill=255)
    if hole:
        pen.polygon([(float(x), float(y)) for x, y in points * scale * hole + center], fill=0)
    cover = np.asarray(canvas.reduce(scale), dtype=np.float32) / 255

    x = (np.arange(side[0], dtype=np.float32) + 0.5 - side[0] / 2) / (diameter / 2)
    y = (np.arange(side[1], dtype=np.float32) + 0.5 - side[1] / 2)[:, None] / (diameter / 2)
    u = x * np.float32(np.cos(turn)) + y * np.float32(np.sin(turn))
    v = y * np.float32(np.cos(turn)) - x * np.float32(np.sin(turn))
    if fill in _TEXTURES:
        color = _textured(rng, fill, u, v, softness=min(1.0, 12 / diameter))
    else:
        color = np.broadcast_to(_rgb(rng, fill), (*cover.shape, 3))
    # Shading: one side is a little darker, in a random direction.
    lamp, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.0, 0.16)
    shade = 1 - strength * (0.5 + 0.5 * (x * np.float32(np.cos(lamp)) + y * np.float32(np.sin(lamp))))
    return Item(color * shade[..., None].astype(np.float32), cover, int((cover >= 0.5).sum()))


def draw_object(rng: np.random.Generator, name: str, diameter: float) -> Item:
    """Draw an object of a class, or of another pair of a look and a shape: ``red star``."""
    look, shape = name.split()
    degrees = _UPRIGHT_SHAPES.get(shape, 0) + (rng.uniform(-180, 180) if rng.random() < 0.5 else rng.normal(0, 15))
    outline = _SHAPES[shape]() * [rng.uniform(0.88, 1.0), 1.0]
    return _painted(rng, outline, diameter, degrees, look, hole=rng.uniform(0.5, 0.6) if shape == "ring" else 0.0)


def draw_item(rng: np.random.Generator, kind: int, diameter: float) -> Item:
    """Draw an object of class ``kind``, or distractor ``-kind``; both count from 1."""
    return draw_object(rng, CLASSES[kind - 1], diameter) if kind > 0 else _distractor(rng, DISTRACTORS[-kind - 1], diameter)


def _distractor(rng: np.random.Generator, kind: str, diameter: float) -> Item:
    degrees = rng.uniform(-180, 180)
    if kind == "grey polygon":
        corners = int(rng.integers(3, 8))
        outline = _regular(corners) * rng.uniform(0.75, 1.0, (corners, 1))
        return _painted(rng, outline, diameter, degrees, "grey")
    if kind == "brown bar":
        half = rng.uniform(0.10, 0.22)
        outline = np.array([[-1, -half], [1, -half], [1, half], [-1, half]])
        return _painted(rng, outline, diameter * 1.3, degrees, "brown")
    angle = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    if kind == "coloured blob":
        radius = np.full(72, 0.62)
        for waves in (2, 3, 4):
            radius += rng.uniform(0.10, 0.22) * np.sin(waves * angle + rng.uniform(0, 6))
        outline = _regular(72) * radius[:, None]
        fill = str(rng.choice([*list(_COLORS)[:8], *_TEXTURES]))
        return _painted(rng, outline, diameter, degrees, fill)
    spine = np.linspace(-1, 1, 40)
    wave = 0.35 * np.sin(spine * rng.uniform(4, 8) + rng.uniform(0, 6)) + rng.uniform(-0.2, 0.2) * spine
    half = rng.uniform(0.05, 0.09)
    ribbon = [np.stack([spine, wave - half], axis=1), np.stack([spine, wave + half], axis=1)[::-1]]
    return _painted(rng, np.concatenate(ribbon), diameter * 1.2, degrees, "dark")


# ---- the ground, and the whole scene ----


def draw_ground(rng: np.random.Generator, kind: str, height: int, width: int) -> np.ndarray:
    """(H, W, 3) float32 in 0-255: muted colors between dark and middle gray, so that white and yellow stand out."""

    def muted() -> np.ndarray:
        hsv = (rng.random(), rng.uniform(0.0, 0.32), rng.uniform(0.20, 0.66))
        return np.array(colorsys.hsv_to_rgb(*hsv), dtype=np.float32) * 255

    first = muted()
    ground: np.ndarray = np.empty((height, width, 3), dtype=np.float32)
    ground[:] = first
    if kind == "plain ground":
        return ground
    if kind == "noisy ground":
        cells = int(rng.integers(6, 40))
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
        noise = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / 255 - 0.5
        ground *= 1 + np.float32(rng.uniform(0.2, 0.6)) * noise[..., None]
        return ground
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    turn = rng.uniform(0, 2 * np.pi)
    along = x * np.float32(np.cos(turn)) + y * np.float32(np.sin(turn))  # (H, W), -1.4 to 1.4
    if kind == "gradient ground":
        share = np.clip(along * 0.4 + 0.5, 0, 1)[..., None]
        ground += (muted() - first) * share
        return ground
    wave = np.sin(along * np.float32(rng.uniform(12, 40)))[..., None]
    ground *= 1 + np.float32(rng.uniform(0.04, 0.12)) * wave
    return ground


def _paste(pixels: np.ndarray, item: Item, left: int, top: int) -> None:
    """Blend an item into (H, W, 3) float32 pixels, clipped to the image."""
    window, inner = _overlap(pixels.shape, item.cover.shape, left, top)
    cover = item.cover[inner][..., None]
    pixels[window] += (item.color[inner] - pixels[window]) * cover


def _overlap(
    image: tuple[int, ...], window: tuple[int, ...], left: int, top: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    y1, y2 = max(top, 0), min(top + window[0], image[0])
    x1, x2 = max(left, 0), min(left + window[1], image[1])
    return (slice(y1, y2), slice(x1, x2)), (slice(y1 - top, y2 - top), slice(x1 - left, x2 - left))


def _finish(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Add brightness, tint, a gradient of light, and sensor noise; (H, W, 3) float32 to uint8."""
    height, width = pixels.shape[:2]
    gain = rng.uniform(0.78, 1.12) * rng.uniform(0.95, 1.05, 3)
    turn, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.15)
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :] * np.float32(np.cos(turn) * strength)
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None] * np.float32(np.sin(turn) * strength)
    pixels *= (1 + x + y)[..., None]
    pixels *= gain.astype(np.float32)
    pixels += rng.standard_normal((height, width, 1), dtype=np.float32) * np.float32(rng.uniform(0, 6))
    np.clip(pixels, 0, 255, out=pixels)
    return (pixels + 0.5).astype(np.uint8)


def random_size(rng: np.random.Generator) -> tuple[int, int]:
    aspect = float(rng.choice(ASPECTS))
    stretch = max(aspect, 1 / aspect)
    short = float(np.exp(rng.uniform(np.log(SHORTEST_PX), np.log(LONGEST_PX / stretch))))
    long = min(round(short * stretch), LONGEST_PX)
    return (round(short), long) if aspect >= 1 else (long, round(short))


def place_anywhere(rng: np.random.Generator, owner: np.ndarray, item: Item, spots: list[tuple[int, int]]) -> tuple[int, int]:
    """Top left corner of an item: at a random place, perhaps partly outside the image, or near an item already drawn."""
    (height, width), (h, w) = owner.shape, item.cover.shape
    if spots and rng.random() < 0.35:
        x, y = spots[int(rng.integers(len(spots)))]
        turn, far = rng.uniform(0, 2 * np.pi), rng.uniform(0.45, 0.9) * max(h, w)
        x, y = int(x + far * np.cos(turn)), int(y + far * np.sin(turn))
    else:
        x, y = int(rng.uniform(0.32 * w, width - 0.32 * w)), int(rng.uniform(0.32 * h, height - 0.32 * h))
    return int(np.clip(x, 0.2 * w, width - 0.2 * w) - w / 2), int(np.clip(y, 0.2 * h, height - 0.2 * h) - h / 2)


def draw_scene(seed: int, *, split: Split = "train", size: tuple[int, int] | None = None) -> Scene:
    """Draw a scene of 0 to 5 objects and 0 to 3 distractors, with exact truth.

    At least a quarter and at least 80 pixels of every object are visible; its diameter is 18-50 % of the shorter side.

    Args:
        seed: any number from 0; the same ``(split, seed, size)`` gives the same scene on every machine.
        split: scenes of different splits never share a random stream.
        size: (height, width) in pixels; None draws it at random: 160-640 px in one of ``ASPECTS``.
    """
    rng = np.random.default_rng([_SPLIT_ID[split], seed])
    height, width = size or random_size(rng)
    ground = str(rng.choice(GROUNDS))
    pixels = draw_ground(rng, ground, height, width)

    # Items to draw, from the bottom up: a class (1-12) or minus the number of a distractor (-1 to -4).
    objects = rng.integers(1, len(CLASSES) + 1, rng.choice(len(OBJECT_COUNT_SHARES), p=OBJECT_COUNT_SHARES))
    others = -rng.integers(1, len(DISTRACTORS) + 1, rng.choice(4, p=(0.3, 0.35, 0.25, 0.1)))
    items = rng.permutation(np.concatenate([objects, others]))

    owner, kinds = place_items(rng, pixels, items.tolist())
    return finished_scene(rng, pixels, owner, kinds, ground)


def place_items(
    rng: np.random.Generator,
    pixels: np.ndarray,
    kinds: Sequence[int],
    *,
    diameters: tuple[float, float] = (0.18, 0.50),
    draw: Callable[[np.random.Generator, int, float], Item] = draw_item,
    place: Place = place_anywhere,
) -> tuple[np.ndarray, list[int]]:
    """Draw items into a picture, from the bottom up; an item without a usable place is left out.

    Args:
        pixels: (H, W, 3) float32 in 0-255, changed in place.
        kinds: of the items: classes from 1, or negative numbers, which mean what ``draw`` takes them for.
        diameters: shares of the shorter side.

    Returns:
        owner (H, W) uint8, the placed item that each pixel shows, from 1; the kind of each placed item.
    """
    height, width = pixels.shape[:2]
    low, high = np.log(diameters[0]), np.log(diameters[1])
    owner = np.zeros((height, width), dtype=np.uint8)
    placed: list[int] = []
    areas: list[int] = []
    spots: list[tuple[int, int]] = []
    for kind in kinds:
        item = draw(rng, kind, min(height, width) * float(np.exp(rng.uniform(low, high))))
        for _ in range(8):
            left, top = place(rng, owner, item, spots)
            window, inner = _overlap(owner.shape, item.cover.shape, left, top)
            solid = item.cover[inner] >= 0.5
            if _is_unusable(owner, window, solid, item.area_px, kind, placed, areas):
                continue
            _paste(pixels, item, left, top)
            placed.append(kind)
            areas.append(item.area_px)
            spots.append((left + item.cover.shape[1] // 2, top + item.cover.shape[0] // 2))
            owner[window][solid] = len(placed)
            break
    return owner, placed


def finished_scene(rng: np.random.Generator, pixels: np.ndarray, owner: np.ndarray, kinds: list[int], ground: str) -> Scene:
    """The scene of a picture (H, W, 3) float32 and what `place_items` returned; changes its light and adds sensor noise."""
    instance, label, labels, boxes = _truth(owner, kinds)
    return Scene(
        pixels=_finish(rng, pixels),
        label=label,
        instance=instance,
        labels=labels,
        xyxy_image=boxes,
        ground=ground,
        distractors=tuple(DISTRACTORS[-kind - 1] for kind in kinds if -len(DISTRACTORS) <= kind < 0),
    )


def _is_unusable(
    owner: np.ndarray,
    window: tuple[slice, slice],
    solid: np.ndarray,
    area_px: int,
    kind: int,
    kinds: list[int],
    areas: list[int],
) -> bool:
    """Whether an item would hide too much of another, be hidden too much itself, or overlap one of the same kind."""
    shown = int(solid.sum())
    if shown < max(LEAST_VISIBLE_PX, 0.5 * area_px):
        return True
    hidden = np.bincount(owner[window][solid], minlength=len(kinds) + 1)[1:]
    if not hidden.any():
        return False
    left = np.bincount(owner.ravel(), minlength=len(kinds) + 1)[1:] - hidden
    least = np.maximum(LEAST_VISIBLE_PX, LEAST_VISIBLE_SHARE * np.array(areas))
    alike = np.array(kinds) == kind
    return bool((((left < least) | alike) & (hidden > 0)).any())


def _truth(owner: np.ndarray, kinds: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """instance (H, W), label (H, W), labels (N,) and boxes (N, 4) from the owner map, without distractors."""
    is_object = np.array([False, *(kind > 0 for kind in kinds)])
    number = np.where(is_object, np.cumsum(is_object), 0).astype(np.uint8)
    label_of = np.array([0, *(max(kind, 0) for kind in kinds)], dtype=np.uint8)
    instance = number[owner]
    labels = np.array([kind for kind in kinds if kind > 0], dtype=np.int64)
    boxes = np.zeros((len(labels), 4), dtype=np.float32)
    for row in range(len(labels)):
        mask = instance == row + 1
        xs, ys = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        boxes[row] = xs[0], ys[0], xs[-1] + 1, ys[-1] + 1
    return instance, label_of[owner], labels, boxes


def write_scenes(
    folder: Path,
    count: int,
    *,
    seed: int = 0,
    split: Split = "held-out",
    draw: Callable[[int], Scene] | None = None,
) -> list[Path]:
    """Write scenes ``seed`` to ``seed + count - 1`` and their truth; returns the JPEG paths.

    - ``images/<stem>.jpg``: the photographs and nothing else, so that the folder can be labeled directly;
    - ``truth/<stem>.png``: 8-bit palette label maps, 0 background;
    - ``labels.json``: file name -> class names, in the format of ``wsss label --labels``;
    - ``truth.json``: file name -> the objects' ``labels`` (from 1) and ``xyxy_image``.

    Args:
        draw: the scene of a seed, in place of `draw_scene` with this split.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "truth").mkdir(exist_ok=True)
    paths: list[Path] = []
    names: dict[str, list[str]] = {}
    truth: dict[str, dict[str, list[int] | list[list[float]]]] = {}
    for number in range(seed, seed + count):
        scene = draw_scene(number, split=split) if draw is None else draw(number)
        path = folder / "images" / f"scene-{number:05d}.jpg"
        Image.fromarray(scene.pixels).save(path, quality=JPEG_QUALITY)
        label_map = Image.fromarray(scene.label)
        label_map.putpalette(palette().tobytes())
        label_map.save(folder / "truth" / f"{path.stem}.png")
        names[path.name] = [CLASSES[label - 1] for label in np.unique(scene.labels).tolist()]
        truth[path.name] = {"labels": scene.labels.tolist(), "xyxy_image": scene.xyxy_image.tolist()}
        paths.append(path)
    (folder / "labels.json").write_text(json.dumps(names, indent=1) + "\n")
    (folder / "truth.json").write_text(json.dumps(truth) + "\n")
    return paths
