"""The line that installs what is missing, for each way of installing wsss."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from wsss.errors import WsssError
from wsss.extras import install_line, needs

FOLDER = {"url": "file:///home/my%20code/wsss", "dir_info": {"editable": True}}
COPIED = {"url": "file:///home/my%20code/wsss", "dir_info": {}}
WHEEL = {"url": "file:///tmp/wsss-0.1.0-py3-none-any.whl", "archive_info": {}}
GIT = {"url": "https://example.com/wsss.git", "vcs_info": {"vcs": "git", "commit_id": "0" * 40}}


@pytest.mark.parametrize(
    ("origin", "line"),
    [
        (FOLDER, "pip install -e '/home/my code/wsss[ray]'"),
        (COPIED, "pip install '/home/my code/wsss[ray]'"),
        (WHEEL, "pip install '/tmp/wsss-0.1.0-py3-none-any.whl[ray]'"),
        (GIT, "pip install 'wsss[ray] @ git+https://example.com/wsss.git'"),
        (None, "pip install 'wsss[ray]'"),
    ],
    ids=["folder", "copied folder", "wheel", "git", "index"],
)
def test_the_line_repeats_where_wsss_came_from(origin: Any, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a clone, where a build's egg-info lies in the current folder and comes first."""
    built, installed = tmp_path / "clone" / "wsss.egg-info", tmp_path / "site" / "wsss-0.1.0.dist-info"
    for folder, name in ((built, "PKG-INFO"), (installed, "METADATA")):
        folder.mkdir(parents=True)
        (folder / name).write_text("Metadata-Version: 2.1\nName: wsss\nVersion: 0.1.0\n")
    if origin is not None:
        (installed / "direct_url.json").write_text(json.dumps(origin))
    found = [metadata.PathDistribution(built), metadata.PathDistribution(installed)]
    monkeypatch.setattr(metadata, "distributions", lambda name: found)
    assert install_line("ray") == line


def test_a_missing_package_is_named_with_its_line() -> None:
    with pytest.raises(WsssError, match="needs a_package_that_is_not_there") as caught, needs("crf"):
        import a_package_that_is_not_there  # type: ignore[import-not-found]  # noqa: F401
    assert caught.value.hint == install_line("crf")


def test_a_module_of_our_own_that_is_missing_is_a_bug() -> None:
    with pytest.raises(ModuleNotFoundError), needs("crf"):
        import wsss.nowhere  # type: ignore[import-not-found]  # noqa: F401


def test_the_full_tensorrt_comes_from_nvidias_index() -> None:
    assert install_line("trt").endswith("[trt]' --extra-index-url https://pypi.nvidia.com")
    assert install_line("trt-cu12").endswith("[trt-cu12]' --extra-index-url https://pypi.nvidia.com")
    assert "index" not in install_line("trt-rtx")
