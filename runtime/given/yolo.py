"""Reads boxes from YOLO labels: a folder of text files named after the photographs, and a list of classes.

    0 0.35 0.52 0.20 0.31           class, then x and y of the center, width and height, as shares of the photograph's sides
    0 0.35 0.52 0.20 0.31 0.87      with a confidence, as predictions are saved
    0 0.25 0.36 0.45 0.36 0.45 0.67 class, then x and y of a region's corners, whose bounding box is taken
    0 0.35 0.52 0.20 0.31 0.3 0.5 2 class and box, then keypoints, where data.yaml has ``kpt_shape`` (or ``task: pose``)

Source of the format: docs.ultralytics.com/datasets/detect. The names of the classes, counted from 0, come from a
``classes.txt``, ``*.names`` (one name a line) or ``data.yaml`` (``names``) in that folder or one of the two above it.
"""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ...errors import WsssError
from ...reading.documents import decode_text, read_bytes, read_text, short
from .boxes import Annotation, Corners, GivenBox, finite
from .voc import AnnotationFolder

LISTS = ("classes.txt", "obj.names")
MAX_BYTES = 1 << 20
"""Most bytes of a list of classes."""
_HINT = "put classes.txt (a name a line), a .names file or data.yaml beside the labels, or one or two folders above"
_FORM = "a line is: class x-center y-center width height, shares of the photograph's sides, for example 0 0.5 0.5 0.2 0.3"
_SLACK = 0.01
"""How far a share may exceed 0..1 because of rounding."""
_NEAR = 0.6
"""How far from the center of its box a keypoint may lie, as a share of the box's side."""


class YoloBoxes:
    """Boxes of a folder of YOLO labels (`BoxSource`). Raises WsssError where the list of classes is missing or ambiguous."""

    def __init__(self, folder: Path, files: Iterable[Path]) -> None:
        self.index = AnnotationFolder(folder, files, "labels", ".txt", "for a photograph without objects, add an empty file")
        self._list = class_file(folder)
        self._names, keypoints = read_names(self._list)
        self._has_keypoints = bool(keypoints)
        if not keypoints:
            _check_kind(self.index, named=keypoints is False)

    def read(self, key: str) -> Annotation:
        path = self.index.path(key)
        sides: list[Corners] = []
        boxes: list[GivenBox] = []
        for number, line in enumerate(read_text(path, hint=_FORM).splitlines(), 1):
            if line.strip():
                where = f"{path}: line {number}"
                label, xywh, score = self._line(line.split(), where)
                if not 0 <= label < len(self._names):
                    raise WsssError(
                        f"{where}: class {label}, but {self._list} has {len(self._names)}", hint="classes are counted from 0"
                    )
                x, y, w, h = xywh
                sides.append(xywh)
                boxes.append(GivenBox(self._names[label], (x - w / 2, y - h / 2, x + w / 2, y + h / 2), score))
        if _beyond(boxes) and all(x < w and y < h for x, y, w, h in sides):
            raise WsssError(f"{path}: expected centers and sides, got what looks like corners x0 y0 x1 y1", hint=_FORM)
        return Annotation(where=str(path), boxes=boxes, shares=True)

    def _line(self, fields: list[str], where: str) -> tuple[int, Corners, float]:
        """Class, (x, y, width, height) with x and y of the center, and score."""
        numbers = [_number(text) for text in fields[1:]]
        values = [number for number in numbers if number is not None]
        got = short(" ".join(fields))
        label = _class(fields[0])
        if label is None or len(values) < len(numbers) or len(values) < 4:
            raise WsssError(f"{where}: expected a line of YOLO labels, got {got}", hint=self._hint_for(fields))
        shares = values[:4] if self._has_keypoints else values
        if min(values[2:4]) < 0 and (len(values) < 6 or self._has_keypoints):
            raise WsssError(f"{where}: expected a width and height of at least 0, got {got}", hint=_FORM)
        if wrong := [value for value in shares if not -_SLACK <= value <= 1 + _SLACK]:
            if len(shares) % 2 and wrong == shares[-1:]:
                hint = "the last value is a confidence in 0..1: divide percent by 100, or leave it out"
            elif set(wrong) == {2.0}:
                hint = "keypoints with a visibility of 2 need a data.yaml with kpt_shape"
            else:
                hint = _FORM if max(wrong) <= 1 else f"divide percent by 100, pixels by the photograph's sides: {_FORM}"
            raise WsssError(f"{where}: expected shares in 0..1, got {got}", hint=hint)
        score = 1.0
        if not self._has_keypoints and len(values) % 2:
            score = min(max(values.pop(), 0.0), 1.0)
        if len(values) == 4 or self._has_keypoints:
            x, y, w, h = values[:4]
        else:
            x0, x1, y0, y1 = min(values[::2]), max(values[::2]), min(values[1::2]), max(values[1::2])
            x, y, w, h = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
        return label, (x, y, w, h), score

    def _hint_for(self, fields: list[str]) -> str:
        if any(mark in field for mark in ",;" for field in fields):
            return f"separate values by blanks, and write decimal points: {_FORM}"
        if _number(fields[0]) is None:
            return f"the class is its number in {self._list}, counted from 0: {_FORM}"
        return _FORM


def first_line(path: Path) -> str:
    """The first line of a text file that is not blank; empty if there is none, or the file cannot be read."""
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError:
        return ""
    encoding = "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    return next(filter(str.strip, start.decode(encoding, "replace").splitlines()), "")


def is_label(line: str) -> bool:
    """Whether a line is one of YOLO labels: a class and at least four numbers."""
    fields = line.split()
    return len(fields) > 4 and _class(fields[0]) is not None and None not in map(_number, fields[1:])


def resembles_label(line: str) -> bool:
    """Whether a line might be one of YOLO labels in another spelling: with commas, or the name of its class."""
    fields = re.split(r"[\s,;]+", line.strip())
    return len(fields) > 4 and None not in map(_number, fields[-4:])


def class_file(folder: Path) -> Path:
    """The list of classes of a folder of YOLO labels: the nearest one, in the folder or in one of the two above.

    Raises:
        WsssError: there is none, or the lists in a folder differ.
    """
    for place in (folder, *folder.absolute().parents[:2]):
        lists = _lists_in(place)
        read = [read_names(path) for path in lists]
        if any(names != read[0][0] for names, _ in read):
            names = ", ".join(path.name for path in lists)
            raise WsssError(
                f"--boxes {folder}: {place} has several lists of classes that differ: {names}", hint="keep only the right one"
            )
        if lists:
            return next((path for path, (_, keypoints) in zip(lists, read, strict=True) if keypoints is not None), lists[0])
    raise WsssError(f"--boxes {folder}: YOLO labels name classes by number, but there is no list of classes", hint=_HINT)


def read_names(path: Path) -> tuple[list[str], bool | None]:
    """The names of a list of classes, and whether labels have keypoints (data.yaml's ``kpt_shape`` or ``task``); None if
    unknown. Raises WsssError."""
    text = decode_text(read_bytes(path, hint=_HINT, max_bytes=MAX_BYTES), str(path))
    if path.suffix.lower() not in (".yaml", ".yml"):
        names = [line.strip() for line in text.splitlines()]
        while names and not names[-1]:
            names.pop()
        if not all(names):
            raise WsssError(
                f"{path}: an empty line among the names, which are counted by line", hint="write one class on each line"
            )
        return names, None
    document = _yaml(text, path)
    listed = document.get("names") if isinstance(document, dict) else None
    if isinstance(listed, dict) and all(isinstance(key, int) for key in listed) and sorted(listed) == list(range(len(listed))):
        listed = [listed[number] for number in range(len(listed))]
    if not isinstance(listed, list) or not listed or not all(isinstance(name, str) for name in listed):
        raise WsssError(
            f"{path}: expected a list of names, or numbers from 0 to names, got {short(listed)}", hint="names: [dog, cat]"
        )
    if isinstance(count := document.get("nc"), int) and count != len(listed):
        raise WsssError(f"{path}: nc is {count}, names has {len(listed)} entries", hint="correct the wrong one")
    task = document.get("task")
    return listed, True if "kpt_shape" in document or task == "pose" else False if isinstance(task, str) else None


def _check_kind(index: AnnotationFolder, *, named: bool) -> None:
    """Raise WsssError where the lines of all files together show another order or kind of values than they are read as.

    Args:
        named: data.yaml has another ``task`` than pose, so that lines that can be read in two ways are as documented.
    """
    count: Counter[str] = Counter()
    first: dict[str, str] = {}
    lengths: set[int] = set()
    for path in map(index.path, index):
        try:
            lines = read_text(path).splitlines()
        except WsssError:  # reported with its photograph
            continue
        for number, line in enumerate(lines, 1):
            values = [value for value in map(_number, line.split()[1:]) if value is not None]
            kind = _kind(values)
            count[kind] += 1
            if kind not in first:
                first[kind] = f"{path}: line {number}: {short(line.strip())}"
            if len(values) > 5:
                lengths.add(len(values))
    if count["shifted"] > count["usual"] or (count["either"] and not count["usual"] and not named):
        raise WsssError(
            f"{first['shifted' if count['shifted'] else 'either']}: expected class x y width height confidence, got what "
            f"{'looks like' if count['shifted'] else 'may also be'} class confidence x y width height",
            hint="write the confidence at the end of the line"
            + ("" if count["shifted"] else "; if it is there already, add a data.yaml with names and task: detect"),
        )
    if not named and len(lengths) == 1 and count["pose"] > count["region"]:  # regions differ in their number of corners
        raise WsssError(
            f"{first['pose']}: expected a box or a region, got what may also be a box and keypoints",
            hint="add a data.yaml with names, and with kpt_shape: [17, 3] for keypoints or task: segment for regions",
        )


def _kind(values: Sequence[float]) -> str:
    """What the values of a line after its class can be."""
    if len(values) == 5:
        as_usual, as_shifted = _is_box(values[:4]), _is_box(values[1:])
        return "either" if as_usual and as_shifted else "usual" if as_usual else "shifted" if as_shifted else ""
    return "" if len(values) < 5 else "pose" if _is_pose(values) else "region"


def _is_box(values: Sequence[float]) -> bool:
    """Whether four values can be the center, width and height of a box inside the photograph."""
    x, y, w, h = values
    return w > 0 and h > 0 and min(x - w / 2, y - h / 2) >= -_SLACK and max(x + w / 2, y + h / 2) <= 1 + _SLACK


def _is_pose(values: Sequence[float]) -> bool:
    """Whether values can be a box, then keypoints near it (x, y and possibly visibility), and possibly a confidence."""
    (x, y, w, h), rest = values[:4], values[4:]
    if not _is_box(values[:4]):
        return False
    for each in (2, 3):
        count, left = divmod(len(rest), each)
        points = [rest[each * n : each * n + 2] for n in range(count)]
        seen = [(px, py) for px, py in points if (px, py) != (0, 0)]
        if left < 2 and all(abs(px - x) <= _NEAR * w and abs(py - y) <= _NEAR * h for px, py in seen):
            return True
    return False


def _lists_in(folder: Path) -> list[Path]:
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError:
        return []
    return [path for path in files if path.name.lower() in LISTS or path.suffix.lower() == ".names" or _has_names(path)]


def _has_names(path: Path) -> bool:
    if path.suffix.lower() not in (".yaml", ".yml"):
        return False
    try:
        with path.open("rb") as file:
            return re.search(rb"^names\s*:", file.read(MAX_BYTES), re.MULTILINE) is not None
    except OSError:
        return False


def _yaml(text: str, path: Path) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = str(error).replace("\n", " ")
        raise WsssError(f"{path}: expected YAML: {problem[:200]}", hint="names: [dog, cat]") from None
    except (RecursionError, ValueError):
        raise WsssError(f"{path}: expected YAML of a few levels and plain values", hint="names: [dog, cat]") from None


def _beyond(boxes: Iterable[GivenBox]) -> bool:
    return any(x1 > 1.1 or y1 > 1.1 or x0 < -0.1 or y0 < -0.1 for x0, y0, x1, y1 in (box.xyxy for box in boxes))


def _class(text: str) -> int | None:
    """A class as a whole number, also as numpy.savetxt writes it: 0.000000000000000000e+00."""
    number = _number(text)
    return int(number) if number is not None and 0 <= number < 1e9 and number == int(number) else None


def _number(text: str) -> float | None:
    try:
        return finite(float(text))
    except ValueError:
        return None
