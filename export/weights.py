"""Official checkpoints in, state dicts out. Checkpoints are untrusted files: safetensors, or ``weights_only=True``."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import http.client
import os
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import WeightsError
from ..files import sync_folder
from ..reading import checkpoints
from ..spec import sha256_of


@dataclass(frozen=True, slots=True)
class Download:
    """An official checkpoint on the web."""

    url: str
    sha256: str
    """Whole or leading hex digits, as far as the publisher gives them; empty where there are none."""

    @property
    def file(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    @property
    def pinned(self) -> str:
        """How far its contents are known before it is downloaded, for the manifest: ``sha256`` where they are."""
        if len(self.sha256) == 64:
            return "sha256"
        return f"{len(self.sha256)} of 64 digits of its sha256" if self.sha256 else "no"


MINI_WEIGHTS = Path(__file__).resolve().parents[1] / "mini" / "weights"
"""Trained weights of the small models. In the repository only: a wheel carries their exported bundle."""


def random_seed(weights: str) -> int | None:
    """The seed in ``random:SEED``, None for anything else. Raises WeightsError when SEED is no whole number."""
    if not weights.startswith("random:"):
        return None
    try:
        return int(weights.removeprefix("random:"))
    except ValueError:
        raise WeightsError(
            f"--weights: expected random:SEED with a whole number, got {weights!r}", hint="--weights random:0"
        ) from None


def find_weights(weights: str, known: Mapping[str, Download], *, model: str) -> Path:
    """The local file or folder that ``--weights`` means; a known name is downloaded once and checked.

    ``mini`` is the small model's file in this repository, also where a folder of that name lies in the working folder.

    Raises:
        WeightsError: no such file or name, no network, or a download whose hash is wrong. Names the file to bring.
    """
    if weights == "mini":
        trained = MINI_WEIGHTS / f"{model}.safetensors"
        if not trained.is_file():
            raise WeightsError(
                f"--weights mini: expected {trained}", hint="take a checkout of wsss, or train them there: make mini"
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
    return download(known[weights], model=model)


def cache_folder() -> Path:
    """Where downloads are kept: ``$WSSS_CACHE``, else ``wsss`` in ``$XDG_CACHE_HOME``, else ``~/.cache/wsss``."""
    if "WSSS_CACHE" in os.environ:
        return Path(os.environ["WSSS_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "wsss"


def download(what: Download, *, model: str) -> Path:
    """A checkpoint in the cache, fetched unless it lies there; the file is hashed each time, and published whole or not at all.

    Raises:
        WeightsError: it cannot be fetched whole, or has another sha256. Says how to bring the file by hand.
    """
    target = cache_folder() / what.file
    bring = f"bring {what.file} by hand from {what.url} and run: wsss export --model {model} --weights {what.file}"
    try:
        if target.is_file() and sha256_of(target).startswith(what.sha256):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        with _partial(target) as partial:
            _fetch(what, partial)
            if not (got := sha256_of(partial)).startswith(what.sha256):
                raise WeightsError(f"{what.file}: downloaded with sha256 {got}, expected {what.sha256}", hint=bring)
            partial.replace(target)
        sync_folder(target.parent)
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: an address or a header that is none
        raise WeightsError(f"{what.file}: cannot be downloaded from {what.url}: {error}", hint=bring) from None
    return target


def _fetch(what: Download, partial: Path) -> None:
    with urllib.request.build_opener(_OnlyHttps).open(what.url, timeout=30) as answer, partial.open("wb") as file:
        total, done = int(answer.headers.get("Content-Length") or 0), 0
        while block := answer.read(1 << 20):
            file.write(block)
            done += len(block)
            _show_progress(what.file, done, total)
        file.flush()
        os.fsync(file.fileno())
    if total and done != total:
        raise OSError(f"it ended after {done:,} of {total:,} bytes")


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    """Follows no redirection from https to anything else."""

    def redirect_request(self, req: urllib.request.Request, *answer: Any) -> urllib.request.Request | None:
        url = answer[-1]
        if req.type == "https" and not url.startswith("https:"):
            raise urllib.error.URLError(f"it leads to an address without https: {url}")
        return super().redirect_request(req, *answer)


@contextlib.contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """A new file beside ``target``, under a name of its own: two processes may fetch the same. Deleted at the end."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    os.close(handle)
    path = Path(name)
    try:
        path.chmod(0o644)  # mkstemp makes it private; a cache may be shared
        yield path
    finally:
        path.unlink(missing_ok=True)


def _sweep(target: Path) -> None:
    """Deletes what killed downloads of this file left, a day ago or more: one that goes on still writes to it."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 86_400:
                path.unlink()


def _show_progress(file: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        share = f" of {total / 1e6:.0f}" if total else ""
        end = "\n" if done == total else ""
        print(f"\rdownloading {file}: {done / 1e6:.0f}{share} MB", end=end, file=sys.stderr, flush=True)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors``, ``.pth``/``.pt``/``.bin`` file, or of a folder with ``model.safetensors``.

    A ``.pth`` may hold its state dict under ``model`` or ``state_dict``. Nothing is unpickled but tensors.

    Raises:
        WeightsError: missing, truncated, or not a checkpoint.
    """
    if path.is_dir():
        for name in ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin"):
            if (path / name).is_file():
                return read_checkpoint(path / name)
        raise WeightsError(
            f"{path}: expected a folder with model.safetensors, found {sorted(p.name for p in path.iterdir())[:8]}",
            hint="give the file of weights itself",
        )
    found: Any = checkpoints.read_checkpoint(path)
    for key in ("model", "state_dict"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not found or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()):
        raise WeightsError(
            f"{path}: expected a state dict of tensors, got {type(found).__name__}", hint="the file is no checkpoint of a model"
        )
    return dict(found)


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], *, path: Path, what: str, assign: bool = False) -> None:
    """Loads ``state`` into ``module`` when names and shapes fit exactly.

    Args:
        path, what: the file and the architecture, for the message.
        assign: take the tensors themselves instead of copying them: for a module on the meta device.

    Raises:
        WeightsError: missing or surplus keys, or another shape; names the first of each.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    surplus = [name for name in state if name not in own]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
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
    module.load_state_dict({name: value.to(own[name].dtype) for name, value in state.items()}, strict=True, assign=assign)


def weights_record(source: str, path: Path | None, module: nn.Module) -> dict[str, str]:
    """What the manifest says of the weights: the source as typed, and a sha256 of the file; for seeded values, of the seed and of
    their names and shapes, because processors differ in the last digits of the values."""
    if path is None:
        parts = [f"{name} {value.dtype} {tuple(value.shape)}" for name, value in module.state_dict().items()]
        return {"source": source, "sha256": hashlib.sha256("\n".join([source, *parts]).encode()).hexdigest()}
    if path.is_dir():
        path = next(
            path / n for n in ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin") if (path / n).is_file()
        )
    typed_path = source != "mini" and Path(source).expanduser().exists()
    return {"source": str(path) if typed_path else source, "sha256": sha256_of(path)}


@torch.no_grad()
def spread(module: nn.Module, seed: int) -> None:
    """Gives seeded weights the spread of trained ones: uneven channels, norm gains far from 1, a few outlier channels.

    Default initialization is too kind: every channel alike, norms at 1, zeros in the heads; errors in channel order,
    precision and masks cancel out in it. Trained transformers have outlier channels (arXiv 2208.07339, section 4).
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
