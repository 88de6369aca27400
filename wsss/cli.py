"""The command line: verbs in data-flow order, each in its file of ``commands/``."""

from __future__ import annotations

import inspect
import logging
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from . import __version__
from .commands.bench import bench
from .commands.common import end_progress
from .commands.convert import convert
from .commands.demo import demo
from .commands.doctor import doctor
from .commands.eval import eval
from .commands.export import export
from .commands.label import EPILOG as LABEL_EPILOG
from .commands.label import label
from .commands.report import report
from .commands.train import train
from .commands.verify import verify
from .config import FILE, Flag, read_defaults
from .errors import UsageError, WsssError

_KINDS: dict[type, Literal["text", "integer", "number", "switch"]] = {int: "integer", float: "number", bool: "switch"}

app = typer.Typer(
    help="Photographs and a class list in, semantic-segmentation pseudo-labels out. No annotation needed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"wsss {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    logging.getLogger("wsss").setLevel(logging.INFO)
    commands: dict[str, Any] = getattr(context.command, "commands", {})
    flags = {name: _flags(command) for name, command in commands.items()}
    context.default_map = read_defaults(Path(FILE), flags)


def _flags(command: Any) -> dict[str, Flag]:
    """What a command's flags take, by the annotations of its function."""
    hints = typing.get_type_hints(inspect.unwrap(command.callback))
    return {param.opts[0].lstrip("-"): _flag(param.name, hints.get(param.name, str)) for param in command.params}


def _flag(name: str, hint: Any) -> Flag:
    parts = [each for each in typing.get_args(hint) if each is not type(None)]
    origin = typing.get_origin(hint)
    if origin is list or origin is tuple:
        inner = _flag(name, parts[0])
        return Flag(parameter=name, kind=inner.kind, count=len(parts) if origin is tuple else 1, repeats=origin is list)
    if parts:  # X | None
        return _flag(name, parts[0])
    return Flag(parameter=name, kind=_KINDS.get(hint, "text"))


for command in (export, verify, label, train, eval, bench, report, convert, demo, doctor):
    app.command(epilog=LABEL_EPILOG if command is label else None)(command)


def main() -> None:
    """The console script. A WsssError is the user's to fix: one message, no traceback; exit 1, or 2 for usage."""
    try:
        app()
    except WsssError as error:
        end_progress()
        typer.echo(f"wsss: {error}", err=True)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
    except KeyboardInterrupt:
        typer.echo("wsss: interrupted", err=True)
        raise SystemExit(130) from None
