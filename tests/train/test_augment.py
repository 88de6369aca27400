"""Random crops: labels move with their pixels, every place is drawn, and parts are resized as the whole is."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from wsss.train.args import DataArgs
from wsss.train.augment import distorted, random_crop, random_scale, random_window, resized, resized_label, working_size


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def photograph(height: int, width: int) -> np.ndarray:
    coarse = rng_of(height * width).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def test_crops_of_one_label_alone_are_drawn_again() -> None:
    """Of a photograph with one small object, most crops show a good share of it; without the rule few do."""
    label = np.zeros((200, 200), np.uint8)
    label[120:140, 30:50] = 3
    label[:60] = 255  # void counts for nothing

    def shares(largest: float) -> np.ndarray:
        args = DataArgs(crop=32, batch=1, largest_share=largest, scale=(1, 1))
        crops = [random_crop(np.zeros((200, 200, 3), np.uint8), label, args, rng_of(seed))[1] for seed in range(60)]
        return np.array([(crop == 3).mean() for crop in crops])

    assert (shares(1.0) > 0.2).mean() < 0.1
    assert (shares(0.8) > 0.2).mean() > 0.15
    void = np.full((9, 9), 255, np.uint8)
    _, mask = random_crop(np.zeros((9, 9, 3), np.uint8), void, DataArgs(crop=16, largest_share=0.5), rng_of(0))
    assert (mask == 255).all()


def test_labels_are_taken_at_the_middle_of_their_pixels() -> None:
    """Halved, 0 1 2 3 is 1 3, as the photograph is resized; by pixels' corners (plain NEAREST) it would be 0 2."""
    row = np.array([[0, 1, 2, 3]], np.uint8)
    assert resized_label(row, (1, 2)).tolist() == [[1, 3]]
    assert resized_label(row[:, :2], (1, 3)).tolist() == [[0, 1, 1]]
    assert resized_label(row.T.copy(), (2, 1)).tolist() == [[1], [3]]


@pytest.mark.parametrize("size", [(37, 53), (61, 40), (20, 90), (45, 70)])
def test_a_label_is_resized_as_torchvision_does(size: tuple[int, int]) -> None:
    label = rng_of(3).integers(0, 9, (45, 70), dtype=np.uint8)
    expected = v2.functional.resize(torch.from_numpy(label)[None], list(size), v2.InterpolationMode.NEAREST_EXACT)[0]
    assert np.array_equal(resized_label(label, size), expected.numpy())
    assert np.array_equal(resized_label(label, size, (5, 3, 17, 19)), expected.numpy()[3:19, 5:17])


@pytest.mark.parametrize("size", [(90, 140), (31, 40), (45, 80), (60, 70), (45, 70)])
def test_a_part_is_resized_as_in_the_whole(size: tuple[int, int]) -> None:
    pixels = photograph(45, 70)
    whole = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))
    assert np.array_equal(resized(pixels, size), whole)
    for left, top, right, bottom in ((0, 0, 9, 8), (11, 7, 40, 31), (size[1] - 5, size[0] - 6, size[1], size[0])):
        part = resized(pixels, size, (left, top, right, bottom)).astype(int)
        assert np.abs(part - whole[top:bottom, left:right]).max() <= 1


def test_a_photograph_is_resized_also_if_one_side_stays() -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    assert [resized(pixels, size).shape for size in ((4, 7), (5, 6), (4, 6))] == [(4, 7, 3), (5, 6, 3), (4, 6, 3)]


def test_every_offset_of_a_crop_is_drawn() -> None:
    """Of 34 x 33 pixels a crop of 32 has 3 x 2 places; 30 x 31 pixels have as many places in it."""
    large = {random_window(np.zeros((34, 33), np.uint8), (34, 33), DataArgs(crop=32), rng_of(seed)) for seed in range(80)}
    assert {(left, top) for left, top, _, _ in large} == {(left, top) for left in (0, 1) for top in (0, 1, 2)}
    assert all((right - left, bottom - top) == (32, 32) for left, top, right, bottom in large)
    small = {random_window(np.zeros((30, 31), np.uint8), (30, 31), DataArgs(crop=32), rng_of(seed))[:2] for seed in range(80)}
    assert small == {(left, top) for left in (-1, 0) for top in (-2, -1, 0)}


def test_scales_are_drawn() -> None:
    rng = rng_of(0)
    drawn = [random_scale(DataArgs(scale=(0.5, 2.0)), rng) for _ in range(400)]
    assert 0.5 <= min(drawn) < 0.55 and 1.95 < max(drawn) <= 2 and np.mean(drawn) == pytest.approx(1.25, abs=0.07)
    assert {random_scale(DataArgs(scales=(0.5, 1.25)), rng) for _ in range(40)} == {0.5, 1.25}


def test_labels_move_with_their_pixels() -> None:
    """Left half black and 0, right half white and 8: through scale, crop and flip every pixel keeps its label."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    label = np.zeros((40, 60), np.uint8)
    pixels[:, 30:], label[:, 30:] = 255, 8
    flipped = 0
    for seed in range(40):
        image, mask = random_crop(pixels, label, DataArgs(crop=32, batch=1), rng_of(seed))
        known = mask != 255
        assert set(np.unique(mask)) <= {0, 8, 255}, "no class between two others"
        assert image.shape == (32, 32, 3) and mask.shape == (32, 32)
        assert ((image[..., 0] > 127) == (mask == 8))[known].mean() > 0.95, "but for the blurred seam"
        assert (image[~known] == [124, 116, 104]).all(), "the mean color round a small image"
        row = mask[16][known[16]]
        flipped += int(len(row) and row[0] > row[-1])
    assert 5 < flipped < 35
    whole = DataArgs(crop=60, scale=(1, 1), flip=0)
    assert all(random_crop(pixels, label, whole, rng_of(seed))[1][30, 0] == 0 for seed in range(9)), "flip = 0: never mirrored"


# ---- colors ----

JITTER = (0.125, 0.5, 0.5, 0.1)


def test_colors_without_jitter_stay() -> None:
    pixels = photograph(20, 30)
    assert np.array_equal(distorted(pixels, (0.0, 0.0, 0.0, 0.0), rng_of(0)), pixels)


def test_each_change_of_color_comes_half_of_the_time() -> None:
    gray = np.full((4, 4, 3), 100, np.uint8)
    for jitter in ((0.125, 0.0, 0.0, 0.0), (0.0, 0.5, 0.0, 0.0)):
        values = np.array([distorted(gray, jitter, rng_of(seed))[0, 0, 0] for seed in range(300)], int)
        assert (values == 100).mean() == pytest.approx(0.5, abs=0.1)
        span = 32 if jitter[0] else 50
        assert 100 - span <= values.min() < 100 - 0.9 * span and 100 + 0.9 * span < values.max() <= 100 + span
    red = np.full((4, 4, 3), (200, 100, 100), np.uint8)
    for jitter in ((0.0, 0.0, 0.5, 0.0), (0.0, 0.0, 0.0, 0.1)):
        found = np.array([distorted(red, jitter, rng_of(seed))[0, 0] for seed in range(300)], int)
        assert np.abs(found[:, 0] - 200).max() <= 1, "HSV's value stays"
        assert (np.abs(found - (200, 100, 100)).max(axis=1) <= 1).mean() == pytest.approx(0.5, abs=0.12)


def test_saturation_and_hue_are_those_of_hsv() -> None:
    red = np.full((1, 1, 3), (200, 100, 100), np.uint8)
    saturated = [distorted(red, (0.0, 0.0, 0.5, 0.0), rng_of(seed))[0, 0].astype(int) for seed in range(200)]
    assert all(abs(green - blue) <= 1 for _, green, blue in saturated)
    assert 50 <= min(green for _, green, _ in saturated) < 60 and 140 < max(green for _, green, _ in saturated) <= 151
    turned = [distorted(red, (0.0, 0.0, 0.0, 0.1), rng_of(seed))[0, 0].astype(int) for seed in range(200)]
    assert max(green for _, green, _ in turned) == pytest.approx(100 + 100 * 0.6, abs=4), "a tenth of the circle is 36 degrees"
    assert max(blue for _, _, blue in turned) == pytest.approx(100 + 100 * 0.6, abs=4)
    assert all(min(green, blue) <= 102 for _, green, blue in turned)


def test_contrast_comes_before_or_after_the_other_changes() -> None:
    """A contrast that clips red makes another color before a change of saturation than after it."""
    pixels = np.full((1, 1, 3), (230, 120, 60), np.uint8)
    jitter = (0.0, 0.5, 0.5, 0.0)
    orders = []
    for seed in range(1000):
        rng = rng_of(seed)
        _, contrast, saturation, _ = rng.uniform(-1, 1, 4) * jitter * (rng.random(4) < 0.5)
        if contrast < 0.2 or abs(saturation) < 0.2:
            continue
        found = distorted(pixels, jitter, rng_of(seed))[0, 0]
        first = saturated(np.minimum(pixels[0, 0] * (1 + contrast), 255), 1 + saturation)
        last = np.minimum(saturated(pixels[0, 0].astype(float), 1 + saturation) * (1 + contrast), 255)
        if np.abs(first - last).max() < 15:
            continue
        errors = [np.abs(found - expected).max() for expected in (first, last)]
        assert min(errors) < 9, "HSV has 8 bits, whose rounding a contrast of 1.5 enlarges"
        orders.append(int(np.argmin(errors)))
    assert np.mean(orders) == pytest.approx(0.5, abs=0.25)


def saturated(rgb: np.ndarray, factor: float) -> np.ndarray:
    """With HSV's saturation multiplied, in floating point."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(rgb / 255))
    return 255 * np.array(colorsys.hsv_to_rgb(hue, min(saturation * factor, 1), value))


@pytest.mark.parametrize(
    ("shape", "shorter", "scale", "want"),
    [
        ((375, 500), 0, 1.0, (375, 500)),
        ((375, 500), 512, 1.0, (512, 683)),
        ((500, 333), 160, 1.5, (360, 240)),
        ((1, 900), 0, 0.3, (1, 270)),
        ((1, 30_000), 160, 1.0, (1, 640)),
    ],
)
def test_working_sizes(shape: tuple[int, int], shorter: int, scale: float, want: tuple[int, int]) -> None:
    assert working_size(shape, DataArgs(shorter_px=shorter), scale) == want
