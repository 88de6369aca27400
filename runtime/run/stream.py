"""Runs images through all stages at once: decoding, tagging, detecting, outlining, fusing, writing.

Each stage has its own thread and takes whole batches from a bounded queue. A thread pool prepares a stage's inputs (views,
canvases) while the batch waits for that stage, and only for the images that the stage before selected. The engines take turns
on the device (`device`), so that it always has the next call waiting.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np

from ...batch import VOID, Boxes, Labels, Masks, Photograph, PseudoLabels
from ...cores import cores, free_bytes
from ...errors import ImageError, NotANumber, OutOfMemory
from ...photographs import ImageFile, count_pixels, decode
from ...store.format import LabelWriter, line_of, parse_line
from ...store.local import Record
from ..canvas import Prepares
from ..chain import Chain
from ..masks.runs import masks_of
from ..segment import Embedded, MaskPredictor
from .prefetch import Budget, PriorityThreadPool, prefetched
from .sources import Source

T = TypeVar("T")

PIXEL_BYTES = 3 << 29
"""Most memory for decoded photographs; less where a quarter of the free memory is less. A larger photograph runs alone."""
SMALL = 4_000_000
"""Photographs with fewer pixels are decoded as soon as they are read, before the budget has room for them."""
LARGE = 16_000_000
"""Photographs of at least this many pixels take their peak memory from the budget (10 bytes a pixel while decoding: Pillow's
copy and more), others what remains (4 bytes a pixel): a few large ones at once would exceed all others together."""
SWITCH_SECONDS = 0.001
"""How long a thread may hold the interpreter lock while another waits. With Python's default of 5 ms, several times a batch, an
engine that takes 20 ms a batch would wait as long for its next call."""
URGENCY = {"read": 0, "tag": 1, "detect": 2, "segment": 3}
"""Priority of the work for a stage: images that are nearer to the end go first."""
READERS = 16
"""Threads that read photographs of a remote source: they mostly wait for the network."""
AHEAD = 2
"""Batches that wait before a stage, so that an engine finds its next one even when preparing it takes twice as long as
usual."""
WRITERS = 8
"""Threads that encode and write labels: they mostly wait for the disk."""
NOTHING: Mapping[str, int | str] = {"bytes": 0, "mtime_ns": 0, "sha256": ""}
"""The file's fields in the line of an image that could not be read."""


class Task(NamedTuple):
    """An image to label, the ``number``-th of a run."""

    number: int
    name: str
    label: str
    twins: Sequence[str] = ()
    """Photographs of the run with the same stem, this one included: given labels or boxes might belong to any of them."""
    given: str = ""
    """Hash of the labels and boxes that were given for it."""


class Receipt(NamedTuple):
    """The manifest line of a task that has finished (its label is written) or failed."""

    number: int
    record: Record


@dataclass(slots=True)
class Loading:
    """A task whose file was read and possibly decoded, or the receipt of its failure."""

    task: Task
    photo: Photograph | ImageFile | Future[Photograph] | Receipt
    amount: int = 0
    """Bytes taken from the budget."""
    file: Mapping[str, int | str] = field(default_factory=lambda: NOTHING)
    """The file's fields in the manifest line."""


@dataclass(slots=True)
class Batch:
    """Images that go through the stages together."""

    loaded: list[Loading] = field(default_factory=list)
    photos: list[Photograph] = field(default_factory=list)
    receipts: list[Receipt] = field(default_factory=list)
    """Receipts of images that failed."""
    labels: Labels | None = None
    boxes: Boxes | None = None
    embedded: Embedded | None = None
    masks: Masks | None = None
    result: PseudoLabels | None = None

    def halves(self) -> Iterator[Batch]:
        """The batch as two batches with their share of the results so far; the receipts go with the first."""
        middle = len(self.photos) // 2
        for start, stop in ((0, middle), (middle, len(self.photos))):
            half = Batch(self.loaded[start:stop], self.photos[start:stop], self.receipts if start == 0 else [])
            if self.labels is not None:
                half.labels = Labels(self.labels.score[start:stop], self.labels.present[start:stop])
            if self.boxes is not None:
                half.boxes = self.boxes.keep((self.boxes.image >= start) & (self.boxes.image < stop))
                half.boxes.image = half.boxes.image - start
            yield half


class Stream:
    """Pipeline of one labeler on one device.

    Args:
        labeler: the chain.
        source: where the images are read from.
        labels: writes the label maps.
        batch: images labeled together.
        stop: when set, no further batch is started.
    """

    def __init__(self, labeler: Chain, source: Source, labels: LabelWriter, *, batch: int, stop: threading.Event) -> None:
        self._labeler, self._source, self._labels = labeler, source, labels
        self._size, self._stop = batch, stop
        self._abandoned = threading.Event()
        self._budget = Budget(min(PIXEL_BYTES, free_bytes() // 4))
        self._pool = PriorityThreadPool(cores())
        self._readers = ThreadPoolExecutor(READERS, "read") if source.is_remote else None
        self._writers = ThreadPoolExecutor(WRITERS, "write")
        self._encoders = ThreadPoolExecutor(labeler.device.callers, "encode")

    def run(self, tasks: Iterable[Task | None]) -> Generator[list[Receipt], None, None]:
        """Yield the receipts of all tasks, a batch at a time, nearly in order.

        Args:
            tasks: may yield None while the next task is late; images read so far then do not wait for it.

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
            encoding = self._prefetched(self._submit_to_encoders(self._through(self._detect, tagged)))
            encoded = self._prefetched(self._results(encoding))
            outlined = self._prefetched(self._through(self._outline, encoded))
            fused = self._prefetched(self._through(self._fuse, outlined))
            yield from stack.enter_context(closing(self._prefetched(self._write(fused))))

    def _prefetched(self, source: Generator[T, None, None], depth: int = AHEAD) -> Generator[T, None, None]:
        return prefetched(source, depth, on_close=self._abandon)

    def _abandon(self) -> None:
        """Release the threads that wait for tasks or for room in the budget, which may never come."""
        self._abandoned.set()
        self._budget.close()

    def _is_ending(self) -> bool:
        return self._stop.is_set() or self._abandoned.is_set()

    # ---- reading ----

    def _load(self, tasks: Iterable[Task | None]) -> Generator[Loading | None, None, None]:
        """Yield the tasks in order as they are read; None where no more can be read until batches in progress finish."""
        upcoming = iter(tasks)
        reading: deque[Future[Loading]] = deque()
        ended = waiting = False
        while not self._is_ending():
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
        if self._readers:  # they only read; the pool decodes
            return self._readers.submit(self._read, task, 0)
        return self._pool.submit(URGENCY["read"], self._read, task, SMALL)

    def _read(self, task: Task, small: int) -> Loading:
        """Read a task's file, and decode it if it has fewer pixels than ``small``."""
        stamp = NOTHING
        try:
            file = self._source.read(task.name)
            stamp = _stamp(len(file.data), file)
            pixels = count_pixels(file)
            amount = pixels * (4 if pixels < LARGE else 10)
            return Loading(task, decode(file) if pixels < small else file, amount, stamp)
        except ImageError as error:
            return Loading(task, failure(task, error.message, stamp))

    def _batches(self, loaded: Generator[Loading | None, None, None]) -> Generator[Batch, None, None]:
        """Group photographs into batches that share a detector canvas, so that the detector's calls are full.

        An incomplete batch waits until four batches' worth of other images have passed it.
        """
        waiting: dict[object, Batch] = {}
        since: dict[object, int] = {}
        with closing(loaded):
            for count, loading in enumerate(loaded):
                if self._is_ending():
                    return
                due = list(waiting)
                if loading is not None:
                    key, photo = self._decoded(loading)
                    batch = waiting.setdefault(key, Batch())
                    since.setdefault(key, count)
                    if isinstance(photo, Photograph):
                        batch.loaded.append(loading)
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
            return None, failure(loading.task, error.message, loading.file)

    def _started(self, batch: Batch) -> Batch:
        self._prepare(self._labeler.tag.stage, "tag", batch.photos)
        return batch

    # ---- the chain ----

    def _through(self, stage: Callable[[Batch], None], batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
        with closing(batches):
            for batch in batches:
                yield from self._attempt(stage, batch)

    def _submit_to_encoders(self, batches: Generator[Batch, None, None]) -> Generator[Future[list[Batch]], None, None]:
        """Encode batches on the slowest engine, in as many threads as keep it busy (`Device.callers`)."""
        with closing(batches):
            for batch in batches:
                yield self._encoders.submit(list[Batch], self._attempt(self._encode, batch))

    @staticmethod
    def _results(encoding: Generator[Future[list[Batch]], None, None]) -> Generator[Batch, None, None]:
        with closing(encoding):
            for future in encoding:
                yield from future.result()

    def _attempt(self, stage: Callable[[Batch], None], batch: Batch) -> Iterator[Batch]:
        try:
            if batch.photos:
                stage(batch)
        except (OutOfMemory, NotANumber) as error:
            if len(batch.photos) > 1:
                cause = "out of memory" if isinstance(error, OutOfMemory) else error.message
                self._labeler.device.warn(f"{cause} with {len(batch.photos)} images; trying them in halves")
                for half in batch.halves():
                    yield from self._attempt(stage, half)
                return
            (loading,) = batch.loaded
            self._budget.give(loading.amount)
            message = f"{loading.task.name}: {error.message}"
            batch = Batch(receipts=[*batch.receipts, failure(loading.task, message, loading.file)])
        yield batch

    def _tag(self, batch: Batch) -> None:
        batch.labels = self._labeler.tag(batch.photos)
        tagged = np.flatnonzero(batch.labels.present.any(axis=1))
        self._prepare(self._labeler.detect.stage, "detect", [batch.photos[n] for n in tagged])

    def _detect(self, batch: Batch) -> None:
        assert batch.labels is not None
        batch.boxes = self._labeler.detect(batch.photos, batch.labels)
        self._prepare(self._labeler.segment.stage, "segment", [batch.photos[n] for n in np.unique(batch.boxes.image)])

    def _encode(self, batch: Batch) -> None:
        """Run the first half of the `segment` stage, so that the next batch is encoded while this one is decoded."""
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
        if batch.masks is None:  # half of a batch that did not fit on the device
            self._outline(batch)
        assert batch.labels is not None and batch.boxes is not None and batch.masks is not None
        batch.result = self._labeler.fuse(batch.photos, batch.labels, batch.boxes, batch.masks)
        batch.masks = None

    def _prepare(self, stage: object, name: str, photos: list[Photograph]) -> None:
        if not isinstance(stage, Prepares):  # stages with given labels or boxes need no pixels
            return
        if photos := [photo for photo in photos if not stage.resizes(photo)]:
            shapes = [stage.room(photo) for photo in photos]
            same = shapes.count(shapes[0]) == len(shapes)
            batch = np.zeros((len(photos), *shapes[0]), np.uint8) if same else [np.zeros(shape, np.uint8) for shape in shapes]
            share = -(-len(photos) // cores())  # one job for each of many small photographs would cost more than it saves
            for start in range(0, len(photos), share):
                pairs = list(zip(photos[start : start + share], batch[start : start + share], strict=True))
                prepared = self._pool.submit(URGENCY[name], _prepare_all, stage, pairs)
                for photo, out in pairs:
                    photo.ahead[name] = prepared, out

    # ---- writing ----

    def _write(self, batches: Generator[Batch, None, None]) -> Generator[list[Receipt], None, None]:
        with closing(batches):
            for batch in batches:
                rows = range(len(batch.photos))
                yield [*batch.receipts, *self._writers.map(lambda row, batch=batch: self._write_one(batch, row), rows)]

    def _write_one(self, batch: Batch, row: int) -> Receipt:
        loading, result = batch.loaded[row], batch.result
        assert result is not None
        number, _, label, _, given = loading.task
        try:
            record = record_of(self._labeler.classes.names, batch.photos[row], label, result, row, given)
            if result.confidence is not None:
                self._labels.write_confidence(label, result.confidence[row])
            masks = None
            if result.masks is not None:
                masks = [mask.counts() for mask in masks_of(result.masks, result.boxes, row)]
            self._labels.write(label, result.label_maps[row], masks)
            return Receipt(number, record)
        except ImageError as error:
            return failure(loading.task, error.message, loading.file)
        finally:
            self._budget.give(loading.amount)


def _prepare_all(stage: Prepares, pairs: list[tuple[Photograph, np.ndarray]]) -> None:
    for photo, out in pairs:
        stage.prepare(photo, out)


def failure(task: Task, message: str, file: Mapping[str, int | str] = NOTHING) -> Receipt:
    """The receipt of an image that failed. ``file``: the file's fields in its manifest line."""
    return Receipt(task.number, {"path": task.name, "label": task.label, **file, **_given(task.given), "error": message})


def _given(given: str) -> Mapping[str, str]:
    return {"given": given} if given else {}


def _stamp(size: int, file: ImageFile | Photograph) -> Mapping[str, int | str]:
    """The file's fields in the line of an image that was read."""
    change: dict[str, int | str] = {"etag": file.etag} if file.etag else {"mtime_ns": file.mtime_ns}
    return {"bytes": size, **change, "sha256": file.sha256}


def record_of(names: tuple[str, ...], photo: Photograph, label: str, result: PseudoLabels, row: int, given: str = "") -> Record:
    """The manifest line of image ``row`` of a result. It does not depend on the batch or the time: every run writes the same.

    Args:
        given: as in `Task`.

    Raises:
        ImageError: a number that no line may hold, such as NaN.
    """
    boxes = [
        {
            "label": names[result.boxes.label[i] - 1],
            "score": round(float(result.boxes.score[i]), 4),
            "xyxy": [round(float(edge), 2) for edge in result.boxes.xyxy_image[i]],
            "quality": round(float(result.quality[i]), 4),
            **({} if result.stability is None else {"stability": round(float(result.stability[i]), 4)}),
            "area_px": int(result.area[i]),
            "won_px": int(result.won[i]),
        }
        for i in np.flatnonzero(result.boxes.image == row)
    ]
    present = np.flatnonzero(result.labels.present[row])
    record = {
        "path": photo.name,
        "label": label,
        **_stamp(photo.size_bytes, photo),
        **_given(given),
        "height": photo.shape[0],
        "width": photo.shape[1],
        "classes": {names[c]: round(float(result.labels.score[row, c]), 4) for c in present},
        "boxes": boxes,
        "void_px": int(np.count_nonzero(result.label_maps[row] == VOID)),
        **({"warning": photo.warning} if photo.warning else {}),
    }
    try:
        return parse_line(line_of(record))
    except ValueError as error:
        raise ImageError(f"{photo.name}: the models gave results out of range: {error}") from None
