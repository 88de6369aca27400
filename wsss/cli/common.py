"""Log lines, the progress line, and flags that several commands share."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import UsageError
from ..object_storage import is_url
from ..progress import progress_line

if TYPE_CHECKING:
    from ..runtime.run.label_folder import Summary

Engine = Literal["auto", "ort", "openvino", "trt", "trt-rtx", "eager"]
# mypy and Typer both read these, so that the help of a shared flag is written once.
BundleFlag = Annotated[
    str, typer.Option("--bundle", help="Folder of exported models, or 'mini' for the small ones that come with wsss.")
]
ImagesFlag = Annotated[
    str | None, typer.Option("--images", help="Folder of the store's images. Default: where the store's last run found them.")
]
ExcludeFlag = Annotated[
    str | None,
    typer.Option(
        "--exclude", metavar="FILE", help="Leave out the images that this file rejects: decisions of a report, or a list."
    ),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]


def on_this_machine(*given: tuple[str, str | None]) -> None:
    """Raises UsageError, whose hint is the download command, for a flag whose value is in an object store."""
    for flag, value in given:
        if value is None or not is_url(value):
            continue
        name = value.rstrip("/").rpartition("/")[2]
        copy = {"s3": f"aws s3 sync {value} {name}", "gs": f"gcloud storage rsync --recursive {value} {name}"}
        raise UsageError(
            f"{flag} {value}: only wsss label reaches object stores; this command needs a local path",
            hint=f"copy it first: {copy[value[:2]]}" if value[:2] in copy and flag != "--out" else "give a local folder",
        )


def by_model(given: list[str], names: tuple[str, ...]) -> dict[str, str]:
    """Parse ``--weights X`` or ``--weights MODEL=X ...`` into weights by model. Raises UsageError."""
    weights: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if equals and name in names:
            weights[name] = value
        elif len(given) == 1 and (len(names) == 1 or text.startswith("random:") or text == "mini"):
            weights |= dict.fromkeys(names, text)
        else:
            raise UsageError(
                f"--weights {text}: expected MODEL=... with one of {', '.join(names)}",
                hint=f"--weights {names[0]}=checkpoint.pth",
            )
    return weights


def images_folder(store: str, images: str | None) -> Path:
    """The folder of a store's images: ``--images``, or the one that the store records, which is logged.

    Raises:
        StoreError: there is no store, or it records no folder that exists.
    """
    if images is not None:
        return Path(images)
    from ..store.local import read_images_folder

    found = read_images_folder(Path(store))
    log(f"images: {found}, as {store} records")
    return found


class _StderrHandler(logging.Handler):
    """Writes log records to stderr as lines. A line replaces the progress line if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        with contextlib.suppress(OSError):  # a run continues when stderr is closed
            typer.echo(f"\r\x1b[K{message}" if sys.stderr.isatty() else message, err=True)


def log(message: str, level: int = logging.INFO) -> None:
    """Write a line to stderr, unless ``--log-level`` is above its level."""
    logger = logging.getLogger("wsss")
    if not logger.handlers:
        logger.addHandler(_StderrHandler())
        logger.propagate = False
    logger.log(level, "%s", message)


def counter(noun: str, *, every: int = 1) -> Callable[[int, int], None]:
    """Progress callback that shows "DONE/TOTAL noun", once per ``every`` calls and at the end."""

    def show(done: int, total: int) -> None:
        if done % every == 0 or done == total:
            progress_line(f"{done}/{total} {noun}")

    return show


def show_progress(summary: Summary) -> None:
    """Show how far a labeling run is."""
    done, total = summary.skipped + summary.labelled + summary.failed, summary.images
    rate = (summary.labelled + summary.failed) / max(summary.seconds, 1e-9)
    left = (total - done) / rate if rate else 0
    progress_line(f"{done}/{total} images  {rate:.1f}/s  {clock(left)} left  {summary.failed} failed")


def clock(seconds: float) -> str:
    """Format seconds as 1:23 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
