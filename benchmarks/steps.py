"""A long check in steps: each runs in a separate process, is recorded at once, and is not repeated when it is done.

The record is one JSON file:

``identity``
    The machine, libraries and sources that the results belong to. A record with another identity is discarded.
``steps``
    By name: ``status`` (`Status`), ``seconds``, ``result`` (what the step wrote, if anything), ``error`` (the end of its
    output, when it failed), ``reason`` (why it was left out).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["done", "failed", "timed out", "left out"]
TAIL = 2000
"""Characters kept of a failed step's output: its end gives the reason."""
LEFT_OUT = "left out"
"""Key of a step's result that gives the reason why the step does not apply."""
ROOT = Path(__file__).resolve().parent.parent
"""The checkout, or the folder of the installed package."""
Log = Callable[[str], None]


def log(line: str) -> None:
    """Print a line of progress to stderr."""
    print(line, file=sys.stderr, flush=True)


def commit() -> str | None:
    """The commit of this checkout, with a ``+`` when files differ from it; None where wsss is installed without git."""
    if not (ROOT / ".git").exists():
        return None
    try:
        head, changes = (
            subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changes else "")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a check."""

    name: str
    command: Sequence[str]
    """Gets ``--result FILE`` appended, and may write its result there as JSON. ``{"left out": "why"}`` is not a failure."""
    limit_s: float
    """The process is ended after this time."""
    needs: tuple[str, ...] = ()
    """Steps that must be done first; the step is left out where one of them is not."""
    product: Path | None = None
    """A file that the step creates. A finished step runs again when a later one needs it and this file is missing."""


class Record:
    """The results so far, in a file that is complete at any moment.

    Args:
        path: read when it exists and has this identity.
        identity: the machine, libraries and sources that results belong to.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"identity": dict(identity), "steps": {}}
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if isinstance(before, dict) and before.get("identity") == self.content["identity"]:
            self.content = before

    @property
    def steps(self) -> dict[str, dict[str, Any]]:
        """The record of each step, by name."""
        steps: dict[str, dict[str, Any]] = self.content["steps"]
        return steps

    def is_done(self, name: str) -> bool:
        """Whether a step has finished without an error."""
        return bool(self.steps.get(name, {}).get("status") == "done")

    def result(self, name: str) -> Any:
        """The result of a step, None when it has written none."""
        return self.steps.get(name, {}).get("result")

    def enter(self, name: str, **entries: Any) -> None:
        """Record a step and save the file; entries that are None are left out."""
        self.steps[name] = {key: value for key, value in entries.items() if value is not None}
        self.save()

    def save(self) -> None:
        """Write the file whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(self.content, indent=1, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)


def run_steps(steps: Iterable[Step], record: Record, *, ends: float, log: Log) -> list[str]:
    """Run the steps that are not done yet, in order.

    Args:
        ends: `time.monotonic` at which no step may still run; steps not begun by then are not recorded.
        log: called with a line for each step.

    Returns:
        Names of the steps for which the time did not suffice.
    """
    steps = list(steps)
    pending = _to_do(steps, record)
    late = []
    for step in steps:
        if step.name not in pending:
            log(f"{step.name}: done before")
            continue
        if missing := [name for name in step.needs if not record.is_done(name)]:
            if not any(name in late for name in missing):
                record.enter(step.name, status="left out", reason=f"needs {', '.join(missing)}")
                log(f"{step.name}: left out, needs {', '.join(missing)}")
                continue
            late.append(step.name)
            continue
        left = ends - time.monotonic()
        if left <= 0:
            late.append(step.name)
            continue
        entry = run_step(step, min(step.limit_s, left))
        if entry["status"] == "timed out" and left < step.limit_s:
            late.append(step.name)  # the time of the whole check ended, not that of the step: the next run tries again
        record.enter(step.name, **entry)
        why = entry.get("reason") or str(entry.get("error") or "").strip().split("\n")[-1]
        log(f"{step.name}: {entry['status']}, {entry['seconds']:.0f} s{f': {why}' if why else ''}")
    return late


def run_step(step: Step, limit_s: float) -> dict[str, Any]:
    """Run one step in a separate process, which is ended with all its children when the time is over.

    Returns:
        ``status``, ``seconds``, ``result``, ``error`` and ``reason`` as in the record; None where there is none.
    """
    with tempfile.TemporaryDirectory() as folder:
        result_file, printed = Path(folder) / "result.json", Path(folder) / "printed"
        begun = time.monotonic()
        with printed.open("wb") as output:
            process = subprocess.Popen(
                [*step.command, "--result", str(result_file)], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code: int | None = process.wait(timeout=limit_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None or code is None:
                    _end(process)
        seconds = round(time.monotonic() - begun, 1)
        output_end = printed.read_bytes().decode(errors="replace")[-TAIL:].strip()
        result = _read(result_file)
    entry: dict[str, Any] = {"seconds": seconds, "result": result, "error": None, "reason": None}
    if code is None:
        return {**entry, "status": "timed out", "error": f"{output_end}\nended after {seconds:.0f} s".strip()}
    if code < 0:
        return {**entry, "status": "failed", "error": f"{output_end}\nended by {signal.Signals(-code).name}".strip()}
    if code > 0:
        return {**entry, "status": "failed", "error": output_end or f"exit {code}"}
    if isinstance(result, dict) and LEFT_OUT in result:
        return {**entry, "status": "left out", "result": None, "reason": result[LEFT_OUT]}
    return {**entry, "status": "done"}


def _to_do(steps: Sequence[Step], record: Record) -> set[str]:
    """Names of the steps to run: those not done, and those that they need and whose product is missing."""
    by_name = {step.name: step for step in steps}
    pending: set[str] = set()

    def add(step: Step) -> None:
        pending.add(step.name)
        for name in step.needs:
            needed = by_name.get(name)
            gone = needed is not None and needed.product is not None and not needed.product.exists()
            if needed is not None and name not in pending and gone:
                add(needed)

    for step in steps:
        if not record.is_done(step.name):
            add(step)
    return pending


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a step's process and all processes of its session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=5)
            if number == signal.SIGKILL:
                break
        except subprocess.TimeoutExpired:
            continue


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
