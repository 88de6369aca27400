"""Image-level truth in each of its formats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from wsss.errors import WsssError
from wsss.train.evaluate.labels import read_image_labels

CLASSES = ("dog", "potted plant", "cat")


def vectors(path: Path, labels: dict[object, list[float]]) -> Path:
    array = np.empty((), object)
    array[()] = {key: np.array(vector, np.float32) for key, vector in labels.items()}
    np.save(path, array)
    return path


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def test_json_as_wsss_label_takes_it(tmp_path: Path) -> None:
    path = text(
        tmp_path / "a.json", json.dumps({"sub/a.jpg": ["Potted_Plant", "dog"], "b.v2": [], "c.png": ["cat"], "c.jpg": []})
    )
    present = read_image_labels(path, CLASSES, ["b.v2", "sub/a", "c.png", "c.jpg"])
    assert present.astype(int).tolist() == [[0, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]]


def test_json_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a.jpg": ["potted-plant"]}')
    assert read_image_labels(path, CLASSES, ["a"]).tolist() == [[name == "potted plant" for name in CLASSES]]


def test_lines_of_ids(tmp_path: Path) -> None:
    path = text(tmp_path / "train.txt", "COCO_train2014_000000000009 0 2\nCOCO_train2014_000000000025\n2007_000032.jpg 1\n")
    names = ["COCO_train2014_000000000025", "sub/COCO_train2014_000000000009", "2007_000032"]
    assert read_image_labels(path, CLASSES, names).astype(int).tolist() == [[0, 0, 0], [1, 0, 1], [0, 1, 0]]


def test_vectors_by_number_or_name(tmp_path: Path) -> None:
    path = vectors(tmp_path / "a.npy", {2007000032: [1, 0, 0], np.int32(9): [0, 1, 1], "dog_7": [0, 0, 0]})
    names = ["COCO_train2014_000000000009", "2007_000032", "dog_7"]
    assert read_image_labels(path, CLASSES, names).astype(int).tolist() == [[0, 1, 1], [1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", "[]", "expected a JSON object"),
        ("a.json", "{", "expected JSON"),
        ("a.json", '{"a": "dog"}', "to lists of class names, got 'dog' for 'a'"),
        ("a.json", '{"a": ["horse"]}', "a: the class 'horse' is not in --classes"),
        ("a.json", '{"a": ["dogg"]}', "a: the class 'dogg' is not in --classes\n\nhint: did you mean 'dog'?"),
        ("a.json", '{"a": [1]}', "a: the class 1 is not in --classes"),
        ("a.json", '{"a": [["dog"]]}', r"a: the class \['dog'\] is not in --classes"),
        ("a.json", '{"a": ["dog"], "a": ["cat"]}', "the key 'a' occurs twice"),
        ("a.json", '{"a": ' + "[" * 200_000, "nested too deep"),
        ("a.json", '{"b": ["dog"]}', "has no entry for 1 of 1 images, for example a"),
        ("a.txt", "a 3", "line 1: expected an image id and class ids 0 to 2, got 'a 3'"),
        ("a.txt", "a dog", "line 1: expected an image id"),
        ("a.txt", "b\na -1", "line 2: expected an image id"),
        ("a.txt", "a\nb", "a list of images without classes"),
        ("a.txt", "", "is empty"),
        ("a.npy", "a", "expected a dict of image ids"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, name: str, content: str, said: str) -> None:
    with pytest.raises(WsssError, match=said):
        read_image_labels(text(tmp_path / name, content), CLASSES, ["a"])


def test_vectors_of_another_dataset(tmp_path: Path) -> None:
    with pytest.raises(WsssError, match="vectors of 20 classes, --classes has 3"):
        read_image_labels(vectors(tmp_path / "a.npy", {"a": [0] * 20}), CLASSES, ["a"])
