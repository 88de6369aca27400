"""The console script: the commands in data-flow order, error messages and exit codes."""

from __future__ import annotations

import inspect
import io
import logging
import os
import sys
import typing
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .. import __version__
from ..errors import UsageError, WsssError, WsssWarning
from ..progress import end_progress
from .app import app as app_command
from .bench import bench
from .common import log
from .config import FILE, Flag, read_defaults
from .convert import convert
from .correct import correct
from .demo import demo
from .doctor import doctor, models
from .eval import eval
from .export import export
from .label import EPILOG as LABEL_EPILOG
from .label import label
from .report import report
from .train import train
from .triton import triton
from .tune.calibrate import calibrate
from .tune.tune import tune
from .verify import verify

_KINDS: dict[type, Literal["text", "integer", "number", "switch"]] = {int: "integer", float: "number", bool: "switch"}

app = typer.Typer(
    help="Photographs and a class list in, semantic-segmentation pseudo-labels out. No annotation needed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(is_given: bool) -> None:
    if is_given:
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
    """The types of a command's flags, by the annotations of its function."""
    hints = typing.get_type_hints(inspect.unwrap(command.callback))
    return {param.opts[0].lstrip("-"): _flag(param.name, hints.get(param.name, str)) for param in command.params}


def _flag(name: str, hint: Any) -> Flag:
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    origin = typing.get_origin(hint)
    if origin is list or origin is tuple:
        inner = _flag(name, parts[0])
        return Flag(parameter=name, kind=inner.kind, count=len(parts) if origin is tuple else 1, repeats=origin is list)
    if parts:  # X | None; of a Literal the first text
        return _flag(name, parts[0])
    return Flag(parameter=name, kind=_KINDS.get(hint, "text"))


COMMANDS = (
    *(models, export, verify, label, tune, calibrate, train, eval, bench, report, convert, correct, triton, app_command),
    *(demo, doctor),
)
for command in COMMANDS:
    app.command(epilog=LABEL_EPILOG if command is label else None)(command)


class _Stdout(io.FileIO):
    """Standard output. Failed writes (a full disk) raise WsssError, except to a closed pipe."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise WsssError(
                f"standard output: cannot be written: {error.strerror or error}",
                hint="files that the command wrote are complete; redirect its output elsewhere and run it again",
            ) from None


def main() -> None:
    """Run the console script. A WsssError is printed without a traceback; exit code 1, or 2 for a UsageError."""
    _open_streams()
    warnings.showwarning = partial(_show_warning, warnings.showwarning)
    code = _run(app) or _run(sys.stdout.flush)
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, WsssError):  # otherwise Python flushes again at exit, and exits with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    raise SystemExit(code)


def _run(work: Callable[[], object]) -> int:
    try:
        work()
    except WsssError as error:
        end_progress()
        return _fail(str(error), 2 if isinstance(error, UsageError) else 1)
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _show_warning(default: Callable[..., None], message: Warning | str, category: type[Warning], *where: Any) -> None:
    """Log a WsssWarning as one line; Python would add a line of code."""
    if issubclass(category, WsssWarning):
        log(str(message), logging.WARNING)
    else:
        default(message, category, *where)


def _fail(message: str, code: int) -> int:
    with suppress(OSError):
        typer.echo(f"wsss: {message}", err=True)
    return code


def _open_streams() -> None:
    """Open the null device for standard streams that are closed: otherwise the next opened file gets their number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    now = sys.stdout
    if now is sys.__stdout__ and isinstance(now, io.TextIOWrapper):  # not replaced by a test
        raw = io.BufferedWriter(_Stdout(1, "w", closefd=False))
        sys.stdout = io.TextIOWrapper(
            raw, now.encoding, now.errors, line_buffering=now.line_buffering, write_through=now.write_through
        )
