"""Batches follow from (seed, position): any number of processes and any restart see the same images, changed the same way."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wsss.errors import StoreError
from wsss.store.local import LabelFolder
from wsss.train import data
from wsss.train.args import DataArgs, MachineArgs
from wsss.train.data import (
    Batch,
    Crops,
    Order,
    Positions,
    batches,
    class_weights,
    normalized,
    ranked_confidence,
    ranked_pixels,
    repeat_factors,
    step_seed,
    workers_of,
)
from wsss.train.dataset.survey import Item, survey_store
from wsss.train.distributed import World

Scenes = tuple[Path, Path]
ARGS = DataArgs(crop=32, batch=4, jitter=(0.2, 0.2, 0.2, 0.1))


def crops_of(scenes: Scenes, args: DataArgs = ARGS, seed: int = 1) -> Crops:
    items = survey_store(*scenes).items
    return Crops(*scenes, items, args, seed=seed, order=Order(len(items), seed), confidence=ranked_confidence(items))


def positions(args: DataArgs, first: int = 0, rank: int = 0, world: int = 1, steps: int = 3) -> Positions:
    return Positions(args, first=first, steps=steps, rank=rank, world=world)


def same(first: Batch, second: Batch) -> bool:
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("pixels", "label", "confidence", "item"))


# ---- which image comes when ----


def test_every_item_comes_once_an_epoch_in_an_order_of_its_own() -> None:
    order = Order(10, seed=3)
    epochs = [[order[epoch * 10 + row] for row in range(10)] for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [Order(10, seed=3)[position] for position in (25, 4)] == [epochs[2][5], epochs[0][4]], "without those before"
    assert [Order(10, seed=4)[row] for row in range(10)] != epochs[0]


def test_weighted_draws_follow_their_weights() -> None:
    order = Order(3, seed=0, weights=np.array([1.0, 2.0, 1.0]))
    count = np.bincount([order[position] for position in range(6000)])
    assert count / 6000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    assert Order(3, seed=0, weights=np.array([1.0, 2.0, 1.0]))[5000] == order[5000]


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_any_division_of_a_step_sees_the_same_images(world: int, accumulate: int) -> None:
    args = DataArgs(crop=32, batch=4, accumulate=accumulate)
    passes = [list(positions(args, rank=rank, world=world)) for rank in range(world)]
    for step in range(3):
        seen = [row for rank in passes for part in rank[step * accumulate : (step + 1) * accumulate] for row in part]
        assert sorted(seen) == list(range(step * 4, step * 4 + 4))
    assert list(positions(args, first=2)) == list(positions(args))[2 * accumulate :]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_each_forward_pass(world: int) -> None:
    """What a batch norm over all processes sees does not depend on their number."""
    args = DataArgs(crop=32, batch=8, accumulate=2)
    of_each = [list(positions(args, first=1, rank=rank, world=world)) for rank in range(world)]
    passes = [sorted(position for rows in some for position in rows) for some in zip(*of_each, strict=True)]
    assert passes[:3] == [[8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19]]


def test_seeds_of_steps_differ() -> None:
    told = {step_seed(*each) for each in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1))}
    assert len(told) == 5


# ---- how it is changed ----


def test_a_crop_follows_from_its_position(scenes: Scenes) -> None:
    crops, again = crops_of(scenes), crops_of(scenes)
    torch.manual_seed(1)
    first = crops[5]
    torch.manual_seed(2)
    crops[6]
    second = again[5]
    assert isinstance(first, Batch) and isinstance(second, Batch)
    assert same(first, second)
    other = crops_of(scenes, seed=2)[5]
    assert isinstance(other, Batch) and not torch.equal(first.pixels, other.pixels)


def test_reading_leaves_the_random_stream_alone(scenes: Scenes) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    crops_of(scenes)[0]
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_processes_change_nothing(scenes: Scenes, workers: int) -> None:
    loaded = list(batches(crops_of(scenes), positions(ARGS), workers=workers, pin=False))
    assert len(loaded) == 3
    crops = crops_of(scenes)
    for batch, rows in zip(loaded, positions(ARGS), strict=True):
        assert batch.pixels.shape == (4, 32, 32, 3) and batch.pixels.dtype == torch.uint8
        assert batch.label.shape == (4, 32, 32) and batch.label.dtype == torch.uint8
        assert batch.confidence.shape == (4, 13)
        for row, position in enumerate(rows):
            single = crops[position]
            assert isinstance(single, Batch)
            assert torch.equal(batch.pixels[row], single.pixels[0])


def test_normalizing_is_the_published_arithmetic() -> None:
    pixels = torch.tensor([[[0, 128, 255]]], dtype=torch.uint8).expand(4, 5, 3)
    value = normalized(pixels, torch.tensor(DataArgs().mean), torch.tensor(DataArgs().std))
    expected = [(0 / 255 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (255 / 255 - 0.406) / 0.225]
    assert value.shape == (3, 4, 5)
    assert value[:, 2, 3].tolist() == pytest.approx(expected, abs=1e-5)


def test_workers_share_the_cores_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "cores", lambda: 12)
    counts = []
    for local_size in (1, 2, 4, 24):
        world = World(rank=0, size=local_size, device=torch.device("cpu"), local_size=local_size)
        counts.append(workers_of(MachineArgs(), world))
        assert workers_of(MachineArgs(workers=0), world) == 0
    assert counts == [8, 6, 3, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_changes_on_the_way_is_named(scenes: Scenes, workers: int) -> None:
    crops = crops_of(scenes)
    Image.new("RGB", (56, 48)).save(scenes[1] / "scene-02.png")
    with pytest.raises(StoreError, match=r"scene-02\.png: the image has changed since it was labeled\n") as caught:
        list(islice(batches(crops, positions(ARGS), workers=workers, pin=False), 3))
    assert caught.value.hint == "label it again"


# ---- rare classes ----


def item(*pixels: int) -> Item:
    return Item(path="", label="", sha256="", confidence=(1.0,) * len(pixels), pixels=pixels, size=(8, 10))


def test_class_weights_are_enets() -> None:
    weights = class_weights([item(60, 20, 0), item(0, 20, 0)])
    share = np.array([0.6, 0.4])
    raw = 1 / np.log(1.02 + share)
    assert weights == pytest.approx([*(raw / (raw * share).sum()), 0], rel=1e-5)
    assert (weights[:2] * share).sum() == pytest.approx(1)


def test_repeat_factors_are_those_of_lvis() -> None:
    items = [item(9, 1, 0)] * 15 + [item(9, 1, 1)] + [item(9, 0, 0)] * 4
    factors = repeat_factors(items, 0.2)
    assert factors[:15] == pytest.approx([1.0] * 15)
    assert factors[15] == pytest.approx(2.0), "class 2 is in 1 of 20 images: sqrt(0.2 / 0.05)"
    assert factors[16:] == pytest.approx([1.0] * 4), "nothing in it"


# ---- confidence ----


def test_confidence_weighs_by_its_rank_in_the_class() -> None:
    """Twice the share of the class's pixels below it: 1 in the mean over the pixels, whatever the detector's scores."""
    confidence = [(1.0, 0.4, 0.8), (0.8, 0.2, 0.5), (1.0, 1.0, 0.3), (0.9, 0.4, 0.1)]
    pixels = [(100, 30, 0), (100, 10, 20), (50, 0, 20), (50, 40, 0)]

    def weights(scale: float) -> np.ndarray:
        items = [
            Item(path="", label="", sha256="", confidence=tuple(scale * each for each in c), pixels=p, size=(9, 9))
            for c, p in zip(confidence, pixels, strict=True)
        ]
        return ranked_confidence(items)

    found = weights(1.0)
    assert found.dtype == np.float32 and np.array_equal(found, weights(0.3)), "scores of another height change nothing"
    assert (found * pixels).sum(0) / np.sum(pixels, axis=0) == pytest.approx([1, 1, 1])
    assert found[:, 0].tolist() == [1, 1, 1, 1], "the background is surer than any class"
    assert found[[0, 1, 3], 1] == pytest.approx([(2 * 10 + 70) / 80, 10 / 80, (2 * 10 + 70) / 80]), "equal scores weigh the same"
    assert found[1:3, 2] == pytest.approx([1.5, 0.5])


def test_a_class_without_confidence_or_pixels_weighs_one() -> None:
    items = [Item(path="", label="", sha256="", confidence=(1.0, 0.0, 0.7), pixels=(9, 4, 0), size=(1, 13))] * 2
    assert ranked_confidence(items).tolist() == [[1, 1, 1]] * 2


def test_pixels_weigh_by_the_rank_of_their_confidence_in_their_label() -> None:
    counted = np.zeros((3, 256), int)
    counted[0, [255, 100]] = 30, 10
    counted[1, [0, 7, 200]] = 1, 2, 1
    found = ranked_pixels(counted.tolist())
    assert found.shape == (3, 256) and found.dtype == np.float32
    assert found[0, [100, 255]] == pytest.approx([0.25, 1.25]) and found[1, [0, 7, 200]] == pytest.approx([0.25, 1, 1.75])
    assert (found[:2] * counted[:2]).sum(1) / counted[:2].sum(1) == pytest.approx([1, 1]), "no label weighs more than another"
    assert found[2].tolist() == [1] * 256, "a label without pixels"


def test_the_weights_of_pixels_move_with_their_labels(scenes: Scenes) -> None:
    """The confidence is a number for each label, so that each pixel of a crop must have the weight of its label."""
    store, _ = scenes
    items = survey_store(*scenes).items
    for item in items:
        with Image.open(store / "labels" / item.label) as image:
            label = np.array(image)
        LabelFolder(store / "labels", store).write_confidence(
            item.label, np.where(label == 255, 0, 3 * label + 1).astype(np.uint8)
        )
    counted = survey_store(*scenes, confidence=True).confidence
    assert {(label, value) for label, row in enumerate(counted) for value, count in enumerate(row) if count} == {
        (label, 3 * label + 1) for label in range(13) if any(item.pixels[label] for item in items)
    }
    table = np.random.default_rng(0).uniform(0, 2, (13, 256)).astype(np.float32)
    crops = Crops(*scenes, items, ARGS, seed=1, order=Order(len(items), 1), confidence=ranked_confidence(items), of_pixels=table)
    plain, seen = crops_of(scenes), set()
    for position in range(12):
        found, without = crops[position], plain[position]
        assert isinstance(found, Batch) and isinstance(without, Batch)
        assert torch.equal(found.pixels, without.pixels) and torch.equal(found.label, without.label)
        assert found.confidence.shape == (1, 32, 32) and found.confidence.dtype == torch.float32
        label = found.label.numpy()
        known = label != 255
        assert np.array_equal(found.confidence.numpy()[known], table[label[known], 3 * label[known] + 1])
        seen |= set(label[known].tolist())
    assert len(seen) > 3
