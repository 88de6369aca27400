"""The objects of an image, for the formats in which objects may overlap.

An object is the mask that SAM gave a box, before the masks competed for pixels, so that an object is whole behind another one of
its class. A box is an object if the label map agrees with it in a pixel of its mask at least: a box whose mask other classes won
entirely is none. Where the store has no masks, or an image no boxes (labels of a segmenter), objects are cut out of the label map
(`segments`): they do not overlap, and where boxes of a class do, the border between them is a guess.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...rle import MaskRuns
from .labeled import Labeled
from .segments import segments_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One object.

    mask: not empty. score, quality: of its box (the detector's score, the mask's predicted IoU), or None without a box.
    """

    label: int
    score: float | None
    quality: float | None
    mask: MaskRuns


def instances_of(item: Labeled) -> list[Instance]:
    """The objects of an image, by class, then in the store's order of the boxes or the reading order of the regions.

    Raises:
        StoreError: a mask is damaged.
    """
    if item.masks:
        boxes = sorted(filter(item.is_object, item.boxes), key=lambda box: box.label)
        return [Instance(label=box.label, score=box.score, quality=box.quality, mask=item.mask(box)) for box in boxes]
    segments = segments_of(item)
    return [
        Instance(
            label=one.label,
            score=one.score,
            quality=one.quality,
            mask=MaskRuns.of(segments.crop(one), top=one.top, left=one.left, size=item.shape),
        )
        for one in segments.segments
    ]
