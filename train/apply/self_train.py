"""Self-training: train, label the training images with the result, train on these labels, and so on.

    OUT/round-1/run        a run on the given labels
    OUT/round-1/labels     a label store: its predictions for the images it was trained on
    OUT/round-2/run        a run on these, from the initial weights of the settings again
    OUT/rounds.json        the scores of all rounds

Every round is scored against the same labels: those of a validation set, or those that round 1 held out. Images that round 1
held out are neither labeled nor trained on in any round. Each step continues where it was stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import UsageError, WsssError
from ...files import write_atomically
from ..args import Config
from ..dataset.masks import ValidationSet, is_label_store
from ..dataset.survey import read_survey
from ..evaluate.photographs import folder_of_photographs
from ..loop import Result, Status, train
from ..source import SURVEY, Log
from .inference import Inference
from .label_photographs import Progress, label_photographs
from .predictor import Predictor

ROUNDS = "rounds.json"


@dataclass(frozen=True, kw_only=True)
class Round:
    """One training of a self-training."""

    number: int
    labels: str
    """The labels it was trained on."""
    result: Result


def self_train(
    store: Path,
    images: Path,
    out: Path,
    config: Config,
    *,
    rounds: int,
    classes: tuple[str, ...] | None = None,
    listed: Path | None = None,
    validation: ValidationSet | None = None,
    exclude: str | Path | None = None,
    log: Log = lambda line: None,
    watch: Callable[[Status], None] = lambda status: None,
    progress: Progress = lambda done, of: None,
) -> tuple[Round, ...]:
    """Train ``rounds`` times, each time but the first on the labels of the round before, or continue where that stopped.

    The labels are whole photographs at one scale, every pixel a class; a class's mean confidence in an image weights the loss, as
    ``loss.confidence`` says.

    Args:
        rounds: number of trainings; a larger number than before continues.
        store, images, out, config, classes, listed, validation, exclude, log, watch: as of `train`; ``out`` has the rounds.
        progress: called with the numbers of done and of all images while a round labels them.

    Raises:
        UsageError: more than one process (torchrun). WsssError: as `train`, or ``out`` holds something else.
    """
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise UsageError(
            "--rounds runs in one process, torchrun started several",
            hint="train each round under torchrun, and label with wsss label --model segmenter in between",
        )
    if out.is_dir() and any(out.iterdir()) and not (out / "round-1").is_dir():
        raise WsssError(f"--out {out}: the folder is not empty and has no rounds", hint="give a new or empty folder")
    photographs = images if is_label_store(store) else folder_of_photographs(images)
    done: list[Round] = []
    names: list[str] = []
    for number in range(1, rounds + 1):
        folder = out / f"round-{number}"
        log(f"round {number} of {rounds}: {folder}")
        if number == 1:
            result = train(
                store,
                images,
                folder / "run",
                config,
                classes=classes,
                listed=listed,
                validation=validation,
                exclude=exclude,
                log=log,
                watch=watch,
            )
            names, validation = _split(store, photographs, folder / "run", config, validation)
            source = store
        else:
            source = out / f"round-{number - 1}" / "labels"
            result = train(source, photographs, folder / "run", config, validation=validation, log=log, watch=watch)
        done.append(Round(number=number, labels=str(source), result=result))
        _write(out, done)
        if number < rounds:
            device = config.machine.device
            predictor = Predictor(folder / "run", Inference(), device=device, precision=config.optimizer.precision)
            labeled = label_photographs(predictor, photographs, names, folder / "labels", log=log, progress=progress)
            log(f"{folder / 'labels'}: {labeled.labeled} labeled, {labeled.skipped} done before, {labeled.failed} failed")
    return tuple(done)


def _split(
    store: Path, photographs: Path, run: Path, config: Config, validation: ValidationSet | None
) -> tuple[list[str], ValidationSet | None]:
    """The photographs that round 1 trained on, and what all later rounds are scored on; None if nothing was held out."""
    survey = read_survey(run / SURVEY)
    if validation is not None:
        return [item.path for item in survey.items], validation
    training, held_out = survey.split(config.data.validation_share, config.data.validation_limit)
    later = None
    if held_out:
        kept = dataclasses.replace(survey, items=held_out, digest=f"{survey.digest} held out")
        against = "the store's labels" if is_label_store(store) else "the masks"
        later = ValidationSet(images=photographs, labels=store, survey=kept, against=against)
    return [item.path for item in training], later


def _write(out: Path, rounds: Sequence[Round]) -> None:
    content = json.dumps([dataclasses.asdict(each) for each in rounds], indent=1, allow_nan=False) + "\n"
    write_atomically(out / ROUNDS, content.encode())


def side_by_side(rounds: Sequence[Round]) -> str:
    """The IoU of every class in every round, in percent, as a table."""
    scores = [each.result.scores for each in rounds]
    first = next((each for each in scores if each is not None), None)
    if first is None:
        return "no validation could score"
    rows = [["IoU %", *(f"round {each.number}" for each in rounds)]]
    for number, row in enumerate(first["classes"]):
        rows.append([row["name"], *(_percent(None if each is None else each["classes"][number]["iou"]) for each in scores)])
    rows.append(["mean", *(_percent(None if each is None else each["miou"]) for each in scores)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))])
        for name, *cells in rows
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
