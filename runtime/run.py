"""A run: a folder of images through the chain into a label store, resumable."""

from __future__ import annotations

import hashlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ..batch import Photograph, PseudoLabels
from ..errors import ImageError
from ..labelstore import LabelStore, Record
from .images import find_images, label_names, read_photograph
from .pipeline import Labeler

DECODERS = 2
"""Threads that decode ahead of the chain; Pillow releases the interpreter lock while it decodes."""


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
    seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)


Progress = Callable[[Summary], None]


def label_folder(
    labeler: Labeler,
    folder: Path,
    out: Path,
    *,
    batch: int = 8,
    retry_failed: bool = False,
    progress: Progress | None = None,
    warn: Callable[[str], None] = lambda message: print(message, file=sys.stderr),
) -> Summary:
    """Labels every image below ``folder`` into the store ``out``; images already there, unchanged, are skipped.

    Args:
        batch: images decoded and labelled together.
        retry_failed: try the images again that a former run could not read.
        progress: told after each batch.
        warn: told of each image that fails; the run goes on.

    Raises:
        ImageError: no images. StoreError: the store cannot be written or belongs to other settings.
    """
    names = find_images(folder, leave_out=out)
    targets = label_names(names)
    start = time.perf_counter()
    with LabelStore(out, labeler.classes, labeler.settings) as store:
        todo = [name for name in names if not _is_done(store, folder, name, targets[name], retry_failed)]
        store.forget(todo)
        failed_before = sum("error" in store.done.get(name, {}) for name in names)
        summary = Summary(images=len(names), skipped=len(names) - len(todo), failed_before=failed_before)
        labeler.take_seconds()
        for loaded in _batches(folder, todo, batch):
            good: list[Photograph] = []
            for name, photo in loaded:
                reason = str(photo) if isinstance(photo, ImageError) else labeler.missing(name)
                if isinstance(photo, Photograph) and reason is None:
                    good.append(photo)
                    continue
                warn(f"failed: {reason}")
                store.write(_failure(folder, name, targets[name], str(reason)), None)
                summary.failed += 1
            if good:
                result = labeler.pseudo_label(good)
                seconds = labeler.take_seconds()
                for row, photo in enumerate(good):
                    store.write(_record(labeler, photo, targets[photo.name], result, row, seconds), result.label_maps[row])
                for stage, taken in seconds.items():
                    summary.stage_seconds[stage] = summary.stage_seconds.get(stage, 0.0) + taken
                summary.labelled += len(good)
                summary.boxes += len(result.boxes)
            summary.seconds = time.perf_counter() - start
            if progress:
                progress(summary)
    summary.seconds = time.perf_counter() - start
    return summary


def _is_done(store: LabelStore, folder: Path, name: str, target: str, retry_failed: bool) -> bool:
    record = store.done.get(name)
    if record is None or (retry_failed and "error" in record) or record["label"] != target:
        return False
    if "error" not in record and not (store.folder / "labels" / target).is_file():
        return False
    size, sha256 = _fingerprint(folder, name)
    return bool(record["bytes"] == size and record["sha256"] == sha256)


def _fingerprint(folder: Path, name: str) -> tuple[int, str]:
    path = folder / name if folder.is_dir() else folder
    try:
        with path.open("rb") as file:
            return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return 0, ""


def _batches(folder: Path, names: list[str], batch: int) -> Iterator[list[tuple[str, Photograph | ImageError]]]:
    def read(name: str) -> Photograph | ImageError:
        try:
            return read_photograph(folder, name)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(DECODERS) as pool:
        waiting: deque[tuple[str, Future[Photograph | ImageError]]] = deque()
        upcoming = iter(names)
        while True:
            while len(waiting) < 2 * batch and (name := next(upcoming, None)) is not None:
                waiting.append((name, pool.submit(read, name)))
            if not waiting:
                return
            taken = [waiting.popleft() for _ in range(min(batch, len(waiting)))]
            yield [(name, future.result()) for name, future in taken]


def _failure(folder: Path, name: str, target: str, reason: str) -> Record:
    size, sha256 = _fingerprint(folder, name)
    return {"path": name, "label": target, "bytes": size, "sha256": sha256, "error": reason}


def _record(
    labeler: Labeler, photo: Photograph, target: str, result: PseudoLabels, row: int, seconds: dict[str, float]
) -> Record:
    names, share = labeler.classes.names, len(result)
    boxes = [
        {
            "label": names[result.boxes.label[i] - 1],
            "score": round(float(result.boxes.score[i]), 4),
            "xyxy": [round(float(edge), 2) for edge in result.boxes.xyxy_image[i]],
            "quality": round(float(result.quality[i]), 4),
            "area_px": int(result.area[i]),
            "won_px": int(result.won[i]),
        }
        for i in (result.boxes.image == row).nonzero()[0]
    ]
    present = result.labels.present[row].nonzero()[0]
    return {
        "path": photo.name,
        "label": target,
        "bytes": photo.size_bytes,
        "sha256": photo.sha256,
        "height": photo.shape[0],
        "width": photo.shape[1],
        "classes": {names[c]: round(float(result.labels.score[row, c]), 4) for c in present},
        "boxes": boxes,
        "void_px": int((result.label_maps[row] == 255).sum()),
        "seconds": {stage: round(taken / share, 4) for stage, taken in seconds.items()},
    }
