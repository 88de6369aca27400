"""What the commands share: messages, progress, checks of flags."""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from ..errors import UsageError
from ..object_storage import is_url
from .config import FILE

if TYPE_CHECKING:
    from ..runtime.run.label_folder import Summary

# mypy and typer both read these: a flag's help stands once, beside its name.
BundleFlag = Annotated[
    str, typer.Option("--bundle", help="Folder of exported models, or 'mini' for the small ones that come with wsss.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]


def ask(flag: str, example: str) -> NoReturn:
    """Refuses to go on without a flag, with a line to copy."""
    raise UsageError(f"{flag} is missing", hint=f"for example: {example}\n      (or set it in {FILE})")


def choice(flag: str, value: str | None, allowed: tuple[str, ...]) -> None:
    """Raises UsageError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise UsageError(f"{flag}: expected one of {', '.join(allowed)}, got {value!r}")


def on_this_machine(*given: tuple[str, str | None]) -> None:
    """Raises UsageError, with the command that downloads, for flags that name something in an object store."""
    for flag, value in given:
        if value is None or not is_url(value):
            continue
        name = value.rstrip("/").rpartition("/")[2]
        copy = {"s3": f"aws s3 sync {value} {name}", "gs": f"gcloud storage rsync --recursive {value} {name}"}
        raise UsageError(
            f"{flag} {value}: only wsss label reaches object stores; this command expects a path of this machine",
            hint=f"copy it first: {copy[value[:2]]}"
            if value[:2] in copy and flag != "--out"
            else "give a folder of this machine",
        )


def by_model(given: list[str], names: tuple[str, ...]) -> dict[str, str]:
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


class _Lines(logging.Handler):
    """Logs as lines on stderr, in the place of the progress line if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        with contextlib.suppress(OSError):  # a run goes on where nobody can read its log
            typer.echo(f"\r\x1b[K{message}" if sys.stderr.isatty() else message, err=True)


def log(message: str, level: int = logging.INFO) -> None:
    """A line for the user, on stderr, unless a level above its own was asked for (``--log-level``)."""
    logger = logging.getLogger("wsss")
    if not logger.handlers:
        logger.addHandler(_Lines())
        logger.propagate = False
    logger.log(level, "%s", message)


def show_progress(summary: Summary) -> None:
    """One line that is written over, on a terminal only."""
    if not sys.stderr.isatty():
        return
    done, total = summary.skipped + summary.labelled + summary.failed, summary.images
    rate = (summary.labelled + summary.failed) / max(summary.seconds, 1e-9)
    left = (total - done) / rate if rate else 0
    with contextlib.suppress(OSError):
        print(
            f"\r\x1b[K{done}/{total} images  {rate:.1f}/s  {clock(left)} left  {summary.failed} failed",
            end="",
            file=sys.stderr,
            flush=True,
        )


def end_progress() -> None:
    """Leaves the progress line standing."""
    if sys.stderr.isatty():
        print(file=sys.stderr)


def clock(seconds: float) -> str:
    """Seconds as 1:23 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
