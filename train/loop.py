"""The training loop: from a label store to a segmenter, in plain PyTorch.

A run is a sequence of numbered steps. All randomness depends only on (seed, step), and a checkpoint has the complete state after
a step, so a run that was killed at any point ends with the same weights as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from .. import __version__
from ..errors import WeightsError, WsssError
from . import curve
from .args import Config
from .augment import working_size
from .checkpoint import LAST, RunRecord, load_run, read_record, save_best, write_record
from .data import (
    Batch,
    Crops,
    Order,
    Positions,
    batches,
    class_weights,
    ranked_confidence,
    ranked_pixels,
    repeat_factors,
    workers_of,
)
from .dataset.canvases import canvases_for
from .dataset.masks import ValidationSet, is_label_store
from .dataset.survey import Survey
from .distributed import World, joined
from .evaluate.report import Scores
from .model import Segmenter, build_from, criterion_for
from .optimizer import rate_at
from .page import PAGE, Owner, Shown, write_page
from .run import DTYPES, Run, check_divisible, is_emulated, kernels_for, memory_format
from .source import Log, Source, checked_source
from .validate import scored, validate
from .weights import Initial, load_initial

SHOWN = 24
"""Images on the HTML page."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """A point of the curve, with the remaining time."""

    step: int
    steps: int
    loss: float
    rate: float
    seconds_left: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """Summary of a finished training."""

    run: str
    images: int
    steps: int
    miou: float | None
    """Score of the best validation, against the labels that ``against`` names; None if there was none."""
    best_step: int | None
    seconds: float
    page: str
    warnings: tuple[str, ...] = ()
    """Possible problems of the result."""
    against: str = ""
    """The labels of the validation: the store's, or true ones."""
    scores: Scores | None = None
    """All scores of the resulting weights on the validation images, by class too; None if no validation could score."""


def train(
    store: Path,
    images: Path,
    out: Path,
    config: Config,
    *,
    classes: tuple[str, ...] | None = None,
    listed: Path | None = None,
    validation: ValidationSet | None = None,
    exclude: str | Path | None = None,
    log: Log = lambda line: None,
    watch: Callable[[Status], None] = lambda status: None,
) -> Result:
    """Train a segmenter on a label store or a folder of masks, or continue a run that was stopped.

    Args:
        store: made by ``wsss label``; or masks in a folder (`wsss.train.dataset.masks`).
        images: the photographs. out: the run's folder (`wsss.train.checkpoint`).
        classes: names of labels 1, 2, ...; needed for masks.
        listed: a list of the names of masks to train on; None: all of them.
        validation: labels to validate on. Nothing is held out then.
        exclude: decisions or a list (`wsss.store.decisions`) whose rejected images are left out.
        log: called with log lines. watch: called at every point of the curve. Both are called in the first process only.

    Raises:
        StoreError: the store or its images cannot be trained on. WeightsError: the initial weights cannot be used.
        WsssError: another run in ``out``, too little memory, a loss that is not finite, or missing GPUs.
        UsageError: crop or batch is not divisible as required.
    """
    with joined(config.machine) as world, memory_for(config):
        log = log if world.is_first else lambda line: None
        source = checked_source(store, images, out, config, world, log, classes, listed, validation, exclude)
        run = _begin(source, config, world, log)
        if config.machine.compile and run.progress.step < config.optimizer.steps:
            log("machine.compile: the first step is compiled, which takes minutes")
        precision = config.optimizer.precision
        if is_emulated(world.device, DTYPES[precision]):
            log(
                f"warning: --precision {precision}: this processor has no instructions for it, and takes about ten times as "
                "long for a step as in fp32"
            )
        steps = config.optimizer.steps
        with closing(Recorder(run, out, watch)) as recorder:
            for parts in _steps(run, source):
                with kernels_for(config, world.device):
                    run.advance(parts)
                is_last = run.progress.step == steps
                recorder.record_step(is_last)
                if source.held_out and (is_last or run.progress.step % config.validation_steps == 0):
                    recorder.record_validation(_validate(run, source, log))
                if is_last or recorder.is_checkpoint_due():
                    recorder.save()
        progress, warnings = run.progress, list(source.warnings)
        if progress.left_out == progress.step:
            raise WsssError(
                f"{out}: no step changed the weights: the gradient of all {progress.step} steps overflowed in "
                f"{config.optimizer.precision}",
                hint="give a new --out and --set optimizer.precision=bf16 or fp32, or more steps",
            )
        scores = _write_page(run, source) if world.is_first else None
        if progress.left_out:
            warnings.append(
                f"{progress.left_out} of {progress.step} steps had no effect: their gradient overflowed in "
                f"{config.optimizer.precision}; use --set optimizer.precision=bf16 or fp32"
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
            against=source.against,
            scores=scores,
        )


class Recorder:
    """Records the progress of a training: curve, callbacks and checkpoints."""

    def __init__(self, run: Run, out: Path, watch: Callable[[Status], None]) -> None:
        self._run, self._out, self._watch = run, out, watch
        self._args = run.config.machine
        self._writer = curve.Writer(out, run.progress.step, tensorboard=self._args.tensorboard) if run.world.is_first else None
        self._started, self._first_step, self._seconds_before = time.monotonic(), run.progress.step, run.progress.seconds
        self._saved = self._started

    def record_step(self, is_last: bool) -> None:
        """Record a step. Only at a point of the curve, which is the mean loss since the previous one, is the loss read."""
        progress, optimizer = self._run.progress, self._run.config.optimizer
        if progress.step % self._args.log_steps and not is_last:
            return
        self._settle()
        mean, rate = sum(progress.recent) / len(progress.recent), rate_at(progress.step - 1, optimizer)
        progress.recent.clear()
        if self._writer is None:
            return
        self._writer.add(progress.step, loss=mean, rate=rate, seconds=progress.seconds)
        session = progress.seconds - self._seconds_before
        left = session / (progress.step - self._first_step) * (optimizer.steps - progress.step)
        self._watch(Status(step=progress.step, steps=optimizer.steps, loss=mean, rate=rate, seconds_left=left))

    def _settle(self) -> None:
        self._run.settle()
        self._run.progress.seconds = self._seconds_before + time.monotonic() - self._started

    def record_validation(self, miou: float | None) -> None:
        """Record a validation score; None if no pixel was labeled."""
        if self._writer:
            self._writer.add(self._run.progress.step, miou=miou)

    def is_checkpoint_due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return time.monotonic() - self._saved >= self._args.checkpoint_seconds

    def save(self) -> None:
        """Write a checkpoint, after a check of losses and weights.

        Raises:
            WsssError: they are not finite.
        """
        self._settle()
        self._run.check()
        if self._run.world.is_first:
            self._run.save(self._out)
        self._saved = time.monotonic()

    def close(self) -> None:
        """Close the curve."""
        if self._writer:
            self._writer.close()


def _begin(source: Source, config: Config, world: World, log: Log) -> Run:
    """The run at step 0, or restored from its last checkpoint."""
    survey, out = source.survey, source.out
    segmenter = build_from(config.model, len(survey.classes) + 1, config.seed)
    check_divisible(config, segmenter.multiple_of, world)
    is_resumed = (out / LAST).exists()
    if is_resumed:
        record = _check_belongs(out, survey)
        segmenter.canvases = record.canvases
        if world.is_first and record.steps != config.optimizer.steps:
            write_record(out, dataclasses.replace(record, steps=config.optimizer.steps))
    else:
        init = load_initial(segmenter, config, survey.classes)
        log(str(init))
        sizes = (working_size(item.size, config.data) for item in source.training)
        segmenter.canvases = canvases_for(sizes, segmenter.multiple_of)
        if world.is_first:
            write_record(out, _record(source, config, segmenter, init))
    weights = torch.from_numpy(class_weights(source.training)) if config.data.balance == "weights" else None
    names = [item.path for item in source.training]
    run = Run.begin(segmenter, criterion_for(segmenter, config.loss, weights), config, world, names)
    if is_resumed:
        run.restore(out)
        done = run.progress.step == config.optimizer.steps
        log(f"{out} is finished" if done else f"continuing at step {run.progress.step}")
    world.wait()  # no process writes a checkpoint while another still reads one
    return run


def _check_belongs(out: Path, survey: Survey) -> RunRecord:
    record = read_record(out)
    if record.classes != survey.classes:
        raise WeightsError(
            f"--out {out}: its checkpoint has {len(record.classes)} classes ({', '.join(record.classes[:4])}, ...), "
            f"the store has {len(survey.classes)} ({', '.join(survey.classes[:4])}, ...)",
            hint=f"give a new --out; --init {out} --set model.new_head=true starts from its weights",
        )
    if record.store != survey.digest:
        raise WsssError(
            f"--out {out}: the store's images or labels have changed since this run started, or the images of its validation",
            hint="give a new --out: a run never mixes two sets of labels",
        )
    return record


def _record(source: Source, config: Config, segmenter: Segmenter, init: Initial) -> RunRecord:
    return RunRecord(
        architecture=config.model.architecture,
        encoder=config.model.encoder,
        options=config.model.options,
        classes=source.survey.classes,
        mean=config.data.mean,
        std=config.data.std,
        crop=config.data.crop,
        multiple_of=segmenter.multiple_of,
        steps=config.optimizer.steps,
        preset=config.preset,
        source=config.source,
        init=dataclasses.asdict(init),
        store=source.survey.digest,
        images=len(source.training),
        tools={"wsss": __version__, "torch": torch.__version__, "python": platform.python_version()},
        shorter_px=config.data.shorter_px,
        canvases=segmenter.canvases,
    )


def _steps(run: Run, source: Source) -> Iterator[list[Batch]]:
    """The batches of every remaining step, on the device."""
    config, world = run.config, run.world
    args, machine, steps = config.data, config.machine, config.optimizer.steps
    balance = repeat_factors(source.training, args.sampling_threshold) if args.balance == "sampling" else None
    order = Order(len(source.training), config.seed, balance)
    confidence = ranked_confidence(source.training)
    of_pixels = ranked_pixels(source.survey.confidence) if config.loss.confidence == "pixel" else None
    crops = Crops(
        source.store,
        source.images,
        source.training,
        args,
        seed=config.seed,
        order=order,
        confidence=confidence,
        of_pixels=of_pixels,
    )
    positions = Positions(args, first=run.progress.step, steps=steps, rank=world.rank, world=world.size)
    loaded = batches(crops, positions, workers=workers_of(machine, world), pin=world.device.type == "cuda")
    while parts := [part.to(world.device) for part in islice(loaded, args.accumulate)]:
        yield parts


def _validate(run: Run, source: Source, log: Log) -> float | None:
    """mIoU on the validation images, None if they have no label. Saves the weights if they are the best so far."""
    progress = run.progress
    run.check()
    labels, images = source.held_out_store, source.held_out_images
    miou = validate(run.result_segmenter, labels, images, source.held_out, run.config, run.world)
    if miou is None:
        log(f"step {progress.step}: no mIoU: the {source.validated} have no labeled pixel")
        return None
    log(f"step {progress.step}: mIoU {miou:.4f} on {source.validated}, against {source.against}")
    if progress.best_miou is None or miou > progress.best_miou:
        progress.best_miou, progress.best_step = miou, progress.step
        if run.world.is_first:
            save_best(source.out, run.result_segmenter.network, step=progress.step, miou=miou)
    return miou


def _write_page(run: Run, source: Source) -> Scores | None:
    """Score the weights that `load_run` returns, and write the plot of the curve and the page with their predictions.

    Returns:
        Scores on the validation images; None if there are none, or they have no labeled pixel.
    """
    out, config, progress = source.out, run.config, run.progress
    segmenter, record = load_run(out)
    segmenter.to(run.world.device, memory_format=memory_format(config))
    shown: list[Shown] = []
    if source.held_out:
        labels, images, items = source.held_out_store, source.held_out_images, source.held_out
    else:
        labels, images, items = source.store, source.images, source.training[:SHOWN]
    scores = scored(segmenter, labels, images, items, config, run.world, record.classes, shown, SHOWN)
    best = "none"
    if progress.best_miou is not None:
        best = f"{progress.best_miou:.4f} at step {progress.best_step}, against {source.against}"
    facts = [
        ("network", f"{record.architecture}, {record.encoder}"),
        ("weights from", str(Initial(**record.init))),
        ("schedule", record.source or "own settings"),
        ("images", f"{record.images} for training, {source.validated}"),
        ("best mIoU on them", best),
        ("time", f"{progress.step} steps in {progress.seconds / 60:.1f} min"),
    ]
    is_scored = bool(source.held_out) and scores["miou"] is not None
    whose: Owner = "truth" if labels != source.store else "store" if is_label_store(labels) else "mask"
    write_page(out, record, facts, curve.draw(out), shown, whose=whose, scores=scores if is_scored else None)
    return scores if is_scored else None


@contextmanager
def memory_for(config: Config) -> Iterator[None]:
    """Convert an out-of-memory error, on a GPU or the CPU, and a failed compilation into a WsssError that names settings."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        if config.machine.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise WsssError(
                f"machine.compile: torch.compile failed: {message}",
                hint="--set machine.compile=false; on a CPU it needs a C++ compiler, such as g++",
            ) from None
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in message:
            raise
        data = config.data
        raise WsssError(
            f"too little memory for {data.batch} images of {data.crop} x {data.crop} pixels a step, in {data.accumulate} forward "
            f"passes: {message}",
            hint=f"--set data.accumulate={2 * data.accumulate} needs less memory for the same result; or lower --crop or --batch",
        ) from None
