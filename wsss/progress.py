"""The line on a terminal that shows how far something is."""

from __future__ import annotations

import contextlib
import sys


def progress_line(text: str) -> None:
    """Overwrite the progress line on stderr; nothing is written unless stderr is a terminal."""
    if sys.stderr.isatty():
        with contextlib.suppress(OSError):
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def end_progress() -> None:
    """Keep the progress line and start a new one below it."""
    if sys.stderr.isatty():
        with contextlib.suppress(OSError):
            print(file=sys.stderr)
