"""A run on a Ray cluster: the images pass through Ray Data, readers before an actor pool of labelers.

    tasks -> desk -> readers (bytes of files) -> labelers (write the labels) -> receipts -> the manifest

This process lists the images, hands them to the desk a few thousand ahead (`ray_desk`), and writes the manifest; neither
it nor the desk grows with the folder. Ray Data moves the bytes, holds readers back while labelers are busy, keeps the pool
at its size and sends a dead labeler's calls again. What it does not do, the desk does:

- the images need not be known before the run: a slot, one of Ray's read tasks, asks what to read when it is its turn;
- an image that labelers die of fails, by name (Ray Data itself would send it again for ever);
- images that are out too long, as with a node that is lost and not replaced, are dealt again;
- receipts that come twice count once.

Should Ray give up in spite of it, a new round of slots takes what is left. wsss must be installed on every node, in this
version, and every node must reach the bundle, the images and the store under the same paths.
"""

from __future__ import annotations

import contextlib
import json
import math
import operator
import os
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import ray
from ray.data import ActorPoolStrategy
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .. import __version__
from ..classes import ClassList
from ..errors import StoreError, WsssError, WsssWarning
from ..photographs import Place
from ..storeformat import LabelWriter
from .pipeline import strange_to_mini
from .ray_cluster import connect, free, last_line, pipeline_settings
from .ray_desk import PATIENCE, SILENT, Desk
from .ray_labelers import Labelling, RayLabeler
from .ray_readers import NAMESPACE, Reading, Slots
from .run import Summary, Warn
from .stream import Receipt, Task
from .workers import Opener

HAND = 2048
"""Tasks of a slot at most. A slot costs this process 4 kB until the round ends: 200 MB for 100 million images."""
ROW_BATCHES = 4
"""Batches in a row of files. A row costs this process 8 ms, so that rows grow with the pool: beyond 32 labelers, as much
longer as there are more of them."""
ROW_BYTES = 32 << 20
"""Bytes of a row, unless one image alone is larger. The store of objects should hold ``IN_HAND`` rows for each labeler."""
CALLS = 3
"""Rows that a labeler works on at a time: while the last images of one are fused, those of the next are read."""
IN_HAND = 5
"""Rows that a labeler has been sent."""
AHEAD = 1024
"""Images for each labeler that may be out; at least 8 times as many."""
QUIET = 60.0
"""Seconds without a receipt after which the user is told."""


class RayCrew:
    """Labelers on a Ray cluster, for one run.

    Args:
        opener: opens a labeler on a node; it is pickled on the way there.
        address: of the cluster; None takes RAY_ADDRESS, or the cluster that runs on this machine, or starts one on it.
        workers: labelers; None takes one for each GPU of the cluster or, if it has none, each core.
        gpu: each has a GPU of its own; None: if the cluster has any.
        batch: images that a labeler labels together.
        patience: seconds after which images that are out are dealt again.
        log: told of the cluster, and what it is waited for.

    Raises:
        WsssError: no such cluster, or a labeler cannot be opened there.
    """

    def __init__(
        self,
        opener: Opener,
        *,
        address: str | None = None,
        workers: int | None = None,
        gpu: bool | None = None,
        batch: int = 8,
        patience: float = PATIENCE,
        log: Callable[[str], None] = lambda message: None,
    ) -> None:
        self._opener, self._batch, self._patience, self._log = opener, batch, patience, log
        self._seconds: dict[str, Summary] = {}
        """What each labeler took so far, by life."""
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
            there = f"{len(nodes)} nodes, {gpus} GPUs, {sum(cores)} cores"
            log(f"Ray: {there}; {self._workers} labelers, each with {'a GPU' if self._gpu else f'{self._cores} cores'}")
            if self._workers > (gpus if self._gpu else sum(cores)):
                log(f"Ray: some of the {self._workers} labelers wait until the cluster grows: it has {there}")
            memory = sum(node.get("object_store_memory", 0) for node in nodes)
            self._row_bytes = int(min(ROW_BYTES, max(1 << 20, memory / (self._workers * 2 * IN_HAND))))
            self.classes, self.settings = self._first_opened()
            if message := strange_to_mini(self.classes, self.settings):
                warnings.warn(message, WsssWarning, stacklevel=2)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RayCrew:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the cluster; one that was started for this run ends."""
        if self._connected:
            ray.shutdown()

    def _first_opened(self) -> tuple[ClassList, dict[str, Any]]:
        """What a labeler on the cluster is: this machine may have no GPU."""
        needed = {"num_gpus": 1 if self._gpu else 0, "num_cpus": 1}
        open_first = ray.remote(max_calls=int(self._gpu), max_retries=0)(_open_first)  # what held a GPU must end to leave it
        asked = open_first.options(**needed).remote(self._opener, os.getcwd())
        while not ray.wait([asked], timeout=QUIET)[0]:
            self._log(f"Ray: waiting for the first labeler, which needs {needed}; the cluster has {free()} free")
        try:
            version, *told = ray.get(asked)
        except ray.exceptions.RayError as error:
            raise WsssError(
                f"--on ray: a worker could not open a labeler: {last_line(error)}",
                hint=f"wsss {__version__} with its models must be installed on every node of the cluster",
            ) from None
        if version != __version__:
            raise WsssError(
                f"--on ray: the cluster has wsss {version}, this is {__version__}", hint="install the same on all nodes"
            )
        if isinstance(told[0], str):
            raise WsssError(told[0], hint=told[1])
        return told[0], told[1]

    def report(self, summary: Summary) -> None:
        """Adds up the labelers' seconds; of their padding it takes the mean."""
        each = list(self._seconds.values())
        for stage in ("tag", "detect", "segment", "fuse"):
            summary.stage_seconds[stage] = sum(told.stage_seconds.get(stage, 0.0) for told in each)
        summary.engine_seconds = sum(told.engine_seconds for told in each)
        padding = [told.padding for told in each if told.padding is not None]
        summary.padding = sum(padding) / len(padding) if padding else None

    def work(
        self, tasks: Iterable[Task | None], folder: Path | Place, labels: LabelWriter, stop: threading.Event, warn: Warn
    ) -> Generator[list[Receipt], None, None]:
        """The receipts of all tasks as they come; once ``stop`` is set, of those that labelers had in hand.

        Raises:
            StoreError: a labeler cannot write, or writes where this machine does not see it. WsssError: the labelers die
            before they label anything, or would label otherwise than the first one.
        """
        name = f"desk-{uuid.uuid4().hex}"
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        how = {"name": name, "namespace": NAMESPACE, "num_cpus": 0, "scheduling_strategy": here}
        desk = (
            ray.remote(Desk)
            .options(**how)
            .remote(max(8, self._workers) * AHEAD, patience=self._patience, silent=min(SILENT, self._patience / 2))
        )
        rows = self._batch * ROW_BATCHES * max(1, self._workers // 32)
        cores = None if self._gpu else self._cores
        labelling = Labelling(name, self._opener, self.settings, labels, os.getcwd(), self._batch, cores)
        images = operator.length_hint(tasks, HAND * self._workers)
        hand = min(HAND, max(2 * rows, images // (8 * self._workers)))  # a short run is shared out too
        dealing = _Dealing(tasks, hand, desk, stop, warn)
        try:
            fruitless, number, left = 0, 0, images
            while True:
                reading = Reading(name, number, folder, os.getcwd(), rows, self._row_bytes)
                slots = math.ceil(left / hand) + self._workers
                came, failure = 0, ""
                try:
                    with contextlib.closing(self._round(Slots(slots, reading), labelling)) as received:
                        for row in received:
                            fresh, news, all_done = self._taken(row, desk, labels)
                            for line in news:
                                warn(line)
                            dealing.heard()
                            came += len(fresh)
                            if fresh:
                                yield fresh
                            if all_done:  # not waiting for calls that a lost node has, and others have done
                                break
                except ray.exceptions.RayTaskError:
                    raise  # of ours: not what a new round would cure
                except ray.exceptions.RayError as error:
                    failure = last_line(error)
                left, more = ray.get(desk.open.remote())
                if stop.is_set() or not (left or more):
                    break
                fruitless = 0 if came else fruitless + 1
                if fruitless == 3:
                    raise WsssError(
                        f"--on ray: the cluster labels nothing any more: {failure or 'its labelers end without a word'}",
                        hint="what is in the store is whole: the same command goes on. `ray logs` may say more",
                    )
                warn(f"Ray: {failure or 'a round ended'}; a new one begins with the {left} images that are out")
                ray.get(desk.start_round.remote())
                left, number = max(left, images // 8 if more else 0), number + 1
        finally:
            dealing.close()
            ray.kill(desk)
        dealing.check()

    def _round(self, slots: Slots, labelling: Labelling) -> Generator[Mapping[str, Any], None, None]:
        """The rows of receipts of one pass of Ray Data."""
        with pipeline_settings():
            readers = ray.data.read_datasource(
                slots, override_num_blocks=len(slots), num_cpus=0, concurrency=max(2, self._workers // 2)
            )
            labelled = readers.map_batches(
                RayLabeler,
                fn_constructor_kwargs={"how": labelling},
                batch_format="pyarrow",
                batch_size=1,
                num_cpus=self._cores,
                num_gpus=1 if self._gpu else 0,
                compute=ActorPoolStrategy(
                    size=self._workers,
                    max_concurrent_calls_per_actor=CALLS,
                    enable_true_multi_threading=True,
                    max_tasks_in_flight_per_actor=IN_HAND,
                ),
            )
        for table in labelled.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from table.to_pylist()

    def _taken(self, row: Mapping[str, Any], desk: Any, labels: LabelWriter) -> tuple[list[Receipt], list[str], bool]:
        """Those receipts of a row that are news, what is to be said, and whether they were the last."""
        if row["error"]:
            told = json.loads(row["error"])
            raise (StoreError if told["kind"] == "broken" else WsssError)(told["message"], hint=told["hint"])
        receipts = {number: Receipt(number, record) for number, record in json.loads(row["receipts"])}
        if row["life"] not in self._seconds:
            _check_shared(labels, receipts.values(), row["host"])
        self._seconds[row["life"]] = Summary(**json.loads(row["seconds"]))
        fresh, news, all_done = ray.get(desk.done.remote(list(receipts)))
        news += [f"{row['host']}: {said}" for said in json.loads(row["said"])]
        return [receipts[number] for number in fresh], news, all_done


class _Dealing:
    """Lists the images for the desk in a thread of its own, and watches meanwhile."""

    def __init__(self, tasks: Iterable[Task | None], hand: int, desk: Any, stop: threading.Event, warn: Warn) -> None:
        self._hand, self._desk, self._stop, self._warn = hand, desk, stop, warn
        self._over = threading.Event()
        self._heard = time.monotonic()
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=work, args=given, daemon=True) for work, given in ((self._deal, (tasks,)), (self._watch, ()))
        ]
        for thread in self._threads:
            thread.start()

    def heard(self) -> None:
        """Receipts came."""
        self._heard = time.monotonic()

    def close(self) -> None:
        """Ends it, whatever is left."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def check(self) -> None:
        """Raises what the listing raised."""
        if self._error:
            raise self._error

    def _deal(self, tasks: Iterable[Task | None]) -> None:
        upcoming = (task for task in tasks if task is not None)
        try:
            while not self._ends() and (hand := list(islice(upcoming, self._hand))):
                while not ray.get(self._desk.put.remote(hand)):
                    if self._over.wait(0.1) or self._stop.is_set():
                        return
            ray.get(self._desk.end.remote())
        except BaseException as error:
            self._error = error
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(self._desk.stop.remote())

    def _watch(self) -> None:
        told = False
        while not self._over.wait(0.1):
            if self._stop.is_set() and not told:
                told = True
                ray.get(self._desk.stop.remote())
            if time.monotonic() - self._heard > QUIET:
                self.heard()
                self._warn(f"Ray: nothing for {QUIET:.0f} seconds; the cluster has {free()} free")

    def _ends(self) -> bool:
        return self._over.is_set() or self._stop.is_set()


def _open_first(opener: Opener, cwd: str) -> tuple[Any, ...]:
    with contextlib.suppress(OSError):
        os.chdir(cwd)
    warnings.simplefilter("ignore", WsssWarning)  # the driver warns
    try:
        labeler = opener()
    except WsssError as error:
        return __version__, error.message, error.hint
    return __version__, labeler.classes, labeler.settings


def _check_shared(labels: LabelWriter, receipts: Iterable[Receipt], host: str) -> None:
    """Raises StoreError where a labeler wrote its first labels into a folder that is another one here."""
    folder = getattr(labels, "folder", None)
    written = [receipt.record["label"] for receipt in receipts if "error" not in receipt.record]
    if not isinstance(folder, Path) or not written:
        return
    for _ in range(20):  # a network's folder may show a new file late
        if (folder / written[0]).is_file():
            return
        time.sleep(0.5)
    raise StoreError(
        f"--out {folder.parent}: the labels that the labeler on {host} wrote are not there",
        hint="the store must be a folder that all nodes share, or in an object store (s3://...)",
    )
