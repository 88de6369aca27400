"""A long check in steps: each in a process of its own, recorded at once, and not done again once it is done.

The record is one JSON file:

``identity``
    What the results belong to: machine, libraries, sources. A record of another identity is begun anew.
``steps``
    By name: ``status`` (`Status`), ``seconds``, ``result`` (what the step itself wrote, if anything), ``error`` (the end of
    what it printed, when it failed), ``reason`` (why it was left out).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["done", "failed", "timed out", "left out"]
TAIL = 2000
"""Characters kept of what a failed step printed: the end says why."""
LEFT_OUT = "left out"
"""Key of a step's result that says why there was nothing to do."""
Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One piece of a check."""

    name: str
    command: Sequence[str]
    """Is given ``--result FILE`` and may write its result there as JSON. ``{"left out": "why"}`` is no failure."""
    limit_s: float
    """It is ended after this long."""
    needs: tuple[str, ...] = ()
    """Steps that must be done before; without one of them this one is left out."""
    product: Path | None = None
    """What it leaves on disk. A step that is done is done again when a later one needs it and this is gone."""


class Record:
    """The results so far, in a file that is whole at any moment.

    Args:
        path: read when it is there and of this identity.
        identity: what results belong to.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.told: dict[str, Any] = {"identity": dict(identity), "steps": {}}
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if isinstance(before, dict) and before.get("identity") == self.told["identity"]:
            self.told = before

    @property
    def steps(self) -> dict[str, dict[str, Any]]:
        """What is known of each step."""
        steps: dict[str, dict[str, Any]] = self.told["steps"]
        return steps

    def is_done(self, name: str) -> bool:
        """Whether a step has ended well."""
        return bool(self.steps.get(name, {}).get("status") == "done")

    def result(self, name: str) -> Any:
        """What a step wrote, None when it has written nothing."""
        return self.steps.get(name, {}).get("result")

    def enter(self, name: str, **told: Any) -> None:
        """Keeps what is known of a step, in the file too."""
        self.steps[name] = {key: value for key, value in told.items() if value is not None}
        self.save()

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(self.told, indent=1, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)


def run_steps(steps: Iterable[Step], record: Record, *, ends: float, log: Log) -> list[str]:
    """Runs what is not done yet, in order.

    Args:
        ends: `time.monotonic` at which no step runs any more; those not begun by then are not recorded.
        log: told of each step.

    Returns:
        Names of the steps that there was no time for.
    """
    steps = list(steps)
    wanted = _to_do(steps, record)
    late = []
    for step in steps:
        if step.name not in wanted:
            log(f"{step.name}: done before")
            continue
        if lacks := [name for name in step.needs if not record.is_done(name)]:
            if not any(name in late for name in lacks):
                record.enter(step.name, status="left out", reason=f"needs {', '.join(lacks)}")
                log(f"{step.name}: left out, needs {', '.join(lacks)}")
                continue
            late.append(step.name)
            continue
        left = ends - time.monotonic()
        if left <= 0:
            late.append(step.name)
            continue
        told = run_step(step, min(step.limit_s, left))
        if told["status"] == "timed out" and left < step.limit_s:
            late.append(step.name)  # it was the whole check's time that ended: the next run tries again
        record.enter(step.name, **told)
        why = told.get("reason") or str(told.get("error") or "").strip().split("\n")[-1]
        log(f"{step.name}: {told['status']}, {told['seconds']:.0f} s{f': {why}' if why else ''}")
    return late


def run_step(step: Step, limit_s: float) -> dict[str, Any]:
    """Runs one step in a process of its own, which is ended with all that it started when the time is over.

    Returns:
        ``status``, ``seconds``, ``result``, ``error``, ``reason``: as in the record, None where there is none.
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
        said = printed.read_bytes().decode(errors="replace")[-TAIL:].strip()
        result = _read(result_file)
    told: dict[str, Any] = {"seconds": seconds, "result": result, "error": None, "reason": None}
    if code is None:
        return {**told, "status": "timed out", "error": f"{said}\nended after {seconds:.0f} s".strip()}
    if code < 0:
        return {**told, "status": "failed", "error": f"{said}\nended by {signal.Signals(-code).name}".strip()}
    if code > 0:
        return {**told, "status": "failed", "error": said or f"exit {code}"}
    if isinstance(result, dict) and LEFT_OUT in result:
        return {**told, "status": "left out", "result": None, "reason": result[LEFT_OUT]}
    return {**told, "status": "done"}


def _to_do(steps: Sequence[Step], record: Record) -> set[str]:
    """Names of the steps to run: those not done, and those they build on whose product is gone."""
    by_name = {step.name: step for step in steps}
    wanted: set[str] = set()

    def want(step: Step) -> None:
        wanted.add(step.name)
        for name in step.needs:
            needed = by_name.get(name)
            gone = needed is not None and needed.product is not None and not needed.product.exists()
            if needed is not None and name not in wanted and gone:
                want(needed)

    for step in steps:
        if not record.is_done(step.name):
            want(step)
    return wanted


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a step's process and those of its session."""
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
