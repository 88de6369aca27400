"""``wsss train``."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..extras import needs
from .common import JsonFlag, ask, clock, end_progress, log, on_this_machine

if TYPE_CHECKING:
    from ..train.loop import Status


def train(
    store: Annotated[str | None, typer.Argument(help="Label store to learn from.")] = None,
    images: Annotated[str | None, typer.Option(help="The folder its images are in.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder of the run, new or to go on with.")] = None,
    preset: Annotated[
        str, typer.Option(help="deeplabv2-voc, deeplabv2-coco, deeplabv3plus-voc, segformer, mask2former, or mini.")
    ] = "deeplabv3plus-voc",
    config: Annotated[str | None, typer.Option(help="TOML file of settings; what is typed wins over it.")] = None,
    init: Annotated[
        str | None, typer.Option(help="First weights: none, hub:NAME, a file, or another run; default: the preset's.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Updates of the weights.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images a step, over all GPUs together.")] = None,
    crop: Annotated[int | None, typer.Option(help="Side of the training crop in pixels.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides everything that is drawn by chance.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Any other setting; may be repeated.")
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Train a segmenter on a label store. Run it again to go on where it stopped; under torchrun, on several GPUs."""
    from ..train.args import config_from, read_config, typed
    from ..train.presets import preset as tables_of

    example = "wsss train store --images photos --out run"
    for flag, value in (("STORE", store), ("--images", images), ("--out", out)):
        if value is None:
            ask(flag, example)
    on_this_machine(("STORE", store), ("--images", images), ("--out", out))
    assert store is not None and images is not None and out is not None
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
    layers += [typed(each) for each in setting or ()]
    settings = config_from(*layers)
    with needs("train"):
        from ..train.loop import train as train_store

        try:
            result = train_store(Path(store), Path(images), Path(out), settings, log=_say, watch=_show)
        except KeyboardInterrupt:
            end_progress()
            log(f"interrupted; what is in {out} is whole. The same command goes on.")
            raise SystemExit(130) from None
    end_progress()
    if json_output:
        typer.echo(json.dumps(dataclasses.asdict(result), allow_nan=False))
        return
    best = ", no validation could score"
    if result.miou is not None:
        best = f", best mIoU {result.miou:.4f} at step {result.best_step} against the store's labels"
    typer.echo(f"{out}: {result.steps} steps on {result.images} images in {clock(result.seconds)}{best}\npage: {result.page}")


def _say(line: str) -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    log(line)


def _show(status: Status) -> None:
    """One line for each point of the curve, written over on a terminal."""
    line = f"step {status.step}/{status.steps}  loss {status.loss:.4f}  rate {status.rate:.2e}  {clock(status.seconds_left)} left"
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
    else:
        log(line)
