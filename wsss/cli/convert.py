"""``wsss convert``."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..extras import needs
from .common import JsonFlag, ask, choice, end_progress, log, on_this_machine

_NEXT = {
    "yolo": "yolo segment train data={out}/data.yaml",
    "cvat": "zip what is in {out} and import it as 'Segmentation mask 1.1'; the task needs the labels of labelmap.txt, void too",
    "label-studio": "set LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true and LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={out}, "
    "add {out}/images as local storage, paste config.xml as the labeling interface and import tasks.json",
    "hf": 'datasets.load_dataset("{out}")',
}
"""How the tool opens it, where that is not plain."""


def convert(
    store: Annotated[str, typer.Argument(help="Label store.")],
    to: Annotated[str | None, typer.Option(help="voc, coco, yolo, cvat, label-studio or hf (Hugging Face imagefolder).")] = None,
    images: Annotated[str | None, typer.Option(help="The folder its images are in; its files are not changed.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder to write: new or empty.")] = None,
    link: Annotated[bool, typer.Option("--link", help="Hard links to the images instead of copies.")] = False,
    val: Annotated[float, typer.Option(help="Share of the images that goes into a split 'val', chosen by name.")] = 0.0,
    json_output: JsonFlag = False,
) -> None:
    """Write a label store as a data set of another tool; what its format cannot hold is said.

    Names that a flat folder or a list cannot hold are percent-encoded: a/my dog.jpg is a%2Fmy%20dog.jpg.
    """
    for flag, value in (("--to", to), ("--images", images), ("--out", out)):
        if value is None:
            ask(flag, "wsss convert store --to coco --images photos --out coco")
    from ..runtime.convert.dataset import FORMATS, writer_of
    from ..runtime.convert.dataset import convert as convert_store

    choice("--to", to, FORMATS)
    on_this_machine(("STORE", store), ("--images", images), ("--out", out))
    assert to is not None and images is not None and out is not None
    with needs("formats"):
        writer_of(to)
    done = convert_store(Path(store), Path(images), Path(out), to, link=link, val=val, progress=_show)
    end_progress()
    if json_output:
        typer.echo(json.dumps({"out": out, "format": to, **dataclasses.asdict(done)}))
        return
    if done.left_out:
        log(f"left out: {done.left_out} images that failed and have no label")
    for loss in done.losses:
        log(f"note: {loss}")
    if to in _NEXT:
        log("next: " + _NEXT[to].format(out=Path(out).resolve()))
    typer.echo(f"{out}: {done.images} images as {to}")


def _show(done: int, total: int) -> None:
    if sys.stderr.isatty() and (done % 50 == 0 or done == total):
        print(f"\r\x1b[K{done}/{total} images", end="", file=sys.stderr, flush=True)
