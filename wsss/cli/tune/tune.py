"""``wsss tune``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...progress import end_progress
from ..common import BundleFlag, Engine, JsonFlag, counter, log
from ..config import FILE, write_values
from .labeled import FoldsFlag, ListFlag, PhotosArgument, evidence_of, labeled_photographs

if TYPE_CHECKING:
    from ...runtime.tune.tune import Tuned, Worth

NAMES = (
    "tag_threshold",
    "views",
    "score_rule",
    "box_threshold",
    "nms",
    "nms_across",
    "enclosing",
    "tiles",
    "margin",
    "quality_exponent",
    "stability_exponent",
)
"""The flags of ``wsss label`` that are written."""


def tune(
    photos: PhotosArgument,
    truth: Annotated[str, typer.Argument(metavar="TRUTH", help="True label maps of some of them, as wsss eval takes them.")],
    classes: Annotated[str, typer.Option(help='voc, coco, mini, a file, or names: "dog, potted plant".')],
    bundle: BundleFlag = "bundle",
    engine: Annotated[Engine, typer.Option(help="What runs the graphs, as for wsss label.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    labels: Annotated[str | None, typer.Option(help="JSON file of the classes of each image; replaces CLIP.")] = None,
    views: Annotated[int | None, typer.Option(metavar="K", help="CLIP's views, as for wsss label.")] = None,
    tiles: Annotated[int, typer.Option(metavar="K", help="Detect in K x K overlapping tiles too, as wsss label does.")] = 1,
    names: ListFlag = None,
    folds: FoldsFlag = 5,
    out: Annotated[str, typer.Option(help="File that gets the settings, for wsss label in its folder.")] = FILE,
    json_output: JsonFlag = False,
) -> None:
    """Find the settings that fit labeled photographs best.

    The models run once. What they found is decided again for hundreds of settings, by mIoU. Never tune on the photographs that
    you report a score of.
    """
    from ...classes import parse_classes
    from ...runtime.chain import Chain, Rules
    from ...runtime.tune.tune import tune as search

    known = parse_classes(classes)
    labeled = labeled_photographs(photos, truth, names, known.names)
    chain = Chain.open(bundle, classes=known, engine=engine, device=device, labels=labels, rules=Rules(views=views, tiles=tiles))
    log(f"engine {chain.settings['engine']}, {len(known)} classes, {len(labeled.names)} photographs")
    result = search(evidence_of(chain, labeled), folds=folds, progress=counter("searches"))
    end_progress()
    values = {name: value for name in NAMES if (value := getattr(result.rules, name)) is not None}
    if labels:
        values.pop("tag_threshold", None)
    if not result.kept_default:
        write_values(Path(out), "label", values)
    if json_output:
        typer.echo(json.dumps({**_document(result), "written": None if result.kept_default else out}, allow_nan=False))
        return
    typer.echo(_table(result))
    if result.kept_default:
        typer.echo(f"\nNothing was better than the defaults on photographs left out of the search; {out} is unchanged.")
    else:
        typer.echo(f"\n{out}: {', '.join(f'{name} {_shown(value)}' for name, value in values.items())}")


def _document(result: Tuned) -> dict[str, Any]:
    document = dataclasses.asdict(result)
    for name in ("default", "rules"):
        document[name] = {key: document[name][key] for key in NAMES if document[name][key] is not None}
    return document


def _table(result: Tuned) -> str:
    lines = [
        f"{result.photographs} photographs, {result.settings} settings",
        "",
        f"mIoU of the defaults                       {result.default_miou:.4f}",
        f"of settings found without the photograph   {result.held_out_miou:.4f}   {result.held_out}",
        f"of the settings found on all of them       {result.miou:.4f}",
        "",
        "setting                          chosen        against       mIoU (95 % interval)",
    ]
    return "\n".join([*lines, *map(_row, result.worth)])


def _row(worth: Worth) -> str:
    name, chosen, other = " ".join(worth.names), " ".join(map(_shown, worth.chosen)), " ".join(map(_shown, worth.other))
    return f"{name:32} {chosen:13} {other:13} {worth.difference}"


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
