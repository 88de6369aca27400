"""Predictions averaged over test-time copies of a photograph."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wsss.train.args import DataArgs
from wsss.train.model import Segmenter, build_segmenter
from wsss.train.validate import averaged_probabilities, whole_image_logits

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    torch.manual_seed(0)
    options = {"encoder_depth": 3, "decoder_channels": [16, 8, 8]}
    return build_segmenter("unet", "mobilenet_v2", options, 4).eval()


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (45, 70, 3), dtype=np.uint8)


@torch.inference_mode()
def test_one_copy_is_the_plain_prediction(segmenter: Segmenter, pixels: np.ndarray) -> None:
    plain = whole_image_logits(segmenter, pixels, DataArgs(), CPU).softmax(dim=0)
    torch.testing.assert_close(averaged_probabilities(segmenter, pixels, DataArgs(), CPU), plain)


@torch.inference_mode()
def test_the_mean_over_scales_is_over_all_of_them(segmenter: Segmenter, pixels: np.ndarray) -> None:
    def at(*scales: float) -> torch.Tensor:
        return averaged_probabilities(segmenter, pixels, DataArgs(), CPU, scales=scales)

    both = at(0.5, 1.5)
    assert both.shape == (4, 45, 70) and not torch.allclose(at(0.5), at(1.5), atol=1e-3)
    torch.testing.assert_close(both, (at(0.5) + at(1.5)) / 2)
    torch.testing.assert_close(both.sum(dim=0), torch.ones(45, 70))


@torch.inference_mode()
def test_mirrored_copies_are_mirrored_back(segmenter: Segmenter, pixels: np.ndarray) -> None:
    def of(image: np.ndarray, flip: bool) -> torch.Tensor:
        return averaged_probabilities(segmenter, image, DataArgs(), CPU, flip=flip)

    mirrored = pixels[:, ::-1].copy()
    assert not torch.allclose(of(pixels, False), of(mirrored, False).flip(-1), atol=1e-3)  # the padding is on one side
    torch.testing.assert_close(of(pixels, True), of(mirrored, True).flip(-1))
    torch.testing.assert_close(of(pixels, True), (of(pixels, False) + of(mirrored, False).flip(-1)) / 2)
