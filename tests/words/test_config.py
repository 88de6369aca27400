"""`wsss.toml`: flags spelled as typed; whatever no flag could mean is refused with the nearest right word."""

from __future__ import annotations

from pathlib import Path

import pytest

from wsss.config import read_defaults
from wsss.errors import UsageError

COMMANDS = {"label": {"images": "images", "batch": "batch", "box-threshold": "box_threshold", "json": "json_output"}, "eval": {}}


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
    ],
)
def test_keys_are_flags_as_typed(tmp_path: Path, text: str, defaults: dict[str, dict[str, object]]) -> None:
    assert read_defaults(written(tmp_path, text), COMMANDS) == defaults


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("[label", "not a TOML file", ""),
        ("images = 1", "expected tables named after commands (eval, label), got 'images'", ""),
        ("[lable]", "got 'lable'", ""),
        ("label = 3", "got 'label'", ""),
        ("[label]\nimage = 'x'", "[label] has no flag 'image'", "did you mean 'images'?"),
        ("[label]\nbox-treshold = 1", "[label] has no flag 'box-treshold'", "did you mean 'box-threshold'?"),
        ("[label]\nzzz = 1", "[label] has no flag 'zzz'", "its flags: batch, box-threshold, images, json"),
        ("[label]\njson_output = true", "[label] has no flag 'json_output'", ""),
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
    with pytest.raises(UsageError, match="not a TOML file"):
        read_defaults(tmp_path / "wsss.toml", COMMANDS)
