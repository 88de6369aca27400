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
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import UsageError, WeightsError
from ..reading.checkpoints import check_safetensors
from ..reading.documents import parse_json, read_bytes
from ..store.local import write_atomically
from .model import Segmenter, build_segmenter

FORMAT = 1
MAX_NUMBER = 1 << 31
"""Of steps, images and pixels in a record."""
MAX_RECORD_BYTES = 1 << 22
"""Of segmenter.json: the names of tensors that stayed random take most of it."""
MAX_WIDTH, MAX_OPTIONS = 1 << 12, 64
"""Of a network's layers: numbers in its options, and how many values stand together."""
_KINDS: dict[str, type] = {"str": str, "int": int, "tuple": list, "Mapping": dict}
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
    best_miou: float | None = None
    """None until a validation could score."""
    best_step: int = 0
    left_out: int = 0
    """Steps whose gradient overflowed in fp16: they changed no weight."""
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
    try:
        segmenter = build_segmenter(record.architecture, record.encoder, record.options, len(record.classes) + 1)
    except UsageError as error:
        raise WeightsError(f"{folder / RECORD}: {error.message}", hint="the file is damaged, or of another version") from None
    path, weights = weights_file(folder, which), weights_of(folder, which)
    if not_finite := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise WeightsError(f"{path}: {not_finite[0]} holds NaN or infinity", hint="train again, or take weights that are whole")
    try:
        segmenter.network.load_state_dict(weights)
    except RuntimeError as error:
        raise WeightsError(
            f"{path}: does not fit {RECORD}: {str(error).partition(chr(10))[0]}", hint="take both files of one run"
        ) from None
    return segmenter.eval(), record


def read_record(folder: Path) -> RunRecord:
    """A run's record. Raises WeightsError when ``folder`` holds none that this version reads."""
    path = folder / RECORD
    if not path.exists():
        raise WeightsError(f"{folder}: expected the folder of a training (with {RECORD})", hint="wsss train makes one")
    hint = "the file is damaged: take it from where the run was made"
    data = read_bytes(path, error=WeightsError, hint=hint, max_bytes=MAX_RECORD_BYTES)
    try:
        return _checked(parse_json(data, str(path), error=WeightsError, hint=hint))
    except ValueError as error:
        raise WeightsError(f"{path}: {error}", hint="the file is damaged, or of another version of wsss") from None


def _checked(record: Any) -> RunRecord:
    """The record in a JSON value. Raises ValueError: types, ranges, or keys are not those of `RunRecord`."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    if record.get("format") != FORMAT:
        raise ValueError(f"expected format {FORMAT}, got {record.get('format')!r:.60}")
    for each in dataclasses.fields(RunRecord):
        kind, value = _KINDS[str(each.type).partition("[")[0]], record.get(each.name)
        if each.name not in record and each.default is dataclasses.MISSING:
            raise ValueError(f"{each.name} is missing")
        if each.name in record and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"{each.name}: expected {kind.__name__}, got {value!r:.60}")
    unknown = record.keys() - {each.name for each in dataclasses.fields(RunRecord)}
    if unknown:
        raise ValueError(f"no setting of a run: {min(unknown)!r:.60}")
    for name, least in (("crop", 1), ("multiple_of", 1), ("steps", 0), ("images", 0), ("shorter_px", 0)):
        if not least <= record.get(name, least) <= MAX_NUMBER:
            raise ValueError(f"{name}: expected {least} to {MAX_NUMBER:,}, got {record[name]:.6g}")
    classes = record["classes"]
    if not 1 <= len(classes) <= 254 or not all(isinstance(each, str) and each.strip() for each in classes):
        raise ValueError(f"classes: expected 1 to 254 names, got {classes!r:.60}")
    if len(set(classes)) < len(classes):
        raise ValueError("classes: a name stands twice")
    for name in ("mean", "std"):
        numbers = record[name]
        if len(numbers) != 3 or not all(type(each) in (int, float) and abs(each) <= 1e6 for each in numbers):
            raise ValueError(f"{name}: expected three numbers, got {numbers!r:.60}")
    if min(record["std"]) <= 0:
        raise ValueError(f"std: expected numbers above 0, got {record['std']}")
    if not re.fullmatch(r"[\w.+-]+", record["encoder"]):  # a name with a colon or a slash would be looked for on the web
        raise ValueError(f"encoder: expected a name, got {record['encoder']!r:.60}")
    _check_options(record["options"])
    return RunRecord(**{**record, **{key: tuple(record[key]) for key in ("classes", "mean", "std")}})


def _check_options(value: Any) -> None:
    """Raises ValueError for what would build a network beyond any memory."""
    if isinstance(value, dict | list):
        if len(value) > MAX_OPTIONS:
            raise ValueError(f"options: expected at most {MAX_OPTIONS} values, got {len(value):,}")
        for each in value.values() if isinstance(value, dict) else value:
            _check_options(each)
    elif isinstance(value, int | float) and abs(value) > MAX_WIDTH:
        raise ValueError(f"options: expected numbers up to {MAX_WIDTH}, got {value:.6g}")


def write_record(folder: Path, record: RunRecord) -> None:
    """Leaves the record in a run's folder."""
    write_json(folder / RECORD, dataclasses.asdict(record))


def write_json(path: Path, value: object) -> None:
    """Writes JSON for people and programs."""
    write_atomically(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


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
        return _progress(told)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path}: does not fit this run: {str(error).partition(chr(10))[0]}", hint="give a new --out"
        ) from None


def _progress(record: dict[str, Any]) -> Progress:
    """Raises TypeError or ValueError where it is none."""
    progress = Progress(**record)
    if not isinstance(progress.step, int) or progress.step < 0 or not isinstance(progress.recent, list):
        raise ValueError(f"step {progress.step!r:.60}")
    if progress.best_miou is not None and progress.best_miou < 0:  # as older runs wrote for none
        progress.best_miou = None
    return progress


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """One safetensors file with JSON in its header, whole or not at all."""
    flat = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomically(path, save(flat, {"about": json.dumps(about, allow_nan=False)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote. Raises WeightsError."""
    hint = "give a new --out, or weights that are whole"
    check_safetensors(path, hint=hint)
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("about", "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{path}: damaged: {error}", hint=hint) from None
    about = parse_json(text, f"{path}: damaged: its notes", hint=hint, error=WeightsError)
    if not isinstance(about, dict):
        raise WeightsError(f"{path}: damaged: expected notes of a training, got {type(about).__name__}", hint=hint)
    return tensors, about
