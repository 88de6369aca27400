"""``wsss report``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .common import end_progress, on_this_machine


def report(
    store: Annotated[str, typer.Argument(help="Label store.")],
    images: Annotated[str, typer.Option(help="The folder its images are in.")],
    out: Annotated[
        str | None, typer.Option(help="HTML file; default: report.html in the store. Its pictures go beside it.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most this many images in the gallery, doubtful ones first.")] = 10_000,
    thumbnail_px: Annotated[int, typer.Option(min=32, max=2048, help="Longest side of the gallery's pictures.")] = 384,
) -> None:
    """One HTML page to review a store with: summary, classes, every image under its label, doubtful ones first."""
    on_this_machine(("STORE", store), ("--images", images), ("--out", out))
    from ..runtime.report.page import write_report

    page = Path(out) if out else Path(store) / "report.html"
    write_report(Path(store), Path(images), page, limit=limit, thumbnail_px=thumbnail_px, progress=_show_thumbnails)
    end_progress()
    typer.echo(str(page))


def _show_thumbnails(done: int, total: int) -> None:
    if sys.stderr.isatty() and (done % 10 == 0 or done == total):
        print(f"\r\x1b[K{done}/{total} thumbnails", end="", file=sys.stderr, flush=True)
