"""`wsss.toml`: flags spelled as typed; whatever no flag could mean is refused with the nearest right word."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wsss.cli.config import Flag, read_defaults, write_values
from wsss.errors import UsageError

COMMANDS = {
    "label": {
        "images": Flag(parameter="images"),
        "classes": Flag(parameter="classes"),
        "devices": Flag(parameter="devices"),
        "batch": Flag(parameter="batch", kind="integer"),
        "box-threshold": Flag(parameter="box_threshold", kind="number"),
        "json": Flag(parameter="json_output", kind="switch"),
        "weights": Flag(parameter="weights", repeats=True),
        "canvas": Flag(parameter="canvas", kind="integer", count=3),
    },
    "eval": {},
}


def written(folder: Path, text: str) -> Path:
    path = folder / "wsss.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_no_file_means_no_defaults(tmp_path: Path) -> None:
    assert read_defaults(tmp_path / "wsss.toml", COMMANDS) == {}


@pytest.mark.parametrize(
    ("text", "defaults"),
    [
        ("", {}),
        ("[label]", {"label": {}}),
        ('[label]\nimages = "photos"\nbatch = 4', {"label": {"images": "photos", "batch": 4}}),
        ("[label]\nbox-threshold = 0.2", {"label": {"box_threshold": 0.2}}),
        ("[label]\nbox_threshold = 0.2", {"label": {"box_threshold": 0.2}}),
        ("[label]\njson = true", {"label": {"json_output": True}}),
        ('\ufeff[label]\nimages = "photos"', {"label": {"images": "photos"}}),
        ("[label]\nbox-threshold = 1", {"label": {"box_threshold": 1}}),
        ('[label]\nclasses = "dog, cat"', {"label": {"classes": "dog, cat"}}),
        ('[label]\nclasses = ["dog", "potted plant"]', {"label": {"classes": "dog, potted plant"}}),
        ('[label]\nclasses = ["voc"]', {"label": {"classes": "voc"}}),
        ("[label]\nclasses = []", {"label": {"classes": ""}}),
        ("[label]\ndevices = [0, 1]", {"label": {"devices": "0, 1"}}),
        ('[label]\ndevices = ["cpu", "cpu"]', {"label": {"devices": "cpu, cpu"}}),
        ("[label]\ndevices = 0", {"label": {"devices": "0"}}),
        ('[label]\nweights = "a.pth"', {"label": {"weights": ["a.pth"]}}),
        ('[label]\nweights = ["a.pth", "b.pth"]', {"label": {"weights": ["a.pth", "b.pth"]}}),
        ("[label]\ncanvas = [1, 2, 3]", {"label": {"canvas": [1, 2, 3]}}),
    ],
)
def test_keys_are_flags_as_typed(tmp_path: Path, text: str, defaults: dict[str, dict[str, object]]) -> None:
    assert read_defaults(written(tmp_path, text), COMMANDS) == defaults


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("[label", "expected TOML", ""),
        ("images = 1", "expected tables named after commands (eval, label), got 'images'", ""),
        ("[lable]", "got 'lable'", ""),
        ("label = 3", "got 'label'", ""),
        ("[label]\nimage = 'x'", "[label] has no flag 'image'", "did you mean 'images'?"),
        ("[label]\nbox-treshold = 1", "[label] has no flag 'box-treshold'", "did you mean 'box-threshold'?"),
        (
            "[label]\nzzz = 1",
            "[label] has no flag 'zzz'",
            "its flags: batch, box-threshold, canvas, classes, devices, images, json, weights",
        ),
        ("[label]\njson_output = true", "[label] has no flag 'json_output'", ""),
        ('[label]\nbatch = "8"', "[label] batch: expected a whole number, got '8'", "batch = 8"),
        ("[label]\nbatch = 8.0", "[label] batch: expected a whole number, got 8.0", "batch = 8"),
        ("[label]\nbatch = true", "[label] batch: expected a whole number, got True", "batch = 8"),
        ('[label]\njson = "no"', "[label] json: expected true or false, got 'no'", "json = false"),
        ("[label]\njson = 1", "[label] json: expected true or false, got 1", "json = true"),
        ("[label]\nbox-threshold = true", "[label] box-threshold: expected a number, got True", "box-threshold = 0.5"),
        ("[label]\nbox-threshold = nan", "[label] box-threshold: expected a number, got nan", ""),
        ("[label]\nimages = 3", "[label] images: expected a text, got 3", 'images = "3"'),
        ("[label]\nimages = {a = 1}", "[label] images: expected a text, got {'a': 1}", 'images = "..."'),
        ("[label]\nimages = 1979-05-27", "[label] images: expected a text, got datetime.date", ""),
        ("[label]\nimages = ['a', 'b']", "[label] images: expected a text, got ['a', 'b']", ""),
        ("[label]\nclasses = ['dog, cat', 'bird']", "[label] classes: expected one entry in each text, got 'dog, cat'", ""),
        ("[label]\nclasses = ['dog', {}]", "[label] classes: expected a text, got {}", ""),
        ("[label]\nclasses = true", "[label] classes: expected a text, got True", ""),
        ("[label]\nweights = ['a', 3]", "[label] weights: expected a text, got 3", ""),
        ("[label]\ncanvas = 8", "[label] canvas: expected 3 values, got 8", "[8, 8, 8]"),
        ("[label]\ncanvas = [1, 2, '3']", "[label] canvas: expected a whole number, got '3'", ""),
        ("[label]\nbox-threshold = 1\nbox_threshold = 1", "[label] has box-threshold twice", "keep one"),
        ("[label]\nimages = " + "[" * 20_000, "nested too deep", ""),
        ("[label]\nimages." + "a." * 20_000 + "b = 1", "[label] images: expected a text, got {'a': {'a'", ""),
        ("[label]\nimages = '" + "a" * 100_000 + "'", "expected TOML of at most 65,536 characters", ""),
    ],
)
def test_what_no_flag_means_is_refused(tmp_path: Path, text: str, said: str, hint: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read_defaults(path, COMMANDS)
    assert caught.value.message.startswith(f"{path}: ")
    assert said in caught.value.message
    assert hint in caught.value.hint


def test_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "wsss.toml").write_bytes('[label]\nimages = "caf\xe9"'.encode("latin-1"))
    with pytest.raises(UsageError, match="expected UTF-8 text, got byte 0xe9"):
        read_defaults(tmp_path / "wsss.toml", COMMANDS)


def test_only_a_regular_file_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="pipe: expected a regular file, got a named pipe"):
        read_defaults(tmp_path / "pipe", COMMANDS)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UsageError, match="link: cannot be read: No such file"):
        read_defaults(tmp_path / "link", COMMANDS)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "[label]\nnms = 0.6\nenclosing = false\n"),
        ("", "[label]\nnms = 0.6\nenclosing = false\n"),
        ("[label]\nmargin = 0.2\nnms=0.5 # old\n", "[label]\nnms = 0.6\nenclosing = false\nmargin = 0.2\n"),
        ("[eval]\nnms = 1\n", "[eval]\nnms = 1\n\n[label]\nnms = 0.6\nenclosing = false\n"),
        (
            '[ label ] # x\n"enclosing" = true\n[eval]\nnms = 1\n',
            "[ label ] # x\nnms = 0.6\nenclosing = false\n[eval]\nnms = 1\n",
        ),
        ('[label]\nclasses = [\n "a",\n]\n', '[label]\nnms = 0.6\nenclosing = false\nclasses = [\n "a",\n]\n'),
    ],
)
def test_values_are_set_and_the_rest_stays(tmp_path: Path, before: str | None, after: str) -> None:
    path = tmp_path / "wsss.toml"
    if before is not None:
        path.write_text(before)
    write_values(path, "label", {"nms": 0.6, "enclosing": False})
    assert path.read_text() == after


@pytest.mark.parametrize("text", ["label = { nms = 0.5 }\n", "label.nms = 0.5\n", "[label]\nnms = [\n1\n]\n"])
def test_a_table_that_cannot_be_changed_line_by_line_stays(tmp_path: Path, text: str) -> None:
    path = tmp_path / "wsss.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match="cannot be changed line by line") as caught:
        write_values(path, "label", {"nms": 0.6})
    assert caught.value.hint == "add by hand: nms = 0.6" and path.read_text() == text
