"""The trained segmenter in the chain's place: tiles, canvases, confidence, its own class list."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from wsss.batch import Boxes, Images, Labels, Photograph
from wsss.classes import class_list
from wsss.engines.fake import FakeEngine
from wsss.errors import BundleError, UsageError
from wsss.runtime.chain import Chain
from wsss.runtime.run.label_folder import label_folder
from wsss.runtime.trained_segmenter import (
    SegmenterStage,
    at_size,
    canvas_for,
    classes_of,
    no_boxes,
    no_masks,
    scores,
    spans,
    tiles,
)
from wsss.spec import AxisRange, GraphSpec, Manifest, Model, Preprocess, TensorSpec

if TYPE_CHECKING:
    from ..conftest import World

CANVASES = ((32, 32), (24, 48))
Feeds = Mapping[str, np.ndarray]


def model(shorter_px: int = 0) -> Model:
    preprocess = Preprocess(
        resize="shorter" if shorter_px else "none",
        short_px=shorter_px,
        longest_px=48,
        filter="bilinear",
        canvases=CANVASES,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        source="test",
    )
    settings = {"classes": ["cat", "dog"], "overlap_px": 8}
    manifest = Manifest(
        family="segmenter", variant="toy", preprocess=preprocess, graphs={}, settings=settings, weights={}, tools={}
    )
    return Model(Path("bundle/segmenter"), manifest)


def read_red(feeds: Feeds) -> dict[str, np.ndarray]:
    """A segmenter that reads the label from a pixel's red and the confidence from its green, and is wrong at every edge."""
    label, sure = feeds["pixels"][..., 0].copy(), feeds["pixels"][..., 1].copy()
    for row, (height, width) in enumerate(feeds["size"]):
        assert not feeds["pixels"][row, height:].any() and not feeds["pixels"][row, :, width:].any(), (
            "black beyond the photograph"
        )
        if height == label.shape[1]:
            label[row, [0, 1, 2, -3, -2, -1]] = 2
        if width == label.shape[2]:
            label[row, :, [0, 1, 2, -3, -2, -1]] = 2
    return {"label_map": label, "confidence": sure}


class Opened:
    """Opens scripted engines, and remembers for which canvases and what they were fed."""

    def __init__(self) -> None:
        self.canvases: list[tuple[int, int]] = []
        self.engines: list[FakeEngine] = []
        self.sizes: list[list[int]] = []

    def __call__(self, canvas: tuple[int, int]) -> FakeEngine:
        self.canvases.append(canvas)
        spec = GraphSpec(
            file="x",
            inputs=(TensorSpec("pixels", ("batch", *canvas, 3), "uint8"), TensorSpec("size", ("batch", 2), "int64")),
            outputs=(TensorSpec("label_map", ("batch", *canvas), "uint8"), TensorSpec("confidence", ("batch", *canvas), "uint8")),
            axes={"batch": AxisRange(1, 2, 3)},
            opset=18,
        )
        self.engines.append(FakeEngine(spec, self._read))
        return self.engines[-1]

    def _read(self, feeds: Feeds) -> dict[str, np.ndarray]:
        self.sizes += feeds["size"].tolist()
        return read_red(feeds)


def photo(height: int, width: int, seed: int = 0) -> Photograph:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 3, (height, width, 3)).astype(np.uint8)
    pixels[..., 1] = rng.integers(0, 256, (height, width))
    return Photograph(name=f"{seed}.jpg", pixels=pixels)


def test_photographs_of_all_sizes_come_back_pixel_for_pixel() -> None:
    opened = Opened()
    photos = [photo(h, w, n) for n, (h, w) in enumerate([(20, 20), (100, 90), (31, 7), (24, 45), (33, 30), (5, 300)])]
    result = SegmenterStage(model(), opened)(
        photos, Labels(np.zeros((6, 2), np.float32), np.zeros((6, 2), np.bool_)), Boxes.none(), no_masks(photos, Boxes.none())
    )
    for each, label_map, sure in zip(photos, result.label_maps, result.confidence or (), strict=True):
        inner = (slice(3, -3) if each.shape[0] > 32 else slice(None), slice(3, -3) if each.shape[1] > 48 else slice(None))
        assert np.array_equal(sure, each.pixels[..., 1])
        if each.shape not in ((24, 45),):  # fills a canvas, whose edges this segmenter gets wrong
            assert np.array_equal(label_map[inner], each.pixels[..., 0][inner])
    assert len(result.boxes) == 0 and result.names[1] == "1.jpg"
    assert sorted(opened.canvases) == sorted(CANVASES)  # each opened once


def test_a_model_of_one_shorter_side_sees_that_and_answers_at_the_photographs_size() -> None:
    opened = Opened()
    disc = np.hypot(*np.mgrid[-59:60:2, -79:80:2] / 40) < 1  # (60, 80)
    pixels = np.stack([disc, np.full(disc.shape, 200), np.zeros(disc.shape)], axis=-1).astype(np.uint8)
    photos = [
        Photograph(name="large.png", pixels=pixels.repeat(3, 0).repeat(3, 1)),
        Photograph(name="fits.png", pixels=pixels[:20, :20]),
    ]
    result = SegmenterStage(model(shorter_px=20), opened)(
        photos, Labels(np.zeros((2, 2), np.float32), np.zeros((2, 2), np.bool_)), Boxes.none(), no_masks(photos, Boxes.none())
    )
    assert [label_map.shape for label_map in result.label_maps] == [(180, 240), (20, 20)]
    assert sorted(opened.sizes) == [[20, 20], [20, 27]], "the network sees the shorter side at 20 pixels"
    truth = disc.repeat(3, 0).repeat(3, 1)
    found = result.label_maps[0] == 1
    assert (truth & found).sum() / (truth | found).sum() > 0.92
    assert result.confidence is not None and set(result.confidence[1].ravel().tolist()) == {200}


def test_outlines_run_smoothly_when_a_label_map_grows() -> None:
    """A disc seen at a fifth of its size comes back truer than by the nearest pixel; no label between two appears."""
    disc = np.hypot(*(np.mgrid[0:200, 0:200] - 99.5)) < 66
    label_map = np.where(disc[2::5, 2::5], 7, 2).astype(np.uint8)
    sure = np.full(label_map.shape, 230, np.uint8)
    grown, confidence = at_size(label_map, sure, (200, 200))
    nearest = label_map.repeat(5, 0).repeat(5, 1)
    assert set(np.unique(grown).tolist()) == {2, 7}
    assert ((grown == 7) != disc).sum() < 0.75 * ((nearest == 7) != disc).sum()
    assert confidence[100, 100] == 230 == confidence[0, 0] and 100 < confidence.min() < 140, "between two labels nobody is sure"
    assert at_size(label_map, sure, (40, 40))[0] is label_map


def test_confidence_between_two_pixels_is_rounded_to_the_nearest() -> None:
    label_map, sure = np.full((1, 2), 3, np.uint8), np.array([[100, 101]], np.uint8)
    grown, confidence = at_size(label_map, sure, (2, 4))
    assert grown.tolist() == [[3] * 4] * 2
    assert confidence.tolist() == [[100, 100, 101, 101]] * 2, "of 100, 100.25, 100.75 and 101"


@pytest.mark.parametrize(
    ("size", "canvas"),
    [((10, 10), (32, 32)), ((24, 48), (24, 48)), ((20, 40), (24, 48)), ((33, 33), (24, 48)), ((999, 1), (24, 48))],
)
def test_the_smallest_canvas_that_holds_it_else_the_largest(size: tuple[int, int], canvas: tuple[int, int]) -> None:
    assert canvas_for(CANVASES, size) == canvas


@pytest.mark.parametrize("length", [1, 31, 32, 33, 55, 56, 57, 100, 1000])
def test_spans_own_each_pixel_once_and_away_from_edges(length: int) -> None:
    owner = np.zeros(length, int)
    found = spans(length, 32, 8)
    for (start, stop), (first, last) in found:
        owner[first:last] += 1
        assert start <= first < last <= stop and stop - start == min(32, length)
        assert first == 0 or first - start >= 4
        assert last == length or stop - last >= 4
    assert (owner == 1).all()
    assert len(found) == 1 if length <= 32 else len(found) <= 2 + length // 24


def test_tiles_cover_a_photograph_exactly() -> None:
    seen = np.zeros((70, 50), int)
    for tile in tiles(0, (70, 50), (32, 32), 8):
        y0, y1, x0, x1 = tile.owned
        seen[y0:y1, x0:x1] += 1
    assert (seen == 1).all()


def test_a_score_is_the_mean_confidence_of_a_class_where_it_is() -> None:
    label_map, sure = np.array([[0, 1], [1, 2]], np.uint8), np.array([[9, 255], [0, 0]], np.uint8)
    found = scores([label_map, np.zeros((1, 1), np.uint8)], [sure, np.zeros((1, 1), np.uint8)], 2)
    np.testing.assert_allclose(found.score, [[0.5, 0], [0, 0]])
    assert found.present.tolist() == [[True, True], [False, False]]


def test_it_brings_its_own_class_list() -> None:
    assert classes_of(model(), None).names == ("cat", "dog")
    assert classes_of(model(), class_list(["cat", "dog"])).names == ("cat", "dog")
    with pytest.raises(UsageError, match="knows cat, dog; got dog, cat") as caught:
        classes_of(model(), class_list(["dog", "cat"]))
    assert "leave out --classes" in str(caught.value.hint)


def test_a_run_keeps_the_confidence_beside_the_labels(tmp_path: Path) -> None:
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    photos = {"a.png": photo(20, 30, 1), "sub/b.png": photo(70, 90, 2)}
    for name, each in photos.items():
        Image.fromarray(each.pixels).save(tmp_path / "photos" / name)

    def tag(images: Images) -> Labels:
        return Labels(np.zeros((len(images), 2), np.float32), np.zeros((len(images), 2), np.bool_))

    labeler = Chain(
        class_list(["cat", "dog"]), tag=tag, detect=no_boxes, segment=no_masks, fuse=SegmenterStage(model(), Opened())
    )
    summary = label_folder(labeler, tmp_path / "photos", tmp_path / "store", batch=2)
    assert (summary.labelled, summary.failed) == (2, 0)
    for name, each in photos.items():
        sure = np.array(Image.open(tmp_path / "store" / "confidence" / name))
        assert np.array_equal(sure, each.pixels[..., 1])
        with Image.open(tmp_path / "store" / "labels" / name) as label:
            assert label.mode == "P"


def test_a_bundle_without_a_segmenter_is_named_and_no_classes_are_asked_for(world: World) -> None:
    with pytest.raises(BundleError, match="segmenter"):
        Chain.open(world.bundle, model="segmenter")


def test_the_command_line_asks_for_no_classes(wsss: Callable[..., Any], tmp_path: Path) -> None:
    answer = wsss("label", tmp_path, "--model", "segmenter", "--bundle", "mini", "--out", tmp_path / "store")
    assert answer.code == 1 and "image" in answer.err and "--classes" not in answer.err
    answer = wsss("label", tmp_path, "--model", "segmentor", "--out", tmp_path / "store")
    assert answer.code == 2 and "is not one of 'chain', 'sam3', 'segmenter'" in answer.err
