"""Decisions of the report, and lists of names: what they leave out, and what they say of names and labels that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wsss.errors import UsageError, WsssError
from wsss.store.decisions import Exclusion, exclusion, label_version, read_rejected
from wsss.store.local import Record


def record(name: str, **changes: Any) -> Record:
    box = {"label": "dog", "score": 0.5, "quality": 0.9, "xyxy": [1, 2, 3, 4], "won_px": 7}
    return {"path": name, "sha256": "ab", "classes": {"dog": 0.75}, "boxes": [box], "void_px": 3, **changes}


def decided(path: Path, **verdicts: str) -> Path:
    """A file of decisions about the labels of `record`; ``name=verdict``."""
    names = {f"{name}.jpg": {"decision": verdict, "label": label_version(record("any"))} for name, verdict in verdicts.items()}
    path.write_text(json.dumps({"store": "labels", "decisions": names}))
    return path


def test_rejected_images_are_left_out_and_counted(tmp_path: Path) -> None:
    out = Exclusion(decided(tmp_path / "decisions.json", a="reject", b="accept", c="unsure", d="reject"))
    assert [each["path"] for each in out.filter(map(record, ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg")))] == [
        *("b.jpg", "c.jpg", "e.jpg")
    ]
    said: list[str] = []
    out.report(said.append)
    assert said == [f"--exclude {tmp_path / 'decisions.json'}: 2 images are left out"]


def test_a_label_that_has_changed_since_is_not_left_out(tmp_path: Path) -> None:
    out = Exclusion(decided(tmp_path / "decisions.json", a="reject", b="reject", gone="reject"))
    changed = record("b.jpg", void_px=4)
    assert [each["path"] for each in out.filter([record("a.jpg"), changed])] == ["b.jpg"]
    said: list[str] = []
    out.report(said.append)
    assert [line.partition(": ")[2] for line in said] == [
        "1 images are left out",
        "1 images (b.jpg) were labeled again since they were rejected, and stay",
        "1 images (gone.jpg) are not in the store",
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": "cd"},
        {"classes": {"dog": 0.8}},
        {"classes": {"cat": 0.75}},
        {"void_px": 0},
        {"boxes": []},
        {"boxes": [{"label": "dog", "score": 0.6, "quality": 0.9, "xyxy": [1, 2, 3, 4], "won_px": 7}]},
        {"boxes": [{"label": "dog", "score": 0.5, "quality": 0.9, "xyxy": [1, 2, 3, 5], "won_px": 7}]},
        {"boxes": [{"label": "dog", "score": 0.5, "quality": 0.9, "xyxy": [1, 2, 3, 4], "won_px": 8}]},
    ],
)
def test_a_version_changes_with_the_label(change: dict[str, Any]) -> None:
    assert label_version(record("a")) != label_version(record("a", **change))


def test_a_version_does_not_depend_on_names_and_times() -> None:
    assert label_version(record("a", mtime_ns=1)) == label_version(record("b", mtime_ns=2))
    assert len(label_version(record("a"))) == 12


def test_a_list_rejects_its_lines_whatever_their_labels(tmp_path: Path) -> None:
    (path := tmp_path / "list.txt").write_bytes("\ufeff# blurred\n./a.jpg\r\n\n sub/b ü.jpg \n".encode())
    assert list(read_rejected(path, flag="--redo")) == ["a.jpg", "sub/b ü.jpg"]
    out = Exclusion(path)
    assert not out.keeps(record("a.jpg", void_px=99)) and out.keeps(record("b.jpg"))


def test_a_list_of_another_store_is_refused(tmp_path: Path) -> None:
    (path := tmp_path / "list.txt").write_text("x.jpg\ny.jpg\n")
    out = Exclusion(path)
    assert out.keeps(record("a.jpg"))
    with pytest.raises(WsssError, match=r"none of its images is in the store: 2 images \(x.jpg, y.jpg\)"):
        out.report(print)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", UsageError, "names no image"),
        ("# nothing\n", UsageError, "names no image"),
        ('{"decisions": {}}', UsageError, "has no decision"),
        ('{"decisions": {"a": {"decision": "accept"}}}', UsageError, "1 decisions, none of which rejects"),
        ('{"decisions": {"a": {"decision": "maybe"}}}', WsssError, "decision"),
        ('{"decisions": {"a": "reject"}}', WsssError, "decisions"),
        ('{"images": []}', WsssError, "images"),
        ('{"decisions"', WsssError, "expected JSON"),
    ],
)
def test_a_file_that_rejects_nothing_is_refused(tmp_path: Path, text: str, error: type[WsssError], message: str) -> None:
    (path := tmp_path / "decisions.json").write_text(text)
    with pytest.raises(error, match="--exclude .*decisions.json: .*" + message) as found:
        exclusion(path)
    assert found.value.hint


def test_no_file_excludes_nothing() -> None:
    assert exclusion(None) is None
