"""What the files of a label store say, wherever they are: one format for `labelstore` and `remote_store`.

A store may come from a stranger. `parse_line` and `parse_run` are the only readers of a manifest's lines and of ``run.json``:
what they return has the types and ranges that `Record` documents. Keys that they do not know pass unchecked, for newer
versions may add some; a key that is absent is a matter for whoever needs it (`check_complete`), for older ones lack some.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Collection, Mapping
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

path: of the image below the folder that was labeled, or as the list named it. label: of its label map below ``labels/``.
bytes, mtime_ns (of an object in a store: etag), sha256: of the image file. sha256 is empty where it could not be read.
error: why it has no label. Without it:
height, width: pixels, their product at most `MAX_PIXELS`. void_px: of the label map.
classes: scores in 0..1 by name. boxes: at most `MAX_BOXES`, each with label, score in 0..1, quality (the mask's predicted
IoU, not clipped), xyxy (pixels) and won_px.
"""
MAX_LINE = 1 << 20
"""Bytes of a line: `MAX_BOXES` boxes take 50,000."""
_MOST_SIGNS = 1 << 16
"""Of any text in a line."""
_MOST_ERROR = 1 << 12
_MOST_NUMBER = 1 << 63
_MOST_QUALITY = 100.0
"""A predicted IoU is the output of a linear layer: near 0..1, but not in it."""
_OUTSIDE = re.compile(r"/\.{0,2}(/|$)")
"""In a path after a slash: an empty part, ``.`` or ``..``."""
_WINDOWS = re.compile(r"[\\:]")
_SHA256 = re.compile(r"([0-9a-f]{64})?")


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


def run_of(classes: ClassList, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What ``run.json`` says."""
    return json.loads(json.dumps({"format": 1, "classes": list(classes.names), **settings}))


def names_by_value(classes: ClassList) -> dict[int, str]:
    """What ``classes.json`` says."""
    return {0: "background", **dict(enumerate(classes.names, 1)), 255: "void"}


def line_of(record: Record) -> bytes:
    """A record as a line of a manifest; a very long error is cut, so that `parse_line` takes the line."""
    if len(record.get("error", "")) > _MOST_ERROR:
        record = {**record, "error": record["error"][:_MOST_ERROR] + "..."}
    # File names that are no Unicode come as lone surrogates (PEP 383); json.loads reads them back from bytes.
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def json_of(value: object) -> bytes:
    """A value as a JSON file for people."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def parse_line(data: bytes) -> Record:
    """Parse and check a line of a manifest. Raises ValueError, which says what is wrong with it."""
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
        raise ValueError("a key stands twice")
    return found


def _not_finite(name: str) -> Any:
    raise ValueError(f"expected finite numbers, got {name}")


_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_constant=_not_finite)


def _problem(record: object) -> str:
    """What is wrong with a line, empty where nothing is. Of millions of lines, so in plain comparisons."""
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
    if type(at := record.get("mtime_ns", 0)) is not int or not -_MOST_NUMBER < at < _MOST_NUMBER:
        return f"mtime_ns: expected nanoseconds, got {_short(at)}"
    if type(digest := record.get("sha256", "")) is not str or not _SHA256.fullmatch(digest):
        return f"sha256: expected 64 hexadecimal digits or none, got {_short(digest)}"
    for key in ("etag", "error"):
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
        if problem := _problem_of_box(box):
            return f"boxes: {problem}"
    return ""


_EMPTY: dict[str, float] = {}
_NONE: list[Record] = []


def _problem_of_box(box: object) -> str:
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
    if not _is_share(score := box.get("score", 0.0)):
        return f"score: expected a number in 0..1, got {_short(score)}"
    if type(quality := box.get("quality", 0.0)) not in _NUMBERS or not -_MOST_QUALITY <= quality <= _MOST_QUALITY:
        return f"quality: expected a predicted IoU, got {_short(quality)}"
    for key in ("won_px", "area_px"):
        if not _is_count(count := box.get(key, 0)):
            return f"{key}: expected a count, got {_short(count)}"
    return ""


_NUMBERS = (int, float)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _MOST_NUMBER


def _is_share(value: Any) -> bool:
    return type(value) in _NUMBERS and 0 <= value <= 1  # false for NaN


def _is_seconds(value: Any) -> bool:
    return type(value) in _NUMBERS and 0 <= value < _MOST_NUMBER


def _is_text(value: object) -> bool:
    return type(value) is str and len(value) <= _MOST_SIGNS


def _is_name(value: object) -> TypeGuard[str]:
    if type(value) is not str or not 0 < len(value) <= _MOST_SIGNS or "\0" in value:
        return False
    if not value.isascii():
        try:
            value.encode("utf-8", "surrogateescape")  # as the file system takes it (PEP 383)
        except UnicodeEncodeError:
            return False
    return True


def is_label(name: str, *, windows: bool = os.name == "nt") -> bool:
    """Whether this can be a label map's path below ``labels/``: a PNG file in it, whatever links and drives there are."""
    return name.endswith(".png") and is_below(name, windows=windows)


def is_below(name: str, *, windows: bool = os.name == "nt") -> bool:
    """Whether a path is one below any folder: relative, without an empty part, ``.`` or ``..``."""
    return not _OUTSIDE.search(f"/{name}") and not (windows and _WINDOWS.search(name))


def history_of(line: bytes) -> Record | None:
    """What a line of ``history.jsonl`` says, None where it is damaged: labeled, seconds and stage_seconds have numbers."""
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


def check_complete(record: Record, names: Collection[str], fields: Collection[str], where: object) -> None:
    """Check that the line of a labeled image has what its reader needs.

    Args:
        names: the store's classes. fields: of the line. where: the manifest.

    Raises:
        StoreError: a field is absent, or a class is none of the store's.
    """
    if lacking := [field for field in fields if field not in record]:
        problem = f"lacks {', '.join(sorted(lacking))}"
    elif not all(box.keys() >= _BOX_FIELDS for box in record.get("boxes", ())):
        problem = f"has a box that lacks one of {', '.join(sorted(_BOX_FIELDS))}"
    elif strange := {*record.get("classes", ()), *(box["label"] for box in record.get("boxes", ()))}.difference(names):
        problem = f"names {', '.join(map(ascii_safe, sorted(strange)))}, which is none of the classes of run.json"
    else:
        return
    raise StoreError(
        f"{where}: the line of {ascii_safe(record['path'])} {problem}",
        hint="this version of wsss writes other lines: label into a new store",
    )


_BOX_FIELDS = {"label", "score", "quality", "xyxy", "won_px"}


def ascii_safe(name: str) -> str:
    """A file name as a message can show it: in quotes where it holds characters that do not print."""
    return name if name.isprintable() else ascii(name)


def photograph_of(images: Path, name: str) -> Path:
    """Where the photograph of a line is: below ``images``, or ``images`` itself where that is a file.

    Links in ``images`` are the user's own and are followed.

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
            hint="give the folder that all its images are in; of a list of absolute paths that may be /",
        )
    return Path(path)


def inside(folder: Path, name: str) -> Path:
    """The path of a file of a store. Raises StoreError where a link leads it out of the store."""
    path = folder / name
    if not is_inside(os.path.realpath(path), os.path.realpath(folder)):
        raise StoreError(
            f"{ascii_safe(str(path))}: a link leads out of the store",
            hint="copy what the link leads to into the store (cp -rL copies a store without links)",
        )
    return path


def is_inside(path: str, folder: str) -> bool:
    """Whether a path without ``..`` lies in a folder, both absolute or from the same folder."""
    if folder == os.curdir:
        return not os.path.isabs(path) and path.split(os.sep)[0] != os.pardir
    return path.startswith(folder.rstrip(os.sep) + os.sep)


def parse_run(data: bytes, file: object) -> dict[str, Any]:
    """Parse and check a ``run.json``: ``classes`` is the list of names; what else it holds is any JSON.

    Raises:
        StoreError: it is damaged; names the file.
    """
    where = f"{file}: damaged"
    run = parse_json(data, where, hint="give a new --out", error=StoreError)

    def refuse(expected: str, got: object) -> StoreError:
        return StoreError(f"{where}: expected {expected}, got {_short(got)}", hint="give a new --out")

    if not isinstance(run, dict):
        raise refuse("an object", run)
    if run.get("format", 1) != 1:
        raise StoreError(f"{file}: expected format 1, got {_short(run['format'])}", hint="take the wsss that wrote it")
    names = run.get("classes")
    if not isinstance(names, list) or not 0 < len(names) <= MAX_CLASSES:
        raise refuse(f"classes, 1 to {MAX_CLASSES} names", names)
    for name in names:
        if not isinstance(name, str) or not name or not name.isprintable() or len(name) > _MOST_SIGNS:
            raise refuse("the name of a class", name)
    if len(set(names)) < len(names):
        raise refuse("classes of different names", names)
    rules = run["rules"] if isinstance(run.get("rules"), dict) else {}
    for key in ("tag_threshold", "box_threshold"):
        if (value := rules.get(key)) is not None and not _is_share(value):
            raise refuse(f"{key} in 0..1", value)
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
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "one nested too deep"
    text = text if text.isprintable() else json.dumps(value)
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
