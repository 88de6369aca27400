"""Text, JSON and TOML files as people bring them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from wsss.errors import ClassError, WsssError
from wsss.reading.documents import MAX_TOML, parse_json, parse_toml, read_bytes, read_json, read_text, read_toml, short


@pytest.mark.parametrize(
    ("encoding", "mark"), [("utf-8", ""), ("utf-8", "\ufeff"), ("utf-16-le", "\ufeff"), ("utf-16-be", "\ufeff")]
)
def test_byte_order_marks_are_dropped(encoding: str, mark: str, tmp_path: Path) -> None:
    (file := tmp_path / "a").write_bytes(f'{mark}{{"größe": "猫"}}'.encode(encoding))
    assert read_json(file) == {"größe": "猫"}
    file.write_bytes(f'{mark}key = "猫"\n'.encode(encoding))
    assert read_toml(file) == {"key": "猫"}
    assert read_text(file) == 'key = "猫"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got the end of the file"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' occurs twice"),
        ("[NaN]", "line 1: expected finite numbers, got NaN"),
        ('{"a NaN": 1,\n "b": NaN}', "line 2: expected finite numbers, got NaN"),
        ("[-Infinity]", "expected finite numbers, got -Infinity"),
        ("[1e999]", "expected finite numbers, got 1e999"),
        ("[" * 200_000, "nested too deep"),
        ('{"a":' * 200_000, "nested too deep"),
        ("[" + "1" * 5000 + "]", "expected JSON"),
        ("[1, 2", "expected JSON"),
        (b"[\xff]", "expected UTF-8 text, got byte 0xff at 1"),
        (b"\xef\xbb\xbf[\xff]", "expected UTF-8 text, got byte 0xff at 4"),
    ],
)
def test_what_is_no_json_is_refused_by_name_with_a_hint(text: Any, message: str) -> None:
    with pytest.raises(ClassError, match=message) as caught:
        parse_json(text, "labels.json", error=ClassError)
    assert caught.value.message.startswith("labels.json: ") and caught.value.hint


@pytest.mark.parametrize("text", ["a = ", "a = 1\na = 2", "a = " + "[" * 200_000, "a = 0001-00-00", "a." * 200_000])
def test_what_is_no_toml_is_refused_by_name_with_a_hint(text: str) -> None:
    with pytest.raises(WsssError, match=r"^wsss.toml: expected TOML") as caught:
        parse_toml(text, "wsss.toml")
    assert caught.value.hint


def test_toml_has_a_bounded_length() -> None:
    """Its parser takes quadratic time for some documents."""
    text = 'a = "' + "x" * (MAX_TOML - 6) + '"'
    assert len(parse_toml(text, "wsss.toml")["a"]) == MAX_TOML - 6
    with pytest.raises(WsssError, match=r"^wsss.toml: expected TOML of at most 65,536 characters, got 65,537"):
        parse_toml(text + "\n", "wsss.toml")


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WsssError, match="pipe: expected a regular file, got a named pipe"):
        read_bytes(tmp_path / "pipe")
    with pytest.raises(WsssError, match="expected a regular file, got a folder|Is a directory"):
        read_bytes(tmp_path)
    with pytest.raises(WsssError, match="--labels x: cannot be read: No such file"):
        read_bytes(tmp_path / "x", where="--labels x")
    with pytest.raises(WsssError, match="not a file name"):
        read_bytes(tmp_path / "a\0b")
    (tmp_path / "long").write_bytes(b"12345")
    with pytest.raises(WsssError, match="expected at most 4 bytes, got 5"):
        read_bytes(tmp_path / "long", max_bytes=4)
    assert read_bytes(tmp_path / "long", max_bytes=5) == b"12345"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "null"),
        (True, "true"),
        ([False, None, 1, "a"], "[false, null, 1, 'a']"),
        ({"score": None, "xyxy": [0, 1, 2, 3]}, "{'score': null, 'xyxy': [0, 1, 2, 3]}"),
        ("None", "'None'"),
        ("x" * 99, "'" + "x" * 27 + "..." + "x" * 28 + "'"),
        ([[[[[1]]]]], "[[[[...]]]]"),
    ],
)
def test_values_are_shown_as_documents_write_them(value: object, shown: str) -> None:
    """Messages of files have no Python in them."""
    assert short(value) == shown
