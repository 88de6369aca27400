"""Writes what the first stages of the chain find, without the rest: the classes or the boxes of each image."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from ...batch import Photograph
from ...errors import WsssError
from ...files import replacing
from ...photographs import decode
from ..chain import Chain
from ..given.names import twins_of
from .listing import Found, check_images
from .sources import Source

Stage = Literal["tag", "detect"]
Form = Literal["json", "coco"]


@dataclass(kw_only=True)
class StageSummary:
    """What `write_stage` did."""

    images: int = 0
    failed: int = 0
    boxes: int = 0


def write_stage(
    chain: Chain,
    source: Source,
    out: Path,
    stage: Stage,
    *,
    form: Form = "json",
    batch: int | None = None,
    progress: Callable[[StageSummary], None] = lambda summary: None,
    failed: Callable[[str, str], None] = lambda name, reason: None,
) -> StageSummary:
    """Write the classes or boxes of all images to a JSON file, which is complete or not there.

    The forms are those that ``--labels`` and ``--boxes`` take: ``{"a/dog.jpg": ["dog"]}``, best class first;
    ``{"a/dog.jpg": [{"label": "dog", "xyxy": [...], "score": 0.9}]}``; or COCO's images, annotations and categories.

    Args:
        chain: opened with ``until`` this stage or a later one.
        progress: called after each batch. failed: called with the name of an image that cannot be read, and the reason; it has
            no entry.

    Raises:
        ImageError: no images. WsssError: ``out`` cannot be written.
    """
    images = source.listing()
    check_images(images)
    twins = twins_of(found.name for found in images) if "given" in chain.settings else {}
    summary = StageSummary()
    try:
        with replacing(out) as raw:
            file = io.TextIOWrapper(raw, encoding="utf-8", errors="surrogatepass", newline="\n")
            writer = _Coco(file, chain.classes.names) if form == "coco" else _Plain(file)
            listed = iter(images)
            while some := list(islice(listed, batch or chain.usual_batch())):
                photos = list(_read(chain, source, some, twins, summary, failed))
                if photos:
                    labels = chain.tag(photos)
                    if stage == "tag":
                        for photo, score, present in zip(photos, labels.score, labels.present, strict=True):
                            order = np.argsort(-score, kind="stable")
                            writer.add(photo, [chain.classes.names[label] for label in order.tolist() if present[label]])
                    else:
                        found = chain.detect(photos, labels)
                        for number, photo in enumerate(photos):
                            rows = np.flatnonzero(found.image == number).tolist()
                            boxes = [
                                {
                                    "label": chain.classes.names[int(found.label[row]) - 1],
                                    "xyxy": [round(float(edge), 2) for edge in found.xyxy_image[row]],
                                    "score": round(float(found.score[row]), 4),
                                }
                                for row in rows
                            ]
                            summary.boxes += len(boxes)
                            writer.add(photo, boxes)
                    summary.images += len(photos)
                progress(summary)
            writer.end()
            file.detach()  # writes what is in its buffer
    except OSError as error:
        raise WsssError(f"--out {out}: cannot be written: {error.strerror or error}", hint="give a file you may write") from None
    return summary


def _read(
    chain: Chain,
    source: Source,
    some: list[Found],
    twins: Mapping[str, Sequence[str]],
    summary: StageSummary,
    failed: Callable[[str, str], None],
) -> Iterator[Photograph]:
    for found in some:
        try:
            photo = decode(source.read(found.name))
            if reason := chain.missing(photo, twins.get(found.name, ())):
                raise WsssError(reason)
        except WsssError as error:
            summary.failed += 1
            failed(found.name, error.message)
            continue
        yield photo


class _Plain:
    """An object of image names."""

    def __init__(self, file: io.TextIOWrapper) -> None:
        self._file, self._before = file, "{\n"

    def add(self, photo: Photograph, value: object) -> None:
        self._file.write(f"{self._before}{json.dumps(photo.name)}: {json.dumps(value)}")
        self._before = ",\n"

    def end(self) -> None:
        self._file.write("{}\n" if self._before == "{\n" else "\n}\n")


class _Coco:
    """COCO's detections; images and annotations are numbered from 1, categories are label values."""

    def __init__(self, file: io.TextIOWrapper, names: tuple[str, ...]) -> None:
        self._file, self._images, self._number = file, list[dict[str, object]](), 0
        categories = [{"id": label, "name": name} for label, name in enumerate(names, 1)]
        self._label = {name: label for label, name in enumerate(names, 1)}
        file.write(f'{{"categories": {json.dumps(categories)},\n"annotations": [')

    def add(self, photo: Photograph, boxes: object) -> None:
        assert isinstance(boxes, list)
        self._images.append(
            {"id": len(self._images) + 1, "file_name": photo.name, "height": photo.shape[0], "width": photo.shape[1]}
        )
        for box in boxes:
            x0, y0, x1, y1 = box["xyxy"]
            size = [round(x1 - x0, 2), round(y1 - y0, 2)]
            area = {"bbox": [x0, y0, *size], "area": round(size[0] * size[1], 2), "iscrowd": 0, "score": box["score"]}
            self._file.write(",\n" if self._number else "\n")
            self._number += 1
            numbers = {"id": self._number, "image_id": len(self._images), "category_id": self._label[box["label"]]}
            self._file.write(json.dumps({**numbers, **area}))

    def end(self) -> None:
        self._file.write(f'],\n"images": {json.dumps(self._images)}}}\n')
