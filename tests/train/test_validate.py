"""Predictions averaged over test-time copies of a photograph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from wsss.train.apply.inference import Inference
from wsss.train.apply.probabilities import averaged_probabilities
from wsss.train.args import DataArgs
from wsss.train.model import Segmenter, build_segmenter
from wsss.train.validate import whole_image_logits

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
    torch.testing.assert_close(averaged_probabilities(segmenter, pixels, DataArgs(), CPU, Inference()), plain)


@torch.inference_mode()
def test_the_mean_over_scales_is_over_all_of_them(segmenter: Segmenter, pixels: np.ndarray) -> None:
    def at(*scales: float) -> torch.Tensor:
        return averaged_probabilities(segmenter, pixels, DataArgs(), CPU, Inference(scales=scales))

    both = at(0.5, 1.5)
    assert both.shape == (4, 45, 70) and not torch.allclose(at(0.5), at(1.5), atol=1e-3)
    torch.testing.assert_close(both, (at(0.5) + at(1.5)) / 2)
    torch.testing.assert_close(both.sum(dim=0), torch.ones(45, 70))


@torch.inference_mode()
def test_mirrored_copies_are_mirrored_back(segmenter: Segmenter, pixels: np.ndarray) -> None:
    def of(image: np.ndarray, flip: bool) -> torch.Tensor:
        return averaged_probabilities(segmenter, image, DataArgs(), CPU, Inference(flip=flip))

    mirrored = pixels[:, ::-1].copy()
    assert not torch.allclose(of(pixels, False), of(mirrored, False).flip(-1), atol=1e-3)  # the padding is on one side
    torch.testing.assert_close(of(pixels, True), of(mirrored, True).flip(-1))
    torch.testing.assert_close(of(pixels, True), (of(pixels, False) + of(mirrored, False).flip(-1)) / 2)


@torch.inference_mode()
def test_a_shorter_side_for_all_is_seen_by_the_network_alone(segmenter: Segmenter, pixels: np.ndarray) -> None:
    """What the network sees is the photograph with its shorter side resized; its logits come back at the photograph's size."""
    args = DataArgs(shorter_px=64)
    small = np.array(Image.fromarray(pixels).resize((100, 64), Image.Resampling.BILINEAR))
    there = whole_image_logits(segmenter, small, DataArgs(), CPU)
    assert there.shape == (4, 64, 100)
    back = functional.interpolate(there[None], (45, 70), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(whole_image_logits(segmenter, pixels, args, CPU), back)
    half = whole_image_logits(segmenter, pixels, args, CPU, scale=0.5)
    assert half.shape == (4, 45, 70) and not torch.allclose(half, back, atol=1e-3)


@torch.inference_mode()
def test_whole_photographs_are_put_on_the_runs_canvases(pixels: np.ndarray) -> None:
    """45 x 70 pixels go on 64 x 128, the smaller of two that hold them; other scales and parts are padded to multiples of 32."""
    seen: list[torch.Tensor] = []

    def network(_: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        seen.append(inputs[0])
        return inputs

    segmenter = Segmenter(
        torch.nn.Identity(), classes=3, multiple_of=32, outputs_of=network, logits_of=lambda outputs, size: outputs
    )
    for canvases, options, shape in (
        ((), {}, (64, 96)),
        (((128, 128), (32, 96), (64, 128)), {}, (64, 128)),
        (((64, 128),), {"is_whole": False}, (64, 96)),
        (((64, 128),), {"scale": 0.5}, (32, 64)),
        (((32, 96),), {}, (64, 96)),
    ):
        segmenter.canvases = canvases
        logits = whole_image_logits(segmenter, pixels, DataArgs(), CPU, **options)  # type: ignore[arg-type]
        assert logits.shape == (3, 45, 70) and seen[-1].shape[1:] == shape
        if options.get("scale", 1) == 1:
            assert torch.equal(seen[-1][:, :45, :70], logits) and not seen[-1][:, 45:].any() and not seen[-1][:, :, 70:].any()
