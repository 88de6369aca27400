"""Outlines: boxes of several images share decoder calls, and an image without a box is never encoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest

from wsss.batch import Boxes, Tensor
from wsss.engines.fake import FakeEngine
from wsss.runtime.segment import MaskPredictor, calls_by_image
from wsss.spec import TensorSpec

if TYPE_CHECKING:
    from ..conftest import World


@pytest.mark.parametrize(
    ("image", "most", "calls"),
    [
        ([], 4, []),
        ([0], 4, [[0]]),
        ([0, 0, 1, 2], 4, [[0, 1, 2, 3]]),
        ([0, 0, 0, 1, 1], 4, [[0, 1, 2], [3, 4]]),  # image 1 fits in a call of its own
        ([0, 0, 0, 0, 0, 1, 1, 1], 4, [[0, 1, 2, 3], [4, 5, 6, 7]]),  # image 0 fits nowhere, its rest joins image 1
        ([7] * 9, 4, [[0, 1, 2, 3], [4, 5, 6, 7], [8]]),
        ([0, 1, 2], 1, [[0], [1], [2]]),
    ],
)
def test_an_images_boxes_stay_together_where_they_fit(image: list[int], most: int, calls: list[list[int]]) -> None:
    assert [call.tolist() for call in calls_by_image(np.array(image, np.int64), most)] == calls


def outliner(world: World) -> MaskPredictor:
    return MaskPredictor(world.model("sam"), world.engine("sam", "encoder"), world.engine("sam", "decoder"))


def boxes(*rows: tuple[int, tuple[int, int, int, int]]) -> Boxes:
    """(image, xyxy) each."""
    count = len(rows)
    xyxy = np.array([box for _, box in rows], np.float32).reshape(-1, 4)
    return Boxes(xyxy, np.ones(count, np.float32), np.ones(count, np.int64), np.array([image for image, _ in rows], np.int64))


def test_without_boxes_nothing_runs(world: World) -> None:
    for photos in ([], [world.photo(30, 30)] * 3):
        masks = outliner(world)(photos, Boxes.none())
        assert masks.logits == []
        assert masks.frames == [None] * len(photos)
        assert len(masks.quality) == len(masks.part) == len(masks.row) == 0
    assert world.rows("sam", "encoder") == world.rows("sam", "decoder") == []


def test_boxes_of_several_images_share_a_call(world: World) -> None:
    photos = [
        world.photo(64, 64, red=(0, 0, 32, 32)),
        world.photo(64, 64),
        world.photo(32, 64, green=(32, 0, 64, 32), blue=(0, 0, 16, 16)),
    ]
    masks = outliner(world)(photos, boxes((0, (0, 0, 32, 32)), (2, (32, 0, 64, 32)), (2, (0, 0, 16, 16))))
    assert world.rows("sam", "encoder") == [2], "the image in the middle has no box"
    assert [call["boxes"] for call in world.engine("sam", "decoder").calls] == [(3, 4)]
    assert masks.part.tolist() == [0, 0, 0]
    assert masks.row.tolist() == [0, 1, 2]
    assert masks.quality.tolist() == pytest.approx([0.9] * 3)
    frame = masks.frames[2]
    assert masks.frames[1] is None
    assert frame is not None
    assert (frame.valid, frame.canvas) == ((16, 32), (32, 32))
    inside = [np.argwhere(np.asarray(masks.logits[0])[row] > 0) for row in range(3)]
    assert [(each.min(axis=0).tolist(), each.max(axis=0).tolist()) for each in inside] == [
        ([0, 0], [15, 15]),
        ([0, 16], [15, 31]),
        ([0, 0], [7, 7]),
    ]


def test_many_images_and_boxes_are_split_at_the_engines_ranges(world: World) -> None:
    """Two images a decoder call, four boxes a decoder call: 2 + 2 + 1 images, 6 + 2 + 1 boxes."""
    photos = [world.photo(32, 32, red=(4 * i, 0, 4 * i + 8, 8)) for i in range(5)]
    rows = [(0, (0, 0, 8, 8))] * 5 + [(i, (4 * i, 0, 4 * i + 8, 8)) for i in (1, 2, 3, 4)]
    masks = outliner(world)(photos, boxes(*rows))
    assert world.rows("sam", "encoder") == [2, 2, 1]
    assert [call["boxes"][0] for call in world.engine("sam", "decoder").calls] == [4, 2, 2, 1]
    for number, (image, (x0, y0, x1, y1)) in enumerate(rows):
        logits = np.asarray(masks.logits[masks.part[number]])[masks.row[number]]
        want = np.full((32, 32), -4, np.float32)
        want[y0:y1, x0:x1] = 4
        assert np.array_equal(logits, want), (number, image)


def test_all_outputs_of_an_encoder_go_to_the_decoder(world: World) -> None:
    """As those of SAM 2, whose encoder takes no sizes; each in memory that the next call overwrites."""
    encoder, decoder = world.engine("sam", "encoder"), world.engine("sam", "decoder")
    finer = TensorSpec("finer", ("batch", 2), "float32")
    seen: list[tuple[list[int], list[float]]] = []

    def encode(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = len(feeds["pixels"])
        brightest = feeds["pixels"].reshape(rows, -1).max(axis=1)
        size = np.tile(np.array([32, 32]), (rows, 1))
        return {**encoder.script({**feeds, "size": size}), "finer": np.stack([brightest, brightest], axis=1).astype(np.float32)}

    def decode(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.append((feeds["image"].tolist(), feeds["finer"][feeds["image"], 1].tolist()))
        return decoder.script({name: value for name, value in feeds.items() if name != "finer"})

    of_encoder, of_decoder = (world.model("sam").graph(name) for name in ("encoder", "decoder"))
    one_input = replace(of_encoder, inputs=of_encoder.inputs[:1], outputs=(*of_encoder.outputs, finer))
    one_more = replace(of_decoder, inputs=(*of_decoder.inputs, replace(finer, shape=("images", 2))))
    engines = Reusing(FakeEngine(one_input, encode)), Reusing(FakeEngine(one_more, decode))
    photos = [world.photo(32, 32, red=(0, 0, 8, 8)), world.photo(32, 32), world.photo(32, 32)]
    found = boxes(*((image, (0, 0, 8, 8)) for image in (0, 0, 1, 2)))
    masks = MaskPredictor(world.model("sam"), *engines)(photos, found)
    brightest = [float(photo.pixels.max()) for photo in photos]
    assert seen == [([0, 0, 1], [brightest[0], brightest[0], brightest[1]]), ([0], [brightest[2]])]
    for part, expected in zip(masks.logits, outliner(world)(photos, found).logits, strict=True):
        assert np.array_equal(np.asarray(part), np.asarray(expected))


class Reusing:
    """An engine whose every call overwrites what the last one gave, as TensorRT's does."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self._last: dict[str, Borrowed] = {}
        self.inputs, self.outputs, self.axes = engine.inputs, engine.outputs, engine.axes

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for tensor in self._last.values():
            tensor.array.fill(-99)
        self._last = {name: Borrowed(np.array(value)) for name, value in self._engine(feeds).items()}
        return dict(self._last)


class Borrowed:
    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return self.array

    def clone(self) -> Borrowed:
        return Borrowed(self.array.copy())


def test_masks_outlive_the_calls_of_an_engine_that_reuses_its_memory(world: World) -> None:
    photos = [world.photo(32, 32, red=(4 * i, 0, 4 * i + 8, 8)) for i in range(5)]
    found = boxes(*((i, (4 * i, 0, 4 * i + 8, 8)) for i in range(5)))
    decoder = Reusing(world.engine("sam", "decoder"))
    masks = MaskPredictor(world.model("sam"), Reusing(world.engine("sam", "encoder")), decoder)(photos, found)
    assert len(masks.logits) == 3
    for part, expected in zip(masks.logits, outliner(world)(photos, found).logits, strict=True):
        assert np.array_equal(np.asarray(part), np.asarray(expected))
