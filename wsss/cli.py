"""The command line. Verbs in data-flow order; each body builds a spec, calls one function and prints a summary."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from . import __version__
from .config import FILE, read_defaults
from .errors import UsageError, WsssError

if TYPE_CHECKING:
    from .runtime.run import Summary

app = typer.Typer(
    help="Photographs and a class list in, semantic-segmentation pseudo-labels out. No annotation needed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# mypy and typer both read these: a flag's help stands once, beside its name.
BundleFlag = Annotated[
    str, typer.Option("--bundle", help="Folder of exported models, or 'mini' for the small ones that come with wsss.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"wsss {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    commands: dict[str, Any] = getattr(context.command, "commands", {})
    params = {name: {param.opts[0].lstrip("-"): param for param in command.params} for name, command in commands.items()}
    flags = {name: {flag: str(param.name) for flag, param in told.items()} for name, told in params.items()}
    context.default_map = defaults = read_defaults(Path(FILE), flags)
    for name, values in defaults.items():
        for param in params[name].values():
            value = values.get(str(param.name))
            if getattr(param, "multiple", False) and isinstance(value, str):  # one --weights; click would take its letters
                values[str(param.name)] = [value]


@app.command()
def export(
    model: Annotated[str | None, typer.Option(help="clip, grounding-dino, sam, or all.")] = None,
    variant: Annotated[
        str | None, typer.Option(help="Architecture, for example vit_h, swin_b, ViT-L-14; default: the model's usual one.")
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(help="File, folder, known name or random:SEED; MODEL=... for several models. Default: the official ones."),
    ] = None,
    bundle: Annotated[str, typer.Option(help="Folder to export into.")] = "bundle",
    precision: Annotated[str, typer.Option(help="fp32.")] = "fp32",
    engine: Annotated[str, typer.Option(help="onnx.")] = "onnx",
    batch: Annotated[
        tuple[int, int, int] | None, typer.Option(metavar="MIN OPT MAX", help="Images (boxes, phrases) per call.")
    ] = None,
    size: Annotated[list[str] | None, typer.Option(metavar="HxW", help="Canvas of Grounding-DINO; may be repeated.")] = None,
) -> None:
    """Turn official checkpoints into ONNX graphs, each proven against the official implementation."""
    from .spec import MODELS, AxisRange

    _choice("--precision", precision, ("fp32",))
    _choice("--engine", engine, ("onnx",))
    if model is None:
        _ask("--model", "wsss export --model sam")
    _choice("--model", model, (*MODELS, "all"))
    names = MODELS if model == "all" else (model,)
    with _needs("export"):
        from .export.exporting import export_model
        from .export.family import Options, family

    options = Options(batch=AxisRange(*batch) if batch else None, sizes=tuple(_size(each) for each in size or ()))
    given = _by_model(weights or [], names)
    for name in names:
        chosen = family(name)
        kind = variant or chosen.default
        start = time.perf_counter()
        manifest = export_model(
            chosen,
            variant=kind,
            weights=given.get(name, chosen.official(kind)),
            bundle=Path(bundle),
            options=options,
            log=_log,
        )
        rows = [row for graph in manifest.graphs.values() if graph.parity for row in graph.parity.rows]
        worst = max((row.error for row in rows), default=0.0)
        typer.echo(
            f"{Path(bundle) / name}: {kind}, {len(manifest.graphs)} graphs, "
            f"worst relative error against the official module {worst:.1e}, {time.perf_counter() - start:.0f} s"
        )


@app.command()
def verify(
    bundle: Annotated[str, typer.Argument(help="Folder of exported models, or 'mini'.")],
    weights: Annotated[list[str] | None, typer.Option(help="Where the weights are now, if they moved: MODEL=PATH.")] = None,
    json_output: JsonFlag = False,
) -> None:
    """Run the parity gate again on every graph: per output, batch size and row."""
    from .runtime.pipeline import MINI
    from .spec import open_bundle

    opened = open_bundle(MINI if bundle == "mini" else Path(bundle))
    with _needs("export"):
        from .export.exporting import verify_model
    given = _by_model(weights or [], tuple(opened.models()))
    told: list[dict[str, Any]] = []
    for name in opened.models():
        for graph, parity in verify_model(opened.model(name), given.get(name), _log).items():
            told += [{"model": name, "graph": graph, **dataclasses.asdict(row)} for row in parity.rows]
    if json_output:
        typer.echo(json.dumps(told, indent=1))
        return
    for row in told:
        typer.echo(
            f"{row['model'] + '/' + row['graph']:32} {row['output']:10} batch {row['batch']:<3} worst row {row['row']:<3} "
            f"against {row['against']:9}  error {row['error']:.1e}"
        )
    typer.echo(f"{bundle}: {len({(row['model'], row['graph']) for row in told})} graphs equal their reference")


@app.command()
def label(
    images: Annotated[str | None, typer.Argument(help="Folder of images (sub-folders too), or one image.")] = None,
    classes: Annotated[str | None, typer.Option(help='voc, coco, mini, a file, or names: "dog, potted plant".')] = None,
    bundle: BundleFlag = "bundle",
    out: Annotated[str | None, typer.Option(help="Label store to write or continue.")] = None,
    engine: Annotated[str, typer.Option(help="auto, ort or eager.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    batch: Annotated[int, typer.Option(min=1, help="Images labelled together.")] = 8,
    labels: Annotated[str | None, typer.Option(help="JSON of image names to class names; replaces CLIP.")] = None,
    boxes: Annotated[
        str | None, typer.Option(help="VOC XML folder, JSON file or manifest.jsonl; replaces CLIP and Grounding-DINO.")
    ] = None,
    gate: Annotated[bool, typer.Option(help="CLIP decides which classes the detector looks for.")] = True,
    tag_threshold: Annotated[float | None, typer.Option(help="Least CLIP probability of a class; default: the bundle's.")] = None,
    box_threshold: Annotated[
        float | None, typer.Option(help="Least score of a box, a mean over its phrase's tokens; default: the bundle's.")
    ] = None,
    nms: Annotated[float, typer.Option(help="Boxes of one class with a larger IoU are one object.")] = 0.5,
    nms_across: Annotated[float, typer.Option(help="Boxes of two classes with a larger IoU are one object.")] = 0.8,
    margin: Annotated[float, typer.Option(help="Void where another class comes within this share of the winner.")] = 0.1,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try the images again that failed before.")] = False,
    json_output: JsonFlag = False,
) -> None:
    """Label a folder of images. Run it again to go on where it stopped."""
    example = "wsss label photos --classes voc --bundle bundle --out store"
    for flag, value in (("IMAGES", images), ("--classes", classes), ("--out", out)):
        if value is None:
            _ask(flag, example)
    _choice("--device", device, ("cpu", "cuda"))
    from .runtime.images import find_images
    from .runtime.pipeline import Labeler, Rules
    from .runtime.run import label_folder

    assert images is not None and classes is not None and out is not None
    find_images(Path(images), leave_out=Path(out))  # said before the engines are loaded, which takes a while
    rules = Rules(
        tag_threshold=tag_threshold, box_threshold=box_threshold, nms=nms, nms_across=nms_across, margin=margin, gate=gate
    )
    labeler = Labeler.open(bundle, classes=classes, engine=engine, device=device, labels=labels, boxes=boxes, rules=rules)
    _log(f"engine {labeler.settings['engine']} on {device}, {len(labeler.classes.names)} classes")
    try:
        summary = label_folder(labeler, Path(images), Path(out), batch=batch, retry_failed=retry_failed, progress=_progress)
    except KeyboardInterrupt:
        _end_progress()
        _log(f"interrupted; what is in {out} is whole. The same command goes on.")
        raise SystemExit(130) from None
    _end_progress()
    _print_summary(summary, out, json_output)
    if summary.failed:
        raise SystemExit(1)


@app.command()
def report(
    store: Annotated[str, typer.Argument(help="Label store.")],
    images: Annotated[str, typer.Option(help="The folder its images are in.")],
    out: Annotated[str | None, typer.Option(help="HTML file; default: report.html in the store.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most this many images, doubtful ones first.")] = 200,
) -> None:
    """One HTML page to look at: every image beside its label."""
    from .runtime.report import write_report

    page = write_report(Path(store), Path(images), Path(out) if out else Path(store) / "report.html", limit=limit)
    typer.echo(str(page))


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="Folder to write.")] = "demo",
    count: Annotated[int, typer.Option(min=1, help="Scenes to draw.")] = 40,
    engine: Annotated[str, typer.Option(help="auto, ort or eager.")] = "ort",
    json_output: JsonFlag = False,
) -> None:
    """The whole chain on scenes it draws itself, with the small models that come with wsss."""
    from .benchmarks.demo import run_demo

    result = run_demo(Path(out), count, engine, _progress)
    _end_progress()
    if json_output:
        typer.echo(json.dumps(result, indent=1))
        return
    typer.echo(
        f"{count} drawn scenes: mIoU {result['miou']:.3f}, label F1 {result['label_f1']:.3f}, "
        f"{result['images_per_second']:.1f} images/s "
        f"({', '.join(f'{stage} {seconds:.1f} s' for stage, seconds in result['stage_seconds'].items())})"
    )
    typer.echo(f"labels: {result['store']}\npage:   {result['page']}")


class _needs:
    """Turns a missing package of an extra into the line that installs it."""

    def __init__(self, extra: str) -> None:
        self._extra = extra

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("wsss"):
            raise WsssError(
                f"this command needs {error.name}, which is not installed", hint=f"pip install 'wsss[{self._extra}]'"
            ) from None


def _ask(flag: str, example: str) -> NoReturn:
    raise UsageError(f"{flag} is missing", hint=f"for example: {example}\n      (or set it in {FILE})")


def _choice(flag: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{flag}: expected one of {', '.join(allowed)}, got {value!r}")


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise UsageError(f"--size: expected HxW in pixels, got {text!r}", hint="--size 800x1344")
    return int(height), int(width)


def _by_model(given: list[str], names: tuple[str, ...]) -> dict[str, str]:
    """``--weights X`` or ``--weights MODEL=X ...`` by model."""
    told: dict[str, str] = {}
    for each in given:
        name, equals, value = each.partition("=")
        if equals and name in names:
            told[name] = value
        elif len(given) == 1 and (len(names) == 1 or each.startswith("random:") or each == "mini"):
            told |= dict.fromkeys(names, each)
        else:
            raise UsageError(
                f"--weights {each}: expected MODEL=... with one of {', '.join(names)}",
                hint=f"--weights {names[0]}=checkpoint.pth",
            )
    return told


def _log(message: str) -> None:
    typer.echo(message, err=True)


def _progress(summary: Summary) -> None:
    if not sys.stderr.isatty():
        return
    done, total = summary.skipped + summary.labelled + summary.failed, summary.images
    rate = (summary.labelled + summary.failed) / max(summary.seconds, 1e-9)
    left = (total - done) / rate if rate else 0
    print(
        f"\r\x1b[K{done}/{total} images  {rate:.1f}/s  {_clock(left)} left  {summary.failed} failed",
        end="",
        file=sys.stderr,
        flush=True,
    )


def _end_progress() -> None:
    if sys.stderr.isatty():
        print(file=sys.stderr)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _print_summary(summary: Summary, out: str, json_output: bool) -> None:
    if json_output:
        typer.echo(json.dumps({"store": out, **dataclasses.asdict(summary)}))
        return
    rate = summary.labelled / summary.seconds if summary.seconds else 0.0
    before = f" ({summary.failed_before} of them failed: --retry-failed)" if summary.failed_before else ""
    typer.echo(
        f"{out}: {summary.labelled} labelled ({summary.boxes} boxes), {summary.skipped} already done{before}, "
        f"{summary.failed} failed, "
        f"{_clock(summary.seconds)}, {rate:.1f} images/s"
    )


def main() -> None:
    """The console script. A WsssError is the user's to fix: one message, no traceback; exit 1, or 2 for usage."""
    try:
        app()
    except WsssError as error:
        _end_progress()
        typer.echo(f"wsss: {error}", err=True)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
    except KeyboardInterrupt:
        typer.echo("wsss: interrupted", err=True)
        raise SystemExit(130) from None
