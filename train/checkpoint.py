"""The folder of a training run: safetensors and JSON files, each written atomically.

config.json          every setting
segmenter.json       all that is needed to rebuild the network offline: `RunRecord`
best.safetensors     weights of the best validation, if there was one
last.safetensors     weights and all other state needed to continue the training
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
from ..files import write_atomically
from ..reading.checkpoints import check_safetensors
from ..reading.documents import parse_json, read_bytes
from .model import Segmenter, build_segmenter

FORMAT = 1
MAX_NUMBER = 1 << 31
"""Largest number of steps, images or pixels in a record."""
MAX_RECORD_BYTES = 1 << 22
"""Size of segmenter.json: mostly the names of tensors that stayed random."""
MAX_SIDE = 1 << 14
"""Pixels of a canvas's side."""
MAX_WIDTH, MAX_OPTIONS = 1 << 12, 64
"""Limits of a network's options: the numbers, and how many values a list or table has."""
_KINDS: dict[str, type] = {"str": str, "int": int, "tuple": list, "Mapping": dict}
RECORD, BEST, LAST = "segmenter.json", "best.safetensors", "last.safetensors"


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """All that is needed to rebuild a segmenter from a run's weights, and where they come from."""

    architecture: str
    encoder: str
    options: Mapping[str, Any]
    classes: tuple[str, ...]
    """Names of labels 1, 2, ...; label 0 is background, so the network has one more output."""
    mean: tuple[float, float, float]
    """RGB on the 0-255 scale: subtracted from the pixels."""
    std: tuple[float, float, float]
    """RGB on the 0-255 scale: divided by."""
    crop: int
    """Side of the training crop in pixels."""
    multiple_of: int
    """The sides of the network's input must be multiples of this."""
    steps: int
    """Steps of the complete training."""
    preset: str
    source: str
    """Source of the schedule."""
    init: Mapping[str, Any]
    """The initial weights: `wsss.train.weights.Initial`."""
    store: str
    """Digest of the training data: `wsss.train.dataset.survey.Survey`."""
    images: int
    """Number of training images, without validation images."""
    tools: Mapping[str, str]
    """Versions of the software that trained it."""
    shorter_px: int = 0
    """Shorter side to which every image is resized first; 0: not resized, also in older runs without this field."""
    canvases: tuple[tuple[int, int], ...] = ()
    """(height, width) of canvases that hold the training photographs (`canvases_for`); empty: unknown, or they are too large."""
    format: int = FORMAT


@dataclass(kw_only=True)
class Progress:
    """State of a training other than its tensors."""

    step: int = 0
    seconds: float = 0.0
    """Training time so far, over all sessions."""
    best_miou: float | None = None
    """None until there was a validation score."""
    best_step: int = 0
    left_out: int = 0
    """Steps without an update because the gradient overflowed in fp16."""
    recent: list[float] = field(default_factory=list)
    """Losses since the last point of the curve."""
    scaler: dict[str, float] = field(default_factory=dict)
    """State of the fp16 loss scaling."""


def load_run(folder: Path, which: str = "best") -> tuple[Segmenter, RunRecord]:
    """Load a trained segmenter on the CPU, in evaluation mode, float32. Needs no network connection.

    Args:
        folder: the ``--out`` of ``wsss train``.
        which: ``best`` (the last weights if there was no validation), or ``last``.

    Raises:
        WeightsError: not a run, damaged, or without a checkpoint yet.
    """
    record = read_record(folder)
    try:
        segmenter = build_segmenter(record.architecture, record.encoder, record.options, len(record.classes) + 1)
    except UsageError as error:
        raise WeightsError(f"{folder / RECORD}: {error.message}", hint="the file is damaged, or of another version") from None
    path = weights_file(folder, which)
    weights, about = _weights_of(path)
    if not_finite := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise WeightsError(f"{path}: {not_finite[0]} holds NaN or infinity", hint="train again, or use other weights")
    try:
        segmenter.network.load_state_dict(weights)
    except RuntimeError as error:
        raise WeightsError(
            f"{path}: does not fit {RECORD}: {str(error).partition(chr(10))[0]}", hint="use both files of the same run"
        ) from None
    step = about.get("step")
    if type(step) is not int or not 0 <= step <= record.steps:
        raise WeightsError(f"{path}: damaged: expected a step of {record.steps}, got {step!r:.60}", hint="use files of one run")
    segmenter.canvases = record.canvases
    segmenter.at_step(step, record.steps)
    return segmenter.eval(), record


def read_record(folder: Path) -> RunRecord:
    """Read a run's record. Raises WeightsError if ``folder`` has no record that this version reads."""
    path = folder / RECORD
    if not path.exists():
        raise WeightsError(f"{folder}: expected the folder of a training (with {RECORD})", hint="wsss train makes one")
    hint = "the file is damaged: copy it again from its source"
    data = read_bytes(path, error=WeightsError, hint=hint, max_bytes=MAX_RECORD_BYTES)
    try:
        return _checked(parse_json(data, str(path), error=WeightsError, hint=hint))
    except ValueError as error:
        raise WeightsError(f"{path}: {error}", hint="the file is damaged, or of another version of wsss") from None


def _checked(record: Any) -> RunRecord:
    """Check a JSON value and convert it. Raises ValueError if types, ranges or keys are not those of `RunRecord`."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    if record.get("format") != FORMAT:
        raise ValueError(f"expected format {FORMAT}, got {record.get('format')!r:.60}")
    for field_ in dataclasses.fields(RunRecord):
        kind, name = _KINDS[str(field_.type).partition("[")[0]], field_.name
        if name not in record and field_.default is dataclasses.MISSING:
            raise ValueError(f"{name} is missing")
        if name in record and (not isinstance(record[name], kind) or isinstance(record[name], bool)):
            raise ValueError(f"{name}: expected {kind.__name__}, got {record[name]!r:.60}")
    if unknown := record.keys() - {field_.name for field_ in dataclasses.fields(RunRecord)}:
        raise ValueError(f"unknown setting {min(unknown)!r:.60}")
    for name, least in (("crop", 1), ("multiple_of", 1), ("steps", 0), ("images", 0), ("shorter_px", 0)):
        if not least <= record.get(name, least) <= MAX_NUMBER:
            raise ValueError(f"{name}: expected {least} to {MAX_NUMBER:,}, got {record[name]:.6g}")
    classes = record["classes"]
    if not 1 <= len(classes) <= 254 or not all(isinstance(name, str) and name.strip() for name in classes):
        raise ValueError(f"classes: expected 1 to 254 names, got {classes!r:.60}")
    if len(set(classes)) < len(classes):
        raise ValueError("classes: a name occurs twice")
    for name in ("mean", "std"):
        numbers = record[name]
        if len(numbers) != 3 or not all(type(number) in (int, float) and abs(number) <= 1e6 for number in numbers):
            raise ValueError(f"{name}: expected three numbers, got {numbers!r:.60}")
    if min(record["std"]) <= 0:
        raise ValueError(f"std: expected numbers above 0, got {record['std']}")
    for canvas in record.get("canvases", []):
        if not isinstance(canvas, list) or len(canvas) != 2 or not all(type(px) is int and 1 <= px <= MAX_SIDE for px in canvas):
            raise ValueError(f"canvases: expected pairs of 1 to {MAX_SIDE:,} pixels, got {canvas!r:.60}")
    if len(record.get("canvases", [])) > MAX_OPTIONS:
        raise ValueError(f"canvases: expected at most {MAX_OPTIONS}, got {len(record['canvases']):,}")
    if not re.fullmatch(r"[\w.+-]+", record["encoder"]):  # a name with a colon or a slash would be downloaded
        raise ValueError(f"encoder: expected a name, got {record['encoder']!r:.60}")
    _check_options(record["options"])
    tuples = {key: tuple(record[key]) for key in ("classes", "mean", "std")}
    return RunRecord(**{**record, **tuples, "canvases": tuple(map(tuple, record.get("canvases", [])))})


def _check_options(value: Any) -> None:
    """Raises ValueError for options of a network too large for any memory."""
    if isinstance(value, dict | list):
        if len(value) > MAX_OPTIONS:
            raise ValueError(f"options: expected at most {MAX_OPTIONS} values, got {len(value):,}")
        for option in value.values() if isinstance(value, dict) else value:
            _check_options(option)
    elif isinstance(value, int | float) and abs(value) > MAX_WIDTH:
        raise ValueError(f"options: expected numbers up to {MAX_WIDTH}, got {value:.6g}")


def write_record(folder: Path, record: RunRecord) -> None:
    """Write the record to a run's folder."""
    write_json(folder / RECORD, dataclasses.asdict(record))


def write_json(path: Path, value: object) -> None:
    """Write indented JSON atomically."""
    write_atomically(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def weights_file(folder: Path, which: str = "best") -> Path:
    """The path of a run's weights. Raises WeightsError if there are none yet."""
    for name in (BEST, LAST) if which == "best" else (LAST,):
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(
        f"{folder}: no weights in it yet", hint="wsss train writes the first ones after machine.checkpoint_seconds"
    )


def weights_of(folder: Path, which: str = "best") -> dict[str, Tensor]:
    """A run's weights by the network's names; from ``last.safetensors`` the running average if there is one."""
    return _weights_of(weights_file(folder, which))[0]


def _weights_of(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a file of a run, and its metadata."""
    tensors, about = read_tensors(path)
    if path.name == BEST:
        return tensors, about
    prefix = "average." if any(name.startswith("average.") for name in tensors) else "network."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}, about


def save_best(folder: Path, network: nn.Module, *, step: int, miou: float) -> None:
    """Write ``best.safetensors``."""
    write_tensors(folder / BEST, dict(network.state_dict()), {"step": step, "miou": miou})


def save_last(folder: Path, network: nn.Module, average: nn.Module | None, optimizer: Optimizer, progress: Progress) -> None:
    """Write ``last.safetensors``: network, running average, optimizer and progress in one file, so that they match."""
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    if average is not None:
        tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    for name, parameter in network.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"optimizer.{key}.{name}"] = value
    write_tensors(folder / LAST, tensors, dataclasses.asdict(progress))


def restore_last(folder: Path, network: nn.Module, average: nn.Module | None, optimizer: Optimizer) -> Progress:
    """Restore the state that `save_last` wrote. Raises WeightsError if the file is damaged or of another network."""
    path = folder / LAST
    tensors, record = read_tensors(path)

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
            # device and memory order of the parameter; Adam's step count is a scalar
            kept = (
                value.to(parameter.device) if value.ndim == 0 else torch.empty_like(parameter, requires_grad=False).copy_(value)
            )
            optimizer.state[parameter][key] = kept
        return _progress(record)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path}: does not fit this run: {str(error).partition(chr(10))[0]}", hint="give a new --out"
        ) from None


def _progress(record: dict[str, Any]) -> Progress:
    """Check and convert a record. Raises TypeError or ValueError."""
    progress = Progress(**record)
    if not isinstance(progress.step, int) or progress.step < 0 or not isinstance(progress.recent, list):
        raise ValueError(f"step {progress.step!r:.60}")
    if progress.best_miou is not None and progress.best_miou < 0:  # older runs wrote -1 for None
        progress.best_miou = None
    return progress


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a safetensors file with JSON metadata atomically."""
    flat = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomically(path, save(flat, {"about": json.dumps(about, allow_nan=False)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and metadata that `write_tensors` wrote. Raises WeightsError."""
    hint = "give a new --out, or undamaged weights"
    check_safetensors(path, hint=hint)
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("about", "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{path}: damaged: {error}", hint=hint) from None
    about = parse_json(text, f"{path}: damaged: its metadata", hint=hint, error=WeightsError)
    if not isinstance(about, dict):
        raise WeightsError(f"{path}: damaged: expected metadata of a training, got {type(about).__name__}", hint=hint)
    return tensors, about
