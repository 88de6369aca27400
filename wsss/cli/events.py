"""What a long run tells while it goes on: a progress line and logs on stderr, or events, one JSON object a line, on stdout."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from .common import choice, log, show_progress

if TYPE_CHECKING:
    from ..runtime.run.label_folder import Summary

LEVELS = ("debug", "info", "warning", "error")
SECONDS = 1.0
"""Between two ``progress`` events, at least."""


class Events:
    """The voice of a run.

    With ``json_output`` every event is a line on stdout, an object whose ``event`` is one of

        started    what the run was asked for
        failed     image, error: an image that could not be labeled; the run goes on
        warning    message: anything else that is worth a look
        progress   images, done, labeled, failed, seconds, images_per_second, seconds_left; at most one a second
        error      message, hint: the run ended because of it
        finished   the summary; the last line of every run that ended well or was stopped (``stopped``)

    Without it, all but ``finished`` goes to stderr: progress on a terminal, the others as logs of their level.
    """

    def __init__(self, json_output: bool) -> None:
        self.json_output = json_output
        self._next, self._speaking = 0.0, threading.Lock()

    def tell(self, event: str, **told: Any) -> None:
        """Writes an event, if events are wanted."""
        if self.json_output:
            with self._speaking:
                sys.stdout.write(json.dumps({"event": event, **told}) + "\n")
                sys.stdout.flush()

    def progress(self, summary: Summary) -> None:
        """How far the run is."""
        show_progress(summary)
        if not self.json_output or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + SECONDS
        done = summary.skipped + summary.labelled + summary.failed
        rate = (summary.labelled + summary.failed) / max(summary.seconds, 1e-9)
        self.tell(
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
        """An image that could not be labeled."""
        from ..runtime.run.label_folder import printable

        self.tell("failed", image=image, error=error)
        log(f"failed: {printable(error)}", logging.WARNING)

    def warn(self, message: str) -> None:
        """Anything else that is worth a look."""
        self.tell("warning", message=message)
        log(message, logging.WARNING)


def set_level(level: str | None) -> None:
    """What of the logs is shown: of this level and above; None: all notes on a terminal, warnings in a pipe.

    Raises:
        UsageError: there is no such level.
    """
    if level is None:
        level = "info" if sys.stderr.isatty() else "warning"
    choice("--log-level", level, LEVELS)
    logging.getLogger("wsss").setLevel(level.upper())
