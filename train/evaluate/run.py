"""Counting two folders of label maps: pairs through worker processes into one confusion matrix, in flat memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...cores import cores
from ...errors import StoreError, WsssError
from .boundary import boundary_counts
from .checks import FACTS, facts_of
from .crf import read_photograph_of, refine
from .files import Pairs, read_indexed
from .metrics import confusion_matrix, highest_label

CHUNK = 8
"""Pairs a worker takes at a time: 0.05 s of VOC, so that an interrupt does not wait."""
FEW = 64
"""Up to this many pairs no worker is started: each costs 0.3 s of imports."""

Task = list[tuple[Path, Path | None, Path | None]]
"""True and predicted label map of each image, None is missing; the photograph, None where nothing is to be refined."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Sums over images, from which every score follows.

    matrix: (C + 1, C + 2) int64, pixels by true and predicted label, see `evaluate.confusion_matrix`.
    boundary: (2, C + 1) int64, see `evaluate_boundary.boundary_counts`.
    present: (B, C) bool, the classes in each image's truth, without background.
    facts: (2, 4) int64, of truth and prediction, see `evaluate_checks.FACTS`.
    pixels: (2,) int64, of all truth, and those that are void in it.
    """

    matrix: np.ndarray
    boundary: np.ndarray
    present: np.ndarray
    facts: np.ndarray
    pixels: np.ndarray


def count_pairs(
    pairs: Pairs,
    names: Sequence[str],
    *,
    photographs: Sequence[Path] | None = None,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Counts:
    """Counts all pairs, several processes at once.

    Args:
        pairs: from `evaluate_files.pair_up`; a missing prediction counts as void everywhere: all of it missed.
        names: of the C classes, without background.
        photographs: of the names, when predictions are to be refined by a CRF first, see `evaluate_crf`.
        workers: processes; default: as many as cores may be used; 1 stays in this process.
        progress: told the number of pairs done.

    Raises:
        StoreError: a file that cannot be read, sizes that differ, or a label that is no class; the first in the order of
            the names. WsssError: a worker was killed.
    """
    refined_by: Sequence[Path | None] = photographs or [None] * len(pairs.names)
    todo = list(zip(pairs.truth, pairs.predicted, refined_by, strict=True))
    tasks = [todo[start : start + CHUNK] for start in range(0, len(todo), CHUNK)]
    alone = len(todo) <= FEW or workers == 1
    matrix, boundary, facts, pixels = _zeros(len(names))
    present = np.zeros((len(todo), len(names)), bool)
    done = 0
    with closing(_in_turn(tasks, names) if alone else _in_processes(tasks, names, workers or cores())) as results:
        for counts in results:
            matrix += counts.matrix
            boundary += counts.boundary
            facts += counts.facts
            pixels += counts.pixels
            present[done : done + len(counts.present)] = counts.present
            done += len(counts.present)
            if progress:
                progress(done)
    return Counts(matrix=matrix, boundary=boundary, present=present, facts=facts, pixels=pixels)


def _zeros(classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    shapes = (classes + 1, classes + 2), (2, classes + 1), (2, len(FACTS)), (2,)
    matrix, boundary, facts, pixels = (np.zeros(shape, np.int64) for shape in shapes)
    return matrix, boundary, facts, pixels


def _in_turn(tasks: list[Task], names: Sequence[str]) -> Generator[Counts]:
    for task in tasks:
        yield _count(task, names)


def _in_processes(tasks: list[Task], names: Sequence[str], workers: int) -> Generator[Counts]:
    """Results in the order of the tasks; at most two tasks a worker are in flight."""
    # Fresh interpreters: a fork would inherit the locks of whatever threads the caller has.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)
    waiting: deque[Future[Counts]] = deque()
    try:
        for task in tasks:
            with _interrupts_later():  # a worker may be started here
                waiting.append(pool.submit(_count, task, names))
            if len(waiting) == 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise WsssError("a worker process was killed, perhaps for want of memory", hint="try --workers 1") from None
    finally:
        pool.shutdown(cancel_futures=True)  # waits for the tasks begun, well under a second


def _begin() -> None:
    """A worker leaves Ctrl-C to its parent, and ends when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Ctrl-C waits until the end of the block; processes started in it inherit the mask and never hear it."""
    # Other threads than the main one never get Ctrl-C; Windows has no mask.
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield
        return
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(True))  # another thread may take it for this one
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _count(task: Task, names: Sequence[str]) -> Counts:
    classes = len(names)
    matrix, boundary, facts, pixels = _zeros(classes)
    present = np.zeros((len(task), classes), bool)
    for row, (true_path, path, photograph) in enumerate(task):
        truth, true_facts = _read(true_path, names)
        facts[0] += true_facts
        if path is None:
            predicted = np.full_like(truth, 255)
        else:
            predicted, predicted_facts = _read(path, names)
            facts[1] += predicted_facts
        if truth.shape != predicted.shape:
            raise StoreError(
                f"{path}: is {predicted.shape[1]} x {predicted.shape[0]} pixels, its truth {true_path} is "
                f"{truth.shape[1]} x {truth.shape[0]}",
                hint="label maps are never resized here; write them in the size of the photograph",
            )
        if path is not None and photograph is not None:
            predicted = refine(predicted, read_photograph_of(photograph, predicted, path))
        counts = confusion_matrix(truth, predicted, classes + 1)
        matrix += counts
        boundary += boundary_counts(truth, predicted, classes + 1)
        pixels += truth.size, np.count_nonzero(truth == 255)
        present[row] = counts[1:].any(axis=1)
    return Counts(matrix=matrix, boundary=boundary, present=present, facts=facts, pixels=pixels)


def _read(path: Path, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    indexed, classes = read_indexed(path), len(names)
    label = highest_label(indexed.labels)
    if label > classes:
        hint = "check --classes; 255 is void, other labels are no classes"
        if classes == 80 and label <= 90:
            hint = "COCO's category ids go to 90 with gaps; label maps use 1 to 80 without them"
        raise StoreError(f"{path}: label {label}, the class list ends at {classes}", hint=hint)
    return indexed.labels, facts_of(path, indexed, names)
