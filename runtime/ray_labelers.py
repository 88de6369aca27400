"""Labelers on the nodes of a cluster, in actors. See `on_ray`.

A row of receipts is a table of one row (``life``, ``host``, ``receipts``, ``seconds``, ``said``, ``error``), so that Ray
neither joins nor divides it; JSON in ASCII, since file names may be no Unicode.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
import uuid
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

import pyarrow as pa
import ray

from ..errors import ImageError, StoreError, WsssError, WsssWarning
from ..photographs import ImageFile
from ..storeformat import LabelWriter
from .ray_desk import Word
from .ray_readers import desk_called, files_of, move_to
from .run import Alone, Summary
from .stream import NOTHING, Receipt, Task
from .workers import DEATHS, Opener

BEAT = 2.0
"""Seconds between a labeler's signs of life."""


@dataclass(frozen=True)
class Labelling:
    """How the labelers of a run label.

    Args:
        desk: name of its actor.
        opener: opens a labeler.
        settings: what every labeler must have, as the store has it.
        labels: where label maps go; every node must reach it.
        cores: of its host, that a labeler may use; None: all.
    """

    desk: str
    opener: Opener
    settings: Mapping[str, Any]
    labels: LabelWriter
    cwd: str
    batch: int
    cores: int | None


class RayLabeler:
    """A labeler in an actor. Several calls at a time share its stages, which so have the next batch waiting.

    What it cannot do is told in a row, not raised: Ray would try it again.
    """

    def __init__(self, how: Labelling) -> None:
        self._how, self._life, self._host = how, uuid.uuid4().hex, socket.gethostname()
        self._gate = Gate()
        self._work: _Work | None = None
        self._refused = ""
        self._desk = desk_called(how.desk)
        seat = ray.get(self._desk.hello.remote(ray.get_runtime_context().get_actor_id(), self._life, self._host))
        move_to(how.cwd)
        if how.cores:
            _sit(seat, how.cores)
        self._stop = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()
        warnings.simplefilter("ignore", WsssWarning)  # the driver warns
        try:
            labeler = how.opener()
            if json.dumps(labeler.settings, sort_keys=True) != json.dumps(dict(how.settings), sort_keys=True):
                raise WsssError(
                    f"--on ray: the labeler on {self._host} would label with other settings than the first one",
                    hint="the bundle must be the same on every node; name the engine with --engine",
                )
        except WsssError as error:
            self._refused = json.dumps({"kind": "refused", "message": error.message, "hint": error.hint})
        else:
            self._work = _Work(Alone(labeler, batch=how.batch), how.labels, self._stop)

    def _beat(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # the desk is gone: the run is over
            while not self._stop.is_set():
                if ray.get(self._desk.beat.remote(self._life)):
                    self._stop.set()
                time.sleep(BEAT)

    def __call__(self, table: pa.Table) -> pa.Table:
        """A row of receipts for a row of files."""
        if self._work is None:
            return self._row([], self._refused)
        files = files_of(table)
        word: Word = ray.get(self._desk.begin.remote(self._life, [task.number for task, _ in files]))
        if word.stopped:
            return self._row([], "")
        left = set(word.leave)
        mine = [(task, file) for task, file in files if task.number not in left]
        try:
            if word.deaths:
                return self._row(self._one_by_one(mine, word.deaths), "")
            with self._gate.shared():
                return self._row(self._work.label(mine), "")
        except StoreError as error:
            return self._row([], json.dumps({"kind": "broken", "message": error.message, "hint": error.hint}))

    def _one_by_one(self, files: list[tuple[Task, ImageFile | ImageError]], deaths: Mapping[int, int]) -> list[Receipt]:
        """Labels images that a labeler died with, each alone, so that the one it died of is known."""
        assert self._work is not None
        receipts = []
        ray.get(self._desk.put_back.remote(self._life, [task.number for task, _ in files]))
        with self._gate.alone():
            for task, file in files:
                if deaths.get(task.number, 0) >= DEATHS:
                    error = f"{task.name}: {DEATHS} labelers died with it in hand"
                    receipts.append(Receipt(task.number, {"path": task.name, "label": task.label, **NOTHING, "error": error}))
                    continue
                word: Word = ray.get(self._desk.begin.remote(self._life, [task.number]))
                if not word.stopped and not word.leave:
                    receipts += self._work.label([(task, file)])
                    ray.get(self._desk.put_back.remote(self._life, [task.number]))
        return receipts

    def _row(self, receipts: list[Receipt], error: str) -> pa.Table:
        told, said = Summary(), list[str]()
        if self._work is not None:
            self._work.crew.report(told)
            said, self._work.said[:] = list(self._work.said), []
        return pa.table(
            {
                "life": [self._life],
                "host": [self._host],
                "receipts": [json.dumps([[receipt.number, receipt.record] for receipt in receipts])],
                "seconds": [json.dumps(dataclasses.asdict(told))],
                "said": [json.dumps(said)],
                "error": [error],
            }
        )


def _sit(seat: int, cores: int) -> None:
    """Labelers of one host keep to cores of their own: each would start as many threads as there are cores."""
    if hasattr(os, "sched_setaffinity"):
        mine = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {mine[(seat * cores + number) % len(mine)] for number in range(cores)})


@dataclass
class _Delivered:
    """The files that were brought, in the place of a folder; each is read once."""

    files: defaultdict[str, list[ImageFile | ImageError]] = field(default_factory=lambda: defaultdict(list))
    changing: threading.Lock = field(default_factory=threading.Lock)

    def read(self, name: str) -> ImageFile:
        with self.changing:
            file = self.files[name].pop()
            if not self.files[name]:
                del self.files[name]
        if isinstance(file, ImageError):
            raise file
        return file

    def stamp(self, name: str) -> Mapping[str, int | str]:
        raise NotImplementedError("a labeler asks for no stamps")


class _Work:
    """A crew of one that runs as long as its process; calls put their images in and wait for the receipts."""

    def __init__(self, crew: Alone, labels: LabelWriter, stop: threading.Event) -> None:
        self.crew, self._stop = crew, stop
        self._delivered = _Delivered()
        self._inbox: SimpleQueue[list[Task]] = SimpleQueue()
        self._lock = threading.Lock()
        self._count = 0
        self._waiting: dict[int, tuple[int, SimpleQueue[Receipt | None]]] = {}
        """By a number of this process, since Ray may send a call twice: the run's number, and who waits."""
        self.said: list[str] = []
        """What the user should know, and was not told."""
        self._ended = False
        self._error: BaseException | None = None
        threading.Thread(target=self._run, args=(labels,), daemon=True).start()

    def label(self, files: list[tuple[Task, ImageFile | ImageError]]) -> list[Receipt]:
        """The receipts of these images, in order; of those that were begun, when the run is stopped.

        Raises:
            StoreError: a label cannot be written.
        """
        mine: SimpleQueue[Receipt | None] = SimpleQueue()
        with self._lock:
            if self._error:
                raise self._error
            if self._ended:
                return []
            tasks = []
            for task, file in files:
                with self._delivered.changing:
                    self._delivered.files[task.name].append(file)
                tasks.append(task._replace(number=self._count))
                self._waiting[self._count] = task.number, mine
                self._count += 1
        self._inbox.put(tasks)
        receipts = list[Receipt]()
        while len(receipts) < len(files) and (receipt := mine.get()) is not None:
            receipts.append(receipt)
        if self._error:
            raise self._error
        return sorted(receipts, key=lambda receipt: receipt.number)

    def _run(self, labels: LabelWriter) -> None:
        error: BaseException | None = None
        try:
            for receipts in self.crew.work(self._tasks(), self._delivered, labels, self._stop, self.said.append):
                for receipt in receipts:
                    with self._lock:
                        number, asker = self._waiting.pop(receipt.number)
                    asker.put(Receipt(number, receipt.record))
        except BaseException as caught:
            error = caught
        with self._lock:
            self._ended, self._error = True, error
            for _, asker in self._waiting.values():
                asker.put(None)

    def _tasks(self) -> Iterator[Task | None]:
        while not self._stop.is_set():
            try:
                yield from self._inbox.get(timeout=0.01)
            except Empty:
                yield None


class Gate:
    """Lets many through together, or one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside, self._asking = 0, 0

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Together with others that share."""
        with self._changed:
            self._changed.wait_for(lambda: self._inside >= 0 and not self._asking)
            self._inside += 1
        try:
            yield
        finally:
            self._leave(lambda: self._inside - 1)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """With nobody else; whoever comes later waits."""
        with self._changed:
            self._asking += 1
            self._changed.wait_for(lambda: self._inside == 0)
            self._asking -= 1
            self._inside = -1
        try:
            yield
        finally:
            self._leave(lambda: 0)

    def _leave(self, inside: Callable[[], int]) -> None:
        with self._changed:
            self._inside = inside()
            self._changed.notify_all()
