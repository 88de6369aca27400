"""Holes and crumbs of SAM's masks: regions below an area are filled and removed.

On the decoder's low-resolution logits, before masks compete for pixels, as SAM 2's ``SAM2Transforms.postprocess_masks`` does it:
the label map, the masks that a store keeps and their areas then agree, and a small object keeps its mask, which in a label map
could not be told from a crumb of a larger one. Which regions change is segment_anything's rule (``postprocess_small_regions``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...errors import UsageError
from ...frame import Frame

FILLED = 1e-3
"""Logit of a cell that is filled, and with a minus of one that is removed. A filled hole then has the least claim to its pixels,
so that any other mask there wins them; SAM 2's 10 would take them from it."""
EIGHT = np.ones((3, 3), bool)
"""Neighbors of a cell, as cv2's connectivity of 8."""


def check_scipy() -> None:
    """Raises UsageError: scipy, which finds the regions, is not installed."""
    try:
        import scipy.ndimage  # noqa: F401
    except ModuleNotFoundError:
        raise UsageError("--min-region needs scipy, which is not installed", hint="pip install scipy") from None


def without_small_regions(logits: np.ndarray, frames: Sequence[Frame | None], min_px: int) -> np.ndarray:
    """Fill holes and remove separate parts of masks, in place.

    Args:
        logits: (N, L, L) float32 or float16, the decoder's; 0 is the edge. Returned.
        frames: of each mask's photograph.
        min_px: least area of a region that stays, in pixels of the photograph.
    """
    for mask, frame in zip(logits, frames, strict=True):
        assert frame is not None
        (_, canvas_h, valid_h, height), (_, canvas_w, valid_w, width) = frame.mask_lengths(len(mask))
        cells = len(mask) * valid_h / canvas_h, len(mask) * valid_w / canvas_w  # those of the photograph
        least = min_px * cells[0] * cells[1] / (height * width)
        inside = mask[: int(np.ceil(cells[0])), : int(np.ceil(cells[1]))]  # the rest is padding
        covered = inside > 0
        filled = covered | small_regions(~covered, least, keep_largest=False)
        kept = filled & ~small_regions(filled, least, keep_largest=True)
        inside[kept & ~covered] = FILLED
        inside[covered & ~kept] = -FILLED
    return logits


def small_regions(mask: np.ndarray, least: float, *, keep_largest: bool) -> np.ndarray:
    """(H, W) bool, the connected regions of a mask (H, W) bool with fewer than ``least`` cells.

    Args:
        keep_largest: the largest region is never one of them.
    """
    from scipy import ndimage

    regions, count = ndimage.label(mask, EIGHT)
    area = np.bincount(regions.ravel(), minlength=count + 1)
    small = area < least
    small[0] = False
    if keep_largest and count:
        small[1 + area[1:].argmax()] = False
    found: np.ndarray = small[regions]
    return found
