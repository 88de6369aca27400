"""Boxes of a COCO file: ``images``, ``annotations`` and ``categories``; an annotation with a ``score`` is a detection.

Source of the format: cocodataset.org/#format-data. bbox is x, y, width, height in pixels, 0-based.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import WsssError
from .boxes import Annotation, Corners, GivenBox, looks_like_corners, short, size_of
from .names import Entries
from .own_json import corners_from, score_from

CROWD = "of a crowd (iscrowd)"
_FORM = (
    '{"images": [{"id": 1, "file_name": "a/dog.jpg", "height": 375, "width": 500}], "categories": [{"id": 18, "name": "dog"}], '
    '"annotations": [{"image_id": 1, "category_id": 18, "bbox": [48, 240, 147, 131]}]}'
)


def is_coco(document: Mapping[str, Any]) -> bool:
    """Has a JSON object the lists of a COCO file?"""
    return isinstance(document.get("images"), list) and bool(document.keys() & {"annotations", "categories"})


def refuse_detections(document: list[Any], where: str) -> WsssError:
    """The error of a JSON list: detections without their images, or anything else."""
    first = document[0] if document else None
    if isinstance(first, dict) and "image_id" in first:
        return WsssError(
            f"{where}: expected a COCO file with its images, got a list of detections, which name images and classes by number",
            hint='put it with its images and categories: {"images": [...], "categories": [...], "annotations": LIST}',
        )
    return WsssError(f"{where}: expected a JSON object of image names to lists of boxes, or a COCO file, got a list", hint=_FORM)


class CocoBoxes:
    """Boxes of a COCO file (`BoxSource`). Crowd regions, which are no objects, are left out and counted.

    Raises:
        WsssError: no annotation at all, an image or category that is not declared, or declared twice.
    """

    def __init__(self, document: Mapping[str, Any], where: str) -> None:
        self._where = where
        images = _by_id(document, "images", where)
        self._categories = {
            key: _string(each, "name", f"{where}: categories") for key, each in _by_id(document, "categories", where).items()
        }
        self._images: dict[str, dict[str, Any]] = {}
        for each in images.values():
            name = _string(each, "file_name", f"{where}: images")
            if name in self._images:
                raise WsssError(f"{where}: images: {name!r} stands twice", hint="keep one of them, with all its annotations")
            self._images[name] = each
        self._names = Entries(self._images, where)
        self._annotations: defaultdict[object, list[dict[str, Any]]] = defaultdict(list)
        for each in _dicts(document, "annotations", where):
            if (image := _id(each, "image_id", where)) not in images:
                raise WsssError(
                    f"{where}: an annotation is of image {image!r}, which is not among the images",
                    hint="image_id must be the id of an image in the same file, of the same type",
                )
            score = each.get("score")
            if isinstance(score, int | float) and score > 1:
                score_from(each, f"{where}: image {image!r}")
            self._annotations[image].append(each)
        if not self._annotations:
            raise WsssError(
                f"{where}: no annotation at all", hint="the annotations of a test set are not public: take boxes of your own"
            )

    def find(self, photo: str) -> str | None:
        return self._names.find(photo)

    def missing(self, photo: str) -> WsssError:
        return self._names.missing(photo)

    def all_keys(self) -> Iterable[str]:
        return self._images

    def read(self, key: str) -> Annotation:
        image, where = self._images[key], f"{self._where}: {key}"
        size = size_of(image.get("height"), image.get("width"), where)
        boxes: list[GivenBox] = []
        sides: list[Corners] = []
        left_out: Counter[str] = Counter()
        for each in self._annotations.get(image["id"], []):
            if each.get("iscrowd"):
                left_out[CROWD] += 1
                continue
            x, y, w, h = four = self._bbox(each, where)
            sides.append(four)
            boxes.append(GivenBox(self._category(each, where), (x, y, x + w, y + h), score_from(each, where)))
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
        four = corners_from(annotation.get("bbox"))
        if four is None or four[2] < 0 or four[3] < 0:
            raise WsssError(
                f"{where}: expected bbox as x, y, width, height, got {short(annotation.get('bbox'))}",
                hint='"bbox": [48, 240, 147, 131]',
            )
        return four


def _dicts(document: Mapping[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    found = document.get(key)
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise WsssError(f"{where}: expected a list of objects under {key}", hint=_FORM)
    return found


def _by_id(document: Mapping[str, Any], key: str, where: str) -> dict[object, dict[str, Any]]:
    found: dict[object, dict[str, Any]] = {}
    for each in _dicts(document, key, where):
        if (number := _id(each, "id", f"{where}: {key}")) in found:
            raise WsssError(f"{where}: {key}: the id {number!r} stands twice", hint="each id is of one of them")
        found[number] = each
    return found


def _id(each: dict[str, Any], key: str, where: str) -> int | str:
    value = each.get(key)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise WsssError(f"{where}: expected a number or string under {key}, got {short(value)}", hint=_FORM)
    return value


def _string(each: dict[str, Any], key: str, where: str) -> str:
    value = each.get(key)
    if not isinstance(value, str) or not value:
        raise WsssError(f"{where}: expected a string under {key}, got {short(value)}", hint=_FORM)
    return value
