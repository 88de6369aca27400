"""Overlays of label maps on photographs."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .classes import palette


def overlay(pixels: np.ndarray, label_map: np.ndarray, *, strength: float = 0.55, colors: np.ndarray | None = None) -> np.ndarray:
    """Blend a label map over its photograph; outlines are opaque.

    Args:
        pixels: (H, W, 3) uint8 RGB. label_map: (H, W) uint8.
        strength: opacity of the label; 0 shows only the photograph. Background is transparent.
        colors: (256, 3) uint8 RGB; VOC's by default.

    Returns:
        (H, W, 3) uint8.
    """
    painted = (palette() if colors is None else colors)[label_map]
    outline = np.zeros(label_map.shape, bool)
    outline[1:, :] |= label_map[1:, :] != label_map[:-1, :]
    outline[:, 1:] |= label_map[:, 1:] != label_map[:, :-1]
    share = np.where(outline, 1.0, np.where(label_map == 0, 0.0, strength))[:, :, None]
    return np.round(pixels * (1 - share) + painted * share).astype(np.uint8)


def shrink(image: np.ndarray, longest_px: int) -> Image.Image:
    """A thumbnail whose longest side is at most ``longest_px``."""
    thumbnail = Image.fromarray(image)
    thumbnail.thumbnail((longest_px, longest_px))
    return thumbnail
