"""Runs on several devices, with one worker process each. This process dispatches the images and writes the manifest.

A worker receives tasks and sends receipts through a pipe; it writes labels itself. The tasks of a worker that dies go to the
others. A worker ends when its pipe closes because this process died.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from queue import Empty, SimpleQueue
from typing import Any

from ...classes import ClassList
from ...errors import StoreError, WsssError, WsssWarning
from ...store.format import LabelWriter
from ..chain import Chain, doubtful_classes
from .label_folder import LocalExecutor, Summary, Warn
from .sources import Source
from .stream import Receipt, Task, failure

Opener = Callable[[], Chain]
"""Opens a labeler in the process that calls it; it is pickled to get there."""
BATCHES_PER_WORKER = 6
"""Batches that a worker is given at a time: enough for its stages and queues, and some in transit."""
SPREAD = 4096
"""No task is sent this far ahead of the oldest unfinished one, because receipts wait for those before them."""
DEATHS = 2
"""Number of worker deaths after which an image counts as failed."""


@dataclass(slots=True)
class _Worker:
    name: str
    process: BaseProcess
    pipe: Connection
    pending: dict[int, Task] = field(default_factory=dict)
    """Tasks that were sent and have no receipt yet, by number."""
    summary: Summary = field(default_factory=Summary)
    """The worker's seconds so far."""


class Workers:
    """Runs several labelers, each in its own process, for one run.

    Args:
        openers: one for each worker, with the name of its device.
        batch: images that a worker labels together; None takes the batch size that its engines were built for.

    Raises:
        WsssError: a worker cannot open its labeler, or the workers' settings differ.
    """

    def __init__(self, openers: Sequence[tuple[str, Opener]], *, batch: int | None = None) -> None:
        self._workers: list[_Worker] = []
        context = multiprocessing.get_context("spawn")  # a fork would inherit threads and an unusable CUDA context
        try:
            for number, (name, opener) in enumerate(openers):
                here, there = context.Pipe()
                share = _share_of_cores(number, len(openers)) if name == "cpu" else set()
                process = context.Process(target=_serve, args=(there, opener, batch, share), daemon=True)
                process.start()
                there.close()
                self._workers.append(_Worker(name, process, here))
            self.classes, self.settings, self._batch = self._opened(self._workers[0])
            for worker in self._workers[1:]:
                _, settings, usual = self._opened(worker)
                self._batch = max(self._batch, usual)
                if settings != self.settings:
                    raise WsssError(
                        f"--devices: {worker.name} would label with settings that differ from those of {self._workers[0].name}",
                        hint="name the engine with --engine",
                    )
            for message in doubtful_classes(self.classes, self.settings):  # once, not in each process
                warnings.warn(message, WsssWarning, stacklevel=2)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.pipe.close()
        for worker in self._workers:
            worker.process.join(timeout=10)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    @staticmethod
    def _opened(worker: _Worker) -> tuple[ClassList, dict[str, Any], int]:
        try:
            kind, *values = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            raise WsssError(
                f"--devices: the worker on {worker.name} died while it opened its engines: {_cause_of_death(worker)}"
            ) from None
        if kind == "refused":
            raise WsssError(values[0], hint=values[1])
        return values[0], values[1], values[2]

    def report(self, summary: Summary) -> None:
        """Fill in the sum of the workers' seconds, and the mean of their padding."""
        add_up([worker.summary for worker in self._workers], summary)

    def work(
        self, tasks: Iterable[Task | None], source: Source, labels: LabelWriter, stop: threading.Event, warn: Warn
    ) -> Generator[list[Receipt], None, None]:
        """Yield the receipts of all tasks as they arrive; once ``stop`` is set, only of those in progress.

        Raises:
            StoreError: a worker cannot write. WsssError: all workers died.
        """
        dispatcher = _Dispatcher(tasks, self._batch)
        alive, ending = list(self._workers), False
        for worker in alive:
            _send(worker, (source, labels))
        while alive:
            if not ending:
                for worker in [] if stop.is_set() else alive:
                    if new := dispatcher.assign(worker, alive):
                        _send(worker, new)
                ending = stop.is_set() or (dispatcher.empty and not any(worker.pending for worker in alive))
                for worker in alive if ending else ():
                    _send(worker, "stop" if stop.is_set() else "end")
            ready = wait([worker.pipe for worker in alive], timeout=0.5)  # `stop` may be set meanwhile
            for worker in [worker for worker in alive if worker.pipe in ready]:
                try:
                    kind, *values = worker.pipe.recv()
                except (EOFError, OSError):
                    alive.remove(worker)
                    worker.process.join()
                    cause = _cause_of_death(worker)
                    warn(f"the worker on {worker.name} died ({cause}); {len(worker.pending)} images go to others")
                    if failed := dispatcher.take_back(worker):
                        yield failed
                    continue
                if kind == "receipts":
                    receipts, worker.summary = values
                    for receipt in receipts:
                        del worker.pending[receipt.number]
                    yield receipts
                elif kind == "warn":
                    warn(f"{worker.name}: {values[0]}")
                elif kind == "store error":
                    raise StoreError(values[0], hint=values[1])
                else:
                    alive.remove(worker)
        if not ending:
            raise WsssError("--devices: all workers died", hint="the store is intact: run the same command again to go on")


def add_up(parts: Iterable[Summary], summary: Summary) -> None:
    """Fill in the sums of several labelers' seconds, and the mean of their padding."""
    parts = list(parts)
    for stage in ("tag", "detect", "segment", "fuse"):
        summary.stage_seconds[stage] = sum(part.stage_seconds.get(stage, 0.0) for part in parts)
    summary.engine_seconds = sum(part.engine_seconds for part in parts)
    padding = [part.padding for part in parts if part.padding is not None]
    summary.padding = sum(padding) / len(padding) if padding else None


class _Dispatcher:
    """Assigns tasks to workers, those of dead workers first."""

    def __init__(self, tasks: Iterable[Task | None], batch: int) -> None:
        self._tasks = (task for task in tasks if task is not None)
        self._returned: deque[Task] = deque()
        self._next = next(self._tasks, None)
        self._deaths: Counter[int] = Counter()
        self._limit = BATCHES_PER_WORKER * batch

    @property
    def empty(self) -> bool:
        return not self._returned and self._next is None

    def assign(self, worker: _Worker, workers: Sequence[_Worker]) -> list[Task]:
        """Fill up the worker's pending tasks; return the new ones."""
        oldest = min((number for other in workers for number in other.pending), default=None)
        new: list[Task] = []
        while len(worker.pending) < self._limit:
            if self._returned:
                task = self._returned.popleft()
            elif self._next and self._next.number < (self._next.number if oldest is None else oldest) + SPREAD:
                task, self._next = self._next, next(self._tasks, None)
            else:
                break
            worker.pending[task.number] = task
            new.append(task)
        return new

    def take_back(self, worker: _Worker) -> list[Receipt]:
        """Take back a dead worker's tasks; return the receipts of those that too many workers died with."""
        self._deaths.update(worker.pending.keys())
        failed = []
        for number, task in sorted(worker.pending.items()):
            if self._deaths[number] < DEATHS:
                self._returned.append(task)
                continue
            failed.append(failure(task, f"{task.name}: {DEATHS} workers died while they labeled it or an image near it"))
        worker.pending.clear()
        return failed


def _send(worker: _Worker, message: object) -> None:
    with suppress(OSError):  # the worker died; reading from its pipe will show it
        worker.pipe.send(message)


def _cause_of_death(worker: _Worker) -> str:
    code = worker.process.exitcode
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def _share_of_cores(number: int, count: int) -> set[int]:
    """The cores of this worker, out of those that this process may use; several workers may share one."""
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return set(usable[number % len(usable) :: count]) if usable else set()


# ---- in the worker ----


def _serve(pipe: Connection, opener: Opener, batch: int | None, share: set[int]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent process handles them, and ends this one
        signal.signal(number, signal.SIG_IGN)
    if share:
        os.sched_setaffinity(0, share)
    sending = threading.Lock()

    def send(*message: object) -> None:
        with sending, suppress(OSError):  # the parent is gone: `listen` ends the work
            pipe.send(message)

    warnings.simplefilter("ignore", WsssWarning)
    try:
        labeler = opener()
    except WsssError as error:
        send("refused", error.message, error.hint)
        return
    batch = batch or labeler.usual_batch()
    send("ready", labeler.classes, labeler.settings, batch)
    inbox: SimpleQueue[Any] = SimpleQueue()
    stop = threading.Event()

    def listen() -> None:
        with suppress(EOFError, OSError):
            while (message := pipe.recv()) != "stop":
                inbox.put(message)
        stop.set()
        inbox.put("end")

    threading.Thread(target=listen, daemon=True).start()
    start = inbox.get()
    if start == "end":
        return
    source, labels = start
    executor, summary = LocalExecutor(labeler, batch=batch), Summary()
    try:
        for receipts in executor.work(_tasks(inbox), source, labels, stop, lambda message: send("warn", message)):
            executor.report(summary)
            send("receipts", receipts, summary)
    except StoreError as error:
        send("store error", error.message, error.hint)
        return
    send("bye")


def _tasks(inbox: SimpleQueue[Any]) -> Iterator[Task | None]:
    while True:
        try:
            message = inbox.get(timeout=0.01)
        except Empty:
            yield None
            continue
        if message == "end":
            return
        yield from message
