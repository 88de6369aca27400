"""Boxes in wsss's own formats: a JSON object that maps photographs to lists of boxes, and the manifest of a label store.

{"a/dog.jpg": [{"label": "dog", "xyxy": [48, 240, 195, 371], "score": 0.9}]}
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import WsssError
from ...reading.documents import short
from ...store.format import parse_line
from .boxes import Annotation, Corners, GivenBox, finite, looks_like_sides, sides_error, size_of
from .names import Entries

EXAMPLE = '{"label": "dog", "xyxy": [48, 240, 195, 371], "score": 0.9}'


@dataclass(frozen=True)
class _Entry:
    boxes: list[Any]
    height: object = None
    width: object = None


class EntryBoxes:
    """Boxes of entries, each of one photograph (`BoxSource`).

    Args:
        entries: by the photograph's name.
        where: what messages call the file.
        upright: the boxes are those of the photograph after EXIF rotation.

    Raises:
        WsssError: a box shows that all scores or coordinates of the file are of another kind.
    """

    def __init__(self, entries: Mapping[str, _Entry], where: str, *, upright: bool) -> None:
        self._entries, self._where, self._upright = entries, where, upright
        self.index = Entries(entries, where)
        _check_kind(entries, where)

    def read(self, key: str) -> Annotation:
        entry, where = self._entries[key], f"{self._where}: {key}"
        return Annotation(
            where=where,
            boxes=[box_from(box, where) for box in entry.boxes],
            size=size_of(entry.height, entry.width, where),
            upright=self._upright,
            maybe_sides=not self._upright,
        )


def json_boxes(document: Mapping[str, Any], where: str) -> EntryBoxes:
    """Boxes of a JSON object.

    Args:
        document: photograph's name to a list of ``{"label": str, "xyxy": four numbers, "score": 0..1 or absent}``.
        where: what messages call the file.

    Raises:
        WsssError: the file has another form.
    """
    for name, boxes in document.items():
        if not isinstance(boxes, list):
            raise WsssError(
                f"{where}: expected a JSON object of image names to lists of boxes, got {short(boxes)} for {name!r}",
                hint=f'{{"a/dog.jpg": [{EXAMPLE}]}}, a COCO file, or the manifest.jsonl of a label store',
            )
    return EntryBoxes({name: _Entry(boxes) for name, boxes in document.items()}, where, upright=False)


def manifest_boxes(manifests: Mapping[str, bytes], where: str) -> EntryBoxes:
    """Boxes of a label store's manifests; failed images have none.

    Args:
        manifests: contents by what messages call the file. Of several lines about one image, the last one counts.
        where: what messages call the store.

    Raises:
        WsssError: a damaged line, or no box at all: a segmenter's store has none.
    """
    entries: dict[str, _Entry] = {}
    for file, data in manifests.items():
        for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                record = parse_line(line)
                if "error" in record:
                    entries.pop(record["path"], None)
                else:
                    entries[record["path"]] = _Entry(record["boxes"], record.get("height"), record.get("width"))
            except (ValueError, KeyError) as error:
                problem = "it has no boxes" if isinstance(error, KeyError) else error
                raise WsssError(f"{file}: line {number} is damaged: {problem}", hint=_MANIFEST) from None
    if not any(entry.boxes for entry in entries.values()):
        raise WsssError(
            f"{where}: no line has a box", hint="take the store of a chain: one made with --model segmenter has no boxes"
        )
    return EntryBoxes(entries, where, upright=True)


_MANIFEST = (
    'wsss label writes lines as {"path": "a/dog.jpg", "label": "a/dog.png", "boxes": [...], "height": 375, "width": 500, ...}'
)


def box_from(box: object, where: str) -> GivenBox:
    """A box from ``{"label": str, "xyxy": four finite numbers, "score": 0..1 or absent}``. Raises WsssError."""
    corners = corners_from(box.get("xyxy")) if isinstance(box, dict) else None
    if not isinstance(box, dict) or not isinstance(box.get("label"), str) or corners is None:
        raise WsssError(f"{where}: expected a box, got {short(box)}", hint=_hint_for(box))
    return GivenBox(box["label"], corners, score_from(box, where))


def corners_from(value: object) -> Corners | None:
    """Four finite numbers; None for anything else."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    a, b, c, d = (finite(number) for number in value)
    return None if a is None or b is None or c is None or d is None else (a, b, c, d)


def score_from(box: Mapping[str, Any], where: str) -> float:
    """The ``score`` of a box, 1 where there is none. Raises WsssError unless it is in 0..1."""
    score = finite(box.get("score", 1.0))
    if score is None or not 0 <= score <= 1:
        if score is not None:
            hint = "divide scores in percent by 100" if score > 1 else "scores are in 0..1"
        elif box["score"] is None:
            hint = "leave the score out where there is none: it counts as 1"
        else:
            hint = 'a score is a number: "score": 0.9'
        raise WsssError(f"{where}: expected a score in 0..1, got {short(box['score'])}", hint=hint)
    return score


def _check_kind(entries: Mapping[str, _Entry], where: str) -> None:
    """Raises WsssError where a box shows that all scores of the file are percentages, or all coordinates x, y, width, height."""
    corners: list[Corners] = []
    for name, entry in entries.items():
        for box in entry.boxes:
            if not isinstance(box, dict):
                continue
            if (finite(box.get("score")) or 0) > 1:
                score_from(box, f"{where}: {name}")
            if (four := corners_from(box.get("xyxy"))) is not None:
                corners.append(four)
    if looks_like_sides(corners):
        raise sides_error(where, corners)


def _hint_for(box: object) -> str:
    if isinstance(box, dict) and "bbox" in box:
        return f"corners are written under xyxy: {EXAMPLE}; bbox (x, y, width, height) is read in COCO files"
    numbers = box.get("xyxy") if isinstance(box, dict) else None
    if isinstance(numbers, list) and any(isinstance(number, str) for number in numbers):
        return f"numbers stand without quotes: {EXAMPLE}"
    return EXAMPLE
