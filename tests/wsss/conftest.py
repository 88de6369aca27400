"""What several tests of this folder use."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records each fsync and rename below ``tmp_path`` in its order; random parts of names are left out."""
    calls: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def named(path: str | Path) -> str:
        path = Path(path)
        name = re.sub(r"^\.\d+-\d+(?=\.tmp$)", "", path.relative_to(tmp_path).name)
        return re.sub(r"^(\.\w+)?\.partial-\w{8}$", ".partial", name) + ("/" if path.is_dir() else "")

    def recorded_fsync(handle: int) -> None:
        calls.append(f"fsync {named(os.readlink(f'/proc/self/fd/{handle}'))}")
        fsync(handle)

    def recorded(move):  # type: ignore[no-untyped-def]
        def call(source: Path, target: Path) -> None:
            move(source, target)
            calls.append(f"rename {named(target).rstrip('/')}")

        return call

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded(rename))
    monkeypatch.setattr(os, "replace", recorded(replace))
    return calls
