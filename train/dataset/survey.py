"""Check a label store before training: are all images present, unchanged, and labeled with its classes? Imports no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...batch import VOID
from ...cores import cores
from ...errors import ImageError, StoreError
from ...files import write_atomically
from ...photographs import read_file
from ...store.decisions import Exclusion
from ...store.format import check_complete, photograph_of
from ...store.local import Record, label_path, read_confidence, read_label, read_records, read_run

SHOWN = 3
"""Bad images listed in an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One labeled image of a store."""

    path: str
    """Path below the folder of images."""
    label: str
    """Path below the store's ``labels``; absolute for a mask that is not in a store (`wsss.train.dataset.masks`)."""
    sha256: str
    """sha256 of the image file when it was labeled."""
    confidence: tuple[float, ...]
    """(C + 1) in [0, 1]: the store's confidence in background and each class in this image."""
    pixels: tuple[int, ...]
    """(C + 1) number of pixels of background and each class."""
    size: tuple[int, int]
    """(height, width) of the image."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The training data of a store."""

    classes: tuple[str, ...]
    items: tuple[Item, ...]
    """Sorted by path."""
    failed: int
    """Number of images that could not be labeled; they are left out."""
    digest: str
    """Hash of class list, images, labels and confidence: surveys with the same digest train the same weights."""
    confidence: tuple[tuple[int, ...], ...] = ()
    """(C + 1, 256) number of pixels of background and each class with each confidence; empty if it was not asked for."""

    def split(self, share: float, limit: int) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
        """Training and validation items. Validation is the ``share`` of lowest path hashes, at most ``limit`` and never all."""
        by_hash = sorted(self.items, key=lambda item: hashlib.sha256(item.path.encode("utf-8", "surrogatepass")).digest())
        count = min(round(len(by_hash) * share), limit, len(by_hash) - 1)
        held_out = {item.path for item in by_hash[:count]}
        return (
            tuple(item for item in self.items if item.path not in held_out),
            tuple(item for item in self.items if item.path in held_out),
        )


def survey_store(
    store: Path,
    images: Path,
    progress: Callable[[int, int], None] = lambda done, of: None,
    *,
    exclude: Exclusion | None = None,
    log: Callable[[str], None] = print,
    confidence: bool = False,
) -> Survey:
    """Check every image and label of a store and count the pixels of each class.

    Args:
        progress: called with the numbers of done and of all images.
        exclude: images that are left out. log: called with what was left out.
        confidence: check and count the confidence of every pixel too.

    Raises:
        StoreError: no labeled image; or images that are missing or changed, labels that are missing, of the wrong size, or
            not in the class list, or the same of confidence. Counts them and names the first ones.
    """
    if confidence and not (store / "confidence").is_dir():
        raise StoreError(
            f"{store}: loss.confidence = pixel: the store has no confidence of pixels",
            hint="label into a new store with wsss label --confidence, or train with --set loss.confidence=box",
        )
    classes: list[str] = read_run(store)["classes"]
    records = sorted(read_records(store), key=lambda record: record["path"])
    if exclude is not None:
        records = list(exclude.filter(records))
        exclude.report(log)
    labelled = [record for record in records if "error" not in record]
    for record in labelled:
        check_complete(record, classes, ("sha256", "height", "width"), store / "manifest.jsonl")
    if not labelled:
        problem = f"none of its {len(records)} images could be labeled" if records else "no image in it yet"
        raise StoreError(f"{store}: {problem}", hint="wsss label fills a store; wsss report shows what went wrong")

    items: list[Item] = []
    problems: list[str] = []
    digest = hashlib.sha256(json.dumps(classes).encode())
    counted = np.zeros((len(classes) + 1, 256), np.int64)
    with ThreadPoolExecutor(cores()) as pool:
        results = pool.map(lambda record: _check_image(store, images, record, classes, confidence), labelled)
        for done, (record, result) in enumerate(zip(labelled, results, strict=True), 1):
            if isinstance(result, str):
                problems.append(f"{record['path']}: {result}")
            else:
                item, label_digest, count = result
                items.append(item)
                counted += count
                digest.update(json.dumps([item.path, item.sha256, label_digest, item.confidence]).encode())
            progress(done, len(labelled))
    check_problems(
        store,
        problems,
        len(labelled),
        hint=f"give --images the folder that was labeled (now {images}); wsss label labels changed images again",
    )
    failed = len(records) - len(labelled)
    by_value = tuple(map(tuple, counted.tolist())) if confidence else ()
    return Survey(classes=tuple(classes), items=tuple(items), failed=failed, digest=digest.hexdigest(), confidence=by_value)


def check_problems(where: Path, problems: Sequence[str], count: int, *, hint: str) -> None:
    """Raises StoreError, which names the first problems of ``count`` images, if there are any."""
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise StoreError(
            f"{where}: {len(problems)} of {count} images cannot be trained on:\n  " + "\n  ".join(problems[:SHOWN]) + more,
            hint=hint,
        )


def _check_image(
    store: Path, images: Path, record: Record, classes: Sequence[str], confidence: bool
) -> tuple[Item, str, np.ndarray] | str:
    """The item, the digest of its label map and confidence, and the pixels of each label with each confidence (C + 1, 256), all 0
    without ``confidence``; or the problem."""
    try:
        sha256 = read_file(photograph_of(images, record["path"]), record["path"]).sha256
    except ImageError as error:
        return f"the image: {error.message.removeprefix(record['path'] + ': ')}"
    except StoreError as error:
        return error.message
    if sha256 != record["sha256"]:
        return "the image has changed since it was labeled"
    try:
        label_map = read_label(label_path(store, record["label"]))
        label_digest = hashlib.sha256(label_map.tobytes()).hexdigest()
    except StoreError as error:
        return error.message
    expected = record["height"], record["width"]
    if label_map.shape != expected:
        return f"the image is {expected[0]} x {expected[1]} pixels, its label {label_map.shape[0]} x {label_map.shape[1]}"
    count = np.bincount(label_map.ravel(), minlength=256)
    outside = [int(label) for label in np.flatnonzero(count) if len(classes) < label != VOID]
    if outside:
        return f"its label map has label {outside[0]}, the store has {len(classes)} classes"
    pixels: list[int] = count[: len(classes) + 1].tolist()
    by_value = np.zeros((len(classes) + 1, 256), np.int64)
    if confidence:
        try:
            sure = read_confidence(store, record["label"], shape=expected)
        except StoreError as error:
            return error.message
        label_digest += hashlib.sha256(sure.tobytes()).hexdigest()
        known = label_map != VOID
        by_value += np.bincount(256 * label_map[known].astype(np.int64) + sure[known], minlength=by_value.size).reshape(-1, 256)
    return (
        Item(
            path=record["path"],
            label=record["label"],
            sha256=sha256,
            confidence=tuple(class_confidence(record, classes, pixels)),
            pixels=tuple(pixels),
            size=expected,
        ),
        label_digest,
        by_value,
    )


def class_confidence(record: Record, classes: Sequence[str], pixels: Sequence[int]) -> list[float]:
    """The store's confidence in each label value in one image, by its manifest.

    Args:
        pixels: (C + 1) number of pixels of background and each class in the label map.

    Returns:
        (C + 1) values in [0, 1]. For a class: the mean of box score x mask quality (x stability, where that counted) over its
        boxes, weighted by the pixels that each box won; for a class with pixels but without boxes (from a segmenter), its
        score. For background: one minus the highest score of a class that was tagged but has no pixel, since that object is
        then in the background. Without boxes in the manifest: 1.
    """
    if (boxes := record.get("boxes")) is None:
        return [1.0] * (len(classes) + 1)
    sure, won = np.zeros(len(classes)), np.zeros(len(classes))
    for box in boxes:
        if box["label"] in classes:
            column = classes.index(box["label"])
            sure[column] += box["score"] * box["quality"] * box.get("stability", 1.0) * box["won_px"]
            won[column] += box["won_px"]
    tags = record.get("classes", {})
    tagged = [tags.get(name, 1.0) if pixels[number] else 1.0 for number, name in enumerate(classes, 1)]
    scores = np.where(won > 0, sure / np.maximum(won, 1), tagged)
    found = {name for number, name in enumerate(classes) if won[number] or pixels[number + 1]}
    missed = max((score for name, score in tags.items() if name not in found), default=0.0)
    return [round(min(max(value, 0.0), 1.0), 6) for value in (1 - missed, *scores.tolist())]


def write_survey(path: Path, survey: Survey) -> None:
    """Write a survey for the other processes of a training."""
    write_atomically(path, json.dumps(dataclasses.asdict(survey), allow_nan=False).encode("utf-8", "surrogatepass"))


def read_survey(path: Path) -> Survey:
    """Read a survey that `write_survey` wrote."""
    record = json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
    items = tuple(
        Item(**{**item, **{key: tuple(item[key]) for key in ("confidence", "pixels", "size")}}) for item in record["items"]
    )
    counted = tuple(map(tuple, record.get("confidence", ())))
    return Survey(
        classes=tuple(record["classes"]), items=items, failed=record["failed"], digest=record["digest"], confidence=counted
    )
