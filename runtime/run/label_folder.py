"""A run: a folder of images through the chain into a label store, resumable."""

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
from ...photographs import Place, read_file, stamp_of
from ...store.format import LabelWriter
from ...store.local import LabelStore, Record, Shard
from ...store.remote import RemoteStore
from ..given.names import twins_of
from ..labeler import Labeler
from .listing import SIDECARS, Found, LeftOut, check_images, describe_left_out
from .sources import Source, listing
from .stream import Receipt, Stream, Task

NAMED = 10
"""Classes that a message names at most."""


@dataclass(kw_only=True)
class Summary:
    """What a run did."""

    images: int = 0
    skipped: int = 0
    failed_before: int = 0
    """Of the skipped ones, those that a former run could not label; ``retry_failed`` tries them again."""
    labelled: int = 0
    failed: int = 0
    boxes: int = 0
    empty: int = 0
    """Of the images with a label, those that hold none of the classes."""
    never_found: list[str] = field(default_factory=list)
    """Classes that no image holds."""
    warned: int = 0
    """Of the images with a label, those whose pixels may not show what they should (`Photograph.warning`)."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Files beside the images that were not taken, by their ending in lower case; ``none`` and ``other`` too."""
    folders_failed: int = 0
    """Sub-folders that could not be read."""
    seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """Stages overlap: their sum may exceed ``seconds``."""
    engine_seconds: float = 0.0
    """How long the engines computed, all devices together."""
    padding: float | None = None
    """Share of the detector's canvases that was no photograph."""
    stopped: bool = False
    """Ended before its time, as asked."""

    def describe_empty(self) -> str:
        """How many images hold none of the classes, and which classes no image holds; empty where there is nothing to say."""
        total = self.skipped - self.failed_before + self.labelled
        if not total or not (self.empty or self.never_found):
            return ""
        none = "" if not self.empty else f"{self.empty} of {total} images hold none of the classes"
        names = ", ".join(self.never_found[:NAMED]) + (
            f" and {len(self.never_found) - NAMED} others" if len(self.never_found) > NAMED else ""
        )
        return "; ".join(filter(None, (none, f"never found: {names}" if names else "")))


Progress = Callable[[Summary], None]
Warn = Callable[[str], None]
Failed = Callable[[str, str], None]
"""Told of an image that failed: its path, and why."""


class Executor(Protocol):
    """Whoever labels: a labeler in this process, or several in others."""

    @property
    def classes(self) -> ClassList: ...
    @property
    def settings(self) -> dict[str, Any]: ...

    def work(
        self, tasks: Iterable[Task | None], folder: Path | Place, labels: LabelWriter, stop: threading.Event, warn: Warn
    ) -> Generator[list[Receipt], None, None]:
        """The receipts of all tasks, nearly in order; once ``stop`` is set, of those in hand."""
        ...

    def report(self, summary: Summary) -> None:
        """Fills in the seconds and the padding."""
        ...


class LocalExecutor:
    """A labeler in this process."""

    def __init__(self, labeler: Labeler, *, batch: int | None) -> None:
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
        self, tasks: Iterable[Task | None], folder: Path | Place, labels: LabelWriter, stop: threading.Event, warn: Warn
    ) -> Generator[list[Receipt], None, None]:
        self._labeler.device.warn = warn
        return Stream(self._labeler, folder, labels, batch=self._batch, stop=stop).run(tasks)

    def report(self, summary: Summary) -> None:
        for stage, seconds in self._labeler.take_seconds().items():
            summary.stage_seconds[stage] = summary.stage_seconds.get(stage, 0.0) + seconds
        summary.engine_seconds = self._labeler.device.seconds - self._before
        summary.padding = self._labeler.padding()


@dataclass(frozen=True)
class Tasks:
    """The images to label, listed as they are asked for. ``length_hint`` says about how many: folders change meanwhile."""

    missing: Iterator[Found]
    count: int
    twins: Mapping[str, Sequence[str]]

    def __iter__(self) -> Iterator[Task]:
        return (
            Task(number, found.name, found.label, self.twins.get(found.name, ())) for number, found in enumerate(self.missing)
        )

    def __length_hint__(self) -> int:
        return self.count


def label_folder(
    labeler: Labeler | Executor,
    folder: Path | Source,
    out: Path | RemoteFolder,
    *,
    batch: int | None = None,
    retry_failed: bool = False,
    shard: Shard | None = None,
    stop: threading.Event | None = None,
    progress: Progress | None = None,
    warn: Warn = lambda message: print(message, file=sys.stderr),
    failed: Failed | None = None,
) -> Summary:
    """Labels every image below ``folder`` into the store ``out``; images already there, unchanged, are skipped.

    Neither the images' names nor their results are held in memory, so that a folder may have any number of them.

    Args:
        folder, out: on this machine or not (`sources`, `remote`).
        labeler: one, or an executor of several on devices of their own.
        batch: images that a labeler is given together; None takes what its engines were built for.
        retry_failed: try the images again that a former run could not label.
        shard: (I, N): only the I-th of N shares of the images, counted from 0; N runs may write one store at a time.
        stop: when set, the run finishes the batches in hand and returns.
        progress: told after each batch that is in the store.
        warn: told of what the run goes on in spite of.
        failed: told of each image that fails; None warns.

    Raises:
        ImageError: no images. StoreError: the store cannot be written or belongs to other settings.
    """
    executor = LocalExecutor(labeler, batch=batch) if isinstance(labeler, Labeler) else labeler
    images, wanted = listing(folder, out, shard), listing(folder, out, shard)
    check_images(listing(folder, out))
    failed = failed or (lambda _, error: warn(f"failed: {printable(error)}"))
    start = time.perf_counter()
    stop = stop or threading.Event()
    for flag, names in executor.settings.get("ignored", {}).items():
        counts = ", ".join(f"{name} ({count})" for name, count in names.items())
        warn(f"--ignore-unknown: left out of --{flag}: {printable(counts)}")
    with _store(out, executor, shard) as store:
        found = _Tally(executor)
        told = store.select(wanted, found.of_kept(_Check(store.has_label, folder, retry_failed)))
        summary = Summary(images=told.images, skipped=told.done, failed_before=told.failed)
        _tell_left_out(wanted.left_out, summary, warn, failed)
        twins = twins_of(found.name for found in listing(folder, out)) if "given" in executor.settings else {}
        tasks = Tasks(store.missing(images), told.images - told.done, twins)
        with closing(executor.work(tasks, folder, store.labels, stop, warn)) as receipts:
            for records in _in_order(receipts):
                store.append(records)
                _count(summary, records, failed, warn)
                found.add(records)
                found.report(summary)
                executor.report(summary)
                summary.seconds = time.perf_counter() - start
                if progress:
                    progress(summary)
        found.report(summary)
        summary.seconds = time.perf_counter() - start
        summary.stopped = stop.is_set() and summary.skipped + summary.labelled + summary.failed < summary.images
        if summary.labelled or summary.failed:
            ended = datetime.now(UTC).isoformat(timespec="seconds")
            store.add_history({"ended": ended, "wsss": __version__, **dataclasses.asdict(summary)})
    if not summary.stopped and 2 * summary.empty >= max(1, summary.skipped - summary.failed_before + summary.labelled):
        warn(summary.describe_empty())
    return summary


def _store(out: Path | RemoteFolder, executor: Executor, shard: Shard | None) -> LabelStore | RemoteStore:
    if isinstance(out, Path):
        return LabelStore(out, executor.classes, executor.settings, shard=shard)
    return RemoteStore(out, executor.classes, executor.settings, shard=shard)


@dataclass(frozen=True)
class _Check:
    """Does a line still tell the truth about an image? Its content decides; size and time of change answer sooner."""

    has_label: Callable[[str], bool]
    folder: Path | Source
    retry_failed: bool

    def __call__(self, image: Found, record: Record) -> bool:
        if (self.retry_failed and "error" in record) or record["label"] != image.label:
            return False
        if "error" not in record and not self.has_label(image.label):
            return False
        sha256 = record.get("sha256", "")
        try:
            stamp = image.stamp or stamp_of(self.folder, image.name)
            if sha256 and stamp["bytes"] != record.get("bytes"):
                return False
            if sha256 and stamp.items() <= record.items():
                return True
            file = read_file(self.folder, image.name)
        except (OSError, ImageError):
            return not sha256  # it could not be read then, and cannot now
        return bool(sha256 == file.sha256)


def _in_order(receipts: Iterable[list[Receipt]]) -> Iterator[list[Record]]:
    """Lines in the order of the tasks, so that the manifest is the same however the work was shared.

    Lines wait for those before them; where a run is stopped some never come, and the rest is given at the end.
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
    """Which classes the images hold: those that are labeled now, and those that were before."""

    def __init__(self, executor: Executor) -> None:
        self._by_pixels = "segmenter" in executor.settings.get("models", {})
        self._never = dict.fromkeys(executor.classes.names)
        self._empty = self._warned = 0

    def of_kept(self, check: Callable[[Found, Record], bool]) -> Callable[[Found, Record], bool]:
        """The same check, which also counts the lines that it lets stand."""

        def checked(image: Found, record: Record) -> bool:
            kept = check(image, record)
            if kept:
                self.add([record])
            return kept

        return checked

    def add(self, records: Iterable[Record]) -> None:
        """Counts lines of images."""
        for record in records:
            if "error" in record:
                continue
            # A segmenter's classes are those with a pixel; of the chain's, which CLIP names, a mask may win none.
            held = record["classes"] if self._by_pixels else [box["label"] for box in record["boxes"] if box["won_px"]]
            for name in held:
                self._never.pop(name, None)
            self._empty += not held
            self._warned += "warning" in record

    def report(self, summary: Summary) -> None:
        """Fills in what was counted."""
        summary.empty, summary.warned, summary.never_found = self._empty, self._warned, list(self._never)


def _tell_left_out(left_out: LeftOut, summary: Summary, warn: Warn, failed: Failed) -> None:
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
    """The text on one line: what a terminal would obey (line breaks, escape sequences) is written out."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode() for each in text)
