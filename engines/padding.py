"""The lengths to which TensorRT's engines pad free axes, so that a run has few shapes.

TensorRT and a CUDA graph prepare for each shape separately, and the numbers of tokens, boxes and pixels differ from call to
call. Axes are padded that cost little, and whose names promise that rows appended as here do not change the others:

- ``tokens``: a token of phrase -1 is ignored.
- ``boxes``, ``picked``: each row is computed alone; a mask of score 0 wins no pixel.
- ``images``, ``masks``: rows are only read where an index says so.
- ``photo_height``, ``photo_width``: pixels outside the windows of a resize have no weight.
- ``height``, ``width``: a row of zeros in a matrix of upsampling makes pixels that no mask claims.

Images of a batch are never padded: each costs as much as a real one.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..spec import AxisRange

LENGTHS: Mapping[str, tuple[int, ...]] = {
    "tokens": (16, 32, 64, 128, 256),
    "boxes": (8, 16, 32, 64, 128, 256),
    "picked": (8, 16, 32, 64, 128, 256),
    "images": (8, 16, 32, 64),
    "masks": (64, 128, 256),
    "height": (32, 64, 128, 256),
    "width": (256, 512, 768, 1024),
    "photo_height": (384, 512, 768, 1024, 2048, 3072, 4096),
    "photo_width": (384, 512, 768, 1024, 2048, 3072, 4096),
}
"""By axis, ascending."""
FILL: Mapping[str, int] = {"phrase": -1}
"""What is appended to an input, -1 or 0; to others 0."""


def padded_length(axis: str, length: int, axes: Mapping[str, AxisRange]) -> int:
    """The length to which an axis is padded: the next of `LENGTHS`, within the engine's range."""
    for each in LENGTHS.get(axis, ()):
        if each >= length:
            return max(min(each, axes[axis].max), length)
    return length
