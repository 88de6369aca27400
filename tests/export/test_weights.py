"""Downloads from a server of the test's own, and checkpoints that are damaged or hostile."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import GroundingDinoConfig

from wsss.errors import WeightsError
from wsss.export import weights as checkpoints
from wsss.export.clip import weights as clip_weights
from wsss.export.grounding_dino import weights as grounding_dino_weights
from wsss.export.sam import family as sam
from wsss.export.sam import sam2
from wsss.export.weights import Download, download

DATA = b"weights of a model" * 1000
SHA256 = hashlib.sha256(DATA).hexdigest()


class Server:
    """Answers every request with ``data``; counts them."""

    def __init__(self) -> None:
        self.data, self.length, self.asked, self.before = DATA, str(len(DATA)), 0, lambda: None
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked += 1
                server.before()
                self.send_response(200)
                if server.length:
                    self.send_header("Content-Length", server.length)
                self.end_headers()
                self.wfile.write(server.data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/toy-12345678.pth"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WSSS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.mark.parametrize("digits", [64, 8, 0])
def test_fetched_once_and_hashed_each_time(cache: Path, server: Server, digits: int) -> None:
    what = Download(server.url, SHA256[:digits])
    for _ in range(2):
        assert download(what, model="toy").read_bytes() == DATA
    assert server.asked == 1
    assert [path.name for path in cache.iterdir()] == ["toy-12345678.pth"]
    assert what.pinned == {64: "sha256", 8: "8 of 64 digits of its sha256", 0: "no"}[digits]


def test_a_cached_file_that_is_damaged_is_fetched_again(cache: Path, server: Server) -> None:
    cache.mkdir()
    (cache / "toy-12345678.pth").write_bytes(DATA[:-1] + b"x")
    assert download(Download(server.url, SHA256), model="toy").read_bytes() == DATA
    server.close()
    (cache / "toy-12345678.pth").write_bytes(DATA[:-1])
    with pytest.raises(WeightsError, match=r"toy-12345678\.pth: cannot be downloaded from http"):
        download(Download(server.url, SHA256), model="toy")
    server.__init__()  # type: ignore[misc]  # closed once more by the fixture


@pytest.mark.parametrize("digits", [64, 0])
def test_what_ends_early_is_refused_with_or_without_a_hash(cache: Path, server: Server, digits: int) -> None:
    server.data = DATA[:5000]
    with pytest.raises(WeightsError, match="ended after 5,000 of 18,000 bytes") as caught:
        download(Download(server.url, SHA256[:digits]), model="toy")
    assert "bring toy-12345678.pth by hand" in caught.value.hint
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("length", ["", "many", "18000"])
def test_another_hash_is_refused(cache: Path, server: Server, length: str) -> None:
    server.data, server.length = DATA[:-1] + b"x", length
    with pytest.raises(WeightsError, match="cannot be downloaded" if length == "many" else f"expected {SHA256}"):
        download(Download(server.url, SHA256), model="toy")
    assert list(cache.iterdir()) == []


def test_the_file_is_hashed_and_not_the_stream(cache: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a disk loses what was written to it."""
    fsync = os.fsync

    def lose(handle: int) -> None:
        os.pwrite(handle, b"x", 7)
        fsync(handle)

    monkeypatch.setattr(checkpoints.os, "fsync", lose)
    with pytest.raises(WeightsError, match="downloaded with sha256"):
        download(Download(server.url, SHA256), model="toy")
    assert list(cache.iterdir()) == []


def test_a_full_disk_leaves_nothing(cache: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(WeightsError, match="No space left on device"):
        download(Download(server.url, SHA256), model="toy")
    assert list(cache.iterdir()) == []


def test_it_is_on_the_disk_before_it_has_its_name(cache: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(checkpoints.os, "fsync", lambda handle: (order.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(Path, "replace", lambda path, target: (order.append("rename"), replace(path, target))[1])
    download(Download(server.url, SHA256), model="toy")
    assert order == ["fsync", "rename", "fsync"], "the file, its name, the folder"


def test_two_at_once_do_not_write_into_one_file(cache: Path, server: Server) -> None:
    both, found = threading.Barrier(2, timeout=60), list[Path]()
    server.before = both.wait  # type: ignore[assignment]
    run = [threading.Thread(target=lambda: found.append(download(Download(server.url, SHA256), model="toy"))) for _ in range(2)]
    for thread in run:
        thread.start()
    for thread in run:
        thread.join()
    assert [path.read_bytes() for path in found] == [DATA, DATA] and server.asked == 2
    assert [path.name for path in cache.iterdir()] == ["toy-12345678.pth"]


def test_what_killed_downloads_left_is_swept_and_a_running_one_is_not(cache: Path, server: Server) -> None:
    cache.mkdir()
    for name, age in ((".7-1.tmp", 90_000), (".7-2.tmp", 100)):
        (cache / name).write_bytes(b"half")
        os.utime(cache / name, (time.time() - age,) * 2)
    download(Download(server.url, SHA256), model="toy")
    assert sorted(path.name for path in cache.iterdir()) == [".7-2.tmp", "toy-12345678.pth"]


@pytest.mark.parametrize("url", ["nonsense", "http://[", "ftp://127.0.0.1:1/x", "file:///nowhere/x"])
def test_an_address_that_is_none_is_named(cache: Path, url: str) -> None:
    with pytest.raises(WeightsError, match="cannot be downloaded from"):
        download(Download(url, SHA256), model="toy")


def test_no_redirection_leaves_https() -> None:
    follow = partial(
        checkpoints._OnlyHttps().redirect_request, urllib.request.Request("https://a.example/x"), None, 302, "Found", {}
    )
    assert follow("https://b.example/x") is not None
    with pytest.raises(urllib.error.URLError, match="without https: http://b"):
        follow("http://b.example/x")


def test_all_addresses_of_our_own_are_https_and_pinned_as_far_as_their_publishers_say() -> None:
    """OpenMMLab has the first 8 digits in its file names, LLMDet none; the manifest of an export says so."""
    known = {**sam.DOWNLOADS, **sam2.DOWNLOADS, **grounding_dino_weights.KNOWN, "vocabulary": grounding_dino_weights.VOCABULARY}
    assert all(what.url.startswith("https://") for what in known.values())
    pinned = {name: what.pinned for name, what in known.items()}
    in_part = {name for name in pinned if name.startswith("mm_grounding_dino")}
    assert in_part and {pinned[name] for name in in_part} <= {"8 of 64 digits of its sha256", "sha256"}
    assert {name for name, how in pinned.items() if how == "no"} == {"llmdet_tiny", "llmdet_base", "llmdet_large"}
    whole = {name for name, how in pinned.items() if how == "sha256"}
    assert whole >= {"vit_b", "vit_l", "vit_h", "swint_ogc", "swinb_cogcoor", "vocabulary", *sam2.DOWNLOADS}


@pytest.mark.parametrize(
    ("url", "pinned"),
    [
        (f"https://openaipublic.azureedge.net/clip/models/{SHA256}/ViT-B-32.pt", "sha256"),
        (
            "https://github.com/mlfoundations/open_clip/releases/download/v0.2/rn50-cc12m-f000538c.pt",
            "8 of 64 digits of its sha256",
        ),
        ("https://github.com/mlfoundations/open_clip/releases/download/v0.2/metaclip-fullcc.pt", "no"),
        ("https://elsewhere.example/weights.pt", "no"),
    ],
)
def test_addresses_of_open_clip_s_table_are_pinned_as_far_as_they_say(
    url: str, pinned: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Download] = []

    def fetch(what: Download, *, model: str) -> Path:
        asked.append(what)
        return tmp_path

    monkeypatch.setattr(checkpoints, "download", fetch)
    assert clip_weights._download({"url": url}, "ViT-B-32") == (tmp_path, pinned)
    assert asked[0].pinned == pinned


def test_a_file_of_the_hub_s_cache_is_hashed(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "8e9f"
    snapshot.mkdir(parents=True)
    (tmp_path / SHA256).write_bytes(DATA)
    (snapshot / "model.safetensors").symlink_to(tmp_path / SHA256)
    path = snapshot / "model.safetensors"
    assert clip_weights._hub_file(path, "timm/toy") == (path, "no: revision 8e9f of timm/toy")
    (tmp_path / SHA256).write_bytes(DATA[1:])
    with pytest.raises(WeightsError, match="the Hugging Face hub says"):
        clip_weights._hub_file(path, "timm/toy")


# ---- files that are damaged or hostile ----


class Scheduler:
    """Pickled by reference, as a training's own objects are."""


def deflated(path: Path) -> None:
    """A few kilobytes that unpack to 64 megabytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("archive/data/0", "w") as entry:
        for _ in range(64):
            entry.write(bytes(1 << 20))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b""), "not a readable file of weights"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), "not a readable file of weights"),
        (lambda path: torch.save(Scheduler(), path), "holds more than tensors"),
        (lambda path: torch.save([torch.zeros(3)], path), "expected tensors by name, got list"),
        (lambda path: torch.save({"model": {"a": 1}}, path), "expected a state dict of tensors"),
        (lambda path: torch.save({"model": {}}, path), "expected a state dict of tensors"),
        (lambda path: torch.save({"a": torch.zeros(1).expand(1 << 40)}, path), "has only 4 bytes"),
        (lambda path: deflated(path), "is compressed"),
        (lambda path: os.mkfifo(path), "a regular file"),
    ],
    ids=["empty", "cut archive", "object", "list", "no tensors", "nothing", "expanded", "compressed", "pipe"],
)
def test_a_checkpoint_that_is_none(tmp_path: Path, write: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "model.pth"
    write(path)
    with pytest.raises(WeightsError, match=message) as caught:
        checkpoints.read_checkpoint(path)
    assert caught.value.hint
    assert "weights_only" not in str(caught.value), "PyTorch advises to run what is pickled"


def test_a_folder_called_like_a_weights_file_is_none(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(WeightsError):
        checkpoints.file_in(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert checkpoints.file_in(tmp_path) == tmp_path / "pytorch_model.bin"


OPEN_CLIP = {"model_cfg": {"embed_dim": 512, "vision_cfg": {}, "text_cfg": {}}, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}


def test_a_configuration_of_open_clip_is_read(tmp_path: Path) -> None:
    (tmp_path / clip_weights.CONFIG).write_text(json.dumps(OPEN_CLIP))
    assert clip_weights._config_beside(tmp_path / "x.pt", "ViT-B-32") == {"mean": (0.5, 0.5, 0.5), "quick_gelu": False}


def test_a_configuration_of_open_clip_at_its_limits(tmp_path: Path) -> None:
    def read(**recipe: list[float]) -> object:
        (tmp_path / clip_weights.CONFIG).write_text(json.dumps({**OPEN_CLIP, "preprocess_cfg": recipe}))
        return clip_weights._config_beside(tmp_path / "x.pt", "ViT-B-32")

    assert read(mean=[0, 0.0, 1], std=[1e-3, 1, 1.0]) == {"mean": (0, 0.0, 1), "std": (1e-3, 1, 1.0), "quick_gelu": False}
    for name, values in (("mean", [0, 0, -1e-9]), ("mean", [0, 0, 1.001]), ("std", [1, 1, 9e-4]), ("std", [1, 1, 1.001])):
        with pytest.raises(WeightsError, match=f"{name}: expected three numbers"):
            read(**{name: values})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 200_000,
        '{"model_cfg": {}, "model_cfg": {}}',
        '{"model_cfg": [["a", 1]]}',
        '{"model_cfg": {"vision_cfg": 7}}',
        '{"model_cfg": {"vision_cfg": {"layers": -1}}}',
        '{"model_cfg": {"vision_cfg": {"layers": 1000000000000}}}',
        '{"model_cfg": {"quick_gelu": "no"}}',
        '{"model_cfg": {}, "preprocess_cfg": []}',
        '{"model_cfg": {}, "preprocess_cfg": {"mean": 0.5}}',
        '{"model_cfg": {}, "preprocess_cfg": {"mean": [0.5, 0.5]}}',
        '{"model_cfg": {}, "preprocess_cfg": {"std": [1, 0, 1]}}',
        '{"model_cfg": {}, "preprocess_cfg": {"std": [1, 1e999, 1]}}',
        '{"model_cfg": {}, "preprocess_cfg": {"std": [1, NaN, 1]}}',
        " " * (clip_weights.MAX_CONFIG + 1),
    ],
    ids=lambda text: text[:60],
)
def test_a_configuration_of_open_clip_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / clip_weights.CONFIG).write_text(text)
    with pytest.raises(WeightsError, match=r"open_clip_config\.json: ") as caught:
        clip_weights._config_beside(tmp_path / "x.pt", "ViT-B-32")
    assert caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "7",
        "[" * 200_000,
        '{"backbone_config": 7}',
        '{"backbone_config": {"model_type": "no such"}}',
        '{"backbone_config": {"model_type": "swin", "depths": "deep"}}',
        '{"backbone_config": {"model_type": "swin", "embed_dim": -96}}',
        '{"text_config": [1]}',
        '{"d_model": "wide"}',
        '{"encoder_layers": 1000000000000}',
        '{"num_queries": -1}',
        '{"d_model": 1e999}',
    ],
    ids=lambda text: text[:60],
)
def test_a_configuration_of_grounding_dino_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=r"config\.json: ") as caught:
        grounding_dino_weights._check_config(tmp_path / "config.json", GroundingDinoConfig(), "Grounding-DINO swin_t")
    assert caught.value.hint


def test_a_configuration_s_numbers_take_no_memory(tmp_path: Path) -> None:
    """transformers makes a name for each label: ten thousand million of them."""
    (tmp_path / "config.json").write_text('{"num_labels": 10000000000, "encoder_layers": 1000000000000}')
    with pytest.raises(WeightsError, match="encoder_layers 1000000000000 instead of 6"):
        grounding_dino_weights._check_config(tmp_path / "config.json", GroundingDinoConfig(), "Grounding-DINO swin_t")


def test_the_record_of_seeded_weights_is_that_of_every_processor() -> None:
    """Normal deviates and the statistics of a batch norm differ in their last digits; an export is verified elsewhere too."""

    def record(source: str, module: torch.nn.Module) -> str:
        return checkpoints.weights_record(source, None, module)["sha256"]

    module, rounded = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    rounded.load_state_dict({name: torch.nextafter(value, torch.ones(())) for name, value in module.state_dict().items()})
    assert record("random:1", module) == record("random:1", rounded) != record("random:2", module)
    assert record("random:1", module) != record("random:1", torch.nn.Linear(2, 3))
