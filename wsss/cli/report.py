"""``wsss report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..progress import end_progress
from .common import ImagesFlag, counter, images_folder, on_this_machine


def report(
    store: Annotated[str, typer.Argument(metavar="STORE", help="Label store.")],
    images: ImagesFlag = None,
    out: Annotated[
        str | None, typer.Option(help="HTML file; its thumbnails go beside it. Default: report.html in the store.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Largest number of images in the gallery, doubtful ones first.")] = 10_000,
    thumbnail_px: Annotated[int, typer.Option(min=32, max=2048, help="Longest side of the thumbnails.")] = 384,
) -> None:
    """Write an HTML page to review a label store with.

    It shows a summary, the classes, and every image under its label, doubtful ones first. Images can be accepted and rejected in
    it, and the decisions saved to a file for --exclude of wsss train, convert and label.
    """
    on_this_machine(("STORE", store), ("--images", images), ("--out", out))
    from ..runtime.report.page import write_report

    page = Path(out) if out else Path(store) / "report.html"
    write_report(
        Path(store),
        images_folder(store, images),
        page,
        limit=limit,
        thumbnail_px=thumbnail_px,
        progress=counter("thumbnails", every=10),
    )
    end_progress()
    typer.echo(str(page))
