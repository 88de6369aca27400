"""Inputs that the device makes: what the host would make, from one copy of the photograph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from wsss.batch import Photograph
from wsss.engines.fake import FakeEngine
from wsss.errors import OutOfMemory
from wsss.pixels import pictures
from wsss.runtime.detect import Detector
from wsss.runtime.resize import Resizer
from wsss.runtime.run.stream import Stream
from wsss.runtime.segment import MaskPredictor
from wsss.runtime.tag import Tagger
from wsss.spec import AxisRange, GraphSpec, TensorSpec

from ..conftest import CANVASES, SIDE, VIEW

if TYPE_CHECKING:
    from ..conftest import World

MAX_PX = 64
Feeds = Mapping[str, np.ndarray]


class Device:
    """A fake device: engines that resize with Pillow, one axis after the other as they are told, and count their uploads."""

    def __init__(self, filter: Image.Resampling = Image.Resampling.BILINEAR) -> None:
        self.filter = filter
        self.uploads: list[np.ndarray] = []
        self.full = False
        self.engines: dict[tuple[int, int], FakeEngine] = {}

    def engine(self, canvas: tuple[int, int]) -> FakeEngine:
        spec = GraphSpec(
            file="",
            inputs=(
                TensorSpec("photo", ("photo_height", "photo_width", 4), "uint8"),
                TensorSpec("window", ("views", 4), "int64"),
                TensorSpec("size", ("views", 2), "int64"),
                TensorSpec("columns_first", ("views",), "bool"),
            ),
            outputs=(TensorSpec("pixels", ("views", *canvas, 3), "uint8"),),
            axes={"views": AxisRange(1, 1, 8), **dict.fromkeys(("photo_height", "photo_width"), AxisRange(1, 32, MAX_PX))},
            opset=18,
        )
        engine = self.engines.setdefault(canvas, FakeEngine(spec, lambda feeds: {"pixels": self.resized(feeds, canvas)}))
        engine.upload = self.upload  # type: ignore[attr-defined]
        return engine

    def upload(self, array: np.ndarray) -> np.ndarray:
        if self.full:
            raise OutOfMemory("the device is full")
        self.uploads.append(array)
        return array

    def resized(self, feeds: Feeds, canvas: tuple[int, int]) -> np.ndarray:
        out = np.zeros((len(feeds["window"]), *canvas, 3), np.uint8)
        for row, (y0, y1, x0, x1) in enumerate(feeds["window"]):
            picture = Image.fromarray(np.ascontiguousarray(feeds["photo"][y0:y1, x0:x1, :3]))
            height, width = (int(length) for length in feeds["size"][row])
            first = (picture.width, height) if feeds["columns_first"][row] else (width, picture.height)
            out[row, :height, :width] = np.asarray(picture.resize(first, self.filter).resize((width, height), self.filter))
        return out


def noise(height: int, width: int, name: str = "x") -> Photograph:
    whole = np.random.default_rng(height).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Photograph(name=name, pixels=whole[..., :3])


def tagger(world: World, **options: Any) -> Tagger:
    return Tagger(world.model("clip"), world.engine("clip", "image"), world.engine("clip", "text"), world.classes, **options)


def detector(world: World, **options: Any) -> Detector:
    def image(canvas: tuple[int, int]) -> FakeEngine:
        return world.engine("grounding-dino", f"image-{canvas[0]}x{canvas[1]}")

    return Detector(world.model("grounding-dino"), world.engine("grounding-dino", "text"), image, world.classes, **options)


def predictor(world: World, **options: Any) -> MaskPredictor:
    return MaskPredictor(world.model("sam"), world.engine("sam", "encoder"), world.engine("sam", "decoder"), **options)


STAGES = {"tag": tagger, "detect": detector, "segment": predictor}
SIZES = [(30, 40), (40, 30), (60, 20), (64, 64), (1, 9), (33, 50)]


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("size", SIZES)
def test_the_device_makes_what_the_host_makes(world: World, name: str, size: tuple[int, int]) -> None:
    """Pixel by pixel: window, size and order of the axes are those of Pillow on the host."""
    device, photo = Device(), noise(*size)
    stage = STAGES[name](world, resizer=Resizer(device.engine))
    assert stage.resizes(photo)
    made = stage.resized(photo)
    host = stage.prepare(photo, np.zeros(stage.room(photo), np.uint8))
    assert np.array_equal(np.asarray(made), host.reshape(-1, *host.shape[-3:]))


def test_a_photograph_goes_up_once_for_all_stages(world: World) -> None:
    device, photo = Device(), noise(48, 64)
    for stage in (make(world, resizer=Resizer(device.engine)) for make in STAGES.values()):
        stage.resized(photo)
    assert len(device.uploads) == 1
    assert device.uploads[0] is photo.pixels.base, "the memory of the photograph itself, not a copy"
    assert not photo.on_device, "the last stage frees it"


def test_the_chain_labels_as_with_the_hosts_inputs(world: World) -> None:
    """Batches of several calls, with photographs that are too large for the device between others."""
    photos = [
        world.photo(48, 64, red=(8, 8, 40, 40)),
        world.photo(64, 64, green=(0, 0, 30, 64), blue=(34, 0, 64, 64)),
        world.photo(MAX_PX + 26, 60, red=(0, 0, 60, 80)),
        world.photo(30, 40),
        world.photo(40, 30, blue=(2, 2, 28, 38)),
    ]
    device, outcomes = Device(), []
    for options in ({}, {"resizer": Resizer(device.engine)}):
        labels = tagger(world, **options)(photos)
        boxes = detector(world, **options)(photos, labels)
        masks = predictor(world, **options)(photos, boxes)
        outcomes.append((labels.score, boxes.xyxy_image, boxes.label, boxes.image, masks.quality, *map(np.asarray, masks.logits)))
    for host, on_device in zip(*outcomes, strict=True):
        assert np.array_equal(host, on_device)
    assert len(device.uploads) == 4
    assert len(outcomes[0][1]) == 5
    assert device.engines.keys() == {(VIEW, VIEW), *CANVASES, (SIDE, SIDE)}


def test_a_full_device_leaves_the_photograph_to_the_host(world: World) -> None:
    device, photo = Device(), world.photo(48, 64, red=(8, 8, 40, 40))
    device.full = True
    assert tagger(world, resizer=Resizer(device.engine))([photo]).present.tolist() == [[True, False, False]]
    assert not photo.on_device


def test_a_call_that_does_not_fit_frees_the_photograph(world: World) -> None:
    def no_memory(feeds: Feeds) -> Feeds:
        raise OutOfMemory("no memory")

    device, photo = Device(), noise(20, 20)
    device.engine((VIEW, VIEW)).script = no_memory
    assert tagger(world, resizer=Resizer(device.engine)).resized(photo) is None
    assert device.uploads
    assert not photo.on_device


@pytest.mark.parametrize("size", [(MAX_PX + 1, 20), (20, MAX_PX + 1)])
def test_a_photograph_beyond_the_engines_range_is_the_hosts(world: World, size: tuple[int, int]) -> None:
    assert not tagger(world, resizer=Resizer(Device().engine)).resizes(noise(*size))


def test_without_a_resizer_the_host_resizes(world: World) -> None:
    assert not any(make(world).resizes(noise(20, 20)) for make in STAGES.values())


def test_nothing_is_prepared_ahead_of_the_device(world: World) -> None:
    """`Stream._prepare` needs no more of its stream than the pool, which must not be asked."""
    photos = [noise(20, 20), noise(MAX_PX + 1, 20)]

    class Pool:
        jobs = 0

        def submit(self, *_: object) -> None:
            self.jobs += 1

    stream = Stream.__new__(Stream)
    stream._pool = Pool()  # type: ignore[assignment]
    stream._prepare(tagger(world, resizer=Resizer(Device().engine)), "tag", photos)
    assert [list(photo.ahead) for photo in photos] == [[], ["tag"]]
    assert stream._pool.jobs == 1  # type: ignore[attr-defined]


# ---- Pillow's order of the axes ----


def test_the_order_is_that_of_this_pillow() -> None:
    order = pictures.order_of()
    assert order is not None
    rng = np.random.default_rng(1)
    for before, after in (((sides[0], sides[1]), (sides[2], sides[3])) for sides in rng.integers(4, 200, (300, 4)).tolist()):
        rows, columns = pictures._orders(rng, before, after)
        assert columns if order(before, after) else rows


def test_an_earlier_pillow_resizes_the_columns_first_of_what_is_a_hundred_times_as_high_as_wide() -> None:
    """Up to version 12 (``Image.resize``), and only where the picture gets lower."""
    cases = {((501, 5), (500, 5)): True, ((500, 5), (20, 5)): False, ((501, 5), (501, 9)): False, ((501, 5), (600, 5)): False}
    assert {case: pictures._rows_first(*case) for case in cases} == cases


def test_with_an_unknown_order_the_host_resizes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures.order_of.cache_clear()
    monkeypatch.setattr(pictures, "_orders", lambda *_: (False, False))
    try:
        assert not tagger(world, resizer=Resizer(Device().engine)).resizes(noise(20, 20))
    finally:
        pictures.order_of.cache_clear()


def test_pixels_of_any_layout_go_up(world: World) -> None:
    device, photo = Device(), noise(20, 30)
    other = replace(photo, pixels=np.ascontiguousarray(photo.pixels), on_device={})
    stage = tagger(world, resizer=Resizer(device.engine))
    assert np.array_equal(np.asarray(stage.resized(photo)), np.asarray(stage.resized(other)))
    assert [each.shape for each in device.uploads] == [(20, 30, 4)] * 2
