"""The resizing graph: a photograph to the canvas of a model, or to CLIP's views of it, as Pillow resizes.

Pillow's antialiased resize is linear along each axis: every value of a row is a weighted mean of the values around it, rounded to
8 bits, and then the same along the columns. The graph makes the two matrices of weights from the sizes and multiplies. On a GPU,
the photograph is then the only thing that is copied there (0.75 MB of PASCAL VOC, instead of 7.1 MB of canvases and views).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..frame import frame_for
from ..spec import AxisRange, Preprocess, TensorSpec
from .family import Feeds, Graph, Tolerance
from .precision.lowering import Fp32
from .verify import photograph

SIDE_PX = AxisRange(1, 512, 4096)
"""Height and width of a photograph. Larger ones are resized by the host: memory on the GPU grows with the largest."""
WHOLE, PARTS = AxisRange(1, 1, 2), AxisRange(1, 5, 16)
"""Parts of a photograph in one call: the whole of it (two only for the gate), and the views that CLIP looks at."""
HALF = 2.0**11
"""Pillow's weights have 22 bits (``PRECISION_BITS`` of its ``Resample.c``): ``HALF`` times one whole number, plus another."""
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
Size = tuple[int, int]
Halves = tuple[Tensor, Tensor]
"""Weights in units of 2 ** -22: the first times ``HALF``, plus the second. float32."""


class Resize(nn.Module):
    """Parts of one photograph, each resized and put at the top left of a black canvas.

    Pillow multiplies 8-bit pixels by weights of 22 bits, in whole numbers. So does this module, with weights in two halves of 11
    bits: products and their sums are then whole numbers that float32 holds exactly, also where factors are rounded to 11 bits
    (TF32, half precision).

    Args:
        canvas: (height, width).
        filter: ``bilinear`` or ``bicubic``.
    """

    def __init__(self, canvas: Size, filter: str) -> None:
        super().__init__()
        self.canvas, self.filter = canvas, filter
        self.resize = Fp32(self._resize, why="whole numbers of up to 24 bits, as Pillow computes gray levels")

    def forward(self, photo: Tensor, window: Tensor, size: Tensor, columns_first: Tensor) -> Tensor:
        resized: Tensor = self.resize(photo, window, size, columns_first)
        return resized

    def _resize(self, photo: Tensor, window: Tensor, size: Tensor, columns_first: Tensor) -> Tensor:
        pixels = photo.float()[..., :3].permute(0, 2, 1)  # (H, 3, W); TensorRT only casts 8-bit values
        window, size = window.int(), size.int()
        down = self._weights(photo.shape[0], self.canvas[0], window[:, 0], window[:, 1], size[:, 0])  # two of (V, h, H)
        across = self._weights(photo.shape[1], self.canvas[1], window[:, 2], window[:, 3], size[:, 1])  # two of (V, w, W)
        chosen = torch.where(
            columns_first[:, None, None, None],
            rows(columns_of_all(pixels, down), across),
            columns(rows_of_all(pixels, across), down),
        )
        return chosen.permute(0, 1, 3, 2).to(torch.uint8)

    def _weights(self, length: int, canvas: int, start: Tensor, stop: Tensor, size: Tensor) -> Halves:
        """The weights of pixels ``start`` to ``stop`` of an axis for each of ``size`` pixels: two of (V, canvas, length)."""
        start, stop, size = (each[:, None, None] for each in (start, stop, size))
        source = torch.arange(length, device=size.device, dtype=torch.int32)[None, None, :] - start
        target = torch.arange(canvas, device=size.device, dtype=torch.int32)[None, :, None]
        window = stop - start
        unit = 2 * torch.maximum(window, size)
        # The distance of two centers in the filter's unit, times ``unit``: a whole number.
        distance = ((2 * source + 1) * size - (2 * target + 1) * window).abs()
        covered = (source >= 0) & (source < window) & (target < size)
        if self.filter == "bilinear":
            return shares(torch.where(covered, (unit - distance).clamp(min=0), 0))
        values = torch.where(covered, bicubic(distance.float() / unit.float()), 0.0)
        total = values.sum(dim=2, keepdim=True)
        weights = torch.round(values / torch.where(total == 0, 1.0, total) * (HALF * HALF))
        high = torch.floor(weights / HALF)
        return high, weights - HALF * high


def shares(values: Tensor) -> Halves:
    """Each of (..., N) whole numbers as its share of their sum, in units of 2 ** -22, rounded; zeros stay zeros."""
    total = values.sum(dim=-1, keepdim=True, dtype=torch.int32).clamp(min=1)
    high = torch.floor(HALF * values.float() / total.float())
    rest = int(HALF) * values - high.int() * total  # below the total, or barely above where the quotient was rounded
    return high, torch.round(HALF * rest.float() / total.float())


def rows_of_all(pixels: Tensor, weights: Halves) -> Tensor:
    """Resize the rows of one photograph (H, 3, W) for each view: (V, H, 3, w). As one product, which copies no photograph."""
    views, width, length = weights[0].shape
    products = (pixels.reshape(-1, length) @ each.reshape(views * width, length).T for each in weights)
    return gray_levels(*products).reshape(-1, 3, views, width).permute(2, 0, 1, 3)


def columns_of_all(pixels: Tensor, weights: Halves) -> Tensor:
    """Resize the columns of one photograph (H, 3, W) for each view: (V, h, 3, W)."""
    views, height, length = weights[0].shape
    products = (each.reshape(views * height, length) @ pixels.reshape(length, -1) for each in weights)
    return gray_levels(*products).reshape(views, height, 3, -1)


def rows(pixels: Tensor, weights: Halves) -> Tensor:
    """Resize the rows of each view (V, h, 3, W): (V, h, 3, w)."""
    views, height, _, length = pixels.shape
    products = (pixels.reshape(views, 3 * height, length) @ each.transpose(1, 2) for each in weights)
    return gray_levels(*products).reshape(views, height, 3, -1)


def columns(pixels: Tensor, weights: Halves) -> Tensor:
    """Resize the columns of each view (V, H, 3, w): (V, h, 3, w)."""
    views, length, _, width = pixels.shape
    products = (each @ pixels.reshape(views, length, 3 * width) for each in weights)
    return gray_levels(*products).reshape(views, -1, 3, width)


def gray_levels(high: Tensor, low: Tensor) -> Tensor:
    """``clip8(high * 2 ** 11 + low + 2 ** 21)`` of Pillow's ``Resample.c``: the nearest of 0..255, halves up."""
    return torch.floor((high + torch.floor(low / HALF) + HALF / 2) / HALF).clamp(0, 255)


def bicubic(distance: Tensor) -> Tensor:
    """``bicubic_filter`` of Pillow's ``Resample.c``, of absolute distances: Keys's cubic convolution with a = -0.5."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * -0.5
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def resize_graphs(preprocess: Preprocess, views: AxisRange = WHOLE) -> list[Callable[[], Graph]]:
    """The graphs ``resize-HxW`` of a model, one for each canvas, for engines that keep their outputs on a GPU."""
    return [partial(resize_graph, preprocess, canvas, views=views) for canvas in preprocess.canvases]


def resize_graph(preprocess: Preprocess, canvas: Size, *, views: AxisRange) -> Graph:
    """Graph ``resize-HxW``, see `Resize`. Reference: Pillow, one axis after the other."""

    def reference(feeds: Feeds, _: Feeds) -> Feeds:
        pixels = [
            by_pillow(feeds["photo"], window, size, bool(first), canvas, preprocess.filter)
            for window, size, first in zip(feeds["window"], feeds["size"], feeds["columns_first"], strict=True)
        ]
        return {"pixels": np.stack(pixels)}

    def sample(rows: int, seed: int) -> Feeds:
        return sample_windows(preprocess, canvas, rows, seed)

    levels = Tolerance(
        relative=1e-3, absolute=1, measure=share_of_other_levels, why="bicubic weights in float32, where Pillow's are float64"
    )
    return Graph(
        name=f"resize-{canvas[0]}x{canvas[1]}",
        module=Resize(canvas, preprocess.filter),
        inputs=(
            TensorSpec("photo", ("photo_height", "photo_width", 4), "uint8"),
            TensorSpec("window", ("views", 4), "int64"),
            TensorSpec("size", ("views", 2), "int64"),
            TensorSpec("columns_first", ("views",), "bool"),
        ),
        outputs=(TensorSpec("pixels", ("views", *canvas, 3), "uint8"),),
        axes={"views": views, "photo_height": SIDE_PX, "photo_width": SIDE_PX},
        row_axis="views",
        sample=sample,
        reference=reference,
        take=take_windows,
        tolerance={"pixels": levels},
    )


def share_of_other_levels(got: Feeds, want: Feeds, name: str) -> tuple[float, float]:
    """For gray levels: the share that differs from the reference, and the largest difference."""
    difference = np.abs(got[name].astype(int) - want[name])
    return float((difference > 0).mean()), float(difference.max(initial=0))


def by_pillow(
    photo: np.ndarray, window: Sequence[int], size: Sequence[int], columns_first: bool, canvas: Size, filter: str
) -> np.ndarray:
    """A window (y0, y1, x0, x1) of a photograph (H, W, 4) uint8 on a black canvas: (height, width, 3) uint8, by Pillow."""
    y0, y1, x0, x1 = (int(edge) for edge in window)
    height, width = (int(length) for length in size)
    picture = Image.fromarray(np.ascontiguousarray(photo[y0:y1, x0:x1, :3]))
    first = (picture.width, height) if columns_first else (width, picture.height)
    for step in (first, (width, height)):
        picture = picture.resize(step, FILTERS[filter])
    black = np.zeros((*canvas, 3), np.uint8)
    black[:height, :width] = np.asarray(picture)
    return black


def sample_windows(preprocess: Preprocess, canvas: Size, rows: int, seed: int) -> Feeds:
    """Feeds of one photograph and of windows of it: all of it as the model takes it, and others of any size and place."""
    rng = np.random.default_rng(seed)
    height, width = (int(length) for length in rng.integers(200, 700, 2))
    photo = np.concatenate([photograph(rng, height, width), rng.integers(0, 256, (height, width, 1), dtype=np.uint8)], axis=2)
    valid = frame_for(preprocess, height, width).valid
    window = np.tile(np.array([0, height, 0, width], np.int64), (rows, 1))
    size = np.tile(np.minimum(valid, canvas).astype(np.int64), (rows, 1))
    for row in range(1, rows):
        for axis, length in enumerate((height, width)):
            window[row, 2 * axis : 2 * axis + 2] = np.sort(rng.choice(length + 1, 2, replace=False))
            size[row, axis] = canvas[axis] if row % 2 else rng.integers(1, canvas[axis] + 1)
    return {"photo": photo, "window": window, "size": size, "columns_first": np.arange(rows) % 3 == 1}


def take_windows(feeds: Feeds, rows: Sequence[int]) -> Feeds:
    """Select windows of the same photograph."""
    return {name: array if name == "photo" else array[list(rows)] for name, array in feeds.items()}
