"""The labelers of a run on a Ray cluster, as actors. See `executor`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Iterator, Mapping
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import ray

from ...errors import StoreError, WsssError, WsssWarning
from ...store.format import LabelWriter
from ..run.label_folder import LocalExecutor, Summary
from ..run.sources import Source
from ..run.stream import Receipt, Task
from ..run.workers import DEATHS, Opener

POLL_SECONDS = 2.0
"""How often a labeler asks whether the run was stopped."""


class Control:
    """State that the labelers of a run share, as an actor: whether to stop, how often calls were tried, who has which cores."""

    def __init__(self) -> None:
        self._stopped = False
        self._attempts: dict[str, int] = {}
        self._seats: dict[str, list[str]] = {}

    def stop(self) -> None:
        """Let labelers finish the batches in progress, and start no others."""
        self._stopped = True

    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped

    def begin(self, call: str) -> int:
        """How often a call was started before without ending; Ray Data itself repeats one that kills labelers forever."""
        attempts = self._attempts.get(call, 0)
        self._attempts[call] = attempts + 1
        return attempts

    def end(self, call: str) -> None:
        """Forget a call that has ended."""
        self._attempts.pop(call, None)

    def seat(self, host: str, actor: str) -> int:
        """The number of an actor among those of its host; a restarted one keeps its number."""
        seats = self._seats.setdefault(host, [])
        if actor not in seats:
            seats.append(actor)
        return seats.index(actor)


class RayLabeler:
    """A labeler in an actor. Concurrent calls share its stages, so that the next batch is waiting for each stage.

    A call returns errors as values of its row, because Ray would repeat a call that raises an exception.

    Args:
        control: handle of the run's `Control`.
        opener: opens the labeler.
        settings: the settings that every labeler must have, as in the store.
        source, labels: where photographs are read from and label maps are written to; every node must reach them.
        cwd: the driver's working folder, from which relative paths start.
        batch: images labeled together.
        cores: number of cores of its host that it may use; None: all.
    """

    def __init__(
        self,
        *,
        control: Any,
        opener: Opener,
        settings: Mapping[str, Any],
        source: Source,
        labels: LabelWriter,
        cwd: str,
        batch: int,
        cores: int | None,
    ) -> None:
        self._control, self._process, self._host = control, uuid.uuid4().hex, socket.gethostname()
        self._work: _Work | None = None
        self._error: dict[str, str] | None = None
        with contextlib.suppress(OSError):  # a node without it: a relative path is then reported as not found
            os.chdir(cwd)
        if cores:
            context = ray.get_runtime_context()
            _pin(ray.get(control.seat.remote(context.get_node_id(), context.get_actor_id())), cores)
        stop = threading.Event()
        threading.Thread(target=self._poll, args=(stop,), daemon=True).start()
        warnings.simplefilter("ignore", WsssWarning)  # the driver warns
        try:
            labeler = opener()
            if json.dumps(labeler.settings, sort_keys=True) != json.dumps(dict(settings), sort_keys=True):
                raise WsssError(
                    f"--on ray: the labeler on {self._host} would label with settings that differ from the first one's",
                    hint="the bundle must be the same on every node; name the engine with --engine",
                )
            self._work = _Work(LocalExecutor(labeler, batch=batch), source, labels, stop)
        except WsssError as error:
            self._error = _error_of(error)

    def _poll(self, stop: threading.Event) -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # the driver is gone: the run is over
            while not ray.get(self._control.stopped.remote()):
                time.sleep(POLL_SECONDS)
        stop.set()

    def __call__(self, calls: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """A row for each row of tasks, with receipts and more in JSON; no receipts where labelers have died during the call."""
        rows = [self._row(call, tasks) for call, tasks in zip(calls["call"], calls["tasks"], strict=True)]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _row(self, call: str, tasks: str) -> dict[str, str]:
        receipts: list[Receipt] = []
        error = self._error
        summary, warnings = Summary(), list[str]()
        if self._work is not None:
            try:
                if ray.get(self._control.begin.remote(call)) < DEATHS:
                    receipts = self._work.label([Task(*task) for task in json.loads(tasks)])
            except Exception as caught:
                error = _error_of(caught)
            self._control.end.remote(call)
            self._work.executor.report(summary)
            warnings, self._work.warnings[:] = list(self._work.warnings), []
        return {
            "process": self._process,
            "host": self._host,
            "receipts": json.dumps(receipts),
            "seconds": json.dumps(dataclasses.asdict(summary)),
            "warnings": json.dumps(warnings),
            "error": json.dumps(error) if error else "",
        }


class _Work:
    """Runs a labeler as long as its process lives; calls add their tasks and wait for the receipts."""

    def __init__(self, executor: LocalExecutor, source: Source, labels: LabelWriter, stop: threading.Event) -> None:
        self.executor, self._stop = executor, stop
        self.warnings: list[str] = []
        self._inbox: SimpleQueue[list[Task]] = SimpleQueue()
        self._lock = threading.Lock()
        self._count = 0
        self._waiting: dict[int, tuple[int, SimpleQueue[Receipt | None]]] = {}
        """The run's number of each task and its call's queue, by a number of this process: Ray may send a call twice."""
        self._ended = False
        self._error: BaseException | None = None
        threading.Thread(target=self._run, args=(source, labels), daemon=True).start()

    def label(self, tasks: list[Task]) -> list[Receipt]:
        """The receipts of these tasks; when the run is stopped, only of those in progress.

        Raises:
            StoreError: a label cannot be written.
        """
        queue: SimpleQueue[Receipt | None] = SimpleQueue()
        with self._lock:
            if not self._ended:
                numbers = range(self._count, self._count + len(tasks))
                self._count += len(tasks)
                self._waiting.update({number: (task.number, queue) for number, task in zip(numbers, tasks, strict=True)})
                self._inbox.put([task._replace(number=number) for number, task in zip(numbers, tasks, strict=True)])
            else:
                queue.put(None)
        receipts = list[Receipt]()
        while len(receipts) < len(tasks) and (receipt := queue.get()) is not None:
            receipts.append(receipt)
        if self._error:
            raise self._error
        return receipts

    def _run(self, source: Source, labels: LabelWriter) -> None:
        error: BaseException | None = None
        try:
            for receipts in self.executor.work(self._tasks(), source, labels, self._stop, self.warnings.append):
                for receipt in receipts:
                    with self._lock:
                        number, queue = self._waiting.pop(receipt.number)
                    queue.put(Receipt(number, receipt.record))
        except BaseException as caught:
            error = caught
        with self._lock:
            self._ended, self._error = True, error
            for _, queue in self._waiting.values():
                queue.put(None)

    def _tasks(self) -> Iterator[Task | None]:
        while not self._stop.is_set():
            try:
                yield from self._inbox.get(timeout=0.01)
            except Empty:
                yield None


def _pin(seat: int, cores: int) -> None:
    """Keep this labeler to its own cores; otherwise each labeler of a host would start as many threads as there are cores."""
    if hasattr(os, "sched_setaffinity"):
        usable = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {usable[(seat * cores + number) % len(usable)] for number in range(cores)})


def _error_of(error: BaseException) -> dict[str, str]:
    if isinstance(error, WsssError):
        kind = "StoreError" if isinstance(error, StoreError) else "WsssError"
        return {"kind": kind, "message": error.message, "hint": error.hint}
    return {"kind": "fault", "message": "".join(traceback.format_exception(error)), "hint": ""}
