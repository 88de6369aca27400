"""Values at the edges of the stages' rules: sizes, clips, limits, ties. Each would move a label if it were one off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from wsss.batch import MAX_BOXES, Boxes, Labels, Masks, Photograph
from wsss.classes import class_list
from wsss.engines.fake import FakeEngine, without_padding
from wsss.errors import FeedError, UsageError
from wsss.frame import frame_for
from wsss.runtime import fuse
from wsss.runtime.chain import Chain, Rules
from wsss.runtime.detect import Detector, boxes_from_logits, join_phrases, suppress
from wsss.runtime.fuse import Fuser
from wsss.runtime.run.label_folder import label_folder
from wsss.runtime.run.sources import local_path, source_of
from wsss.runtime.segment import MaskPredictor
from wsss.runtime.tag import Tagger
from wsss.spec import AxisRange, Model

from .test_detect import CLS, DOT, FRAME, SEP, phrase, tags
from .test_segment import boxes as boxes_of

if TYPE_CHECKING:
    from ..conftest import World

LABELS = Labels(np.zeros((0, 0), np.float32), np.zeros((0, 0), bool))


# ---- the part of a canvas that is photograph ----


def test_without_padding() -> None:
    pixels = np.full((2, 3, 4, 3), 9, np.uint8)
    seen = without_padding(pixels, np.array([[3, 4], [2, 1]]))
    assert (seen[0] == 9).all()
    assert np.argwhere(seen[1].any(axis=-1)).tolist() == [[0, 0], [1, 0]]
    assert (pixels == 9).all(), "a copy"


@pytest.mark.parametrize("size", [[4, 4], [3, 5], [0, 4], [3, 0]])
def test_a_valid_size_beyond_the_canvas_is_refused(size: list[int]) -> None:
    with pytest.raises(FeedError, match="valid sizes from 1 x 1 to 3 x 4"):
        without_padding(np.zeros((1, 3, 4, 3), np.uint8), np.array([size]))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (12, 16), (16, 9), (64, 64), (64, 40), (40, 64), (32, 32)])
def test_the_encoder_is_given_the_valid_part_of_its_canvas(world: World, height: int, width: int) -> None:
    """Smaller than SAM's side, larger, and of it: the whole photograph is red, and so is its label."""
    labeler = Chain.open(world.bundle, classes=world.classes)
    result = labeler.label(world.scene(height, width, red=(0, 0, width, height)))
    assert (result.label_maps[0] == 1).all()


@pytest.mark.parametrize(("height", "width"), [(16, 24), (20, 16), (64, 96), (96, 40)])
def test_the_detector_is_given_the_valid_part_of_its_canvas(world: World, height: int, width: int) -> None:
    labeler = Chain.open(world.bundle, classes=world.classes)
    found = labeler.label(world.scene(height, width, red=(0, 0, width, height))).boxes
    assert found.xyxy_image.tolist() == [[0, 0, width, height]]


def test_each_image_of_a_call_has_its_own_valid_size(world: World) -> None:
    seen: list[list[int]] = []
    encoder = world.engine("sam", "encoder")
    answer = encoder.script
    encoder.script = lambda feeds: (seen.extend(feeds["size"].tolist()), answer(feeds))[1]
    photos = [world.photo(16, 8), world.photo(8, 16), world.photo(64, 48)]
    MaskPredictor(world.model("sam"), encoder, world.engine("sam", "decoder"))(
        photos, boxes_of((0, (0, 0, 8, 8)), (1, (0, 0, 8, 8)), (2, (0, 0, 8, 8)))
    )
    assert seen == [[32, 16], [16, 32], [32, 24]]


@pytest.mark.parametrize(
    ("size", "canvas"),
    [((32, 48), (32, 48)), ((32, 32), (32, 48)), ((33, 32), (48, 32)), ((48, 32), (48, 32)), ((16, 15), (48, 32))],
)
def test_a_photograph_goes_on_the_smallest_canvas_that_holds_it(
    world: World, size: tuple[int, int], canvas: tuple[int, int]
) -> None:
    """Two canvases of one area: the first that fits. A larger one that also fits is not taken."""
    model = world.model("grounding-dino")
    preprocess = replace(model.manifest.preprocess, canvases=((64, 64), *model.manifest.preprocess.canvases))
    stage = Detector(
        Model(model.folder, replace(model.manifest, preprocess=preprocess)),
        world.engine("grounding-dino", "text"),
        lambda canvas: world.engine("grounding-dino", f"image-{canvas[0]}x{canvas[1]}"),
        world.classes,
    )
    photo = world.photo(*size, red=(0, 0, 8, 8))
    assert stage.frame_of(photo).canvas == canvas
    assert stage([photo], tags([1])).label.tolist() == [1]
    assert world.rows("grounding-dino", f"image-{canvas[0]}x{canvas[1]}") == [1]


# ---- boxes ----


def many(count: int, image: int = 0, score: float = 0.5) -> Boxes:
    """Boxes side by side, their scores descending."""
    left = np.arange(count, dtype=np.float32) * 10
    xyxy = np.stack([left, np.zeros_like(left), left + 10, np.full_like(left, 10)], axis=1)
    return Boxes(
        xyxy, np.linspace(score + 0.1, score, count, dtype=np.float32), np.ones(count, np.int64), np.full(count, image, np.int64)
    )


def test_most_boxes() -> None:
    assert MAX_BOXES == 256


@pytest.mark.parametrize("count", [255, 256, 257, 300])
def test_an_image_keeps_its_256_best_boxes_and_each_image_its_own(count: int) -> None:
    crowd, alone = many(count), many(3, image=1)
    shuffled = Boxes.join([crowd, alone]).keep(np.random.default_rng(0).permutation(count + 3))
    found = shuffled.keep(suppress(shuffled, 0.5, 0.8))
    assert np.array_equal(found.xyxy_image[:-3], crowd.xyxy_image[:256])
    assert np.array_equal(found.image, [0] * min(count, 256) + [1] * 3)


CAPTION = join_phrases(phrase(0, CLS), [phrase(1, 11, DOT), phrase(2, 12, DOT)], phrase(0, SEP))


def one_box(width: float, height: float, logits: tuple[float, float] = (2.0, -4.0), threshold: float = 0.3) -> Boxes:
    """Of a query (width, height) pixels large in the middle of 200 x 100, with a logit for each of two classes."""
    row = np.array([[-9, logits[0], -9, logits[1], -9, -9]], np.float32)
    cxcywh = np.array([[0.5, 0.5, width / 200, height / 100]], np.float32)
    return boxes_from_logits(row, cxcywh, CAPTION, FRAME, 0, rule="max", threshold=threshold)


@pytest.mark.parametrize(("width", "height", "kept"), [(1, 1, 1), (1, 50, 1), (0.98, 50, 0), (50, 0.98, 0), (50, 1, 1)])
def test_a_box_of_one_pixel_stays(width: float, height: float, kept: int) -> None:
    assert len(one_box(width, height)) == kept


def test_a_box_of_one_pixel_is_labelled(world: World) -> None:
    labeler = Chain.open(world.bundle, classes=world.classes, rules=Rules(gate=False))
    result = labeler.label(world.scene(32, 48, red=(5, 7, 6, 8)))
    assert result.boxes.xyxy_image.tolist() == [[5, 7, 6, 8]]


@pytest.mark.parametrize(("logits", "label"), [((2.0, 2.0), 1), ((2.0, 2.1), 2), ((2.1, 2.0), 1)])
def test_of_two_classes_that_score_alike_the_first_takes_a_query(logits: tuple[float, float], label: int) -> None:
    assert one_box(20, 20, logits).label.tolist() == [label]


def test_of_two_boxes_that_score_alike_the_first_query_stays() -> None:
    """Whatever their classes and places, in any batch."""
    square = np.float32([[0, 0, 20, 20]] * 3)
    for labels in ([1, 2, 3], [3, 2, 1], [2, 2, 1]):
        tied = Boxes(square, np.full(3, 0.5, np.float32), np.array(labels), np.zeros(3, np.int64))
        assert tied.label[suppress(tied, 0.5, 0.8)].tolist() == labels[:1]
        behind = Boxes.join([many(2, image=0), replace_image(tied, 1)])
        assert behind.label[suppress(behind, 0.5, 0.8)][-1] == labels[0]


def replace_image(boxes: Boxes, image: int) -> Boxes:
    return Boxes(boxes.xyxy_image, boxes.score, boxes.label, np.full(len(boxes), image, np.int64))


# ---- fusion ----


def two_masks(world: World, quality: list[float], score: list[float], margin: float = 0.0, size: int = 32) -> np.ndarray:
    """The label map of a mask of class 1 and one of class 2 that cover the whole photograph."""
    frame = frame_for(world.model("sam").manifest.preprocess, size, size)
    boxes = Boxes(np.zeros((2, 4), np.float32), np.float32(score), np.array([1, 2]), np.zeros(2, np.int64))
    masks = Masks([np.full((2, 32, 32), 4, np.float32)], np.zeros(2, int), np.arange(2), np.float32(quality), [frame])
    stage = Fuser(world.model("sam"), world.engine("sam", "fuse"), margin=margin)
    return stage([world.photo(size, size)], LABELS, boxes, masks).label_maps[0]


@pytest.mark.parametrize(
    ("quality", "score", "winner"),
    [
        ([1.5, 1.0], [0.5, 0.6], 2),  # 0.5 against 0.6; unclipped 0.75 would win
        ([-2.0, 0.5], [0.9, 0.1], 2),
        ([-2.0, -0.5], [0.9, 0.1], 1),  # both at the floor: the score decides, and somebody owns the pixels
        ([0.0, 0.0], [0.1, 0.9], 2),
        ([1.2, 1.1], [0.5, 0.5], 1),  # both at the ceiling: a tie, the first
    ],
)
def test_a_predicted_iou_outside_of_0_to_1_is_clipped(
    world: World, quality: list[float], score: list[float], winner: int
) -> None:
    """SAM's decoder regresses it; nothing keeps it below 1."""
    assert np.unique(two_masks(world, quality, score)).tolist() == [winner]


def test_the_floor_of_a_predicted_iou_is_a_thousandth(world: World) -> None:
    assert np.unique(two_masks(world, [0.0, 0.0009], [0.5, 0.51])).tolist() == [2]
    assert np.unique(two_masks(world, [0.0, 0.0011], [0.54, 0.5])).tolist() == [2], "0.00054 against 0.00055"


@pytest.mark.parametrize(("margin", "label"), [(0.0, 1), (0.1, 255), (1.0, 255)])
def test_equal_masks_of_two_classes_are_void_or_the_firsts(world: World, margin: float, label: int) -> None:
    assert np.unique(two_masks(world, [0.9, 0.9], [0.7, 0.7], margin)).tolist() == [label]


def test_equal_masks_beyond_a_calls_range_keep_the_first(world: World) -> None:
    """Eight of ten that score alike: the last two leave no pixel."""
    frame = frame_for(world.model("sam").manifest.preprocess, 32, 32)
    logits = np.full((10, 32, 32), -4, np.float32)
    for row in range(10):
        logits[row, 3 * row : 3 * row + 3] = 4
    boxes = Boxes(np.zeros((10, 4), np.float32), np.full(10, 0.5, np.float32), np.ones(10, np.int64), np.zeros(10, np.int64))
    masks = Masks([logits[:5], logits[5:]], np.arange(10) // 5, np.arange(10) % 5, np.full(10, 0.9, np.float32), [frame])
    result = Fuser(world.model("sam"), world.engine("sam", "fuse"))([world.photo(32, 32)], LABELS, boxes, masks)
    assert (result.area > 0).tolist() == [True] * 8 + [False] * 2
    assert np.flatnonzero(result.label_maps[0].any(axis=1)).tolist() == list(range(24))


@pytest.mark.parametrize(
    ("size", "masks", "highest", "widest", "tiles"),
    [
        ((10, 10), 1, 4096, 4096, [(10, 10)]),
        ((40, 16), 1, 4096, 4096, [(16, 16), (16, 16), (8, 16)]),  # 1024 bytes are 16 rows of 16
        ((40, 16), 2, 4096, 4096, [(8, 16)] * 5),  # of each mask
        ((16, 40), 1, 4096, 16, [(16, 16), (16, 16), (16, 8)]),
        ((40, 16), 1, 10, 4096, [(10, 16)] * 4),
        ((3, 300), 1, 4096, 4096, [(1, 300)] * 3),  # a row takes more than the budget
    ],
)
def test_a_tile_is_as_large_as_the_budget_and_the_engine_allow(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    masks: int,
    highest: int,
    widest: int,
    tiles: list[tuple[int, int]],
) -> None:
    monkeypatch.setattr(fuse, "TILE_BYTES", 1024)
    spec = world.model("sam").graph("fuse")
    axes = {**spec.axes, "height": AxisRange(1, 4, highest), "width": AxisRange(1, 4, widest)}
    engine = FakeEngine(replace(spec, axes=axes), world.engine("sam", "fuse").script)
    frame = frame_for(world.model("sam").manifest.preprocess, *size)
    boxes = Boxes(
        np.zeros((masks, 4), np.float32), np.full(masks, 0.5, np.float32), np.ones(masks, np.int64), np.zeros(masks, np.int64)
    )
    logits = Masks(
        [np.full((masks, 32, 32), 4, np.float32)], np.zeros(masks, int), np.arange(masks), np.ones(masks, np.float32), [frame]
    )
    result = Fuser(world.model("sam"), engine)([world.photo(*size)], LABELS, boxes, logits)
    assert [(call["rows"][0], call["columns"][0]) for call in engine.calls] == tiles
    assert (result.label_maps[0] == 1).all()


def test_the_budget_of_a_tile() -> None:
    """The profile of a fusing graph's TensorRT engine is made for it (`export/to_engine.py`)."""
    assert fuse.TILE_BYTES == 64 * 1024 * 1024


def test_a_photograph_far_larger_than_the_canvases(world: World) -> None:
    """1500 x 2000 pixels on canvases of 32 to 48: the outline lies within a canvas's pixel, 63 of the photograph's."""
    labeler = Chain.open(world.bundle, classes=world.classes)
    result = labeler.label(world.scene(1500, 2000, red=(500, 250, 1500, 1250)))
    label_map = result.label_maps[0]
    assert label_map.shape == (1500, 2000)
    ys, xs = np.nonzero(label_map == 1)
    assert np.abs(np.array([xs.min(), ys.min(), xs.max(), ys.max()]) - [500, 250, 1500, 1250]).max() <= 63
    assert (label_map[313:1187, 563:1437] == 1).all()


# ---- tags ----


def test_a_class_that_scores_the_threshold_itself_is_present(world: World) -> None:
    def stage(threshold: float) -> Labels:
        clip = world.model("clip"), world.engine("clip", "image"), world.engine("clip", "text")
        return Tagger(*clip, class_list(["red"]), threshold=threshold)([photo])

    photo: Photograph = world.photo(40, 40, red=(0, 0, 40, 40))
    score = stage(0.5).score[0, 0]
    assert stage(float(score)).present.tolist() == [[True]]
    assert stage(float(np.nextafter(score, np.float32(1)))).present.tolist() == [[False]]


# ---- file URLs ----


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("file:///a/dog.png", "/a/dog.png"),
        ("file://localhost/a/dog.png", "/a/dog.png"),
        ("file:///a/my%20dog.png", "/a/my dog.png"),
        ("file:///a/dog#2.png", "/a/dog#2.png"),  # urlsplit's path would be /a/dog: another file
        ("file:///a/what?.png", "/a/what?.png"),
        ("file:///a/[1].png", "/a/[1].png"),
    ],
)
def test_a_file_url_names_its_whole_path(text: str, path: str) -> None:
    assert local_path(text) == Path(path)


@pytest.mark.parametrize("text", ["file://other/a.png", "file://[1/a.png", "file://a.png"])
def test_a_file_url_of_another_machine_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected a file of this machine") as caught:
        local_path(text)
    assert caught.value.hint


def test_a_list_with_one_line_of_another_machine_loses_that_image_alone(world: World, tmp_path: Path) -> None:
    good = world.save(tmp_path / "a.png", 32, 48, red=(4, 4, 20, 20))
    (tmp_path / "list.txt").write_text(f"{good}\nfile://other/b.png\n")
    labeler = Chain.open(world.bundle, classes=world.classes)
    warnings: list[str] = []
    summary = label_folder(labeler, source_of(str(tmp_path / "list.txt")), tmp_path / "store", warn=warnings.append)
    assert (summary.labelled, summary.failed) == (1, 1)
    assert "expected a file of this machine" in warnings[-1]
