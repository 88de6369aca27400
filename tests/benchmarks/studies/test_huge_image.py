"""The study of one huge photograph, on a small one: its reference for the label map, and its memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wsss.benchmarks.studies.speed import huge_image
from wsss.runtime import fuse
from wsss.store.local import read_label, write_label


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fuse, "TILE_BYTES", fuse.TILE_BYTES)  # `run` sets it
    monkeypatch.setattr(huge_image, "WINDOWS", 5)
    huge_image.write_inputs(tmp_path, (350, 420), 30)
    return tmp_path


def test_tiles_agree_with_the_rule_written_out(folder: Path) -> None:
    whole, tiled = huge_image.run(folder, 64 << 20), huge_image.run(folder, 1 << 20)
    assert whole["boxes"] == 30
    assert whole["label_map"] == tiled["label_map"]
    assert 100 < tiled["peak_mib"] < 4000
    assert huge_image.differing(folder, 1 << 20) < 1e-4


def test_a_shifted_label_map_is_noticed(folder: Path) -> None:
    huge_image.run(folder, 64 << 20)
    path = folder / f"store-{64 << 20}" / "labels" / "huge.png"
    found = read_label(path)
    assert len(np.unique(found)) > 2
    write_label(path, np.roll(found, 1, axis=1))
    assert huge_image.differing(folder, 64 << 20) > 1e-3
