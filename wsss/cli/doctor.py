"""``wsss doctor`` and ``wsss models``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from ..extras import install_line
from .common import JsonFlag

if TYPE_CHECKING:
    from ..engines.machine import Machine


def doctor(json_output: JsonFlag = False) -> None:
    """Report what this machine can build and run.

    Lists GPUs, driver, libraries and extras, and the command that installs what is missing.
    """
    from ..engines.machine import machine

    found = machine()
    if json_output:
        typer.echo(json.dumps(dataclasses.asdict(found), indent=1))
        return
    for line in lines_of(found):
        typer.echo(line)


def lines_of(found: Machine) -> Iterator[str]:
    """Yield the lines of the report."""
    yield f"machine    {found.system}, {found.processor}, {found.cores} cores, {found.memory_mib >> 10} GB, Python {found.python}"
    for gpu in found.gpus:
        power = f", {gpu.power_limit_w:.0f} W" if gpu.power_limit_w else ""
        yield f"GPU {gpu.index}      {gpu.name}, {gpu.target}, {gpu.memory_mib} MiB{power}"
    if not found.gpus:
        yield "GPU        none"
    yield f"driver     {found.driver or 'none found'}, CUDA up to {found.cuda}" if found.cuda else "driver     none found"
    yield f"packages   {', '.join(f'{name} {version}' for name, version in found.packages.items()) or 'none'}"
    if "torch" in found.packages:
        yield f"torch      built for {f'CUDA {found.torch_cuda}' if found.torch_cuda else 'the CPU'}"
    yield f"providers  {', '.join(found.providers) or 'none'} (ONNX Runtime)"
    if found.cpu_bf16 is not None:
        yield f"bf16       {'yes' if found.cpu_bf16 else 'no'}, on the CPU (OpenVINO)"
    for flavour, library in found.tensorrt.items():
        knows = f", builds for {', '.join(library.capabilities)}" if library.capabilities else ""
        yield f"{flavour:10} {library.version}{knows}"
    for extra, lacks in found.extras.items():
        alternative = extra.endswith("-cu12") or (extra in ("cpu", "gpu") and found.providers)
        if lacks and not alternative:
            yield f"extra      {extra}: lacks {', '.join(lacks)}   {install_line(extra)}"
    for trouble in found.troubles:
        yield f"trouble    {trouble}"
    yield ""
    yield f"{'engine':9} {'on':5} {'builds':7} runs"
    for each in found.abilities:
        builds = "yes" if each.builds else "no" if each.engine.startswith("trt") else "-"
        yield f"{each.engine:9} {each.device:5} {builds:7} {'yes' if each.runs else 'no':4} {each.why}".rstrip()
        if each.fix:
            yield f"{'':28} {each.fix}"


def models(json_output: JsonFlag = False) -> None:
    """List the models with official weights.

    Size, work an image, license, source, and what was measured: fp32 and fp16 against the official module on photographs, trt-rtx
    engines built. The figures are in --json.
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
        measured = {
            kind: f" at {figures['side_px']} px" if "side_px" in figures else "" for kind, figures in entry.proven().items()
        }
        proven = ", ".join(kind + smaller for kind, smaller in measured.items()) or "-"
        if entry.same_network and proven != "-":
            proven += f" (as {entry.same_network})"
        lines.append((entry.role, entry.model, entry.variant, size, work, entry.license, entry.publisher, proven))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
