"""``wsss demo``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..progress import end_progress
from .common import JsonFlag, show_progress


def demo(
    out: Annotated[str, typer.Option(help="Folder to write.")] = "demo",
    count: Annotated[int, typer.Option(min=1, help="Number of scenes to draw.")] = 40,
    engine: Annotated[Literal["auto", "ort", "eager"], typer.Option(help="What runs the graphs.")] = "ort",
    json_output: JsonFlag = False,
) -> None:
    """Label, score and report scenes with the embedded models."""
    from ..benchmarks.demo import run_demo

    result = run_demo(Path(out), count, engine, show_progress)
    end_progress()
    if json_output:
        typer.echo(json.dumps(result, indent=1))
        return
    typer.echo(
        f"{count} drawn scenes: mIoU {result['miou']:.3f}, label F1 {result['label_f1']:.3f}, "
        f"{result['images_per_second']:.1f} images/s "
        f"({', '.join(f'{stage} {seconds:.1f} s' for stage, seconds in result['stage_seconds'].items())})"
    )
    typer.echo(f"labels: {result['store']}\npage:   {result['page']}")
