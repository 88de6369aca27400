"""Sizes of files at which readers refuse to read on: the documented number of bytes, and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import GroundingDinoConfig

from wsss.class_files import read_class_file
from wsss.errors import WsssError
from wsss.export.clip.weights import _config_beside
from wsss.export.grounding_dino.weights import _check_config
from wsss.photographs import read_file
from wsss.reading.documents import read_json
from wsss.runtime.given.voc import read_voc_xml
from wsss.runtime.given.yolo import read_names
from wsss.spec import read_manifest
from wsss.train.checkpoint import read_record
from wsss.train.evaluate.npy import read_label_dictionary

MIB = 2**20


@pytest.mark.parametrize(
    ("name", "most", "read"),
    [
        ("coco.json", 256 * MIB, read_json),
        ("photo.png", 1024 * MIB, lambda path: read_file(path.parent, path.name)),
        ("classes.json", 64 * MIB, read_class_file),
        ("classes.txt", 16 * MIB, read_class_file),
        ("manifest.json", 16 * MIB, lambda path: read_manifest(path.parent)),
        ("a.xml", 16 * MIB, read_voc_xml),
        ("data.yaml", MIB, read_names),
        ("labels.npy", 256 * MIB, read_label_dictionary),
        ("segmenter.json", 4 * MIB, lambda path: read_record(path.parent)),
        ("open_clip_config.json", MIB, lambda path: _config_beside(path.parent / "w.pt", "ViT-B-16")),
        ("config.json", MIB, lambda path: _check_config(path, GroundingDinoConfig(), "")),
    ],
)
def test_a_file_of_one_byte_more_is_not_read(tmp_path: Path, name: str, most: int, read: Callable[[Path], object]) -> None:
    path = tmp_path / name
    with path.open("wb") as file:
        file.truncate(most + 1)
    with pytest.raises(WsssError) as caught:
        read(path)
    assert f"expected at most {most:,} bytes, got {most + 1:,}" in str(caught.value)
    if most <= 16 * MIB:
        with path.open("wb") as file:
            file.truncate(most)
        with pytest.raises(WsssError) as caught:  # it holds only zeros
            read(path)
        assert "bytes, got" not in str(caught.value)
