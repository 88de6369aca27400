"""Bundles by name: a folder, ``mini``, and the hub, whose protocol a server of the test's own speaks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from wsss import hub
from wsss.errors import BundleError, UsageError
from wsss.runtime.bundles import MINI, bundle_folder, find_bundle

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A hub with one repository, ``someone/bundle``, of the files in ``folder``; remembers the paths that were asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, list[str]()
        this = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                path = self.path.partition("?")[0]
                this.asked.append(path)
                files = {each.relative_to(this.folder).as_posix(): each for each in this.folder.rglob("*") if each.is_file()}
                revision = path.removeprefix("/api/models/someone/bundle/revision/")
                name = path.removeprefix(f"/someone/bundle/resolve/{COMMIT}/")
                headers, data, code = {}, b"", 200
                if revision in ("main", COMMIT):
                    names = [{"rfilename": each} for each in files]
                    data = json.dumps({"id": "someone/bundle", "sha": COMMIT, "siblings": names}).encode()
                elif path.startswith("/api/models/someone/bundle/tree/"):
                    tree = [
                        {"type": "file", "path": name, "size": each.stat().st_size, "oid": "0"} for name, each in files.items()
                    ]
                    data = json.dumps(tree).encode()
                elif name in files:
                    data = files[name].read_bytes()
                    headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
                else:
                    code, error = 404, "RevisionNotFound" if revision != path else "RepoNotFound"
                    headers = {"X-Error-Code": error, "X-Error-Message": error}
                self.send_response(code)
                for key, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    (folder := tmp_path / "repository").mkdir()
    shutil.copytree(MINI / "clip", folder / "clip")
    for name in ("README.md", "clip/evil.py", "clip/evil.pkl"):
        (folder / name).write_text("print('run')")
    hub = Hub(folder)
    yield hub
    hub.close()


def verified(tmp_path: Path, name: str, endpoint: str, **more: str) -> subprocess.CompletedProcess[str]:
    """``wsss verify`` of a hub's bundle, with a cache of its own."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", **more}
    command = [sys.executable, "-m", "wsss", "verify", name, "--no-reference"]
    return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)


def test_a_bundle_is_downloaded_checked_and_kept(server: Hub, tmp_path: Path) -> None:
    done = verified(tmp_path, "hub:someone/bundle", server.url)
    assert done.returncode == 0, done.stderr
    assert "hashes, inputs and outputs of 2 graphs are right" in done.stdout
    assert not any(path.endswith((".py", ".pkl", ".md")) for path in server.asked if "/resolve/" in path), "only a bundle's files"
    server.close()
    again = verified(tmp_path, "hub:someone/bundle", server.url)
    assert again.returncode == 0, "without a network it is taken from the cache"


def test_a_damaged_file_of_the_hub_is_refused(server: Hub, tmp_path: Path) -> None:
    with (server.folder / "clip" / "weights.data").open("r+b") as file:
        file.write(b"damage")
    done = verified(tmp_path, f"hub:someone/bundle@{COMMIT}", server.url)
    assert done.returncode == 1 and "the manifest says" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hub:someone/other", "the hub has no such repository"),
        ("hub:someone/bundle@nothing", "the repository has no such revision"),
    ],
)
def test_what_the_hub_does_not_have(server: Hub, tmp_path: Path, name: str, message: str) -> None:
    done = verified(tmp_path, name, server.url)
    assert done.returncode == 1 and message in done.stderr and "hint: " in done.stderr, done.stderr


def test_without_a_network(tmp_path: Path) -> None:
    done = verified(tmp_path, "hub:someone/bundle", "http://127.0.0.1:9")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "wsss: --bundle hub:someone/bundle: cannot be downloaded, and is not in the cache" in done.stderr
    assert "hint: check the network; or copy the bundle and give its folder" in done.stderr


@pytest.mark.parametrize("name", ["hub:", "hub:name", "hub:a/b/c", "hub:../etc", "hub:a--b/c", "hub:a b/c", "hub:/b"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="expected hub:OWNER/NAME"):
        hub.download(name)


def test_folders_and_mini(tmp_path: Path) -> None:
    assert bundle_folder("mini") == MINI and bundle_folder(tmp_path) == tmp_path
    assert find_bundle("mini").models() == ["clip", "grounding-dino", "sam"]
    with pytest.raises(BundleError, match="expected a bundle"):
        find_bundle(tmp_path)
