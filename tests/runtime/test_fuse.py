"""Fusion on the host's side: tiles give what one call gives, masks of several decoder calls meet, nothing is background."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from wsss.batch import Boxes, Labels, Masks, Photograph, PseudoLabels
from wsss.engines.engine import Engine
from wsss.engines.fake import FakeEngine
from wsss.frame import frame_for
from wsss.runtime import fuse
from wsss.runtime.fuse import Fuser
from wsss.spec import AxisRange

if TYPE_CHECKING:
    from ..conftest import World

LABELS = Labels(np.zeros((0, 0), np.float32), np.zeros((0, 0), bool))


def scene(world: World, sizes: list[tuple[int, int]], per_image: int, parts: int = 1) -> tuple[list[Photograph], Boxes, Masks]:
    """Random smooth masks, ``per_image`` for each image, dealt to ``parts`` decoder calls."""
    rng = np.random.default_rng(5)
    photos = [world.photo(*size) for size in sizes]
    count = per_image * len(sizes)
    image = np.repeat(np.arange(len(sizes)), per_image)
    boxes = Boxes(
        np.zeros((count, 4), np.float32), rng.uniform(0.3, 1, count).astype(np.float32), rng.integers(1, 4, count), image
    )
    logits = np.kron(rng.normal(0, 3, (count, 4, 4)), np.ones((8, 8))).astype(np.float32)
    part = np.arange(count) % parts
    row = np.arange(count) // parts
    held = [logits[part == p] for p in range(parts)]
    frames = [frame_for(world.model("sam").manifest.preprocess, *size) for size in sizes]
    return photos, boxes, Masks(list(held), part, row, rng.uniform(0.5, 1, count).astype(np.float32), list(frames))


def same(one: PseudoLabels, other: PseudoLabels) -> bool:
    return (
        all(np.array_equal(a, b) for a, b in zip(one.label_maps, other.label_maps, strict=True))
        and np.array_equal(one.area, other.area)
        and np.array_equal(one.won, other.won)
    )


def test_no_image_and_no_box(world: World) -> None:
    stage = Fuser(world.model("sam"), world.engine("sam", "fuse"))
    assert len(stage([], LABELS, Boxes.none(), Masks([], *[np.zeros(0, np.int64)] * 3, []))) == 0
    photos = [world.photo(5, 7, "a.png"), world.photo(1, 1, "b.png")]
    result = stage(photos, LABELS, Boxes.none(), Masks([], *[np.zeros(0, np.int64)] * 3, [None, None]))
    assert result.names == ["a.png", "b.png"]
    assert [(each.shape, each.dtype, each.any()) for each in result.label_maps] == [
        ((5, 7), np.uint8, False),
        ((1, 1), np.uint8, False),
    ]
    assert world.rows("sam", "fuse") == []


def test_each_image_gets_its_own_masks(world: World) -> None:
    photos, boxes, masks = scene(world, [(20, 30), (30, 20), (16, 16)], 2)
    stage = Fuser(world.model("sam"), world.engine("sam", "fuse"))
    together = stage(photos, LABELS, boxes, masks)
    assert [each.shape for each in together.label_maps] == [(20, 30), (30, 20), (16, 16)]
    for number, photo in enumerate(photos):
        rows = np.flatnonzero(boxes.image == number)
        alone_boxes = Boxes(boxes.xyxy_image[rows], boxes.score[rows], boxes.label[rows], np.zeros(2, np.int64))
        alone = stage(
            [photo],
            LABELS,
            alone_boxes,
            Masks(masks.logits, masks.part[rows], masks.row[rows], masks.quality[rows], [masks.frames[number]]),
        )
        assert np.array_equal(alone.label_maps[0], together.label_maps[number])
        assert np.array_equal(alone.area, together.area[rows])
        owned = (alone.label_maps[0] > 0) & (alone.label_maps[0] < 255)
        assert alone.won.sum() == owned.sum() > 0


@pytest.mark.parametrize("tile_bytes", [1, 4 * 50 * 3 * 7, 4 * 50 * 3 * 39])
@pytest.mark.parametrize("widest", [4096, 50, 49, 8])
def test_tiles_give_what_one_call_gives(world: World, monkeypatch: pytest.MonkeyPatch, tile_bytes: int, widest: int) -> None:
    photos, boxes, masks = scene(world, [(40, 50)], 3)
    engine = world.engine("sam", "fuse")
    whole = Fuser(world.model("sam"), engine)(photos, LABELS, boxes, masks)
    assert len(engine.calls) == 1
    monkeypatch.setattr(fuse, "TILE_BYTES", tile_bytes)
    spec = world.model("sam").graph("fuse")
    narrow = FakeEngine(
        replace(spec, axes={**spec.axes, "width": AxisRange(1, 4, widest), "height": AxisRange(1, 4, 11)}), engine.script
    )
    tiled = Fuser(world.model("sam"), narrow)(photos, LABELS, boxes, masks)
    assert len(narrow.calls) >= 4
    assert same(whole, tiled)
    for call in narrow.calls:
        assert 4 * 3 * call["columns"][0] * (call["rows"][0] - 1) < tile_bytes, "the three masks of a tile, or one row of it"


def test_a_long_thin_photograph_stays_within_the_graphs_range(world: World) -> None:
    photos, boxes, masks = scene(world, [(9000, 1), (1, 9000)], 1)
    result = Fuser(world.model("sam"), world.engine("sam", "fuse"))(photos, LABELS, boxes, masks)
    assert [each.shape for each in result.label_maps] == [(9000, 1), (1, 9000)]


def test_masks_of_several_decoder_calls_meet(world: World) -> None:
    photos, boxes, masks = scene(world, [(30, 30)], 6, parts=2)
    spread = Fuser(world.model("sam"), world.engine("sam", "fuse"))(photos, LABELS, boxes, masks)
    order = np.argsort(masks.part * 100 + masks.row)
    joined = Masks(
        [np.concatenate([np.asarray(each) for each in masks.logits])],
        np.zeros(6, int),
        np.argsort(order),
        masks.quality,
        masks.frames,
    )
    assert same(spread, Fuser(world.model("sam"), world.engine("sam", "fuse"))(photos, LABELS, boxes, joined))


@pytest.mark.parametrize("parts", [2, 3])
def test_more_masks_than_a_call_takes_keep_the_best(world: World, parts: int) -> None:
    """Eight of twelve; what is left out neither outlines nor wins."""
    photos, boxes, masks = scene(world, [(30, 30)], 12, parts)
    stage = Fuser(world.model("sam"), world.engine("sam", "fuse"))
    crowded = stage(photos, LABELS, boxes, masks)
    value = boxes.score * masks.quality
    best = np.sort(np.argsort(-value)[:8])
    few = Masks(masks.logits, masks.part[best], masks.row[best], masks.quality[best], masks.frames)
    want = stage(photos, LABELS, boxes.keep(best), few)
    assert np.array_equal(crowded.label_maps[0], want.label_maps[0])
    assert np.array_equal(crowded.won[best], want.won)
    assert crowded.area.sum() == want.area.sum()


@pytest.mark.parametrize(
    ("score", "quality", "winner"),
    [
        ([0.9, 0.6], [0.5, 0.95], 2),  # 0.45 against 0.57
        ([0.9, 0.5], [0.6, 0.8], 1),  # 0.54 against 0.40
        ([0.5, 0.9], [1.6, 0.7], 2),  # a predicted IoU beyond 1 counts as 1: 0.50 against 0.63
        ([0.9, 0.5], [-3.0, 0.1], 2),  # and one below 0 as next to nothing
    ],
)
def test_masks_compete_by_score_times_quality(world: World, score: list[float], quality: list[float], winner: int) -> None:
    """Never by order or class: the same two masks, either order."""
    logits = np.full((2, 32, 32), 4, np.float32)
    frames = [frame_for(world.model("sam").manifest.preprocess, 32, 32)]
    stage = Fuser(world.model("sam"), world.engine("sam", "fuse"))
    for order in (np.array([0, 1]), np.array([1, 0])):
        boxes = Boxes(np.zeros((2, 4), np.float32), np.float32(score), np.array([1, 2]), np.zeros(2, np.int64)).keep(order)
        masks = Masks([logits], np.zeros(2, int), np.arange(2), np.float32(quality)[order], list(frames))
        result = stage([world.photo(32, 32)], LABELS, boxes, masks)
        assert np.unique(result.label_maps[0]).tolist() == [winner], order


@pytest.mark.parametrize("quality", [0.0, -0.2])
def test_a_mask_without_rivals_claims_its_pixels_whatever_its_predicted_iou(world: World, quality: float) -> None:
    frames = [frame_for(world.model("sam").manifest.preprocess, 32, 32)]
    boxes = Boxes(np.zeros((1, 4), np.float32), np.float32([0.5]), np.array([2]), np.zeros(1, np.int64))
    masks = Masks([np.full((1, 32, 32), 4, np.float32)], np.zeros(1, int), np.zeros(1, int), np.float32([quality]), list(frames))
    result = Fuser(world.model("sam"), world.engine("sam", "fuse"))([world.photo(32, 32)], LABELS, boxes, masks)
    assert np.unique(result.label_maps[0]).tolist() == [2]


@pytest.mark.parametrize(("margin", "value"), [(0.0, 1), (0.05, 1), (0.2, 255)])
def test_margin(world: World, margin: float, value: int) -> None:
    frames = [frame_for(world.model("sam").manifest.preprocess, 32, 32)]
    boxes = Boxes(np.zeros((2, 4), np.float32), np.float32([0.9, 0.8]), np.array([1, 2]), np.zeros(2, np.int64))
    masks = Masks([np.full((2, 32, 32), 4, np.float32)], np.zeros(2, int), np.arange(2), np.ones(2, np.float32), list(frames))
    result = Fuser(world.model("sam"), world.engine("sam", "fuse"), margin=margin)([world.photo(32, 32)], LABELS, boxes, masks)
    assert np.unique(result.label_maps[0]).tolist() == [value]


def test_the_real_graph_and_the_scripted_one_agree(world: World) -> None:
    pytest.importorskip("torch")
    from wsss.engines.eager import EagerEngine
    from wsss.export.sam.fuse import LOGIT_ROUNDING, Fuse, near_ties

    photos, boxes, masks = scene(world, [(40, 50), (77, 31)], 4, parts=2)
    real: Engine = EagerEngine(Fuse(), world.model("sam").graph("fuse"))
    one = Fuser(world.model("sam"), real)(photos, LABELS, boxes, masks)
    other = Fuser(world.model("sam"), world.engine("sam", "fuse"))(photos, LABELS, boxes, masks)
    for number, frame in enumerate(masks.frames):
        rows = boxes.image == number
        logits = np.stack([masks.logits[part][row] for part, row in zip(masks.part[rows], masks.row[rows], strict=True)])
        z = frame.mask_rows(32) @ logits @ frame.mask_columns(32).T
        rounding = LOGIT_ROUNDING * np.abs(logits).max(axis=(1, 2))
        score = boxes.score[rows] * masks.quality[rows]
        ties = near_ties(z, rounding, score, boxes.label[rows], 0.1, other.label_maps[number])
        assert (ties["label_map.options"] == one.label_maps[number]).any(axis=0).all()
        for result in (one, other):
            lowest, highest = ties["area.range"]
            assert (lowest <= result.area[rows]).all() and (result.area[rows] <= highest).all()
