"""Reads boxes from a COCO file: ``images``, ``annotations`` and ``categories``; annotations with a ``score`` are detections.

Source of the format: cocodataset.org/#format-data. bbox is x, y, width, height in pixels, 0-based.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from ...errors import WsssError
from ...reading.documents import short
from .boxes import Annotation, Corners, GivenBox, looks_like_corners, size_of
from .names import Entries
from .own_json import corners_from, score_from

CROWD = "of a crowd (iscrowd)"
_FORM = (
    '{"images": [{"id": 1, "file_name": "a/dog.jpg", "height": 375, "width": 500}], "categories": [{"id": 18, "name": "dog"}], '
    '"annotations": [{"image_id": 1, "category_id": 18, "bbox": [48, 240, 147, 131]}]}'
)


def is_coco(document: Mapping[str, Any]) -> bool:
    """Whether a JSON object has the lists of a COCO file."""
    return isinstance(document.get("images"), list) and bool(document.keys() & {"annotations", "categories"})


def refuse_detections(document: list[Any], where: str) -> WsssError:
    """The error for a JSON list: COCO detections without their images, or anything else."""
    first = document[0] if document else None
    if isinstance(first, dict) and "image_id" in first:
        return WsssError(
            f"{where}: expected a COCO file, got a list of detections, which name images and classes only by number",
            hint='add its images and categories: {"images": [...], "categories": [...], "annotations": LIST}',
        )
    return WsssError(f"{where}: expected a JSON object of image names to lists of boxes, or a COCO file, got a list", hint=_FORM)


class CocoBoxes:
    """Boxes of a COCO file (`BoxSource`). Crowd regions, which are not single objects, are left out and counted.

    Raises:
        WsssError: there is no annotation, or an image or category is not declared, or declared twice.
    """

    def __init__(self, document: Mapping[str, Any], where: str) -> None:
        self._where = where
        images = _by_id(document, "images", where)
        self._categories = {
            key: _string(category, "name", f"{where}: categories")
            for key, category in _by_id(document, "categories", where).items()
        }
        self._images: dict[str, dict[str, Any]] = {}
        for image in images.values():
            name = _string(image, "file_name", f"{where}: images")
            if name in self._images:
                raise WsssError(f"{where}: images: {name!r} occurs twice", hint="keep one of them, with all its annotations")
            self._images[name] = image
        self.index = Entries(self._images, where)
        self._annotations: defaultdict[object, list[dict[str, Any]]] = defaultdict(list)
        for annotation in _dicts(document, "annotations", where):
            if (number := _id(annotation, "image_id", where)) not in images:
                raise WsssError(
                    f"{where}: an annotation is of image {number!r}, which is not among the images",
                    hint="image_id must be the id of an image in the same file, of the same type",
                )
            score = annotation.get("score")
            if isinstance(score, int | float) and score > 1:
                score_from(annotation, f"{where}: image {number!r}")
            self._annotations[number].append(annotation)
        if not self._annotations:
            raise WsssError(f"{where}: it has no annotations", hint="those of COCO's test set are not public: use other boxes")

    def read(self, key: str) -> Annotation:
        image, where = self._images[key], f"{self._where}: {key}"
        size = size_of(image.get("height"), image.get("width"), where)
        boxes: list[GivenBox] = []
        sides: list[Corners] = []
        left_out: Counter[str] = Counter()
        for annotation in self._annotations.get(image["id"], []):
            if annotation.get("iscrowd"):
                left_out[CROWD] += 1
                continue
            x, y, w, h = xywh = self._bbox(annotation, where)
            sides.append(xywh)
            boxes.append(GivenBox(self._category(annotation, where), (x, y, x + w, y + h), score_from(annotation, where)))
        if size and looks_like_corners(sides, size):
            raise WsssError(
                f"{where}: expected bbox as x, y, width, height, got what looks like corners x0, y0, x1, y1",
                hint="COCO's bbox is [x0, y0, x1 - x0, y1 - y0]",
            )
        return Annotation(where=where, boxes=boxes, size=size, left_out=left_out)

    def _category(self, annotation: dict[str, Any], where: str) -> str:
        category = _id(annotation, "category_id", where)
        if category not in self._categories:
            raise WsssError(
                f"{where}: category {category!r} is not among the categories",
                hint="category_id must be the id of a category in the same file: COCO has 1 to 90, models 0 to 79",
            )
        return self._categories[category]

    @staticmethod
    def _bbox(annotation: dict[str, Any], where: str) -> Corners:
        xywh = corners_from(annotation.get("bbox"))
        if xywh is None or xywh[2] < 0 or xywh[3] < 0:
            raise WsssError(
                f"{where}: expected bbox as x, y, width, height, got {_got(annotation, 'bbox')}",
                hint='"bbox": [48, 240, 147, 131]',
            )
        return xywh


def _dicts(document: Mapping[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    objects = document.get(key)
    if not isinstance(objects, list) or not all(isinstance(value, dict) for value in objects):
        raise WsssError(f"{where}: expected a list of objects under {key}", hint=_FORM)
    return objects


def _by_id(document: Mapping[str, Any], key: str, where: str) -> dict[object, dict[str, Any]]:
    by_id: dict[object, dict[str, Any]] = {}
    for value in _dicts(document, key, where):
        if (number := _id(value, "id", f"{where}: {key}")) in by_id:
            raise WsssError(f"{where}: {key}: the id {number!r} occurs twice", hint="give each of them its own id")
        by_id[number] = value
    return by_id


def _id(document: dict[str, Any], key: str, where: str) -> int | str:
    value = document.get(key)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise WsssError(f"{where}: expected a number or string under {key}, got {_got(document, key)}", hint=_FORM)
    return value


def _string(document: dict[str, Any], key: str, where: str) -> str:
    value = document.get(key)
    if not isinstance(value, str) or not value:
        raise WsssError(f"{where}: expected a string under {key}, got {_got(document, key)}", hint=_FORM)
    return value


def _got(document: dict[str, Any], key: str) -> str:
    return short(document[key]) if key in document else "nothing"
