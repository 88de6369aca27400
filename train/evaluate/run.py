"""Count pairs of label maps in worker processes into one confusion matrix, with constant memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ...cores import cores
from ...errors import StoreError
from .boundary import boundary_counts
from .checks import FACTS, facts_of
from .crf import refine
from .files import Pairs, read_indexed
from .metrics import confusion_matrix, highest_label
from .photographs import read_photograph_of
from .processes import in_processes

CHUNK = 8
"""Pairs per task: 0.05 s for VOC, so that an interrupt is handled quickly."""
FEW = 64
"""Up to this many pairs, no worker is started: each takes 0.3 s to import."""

Task = list[tuple[Path, Path | None, Path | None]]
"""For each image the true label map, the predicted one (None: missing), and the photograph (None: no refinement)."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Sums over images from which all scores are computed.

    matrix: (C + 1, C + 2) int64, pixels by true and predicted label, see `metrics.confusion_matrix`.
    boundary: (2, C + 1) int64, see `boundary.boundary_counts`.
    present: (B, C) bool, the classes in each image's truth, without background.
    facts: (2, 4) int64, of truth and prediction, see `checks.FACTS`.
    pixels: (2,) int64, all pixels of the truth, and its void pixels.
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
    """Count all pairs, in several processes.

    Args:
        pairs: from `files.pair_up`; a missing prediction counts as void everywhere.
        names: names of the C classes, without background.
        photographs: one per name, to refine predictions by a CRF first, see `crf`.
        workers: number of processes; default: one per core; 1: this process only.
        progress: called with the number of pairs done.

    Raises:
        StoreError: an unreadable file, different sizes, or an unknown label; the first one in the order of the names.
        WsssError: a worker was killed.
    """
    refined_by: Sequence[Path | None] = photographs or [None] * len(pairs.names)
    items = list(zip(pairs.truth, pairs.predicted, refined_by, strict=True))
    tasks = [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
    is_serial = len(items) <= FEW or workers == 1
    matrix, boundary, facts, pixels = _zeros(len(names))
    present = np.zeros((len(items), len(names)), bool)
    done = 0
    count = partial(_count, names=names)
    with closing(_serially(tasks, names) if is_serial else in_processes(count, tasks, workers or cores())) as results:
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


def _serially(tasks: list[Task], names: Sequence[str]) -> Generator[Counts]:
    for task in tasks:
        yield _count(task, names)


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
                hint="label maps are never resized; write them in the size of the photograph",
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
        hint = "check --classes; 255 is void, other labels must be classes"
        if classes == 80 and label <= 90:
            hint = "COCO's category ids go to 90 with gaps; label maps use 1 to 80 without them"
        raise StoreError(f"{path}: label {label}, the class list ends at {classes}", hint=hint)
    return indexed.labels, facts_of(path, indexed, names)
