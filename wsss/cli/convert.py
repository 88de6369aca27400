"""``wsss convert``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..progress import end_progress
from .common import ExcludeFlag, ImagesFlag, JsonFlag, counter, images_folder, log, on_this_machine

Format = Literal["voc", "coco", "yolo", "cvat", "label-studio", "hf"]
_NEXT = {
    "yolo": "yolo segment train data={out}/data.yaml",
    "cvat": "zip what is in {out} and import it as 'Segmentation mask 1.1'; the task needs the labels of labelmap.txt, void too",
    "label-studio": "set LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true and LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={out}, "
    "add {out}/images as local storage, paste config.xml as the labeling interface and import tasks.json",
    "hf": 'datasets.load_dataset("{out}")',
}
"""How to open the result in the tool, where that is not obvious."""


def convert(
    store: Annotated[str, typer.Argument(metavar="STORE", help="Label store.")],
    to: Annotated[Format, typer.Option(help="Format; hf is Hugging Face's imagefolder.")],
    images: ImagesFlag = None,
    *,
    out: Annotated[str, typer.Option(help="Folder to write: new or empty.")],
    link: Annotated[bool, typer.Option("--link", help="Make hard links to the images instead of copies.")] = False,
    val: Annotated[float, typer.Option(help="Share of the images, chosen by name, that goes into a split 'val'.")] = 0.0,
    simplify: Annotated[
        float, typer.Option(metavar="PIXELS", help="Polygons of yolo may be off by this much, for fewer corners.")
    ] = 0.0,
    exclude: ExcludeFlag = None,
    json_output: JsonFlag = False,
) -> None:
    """Convert a label store to the data set format of another tool.

    Reports what the format cannot represent. Names that a flat folder or a list cannot represent are percent-encoded: a/my
    dog.jpg becomes a%2Fmy%20dog.jpg.
    """
    from ..runtime.convert.dataset import convert as convert_store

    on_this_machine(("STORE", store), ("--images", images), ("--out", out))
    done = convert_store(
        Path(store),
        images_folder(store, images),
        Path(out),
        to,
        link=link,
        val=val,
        simplify_px=simplify,
        exclude=exclude,
        log=log,
        progress=counter("images", every=50),
    )
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
