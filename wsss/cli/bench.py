"""``wsss bench``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .common import JsonFlag, log


def bench(
    bundle: Annotated[
        str, typer.Option(help="Folder of exported models, or 'mini' for the small ones that come with wsss.")
    ] = "mini",
    engine: Annotated[str, typer.Option(help="auto, ort, trt, trt-rtx or eager.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    model: Annotated[
        list[str] | None, typer.Option(help="Only the graphs of this model; may be repeated. Leaves out the chain.")
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Entries of a call; may be repeated. Default: 1 and each graph's usual number."),
    ] = None,
    images: Annotated[str | None, typer.Option(help="Photographs for the chain; default: drawn scenes.")] = None,
    classes: Annotated[str | None, typer.Option(help="Of the chain; default: voc for --images, mini for drawn scenes.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Images that the chain is timed on.")] = 24,
    boxes: Annotated[
        int | None, typer.Option(min=1, help="Boxes in each image, in the place of those found: the load of trained weights.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time for each graph and batch size.")] = 0.3,
    reference: Annotated[
        str | None, typer.Option(help="Bundle of FP32 graphs of the same weights, to compare labels with.")
    ] = None,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Time TensorRT engines that were not compared with PyTorch.")
    ] = False,
    json_output: JsonFlag = False,
    csv: Annotated[str | None, typer.Option(metavar="FILE", help="Add a row for each measurement to this file.")] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE.png", help="Draw images a second, and the bound.")] = None,
) -> None:
    """Time each graph and the whole chain, beside what this machine could do at best. Loading and warm-up do not count."""
    from ..benchmarks.bench import BenchOptions, append_csv, run_bench, table
    from ..benchmarks.plot import write_plot
    from ..runtime.labeler import MINI

    if plot is not None and Path(plot).suffix.lower() != ".png":
        raise UsageError(f"--plot {plot}: expected a .png file")
    report = run_bench(
        BenchOptions(
            bundle=MINI if bundle == "mini" else Path(bundle),
            engine=engine,
            device=device,
            models=tuple(model or ()),
            batches=tuple(batch or ()),
            images=None if images is None else Path(images),
            classes=classes,
            count=count,
            boxes=boxes,
            seconds=seconds,
            reference=None if reference is None else Path(reference),
            unverified=unverified,
        ),
        log,
    )
    if csv is not None:
        log(f"{csv}: {append_csv(Path(csv), report)} rows added")
    if plot is not None:
        write_plot(Path(plot), report)
        log(plot)
    if json_output:
        typer.echo(json.dumps(report, indent=1))
        return
    for line in table(report):
        typer.echo(line)
