"""Several devices, a process for each: this one deals out the images and writes the manifest, they do the rest.

A worker takes tasks and gives receipts through a pipe; labels it writes itself. What a worker that dies had in hand is
dealt out again to the others. A worker whose pipe ends, because this process died, ends too.
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
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from ...classes import ClassList
from ...errors import StoreError, WsssError, WsssWarning
from ...photographs import Place
from ...store.format import LabelWriter
from ..labeler import Labeler, strange_to_mini
from .label_folder import LocalExecutor, Summary, Warn
from .stream import NOTHING, Receipt, Task

Opener = Callable[[], Labeler]
"""Opens a labeler in the process that calls it; it is pickled on the way there."""
IN_HAND = 6
"""Batches that a worker has at a time: what its stages and queues hold, and some on their way."""
SPREAD = 4096
"""No task is dealt out this far ahead of the oldest one in hand: receipts wait for those before them."""
DEATHS = 2
"""So many workers an image may take with it before it counts as failed."""


@dataclass(slots=True)
class _Worker:
    name: str
    process: BaseProcess
    pipe: Connection
    in_hand: dict[int, Task] = field(default_factory=dict)
    told: Summary = field(default_factory=Summary)
    """Its seconds so far."""


class Workers:
    """An executor of labelers, each in a process of its own, for one run.

    Args:
        openers: one a worker, with the name of its device.
        batch: images that a worker labels together; None: as many as its engines were built for.

    Raises:
        WsssError: one of them cannot open its labeler, or their settings differ.
    """

    def __init__(self, openers: Sequence[tuple[str, Opener]], *, batch: int | None = None) -> None:
        self._workers: list[_Worker] = []
        context = multiprocessing.get_context("spawn")  # a fork would inherit threads, and CUDA in a state of no use
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
                        f"--devices: {worker.name} would label with other settings than {self._workers[0].name}",
                        hint="name the engine with --engine",
                    )
            if message := strange_to_mini(self.classes, self.settings):  # once, not in each process
                warnings.warn(message, WsssWarning, stacklevel=2)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers."""
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
            kind, *told = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            raise WsssError(
                f"--devices: the worker on {worker.name} died while it opened its engines: {_death(worker)}"
            ) from None
        if kind == "refused":
            raise WsssError(told[0], hint=told[1])
        return told[0], told[1], told[2]

    def report(self, summary: Summary) -> None:
        """Adds up the workers' seconds; of their padding it takes the mean."""
        for stage in ("tag", "detect", "segment", "fuse"):
            summary.stage_seconds[stage] = sum(worker.told.stage_seconds.get(stage, 0.0) for worker in self._workers)
        summary.engine_seconds = sum(worker.told.engine_seconds for worker in self._workers)
        padding = [worker.told.padding for worker in self._workers if worker.told.padding is not None]
        summary.padding = sum(padding) / len(padding) if padding else None

    def work(
        self, tasks: Iterable[Task | None], folder: Path | Place, labels: LabelWriter, stop: threading.Event, warn: Warn
    ) -> Generator[list[Receipt], None, None]:
        """The receipts of all tasks as they come; once ``stop`` is set, of those that were begun.

        Raises:
            StoreError: a worker cannot write. WsssError: all workers died.
        """
        dealer = _Dealer(tasks, self._batch)
        alive, ending = list(self._workers), False
        for worker in alive:
            _send(worker, (folder, labels))
        while alive:
            if not ending:
                for worker in [] if stop.is_set() else alive:
                    if hand := dealer.deal(worker, alive):
                        _send(worker, hand)
                ending = stop.is_set() or (dealer.empty and not any(worker.in_hand for worker in alive))
                for worker in alive if ending else ():
                    _send(worker, "stop" if stop.is_set() else "end")
            ready = wait([worker.pipe for worker in alive], timeout=0.5)  # and look at `stop`
            for worker in [worker for worker in alive if worker.pipe in ready]:
                try:
                    kind, *told = worker.pipe.recv()
                except (EOFError, OSError):
                    alive.remove(worker)
                    worker.process.join()
                    warn(f"the worker on {worker.name} died ({_death(worker)}); {len(worker.in_hand)} images go to others")
                    if failed := dealer.take_back(worker):
                        yield failed
                    continue
                if kind == "receipts":
                    for receipt in told[0]:
                        del worker.in_hand[receipt.number]
                    worker.told = told[1]
                    yield told[0]
                elif kind == "warn":
                    warn(f"{worker.name}: {told[0]}")
                elif kind == "broken":
                    raise StoreError(told[0], hint=told[1])
                else:
                    alive.remove(worker)
        if not ending:
            raise WsssError("--devices: all workers died", hint="what is in the store is whole: the same command goes on")


class _Dealer:
    """What is still to be dealt out: the tasks of dead workers first."""

    def __init__(self, tasks: Iterable[Task | None], batch: int) -> None:
        self._tasks = (task for task in tasks if task is not None)
        self._again: deque[Task] = deque()
        self._next = next(self._tasks, None)
        self._deaths: Counter[int] = Counter()
        self._most = IN_HAND * batch

    @property
    def empty(self) -> bool:
        return not self._again and self._next is None

    def deal(self, worker: _Worker, workers: Sequence[_Worker]) -> list[Task]:
        """Fills the worker's hand; gives what is new in it."""
        oldest = min((number for each in workers for number in each.in_hand), default=None)
        hand: list[Task] = []
        while len(worker.in_hand) < self._most:
            if self._again:
                task = self._again.popleft()
            elif self._next and self._next.number < (self._next.number if oldest is None else oldest) + SPREAD:
                task, self._next = self._next, next(self._tasks, None)
            else:
                break
            worker.in_hand[task.number] = task
            hand.append(task)
        return hand

    def take_back(self, worker: _Worker) -> list[Receipt]:
        """Takes a dead worker's hand; gives the receipts of images that too many workers died with."""
        self._deaths.update(worker.in_hand.keys())
        failed = []
        for number, task in sorted(worker.in_hand.items()):
            if self._deaths[number] < DEATHS:
                self._again.append(task)
                continue
            error = f"{task.name}: {DEATHS} workers died with it, or with an image near it, in hand"
            failed.append(Receipt(number, {"path": task.name, "label": task.label, **NOTHING, "error": error}))
        worker.in_hand.clear()
        return failed


def _send(worker: _Worker, message: object) -> None:
    with suppress(OSError):  # it died: reading from it will tell
        worker.pipe.send(message)


def _death(worker: _Worker) -> str:
    code = worker.process.exitcode
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def _share_of_cores(number: int, count: int) -> set[int]:
    """This worker's cores of those that may be used; several may share one."""
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return set(mine[number % len(mine) :: count]) if mine else set()


# ---- in the worker ----


def _serve(pipe: Connection, opener: Opener, batch: int | None, share: set[int]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the process that deals; it ends this one
        signal.signal(number, signal.SIG_IGN)
    if share:
        os.sched_setaffinity(0, share)
    speaking = threading.Lock()

    def say(*message: object) -> None:
        with speaking, suppress(OSError):  # nobody listens any more: `listen` ends the work
            pipe.send(message)

    warnings.simplefilter("ignore", WsssWarning)
    try:
        labeler = opener()
    except WsssError as error:
        say("refused", error.message, error.hint)
        return
    batch = batch or labeler.usual_batch()
    say("ready", labeler.classes, labeler.settings, batch)
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
    folder, labels = start
    executor, told = LocalExecutor(labeler, batch=batch), Summary()
    try:
        for receipts in executor.work(_tasks(inbox), folder, labels, stop, lambda message: say("warn", message)):
            executor.report(told)
            say("receipts", receipts, told)
    except StoreError as error:
        say("broken", error.message, error.hint)
        return
    say("bye")


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
