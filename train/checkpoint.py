"""A run's folder: what a training leaves behind, and how to open it again. safetensors and JSON, each file whole or not at all.

config.json          every setting
segmenter.json       what rebuilds the network without a network connection: `RunRecord`
best.safetensors     weights of the best validation, if there was one
last.safetensors     weights and all else that the training needs to go on
curve.jsonl          loss, learning rate and validation by step; curve.png and report.html show it
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import WeightsError
from ..labelstore import write_atomically
from .model import Segmenter, build_segmenter

FORMAT = 1
RECORD, BEST, LAST = "segmenter.json", "best.safetensors", "last.safetensors"


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """All that turns a run's weights into a working segmenter, and where they come from."""

    architecture: str
    encoder: str
    options: Mapping[str, Any]
    classes: tuple[str, ...]
    """Names by label value from 1; label 0 is background. The network has one output more."""
    mean: tuple[float, float, float]
    """RGB on the 0-255 scale: subtracted from the pixels."""
    std: tuple[float, float, float]
    """RGB on the 0-255 scale: divided by."""
    crop: int
    """Side of the training crop in pixels: the size at which the network is at home."""
    multiple_of: int
    """Sides of its input must be multiples of it."""
    steps: int
    """Length of the whole training."""
    preset: str
    source: str
    """Where the schedule comes from."""
    init: Mapping[str, Any]
    """What it started from: `wsss.train.weights.Initial`."""
    store: str
    """Digest of what it was trained on: `wsss.train.survey.Survey`."""
    images: int
    """Trained on, validation aside."""
    tools: Mapping[str, str]
    """Versions of what trained it."""
    shorter_px: int = 0
    """Shorter side to which every image is resized first; 0: none is, as in runs that do not tell."""
    format: int = FORMAT


@dataclass(kw_only=True)
class Progress:
    """How far a training has come, beside its tensors."""

    step: int = 0
    seconds: float = 0.0
    """Trained so far, all sittings together."""
    best_miou: float = -1.0
    best_step: int = 0
    recent: list[float] = field(default_factory=list)
    """Losses since the last point of the curve."""
    scaler: dict[str, float] = field(default_factory=dict)
    """State of the fp16 loss scaling."""


def load_run(folder: Path, which: str = "best") -> tuple[Segmenter, RunRecord]:
    """A trained segmenter on the CPU, in evaluation mode, float32. Needs no network connection.

    Args:
        folder: of ``wsss train --out``.
        which: ``best`` (the last ones where no validation chose), or ``last``.

    Raises:
        WeightsError: no run, or one that is damaged or unfinished before its first checkpoint.
    """
    record = read_record(folder)
    segmenter = build_segmenter(record.architecture, record.encoder, record.options, len(record.classes) + 1)
    path = weights_file(folder, which)
    try:
        segmenter.network.load_state_dict(weights_of(folder, which))
    except RuntimeError as error:
        raise WeightsError(f"{path}: does not fit {RECORD}: {str(error).partition(chr(10))[0]}") from None
    return segmenter.eval(), record


def read_record(folder: Path) -> RunRecord:
    """A run's record. Raises WeightsError when ``folder`` holds none that this version reads."""
    try:
        told = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if told.get("format") != FORMAT:
            raise ValueError(f"format {told.get('format')}, this version reads {FORMAT}")
        tuples = {key: tuple(told[key]) for key in ("classes", "mean", "std")}
        return RunRecord(**{**told, **tuples})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(
            f"{folder}: expected the folder of a training (with {RECORD}): {error}", hint="wsss train makes one"
        ) from None


def write_record(folder: Path, record: RunRecord) -> None:
    """Leaves the record in a run's folder."""
    write_json(folder / RECORD, dataclasses.asdict(record))


def write_json(path: Path, value: object) -> None:
    """Writes JSON for people and programs."""
    write_atomically(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def weights_file(folder: Path, which: str = "best") -> Path:
    """The file that holds a run's weights. Raises WeightsError when there is none yet."""
    for name in (BEST, LAST) if which == "best" else (LAST,):
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(
        f"{folder}: no weights in it yet", hint="wsss train writes the first ones after machine.checkpoint_seconds"
    )


def weights_of(folder: Path, which: str = "best") -> dict[str, Tensor]:
    """A run's weights by the network's names; of ``last.safetensors`` the running average, where there is one."""
    path = weights_file(folder, which)
    tensors, _ = read_tensors(path)
    if path.name == BEST:
        return tensors
    prefix = "average." if any(name.startswith("average.") for name in tensors) else "network."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def save_best(folder: Path, network: nn.Module, *, step: int, miou: float) -> None:
    """Writes ``best.safetensors``."""
    write_tensors(folder / BEST, dict(network.state_dict()), {"step": step, "miou": miou})


def save_last(folder: Path, network: nn.Module, average: nn.Module | None, optimizer: Optimizer, progress: Progress) -> None:
    """Writes ``last.safetensors``: network, running average, optimizer and progress in one file, so that they agree."""
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    if average is not None:
        tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    for name, parameter in network.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"optimizer.{key}.{name}"] = value
    write_tensors(folder / LAST, tensors, dataclasses.asdict(progress))


def restore_last(folder: Path, network: nn.Module, average: nn.Module | None, optimizer: Optimizer) -> Progress:
    """Puts everything back as `save_last` found it. Raises WeightsError when the file is damaged or of another network."""
    path = folder / LAST
    tensors, told = read_tensors(path)

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    try:
        network.load_state_dict(part("network."))
        if average is not None:
            average.load_state_dict(part("average."))
        parameters = dict(network.named_parameters())
        for name, value in part("optimizer.").items():
            key, _, parameter_name = name.partition(".")
            parameter = parameters[parameter_name]
            # like the parameter in device and memory order; Adam's count of steps is a scalar on the CPU
            kept = value if value.ndim == 0 else torch.empty_like(parameter, requires_grad=False).copy_(value)
            optimizer.state[parameter][key] = kept
        return Progress(**told)
    except (RuntimeError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{path}: does not fit this run: {str(error).partition(chr(10))[0]}", hint="give a new --out"
        ) from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """One safetensors file with JSON in its header, whole or not at all."""
    flat = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomically(path, save(flat, {"about": json.dumps(about)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote. Raises WeightsError."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{path}: damaged: {error}", hint="give a new --out, or weights that are whole") from None
