"""Label Studio tasks, read back by their own tools."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from wsss.runtime.convert.labeled import original_path

if TYPE_CHECKING:
    pass

from .stores import CLASSES, NAMES, check_maps, paint, truth

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools, by numpy 2


def test_label_studio_read_by_its_sdk(made: Path, converted: Callable[..., Path]) -> None:
    brush = pytest.importorskip("label_studio_sdk.converter.brush", reason="needs label-studio-sdk")
    from label_studio_sdk.label_interface import LabelInterface

    out = converted("label-studio")
    interface = LabelInterface((out / "config.xml").read_text())
    found = {}
    for task in json.loads((out / "tasks.json").read_text()):
        assert interface.validate_task({"data": task["data"]})
        name = name_of(task)
        prediction = task["predictions"][0]
        if prediction["result"]:
            assert interface.validate_prediction(prediction)
        results = [{**each, **each["value"]} for each in prediction["result"]]
        layers = brush.decode_from_annotation("label", results)
        masks = [(value_of(layer.removeprefix("label-").rpartition("-")[0]), mask > 0) for layer, mask in layers.items()]
        found[name] = paint(truth(made)[name].shape, masks)
    check_maps(found, made)


def test_label_studio_read_by_the_rules_of_rle_pack(made: Path, converted: Callable[..., Path]) -> None:
    out = converted("label-studio")
    labels = [each.attrib["value"] for each in ElementTree.parse(out / "config.xml").iter("Label")]
    assert labels == [*CLASSES, "void"]
    found, ids = {}, []
    for task in json.loads((out / "tasks.json").read_text()):
        name, masks = name_of(task), []
        for each in task["predictions"][0]["result"]:
            ids.append(each["id"])
            shape = each["original_height"], each["original_width"]
            pixels = unpacked(each["value"]["rle"]).reshape(*shape, 4)
            assert set(np.unique(pixels)) <= {0, 255}
            masks.append((value_of(each["value"]["brushlabels"][0]), pixels[..., 3] > 0))
        found[name] = paint(truth(made)[name].shape, masks)
        if name == "dog.jpg":
            assert task["predictions"][0]["score"] == 0.25
            assert [each.get("score") for each in task["predictions"][0]["result"]][:3] == [0.9, 0.5, 0.25]
    check_maps(found, made)
    assert len(ids) == len(set(ids))
    copies = [path.relative_to(out / "images") for path in (out / "images").rglob("*") if path.is_file()]
    assert {path.parent for path in copies} == {Path(name).parent for name in NAMES}, "folders stay"


def test_brush_rle_of_long_runs() -> None:
    from wsss.rle import spans_of
    from wsss.runtime.convert.label_studio import brush_rle

    mask = np.zeros((300, 250), bool)
    mask[100:] = True  # runs of 100,000 and 200,000 values, the code's longest has 65,536
    assert np.array_equal(unpacked(brush_rle(spans_of(mask), mask.size)), np.repeat(mask.ravel(), 4) * np.uint8(255))


def test_brush_rle_of_whole_bytes_ends_with_one_more() -> None:
    """As the SDK's; 53 bits of the head and one run of 19 are nine bytes."""
    from wsss.runtime.convert.label_studio import brush_rle

    rle = brush_rle(np.zeros((0, 2), np.int64), 10)
    assert (len(rle), rle[-1]) == (10, 0)
    assert unpacked(rle).tolist() == [0] * 40


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (300, 400)])
def test_brush_rle_is_the_sdks(shape: tuple[int, int]) -> None:
    brush = pytest.importorskip("label_studio_sdk.converter.brush", reason="needs label-studio-sdk")
    from wsss.rle import spans_of
    from wsss.runtime.convert.label_studio import brush_rle

    random = np.random.default_rng(0)
    for mask in (np.zeros(shape, bool), np.ones(shape, bool), random.random(shape) < 0.1):
        assert brush_rle(spans_of(mask), mask.size) == brush.mask2rle(mask.astype(np.uint8) * 255)


def name_of(task: dict[str, Any]) -> str:
    from urllib.parse import unquote

    return original_path(unquote(task["data"]["image"]).removeprefix("/data/local-files/?d=images/"))


def value_of(name: str) -> int:
    return 255 if name == "void" else CLASSES.index(name) + 1


def unpacked(rle: list[int]) -> np.ndarray:
    """thi.ng's rle-pack, decoded from its description."""
    bits = "".join(f"{byte:08b}" for byte in rle)
    place = 0

    def read(count: int) -> int:
        nonlocal place
        place += count
        return int(bits[place - count : place], 2)

    values = np.zeros(read(32), np.uint8)
    word = read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    done = 0
    while done < len(values):
        run, length = read(1), 0
        length = read(sizes[read(2)]) + 1
        if run:
            values[done : done + length] = read(word)
        else:
            values[done : done + length] = [read(word) for _ in range(length)]
        done += length
    return values
