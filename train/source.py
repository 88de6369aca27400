"""What a training reads and where it writes: both are checked before it starts, and again when it continues."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StoreError, WsssError
from ..reading.documents import read_json
from ..store.decisions import exclusion
from .args import Config, deciding, of_this_version
from .checkpoint import BEST, LAST, write_json
from .dataset.masks import ValidationSet, is_label_store, survey_masks, survey_of
from .dataset.survey import Item, Survey, read_survey, write_survey
from .distributed import World
from .evaluate.photographs import folder_of_photographs
from .optimizer import is_constant

Log = Callable[[str], None]
CONFIG, SURVEY, VALIDATION = "config.json", "survey.json", "validation.json"
NAMED = 10
"""Classes listed in a warning."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Folders and images of a training."""

    store: Path
    images: Path
    out: Path
    survey: Survey
    training: tuple[Item, ...]
    held_out: tuple[Item, ...]
    """Images to validate on: a share of the store's, or those of a `ValidationSet`."""
    held_out_store: Path
    held_out_images: Path
    against: str
    """The labels of ``held_out``."""
    warnings: tuple[str, ...] = ()
    """Possible problems of the images, see `warnings_for`."""

    @property
    def validated(self) -> str:
        """What is validated on, for messages."""
        held_out = "images" if self.held_out_store != self.store else "held-out images"
        return f"{len(self.held_out)} {held_out}"


def checked_source(
    store: Path,
    images: Path,
    out: Path,
    config: Config,
    world: World,
    log: Log,
    classes: tuple[str, ...] | None,
    listed: Path | None,
    validation: ValidationSet | None,
    exclude: str | Path | None,
) -> Source:
    """Prepare the run's folder and survey the images, in the first process for all of them."""
    if world.is_first:
        prepare_folder(out, config)
        log(f"checking {store}")
        survey = survey_of(
            store,
            images,
            classes=classes,
            listed=listed,
            exclude=exclusion(exclude),
            log=log,
            confidence=config.loss.confidence == "pixel",
        )
        if survey.failed:
            log(f"{survey.failed} images of the store could not be labeled and are left out")
        if validation is not None:
            validated = _surveyed(validation, survey, log)
            write_survey(out / VALIDATION, validated)
            survey = dataclasses.replace(survey, digest=f"{survey.digest} {validated.digest}")
        write_survey(out / SURVEY, survey)
    world.wait()
    survey = read_survey(out / SURVEY)
    whose = "the store's labels" if is_label_store(store) else "the masks"
    if not is_label_store(store):
        images = folder_of_photographs(images)
    if validation is None:
        training, held_out = survey.split(config.data.validation_share, config.data.validation_limit)
        labels, photographs, against = store, images, whose
        log(f"{len(training)} images to train on, {len(held_out)} to validate, {len(survey.classes)} classes")
    else:
        training, held_out = survey.items, read_survey(out / VALIDATION).items
        labels, photographs = validation.labels, folder_of_photographs(validation.images)
        against = validation.against or f"the true labels of {validation.labels}"
        log(
            f"{len(training)} images to train on, all of them; {len(held_out)} to validate, against {against}; "
            f"{len(survey.classes)} classes"
        )
    check_labeled(store, training)
    warnings = warnings_for(survey.classes, training, held_out, config.data.validation_share)
    for warning in warnings:
        log(f"warning: {warning}")
    return Source(
        store=store,
        images=images,
        out=out,
        survey=survey,
        training=training,
        held_out=held_out,
        held_out_store=labels,
        held_out_images=photographs,
        against=against,
        warnings=warnings,
    )


def _surveyed(validation: ValidationSet, survey: Survey, log: Log) -> Survey:
    """The checked images of a validation set. Raises StoreError as `survey_masks`, or if they have no labeled pixel."""
    found = validation.survey or survey_masks(
        validation.labels,
        validation.images,
        survey.classes,
        listed=validation.listed,
        log=log,
        flags=("--val", "--val-list"),
        all_photographs=False,
    )
    if not any(any(item.pixels) for item in found.items):
        raise StoreError(
            f"--val {validation.labels}: its {len(found.items)} label maps have only void (255)", hint="are these true labels?"
        )
    trained_on = {item.sha256 for item in survey.items}
    if both := [item.path for item in found.items if item.sha256 in trained_on]:
        log(
            f"warning: {len(both)} of the {len(found.items)} images of --val are trained on too, for example {both[0]}: "
            "scores on them are too high"
        )
    return found


def check_labeled(store: Path, training: Sequence[Item]) -> None:
    """Raises StoreError if the training images have no labeled pixel, or only background."""
    pixels = [sum(counts) for counts in zip(*(item.pixels for item in training), strict=True)]
    if not any(pixels):
        raise StoreError(
            f"{store}: the {len(training)} training images have no labeled pixel: all are void (255)",
            hint="wsss report shows the labels; a binary mask needs the number of its class, not 255",
        )
    if not any(pixels[1:]):
        raise StoreError(
            f"{store}: the {len(training)} training images have only background, none of the {len(pixels) - 1} classes",
            hint="wsss report shows the labels; label with classes that occur in the photographs",
        )


def warnings_for(classes: Sequence[str], training: Sequence[Item], held_out: Sequence[Item], share: float) -> tuple[str, ...]:
    """Possible problems of the images of a training."""
    found = []
    if never := [name for label, name in enumerate(classes, 1) if not any(item.pixels[label] for item in training)]:
        more = f" and {len(never) - NAMED} more" if len(never) > NAMED else ""
        found.append(
            f"{len(never)} of {len(classes)} classes are in no training image and cannot be learned: "
            f"{', '.join(never[:NAMED])}{more}"
        )
    if empty := sum(not any(item.pixels) for item in training):
        found.append(f"{empty} of {len(training)} training images are entirely void (255) and have no effect")
    if share and not held_out:
        found.append(
            f"no image is held out (data.validation_share = {share:g} of {len(training)}): there is no validation, "
            "the last weights are used"
        )
    elif held_out and not any(any(item.pixels) for item in held_out):
        found.append(
            f"the {len(held_out)} held-out images have no labeled pixel: no validation is possible, the last weights are used"
        )
    return tuple(found)


def prepare_folder(out: Path, config: Config) -> None:
    """Create the run's folder, or check that it has this run."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / LAST).exists():
            was = read_json(out / CONFIG, hint="give a new --out")
            if not isinstance(was, dict):
                raise ValueError(f"expected the settings of a run, got {type(was).__name__}")
            _allow_more_steps(out, was, config)
            _check_same(out, was, deciding(config))
        elif not (out / CONFIG).exists() and any(not path.name.endswith(".tmp") for path in out.iterdir()):
            raise WsssError(f"--out {out}: the folder is not empty and has no training run", hint="give a new or empty folder")
        else:
            (out / BEST).unlink(missing_ok=True)  # of a training without a checkpoint
        write_json(out / CONFIG, dataclasses.asdict(config))
    except OSError as error:
        raise WsssError(f"--out {out}: cannot be written: {error.strerror}", hint="give a folder you may write to") from None
    except ValueError as error:
        raise WsssError(f"{out / CONFIG}: damaged: {error}", hint="give a new --out") from None


def _allow_more_steps(out: Path, was: dict[str, Any], config: Config) -> None:
    """Accept a larger number of steps in ``was``, the settings of a run, if its steps do not depend on that number.

    Raises:
        WsssError: other steps, and the rate or the attention masks depend on them; or fewer steps.
    """
    args = config.optimizer
    before = was["optimizer"].get("steps") if isinstance(was.get("optimizer"), dict) else None
    if not isinstance(before, int) or before == args.steps:
        return
    changed = f"--out {out}: was started with optimizer.steps = {before}, this run has {args.steps}"
    if not is_constant(args):
        raise WsssError(
            f"{changed}: its {args.schedule} schedule lowers the rate to zero at step {before}, so that no step is left to add",
            hint=f"--init {out} with a new --out trains on from its weights, with a schedule of its own; only a constant rate "
            "(--set optimizer.schedule=poly --set optimizer.power=0, from the start) can be continued to more steps",
        )
    if config.model.architecture == "eomt":
        raise WsssError(
            f"{changed}: its attention masks end at shares of the steps", hint=f"--init {out} with a new --out trains on"
        )
    if args.steps < before:
        raise WsssError(f"{changed}, which is fewer", hint=f"--steps {before} or more, or a new --out")
    was["optimizer"]["steps"] = args.steps


def _check_same(out: Path, was: dict[str, Any], now: dict[str, Any], prefix: str = "") -> None:
    """Raises WsssError, naming the first difference, unless a run's settings equal the current ones."""
    for key, value in now.items():
        before = of_this_version(f"{prefix}{key}", was.get(key))
        if isinstance(value, dict) and isinstance(before, dict):
            _check_same(out, before, value, f"{prefix}{key}.")
        elif before != value:
            raise WsssError(
                f"--out {out}: was started with {prefix}{key} = {json.dumps(before)}, this run has {json.dumps(value)}",
                hint="give a new --out, or the settings of its config.json",
            )
