"""The file format of a label store, shared by `local` and `remote`.

A store is untrusted input. Manifest lines and ``run.json`` are read only by `parse_line` and `parse_run`, which check the types
and ranges documented at `Record`. Unknown keys pass unchecked, since newer versions may add some. Readers check with
`check_complete` that the keys they need are present, since older versions lack some.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard, TypeVar

import numpy as np

from ..batch import MAX_BOXES
from ..classes import MAX_CLASSES, ClassList
from ..errors import StoreError
from ..photographs import MAX_PIXELS
from ..reading.documents import parse_json

Record = dict[str, Any]
"""A line of the manifest.

path: path of the image below the labeled folder, or as the list names it. label: path of its label map below ``labels/``.
bytes, mtime_ns (in an object store: etag), sha256: of the image file; sha256 is empty if the file could not be read.
given: hash of the labels and boxes that were given for the image; absent if none were.
corrected: the name of the file that the label was corrected from; later runs keep it. Absent if it was not.
error: why the image has no label. Lines without an error have:
height, width: pixels, their product at most `MAX_PIXELS`. void_px: void pixels of the label map.
classes: scores in 0..1 by name. boxes: at most `MAX_BOXES`, each with label, score in 0..1, quality (the mask's predicted
IoU, not clipped), xyxy (pixels) and won_px; and stability in 0..1, the mask's stability score, where it counted.
"""
MAX_LINE = 1 << 20
"""Bytes per line; `MAX_BOXES` boxes take 50,000."""
_MAX_TEXT = 1 << 16
"""Characters of any text in a line."""
_MAX_ERROR = 1 << 12
_MAX_NUMBER = 1 << 63
_MAX_QUALITY = 100.0
"""A predicted IoU is the output of a linear layer: near 0..1, but not limited to it."""
_OUTSIDE = re.compile(r"/\.{0,2}(/|$)")
"""Matches a path, prefixed by a slash, that has an empty part, ``.`` or ``..``."""
_WINDOWS = re.compile(r"[\\:]")
_SHA256 = re.compile(r"([0-9a-f]{64})?")


class RequestedImage(Protocol):
    """An image that a run was asked to label: its path, and the path of its label below ``labels/``."""

    @property
    def name(self) -> str: ...
    @property
    def label(self) -> str: ...


W = TypeVar("W", bound=RequestedImage)
INFORMATION = ("bundle", "wsss", "ignored")
"""Keys of ``run.json`` that describe the run that created the store; a run may continue it with other values."""


@dataclass(kw_only=True)
class Selection:
    """Counts of requested images, of those that already have a line, and of those whose line is an error."""

    images: int = 0
    done: int = 0
    failed: int = 0


class LabelWriter(Protocol):
    """Writes label maps. Can be pickled and used by several threads and processes."""

    def write(self, name: str, label_map: np.ndarray, masks: Sequence[str] | None = None) -> None:
        """Write a label map (H, W) uint8 atomically. Raises ImageError or StoreError as `LabelFolder` does.

        Args:
            masks: the compressed counts (`wsss.rle`) of the masks of its boxes; None if they are not kept.
        """
        ...

    def write_confidence(self, name: str, confidence: np.ndarray) -> None:
        """Write the confidence (H, W) uint8 of a label map, 255 is certain. Raises as ``write``."""
        ...


class Store(Protocol):
    """A label store open for writing: `LabelStore` on this machine, `RemoteStore` in an object store."""

    @property
    def labels(self) -> LabelWriter: ...
    def __enter__(self) -> Store: ...
    def __exit__(self, *_: object) -> None: ...
    def has_label(self, name: str) -> bool: ...
    def select(self, images: Iterable[W], is_current: Callable[[W, Record], bool]) -> Selection: ...
    def missing(self, images: Iterable[W]) -> Iterator[W]: ...
    def append(self, records: Sequence[Record]) -> None: ...
    def add_history(self, record: Mapping[str, Any]) -> None: ...


def run_of(classes: ClassList, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``run.json``."""
    return json.loads(json.dumps({"format": 1, "classes": list(classes.names), **settings}))


def names_by_value(classes: ClassList) -> dict[int, str]:
    """The content of ``classes.json``."""
    return {0: "background", **dict(enumerate(classes.names, 1)), 255: "void"}


def line_of(record: Record) -> bytes:
    """Format a record as a manifest line; a very long error is cut, so that `parse_line` accepts the line."""
    if len(record.get("error", "")) > _MAX_ERROR:
        record = {**record, "error": record["error"][:_MAX_ERROR] + "..."}
    # File names that are not UTF-8 contain lone surrogates (PEP 383); json.loads reads them back from bytes.
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def json_of(value: object) -> bytes:
    """Format a value as an indented JSON file."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def parse_line(data: bytes) -> Record:
    """Parse and check a manifest line. Raises ValueError with the problem."""
    try:
        record = _DECODER.decode(data.decode("utf-8", "surrogatepass"))
    except RecursionError:
        raise ValueError("nested too deep") from None
    if problem := _problem(record):
        raise ValueError(problem)
    return record


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _not_finite(name: str) -> Any:
    raise ValueError(f"expected finite numbers, got {name}")


_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_constant=_not_finite)


def _problem(record: object) -> str:
    """Describe what is wrong with a line; empty if nothing is. In plain comparisons: a store may have millions of lines."""
    if type(record) is not dict:
        return f"expected an object, got {_short(record)}"
    path, label = record.get("path"), record.get("label")
    if not _is_name(path):
        return f"path: expected the name of a file, got {_short(path)}"
    if not _is_name(label) or not is_label(label):
        return f"label: expected the path of a PNG file below labels/, got {_short(label)}"
    for key in ("bytes", "void_px", "height", "width"):
        if key in record and not _is_count(record[key]):
            return f"{key}: expected a count, got {_short(record[key])}"
    if type(mtime := record.get("mtime_ns", 0)) is not int or not -_MAX_NUMBER < mtime < _MAX_NUMBER:
        return f"mtime_ns: expected nanoseconds, got {_short(mtime)}"
    if type(digest := record.get("sha256", "")) is not str or not _SHA256.fullmatch(digest):
        return f"sha256: expected 64 hexadecimal digits or none, got {_short(digest)}"
    for key in ("etag", "given", "corrected", "error"):
        if key in record and not _is_text(record[key]):
            return f"{key}: expected a text, got {_short(record[key])}"
    height, width = record.get("height", 1), record.get("width", 1)
    if not 0 < height * width <= MAX_PIXELS:
        return f"height, width: expected at most {MAX_PIXELS:,} pixels, got {height} x {width}"
    if type(classes := record.get("classes", _EMPTY)) is not dict or len(classes) > MAX_CLASSES:
        return f"classes: expected an object of at most {MAX_CLASSES} scores, got {_short(classes)}"
    for name, score in classes.items():
        if not _is_text(name) or not _is_share(score):
            return f"classes: expected scores in 0..1, got {_short({name: score})}"
    if type(boxes := record.get("boxes", _NONE)) is not list or len(boxes) > MAX_BOXES:
        return f"boxes: expected at most {MAX_BOXES} boxes, got {_short(boxes)}"
    for box in boxes:
        if problem := _box_problem(box):
            return f"boxes: {problem}"
    return ""


_EMPTY: dict[str, float] = {}
_NONE: list[Record] = []


def _box_problem(box: object) -> str:
    if type(box) is not dict:
        return f"expected an object, got {_short(box)}"
    if not _is_text(label := box.get("label")):
        return f"label: expected the name of a class, got {_short(label)}"
    corners = box.get("xyxy")
    if type(corners) is not list or len(corners) != 4:
        return f"xyxy: expected four numbers, got {_short(corners)}"
    for edge in corners:
        if type(edge) not in _NUMBERS or not -MAX_PIXELS <= edge <= MAX_PIXELS:
            return f"xyxy: expected four numbers, got {_short(corners)}"
    if corners[0] > corners[2] or corners[1] > corners[3]:
        return f"xyxy: expected the upper left corner first, got {_short(corners)}"
    for key in ("score", "stability"):
        if not _is_share(share := box.get(key, 0.0)):
            return f"{key}: expected a number in 0..1, got {_short(share)}"
    if type(quality := box.get("quality", 0.0)) not in _NUMBERS or not -_MAX_QUALITY <= quality <= _MAX_QUALITY:
        return f"quality: expected a predicted IoU, got {_short(quality)}"
    for key in ("won_px", "area_px"):
        if not _is_count(count := box.get(key, 0)):
            return f"{key}: expected a count, got {_short(count)}"
    return ""


_NUMBERS = (int, float)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _MAX_NUMBER


def _is_share(value: Any) -> bool:
    return type(value) in _NUMBERS and 0 <= value <= 1  # false for NaN


def _is_seconds(value: Any) -> bool:
    return type(value) in _NUMBERS and 0 <= value < _MAX_NUMBER


def _is_text(value: object) -> bool:
    return type(value) is str and len(value) <= _MAX_TEXT


def _is_name(value: object) -> TypeGuard[str]:
    if type(value) is not str or not 0 < len(value) <= _MAX_TEXT or "\0" in value:
        return False
    if not value.isascii():
        try:
            value.encode("utf-8", "surrogateescape")  # as the file system takes it (PEP 383)
        except UnicodeEncodeError:
            return False
    return True


def is_label(name: str, *, windows: bool = os.name == "nt") -> bool:
    """Whether a path can be a label map below ``labels/``: a PNG file that stays inside."""
    return name.endswith(".png") and is_below(name, windows=windows)


def is_below(name: str, *, windows: bool = os.name == "nt") -> bool:
    """Whether a path stays below its folder: relative, without an empty part, ``.`` or ``..``."""
    return not _OUTSIDE.search(f"/{name}") and not (windows and _WINDOWS.search(name))


def history_of(line: bytes) -> Record | None:
    """Parse a line of ``history.jsonl``; None if it is damaged or labelled, seconds or stage_seconds are not numbers."""
    try:
        record = _DECODER.decode(line.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        return None
    if type(record) is not dict or not _is_count(record.get("labelled", 0)) or not _is_seconds(record.get("seconds", 0.0)):
        return None
    stages = record.get("stage_seconds", _EMPTY)
    if type(stages) is not dict or not all(_is_text(name) and _is_seconds(taken) for name, taken in stages.items()):
        return None
    return record


def missing_fields(record: Record, fields: Collection[str]) -> str:
    """Describe which of the fields, or of those that every box has, the line of a labeled image lacks; empty if none."""
    if lacking := [field for field in fields if field not in record]:
        return f"lacks {', '.join(sorted(lacking))}"
    if not all(box.keys() >= _BOX_FIELDS for box in record.get("boxes", ())):
        return f"has a box that lacks one of {', '.join(sorted(_BOX_FIELDS))}"
    return ""


def check_complete(record: Record, names: Collection[str], fields: Collection[str], where: object) -> None:
    """Check that the line of a labeled image has the fields that its reader needs.

    Args:
        names: the store's classes. fields: required keys. where: the manifest.

    Raises:
        StoreError: a field is missing, or a class is not one of the store's.
    """
    if problem := missing_fields(record, fields):
        pass
    elif unknown := {*record.get("classes", ()), *(box["label"] for box in record.get("boxes", ()))}.difference(names):
        problem = f"names {', '.join(map(ascii_safe, sorted(unknown)))}, which is none of the classes of run.json"
    else:
        return
    raise StoreError(
        f"{where}: the line of {ascii_safe(record['path'])} {problem}",
        hint="the store is of another version of wsss: label into a new store",
    )


_BOX_FIELDS = {"label", "score", "quality", "xyxy", "won_px"}


def ascii_safe(name: str) -> str:
    """Format a file name for a message: quoted and escaped if it has unprintable characters."""
    return name if name.isprintable() else ascii(name)


def photograph_of(images: Path, name: str) -> Path:
    """The path of a record's photograph: below ``images``, or ``images`` itself if that is a file.

    Links in ``images`` belong to the user and are followed.

    Raises:
        StoreError: the name leads out of ``images``.
    """
    if not images.is_dir():
        return images
    folder = os.path.normpath(images)
    path = os.path.normpath(os.path.join(folder, name))
    if not is_inside(path, folder) or (os.name == "nt" and _WINDOWS.search(name)):
        raise StoreError(
            f"{ascii_safe(name)}: leads out of --images {images}",
            hint="give the folder that contains all its images; for a list of absolute paths that may be /",
        )
    return Path(path)


def inside(folder: Path, name: str) -> Path:
    """The path of a file of a store. Raises StoreError if a link leads out of the store."""
    path = folder / name
    if not is_inside(os.path.realpath(path), os.path.realpath(folder)):
        raise StoreError(
            f"{ascii_safe(str(path))}: a link leads out of the store",
            hint="copy the link's target into the store (cp -rL copies a store without links)",
        )
    return path


def is_inside(path: str, folder: str) -> bool:
    """Whether a path without ``..`` lies in a folder; both absolute, or relative to the same folder."""
    if folder == os.curdir:
        return not os.path.isabs(path) and path.split(os.sep)[0] != os.pardir
    return path.startswith(folder.rstrip(os.sep) + os.sep)


def parse_run(data: bytes, file: object) -> dict[str, Any]:
    """Parse and check a ``run.json``: ``classes`` is a list of names; other values may be any JSON.

    Raises:
        StoreError: it is damaged; names the file.
    """
    where = f"{file}: damaged"
    run = parse_json(data, where, hint="give a new --out", error=StoreError)

    def unexpected(expected: str, got: object) -> StoreError:
        return StoreError(f"{where}: expected {expected}, got {_short(got)}", hint="give a new --out")

    if not isinstance(run, dict):
        raise unexpected("an object", run)
    if run.get("format", 1) != 1:
        raise StoreError(f"{file}: expected format 1, got {_short(run['format'])}", hint="use the version of wsss that wrote it")
    names = run.get("classes")
    if not isinstance(names, list) or not 0 < len(names) <= MAX_CLASSES:
        raise unexpected(f"classes, 1 to {MAX_CLASSES} names", names)
    for name in names:
        if not isinstance(name, str) or not name or not name.isprintable() or len(name) > _MAX_TEXT:
            raise unexpected("the name of a class", name)
    if len(set(names)) < len(names):
        raise unexpected("classes of different names", names)
    rules = run["rules"] if isinstance(run.get("rules"), dict) else {}
    for key in ("tag_threshold", "box_threshold"):
        if (value := rules.get(key)) is not None and not _is_share(value):
            raise unexpected(f"{key} in 0..1", value)
    thresholds = rules.get("tag_thresholds") or {}
    if not isinstance(thresholds, dict) or not all(map(_is_share, thresholds.values())):
        raise unexpected("tag_thresholds, an object of numbers in 0..1", thresholds)
    return run


_EARLIER_RULES = {
    "score_rule": "mean",
    "enclosing": True,
    "tiles": 1,
    "quality_exponent": 1.0,
    "multimask": False,
    "min_region": 0,
    "stability_exponent": 0.0,
}
"""What versions did that had no such rule."""
_HINTS = {
    "masks": "; or continue this one, which has no masks, with --no-masks",
    "confidence": "; or continue this one, which has no confidence of pixels, without --confidence",
}


def check_same(folder: object, was: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises StoreError, naming the first difference, unless a store's settings equal those of this run."""
    thresholds, rules = now.get("bundle", {}).get("thresholds", {}), was.get("rules")
    if isinstance(rules, dict):  # version 0.1 wrote None for the bundle's threshold
        rules = {name: thresholds.get(name) if value is None else value for name, value in rules.items()}
        known = now["rules"] if isinstance(now.get("rules"), dict) else {}
        earlier = {name: None if value is None else _EARLIER_RULES.get(name) for name, value in known.items()}
        was = {**was, "rules": {**{name: value for name, value in earlier.items() if name not in rules}, **rules}}
    if isinstance(hashes := was.get("given"), dict) and any(_SHA256.fullmatch(str(text)) and text for text in hashes.values()):
        raise StoreError(
            f"--out {folder}: was made by an earlier version, which did not record what was given for each image",
            hint="give a new --out",
        )
    for key in sorted((was.keys() | now.keys()) - set(INFORMATION)):
        if was.get(key) != now.get(key):
            raise StoreError(
                f"--out {folder}: was made with {key} = {_short(was.get(key))}, this run has {_short(now.get(key))}",
                hint="give a new --out: a store never mixes settings" + (_HINTS.get(key, "") if was.get(key) is None else ""),
            )


def _short(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "a value nested too deep"
    text = text if text.isprintable() else json.dumps(value)
    return text if len(text) <= 200 else text[:200] + "..."


def cannot_write(folder: object, what: str, error: OSError) -> StoreError:
    """A StoreError for a failed write, with a hint how to continue."""
    gone = error.errno == errno.ENOENT
    return StoreError(
        f"{folder}: cannot write {what}: {error.strerror or error}",
        hint="was it moved or unmounted? Put it back and run the same command to continue"
        if gone
        else "what was written so far is intact; free some space and run the same command again",
    )
