"""The training itself: from a label store to a segmenter, in plain PyTorch.

A run is a sequence of numbered steps. All that is drawn by chance follows from (seed, step), and a checkpoint holds all that
a step leaves behind, so that a run that was killed anywhere ends with the weights of one that was not.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import StoreError, WeightsError, WsssError
from ..reading.documents import read_json
from . import curve
from .args import Config, deciding
from .checkpoint import BEST, LAST, RunRecord, load_run, read_record, save_best, write_json, write_record
from .data import Batch, Crops, Order, Positions, batches, class_weights, repeat_factors
from .distributed import World, joined
from .model import build_from, criterion_for
from .optimizer import rate_at
from .page import PAGE, write_page
from .run import Run, check_divisible, memory_format
from .survey import Item, Survey, look_through, read_survey, write_survey
from .validate import predictions, validate
from .weights import Initial, load_initial

Log = Callable[[str], None]
CONFIG, SURVEY = "config.json", "survey.json"
SHOWN = 24
"""Images on the page at the end."""
NAMED = 10
"""Of many classes, so many are named."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """How a training stands, for whoever watches it."""

    step: int
    steps: int
    loss: float
    rate: float
    seconds_left: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a training came to."""

    run: str
    images: int
    steps: int
    miou: float | None
    """Of the best validation, against the store's own labels; None where none could score."""
    best_step: int | None
    seconds: float
    page: str
    warnings: tuple[str, ...] = ()
    """What may make the result another one than was meant."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a training reads and writes, and which images it learns from."""

    store: Path
    images: Path
    out: Path
    survey: Survey
    training: tuple[Item, ...]
    held_out: tuple[Item, ...]
    warnings: tuple[str, ...] = ()
    """What to know of these images, see `remarks`."""


def train(
    store: Path,
    images: Path,
    out: Path,
    config: Config,
    *,
    log: Log = lambda line: None,
    watch: Callable[[Status], None] = lambda status: None,
) -> Result:
    """Trains a segmenter on a label store, or goes on where the same run was stopped.

    Args:
        store: made by ``wsss label``. images: the folder that was labeled. out: the run's folder (`wsss.train.checkpoint`).
        log: told what happens, one line each. watch: told how it stands. Of several processes only the first tells.

    Raises:
        StoreError: the store or its images cannot be trained on. WeightsError: the initial weights cannot be used.
        WsssError: another run in ``out``, too little memory, a loss that is not a number, GPUs that are missing.
        UsageError: crop or batch do not divide.
    """
    with joined(config.machine) as world, memory_for(config):
        log = log if world.is_first else lambda line: None
        source = _source(store, images, out, config, world, log)
        run = _begin(source, config, world, log)
        steps = config.optimizer.steps
        with closing(Recorder(run, out, watch)) as recorder:
            for parts in _steps(run, source):
                loss = run.advance(parts, lambda rows: [source.training[row].path for row in rows])
                is_last = run.progress.step == steps
                recorder.tell(loss, is_last)
                if source.held_out and (is_last or run.progress.step % config.validation_steps == 0):
                    recorder.tell_validation(_validate(run, source, log))
                if is_last or recorder.is_checkpoint_due():
                    recorder.save()
        progress, warnings = run.progress, list(source.warnings)
        if progress.left_out == progress.step:
            raise WsssError(
                f"{out}: nothing was learned: the gradient of all {progress.step} steps overflowed in "
                f"{config.optimizer.precision}",
                hint="give a new --out and --set optimizer.precision=bf16 or fp32, or more steps",
            )
        if world.is_first:
            _write_page(run, source)
        if progress.left_out:
            warnings.append(
                f"{progress.left_out} of {progress.step} steps changed nothing: their gradient overflowed in "
                f"{config.optimizer.precision}; --set optimizer.precision=bf16 or fp32 has the range"
            )
            log(f"warning: {warnings[-1]}")
        return Result(
            run=str(out),
            images=len(source.training),
            steps=progress.step,
            miou=progress.best_miou,
            best_step=progress.best_step if progress.best_miou is not None else None,
            seconds=progress.seconds,
            page=str(out / PAGE),
            warnings=tuple(warnings),
        )


class Recorder:
    """Keeps the books of a training: the curve, whoever watches, and checkpoints when they are due."""

    def __init__(self, run: Run, out: Path, watch: Callable[[Status], None]) -> None:
        self._run, self._out, self._watch = run, out, watch
        self._args = run.config.machine
        self._writer = curve.Writer(out, run.progress.step, tensorboard=self._args.tensorboard) if run.world.is_first else None
        self._begun, self._first, self._before = time.monotonic(), run.progress.step, run.progress.seconds
        self._saved = self._begun

    def tell(self, loss: float, is_last: bool) -> None:
        """One step is done; a point of the curve is the mean over those since the last one."""
        progress, optimizer = self._run.progress, self._run.config.optimizer
        progress.recent.append(loss)
        sitting = time.monotonic() - self._begun
        progress.seconds = self._before + sitting
        if self._writer is None or (progress.step % self._args.log_steps and not is_last):
            return
        mean, rate = sum(progress.recent) / len(progress.recent), rate_at(progress.step - 1, optimizer)
        progress.recent.clear()
        self._writer.add(progress.step, loss=mean, rate=rate, seconds=progress.seconds)
        left = sitting / (progress.step - self._first) * (optimizer.steps - progress.step)
        self._watch(Status(step=progress.step, steps=optimizer.steps, loss=mean, rate=rate, seconds_left=left))

    def tell_validation(self, miou: float | None) -> None:
        """A validation is done; None: it could not score."""
        if self._writer:
            self._writer.add(self._run.progress.step, miou=miou)

    def is_checkpoint_due(self) -> bool:
        """Whether the last checkpoint is old enough."""
        return time.monotonic() - self._saved >= self._args.checkpoint_seconds

    def save(self) -> None:
        """Writes a checkpoint."""
        if self._run.world.is_first:
            self._run.save(self._out)
        self._saved = time.monotonic()

    def close(self) -> None:
        """Ends the curve."""
        if self._writer:
            self._writer.close()


def _source(store: Path, images: Path, out: Path, config: Config, world: World, log: Log) -> Source:
    """Claims the run's folder and looks through the store: the first process for all of them."""
    if world.is_first:
        _claim(out, config)
        log(f"looking through {store}")
        survey = look_through(store, images)
        if survey.failed:
            log(f"{survey.failed} images of the store could not be labeled and are left out")
        write_survey(out / SURVEY, survey)
    world.wait()
    survey = read_survey(out / SURVEY)
    training, held_out = survey.split(config.data.validation_share, config.data.validation_limit)
    log(f"{len(training)} images to train on, {len(held_out)} to validate, {len(survey.classes)} classes")
    check_labelled(store, training)
    warnings = remarks(survey.classes, training, held_out, config.data.validation_share)
    for warning in warnings:
        log(f"warning: {warning}")
    return Source(store=store, images=images, out=out, survey=survey, training=training, held_out=held_out, warnings=warnings)


def check_labelled(store: Path, training: Sequence[Item]) -> None:
    """Raises StoreError where a network could learn nothing, or background alone, from these images."""
    pixels = [sum(counts) for counts in zip(*(item.pixels for item in training), strict=True)]
    if not any(pixels):
        raise StoreError(
            f"{store}: no pixel of the {len(training)} images to train on is labeled: all are void (255)",
            hint="wsss report shows the labels; a binary mask holds the number of its class, not 255",
        )
    if not any(pixels[1:]):
        raise StoreError(
            f"{store}: the {len(training)} images to train on hold background alone, none of the {len(pixels) - 1} classes",
            hint="wsss report shows the labels; label with classes that are in the photographs",
        )


def remarks(classes: Sequence[str], training: Sequence[Item], held_out: Sequence[Item], share: float) -> tuple[str, ...]:
    """What a user should know of the images before a network is trained on them."""
    found = []
    if never := [name for label, name in enumerate(classes, 1) if not any(item.pixels[label] for item in training)]:
        more = f" and {len(never) - NAMED} more" if len(never) > NAMED else ""
        found.append(
            f"{len(never)} of {len(classes)} classes are in no image to train on and cannot be learned: "
            f"{', '.join(never[:NAMED])}{more}"
        )
    if empty := sum(not any(item.pixels) for item in training):
        found.append(f"{empty} of {len(training)} images to train on are void (255) everywhere and teach nothing")
    if share and not held_out:
        found.append(
            f"no image is kept out (data.validation_share = {share:g} of {len(training)}): nothing is validated, "
            "the last weights count"
        )
    elif held_out and not any(any(item.pixels) for item in held_out):
        found.append(
            f"the {len(held_out)} images kept out hold no labeled pixel: no validation can score, the last weights count"
        )
    return tuple(found)


def _claim(out: Path, config: Config) -> None:
    """Makes the run's folder, or checks that it holds this very run."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / LAST).exists():
            was = read_json(out / CONFIG, hint="give a new --out")
            if not isinstance(was, dict):
                raise ValueError(f"expected the settings of a run, got {type(was).__name__}")
            _check_same(out, was, deciding(config))
        elif not (out / CONFIG).exists() and any(not path.name.endswith(".tmp") for path in out.iterdir()):
            raise WsssError(f"--out {out}: the folder is not empty and holds no training", hint="give a new or empty folder")
        else:
            (out / BEST).unlink(missing_ok=True)  # of a training that never reached its first checkpoint
        write_json(out / CONFIG, dataclasses.asdict(config))
    except OSError as error:
        raise WsssError(f"--out {out}: cannot be written: {error.strerror}", hint="give a folder you may write to") from None
    except ValueError as error:
        raise WsssError(f"{out / CONFIG}: damaged: {error}", hint="give a new --out") from None


def _check_same(out: Path, was: dict[str, Any], now: dict[str, Any], prefix: str = "") -> None:
    """Raises WsssError, naming the first setting in which two configurations differ."""
    for key, value in now.items():
        before = was.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            _check_same(out, before, value, f"{prefix}{key}.")
        elif before != value:
            raise WsssError(
                f"--out {out}: was begun with {prefix}{key} = {json.dumps(before)}, this run has {json.dumps(value)}",
                hint="give a new --out, or the settings of its config.json",
            )


def _begin(source: Source, config: Config, world: World, log: Log) -> Run:
    """The run at step 0, or where its last checkpoint left it."""
    survey, out = source.survey, source.out
    segmenter = build_from(config.model, len(survey.classes) + 1, config.seed)
    check_divisible(config, segmenter.multiple_of, world)
    is_resumed = (out / LAST).exists()
    if is_resumed:
        _check_belongs(out, survey)
    else:
        init = load_initial(segmenter, config, survey.classes)
        log(str(init))
        if world.is_first:
            write_record(out, _record(source, config, segmenter.multiple_of, init))
    weights = torch.from_numpy(class_weights(source.training)) if config.data.balance == "weights" else None
    run = Run.begin(segmenter, criterion_for(segmenter, config.loss, weights), config, world)
    if is_resumed:
        run.restore(out)
        done = run.progress.step == config.optimizer.steps
        log(f"{out} is finished" if done else f"goes on at step {run.progress.step}")
    world.wait()  # nobody writes a checkpoint while another still looks for one
    return run


def _check_belongs(out: Path, survey: Survey) -> None:
    record = read_record(out)
    if record.classes != survey.classes:
        raise WeightsError(
            f"--out {out}: its checkpoint tells {len(record.classes)} classes apart ({', '.join(record.classes[:4])}, ...), "
            f"the store has {len(survey.classes)} ({', '.join(survey.classes[:4])}, ...)",
            hint=f"give a new --out; --init {out} --set model.new_head=true starts from its weights",
        )
    if record.store != survey.digest:
        raise WsssError(
            f"--out {out}: the store's images or labels have changed since this run began",
            hint="give a new --out: a run never mixes two sets of labels",
        )


def _record(source: Source, config: Config, multiple_of: int, init: Initial) -> RunRecord:
    return RunRecord(
        architecture=config.model.architecture,
        encoder=config.model.encoder,
        options=config.model.options,
        classes=source.survey.classes,
        mean=config.data.mean,
        std=config.data.std,
        crop=config.data.crop,
        multiple_of=multiple_of,
        steps=config.optimizer.steps,
        preset=config.preset,
        source=config.source,
        init=dataclasses.asdict(init),
        store=source.survey.digest,
        images=len(source.training),
        tools={"wsss": __version__, "torch": torch.__version__, "python": platform.python_version()},
        shorter_px=config.data.shorter_px,
    )


def _steps(run: Run, source: Source) -> Iterator[list[Batch]]:
    """The forward passes of every step that is left, on the device."""
    config, world = run.config, run.world
    args, machine, steps = config.data, config.machine, config.optimizer.steps
    balance = repeat_factors(source.training, args.sampling_threshold) if args.balance == "sampling" else None
    order = Order(len(source.training), config.seed, balance)
    crops = Crops(source.store, source.images, source.training, args, seed=config.seed, order=order)
    positions = Positions(args, first=run.progress.step, steps=steps, rank=world.rank, world=world.size)
    loaded = batches(crops, positions, workers=machine.workers, pin=world.device.type == "cuda")
    while parts := [part.to(world.device, memory_format(config)) for part in islice(loaded, args.accumulate)]:
        yield parts


def _validate(run: Run, source: Source, log: Log) -> float | None:
    """mIoU on the images kept out, None where they hold no label; keeps the weights if they are the best so far."""
    progress = run.progress
    miou = validate(run.kept, source.store, source.images, source.held_out, run.config, run.world)
    if miou is None:
        log(f"step {progress.step}: no mIoU: the {len(source.held_out)} images kept out hold no labeled pixel")
        return None
    log(f"step {progress.step}: mIoU {miou:.4f} on {len(source.held_out)} images kept out, against the store's labels")
    if progress.best_miou is None or miou > progress.best_miou:
        progress.best_miou, progress.best_step = miou, progress.step
        if run.world.is_first:
            save_best(source.out, run.kept.network, step=progress.step, miou=miou)
    return miou


def _write_page(run: Run, source: Source) -> None:
    """The curve's picture, and the page with predictions of the weights that `load_run` gives."""
    out, config, progress = source.out, run.config, run.progress
    segmenter, record = load_run(out)
    segmenter.to(run.world.device, memory_format=memory_format(config))
    items = (source.held_out or source.training)[:SHOWN]
    with torch.inference_mode():
        found = list(predictions(segmenter, source.store, source.images, items, config, run.world.device))
    best = "none"
    if progress.best_miou is not None:
        best = f"{progress.best_miou:.4f} at step {progress.best_step}, against the store's labels"
    facts = [
        ("network", f"{record.architecture}, {record.encoder}"),
        ("weights from", str(Initial(**record.init))),
        ("schedule", record.source or "own settings"),
        ("images", f"{record.images} trained on, {len(source.held_out)} kept out"),
        ("best mIoU on those", best),
        ("time", f"{progress.step} steps in {progress.seconds / 60:.1f} min"),
    ]
    shown = [(item.path, *each) for item, each in zip(items, found, strict=True)]
    write_page(out, record, facts, curve.draw(out), shown)


@contextmanager
def memory_for(config: Config) -> Iterator[None]:
    """Turn a lack of memory, on a GPU or not, into the settings that need less of it."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in said:
            raise
        data = config.data
        raise WsssError(
            f"too little memory for {data.batch} images of {data.crop} x {data.crop} pixels a step, in {data.accumulate} forward "
            f"passes: {said}",
            hint=f"--set data.accumulate={2 * data.accumulate} does the same in less memory; or a smaller --crop or --batch",
        ) from None
