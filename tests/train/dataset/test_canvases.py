"""The canvases of a run: tight for most of its photographs, and large enough for all that are not too large."""

from __future__ import annotations

import pytest

from wsss.train.dataset.canvases import MAX_PIXELS, MOST, canvases_for


@pytest.mark.parametrize(
    ("sizes", "multiple_of", "want"),
    [
        ([], 32, ()),
        ([(375, 500)], 32, ((384, 512),)),
        ([(375, 500), (375, 500), (500, 375)], 32, ((384, 512), (512, 384), (512, 512))),
        ([(384, 512)], 32, ((384, 512),)),
        ([(375, 500)], 1, ((384, 512),)),
        ([(375, 500)], 14, ((392, 504),)),
        ([(375, 500)], 16, ((384, 512),)),
        ([(4000, 3000)], 32, ()),
        ([(4000, 3000), (100, 200)], 32, ((128, 224),)),
        ([(200, 3000), (3000, 200)], 32, ((224, 3008), (3008, 224))),
    ],
)
def test_canvases(sizes: list[tuple[int, int]], multiple_of: int, want: tuple[tuple[int, int], ...]) -> None:
    assert canvases_for(sizes, multiple_of) == want


def test_the_most_frequent_sizes_fit_tightly_and_one_canvas_holds_all() -> None:
    sizes = [(32 * k, 64) for k in range(1, 12) for _ in range(k)]
    found = canvases_for(sizes, 32)
    assert found == tuple((32 * k, 64) for k in range(6, 12))
    assert len(found) == MOST and found[-1][0] * found[-1][1] <= MAX_PIXELS
    found = canvases_for([*sizes, (64, 32)], 32)
    assert found[-1] == (352, 64), "one canvas holds every photograph"
