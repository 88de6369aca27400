"""``wsss train``."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import UsageError
from ..extras import needs
from ..progress import end_progress, progress_line
from .common import ExcludeFlag, JsonFlag, clock, counter, images_folder, log, on_this_machine

if TYPE_CHECKING:
    from ..train.apply.self_train import Round
    from ..train.loop import Result, Status

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Preset = Literal["deeplabv2-voc", "deeplabv2-coco", "deeplabv3plus-voc", "segformer", "mask2former", "eomt", "mini"]


def train(
    store: Annotated[
        str,
        typer.Argument(metavar="STORE", help="Label store to train on, or a folder of masks: label PNGs, or VOC's layout."),
    ],
    images: Annotated[
        str | None,
        typer.Option(
            "--images",
            help="Folder of the photographs. Default: where the store's last run found them; JPEGImages in VOC's layout.",
        ),
    ] = None,
    *,
    out: Annotated[str, typer.Option(help="Folder of the run: a new one, or one to continue.")],
    classes: Annotated[
        str | None, typer.Option(help="For masks, names of labels 1, 2, ...: voc, coco, mini, a file, or names.")
    ] = None,
    names: Annotated[
        str | None, typer.Option("--list", metavar="FILE", help="Train only on the masks of this list, one name per line.")
    ] = None,
    val: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="IMAGES MASKS",
            help="Validate on these photographs and true masks. Default: on a share of the store, which is held out.",
        ),
    ] = None,
    val_list: Annotated[str | None, typer.Option(metavar="FILE", help="Validate only on the masks of this list.")] = None,
    rounds: Annotated[
        int,
        typer.Option(min=1, help="Self-training: trainings in all, each on the labels of the one before, in OUT/round-1, ..."),
    ] = 1,
    seeds: Annotated[
        int, typer.Option(min=1, help="Trainings from as many seeds, in OUT/seed-0, ...; their mean and deviation.")
    ] = 1,
    preset: Annotated[Preset, typer.Option(help="Architecture and schedule to start from.")] = "deeplabv3plus-voc",
    config: Annotated[str | None, typer.Option(help="TOML file of settings; typed flags take precedence.")] = None,
    init: Annotated[
        str | None, typer.Option(help="Initial weights: none, hub:NAME, a file, or another run. Default: the preset's.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images per step, over all GPUs together.")] = None,
    crop: Annotated[int | None, typer.Option(help="Side of the training crop in pixels.")] = None,
    precision: Annotated[Precision | None, typer.Option(help="Of the forward pass.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all random choices.")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"] | None, typer.Option(help="Where to train.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Any setting of the configuration; may be repeated."),
    ] = None,
    exclude: ExcludeFlag = None,
    json_output: JsonFlag = False,
) -> None:
    """Train a segmenter on a label store or masks.

    Run it again to continue where it stopped, or under torchrun for several GPUs.
    """
    from ..classes import check_label_map, parse_classes
    from ..train.args import config_from, read_config, typed
    from ..train.dataset.masks import ValidationSet
    from ..train.evaluate.report import table
    from ..train.presets import preset as tables_of

    on_this_machine(("STORE", store), ("--images", images), ("--out", out))
    if val_list and not val:
        raise UsageError("--val-list chooses masks of --val", hint="--val IMAGES MASKS; --list chooses masks to train on")
    if rounds > 1 and seeds > 1:
        raise UsageError("--rounds and --seeds: give one of them", hint="one --rounds for each --seed N, in its own --out")
    folder = _images(store, images)
    class_names = check_label_map(parse_classes(classes)).names if classes is not None else None
    flags: dict[str, Any] = {
        "model.init": init,
        "optimizer.steps": steps,
        "optimizer.precision": precision,
        "data.batch": batch,
        "data.crop": crop,
        "seed": seed,
        "machine.device": device,
    }
    layers = [tables_of(preset), read_config(Path(config)) if config else {}]
    layers += [typed(f"{key}={json.dumps(value)}") for key, value in flags.items() if value is not None]
    layers += map(typed, setting or ())
    settings = config_from(*layers)
    with needs("train"):
        from ..train.apply.seeds import spread, train_seeds
        from ..train.apply.self_train import self_train, side_by_side
        from ..train.loop import train as train_store

        validation = None
        if val:
            validation = ValidationSet(images=Path(val[0]), labels=Path(val[1]), listed=Path(val_list) if val_list else None)
        given: dict[str, Any] = {
            "classes": class_names,
            "listed": Path(names) if names else None,
            "validation": validation,
            "exclude": exclude,
            "log": log,
            "watch": _show,
        }
        done: tuple[Round, ...] = ()
        of_seeds: tuple[Result, ...] = ()
        try:
            if rounds > 1:
                done = self_train(
                    Path(store), folder, Path(out), settings, rounds=rounds, progress=counter("photographs"), **given
                )
                result = done[-1].result
            elif seeds > 1:
                of_seeds = train_seeds(Path(store), folder, Path(out), settings, seeds=seeds, **given)
                result = of_seeds[-1]
            else:
                result = train_store(Path(store), folder, Path(out), settings, **given)
        except KeyboardInterrupt:
            end_progress()
            log(f"interrupted; {out} is intact. Run the same command to continue.")
            raise SystemExit(130) from None
    end_progress()
    if json_output:
        several: dict[str, tuple[Round | Result, ...]] = {"rounds": done, "seeds": of_seeds}
        shown = {name: [dataclasses.asdict(each) for each in all_of] for name, all_of in several.items() if all_of}
        typer.echo(json.dumps(shown or dataclasses.asdict(result), allow_nan=False))
        return
    if of_seeds:
        typer.echo(f"{out}: {spread(of_seeds)}, against {result.against}")
        return
    if done:
        typer.echo(f"{out}: {rounds} rounds, against {result.against}\n\n{side_by_side(done)}\n\npage: {result.page}")
        return
    best = ", no validation could score"
    if result.miou is not None:
        best = f", best mIoU {result.miou:.4f} at step {result.best_step} against {result.against}"
    if val and result.scores is not None:
        best += f"\n\n{table(result.scores)}\n"
    typer.echo(f"{out}: {result.steps} steps on {result.images} images in {clock(result.seconds)}{best}\npage: {result.page}")


def _images(store: str, images: str | None) -> Path:
    """The folder of the photographs. Raises UsageError for masks whose photographs are not given."""
    from ..train.dataset.masks import is_label_store
    from ..train.evaluate.files import VOC_FOLDERS
    from ..train.evaluate.photographs import VOC_PHOTOGRAPHS

    folder = Path(store)
    if images is not None or is_label_store(folder) or not folder.is_dir():
        return images_folder(store, images)
    for root in (folder, *([folder.absolute().parent] if folder.absolute().name in VOC_FOLDERS else [])):
        if (root / VOC_PHOTOGRAPHS).is_dir():
            return root
    raise UsageError(
        f"{store}: expected a label store (with run.json), or --images for a folder of masks",
        hint="wsss train MASKS --images PHOTOGRAPHS --classes voc --out run",
    )


def _show(status: Status) -> None:
    """Show a point of the curve: as the progress line on a terminal, otherwise as a log line."""
    line = f"step {status.step}/{status.steps}  loss {status.loss:.4f}  rate {status.rate:.2e}  {clock(status.seconds_left)} left"
    (progress_line if sys.stderr.isatty() else log)(line)
