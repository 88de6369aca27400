"""Predictions of a run as files: a label store of a folder, or label maps beside true ones."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np

from ... import __version__
from ...batch import Photograph
from ...classes import class_list
from ...errors import ImageError, StoreError
from ...photographs import decode, read_file, read_photograph
from ...store.local import LabelStore, Record, read_records, relative_images, write_label
from ..evaluate.files import read_indexed
from .predictor import Prediction, Predictor

READ_AHEAD = 4
"""Photographs that are decoded while the network computes."""
Progress = Callable[[int, int], None]
Name = TypeVar("Name")
Read = TypeVar("Read")


@dataclass(kw_only=True)
class Labeled:
    """What a run of `label_photographs` did: numbers of images."""

    labeled: int = 0
    skipped: int = 0
    failed: int = 0


def label_photographs(
    predictor: Predictor,
    images: Path,
    names: Sequence[str],
    store: Path,
    *,
    log: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda done, of: None,
) -> Labeled:
    """Label photographs into a new or existing store; unchanged photographs that it has are skipped.

    Every pixel gets a class, the score of a class is the mean confidence of its pixels, and the confidence of each pixel is kept
    beside the label map, as ``wsss label --model segmenter`` does.

    Args:
        images: folder of the photographs. names: their paths below it, with forward slashes.
        log: called with the error of each photograph that cannot be read; its line in the store has it too.

    Raises:
        StoreError: the store cannot be written, or was made by other weights or settings.
    """
    started, done = time.monotonic(), Labeled()
    classes = class_list(predictor.record.classes)
    label_of = _label_names(names)
    with LabelStore(store, classes, predictor.settings) as out:
        known = {record["path"]: record for record in read_records(store)}
        waiting: deque[Photograph] = deque()

        def read(name: str) -> Photograph | Record | None:
            """The photograph, the line of one that cannot be read, or None if it has a label."""
            before = known.get(name)
            try:
                file = read_file(images, name)
                is_labeled = before is not None and "error" not in before and before.get("sha256") == file.sha256
                return None if is_labeled and out.has_label(label_of[name]) else decode(file)
            except ImageError as error:
                return {"path": name, "label": label_of[name], "bytes": 0, "sha256": "", "error": error.message}

        def photographs() -> Iterator[np.ndarray]:
            for found in _ahead(read, names):
                if isinstance(found, Photograph):
                    waiting.append(found)
                    yield found.pixels
                elif found is None:
                    done.skipped += 1
                else:
                    done.failed += 1
                    log(f"failed: {found['error']}")
                    if known.get(found["path"]) != found:
                        out.write(found, None)

        with closing(predictor.predict(photographs())) as predictions:
            for prediction in predictions:
                photo = waiting.popleft()
                out.labels.write_confidence(label_of[photo.name], prediction.confidence)
                out.write(_record(photo, label_of[photo.name], prediction, classes.names), prediction.label)
                done.labeled += 1
                progress(done.labeled + done.skipped + done.failed, len(names))
        if done.labeled or done.failed:
            ended = datetime.now(UTC).isoformat(timespec="seconds")
            about = {"images": len(names), "labelled": done.labeled, "failed": done.failed}
            seconds = round(time.monotonic() - started, 2)
            folder = relative_images(images, store)
            out.add_history({"ended": ended, "wsss": __version__, **about, "seconds": seconds, "folder": folder})
    return done


def predict_into(
    predictor: Predictor,
    photographs: Sequence[Path],
    truth: Sequence[Path],
    names: Sequence[str],
    folder: Path,
    progress: Progress = lambda done, of: None,
) -> tuple[Path, ...]:
    """Write the label map of each photograph as ``folder/NAME.png`` and return the paths.

    Args:
        truth: the true label map of each photograph.

    Raises:
        StoreError: a photograph is unreadable or of another size than its true label map; or a file cannot be written.
    """
    paths = tuple(folder / f"{name}.png" for name in names)

    def read(pair: tuple[Path, Path]) -> np.ndarray:
        photograph, true = pair
        try:
            pixels = read_photograph(photograph.parent, photograph.name).pixels
        except ImageError as error:
            raise StoreError(f"{photograph}: {error.message}", hint=error.hint) from None
        shape = read_indexed(true).labels.shape
        if pixels.shape[:2] != shape:
            raise StoreError(
                f"{photograph}: is {pixels.shape[1]} x {pixels.shape[0]} pixels, its true label map {true} is "
                f"{shape[1]} x {shape[0]}",
                hint="photographs are scored at their own size; give the originals",
            )
        return pixels

    pairs = list(zip(photographs, truth, strict=True))
    with closing(predictor.predict(_ahead(read, pairs))) as predictions:
        for done, (path, prediction) in enumerate(zip(paths, predictions, strict=True), 1):
            try:
                write_label(path, prediction.label)
            except OSError as error:
                raise StoreError(f"{path}: cannot be written: {error.strerror}", hint="give a folder you may write to") from None
            progress(done, len(paths))
    return paths


def _ahead(read: Callable[[Name], Read], names: Iterable[Name]) -> Iterator[Read]:
    """``map`` with a few results computed ahead in threads."""
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        waiting: deque[Future[Read]] = deque()
        try:
            for name in names:
                waiting.append(pool.submit(read, name))
                if len(waiting) == READ_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for each in waiting:
                each.cancel()


def _record(photo: Photograph, label: str, prediction: Prediction, classes: Sequence[str]) -> Record:
    pixels = np.bincount(prediction.label.ravel(), minlength=len(classes) + 1)
    total = np.bincount(prediction.label.ravel(), prediction.confidence.ravel(), len(classes) + 1)
    mean = total / 255 / np.maximum(pixels, 1)
    return {
        "path": photo.name,
        "label": label,
        "bytes": photo.size_bytes,
        "mtime_ns": photo.mtime_ns,
        "sha256": photo.sha256,
        "height": photo.shape[0],
        "width": photo.shape[1],
        "classes": {name: round(float(mean[value]), 4) for value, name in enumerate(classes, 1) if pixels[value]},
        "boxes": [],
        "void_px": 0,
        **({"warning": photo.warning} if photo.warning else {}),
    }


def _label_names(names: Sequence[str]) -> dict[str, str]:
    """``a.png`` for ``a.jpg``; ``a.jpg.png`` where two photographs would have the same, also where case does not count.

    Raises:
        StoreError: two labels still have the same name.
    """
    plain = {name: PurePosixPath(name).with_suffix(".png").as_posix() for name in names}
    count = Counter(label.casefold() for label in plain.values())
    labels = {name: f"{name}.png" if count[label.casefold()] > 1 else label for name, label in plain.items()}
    for label, number in Counter(label.casefold() for label in labels.values()).items():
        if number > 1:
            raise StoreError(f"two photographs would have the label {label}", hint="rename one of them")
    return labels
