"""``wsss train``."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..extras import needs
from ..progress import end_progress, progress_line
from .common import ExcludeFlag, ImagesFlag, JsonFlag, clock, images_folder, log, on_this_machine

if TYPE_CHECKING:
    from ..train.loop import Status

Preset = Literal["deeplabv2-voc", "deeplabv2-coco", "deeplabv3plus-voc", "segformer", "mask2former", "mini"]


def train(
    store: Annotated[str, typer.Argument(metavar="STORE", help="Label store to train on.")],
    images: ImagesFlag = None,
    *,
    out: Annotated[str, typer.Option(help="Folder of the run: a new one, or one to continue.")],
    preset: Annotated[Preset, typer.Option(help="Architecture and schedule to start from.")] = "deeplabv3plus-voc",
    config: Annotated[str | None, typer.Option(help="TOML file of settings; typed flags take precedence.")] = None,
    init: Annotated[
        str | None, typer.Option(help="Initial weights: none, hub:NAME, a file, or another run. Default: the preset's.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images per step, over all GPUs together.")] = None,
    crop: Annotated[int | None, typer.Option(help="Side of the training crop in pixels.")] = None,
    precision: Annotated[Literal["fp32", "bf16", "fp16"] | None, typer.Option(help="Of the forward pass.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all random choices.")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"] | None, typer.Option(help="Where to train.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Any setting of the configuration; may be repeated."),
    ] = None,
    exclude: ExcludeFlag = None,
    json_output: JsonFlag = False,
) -> None:
    """Train a segmenter on a label store. Run it again to continue where it stopped, or under torchrun for several GPUs."""
    from ..train.args import config_from, read_config, typed
    from ..train.presets import preset as tables_of

    on_this_machine(("STORE", store), ("--images", images), ("--out", out))
    folder = images_folder(store, images)
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
        from ..train.loop import train as train_store

        try:
            result = train_store(Path(store), folder, Path(out), settings, exclude=exclude, log=log, watch=_show)
        except KeyboardInterrupt:
            end_progress()
            log(f"interrupted; {out} is intact. Run the same command to continue.")
            raise SystemExit(130) from None
    end_progress()
    if json_output:
        typer.echo(json.dumps(dataclasses.asdict(result), allow_nan=False))
        return
    best = ", no validation could score"
    if result.miou is not None:
        best = f", best mIoU {result.miou:.4f} at step {result.best_step} against the store's labels"
    typer.echo(f"{out}: {result.steps} steps on {result.images} images in {clock(result.seconds)}{best}\npage: {result.page}")


def _show(status: Status) -> None:
    """Show a point of the curve: as the progress line on a terminal, otherwise as a log line."""
    line = f"step {status.step}/{status.steps}  loss {status.loss:.4f}  rate {status.rate:.2e}  {clock(status.seconds_left)} left"
    (progress_line if sys.stderr.isatty() else log)(line)
