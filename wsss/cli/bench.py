"""``wsss bench``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .common import Engine, JsonFlag, log


def bench(
    bundle: Annotated[
        str, typer.Option(help="Folder of exported models, or 'mini' for the small ones that come with wsss.")
    ] = "mini",
    engine: Annotated[
        Engine,
        typer.Option(help="What runs the graphs. auto: as in wsss label."),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    model: Annotated[
        list[str] | None, typer.Option(help="Time only the graphs of this model, not the chain; may be repeated.")
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Batch size; may be repeated. Default: 1 and the usual one of each graph."),
    ] = None,
    images: Annotated[str | None, typer.Option(help="Folder of photographs for the chain; default: drawn scenes.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="Classes for the chain; default: voc with --images, otherwise mini.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images to time the chain on.")] = 24,
    boxes: Annotated[
        int | None, typer.Option(min=1, help="Replace the detected boxes by this many per image: the load with trained weights.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Seconds to measure each graph and batch size.")] = 0.3,
    reference: Annotated[
        str | None, typer.Option(help="Compare labels with those of this FP32 bundle of the same weights.")
    ] = None,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Also time TensorRT engines that were not verified against PyTorch.")
    ] = False,
    layers: Annotated[
        bool,
        typer.Option("--layers", help="Time nothing; list what TensorRT-RTX compiles each graph to, which needs no GPU."),
    ] = False,
    scaling: Annotated[
        bool,
        typer.Option(
            "--scaling",
            help="Time the chain alone, over batch, boxes, classes, sizes, empty photographs and processes; --count images each.",
        ),
    ] = False,
    json_output: JsonFlag = False,
    csv: Annotated[str | None, typer.Option(metavar="FILE", help="Append a row per measurement to this file.")] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE.png", help="Plot images per second and the bound.")] = None,
) -> None:
    """Time each graph and the chain, next to the hardware's bound.

    Loading and warm-up are not timed.
    """
    from ..benchmarks.bench import BenchOptions, append_csv, run_bench, table
    from ..benchmarks.plot import write_plot
    from ..runtime.bundles import bundle_folder

    if layers:
        _list_layers(bundle_folder(bundle), model or (), max(batch) if batch else None, json_output)
        return
    if plot is not None and Path(plot).suffix.lower() != ".png":
        raise UsageError(f"--plot {plot}: expected a .png file")
    if scaling:
        others = {"--model": model, "--batch": batch, "--images": images, "--classes": classes, "--boxes": boxes, "--csv": csv}
        if used := [flag for flag, value in others.items() if value]:
            raise UsageError(f"--scaling: {', '.join(used)} cannot be used with it", hint="it draws its photographs and loads")
        _measure_scaling(bundle_folder(bundle), engine, device, count, json_output, None if plot is None else Path(plot))
        return
    report = run_bench(
        BenchOptions(
            bundle=bundle_folder(bundle),
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


def _measure_scaling(bundle: Path, engine: str, device: str, count: int, json_output: bool, plot: Path | None) -> None:
    from ..benchmarks.plot import write_curves
    from ..benchmarks.scaling import measure_scaling, scaling_table

    report = measure_scaling(bundle, engine=engine, device=device, count=count, log=log)
    if plot is not None:
        write_curves(plot, report)
        log(str(plot))
    typer.echo(json.dumps(report, indent=1) if json_output else "\n".join(scaling_table(report)))


def _list_layers(bundle: Path, models: Sequence[str], rows: int | None, json_output: bool) -> None:
    from ..benchmarks.compiled import compiled, lines_of
    from ..spec import open_bundle

    opened, found = open_bundle(bundle), {}
    if unknown := set(models) - set(opened.models()):
        raise UsageError(f"--model {', '.join(sorted(unknown))}: {bundle} has {', '.join(opened.models())}")
    for name in models or opened.models():
        model = opened.model(name)
        for graph in model.manifest.graphs:
            found[f"{name}/{graph}"] = each = compiled(model, graph, rows)
            if not json_output:
                typer.echo("\n".join(lines_of(f"{name}/{graph}", each)))
    if json_output:
        typer.echo(json.dumps({name: dataclasses.asdict(each) for name, each in found.items()}, indent=1))
