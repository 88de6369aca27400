"""The study of CUDA graphs, on a few drawn scenes: nearly all calls of a run are replays, and fusing copies and waits little."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from wsss.batch import Photograph
from wsss.benchmarks.studies.speed.fake_chain import SMALL
from wsss.benchmarks.studies.speed.graph_replays import known_boxes, measure
from wsss.mini.scenes import draw_scene


def test_nearly_all_calls_are_replays() -> None:
    drawn = (draw_scene(number, size=(120 + number % 3, 160)) for number in range(40))
    scenes = [scene for scene in drawn if len(scene.labels)]
    photos = [Photograph(name=f"{number}", pixels=scene.pixels) for number, scene in enumerate(scenes)]
    found = {f"{number}": (scene.xyxy_image, scene.labels) for number, scene in enumerate(scenes)}
    result = measure(photos, found, warm_up=3, passes=3, sizes=SMALL)
    assert result["calls"].keys() == {"clip", "detector", "encoder", "decoder", "fuse"} == result["replayed"].keys()
    assert result["replayed_of_all"] >= 0.95 and min(result["replayed"].values()) >= 0.8, result["replayed"]
    large = result["fuse"]["12_mpx"]
    assert large["waits"] == 1 and large["bytes_host_to_device"] < 1000
    assert 12e6 < large["bytes_device_to_host"] < 13e6


def test_boxes_of_a_detector_of_annotations_and_of_classes(tmp_path: Path) -> None:
    for folder in ("JPEGImages", "Annotations", "detector_boxes_xyx2y2"):
        (tmp_path / folder).mkdir()
    for name in "abc":
        (tmp_path / f"JPEGImages/{name}.jpg").touch()
    (tmp_path / "ORIGIN.tsv").write_text("id\tvoc_split\tclasses\na\ttrain\t1\nb\ttrain\t1\nc\ttrain\t3 20\n", encoding="utf-8")
    (tmp_path / "detector_boxes_xyx2y2/a.txt").write_text("0 0.9 1 2 3 4\n14 0.1 0 0 9 9\n", encoding="ascii")
    box = "<bndbox><xmax>8</xmax><xmin>5</xmin><ymax>9</ymax><ymin>6</ymin></bndbox>"
    (tmp_path / "Annotations/b.xml").write_text(
        f"<annotation><object><name>person</name>{box}</object></annotation>", encoding="utf-8"
    )
    found = known_boxes(tmp_path)
    assert np.array_equal(found["a.jpg"][0], [[1, 2, 3, 4]]) and found["a.jpg"][1].tolist() == [1]
    assert np.array_equal(found["b.jpg"][0], [[5, 6, 8, 9]]) and found["b.jpg"][1].tolist() == [15]
    assert len(found["c.jpg"][0]) == 2 and found["c.jpg"][1].tolist() == [3, 20]
