"""``wsss models``."""

from __future__ import annotations

import dataclasses
import json

import typer

from .common import JsonFlag


def models(json_output: JsonFlag = False) -> None:
    """List the models with official weights: size, work an image, license, source, and what was measured of each.

    fp32 and fp16: compared with the official module on photographs; trt-rtx: engines built. The figures are in --json.
    """
    from ..export.catalog import ENTRIES

    if json_output:
        rows = [{**dataclasses.asdict(entry), "proven": entry.proven()} for entry in ENTRIES]
        typer.echo(json.dumps(rows, indent=1))
        return
    head = ("finds", "--model", "--variant", "parameters", "work", "license", "weights of", "measured")
    lines = [head]
    for entry in ENTRIES:
        size, work = f"{entry.parameters:.0f} M", f"{entry.work:.0f} GMAC"
        proven = ", ".join(entry.proven()) or "-"
        if entry.same_network and proven != "-":
            proven += f" (as {entry.same_network})"
        lines.append((entry.role, entry.model, entry.variant, size, work, entry.license, entry.publisher, proven))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
