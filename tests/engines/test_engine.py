"""What is fed to an engine is checked once, and said precisely."""

from __future__ import annotations

import re

import numpy as np
import pytest

from wsss.engines.engine import check_feeds
from wsss.errors import FeedError
from wsss.spec import AxisRange, TensorSpec

INPUTS = {
    "pixels": TensorSpec("pixels", ("batch", 4, 4, 3), "uint8"),
    "size": TensorSpec("size", ("batch", 2), "int64"),
    "text": TensorSpec("text", ("batch", "tokens"), "float32"),
}
AXES = {"batch": AxisRange(1, 2, 3)}


def feeds(batch: int = 2, tokens: int = 5, **other: np.ndarray) -> dict[str, np.ndarray]:
    fine = {
        "pixels": np.zeros((batch, 4, 4, 3), np.uint8),
        "size": np.zeros((batch, 2), np.int64),
        "text": np.zeros((batch, tokens), np.float32),
    }
    return {**fine, **other}


def test_an_engine_without_inputs_takes_nothing() -> None:
    check_feeds("nothing", {}, {}, {})


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 5), (3, 1000)])
def test_what_fits_passes(batch: int, tokens: int) -> None:
    check_feeds("dino", INPUTS, AXES, feeds(batch, tokens))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "dino: expected the inputs ['pixels', 'size', 'text'], got []"),
        ({"pixels": np.zeros((2, 4, 4, 3), np.uint8)}, "got ['pixels']"),
        (feeds(mask=np.zeros(1)), "got ['mask', 'pixels', 'size', 'text']"),
        (feeds(pixels=np.zeros((2, 4, 4, 3))), "expected pixels uint8(batch, 4, 4, 3), got float64(2, 4, 4, 3)"),
        (feeds(size=np.zeros((2, 2), np.int32)), "expected size int64(batch, 2), got int32(2, 2)"),
        (feeds(pixels=np.zeros((2, 4, 5, 3), np.uint8)), "expected pixels uint8(batch, 4, 4, 3), got uint8(2, 4, 5, 3)"),
        (feeds(pixels=np.zeros((4, 4, 3), np.uint8)), "got uint8(4, 4, 3)"),
        (feeds(size=np.zeros((2,), np.int64)), "expected size int64(batch, 2), got int64(2,)"),
        (feeds(size=np.zeros((3, 2), np.int64)), "'pixels' has batch=2, but 'size' has batch=3"),
        (feeds(0), "'pixels' has batch=0, the engine takes 1 to 3"),
        (feeds(4), "'pixels' has batch=4, the engine takes 1 to 3"),
    ],
)
def test_what_does_not_fit_is_said(wrong: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(FeedError, match=re.escape(message)) as caught:
        check_feeds("dino", INPUTS, AXES, wrong)
    assert caught.value.message.startswith("dino: ")


def test_a_batch_below_the_smallest_is_refused() -> None:
    with pytest.raises(FeedError, match="'pixels' has batch=1, the engine takes 2 to 3"):
        check_feeds("dino", INPUTS, {"batch": AxisRange(2, 2, 3)}, feeds(1))
