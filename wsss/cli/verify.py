"""``wsss verify``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..extras import needs
from .common import JsonFlag, by_model, log

if TYPE_CHECKING:
    from ..spec import Flavour, Model


def verify(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="Folder of exported models, or 'mini'.")],
    weights: Annotated[list[str] | None, typer.Option(help="New location of weights that moved: MODEL=PATH.")] = None,
    json_output: JsonFlag = False,
) -> None:
    """Run the parity gate again on a bundle's graphs.

    On a GPU also on its TensorRT engines. Prints the error of each output, batch size and row.
    """
    from ..runtime.labeler import MINI
    from ..spec import open_bundle

    opened = open_bundle(MINI if bundle == "mini" else Path(bundle))
    with needs("export"):
        from ..export.exporting import verify_model, verify_plans
    given = by_model(weights or [], tuple(opened.models()))
    rows: list[dict[str, Any]] = []
    for name in opened.models():
        model = opened.model(name)
        for graph, parity in verify_model(model, given.get(name), log).items():
            rows += [{"model": name, "graph": graph, "engine": "ort", **dataclasses.asdict(row)} for row in parity.rows]
        for flavour in _flavours(model):
            for graph, parity in verify_plans(model, flavour, given.get(name), log).items():
                rows += [{"model": name, "graph": graph, "engine": flavour, **dataclasses.asdict(row)} for row in parity.rows]
    if json_output:
        typer.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        typer.echo(
            f"{row['model'] + '/' + row['graph']:28} {row['engine']:7} {row['output']:10} batch {row['batch']:<3} "
            f"worst row {row['row']:<3} against {row['against']:9}  error {row['error']:.1e}"
        )
    typer.echo(f"{bundle}: {len({(row['model'], row['graph']) for row in rows})} graphs equal their reference")


def _flavours(model: Model) -> list[Flavour]:
    """The TensorRT flavours that a model has engines of, and that run on this machine's GPU."""
    from ..engines.plan import MODULES, why_not_here

    found: list[Flavour] = []
    for flavour in (each for each in MODULES if any(graph.plan_for(each) for graph in model.manifest.graphs.values())):
        if reason := why_not_here(flavour):
            log(f"{model.manifest.family}: its {flavour} engines are skipped: {reason}")
        else:
            found.append(flavour)
    return found
