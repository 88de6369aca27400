"""``wsss verify``."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import UsageError, WsssError
from ..extras import install_line, needs
from .common import JsonFlag, by_model, log

if TYPE_CHECKING:
    from ..benchmarks.rows_alone import RowsAlone
    from ..spec import Bundle, Flavour, Model


def verify(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="Folder of exported models, or 'mini'.")],
    weights: Annotated[list[str] | None, typer.Option(help="New location of weights that moved: MODEL=PATH.")] = None,
    engine: Annotated[
        Literal["auto", "ort", "openvino", "trt", "trt-rtx"],
        typer.Option(
            help="What is compared. auto: ONNX Runtime, the bundle's TensorRT engines that run here, and OpenVINO where it was "
            "compared before."
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N, for ONNX Runtime. TensorRT takes the same GPU.")] = "cpu",
    reference: Annotated[
        bool | None,
        typer.Option(help="Compare with PyTorch, or only each row with itself alone. Default: with PyTorch if it is installed."),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Run the parity gate again on a bundle's graphs.

    On a GPU also on its TensorRT engines. Prints the error of each output, batch size and row. Without PyTorch it checks hashes,
    inputs and outputs, and each row of a batch against the row alone.
    """
    from ..runtime.bundles import find_bundle

    opened = find_bundle(bundle)
    if reference is None:
        reference = importlib.util.find_spec("torch") is not None or engine != "auto" or device != "cpu"
    if not reference:
        _verify_rows(opened, json_output)
        return
    with needs("export"):
        from ..export.exporting import verify_model, verify_openvino, verify_plans
    given = by_model(weights or [], tuple(opened.models()))
    index = gpu_number(device)
    rows: list[dict[str, Any]] = []
    for name in opened.models():
        model = opened.model(name)
        reports = verify_model(model, given.get(name), log, device=device) if engine in ("auto", "ort") else {}
        for graph, parity in reports.items():
            rows += [{"model": name, "graph": graph, "engine": "ort", **dataclasses.asdict(row)} for row in parity.rows]
        if engine == "openvino" or (engine == "auto" and _was_compared(model)):
            for graph, parity in verify_openvino(model, given.get(name), log).items():
                rows += [{"model": name, "graph": graph, "engine": "openvino", **dataclasses.asdict(row)} for row in parity.rows]
        model = opened.model(name)
        for flavour in _flavours(model, engine, index):
            for graph, parity in verify_plans(model, flavour, given.get(name), log, device=index).items():
                rows += [{"model": name, "graph": graph, "engine": flavour, **dataclasses.asdict(row)} for row in parity.rows]
    if json_output:
        typer.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        typer.echo(
            f"{row['model'] + '/' + row['graph']:28} {row['engine']:8} {row['output']:10} batch {row['batch']:<3} "
            f"worst row {row['row']:<3} against {row['against']:9}  error {row['error']:.1e}"
        )
    typer.echo(f"{bundle}: {len({(row['model'], row['graph']) for row in rows})} graphs equal their reference")


def _verify_rows(bundle: Bundle, json_output: bool) -> None:
    """The checks that need no PyTorch, and what they leave out."""
    from ..benchmarks.rows_alone import check_rows, lines_of

    found: dict[str, RowsAlone] = {}
    for name in bundle.models():
        model = bundle.model(name)
        for graph, spec in model.manifest.graphs.items():
            if spec.precision == "bf16":
                log(f"{name}/{graph}: in bf16, which ONNX Runtime does not support; skipped")
                continue
            found[f"{name}/{graph}"] = check_rows(model, graph)
    if json_output:
        rows = [{"graph": graph, **dataclasses.asdict(each)} for graph, each in found.items()]
        typer.echo(json.dumps(rows, indent=1))
    else:
        for line in lines_of(found):
            typer.echo(line)
        typer.echo(f"{bundle.folder}: hashes, inputs and outputs of {len(found)} graphs are right, and their rows independent")
    log(f"not compared with PyTorch, which needs: {install_line('export')}")


def gpu_number(device: str) -> int:
    """The N of ``cuda:N``; 0 of ``cuda`` and ``cpu``. Raises UsageError for anything else."""
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and (kind == "cpu" or not number.isdecimal())):
        raise UsageError(f"--device: expected cpu, cuda or cuda:N, got {device!r}", hint="--device cuda:0")
    return int(number or 0)


def _was_compared(model: Model) -> bool:
    """Whether a model's graphs were compared in OpenVINO on a processor like this one, and OpenVINO is installed."""
    from ..engines.openvino import instructions

    if not any(instructions() in graph.openvino for graph in model.manifest.graphs.values()):
        return False
    if importlib.util.find_spec("openvino") is None:
        log(f"{model.manifest.family}: OpenVINO is skipped: it is not installed")
        return False
    return True


def _flavours(model: Model, engine: str, index: int) -> list[Flavour]:
    """The TensorRT flavours to verify: those that a model has engines of, and that run on GPU ``index``.

    Raises:
        WsssError: the flavour that was asked for has no engines, or cannot run here.
    """
    from ..engines.plan import MODULES, why_not_here

    found: list[Flavour] = []
    for flavour in MODULES:
        if engine not in ("auto", flavour):
            continue
        where = f"{model.manifest.family}: its {flavour} engines"
        if not any(graph.plan_for(flavour) for graph in model.manifest.graphs.values()):
            if engine == flavour:
                raise WsssError(f"{model.manifest.family}: has no {flavour} engines", hint=f"wsss export --engine {flavour}")
        elif reason := why_not_here(flavour, index):
            if engine == flavour:
                raise WsssError(f"{where} cannot run here: {reason}", hint="wsss doctor says what this machine can run")
            log(f"{where} are skipped: {reason}")
        else:
            found.append(flavour)
    return found
