"""Frames: sizes, boxes and masks go there and back exactly as the official code moves them."""

from __future__ import annotations

import numpy as np
import pytest

from wsss.frame import Frame, Tile, bilinear_matrix, frame_for, resized, scaled, upsample_matrix
from wsss.spec import Preprocess

SIZES = [
    *((1, 1), (1, 7), (7, 1), (2, 3), (33, 1), (64, 64), (63, 65), (65, 63), (127, 40), (40, 127), (101, 1311)),
    *((375, 500), (500, 375), (333, 500), (480, 640), (799, 1333), (1333, 800), (1023, 1025), (1024, 683), (2001, 1501)),
]


def preprocess(resize: str, longest: int, short: int = 0, canvases: tuple[tuple[int, int], ...] = ()) -> Preprocess:
    return Preprocess(
        resize=resize,  # type: ignore[arg-type]
        longest_px=longest,
        short_px=short,
        filter="bilinear",
        canvases=canvases or ((longest, longest),),
        mean=(0, 0, 0),
        std=(1, 1, 1),
        source="test",
    )


SAM = preprocess("longest", 1024)
DINO = preprocess("short-longest", 1333, 800, ((800, 1344), (1344, 800), (1024, 1024)))


@pytest.mark.parametrize(("source", "target"), [(1, 1), (1, 5), (5, 1), (7, 7), (256, 1024), (17, 40), (40, 17), (3, 1000)])
def test_bilinear_matrix_is_torchs_interpolate(source: int, target: int) -> None:
    torch = pytest.importorskip("torch")
    line = np.random.default_rng(0).normal(size=source).astype(np.float32)
    want = torch.nn.functional.interpolate(torch.from_numpy(line)[None, None, None], (1, target), mode="bilinear")[
        0, 0, 0
    ].numpy()
    assert np.abs(bilinear_matrix(source, target) @ line - want).max() <= 1e-6


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_masks_upsample_as_sam_does(height: int, width: int) -> None:
    torch = pytest.importorskip("torch")
    sam = pytest.importorskip("segment_anything.modeling").Sam

    class Canvas:  # all that postprocess_masks asks of its model
        class image_encoder:
            img_size = 1024

    frame = frame_for(SAM, height, width)
    logits = np.random.default_rng(height).uniform(-1, 1, (256, 256)).astype(np.float32)  # white noise is the worst case
    want = sam.postprocess_masks(Canvas(), torch.from_numpy(logits)[None, None], frame.valid, (height, width))[0, 0].numpy()
    got = frame.mask_rows(256) @ logits @ frame.mask_columns(256).T
    assert got.shape == (height, width)
    fused = torch.backends.cpu.get_cpu_capability() != "DEFAULT"  # see `bilinear_taps`
    assert np.abs(got - want).max() <= (2e-6 if fused else 3e-5)


@pytest.mark.parametrize(("height", "width"), [*SIZES, (1024, 1024), (3000, 2000)])
def test_masks_of_squashed_photographs_upsample_in_one_step(height: int, width: int) -> None:
    """As ``postprocess_masks`` of SAM 2 does, also where that leaves out rows of the logits."""
    torch = pytest.importorskip("torch")
    frame = frame_for(preprocess("squash", 1024), height, width)
    logits = np.random.default_rng(height).uniform(-1, 1, (256, 256)).astype(np.float32)
    maps = torch.from_numpy(logits)[None, None]
    want = torch.nn.functional.interpolate(maps, (height, width), mode="bilinear", align_corners=False)[0, 0].numpy()
    got = frame.mask_rows(256) @ logits @ frame.mask_columns(256).T
    fused = torch.backends.cpu.get_cpu_capability() != "DEFAULT"  # see `bilinear_taps`
    assert np.abs(got - want).max() <= (2e-6 if fused else 3e-5)


def test_boxes_of_squashed_photographs_are_scaled_along_each_axis() -> None:
    frame = frame_for(preprocess("squash", 1024), 512, 2048)
    assert frame.valid == frame.canvas == (1024, 1024)
    boxes = np.array([[0, 0, 2048, 512], [20, 10, 40, 30]], np.float32)
    assert frame.xyxy_model_from_image(boxes).tolist() == [[0, 0, 1024, 1024], [10, 20, 20, 60]]
    assert np.array_equal(frame.xyxy_image_from_model(frame.xyxy_model_from_image(boxes)), boxes)


@pytest.mark.parametrize("sides", [(1, 9000), (9000, 1)])
def test_the_shorter_side_of_a_thread_has_one_pixel(sides: tuple[int, int]) -> None:
    assert resized(SAM, *sides) == tuple(min(side, 1024) for side in sides)


def test_upsampling_keeps_a_constant() -> None:
    assert np.allclose(upsample_matrix(256, 1024, 683, 375).sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_longest_side_and_boxes_are_sams(height: int, width: int) -> None:
    official = pytest.importorskip("segment_anything.utils.transforms").ResizeLongestSide(1024)
    frame = frame_for(SAM, height, width)
    assert frame.valid == tuple(max(side, 1) for side in official.get_preprocess_shape(height, width, 1024))
    if frame.valid != official.get_preprocess_shape(height, width, 1024):
        return  # a side of 0 px, which the official code cannot resize to
    boxes = np.random.default_rng(width).uniform(0, [width, height, width, height], (6, 4)).astype(np.float32)
    want = official.apply_boxes(boxes, (height, width)).astype(np.float32)
    assert np.array_equal(frame.xyxy_model_from_image(boxes), want)
    assert np.allclose(frame.xyxy_image_from_model(want), boxes, rtol=1e-6)


def get_size_with_aspect_ratio(height: int, width: int, size: int, max_size: int) -> tuple[int, int]:
    """From GroundingDINO, groundingdino/datasets/transforms.py, `resize`, word for word but for the types."""
    w, h = width, height
    min_original_size = float(min((w, h)))
    max_original_size = float(max((w, h)))
    if max_original_size / min_original_size * size > max_size:
        size = round(max_size * min_original_size / max_original_size)
    if (w <= h and w == size) or (h <= w and h == size):
        return (h, w)
    if w < h:
        ow = size
        oh = int(size * h / w)
    else:
        oh = size
        ow = int(size * w / h)
    return (oh, ow)


@pytest.mark.parametrize(
    ("height", "width", "want"),
    [
        (1, 1, (800, 800)),
        (375, 500, (800, 1066)),
        (500, 375, (1066, 800)),
        (800, 1333, (800, 1333)),
        (1333, 800, (1333, 800)),
        (800, 800, (800, 800)),
        (480, 640, (800, 1066)),
        (427, 640, (800, 1199)),
        (300, 500, (800, 1333)),
        (299, 500, (797, 1332)),
        (1, 1000, (1, 1000)),
        (1000, 2, (1500, 3)),
        (3, 2000, (2, 1333)),
        (4000, 6000, (800, 1200)),
    ],
)
def test_short_side_is_grounding_dinos(height: int, width: int, want: tuple[int, int]) -> None:
    assert get_size_with_aspect_ratio(height, width, 800, 1333) == want, "the table itself"
    assert resized(DINO, height, width) == want


def test_a_panorama_has_at_most_four_times_the_pixels_of_the_shorter_side() -> None:
    assert resized(preprocess("shorter", 1024, 100), 50, 200) == (100, 400)
    assert resized(preprocess("shorter", 1024, 100), 1000, 100) == (400, 40)


@pytest.mark.parametrize(("resize", "want"), [("none", (375, 500)), ("shorter", (512, 683))], ids=["none", "shorter"])
def test_a_segmenters_photograph(resize: str, want: tuple[int, int]) -> None:
    told = preprocess(resize, 0, 512)
    assert resized(told, 375, 500) == want
    assert resized(told, 500, 375) == want[::-1]


def test_short_side_is_grounding_dinos_for_any_size() -> None:
    for height, width in np.random.default_rng(1).integers(1, 3000, (2000, 2)).tolist():
        want = get_size_with_aspect_ratio(height, width, 800, 1333)
        if 0 not in want:
            assert resized(DINO, height, width) == want, (height, width)


@pytest.mark.parametrize(("height", "width"), [(30000, 1), (1, 30000), (20000, 7)])
def test_a_thread_of_pixels_still_has_a_place(height: int, width: int) -> None:
    for model in (SAM, DINO):
        frame = frame_for(model, height, width)
        assert 1 <= frame.valid[0] <= frame.canvas[0]
        assert 1 <= frame.valid[1] <= frame.canvas[1]
    assert scaled(30000, 4, 0.1) == (3000, 1)
    assert scaled(4, 30000, 0.1) == (1, 3000)


def test_squash_fills_the_canvas() -> None:
    assert frame_for(preprocess("squash", 224), 375, 500) == Frame((375, 500), (224, 224), (224, 224), squashed=True)


@pytest.mark.parametrize(
    ("height", "width", "valid", "canvas"),
    [
        (375, 500, (800, 1066), (800, 1344)),
        (500, 375, (1066, 800), (1344, 800)),
        (500, 500, (800, 800), (1024, 1024)),  # fits on all three: the smallest, 1,048,576 px against 1,075,200
        (500, 600, (800, 960), (1024, 1024)),
        (500, 641, (800, 1025), (800, 1344)),
    ],
)
def test_the_smallest_canvas_that_holds_it(height: int, width: int, valid: tuple[int, int], canvas: tuple[int, int]) -> None:
    assert frame_for(DINO, height, width) == Frame((height, width), valid, canvas)


def test_the_smallest_canvas_has_the_fewest_pixels() -> None:
    canvases = ((60, 60), (20, 120))  # 3600 px against 2400, though its sides add up to less
    assert frame_for(preprocess("longest", 20, canvases=canvases), 20, 20).canvas == (20, 120)


@pytest.mark.parametrize(
    ("height", "width", "valid", "canvas"),
    [
        (400, 400, (100, 100), (100, 150)),  # wanted 200 x 200, which the other canvas would shrink to 60 x 60
        (200, 300, (100, 150), (100, 150)),  # wanted 200 x 300
        (300, 200, (100, 67), (100, 150)),  # wanted 300 x 200
        (300, 100, (110, 37), (110, 60)),  # wanted 300 x 100
    ],
)
def test_what_no_canvas_holds_is_shrunk_onto_the_one_that_keeps_it_largest(
    height: int, width: int, valid: tuple[int, int], canvas: tuple[int, int]
) -> None:
    frame = frame_for(preprocess("short-longest", 300, 200, ((100, 150), (110, 60))), height, width)
    assert frame == Frame((height, width), valid, canvas)


@pytest.mark.parametrize(
    ("cxcywh", "xyxy"),
    [
        ([0.5, 0.5, 1, 1], [0, 0, 500, 300]),
        ([0.25, 0.5, 0.1, 0.2], [100, 120, 150, 180]),
        ([0, 0, 0.2, 0.2], [0, 0, 50, 30]),  # clipped at the top left
        ([1, 1, 0.2, 0.2], [450, 270, 500, 300]),  # and at the bottom right
        ([0.5, 0.5, 0, 0], [250, 150, 250, 150]),
    ],
)
def test_boxes_from_center_and_size_ignore_padding(cxcywh: list[float], xyxy: list[float]) -> None:
    frame = Frame(image=(300, 500), valid=(60, 100), canvas=(128, 128))
    assert np.allclose(frame.xyxy_image_from_cxcywh(np.array([cxcywh])), [xyxy], atol=1e-4)
    assert frame.xyxy_image_from_cxcywh(np.zeros((0, 4))).shape == (0, 4)


# ---- tiles ----


def test_a_tiles_boxes_are_in_the_photograph() -> None:
    frame = Frame((60, 80), (30, 40), (32, 48), tile=Tile(30, 40, (90, 120)))
    boxes = np.array([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 2, 2]])
    np.testing.assert_allclose(frame.xyxy_image_from_cxcywh(boxes), [[60, 45, 100, 75], [40, 30, 120, 90]])


@pytest.mark.parametrize(
    ("box", "cut"),
    [
        ((41, 31, 119, 89), False),  # inside
        ((40.5, 50, 60, 70), True),  # left of it the photograph goes on
        ((60, 30.5, 70, 70), True),  # above too
        ((60, 50, 120, 90), False),  # but not on the right and below
        ((40.9, 50, 60, 70), False),
    ],
)
def test_boxes_are_cut_where_the_photograph_goes_on(box: tuple[float, ...], cut: bool) -> None:
    """One hundredth of 80 and 60 pixels is near the edge."""
    last = Frame((60, 80), (30, 40), (32, 48), tile=Tile(30, 40, (90, 120)))
    first = Frame((60, 80), (30, 40), (32, 48), tile=Tile(0, 0, (90, 120)))
    whole = Frame((90, 120), (30, 40), (32, 48))
    mirrored = np.float32([[120 - box[2], 90 - box[3], 120 - box[0], 90 - box[1]]])
    assert last.is_cut(np.float32([box])).tolist() == [cut]
    assert first.is_cut(mirrored).tolist() == [cut]
    assert not whole.is_cut(np.float32([box, mirrored[0]])).any()
    assert last.is_cut(np.zeros((0, 4), np.float32)).shape == (0,)
