"""Drawn scenes that are hard for the chain: each kind has one difficulty that photographs have too. Truth as in `scenes`.

A scene depends on ``(kind, seed)`` alone. None of its seeds is one of the scenes that the mini models were trained on.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from PIL import Image

from .scenes import (
    CLASSES,
    DISTRACTORS,
    GROUNDS,
    Item,
    Scene,
    draw_ground,
    draw_item,
    draw_object,
    finished_scene,
    place_anywhere,
    place_items,
    random_size,
)

Kind = Literal["empty", "look-alikes", "overlap", "crowd", "small", "border", "grounds", "shifted"]
"""empty: distractors and look-alikes, none of the classes. look-alikes: objects beside items of `LOOK_ALIKES`. overlap: large
objects over one another. crowd: 6 to 10 small objects of two classes. small: diameters of 7 to 14 % of the shorter side. border:
objects cut by the edge. grounds: saturated, textured grounds. shifted: such grounds, blurred, with strong noise."""
KINDS: tuple[Kind, ...] = get_args(Kind)

LOOK_ALIKES = (
    "red star",
    "green hexagon",
    "blue triangle",
    "yellow disc",
    "purple ring",
    "orange drop",
    "white heart",
    "pink cross",
    "teal arrow",
    "striped diamond",
    "checkered box",
    "dotted crescent",
)
"""Things with the look of one class and the shape of another, which belong to none."""
_FIRST_LOOK_ALIKE = -len(DISTRACTORS) - 1


def draw_hard_scene(seed: int, kind: Kind) -> Scene:
    """Draw a scene of this kind: any seed from 0; the same ``(kind, seed)`` gives the same scene on every machine."""
    rng = np.random.default_rng([2, KINDS.index(kind), seed])  # 0 and 1 are the splits of `draw_scene`
    height, width = random_size(rng)
    ground = str(rng.choice(GROUNDS))
    pixels = _vivid_ground(rng, height, width) if kind in ("grounds", "shifted") else draw_ground(rng, ground, height, width)
    objects, others = _counts(rng, kind)
    classes = rng.integers(1, len(CLASSES) + 1, 2 if kind == "crowd" else max(objects, 1))
    alike = kind in ("empty", "look-alikes")
    lowest = _FIRST_LOOK_ALIKE - len(LOOK_ALIKES) + 1 if alike else -len(DISTRACTORS)
    highest = _FIRST_LOOK_ALIKE if kind == "look-alikes" else -1
    kinds = [*rng.choice(classes, objects).tolist(), *rng.integers(lowest, highest + 1, others).tolist()]
    owner, placed = place_items(
        rng,
        pixels,
        rng.permutation(kinds).astype(int).tolist(),
        diameters={"overlap": (0.35, 0.6), "crowd": (0.1, 0.2), "small": (0.07, 0.14)}.get(kind, (0.18, 0.5)),
        draw=_draw,
        place={"overlap": _place_near, "border": _place_at_edge}.get(kind, place_anywhere),
    )
    if kind == "shifted":
        pixels = _degraded(rng, pixels)
    return finished_scene(rng, pixels, owner, placed, ground)


def _counts(rng: np.random.Generator, kind: Kind) -> tuple[int, int]:
    """Numbers of objects, and of items that belong to no class."""
    if kind == "empty":
        return 0, int(rng.integers(1, 6))
    if kind == "look-alikes":
        return int(rng.integers(1, 4)), int(rng.integers(2, 5))
    if kind == "crowd":
        return int(rng.integers(6, 11)), int(rng.integers(0, 2))
    return int(rng.integers(2, 6) if kind == "overlap" else rng.integers(1, 5)), int(rng.integers(0, 3))


def _draw(rng: np.random.Generator, kind: int, diameter: float) -> Item:
    if kind <= _FIRST_LOOK_ALIKE:
        return draw_object(rng, LOOK_ALIKES[_FIRST_LOOK_ALIKE - kind], diameter)
    return draw_item(rng, kind, diameter)


def _place_near(rng: np.random.Generator, owner: np.ndarray, item: Item, spots: list[tuple[int, int]]) -> tuple[int, int]:
    """Over an item that is there."""
    if not spots:
        return place_anywhere(rng, owner, item, spots)
    (height, width), (h, w) = owner.shape, item.cover.shape
    x, y = spots[int(rng.integers(len(spots)))]
    turn, far = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 0.6) * max(h, w)
    x, y = int(np.clip(x + far * np.cos(turn), 0, width)), int(np.clip(y + far * np.sin(turn), 0, height))
    return x - w // 2, y - h // 2


def _place_at_edge(rng: np.random.Generator, owner: np.ndarray, item: Item, spots: list[tuple[int, int]]) -> tuple[int, int]:
    """Cut by an edge of the picture."""
    (height, width), (h, w) = owner.shape, item.cover.shape
    inside = rng.uniform(0.05, 0.25)
    left, top = int(rng.uniform(0, max(width - w, 1))), int(rng.uniform(0, max(height - h, 1)))
    edge = int(rng.integers(4))
    if edge < 2:
        return int(inside * w - w / 2 if edge else width - inside * w - w / 2), top
    return left, int(inside * h - h / 2 if edge == 2 else height - inside * h - h / 2)


def _vivid_ground(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W, 3) float32 in 0-255: patches of saturated colors under a fine texture."""
    cells = int(rng.integers(2, 7))
    coarse = Image.fromarray(rng.integers(40, 216, (cells, cells, 3), dtype=np.uint8))
    ground = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32).copy()
    x, y = np.arange(width, dtype=np.float32)[None, :], np.arange(height, dtype=np.float32)[:, None]
    turn, period = rng.uniform(0, np.pi), rng.uniform(0.02, 0.08) * min(height, width)
    across = (x * np.float32(np.cos(turn)) + y * np.float32(np.sin(turn))) * np.float32(2 * np.pi / period)
    along = (y * np.float32(np.cos(turn)) - x * np.float32(np.sin(turn))) * np.float32(2 * np.pi / period)
    ground *= 1 + np.float32(rng.uniform(0.1, 0.3)) * (np.sin(across) * np.sin(along))[..., None]
    return ground


def _degraded(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) float32: blurred as by enlarging, with the noise of a high sensitivity."""
    height, width = pixels.shape[:2]
    scale = rng.uniform(0.3, 0.6)
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    small = picture.resize((max(round(width * scale), 1), max(round(height * scale), 1)), Image.Resampling.BILINEAR)
    blurred = np.asarray(small.resize((width, height), Image.Resampling.BILINEAR), np.float32)
    return blurred + rng.standard_normal(pixels.shape, np.float32) * np.float32(rng.uniform(8, 22))
