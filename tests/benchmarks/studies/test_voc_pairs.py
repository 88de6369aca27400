"""Label stores of true masks, as the trainer takes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from wsss.benchmarks.studies.quality.voc_pairs import _fewest_draws, store_of_masks
from wsss.classes import class_list
from wsss.store.local import read_label
from wsss.train.args import config_from
from wsss.train.dataset.survey import survey_store


def test_true_masks_make_a_store_to_train_on(tmp_path: Path) -> None:
    photographs, masks = tmp_path / "JPEGImages", tmp_path / "SegmentationClass"
    photographs.mkdir()
    masks.mkdir()
    truth = np.zeros((20, 30), np.uint8)
    truth[5:9, 5:9], truth[9, 5:9] = 2, 255
    for name in ("a", "b"):
        Image.new("RGB", (30, 20)).save(photographs / f"{name}.jpg")
        Image.fromarray(truth).save(masks / f"{name}.png")
    classes = class_list(["dog", "cat"])
    for _ in range(2):  # the second time there is nothing left to do
        assert store_of_masks(photographs, masks, tmp_path / "store", classes) == 2
    survey = survey_store(tmp_path / "store", photographs)
    assert [item.path for item in survey.items] == ["a.jpg", "b.jpg"] and survey.failed == 0
    assert all(item.confidence == (1, 1, 1) and item.pixels == (580, 0, 16) for item in survey.items)
    np.testing.assert_array_equal(read_label(tmp_path / "store" / "labels" / "a.png"), truth)


def test_every_image_comes_once_an_epoch() -> None:
    config = config_from({"optimizer": {"steps": 10}, "data": {"batch": 4}})
    assert (_fewest_draws(20, config), _fewest_draws(40, config), _fewest_draws(41, config)) == (2, 1, 0)
