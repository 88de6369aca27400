"""``wsss correct``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..progress import end_progress, progress_line
from .common import log, on_this_machine


def correct(
    store: Annotated[str, typer.Argument(metavar="STORE", help="Label store.")],
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="COCO's instances, Label Studio's JSON export, or a folder of CVAT's or VOC's segmentation masks.",
        ),
    ],
) -> None:
    """Put corrected masks of an annotation tool into a label store.

    Takes what wsss convert wrote and a tool changed. Labels that differ are replaced, and later runs of wsss label keep them.
    """
    from ..runtime.convert.corrections import correct_store

    on_this_machine(("STORE", store), ("FILE", source))
    done = correct_store(Path(store), Path(source), progress=lambda images: progress_line(f"{images} images"))
    end_progress()
    if done.unknown:
        log(f"not in the store: {len(done.unknown)} images of {source}, for example {done.unknown[0]}")
    typer.echo(f"{store}: {done.corrected} labels corrected, {done.unchanged} unchanged")
