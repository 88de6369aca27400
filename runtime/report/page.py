"""Writes a page to review a label store: ``report.html``, and beside it ``report.files/`` with its data and thumbnails.

    report.html              with style and script; loads nothing from a network
    report.files/data.js     all data of the page, in one call of showReport()
    report.files/ab/*.jpg    photographs, *.png their labels; see `thumbnails`

The page's sources are in ``assets/``. It works from a disk as well as from a server.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import html
import json
import os
import string
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ...classes import palette
from ...errors import ImageError, StoreError, UsageError
from ...store.decisions import label_version
from ...store.local import Record, read_history, read_labeled_records, read_records, read_run
from .doubt import Doubt, Floors, doubt, floors_of
from .thumbnails import Progress, Thumbnails, make_thumbnails, publish, remove_thumbnails

MAX_IMAGES = 10_000
"""Most images in the gallery by default; the summary counts all images."""
THUMBNAIL_PX = 384
_ASSETS = Path(__file__).with_name("assets")
_FIELDS = {"height", "width", "sha256", "classes", "boxes", "void_px"}
_SCRIPTS = ("elements.js", "decisions.js", "summary.js", "gallery.js", "viewer.js", "start.js")


@dataclass(kw_only=True)
class Totals:
    """The numbers of the summary, over all images of the store."""

    images: int = 0
    empty: int = 0
    """Images in which nothing was labeled."""
    boxes: int = 0
    pixels: int = 0
    void_pixels: int = 0
    failed: int = 0
    class_images: Counter[str] = field(default_factory=Counter)
    class_boxes: Counter[str] = field(default_factory=Counter)
    class_pixels: Counter[str] = field(default_factory=Counter)
    class_unboxed: Counter[str] = field(default_factory=Counter)
    """Images tagged with a class that have no box of it."""

    def add(self, record: Record, floors: Floors) -> None:
        """Count a labeled image; its tags only where they are meaningful."""
        found = {box["label"] for box in record["boxes"]} if floors.boxed else record["classes"].keys()
        self.images += 1
        self.empty += not found
        self.boxes += len(record["boxes"])
        self.pixels += record["height"] * record["width"]
        self.void_pixels += record["void_px"]
        self.class_images.update(found)
        if floors.tagged:
            self.class_unboxed.update(record["classes"].keys() - found)
        for box in record["boxes"]:
            self.class_boxes[box["label"]] += 1
            self.class_pixels[box["label"]] += box["won_px"]


def write_report(
    store: Path,
    images: Path,
    page: Path,
    *,
    limit: int = MAX_IMAGES,
    thumbnail_px: int = THUMBNAIL_PX,
    progress: Progress | None = None,
) -> Path:
    """Write the page and the folder of its files, and return the page's path.

    The manifest is streamed; memory grows with ``limit``, not with the store.

    Args:
        store: the label store. images: the folder its images are in. page: the HTML file.
        limit: most images in the gallery, most doubtful first, and most failures in the list.
        thumbnail_px: longest side of the gallery's pictures; the large view shows the originals where it finds them.
        progress: called after each thumbnail.

    Raises:
        StoreError: there is no label store, it is empty, a line is damaged, or ``page`` cannot be written.
        ImageError: none of its photographs is in ``images``.
        UsageError: ``page`` is among the photographs, where the next run would label its thumbnails.
    """
    run = read_run(store)
    files = page.with_name(f"{page.stem}.files")
    _refuse_among_photographs(store, images, page)
    floors = floors_of(run, read_labeled_records(store, _FIELDS))
    totals, failures = _count(store, limit, floors)
    if not totals.images + totals.failed:
        raise StoreError(f"{store}: no image in it yet", hint="run wsss label first")
    pairs = ((doubt(record, floors), record) for record in read_labeled_records(store, _FIELDS))
    gallery = heapq.nlargest(limit, pairs, key=lambda pair: pair[0].total)
    thumbnails = make_thumbnails(store, images, [record for _, record in gallery], files, thumbnail_px, progress)
    if gallery and not any(each.photo for each in thumbnails):
        raise ImageError(
            f"--images {images}: has none of the store's images, for example {thumbnails[0].note}",
            hint="give the folder that was labeled",
        )
    data = {
        **_about(store, images, page, run, totals),
        "boxed": floors.boxed,
        "images": [_row(run["classes"], floors, *pair, each) for pair, each in zip(gallery, thumbnails, strict=True)],
        "failures": failures,
    }
    try:
        publish(files / "data.js", f"showReport({json.dumps(data, separators=(',', ':'))});\n".encode())
        publish(page, _page(store, files).encode())
    except OSError as error:
        raise StoreError(f"--out {page}: cannot be written: {error.strerror}", hint="give a file you may write") from None
    remove_thumbnails(files, thumbnails)
    return page


def _count(store: Path, limit: int, floors: Floors) -> tuple[Totals, list[list[str]]]:
    totals = Totals()
    for record in read_labeled_records(store, _FIELDS):
        totals.add(record, floors)
    failures: list[list[str]] = []
    for record in read_records(store):
        if "error" in record:
            totals.failed += 1
            if len(failures) < limit:
                failures.append([_shown(record["path"]), _shown(record["error"])])
    return totals, failures


def _about(store: Path, images: Path, page: Path, run: dict[str, Any], totals: Totals) -> dict[str, Any]:
    """The page's data that is not about single images."""
    colors = palette()
    return {
        "title": store.resolve().name,
        "files": quote(f"{page.stem}.files/"),
        "photographs": _relative(images if images.is_dir() else images.parent, page),
        "labels": _relative(store / "labels", page),
        "settings": run,
        "totals": {
            "images": totals.images,
            "empty": totals.empty,
            "boxes": totals.boxes,
            "failed": totals.failed,
            "void": totals.void_pixels / max(totals.pixels, 1),
            **_seconds(store),
        },
        "classes": [
            {
                "name": name,
                "color": f"rgb({', '.join(map(str, colors[label]))})",
                "images": totals.class_images[name],
                "boxes": totals.class_boxes[name],
                "pixels": totals.class_pixels[name],
                "unboxed": totals.class_unboxed[name],
            }
            for label, name in enumerate(run["classes"], 1)
        ],
    }


def _seconds(store: Path) -> dict[str, Any]:
    """Seconds an image, in all and by stage (stages overlap), over all runs except those that were killed."""
    runs = [run for run in read_history(store) if run.get("labelled")]
    images = sum(run["labelled"] for run in runs)
    stages: Counter[str] = Counter()
    for run in runs:
        stages.update(run.get("stage_seconds", {}))
    return {
        "seconds": sum(run.get("seconds", 0.0) for run in runs) / max(images, 1),
        "stages": {stage: seconds / images for stage, seconds in stages.items()},
    }


def _row(classes: list[str], floors: Floors, doubted: Doubt, record: Record, thumbnails: Thumbnails) -> list[Any]:
    """The data of one image, which `start.js` unpacks; shares, scores and box edges in thousandths."""
    number = {name: row for row, name in enumerate(classes)}
    size = record["width"], record["height"]
    tags = [[number[name], _thousandths(score)] for name, score in record["classes"].items() if floors.tagged]
    boxes = [
        [
            number[box["label"]],
            _thousandths(box["score"]),
            _thousandths(box["quality"]),
            *(_thousandths(edge / size[axis % 2]) for axis, edge in enumerate(box["xyxy"])),
        ]
        for box in sorted(record["boxes"], key=lambda box: -box["score"])
    ]
    return [
        _shown(record["path"]),
        _shown(record["label"]),
        thumbnails.photo,
        thumbnails.label,
        _shown(thumbnails.note),
        *size,
        _thousandths(doubted.total),
        [_thousandths(part) for part in (doubted.score, doubted.mask, doubted.disagreement, doubted.void)],
        doubted.cause,
        doubted.reason,
        tags,
        boxes,
        label_version(record),
    ]


def _page(store: Path, files: Path) -> str:
    """The HTML. Its security policy allows only its own script and the data file, so that markup in a name cannot run code."""
    style = (_ASSETS / "page.css").read_text(encoding="utf-8")
    script = "".join((_ASSETS / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    page = string.Template((_ASSETS / "page.html").read_text(encoding="utf-8"))
    return page.substitute(
        title=html.escape(_shown(store.resolve().name)),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=html.escape(quote(f"{files.name}/data.js")),
    )


def _refuse_among_photographs(store: Path, images: Path, page: Path) -> None:
    folder, inside = page.resolve().parent, images.resolve()
    if images.is_dir() and folder.is_relative_to(inside) and not folder.is_relative_to(store.resolve()):
        raise UsageError(
            f"--out {page}: is in --images {images}, where the next run would take its thumbnails for photographs",
            hint=f"leave out --out: the page then goes to {store / 'report.html'}",
        )


def _relative(folder: Path, page: Path) -> str:
    """A folder's address relative to the page, empty where there is none (another drive)."""
    try:
        path = os.path.relpath(folder.resolve(), page.resolve().parent)
    except ValueError:
        return ""
    return quote(Path(path).as_posix().encode("utf-8", "surrogateescape")) + "/"


def _shown(name: str) -> str:
    """The name without lone surrogates, which stand for bytes that are not Unicode (PEP 383); a page cannot show them."""
    return name.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _thousandths(share: float) -> int:
    return round(1000 * share)


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
