"""A run on a Ray cluster, as one Ray Data pipeline.

    names of images -> pool of labelers, which read, label and write -> receipts -> the manifest

This process lists the images, one window at a time, and writes the manifest. Ray Data keeps the pool at its size, restarts
labelers that die and repeats their calls. If two labelers die during a call, its images are labeled one by one in a second pass,
in which an image that kills labelers fails alone. The same version of wsss must be installed on every node, and every node must
reach the bundle, the images and the store under the same paths.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import ray
from ray.data import ActorPoolStrategy
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ... import __version__
from ...classes import ClassList
from ...errors import StoreError, WsssError, WsssWarning
from ...store.format import LabelWriter
from ..chain import doubtful_classes
from ..run.label_folder import Summary, Warn
from ..run.sources import Source
from ..run.stream import Receipt, Task, failure
from ..run.workers import DEATHS, Opener, add_up
from .cluster import connect, free, last_line, pipeline_settings
from .labeler import Control, RayLabeler

WINDOW = 200_000
"""Images of one pipeline; 20,000 for each labeler where that is more. Their names are in this process's memory, and each
pipeline loads the models once."""
CALL_BATCHES = 8
"""Most batches in a call. A short run has smaller calls, so that every labeler gets a share."""
CONCURRENT_CALLS = 2
"""Calls that a labeler runs at a time: while the last images of one are fused, those of the next are read."""
CALLS_IN_FLIGHT = 4
"""Most calls that a labeler has been sent."""
QUIET_SECONDS = 60.0
"""Seconds without a receipt after which a warning shows the cluster's free resources."""


class RayExecutor:
    """Runs labelers on a Ray cluster, for one run.

    Args:
        opener: opens a labeler on a node; it is pickled to get there.
        address: of the cluster; None takes RAY_ADDRESS, or the cluster on this machine, or starts one here.
        workers: number of labelers; None takes one for each GPU of the cluster or, if it has none, each core.
        gpu: whether each labeler has its own GPU; None: if the cluster has any.
        batch: images that a labeler labels together; None takes the batch size that its engines were built for.
        log: called with messages about the cluster's resources, and about what the run waits for.

    Raises:
        WsssError: there is no such cluster, or a labeler cannot be opened on it.
    """

    def __init__(
        self,
        opener: Opener,
        *,
        address: str | None = None,
        workers: int | None = None,
        gpu: bool | None = None,
        batch: int | None = None,
        log: Callable[[str], None] = lambda message: None,
    ) -> None:
        self._opener, self._log = opener, log
        self._summaries: dict[str, Summary] = {}
        """The seconds so far of each labeler process."""
        self._connected = not ray.is_initialized()
        if self._connected:
            connect(address, log)
        try:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            gpus = sum(int(node.get("GPU", 0)) for node in nodes)
            cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
            self._gpu = gpus > 0 if gpu is None else gpu
            self._workers = workers or (gpus if self._gpu else sum(cores)) or 1
            self._cores = 1 if self._gpu else max(1, min([sum(cores) // self._workers, *cores]))
            resources = f"{len(nodes)} nodes, {gpus} GPUs, {sum(cores)} cores"
            log(f"Ray: {resources}; {self._workers} labelers, each with {'a GPU' if self._gpu else f'{self._cores} cores'}")
            if self._workers > (gpus if self._gpu else sum(cores)):
                log(f"Ray: some of the {self._workers} labelers wait until the cluster grows: it has {resources}")
            self.classes, self.settings, usual_batch = self._open_once()
            for message in doubtful_classes(self.classes, self.settings):
                warnings.warn(message, WsssWarning, stacklevel=2)
            self._batch = batch or usual_batch
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect from the cluster; one that was started for this run ends."""
        if self._connected:
            ray.shutdown()

    def _open_once(self) -> tuple[ClassList, dict[str, Any], int]:
        """The classes, settings and usual batch of a labeler, opened on the cluster because this machine may have no GPU."""
        needed = {"num_gpus": 1 if self._gpu else 0, "num_cpus": 1}
        open_remotely = ray.remote(max_calls=int(self._gpu), max_retries=0)(_open)  # the process must end to free its GPU
        opened = open_remotely.options(**needed).remote(self._opener, os.getcwd())
        while not ray.wait([opened], timeout=QUIET_SECONDS)[0]:
            self._log(f"Ray: waiting for the first labeler, which needs {needed}; the cluster has {free()} free")
        try:
            version, *result = ray.get(opened)
        except ray.exceptions.RayError as error:
            raise WsssError(
                f"--on ray: a worker could not open a labeler: {last_line(error)}",
                hint=f"wsss {__version__} with its models must be installed on every node of the cluster",
            ) from None
        if version != __version__:
            raise WsssError(
                f"--on ray: the cluster has wsss {version}, this is {__version__}", hint="install the same version on all nodes"
            )
        if isinstance(result[0], str):
            raise WsssError(result[0], hint=result[1])
        return result[0], result[1], result[2]

    def report(self, summary: Summary) -> None:
        """Fill in the sum of the labelers' seconds, and the mean of their padding."""
        add_up(self._summaries.values(), summary)

    def work(
        self, tasks: Iterable[Task | None], source: Source, labels: LabelWriter, stop: threading.Event, warn: Warn
    ) -> Generator[list[Receipt], None, None]:
        """Yield the receipts of all tasks as they arrive; once ``stop`` is set, only of those in progress.

        Raises:
            StoreError: a labeler cannot write, or its labels are not visible on this machine.
            WsssError: the labelers die before they label anything, or their settings differ from the first one's.
        """
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        control = ray.remote(Control).options(num_cpus=0, scheduling_strategy=here).remote()
        labeler = {
            "control": control,
            "opener": self._opener,
            "settings": self.settings,
            "source": source,
            "labels": labels,
            "cwd": os.getcwd(),
            "batch": self._batch,
            "cores": None if self._gpu else self._cores,
        }
        upcoming = (task for task in tasks if task is not None)
        with _watching(stop, control, warn) as note_progress:
            while not stop.is_set() and (window := list(islice(upcoming, max(WINDOW, 20_000 * self._workers)))):
                left = {task.number: task for task in window}
                share = len(left) // (4 * self._workers)
                cause = ""
                for call_size in (max(self._batch, min(CALL_BATCHES * self._batch, share)), 1):
                    if not left or stop.is_set():
                        break
                    if call_size == 1:
                        warn(f"Ray: labelers died while they labeled {len(left)} images{cause}; these are labeled one by one")
                    try:
                        for row in self._pass(list(left.values()), call_size, labeler):
                            note_progress()
                            receipts = [
                                receipt for receipt in self._receipts(row, labels, warn) if left.pop(receipt.number, None)
                            ]
                            if receipts:
                                yield receipts
                    except ray.exceptions.RayError as error:
                        cause = f" ({last_line(error)})"
                if stop.is_set():
                    return
                if len(left) == len(window):
                    raise WsssError(
                        f"--on ray: the cluster labels nothing: its labelers die{cause}",
                        hint="the store is intact: run the same command again to go on. `ray logs` may show more",
                    )
                if left:
                    yield [failure(task, f"{task.name}: {DEATHS} labelers died while they labeled it") for task in left.values()]

    def _pass(self, tasks: list[Task], call_size: int, labeler: dict[str, Any]) -> Iterator[dict[str, str]]:
        """The rows that `RayLabeler` returns for these tasks, ``call_size`` of them a call."""
        calls = [
            {"call": f"{tasks[start].number}/{call_size}", "tasks": json.dumps(tasks[start : start + call_size])}
            for start in range(0, len(tasks), call_size)  # JSON in ASCII, because file names may not be valid Unicode
        ]
        with pipeline_settings():
            labeled = ray.data.from_items(calls, override_num_blocks=len(calls)).map_batches(
                RayLabeler,
                fn_constructor_kwargs=labeler,
                batch_size=None,
                num_cpus=self._cores,
                num_gpus=1 if self._gpu else 0,
                compute=ActorPoolStrategy(
                    size=min(self._workers, len(calls)),
                    max_concurrent_calls_per_actor=CONCURRENT_CALLS if call_size > 1 else 1,
                    enable_true_multi_threading=True,
                    max_tasks_in_flight_per_actor=CALLS_IN_FLIGHT if call_size > 1 else 1,
                ),
            )
            yield from labeled.iter_rows()

    def _receipts(self, row: dict[str, str], labels: LabelWriter, warn: Warn) -> list[Receipt]:
        """The receipts in a labeler's row. Raises the error that the row has instead."""
        if row["error"]:
            error = json.loads(row["error"])
            kinds = {"StoreError": StoreError, "WsssError": WsssError}
            if error["kind"] not in kinds:
                raise RuntimeError(error["message"])  # a bug; the message has its traceback
            raise kinds[error["kind"]](error["message"], hint=error["hint"])
        receipts = [Receipt(number, record) for number, record in json.loads(row["receipts"])]
        if row["process"] not in self._summaries:
            _check_shared(labels, receipts, row["host"])
        self._summaries[row["process"]] = Summary(**json.loads(row["seconds"]))
        for message in json.loads(row["warnings"]):
            warn(f"{row['host']}: {message}")
        return receipts


@contextlib.contextmanager
def _watching(stop: threading.Event, control: Any, warn: Warn) -> Iterator[Callable[[], None]]:
    """Pass ``stop`` on to the labelers, and warn when no receipt arrives for long; yields a function to call when one does."""
    over, last = threading.Event(), [time.monotonic()]

    def watch() -> None:
        stopped = False
        while not over.wait(0.1):
            if stop.is_set() and not stopped:
                stopped = True
                ray.get(control.stop.remote())
            if time.monotonic() - last[0] > QUIET_SECONDS:
                last[0] = time.monotonic()
                warn(f"Ray: nothing for {QUIET_SECONDS:.0f} seconds; the cluster has {free()} free")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: last.__setitem__(0, time.monotonic())
    finally:
        over.set()
        thread.join()
        ray.kill(control)


def _open(opener: Opener, cwd: str) -> tuple[Any, ...]:
    with contextlib.suppress(OSError):
        os.chdir(cwd)
    warnings.simplefilter("ignore", WsssWarning)  # the driver warns
    try:
        labeler = opener()
    except WsssError as error:
        return __version__, error.message, error.hint
    return __version__, labeler.classes, labeler.settings, labeler.usual_batch()


def _check_shared(labels: LabelWriter, receipts: Iterable[Receipt], host: str) -> None:
    """Raise StoreError where a labeler's first label is not visible on this machine."""
    folder = getattr(labels, "folder", None)
    written = [receipt.record["label"] for receipt in receipts if "error" not in receipt.record]
    if not isinstance(folder, Path) or not written:
        return
    for _ in range(20):  # network file systems may show new files late
        if (folder / written[0]).is_file():
            return
        time.sleep(0.5)
    raise StoreError(
        f"--out {folder.parent}: the labels that the labeler on {host} wrote are not there",
        hint="the store must be a folder that all nodes share, or in an object store (s3://...)",
    )
