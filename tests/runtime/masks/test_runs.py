"""Masks as runs, straight from low-resolution logits: the same as upsampling all of them."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from wsss.frame import Frame
from wsss.runtime.masks.runs import mask_runs

FRAMES = [
    Frame((375, 500), (768, 1024), (1024, 1024)),  # SAM, VOC
    Frame((750, 500), (1024, 683), (1024, 1024)),
    Frame((1200, 900), (1024, 768), (1024, 1024)),
    Frame((1, 7), (146, 1024), (1024, 1024)),
    Frame((90, 60), (32, 21), (32, 32)),  # a canvas smaller than the logits
    Frame((375, 500), (1024, 1024), (1024, 1024), squashed=True),  # SAM 2, VOC
    Frame((100, 3000), (1024, 1024), (1024, 1024), squashed=True),  # fewer rows than the logits have
]
random = np.random.default_rng(0)


def smooth(cells: int, side: int = 256) -> np.ndarray:
    noise = Image.fromarray(random.normal(0, 3, (cells, cells)).astype(np.float32))
    return np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC))


def disc(x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.indices((256, 256))
    return (radius - np.hypot(columns - x, rows - y)).astype(np.float32)


LOGITS = {
    "large blobs": smooth(6),
    "small blobs": smooth(60),
    "noise": random.normal(0, 1, (256, 256)).astype(np.float32),
    "a disc": disc(120, 90, 60),
    "a dot": disc(40, 40, 2),
    "at the edges": -disc(120, 90, 60),
    "everything": np.full((256, 256), 0.5, np.float32),
    "nothing": np.full((256, 256), -0.5, np.float32),
    "zero": np.zeros((256, 256), np.float32),
    "one cell": np.where(disc(30, 20, 1) > 0.5, 9, -9).astype(np.float32),
    "in the padding": disc(250, 250, 4),
}


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: f"{frame.image}")
@pytest.mark.parametrize("name", LOGITS)
def test_the_mask_is_that_of_upsampling_everything(name: str, frame: Frame) -> None:
    logits = LOGITS[name]
    upsampled = frame.mask_rows(256).astype(np.float64) @ logits @ frame.mask_columns(256).T.astype(np.float64)
    found = mask_runs(logits, frame)
    differs = found.mask() != (upsampled > 0)
    assert np.abs(upsampled[differs]).max(initial=0) < 1e-5, "only where a logit is zero within rounding"
    assert (found.spans[1:, 0] > found.spans[:-1, 1]).all()
    assert (found.spans[:, 1] > found.spans[:, 0]).all()


def test_other_sides_of_logits() -> None:
    for side in (8, 32, 64):
        logits, frame = smooth(4, side), Frame((50, 70), (23, 32), (32, 32))
        upsampled = frame.mask_rows(side).astype(np.float64) @ logits @ frame.mask_columns(side).T.astype(np.float64)
        differs = mask_runs(logits, frame).mask() != (upsampled > 0)
        assert np.abs(upsampled[differs]).max(initial=0) < 1e-5


def test_the_mask_of_a_large_photograph_is_never_made() -> None:
    frame = Frame((9_000, 12_000), (768, 1024), (1024, 1024))
    mask_runs(LOGITS["a disc"], frame)
    tracemalloc.start()
    runs = mask_runs(LOGITS["a disc"], frame)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert runs.area() == pytest.approx(np.pi * (60 * 12_000 / 256) ** 2, rel=0.01)
    assert peak < 30 << 20, "as booleans, the mask has 108 MB"
