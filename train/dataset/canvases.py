"""Canvases on which a segmenter sees whole photographs, in validation and when it is exported. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

MOST = 6
"""Canvases of a run; each is one graph of a bundle, with shared weights."""
MAX_PIXELS = 1 << 20
"""Of a canvas. Larger photographs are read in tiles."""
STEP_PX = 32
"""Sides are multiples of about this: smaller steps make more canvases, larger ones more padding."""


def canvases_for(sizes: Iterable[tuple[int, int]], multiple_of: int) -> tuple[tuple[int, int], ...]:
    """Canvases for photographs of these sizes: the ones that fit most photographs tightly, and one that holds all of them.

    Layers that look at all of a photograph see its padding too: validation and the exported segmenter put it on the same canvas.

    Args:
        sizes: (height, width) of each photograph at the network's scale. multiple_of: of the network, for both sides.

    Returns:
        (height, width) of at most `MOST` canvases, smallest first; empty if all photographs are too large.
    """
    step = multiple_of * max(round(STEP_PX / multiple_of), 1)
    tight = Counter((-(-height // step) * step, -(-width // step) * step) for height, width in sizes)
    fitting = {size: count for size, count in tight.items() if size[0] * size[1] <= MAX_PIXELS}
    if not fitting:
        return ()
    around_all = max(height for height, _ in fitting), max(width for _, width in fitting)
    chosen = sorted(fitting, key=lambda size: (-fitting[size], size))
    if around_all[0] * around_all[1] <= MAX_PIXELS:
        chosen = [around_all, *(size for size in chosen if size != around_all)]
    return tuple(sorted(chosen[:MOST], key=lambda size: (size[0] * size[1], size)))
