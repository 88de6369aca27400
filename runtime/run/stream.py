"""Images through the chain, all stages at work at once: decoding, tagging, detecting, outlining, fusing, writing.

Each stage has a thread of its own and takes whole batches from a bounded queue; what it needs of a photograph (its views,
its canvases) is prepared by a pool of threads while the batch waits for it, and only where the stage before asked for it.
The engines take turns on the device (`device`), so that it always has the next call waiting.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from ...batch import VOID, Boxes, Labels, Masks, Photograph, PseudoLabels
from ...cores import cores
from ...errors import ImageError, OutOfMemory, WsssError
from ...photographs import ImageFile, Place, count_pixels, decode, read_file
from ...store.format import LabelWriter
from ...store.local import Record
from ..canvas import Prepares
from ..device import free_bytes
from ..labeler import Labeler
from ..segment import Embedded, MaskPredictor
from .prefetch import Budget, PriorityThreadPool, prefetched

T = TypeVar("T")

PIXEL_BYTES = 3 << 29
"""Decoded photographs in memory at once, or a quarter of what is free. A larger one is alone with it."""
SMALL = 4_000_000
"""Pixels up to which a photograph is decoded as soon as it is read, before there is room for it in the budget."""
LARGE = 16_000_000
"""Pixels from which on a photograph is charged what decoding it takes for a moment (Pillow's copy and two of ours, 10
bytes a pixel) instead of what stays (RGB, 3 bytes): a few at once would be more than all others together."""
SWITCH_SECONDS = 0.001
"""How long a thread may keep the interpreter from one that waits for it. Python's 5 ms, several times a batch, is what an
engine of 20 ms a batch would wait for its next call."""
URGENCY = {"read": 0, "tag": 1, "detect": 2, "segment": 3}
"""Of work for a stage: what is nearer to its end goes first."""
READERS = 16
"""Threads that fetch photographs from where they are not on this machine: they wait, for the most part."""
AHEAD = 2
"""Batches that wait before a stage, so that the engines find the next one even where making it now and then took twice as
long as usual."""
WRITERS = 8
"""Threads that encode and write labels: most of the time they wait for the disk."""
NOTHING: Mapping[str, int | str] = {"bytes": 0, "mtime_ns": 0, "sha256": ""}
"""What a line says of a file that could not be read."""


class Task(NamedTuple):
    """An image to be labeled, the ``number``-th of a run."""

    number: int
    name: str
    label: str
    twins: Sequence[str] = ()
    """Photographs of the run with the same stem, itself too, that given labels or boxes might take for it."""


class Receipt(NamedTuple):
    """A task that is done, its label written, or that failed, and its line for the manifest."""

    number: int
    record: Record


@dataclass(slots=True)
class Loading:
    """A task whose file is read, and maybe decoded, or the receipt of its failure."""

    task: Task
    photo: Photograph | ImageFile | Future[Photograph] | Receipt
    amount: int = 0
    """Bytes taken from the budget."""
    file: Mapping[str, int | str] = field(default_factory=lambda: NOTHING)
    """What a line says of the file."""


@dataclass(slots=True)
class Batch:
    """Images that go through the stages together."""

    loaded: list[Loading] = field(default_factory=list)
    photos: list[Photograph] = field(default_factory=list)
    receipts: list[Receipt] = field(default_factory=list)
    """Of images that failed."""
    labels: Labels | None = None
    boxes: Boxes | None = None
    embedded: Embedded | None = None
    masks: Masks | None = None
    result: PseudoLabels | None = None

    def halves(self) -> Iterator[Batch]:
        """The batch as two, what its stages found so far divided accordingly; the receipts go with the first."""
        middle = len(self.photos) // 2
        for start, stop in ((0, middle), (middle, len(self.photos))):
            half = Batch(self.loaded[start:stop], self.photos[start:stop], self.receipts if start == 0 else [])
            if self.labels:
                half.labels = Labels(self.labels.score[start:stop], self.labels.present[start:stop])
            if self.boxes:
                half.boxes = self.boxes.keep((self.boxes.image >= start) & (self.boxes.image < stop))
                half.boxes.image = half.boxes.image - start
            yield half


class Stream:
    """A labeler at work on one device.

    Args:
        labeler: the chain.
        folder: the images'.
        labels: where label maps go.
        batch: images labeled together.
        stop: when set, no further batch is begun.
    """

    def __init__(self, labeler: Labeler, folder: Path | Place, labels: LabelWriter, *, batch: int, stop: threading.Event) -> None:
        self._labeler, self._folder, self._labels = labeler, folder, labels
        self._size, self._stop = batch, stop
        self._over = threading.Event()
        self._budget = Budget(min(PIXEL_BYTES, free_bytes() // 4))
        self._pool = PriorityThreadPool(cores())
        self._readers = None if isinstance(folder, Path) else ThreadPoolExecutor(READERS, "read")
        self._writers = ThreadPoolExecutor(WRITERS, "write")
        self._encoders = ThreadPoolExecutor(labeler.device.callers, "encode")

    def run(self, tasks: Iterable[Task | None]) -> Generator[list[Receipt], None, None]:
        """The receipts of all tasks, a batch at a time, nearly in order.

        Args:
            tasks: None among them while the next one is late: what came so far does not wait for it.

        Raises:
            StoreError: a label cannot be written.
        """
        with ExitStack() as stack:
            stack.callback(sys.setswitchinterval, sys.getswitchinterval())
            sys.setswitchinterval(SWITCH_SECONDS)
            stack.callback(self._writers.shutdown)
            stack.callback(self._encoders.shutdown, cancel_futures=True)
            if self._readers:
                stack.callback(self._readers.shutdown, cancel_futures=True)
            stack.callback(self._pool.close)
            loaded = self._prefetched(self._load(tasks), 2 * self._size)
            tagged = self._prefetched(self._through(self._tag, self._batches(loaded)))
            encoding = self._prefetched(self._encoding(self._through(self._detect, tagged)))
            encoded = self._prefetched(self._results(encoding))
            outlined = self._prefetched(self._through(self._outline, encoded))
            fused = self._prefetched(self._through(self._fuse, outlined))
            yield from stack.enter_context(closing(self._prefetched(self._write(fused))))

    def _prefetched(self, source: Generator[T, None, None], depth: int = AHEAD) -> Generator[T, None, None]:
        return prefetched(source, depth, on_close=self._abandon)

    def _abandon(self) -> None:
        """Lets those go on to their end who wait for what may never come: tasks, or room for a photograph."""
        self._over.set()
        self._budget.close()

    def _ends(self) -> bool:
        return self._stop.is_set() or self._over.is_set()

    # ---- reading ----

    def _load(self, tasks: Iterable[Task | None]) -> Generator[Loading | None, None, None]:
        """The tasks in order as they are decoded; None where nothing more comes before others are finished."""
        upcoming = iter(tasks)
        reading: deque[Future[Loading]] = deque()
        ended = waiting = False
        while not self._ends():
            while not ended and not waiting and len(reading) < 2 * self._size:
                try:
                    task = next(upcoming)
                except StopIteration:
                    ended = True
                    break
                if task is None:
                    waiting = True
                else:
                    reading.append(self._begin(task))
            if not reading:
                if ended:
                    return
                yield None
                waiting = False
                continue
            waiting = False
            read = reading.popleft()
            loading = read.result()
            if not self._budget.fits(loading.amount):
                yield None
            self._budget.take(loading.amount)
            if isinstance(loading.photo, ImageFile):
                loading.photo = self._pool.submit(URGENCY["read"], decode, loading.photo)
            yield loading

    def _begin(self, task: Task) -> Future[Loading]:
        if self._readers:  # that only wait; decoding is for the others
            return self._readers.submit(self._read, task, 0)
        return self._pool.submit(URGENCY["read"], self._read, task, SMALL)

    def _read(self, task: Task, small: int) -> Loading:
        """A task's file, decoded at once if it has fewer pixels than ``small``."""
        told = NOTHING
        try:
            file = read_file(self._folder, task.name)
            told = _stamp(len(file.data), file)
            pixels = count_pixels(file)
            amount = pixels * (3 if pixels < LARGE else 10)
            return Loading(task, decode(file) if pixels < small else file, amount, told)
        except ImageError as error:
            return Loading(task, _failed(task, error, told))

    def _batches(self, loaded: Generator[Loading | None, None, None]) -> Generator[Batch, None, None]:
        """Batches of photographs that the detector sees on one canvas, so that its calls are full.

        An image waits for its like until four batches' worth of others have passed it.
        """
        waiting: dict[object, Batch] = {}
        since: dict[object, int] = {}
        with closing(loaded):
            for count, each in enumerate(loaded):
                if self._ends():
                    return
                due = list(waiting)
                if each is not None:
                    key, photo = self._decoded(each)
                    batch = waiting.setdefault(key, Batch())
                    since.setdefault(key, count)
                    if isinstance(photo, Photograph):
                        batch.loaded.append(each)
                        batch.photos.append(photo)
                    else:
                        batch.receipts.append(photo)
                    due = [k for k, b in waiting.items() if len(b.photos) == self._size or count - since[k] >= 4 * self._size]
                for key in due:
                    del since[key]
                    yield self._started(waiting.pop(key))
            for batch in waiting.values():
                if not self._stop.is_set():
                    yield self._started(batch)

    def _decoded(self, loading: Loading) -> tuple[object, Photograph | Receipt]:
        if isinstance(loading.photo, Receipt):
            return None, loading.photo
        try:
            photo = loading.photo.result() if isinstance(loading.photo, Future) else loading.photo
            assert isinstance(photo, Photograph)
            if reason := self._labeler.missing(photo, loading.task.twins):
                raise ImageError(reason)
            return self._labeler.canvas(photo), photo
        except ImageError as error:
            self._budget.give(loading.amount)
            return None, _failed(loading.task, error, loading.file)

    def _started(self, batch: Batch) -> Batch:
        self._prepare(self._labeler.tag.stage, "tag", batch.photos)
        return batch

    # ---- the chain ----

    def _through(self, stage: Callable[[Batch], None], batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
        with closing(batches):
            for batch in batches:
                yield from self._attempt(stage, batch)

    def _encoding(self, batches: Generator[Batch, None, None]) -> Generator[Future[list[Batch]], None, None]:
        """Batches for the slowest engine, by as many threads as keep it busy (`Device.callers`)."""
        with closing(batches):
            for batch in batches:
                yield self._encoders.submit(list[Batch], self._attempt(self._encode, batch))

    @staticmethod
    def _results(encoding: Generator[Future[list[Batch]], None, None]) -> Generator[Batch, None, None]:
        with closing(encoding):
            for batches in encoding:
                yield from batches.result()

    def _attempt(self, stage: Callable[[Batch], None], batch: Batch) -> Iterator[Batch]:
        try:
            if batch.photos:
                stage(batch)
        except OutOfMemory as error:
            if len(batch.photos) > 1:
                self._labeler.device.warn(f"out of memory with {len(batch.photos)} images; trying them in halves")
                for half in batch.halves():
                    yield from self._attempt(stage, half)
                return
            (loading,) = batch.loaded
            self._budget.give(loading.amount)
            batch = Batch(receipts=[*batch.receipts, _failed(loading.task, error, loading.file)])
        yield batch

    def _tag(self, batch: Batch) -> None:
        batch.labels = self._labeler.tag(batch.photos)
        wanted = np.flatnonzero(batch.labels.present.any(axis=1))
        self._prepare(self._labeler.detect.stage, "detect", [batch.photos[n] for n in wanted])

    def _detect(self, batch: Batch) -> None:
        assert batch.labels is not None
        batch.boxes = self._labeler.detect(batch.photos, batch.labels)
        self._prepare(self._labeler.segment.stage, "segment", [batch.photos[n] for n in np.unique(batch.boxes.image)])

    def _encode(self, batch: Batch) -> None:
        """The first half of `segment`, so that the next batch is encoded while this one is decoded."""
        stage = self._labeler.segment.stage
        if isinstance(stage, MaskPredictor):
            assert batch.boxes is not None
            batch.embedded = self._labeler.segment.part(stage.encode, batch.photos, batch.boxes)

    def _outline(self, batch: Batch) -> None:
        assert batch.boxes is not None
        stage = self._labeler.segment.stage
        if isinstance(stage, MaskPredictor) and batch.embedded is not None:
            batch.masks = self._labeler.segment.part(stage.decode, batch.embedded, batch.boxes)
        else:
            batch.masks = self._labeler.segment(batch.photos, batch.boxes)
        batch.embedded = None

    def _fuse(self, batch: Batch) -> None:
        if batch.masks is None:  # half of a batch that was too much for the device
            self._outline(batch)
        assert batch.labels is not None and batch.boxes is not None and batch.masks is not None
        batch.result = self._labeler.fuse(batch.photos, batch.labels, batch.boxes, batch.masks)
        batch.masks = None

    def _prepare(self, stage: object, name: str, photos: list[Photograph]) -> None:
        if isinstance(stage, Prepares) and photos:  # given labels and boxes look at no pixels
            rooms = [stage.room(photo) for photo in photos]
            alike = rooms.count(rooms[0]) == len(rooms)
            batch = np.zeros((len(photos), *rooms[0]), np.uint8) if alike else [np.zeros(room, np.uint8) for room in rooms]
            share = -(-len(photos) // cores())  # a job for each of many small photographs would cost more than it does
            for start in range(0, len(photos), share):
                some = list(zip(photos[start : start + share], batch[start : start + share], strict=True))
                made = self._pool.submit(URGENCY[name], _prepare_all, stage, some)
                for photo, out in some:
                    photo.ahead[name] = made, out

    # ---- writing ----

    def _write(self, batches: Generator[Batch, None, None]) -> Generator[list[Receipt], None, None]:
        with closing(batches):
            for batch in batches:
                rows = range(len(batch.photos))
                yield [*batch.receipts, *self._writers.map(lambda row, batch=batch: self._write_one(batch, row), rows)]

    def _write_one(self, batch: Batch, row: int) -> Receipt:
        loading, result = batch.loaded[row], batch.result
        assert result is not None
        try:
            if result.confidence is not None:
                self._labels.write_confidence(loading.task.label, result.confidence[row])
            self._labels.write(loading.task.label, result.label_maps[row])
            return Receipt(
                loading.task.number, record_of(self._labeler.classes.names, batch.photos[row], loading.task.label, result, row)
            )
        except ImageError as error:
            return _failed(loading.task, error, loading.file)
        finally:
            self._budget.give(loading.amount)


def _prepare_all(stage: Prepares, photos: list[tuple[Photograph, np.ndarray]]) -> None:
    for photo, out in photos:
        stage.prepare(photo, out)


def _failed(task: Task, error: WsssError, file: Mapping[str, int | str]) -> Receipt:
    return Receipt(task.number, {"path": task.name, "label": task.label, **file, "error": error.message})


def _stamp(size: int, file: ImageFile | Photograph) -> Mapping[str, int | str]:
    """What a line says of a file that was read."""
    change: dict[str, int | str] = {"etag": file.etag} if file.etag else {"mtime_ns": file.mtime_ns}
    return {"bytes": size, **change, "sha256": file.sha256}


def record_of(names: tuple[str, ...], photo: Photograph, label: str, result: PseudoLabels, row: int) -> Record:
    """The line of image ``row`` of a result. It tells nothing of the batch or the clock: it is the same in every run."""
    boxes = [
        {
            "label": names[result.boxes.label[i] - 1],
            "score": round(float(result.boxes.score[i]), 4),
            "xyxy": [round(float(edge), 2) for edge in result.boxes.xyxy_image[i]],
            "quality": round(float(result.quality[i]), 4),
            "area_px": int(result.area[i]),
            "won_px": int(result.won[i]),
        }
        for i in np.flatnonzero(result.boxes.image == row)
    ]
    present = np.flatnonzero(result.labels.present[row])
    return {
        "path": photo.name,
        "label": label,
        **_stamp(photo.size_bytes, photo),
        "height": photo.shape[0],
        "width": photo.shape[1],
        "classes": {names[c]: round(float(result.labels.score[row, c]), 4) for c in present},
        "boxes": boxes,
        "void_px": int(np.count_nonzero(result.label_maps[row] == VOID)),
        **({"warning": photo.warning} if photo.warning else {}),
    }
