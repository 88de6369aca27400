"""Makes the stages' inputs on a GPU: a photograph is copied there once, and a graph resizes it (`export/resize.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import cast

import numpy as np

from ..batch import Photograph
from ..engines.engine import Engine, outliving, uploaded
from ..errors import OutOfMemory
from ..pixels.pictures import order_of, rgbx_of
from .canvas import Rows

ON_DEVICE = "rgbx"
Window = tuple[int, int, int, int]
"""(y0, y1, x0, x1) in pixels of the photograph."""


class Resizer:
    """A model's resizing engines, one for each canvas.

    Args:
        engine_of: opens the engine of a canvas (height, width); called at first use.
    """

    def __init__(self, engine_of: Callable[[tuple[int, int]], Engine]) -> None:
        self._engine_of = lru_cache(maxsize=None)(engine_of)
        self._order = order_of()

    def takes(self, photo: Photograph, canvas: tuple[int, int], windows: int = 1) -> bool:
        """Whether the engine of this canvas makes this number of windows: they and the photograph are within its range, and
        Pillow's order is known."""
        axes = self._engine_of(canvas).axes
        height, width = photo.shape
        lengths = {"photo_height": height, "photo_width": width, "views": windows}
        return self._order is not None and all(axes[axis].min <= length <= axes[axis].max for axis, length in lengths.items())

    def __call__(
        self, photo: Photograph, windows: Sequence[Window], size: tuple[int, int], canvas: tuple[int, int]
    ) -> Rows | None:
        """Windows of a photograph that it `takes`, each resized to (height, width) at the top left of a black canvas.

        The photograph stays on the device for the stages that follow, until the last one clears ``photo.on_device``: four bytes a
        pixel of the photographs that a run has in memory, of which it limits the sum.

        Returns:
            (V, H, W, 3) uint8 on the engine's device, which stays valid; None if the device has no memory for it.
        """
        assert self._order is not None
        engine, order = self._engine_of(canvas), self._order
        try:
            pixels = photo.on_device.get(ON_DEVICE)
            if pixels is None:
                pixels = photo.on_device[ON_DEVICE] = uploaded(engine, rgbx_of(photo.pixels))
            feeds = {
                "photo": pixels,
                "window": np.array(windows, np.int64),
                "size": np.array([size] * len(windows), np.int64),
                "columns_first": np.array([order((y1 - y0, x1 - x0), size) for y0, y1, x0, x1 in windows]),
            }
            return cast(Rows, outliving(engine(feeds)["pixels"]))
        except OutOfMemory:
            photo.on_device.clear()
            return None
