"""Output of a running command: a progress line and logs on stderr, or events on stdout, one JSON object per line."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Literal

from .common import log, show_progress

if TYPE_CHECKING:
    from ..runtime.run.label_folder import Summary

Level = Literal["debug", "info", "warning", "error"]
SECONDS = 1.0
"""Shortest time between two ``progress`` events."""


class Events:
    """Reports the events of a run.

    With ``json_output`` every event is a line on stdout, an object whose ``event`` is one of

        started    the settings of the run
        failed     image, error: an image that could not be labeled; the run continues
        warning    message: any other non-fatal problem
        progress   images, done, labelled, failed, seconds, images_per_second, seconds_left; at most one per second
        error      message, hint: the error that ended the run
        finished   the summary; the last line of every run that completed or was stopped (``stopped``)

    Without it, all but ``finished`` goes to stderr: the progress line on a terminal, the others as log lines.
    """

    def __init__(self, json_output: bool) -> None:
        self.json_output = json_output
        self._next_progress, self._lock = 0.0, threading.Lock()

    def write(self, event: str, **fields: Any) -> None:
        """Write an event if ``json_output`` is set."""
        if self.json_output:
            with self._lock:
                sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
                sys.stdout.flush()

    def progress(self, summary: Summary) -> None:
        """Report how far the run is."""
        show_progress(summary)
        if not self.json_output or time.monotonic() < self._next_progress:
            return
        self._next_progress = time.monotonic() + SECONDS
        done = summary.skipped + summary.labelled + summary.failed
        rate = (summary.labelled + summary.failed) / max(summary.seconds, 1e-9)
        self.write(
            "progress",
            images=summary.images,
            done=done,
            labelled=summary.labelled,
            failed=summary.failed,
            seconds=round(summary.seconds, 1),
            images_per_second=round(rate, 1),
            seconds_left=round((summary.images - done) / rate) if rate else None,
        )

    def failed(self, image: str, error: str) -> None:
        """Report an image that could not be labeled."""
        from ..runtime.run.label_folder import printable

        self.write("failed", image=image, error=error)
        log(f"failed: {printable(error)}", logging.WARNING)

    def warn(self, message: str) -> None:
        """Report any other non-fatal problem."""
        self.write("warning", message=message)
        log(message, logging.WARNING)


def set_level(level: Level | None) -> None:
    """Show log lines of this level and above. None: info if stderr is a terminal, otherwise warning."""
    if level is None:
        level = "info" if sys.stderr.isatty() else "warning"
    logging.getLogger("wsss").setLevel(level.upper())
