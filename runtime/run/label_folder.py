"""Labels a folder of images into a label store; a run that was interrupted can be resumed."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from ... import __version__
from ...classes import ClassList
from ...errors import ImageError
from ...object_storage import RemoteFolder
from ...store.format import LabelWriter, Store, missing_fields
from ...store.local import LabelStore, Record, Shard, relative_images
from ...store.remote import RemoteStore
from ..chain import Chain
from ..given.names import twins_of
from ..given.stages import Given
from .listing import SIDECARS, Found, LeftOut, check_images, describe_left_out
from .sources import LocalImages, Source, local_folder
from .stream import Receipt, Stream, Task

NAMED = 10
"""Most classes that a message names."""


@dataclass(kw_only=True)
class Summary:
    """What a run did."""

    images: int = 0
    skipped: int = 0
    failed_before: int = 0
    """Skipped images that an earlier run could not label; ``retry_failed`` tries them again."""
    labelled: int = 0
    failed: int = 0
    boxes: int = 0
    empty: int = 0
    """Labeled images that contain none of the classes."""
    never_found: list[str] = field(default_factory=list)
    """Classes that no image contains."""
    warned: int = 0
    """Labeled images whose pixels are suspicious (`Photograph.warning`)."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Number of files that are not images, by their ending in lower case, ``none`` or ``other``."""
    folders_failed: int = 0
    """Sub-folders that could not be read."""
    seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of each stage. Stages overlap, so that their sum may exceed ``seconds``."""
    engine_seconds: float = 0.0
    """Seconds that the engines computed, summed over all devices."""
    padding: float | None = None
    """Share of the detector's canvases that was padding."""
    stopped: bool = False
    """The run was asked to stop and did so before the last image."""

    def describe_empty(self) -> str:
        """How many images contain none of the classes, and which classes no image contains; empty where neither occurs."""
        total = self.skipped - self.failed_before + self.labelled
        if not total or not (self.empty or self.never_found):
            return ""
        empty = f"{self.empty} of {total} images hold none of the classes" if self.empty else ""
        names = ", ".join(self.never_found[:NAMED])
        more = f" and {len(self.never_found) - NAMED} others" if len(self.never_found) > NAMED else ""
        return "; ".join(filter(None, (empty, f"never found: {names}{more}" if names else "")))


Progress = Callable[[Summary], None]
Warn = Callable[[str], None]
Failed = Callable[[str, str], None]
"""Called with the path of an image that failed, and the reason."""


class Executor(Protocol):
    """Labels the images of a run: with one labeler in this process, or several in others."""

    @property
    def classes(self) -> ClassList: ...
    @property
    def settings(self) -> dict[str, Any]: ...

    def work(
        self, tasks: Iterable[Task | None], source: Source, labels: LabelWriter, stop: threading.Event, warn: Warn
    ) -> Generator[list[Receipt], None, None]:
        """Yield the receipts of all tasks, nearly in order; once ``stop`` is set, only of those in progress."""
        ...

    def report(self, summary: Summary) -> None:
        """Fill in the seconds and the padding."""
        ...


class LocalExecutor:
    """Runs a labeler in this process."""

    def __init__(self, labeler: Chain, *, batch: int | None) -> None:
        self._labeler, self._batch = labeler, batch or labeler.usual_batch()
        self._before = labeler.device.seconds
        labeler.take_seconds()

    @property
    def classes(self) -> ClassList:
        return self._labeler.classes

    @property
    def settings(self) -> dict[str, Any]:
        return self._labeler.settings

    def work(
        self, tasks: Iterable[Task | None], source: Source, labels: LabelWriter, stop: threading.Event, warn: Warn
    ) -> Generator[list[Receipt], None, None]:
        self._labeler.device.warn = warn
        return Stream(self._labeler, source, labels, batch=self._batch, stop=stop).run(tasks)

    def report(self, summary: Summary) -> None:
        for stage, seconds in self._labeler.take_seconds().items():
            summary.stage_seconds[stage] = summary.stage_seconds.get(stage, 0.0) + seconds
        summary.engine_seconds = self._labeler.device.seconds - self._before
        summary.padding = self._labeler.padding()


@dataclass(frozen=True)
class Tasks:
    """The images to label, listed lazily. ``length_hint`` gives their approximate number, for the folder may change."""

    images: Iterator[Found]
    count: int
    twins: Mapping[str, Sequence[str]]
    given: Given

    def __iter__(self) -> Iterator[Task]:
        for number, image in enumerate(self.images):
            twins = self.twins.get(image.name, ())
            yield Task(number, image.name, image.label, twins, self.given.hash(image.name, twins))

    def __length_hint__(self) -> int:
        return self.count


def label_folder(
    labeler: Chain | Executor,
    folder: Path | Source,
    out: Path | RemoteFolder,
    *,
    batch: int | None = None,
    retry_failed: bool = False,
    shard: Shard | None = None,
    given: Given | None = None,
    stop: threading.Event | None = None,
    progress: Progress | None = None,
    warn: Warn = lambda message: print(message, file=sys.stderr),
    failed: Failed | None = None,
) -> Summary:
    """Label every image below ``folder`` into the store ``out``; unchanged images that are already in it are skipped.

    Neither the names of the images nor their results are held in memory, so that a folder may have any number of images.

    Args:
        folder, out: local, or in an object store (`sources`, `wsss.store.remote`).
        labeler: a labeler, or an executor of several.
        batch: images labeled together; None takes the batch size that the engines were built for.
        retry_failed: try the images again that an earlier run could not label.
        shard: (I, N): only the I-th of N shares of the images, counted from 0; N runs may write one store at a time.
        given: the labels and boxes that the labelers of an executor were given; opened before them.
        stop: when set, the run finishes the batches in progress and returns.
        progress: called after each batch that is in the store.
        warn: called with non-fatal problems.
        failed: called for each image that fails; None calls ``warn``.

    Raises:
        ImageError: no images. StoreError: the store cannot be written or belongs to other settings.
    """
    executor = LocalExecutor(labeler, batch=batch) if isinstance(labeler, Chain) else labeler
    given = given or (labeler.given if isinstance(labeler, Chain) else Given())
    assert any((given.labels, given.boxes)) == ("given" in executor.settings)
    source = LocalImages(folder) if isinstance(folder, Path) else folder
    images = source.listing(out, shard)
    all_images = source.listing(out) if shard else images
    check_images(all_images)
    failed = failed or (lambda _, error: warn(f"failed: {printable(error)}"))
    start = time.perf_counter()
    stop = stop or threading.Event()
    for flag, names in executor.settings.get("ignored", {}).items():
        counts = ", ".join(f"{name} ({count})" for name, count in names.items())
        warn(f"--ignore-unknown: left out of --{flag}: {printable(counts)}")
    with _store(out, executor, shard) as store:
        tally = _Tally(executor)
        twins = twins_of(image.name for image in all_images) if "given" in executor.settings else {}
        selection = store.select(images, tally.counting(_Check(store.has_label, source, retry_failed, given, twins)))
        summary = Summary(images=selection.images, skipped=selection.done, failed_before=selection.failed)
        _report_left_out(images.left_out, summary, warn, failed)
        tasks = Tasks(store.missing(images), selection.images - selection.done, twins, given)
        with closing(executor.work(tasks, source, store.labels, stop, warn)) as receipts:
            for records in _in_order(receipts):
                store.append(records)
                _count(summary, records, failed, warn)
                tally.add(records)
                tally.report(summary)
                executor.report(summary)
                summary.seconds = time.perf_counter() - start
                if progress:
                    progress(summary)
        tally.report(summary)
        summary.seconds = time.perf_counter() - start
        summary.stopped = stop.is_set() and summary.skipped + summary.labelled + summary.failed < summary.images
        if summary.labelled or summary.failed:
            ended = datetime.now(UTC).isoformat(timespec="seconds")
            record = {"ended": ended, "wsss": __version__, **dataclasses.asdict(summary)}
            if isinstance(out, Path) and (local := local_folder(source)) is not None:
                record["folder"] = relative_images(local, out)
            store.add_history(record)
    if not summary.stopped and 2 * summary.empty >= max(1, summary.skipped - summary.failed_before + summary.labelled):
        warn(summary.describe_empty())
    return summary


def _store(out: Path | RemoteFolder, executor: Executor, shard: Shard | None) -> Store:
    if isinstance(out, Path):
        return LabelStore(out, executor.classes, executor.settings, shard=shard)
    return RemoteStore(out, executor.classes, executor.settings, shard=shard)


@dataclass(frozen=True)
class _Check:
    """Whether a manifest line is still correct: of the same photograph (size and modification time decide if they match, else
    the file's hash), and of the same given labels and boxes."""

    has_label: Callable[[str], bool]
    source: Source
    retry_failed: bool
    given: Given
    twins: Mapping[str, Sequence[str]]

    def __call__(self, image: Found, record: Record) -> bool:
        if (self.retry_failed and "error" in record) or record["label"] != image.label:
            return False
        if "error" not in record and (missing_fields(record, ("classes", "boxes")) or not self.has_label(image.label)):
            return False
        if "corrected" not in record and record.get("given", "") != self.given.hash(image.name, self.twins.get(image.name, ())):
            return False
        sha256 = record.get("sha256", "")
        try:
            stamp = image.stamp or self.source.stamp(image.name)
            if sha256 and stamp["bytes"] != record.get("bytes"):
                return False
            if sha256 and stamp.items() <= record.items():
                return True
            file = self.source.read(image.name)
        except (OSError, ImageError):
            return not sha256  # the file could not be read when the line was written, and still cannot
        return bool(sha256 == file.sha256)


def _in_order(receipts: Iterable[list[Receipt]]) -> Iterator[list[Record]]:
    """Yield manifest lines in the order of the tasks, so that the manifest does not depend on how the work was distributed.

    Each line waits for those before it. Where a run is stopped some lines never come; the rest is yielded at the end.
    """
    waiting: dict[int, Record] = {}
    upcoming = 0
    for group in receipts:
        waiting |= dict(group)
        ready = []
        while (record := waiting.pop(upcoming, None)) is not None:
            ready.append(record)
            upcoming += 1
        if ready:
            yield ready
    if waiting:
        yield [waiting[number] for number in sorted(waiting)]


class _Tally:
    """Counts the classes of the images that this run and earlier runs labeled."""

    def __init__(self, executor: Executor) -> None:
        self._by_pixels = "segmenter" in executor.settings.get("models", {})
        self._never = dict.fromkeys(executor.classes.names)
        self._empty = self._warned = 0

    def counting(self, check: Callable[[Found, Record], bool]) -> Callable[[Found, Record], bool]:
        """The same check; it also counts the lines that pass."""

        def check_and_count(image: Found, record: Record) -> bool:
            passes = check(image, record)
            if passes:
                self.add([record])
            return passes

        return check_and_count

    def add(self, records: Iterable[Record]) -> None:
        """Count the classes of these manifest lines."""
        for record in records:
            if "error" in record:
                continue
            # A segmenter records the classes that have a pixel; the chain records CLIP's, of which a mask may win no pixel.
            found = record["classes"] if self._by_pixels else [box["label"] for box in record["boxes"] if box["won_px"]]
            for name in found:
                self._never.pop(name, None)
            self._empty += not found
            self._warned += "warning" in record

    def report(self, summary: Summary) -> None:
        """Fill in the counts."""
        summary.empty, summary.warned, summary.never_found = self._empty, self._warned, list(self._never)


def _report_left_out(left_out: LeftOut, summary: Summary, warn: Warn, failed: Failed) -> None:
    summary.left_out = dict(sorted(left_out.files.items()))
    summary.folders_failed = len(left_out.folders)
    if left_out.files.keys() - set(SIDECARS):
        warn(f"left out: {describe_left_out(left_out.files)}")
    for link in left_out.links:
        warn(f"left out: {printable(link)}: a link to a folder; label that folder itself")
    for folder, reason in left_out.folders.items():
        failed(folder, f"{folder}: cannot be read: {reason}")


def _count(summary: Summary, records: list[Record], failed: Failed, warn: Warn) -> None:
    for record in records:
        if "error" in record:
            summary.failed += 1
            failed(record["path"], record["error"])
        else:
            summary.labelled += 1
            summary.boxes += len(record["boxes"])
            if "warning" in record:
                warn(f"{printable(record['path'])}: {record['warning']}")


def printable(text: str) -> str:
    """The text on one line, with control characters (line breaks, terminal escapes) written as Python escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text)
