"""What the files of a label store say, wherever they are: one format for `labelstore` and `remote_store`."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from .classes import ClassList
from .errors import StoreError
from .manifest import Line, side_by_side

Record = dict[str, Any]
"""A line of the manifest: path, label, bytes, mtime_ns (of an object in a store: etag), sha256, and either the results or
``error``."""


class Wanted(Protocol):
    """An image that a run is asked for, as far as the store cares: its path, and its label's below ``labels/``."""

    @property
    def name(self) -> str: ...
    @property
    def label(self) -> str: ...


W = TypeVar("W", bound=Wanted)
INFORMATION = ("bundle", "wsss")
"""What ``run.json`` says of the run that began the store; a run in which it is another may continue it."""


@dataclass(kw_only=True)
class Selection:
    """How many images are wanted, how many of them have a line already, and how many of those lines are failures."""

    images: int = 0
    done: int = 0
    failed: int = 0


class LabelWriter(Protocol):
    """Where label maps are published. May be pickled; several threads and processes may hold one."""

    def write(self, name: str, label_map: np.ndarray) -> None:
        """Publishes a label map (H, W) uint8 whole or not at all. Raises ImageError or StoreError as `LabelFolder` does."""
        ...

    def write_confidence(self, name: str, confidence: np.ndarray) -> None:
        """Publishes the confidence (H, W) uint8 of a label map, 255 is certain, beside it. Raises as ``write``."""
        ...


def still_true(
    images: Iterable[W],
    lines: Iterable[Line],
    is_current: Callable[[W, Record], bool],
    told: Selection,
    drop: Callable[[str], None],
    *,
    others: bool,
) -> Iterator[Line]:
    """The lines to keep of those that a store has, both sorted; counts into ``told``.

    Args:
        drop: given the label of a line whose image's label is called otherwise now.
        others: keep the lines of images that are not among these.
    """
    for image, line in side_by_side(images, lines):
        told.images += image is not None
        if line is None:
            continue
        if image is None:
            if others:
                yield line
            continue
        record = json.loads(line.data)
        if is_current(image, record):
            told.done += 1
            told.failed += "error" in record
            yield line
        elif record["label"] != image.label:
            drop(record["label"])


def run_of(classes: ClassList, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What ``run.json`` says."""
    return json.loads(json.dumps({"format": 1, "classes": list(classes.names), **settings}))


def names_by_value(classes: ClassList) -> dict[int, str]:
    """What ``classes.json`` says."""
    return {0: "background", **dict(enumerate(classes.names, 1)), 255: "void"}


def line_of(record: Record) -> bytes:
    """A record as a line of a manifest."""
    # File names that are no Unicode come as lone surrogates (PEP 383); json.loads reads them back from bytes.
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def json_of(value: object) -> bytes:
    """A value as a JSON file for people."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def parse_run(data: bytes, file: object) -> dict[str, Any]:
    """The settings in a ``run.json``. Raises StoreError, which names the file, where it is damaged."""
    try:
        run = json.loads(data.decode())
    except ValueError as error:
        raise StoreError(f"{file}: damaged: {error}", hint="give a new --out") from None
    if not isinstance(run, dict):
        raise StoreError(f"{file}: damaged: it holds {type(run).__name__}", hint="give a new --out")
    return run


def check_same(folder: object, was: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises StoreError, which names the first difference, unless a store's settings are those of this run."""
    thresholds, rules = now.get("bundle", {}).get("thresholds", {}), was.get("rules")
    if isinstance(rules, dict):  # of version 0.1: None is the bundle's threshold
        was = {**was, "rules": {name: thresholds.get(name) if value is None else value for name, value in rules.items()}}
    for key in sorted((was.keys() | now.keys()) - set(INFORMATION)):
        if was.get(key) != now.get(key):
            raise StoreError(
                f"--out {folder}: was made with {key} = {_short(was.get(key))}, this run has {_short(now.get(key))}",
                hint="give a new --out: a store never mixes settings",
            )


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:200] + "..."


def cannot_write(folder: object, what: str, error: OSError) -> StoreError:
    """The error of a store that cannot be written, its hint the way on."""
    gone = error.errno == errno.ENOENT
    return StoreError(
        f"{folder}: cannot write {what}: {error.strerror or error}",
        hint="was it moved or unmounted? The same command goes on where it is back, or begins anew"
        if gone
        else "what was written so far is whole; make room and run the same command again",
    )
