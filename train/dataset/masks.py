"""Training data that is not a label store: label maps in a folder and the photographs that they belong to. Imports no torch.

The folder has one PNG for each photograph, by the same name, also in sub-folders; or it has VOC's layout (JPEGImages/ and
SegmentationClass/ or SegmentationClassAug/). Labels of others, or true ones, are read where they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...batch import VOID
from ...classes import cleaned
from ...cores import cores
from ...errors import ImageError, StoreError, UsageError, WsssError
from ...photographs import decode, read_file
from ...store.decisions import Exclusion
from ...store.local import read_run
from ..evaluate.checks import facts_of
from ..evaluate.files import VOC_FOLDERS, LabelMaps, find_label_maps, read_indexed, read_list
from ..evaluate.photographs import folder_of_photographs, photographs_by_name
from .survey import SHOWN, Item, Survey, check_problems, survey_store

Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ValidationSet:
    """Label maps to validate on, instead of a share of the training images."""

    images: Path
    labels: Path
    """A folder of masks, in VOC's layout, or a label store."""
    listed: Path | None = None
    """A list of the names to use; None: all label maps."""
    survey: Survey | None = None
    """The images, if they are already checked; None: all of the folder."""
    against: str = ""
    """The labels, in messages; empty: the true labels of the folder."""


def is_label_store(folder: Path) -> bool:
    """Whether a folder is a label store, and not a folder of masks."""
    return (folder / "run.json").exists()


def survey_of(
    store: Path,
    images: Path,
    *,
    classes: tuple[str, ...] | None,
    listed: Path | None,
    exclude: Exclusion | None,
    log: Log,
    confidence: bool = False,
) -> Survey:
    """Check the images and labels of a label store, or of a folder of masks.

    Args:
        classes: names of labels 1, 2, ...; for a store they may be left out, and must be its own.
        listed: a list of the names of masks to use.
        confidence: the confidence of pixels is needed, which only a store has.

    Raises:
        UsageError: masks without a class list, or with ``confidence``; a list for a store.
        StoreError: as `survey_store` and `survey_masks`.
    """
    if not store.is_dir():
        found = "a file" if store.exists() else "nothing"
        raise StoreError(
            f"{store}: expected a label store, or a folder of masks, found {found}", hint="wsss label makes a label store"
        )
    if not is_label_store(store):
        if classes is None:
            raise UsageError(
                f"{store}: expected a label store (with run.json), or --classes for a folder of masks",
                hint="masks have numbers: --classes names the labels 1, 2, ... in order, for example --classes voc",
            )
        if confidence:
            raise UsageError(
                f"loss.confidence = pixel: {store} is a folder of masks, which have no confidence",
                hint="--set loss.confidence=off",
            )
        return survey_masks(store, images, classes, listed=listed, exclude=exclude, log=log)
    if listed is not None:
        raise UsageError("--list chooses masks of a folder, STORE is a label store", hint="--exclude FILE leaves out images")
    _check_classes(store, read_run(store)["classes"], classes)
    return survey_store(store, images, exclude=exclude, log=log, confidence=confidence)


def survey_masks(
    labels: Path,
    images: Path,
    classes: tuple[str, ...],
    *,
    listed: Path | None = None,
    exclude: Exclusion | None = None,
    log: Log = lambda line: None,
    flags: tuple[str, str] = ("--images", "--list"),
    all_photographs: bool = True,
) -> Survey:
    """Check every mask of a folder and its photograph, and count the pixels of each class. Every confidence is 1.

    Args:
        labels: a folder of masks, in VOC's layout, or a label store. images: the photographs, or a folder with JPEGImages/.
        classes: names of labels 1, 2, ...
        listed: a list of names; None: all masks. exclude: images that are left out.
        flags: those that ``images`` and ``listed`` were given with, for messages.
        all_photographs: every photograph must have a mask, unless there is a list or VOC's layout, whose JPEGImages has more.

    Returns:
        Items with the mask's absolute path as ``label``, and the photograph's path below `folder_of_photographs` as ``path``.

    Raises:
        StoreError: no mask; masks without photographs or the reverse; or files that are unreadable, of different sizes, with
            labels that are no class, or with colors in place of labels. Counts them and names the first ones.
    """
    maps = find_label_maps(labels)
    if maps.classes is not None:
        _check_classes(labels, maps.classes, classes)
    names = read_list(listed, maps, flags[1]) if listed else tuple(maps.paths)
    inside = folder_of_photographs(images)
    known = photographs_by_name(inside, flags[0])
    pairs = _paired(maps, names, inside, known, flags, is_chosen=bool(listed))
    others = sorted(path.relative_to(inside).as_posix() for path in set(known.values()) - {path for path, _ in pairs})
    if others and not listed:
        message = f"{len(others)} of {len(others) + len(pairs)} photographs of {inside} have no mask in {maps.inside}"
        if all_photographs and maps.inside.name not in VOC_FOLDERS:
            hint = f"add their masks, or choose the others with {flags[1]} FILE, one name per line"
            raise StoreError(f"{message}: {_some(others)}", hint=hint)
        log(f"{message} and are left out: {_some(others)}")
    records = [{"path": path.relative_to(inside).as_posix(), "mask": str(mask)} for path, mask in sorted(pairs)]
    if exclude is not None:
        records = list(exclude.filter(records))
        exclude.report(log)
    if not records:
        raise StoreError(f"{labels}: every image is left out", hint="leave fewer out")
    items: list[Item] = []
    problems: list[str] = []
    facts = np.zeros(4, np.int64)
    digest = hashlib.sha256(json.dumps(list(classes)).encode())
    with ThreadPoolExecutor(cores()) as pool:
        for record, result in zip(
            records, pool.map(lambda each: _check_pair(inside, each["path"], Path(each["mask"]), classes), records), strict=True
        ):
            if isinstance(result, str):
                problems.append(f"{record['path']}: {result}")
            else:
                item, label_digest, each_facts = result
                items.append(item)
                facts += each_facts
                digest.update(json.dumps([item.path, item.sha256, label_digest, item.confidence]).encode())
    check_problems(
        labels, problems, len(records), hint="masks need the size of their photographs and the labels of --classes; 255 is void"
    )
    if facts[1] == len(items):
        raise StoreError(
            f"{labels}: its {len(items)} masks have only 0 and 255: 255 is void, so there is no class",
            hint="in a mask of one class, write the number of the class, 1, instead of 255",
        )
    if facts[1]:
        log(f"warning: {facts[1]} of {len(items)} masks have only 0 and 255: 255 is void, not a class")
    return Survey(classes=classes, items=tuple(items), failed=0, digest=digest.hexdigest())


def _paired(
    maps: LabelMaps, names: Sequence[str], inside: Path, known: Mapping[str, Path], flags: tuple[str, str], *, is_chosen: bool
) -> list[tuple[Path, Path]]:
    """(photograph, mask) of each name."""
    pairs: list[tuple[Path, Path]] = []
    missing: list[str] = []
    masks_of: dict[Path, Path] = {}
    for name in names:
        photograph = known.get(maps.images.get(name, name))
        if photograph is None:
            missing.append(f"{name}.png")
            continue
        mask = maps.paths[name].absolute()
        if masks_of.setdefault(photograph, mask) != mask:
            raise StoreError(f"{photograph}: has two masks, {masks_of[photograph]} and {mask}", hint="keep one of them")
        pairs.append((photograph, mask))
    if missing:
        chosen = "" if is_chosen else f"; {flags[1]} chooses some of the masks"
        raise StoreError(
            f"{maps.inside}: {len(missing)} of {len(names)} masks have no photograph in {inside}: {_some(missing)}",
            hint=f"masks and photographs are matched by their path below the two folders; give {flags[0]} their folder{chosen}",
        )
    return pairs


def _check_pair(images: Path, name: str, mask: Path, classes: Sequence[str]) -> tuple[Item, str, np.ndarray] | str:
    """The item, its label map's digest and its `FACTS`, or the problem."""
    try:
        file = read_file(images, name)
        shape = decode(file).shape
    except ImageError as error:
        return f"the photograph: {error.message.removeprefix(name + ': ')}"
    try:
        indexed = read_indexed(mask)
        facts = facts_of(mask, indexed, classes)
    except StoreError as error:
        return error.message
    label_map = indexed.labels
    if label_map.shape != shape:
        return f"the photograph is {shape[1]} x {shape[0]} pixels, its mask {mask} {label_map.shape[1]} x {label_map.shape[0]}"
    count = np.bincount(label_map.ravel(), minlength=256)
    outside = [int(label) for label in np.flatnonzero(count) if len(classes) < label != VOID]
    if outside:
        return f"its mask {mask} has label {outside[-1]}, the class list ends at {len(classes)}"
    item = Item(
        path=name,
        label=str(mask),
        sha256=file.sha256,
        confidence=(1.0,) * (len(classes) + 1),
        pixels=tuple(count[: len(classes) + 1].tolist()),
        size=(label_map.shape[0], label_map.shape[1]),
    )
    return item, hashlib.sha256(label_map.tobytes()).hexdigest(), facts


def _check_classes(store: Path, known: Sequence[str], given: Sequence[str] | None) -> None:
    if given is not None and list(map(cleaned, known)) != list(map(cleaned, given)):
        raise WsssError(
            f"{store}: a label store of the classes {_some(known)}, not {_some(given)}",
            hint="leave out --classes, or give the list that the store was made with, in its order",
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
