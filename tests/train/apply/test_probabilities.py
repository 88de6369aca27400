"""Sliding windows: they cover every pixel, and their logits are averaged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wsss.errors import UsageError
from wsss.train.apply.inference import Inference, parse_scales
from wsss.train.apply.probabilities import averaged_probabilities, window_logits, window_spans
from wsss.train.args import DataArgs
from wsss.train.model import Segmenter
from wsss.train.validate import whole_image_logits

CPU = torch.device("cpu")
ARGS = DataArgs(mean=(0, 0, 0), std=(1, 1, 1))


def pointwise() -> Segmenter:
    """A network whose logits at a pixel are the pixel's values, so that any window gives the same."""
    return Segmenter(nn.Identity(), classes=3, multiple_of=8, outputs_of=lambda _, pixels: pixels, logits_of=lambda out, _: out)


def counting() -> Segmenter:
    """A network whose logits are the mean of its input, everywhere: each window has its own."""

    def mean(_: nn.Module, pixels: Tensor) -> Tensor:
        return pixels.mean(dim=(2, 3), keepdim=True).expand_as(pixels)

    return Segmenter(nn.Identity(), classes=3, multiple_of=1, outputs_of=mean, logits_of=lambda out, _: out)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (45, 70, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("length", "window", "stride", "expected"),
    [
        (10, 16, 8, [(0, 10)]),
        (16, 16, 8, [(0, 16)]),
        (17, 16, 8, [(0, 16), (1, 17)]),
        (32, 16, 8, [(0, 16), (8, 24), (16, 32)]),
        (33, 16, 16, [(0, 16), (16, 32), (17, 33)]),
    ],
)
def test_windows_cover_a_side(length: int, window: int, stride: int, expected: list[tuple[int, int]]) -> None:
    assert list(window_spans(length, window, stride)) == expected


def test_every_pixel_is_the_mean_over_its_windows(pixels: np.ndarray) -> None:
    found = window_logits(counting(), pixels, ARGS, CPU, Inference(window=40, stride=30))
    total, count = np.zeros((45, 70, 3)), np.zeros((45, 70, 1))
    for top, left in ((0, 0), (0, 30), (5, 0), (5, 30)):
        total[top : top + 40, left : left + 40] += pixels[top : top + 40, left : left + 40].mean(axis=(0, 1))
        count[top : top + 40, left : left + 40] += 1
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), total / count, rtol=1e-5)


@pytest.mark.parametrize("shorter_px", [0, 64])
@pytest.mark.parametrize("mirrored", [False, True])
def test_windows_of_a_pointwise_network_are_the_whole_photograph(pixels: np.ndarray, shorter_px: int, mirrored: bool) -> None:
    args = DataArgs(mean=(10, 20, 30), std=(50, 60, 70), shorter_px=shorter_px)
    whole = whole_image_logits(pointwise(), pixels, args, CPU, scale=1.25, mirrored=mirrored)
    found = window_logits(pointwise(), pixels, args, CPU, Inference(window=24), scale=1.25, mirrored=mirrored)
    torch.testing.assert_close(found, whole)


def test_a_window_as_large_as_the_photograph_is_the_photograph(pixels: np.ndarray) -> None:
    plain = averaged_probabilities(counting(), pixels, ARGS, CPU, Inference())
    torch.testing.assert_close(averaged_probabilities(counting(), pixels, ARGS, CPU, Inference(window=512)), plain)
    small = averaged_probabilities(counting(), pixels, ARGS, CPU, Inference(window=32))
    assert not torch.allclose(small, plain, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scales": ()}, "--scales: expected 1 to 16 factors"),
        ({"scales": (0.01,)}, "--scales: expected 1 to 16 factors of 0.1 to 8, got 0.01"),
        ({"scales": (float("nan"),)}, "--scales"),
        ({"window": 8}, "--window: expected at least 16 pixels, got 8"),
        ({"stride": 8}, "--stride is the distance between windows: it needs --window"),
        ({"window": 32, "stride": 33}, "--stride: expected 1 to 32 pixels"),
        ({"window": 32, "stride": -1}, "--stride: expected 1 to 32 pixels"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Inference(**settings)  # type: ignore[arg-type]


def test_the_smallest_window_is_taken() -> None:
    assert Inference(window=16, stride=16).window == 16


def test_scales_are_numbers_with_commas() -> None:
    assert parse_scales(None) == (1.0,) and parse_scales("0.5, 1") == (0.5, 1.0)
    with pytest.raises(UsageError, match="--scales: expected numbers with commas, got '1;2'"):
        parse_scales("1;2")


def test_settings_in_words() -> None:
    assert str(Inference()) == "scale 1"
    assert str(Inference(scales=(0.5, 1), flip=True, window=512)) == "scales 0.5 1, mirrored, windows of 512 px every 341 px"
