"""Official checkpoints to state dicts. Checkpoints are untrusted: safetensors, or loaded with ``weights_only=True``."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ..errors import WeightsError
from ..files import cache_folder, replacing, sync_folder
from ..progress import end_progress, progress_line
from ..reading import checkpoints
from ..spec import sha256_of


@dataclass(frozen=True, slots=True)
class Download:
    """An official checkpoint on the web."""

    url: str
    sha256: str
    """All or the leading hex digits, as many as the publisher gives; empty if none."""
    name: str = ""
    """Of the file in the cache, where the address has the same name as others."""

    @property
    def file(self) -> str:
        return self.name or self.url.rsplit("/", 1)[-1]

    @property
    def pinned(self) -> str:
        """How much of the hash is known before the download, for the manifest: ``sha256`` if all of it."""
        if len(self.sha256) == 64:
            return "sha256"
        return f"{len(self.sha256)} of 64 digits of its sha256" if self.sha256 else "no"


FOLDER_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")
MINI_WEIGHTS = Path(__file__).resolve().parents[1] / "mini" / "weights"
"""Trained weights of the small models. Only in the repository: a wheel contains their exported bundle."""


def random_seed(weights: str) -> int | None:
    """The seed in ``random:SEED``, None for anything else. Raises WeightsError when SEED is not a whole number."""
    if not weights.startswith("random:"):
        return None
    try:
        return int(weights.removeprefix("random:"))
    except ValueError:
        raise WeightsError(
            f"--weights: expected random:SEED with a whole number, got {weights!r}", hint="--weights random:0"
        ) from None


def find_weights(weights: str, known: Mapping[str, Download], *, model: str, variant: str = "") -> Path:
    """Resolve ``--weights`` to a local file or folder; a known name is downloaded once and checked.

    ``mini`` is the small model's file in this repository, even if the working folder contains a folder of that name. The command
    in a hint has ``variant``.

    Raises:
        WeightsError: no such file or name, no network, or a download whose hash is wrong. Names the file to get by hand.
    """
    if weights == "mini":
        trained = MINI_WEIGHTS / f"{model}.safetensors"
        if not trained.is_file():
            raise WeightsError(
                f"--weights mini: expected {trained}", hint="use a git checkout of wsss, or train the weights: make mini"
            )
        return trained
    path = Path(weights).expanduser()
    if path.exists():
        return path
    if weights not in known:
        raise WeightsError(
            f"--weights {weights}: no such file, and no known {model} weights of that name",
            hint=f"give a path, random:SEED, or one of: {', '.join(known)}",
        )
    return download(known[weights], model=f"{model} --variant {variant}" if variant else model)


def download(what: Download, *, model: str) -> Path:
    """Download a checkpoint to the cache unless it is there, and return its path.

    The file is hashed on every call. It appears in the cache complete or not at all.

    Raises:
        WeightsError: the download failed or has another sha256. Says how to get the file by hand.
    """
    target = cache_folder() / what.file
    bring = f"bring {what.file} by hand from {what.url} and run: wsss export --model {model} --weights {what.file}"
    try:
        if target.is_file() and sha256_of(target).startswith(what.sha256):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        _delete_abandoned(target.parent)
        with replacing(target, sync=False) as file:  # `_fetch` synchronizes it, so that what is hashed is on the disk
            _fetch(what, file)
            if not (got := sha256_of(Path(file.name))).startswith(what.sha256):
                raise WeightsError(f"{what.file}: downloaded with sha256 {got}, expected {what.sha256}", hint=bring)
        sync_folder(target.parent)
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: an invalid address or header
        raise WeightsError(f"{what.file}: cannot be downloaded from {what.url}: {error}", hint=bring) from None
    return target


def _fetch(what: Download, file: BinaryIO) -> None:
    with urllib.request.build_opener(_OnlyHttps).open(what.url, timeout=30) as response:
        total, done = int(response.headers.get("Content-Length") or 0), 0
        while block := response.read(1 << 20):
            file.write(block)
            done += len(block)
            _show_progress(what.file, done, total)
        file.flush()
        os.fsync(file.fileno())
    if total and done != total:
        raise OSError(f"it ended after {done:,} of {total:,} bytes")


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    """Refuses redirects from https to any other protocol."""

    def redirect_request(self, req: urllib.request.Request, *response: Any) -> urllib.request.Request | None:
        url = response[-1]
        if req.type == "https" and not url.startswith("https:"):
            raise urllib.error.URLError(f"it redirects to an address without https: {url}")
        return super().redirect_request(req, *response)


def _delete_abandoned(folder: Path) -> None:
    """Delete unfinished downloads that were not written for a day: newer ones may belong to a running process."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 86_400:
                path.unlink()


def _show_progress(file: str, done: int, total: int) -> None:
    share = f" of {total / 1e6:.0f}" if total else ""
    progress_line(f"downloading {file}: {done / 1e6:.0f}{share} MB")
    if done == total:
        end_progress()


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors``, ``.pth``/``.pt``/``.bin`` file, or of a folder with such a file.

    A ``.pth`` may hold its state dict under ``model`` or ``state_dict``. Only tensors are unpickled.

    Raises:
        WeightsError: missing, truncated, or not a checkpoint.
    """
    if path.is_dir():
        path = file_in(path)
    state: Any = checkpoints.read_checkpoint(path)
    for key in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not state or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        raise WeightsError(
            f"{path}: expected a state dict of tensors, got {type(state).__name__}",
            hint="the file is not a checkpoint of a model",
        )
    return dict(state)


def file_in(folder: Path, names: Sequence[str] = FOLDER_FILES) -> Path:
    """The first of ``names`` that a folder contains. Raises WeightsError without one."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise WeightsError(f"{folder}: expected one of {', '.join(names)}, found {found}", hint="give the weights file itself")


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], *, path: Path, what: str, assign: bool = False) -> None:
    """Load ``state`` into ``module`` if names and shapes match exactly.

    Args:
        path, what: the file and the architecture, for the message.
        assign: use the given tensors instead of copying them: for a module on the meta device.

    Raises:
        WeightsError: missing or surplus keys, or another shape; names the first of each.
    """
    expected = module.state_dict()
    missing = [name for name in expected if name not in state]
    surplus = [name for name in state if name not in expected]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    faults = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("surplus", surplus), ("of another shape", shapes))
        if names
    ]
    if faults:
        raise WeightsError(
            f"{path}: not a checkpoint of {what}: {'; '.join(faults)}",
            hint="check --variant: the file belongs to another architecture",
        )
    module.load_state_dict({name: value.to(expected[name].dtype) for name, value in state.items()}, strict=True, assign=assign)


def weights_record(source: str, path: Path | None, module: nn.Module) -> dict[str, str]:
    """The manifest's record of the weights: their source as typed, and the sha256 of the file; for seeded values, a hash of the
    seed, the names and the shapes, because processors differ in the last digits of the values."""
    if path is None:
        parts = [f"{name} {value.dtype} {tuple(value.shape)}" for name, value in module.state_dict().items()]
        return {"source": source, "sha256": hashlib.sha256("\n".join([source, *parts]).encode()).hexdigest()}
    if path.is_dir():
        path = file_in(path)
    is_path = source != "mini" and Path(source).expanduser().exists()
    return {"source": str(path) if is_path else source, "sha256": sha256_of(path)}


@torch.no_grad()
def spread(module: nn.Module, seed: int) -> None:
    """Give seeded weights the spread of trained ones: uneven channels, norm gains far from 1, a few outlier channels.

    Default initialization is too uniform: all channels alike, norms at 1, zeros in the heads, so that errors in channel order,
    precision and masks cancel out. Trained transformers have outlier channels (arXiv 2208.07339, section 4).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    for name, value in module.named_parameters():
        if not value.is_floating_point() or value.numel() == 1:
            continue
        if value.ndim >= 2:
            if not value.any():
                value.copy_(0.02 * normal(tuple(value.shape)))
            rows = (value.shape[0],) + (1,) * (value.ndim - 1)
            value.mul_(torch.exp(0.25 * normal(rows)))
        elif name.endswith("weight"):  # a norm's gain
            gain = torch.exp(0.3 * normal(tuple(value.shape)))
            outlier = torch.rand(tuple(value.shape), generator=generator) < 0.01
            value.mul_(torch.where(outlier, 4 * gain, gain))
        else:
            value.add_(0.05 * normal(tuple(value.shape)))
