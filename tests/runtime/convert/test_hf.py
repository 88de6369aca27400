"""Hugging Face image folders, read back by their own tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from wsss.photographs import read_photograph
from wsss.store.local import read_label

if TYPE_CHECKING:
    pass

from .stores import check_maps, quiet

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools, by numpy 2


@pytest.mark.parametrize("val", [0.0, 0.4])
def test_hf_read_by_datasets(
    val: float, made: Path, converted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet(monkeypatch)
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    out = converted("hf", val=val)
    found, boxes = {}, {}
    data = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert set(data) == ({"train", "val"} if val else {"train"}), "the folder called test is no split"
    for split in data.values():
        assert split.column_names == ["image", "mask", "path", "objects"]
        for row in split:
            assert row["mask"].mode == "P"
            found[row["path"]] = np.array(row["mask"])
            assert np.array_equal(np.array(row["image"].convert("RGB")), read_photograph(made / "photos", row["path"]).pixels)
            boxes[row["path"]] = row["objects"]
    check_maps(found, made)
    assert boxes["dog.jpg"]["score"] == [0.9, 0.5, 0.25, 0.2]
    assert boxes["dog.jpg"]["category"] == ["dog", "potted plant", "potted plant", "dog"]
    assert boxes["dog.jpg"]["bbox"][0] == [3.25, 2.0, 16.75, 12.0]


def test_hf_as_files(made: Path, converted: Callable[..., Path]) -> None:
    out = converted("hf")
    lines = [json.loads(line) for line in (out / "train/metadata.jsonl").read_text().splitlines()]
    check_maps({line["path"]: read_label(out / "train" / line["mask_file_name"]) for line in lines}, made)
    for line in lines:
        assert (out / "train" / line["file_name"]).read_bytes() == (made / "photos" / line["path"]).read_bytes()
    names = json.loads((out / "classes.json").read_text())
    assert names == {"0": "background", "1": "dog", "2": "potted plant", "3": 'a "q" & <b>', "255": "void"}
