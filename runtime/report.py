"""One self-contained HTML page of a label store: each image beside its overlay, the doubtful ones first."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from pathlib import Path

from ..classes import palette
from ..errors import ImageError, StoreError
from ..labelstore import Record, read_label, read_records, read_run, write_atomically
from .images import read_photograph
from .overlay import overlay, shrink

THUMBNAIL_PX = 320


def write_report(store: Path, images: Path, page: Path, *, limit: int = 200) -> Path:
    """Writes the page and returns its path. Needs no network to be read.

    Args:
        store: the label store. images: the folder its images are in. page: the HTML file.
        limit: at most this many images, most doubtful first.

    Raises:
        StoreError: no label store, or nothing in it. ImageError: none of its images is in ``images``.
    """
    records = list(read_records(store))
    classes: list[str] = read_run(store)["classes"]
    done = sorted((r for r in records if "error" not in r), key=doubt, reverse=True)
    if not records:
        raise StoreError(f"{store}: no image in it yet", hint="run wsss label first")
    cards, missing = [], 0
    for record in done[:limit]:
        try:
            cards.append(_card(store, images, record))
        except ImageError as error:
            missing, first = missing + 1, error
    if done and not cards:
        raise ImageError(
            f"--images {images}: has none of the store's images, for example {first.message}",
            hint="give the folder that was labelled",
        )
    failed = [record for record in records if "error" in record]
    text = _PAGE.format(
        title=html.escape(store.name),
        facts=_facts(done, failed, len(cards), missing),
        legend=_legend(classes, done),
        failed="".join(f"<li>{html.escape(r['path'])}: {html.escape(r['error'])}</li>" for r in failed),
        cards="".join(cards),
    )
    write_atomically(page, text.encode())
    return page


def doubt(record: Record) -> float:
    """How much an image deserves a look, 0 to about 2: share of void, weakest box or mask, classes tagged but not found."""
    pixels = max(record["height"] * record["width"], 1)
    weakest = min((box["score"] * box["quality"] for box in record["boxes"]), default=1.0)
    found = {box["label"] for box in record["boxes"]}
    lost = sum(1 for name in record["classes"] if name not in found)
    return float(record["void_px"] / pixels + (1 - weakest) + 0.5 * min(lost, 1))


def _facts(done: list[Record], failed: list[Record], shown: int, missing: int) -> str:
    boxes = sum(len(record["boxes"]) for record in done)
    facts = [f"{len(done)} images labelled", f"{boxes} boxes", f"{len(failed)} failed", f"{shown} shown, doubtful first"]
    if missing:
        facts.append(f"{missing} not found on disk")
    return " · ".join(facts)


def _legend(classes: list[str], done: list[Record]) -> str:
    count = Counter(name for record in done for name in {box["label"] for box in record["boxes"]})
    colours = palette()
    return "".join(
        f'<span class="key"><i style="background:rgb({",".join(map(str, colours[label]))})"></i>'
        f"{html.escape(name)} <b>{count[name]}</b></span>"
        for label, name in enumerate(classes, 1)
        if count[name]
    )


def _card(store: Path, images: Path, record: Record) -> str:
    photo = read_photograph(images, record["path"])
    label_map = read_label(store / "labels" / record["label"])
    pictures = (photo.pixels, overlay(photo.pixels, label_map))
    shown = "".join(f'<img loading="lazy" alt="" src="{_data_url(shrink(picture, THUMBNAIL_PX))}">' for picture in pictures)
    tags = ", ".join(f"{html.escape(name)} {score:.2f}" for name, score in record["classes"].items()) or "no class"
    boxes = ", ".join(f"{html.escape(box['label'])} {box['score']:.2f}" for box in record["boxes"]) or "no box"
    return (
        f'<figure><div class="pair">{shown}</div><figcaption><b>{html.escape(record["path"])}</b>'
        f"<br>tags: {tags}<br>boxes: {boxes}</figcaption></figure>"
    )


def _data_url(image: object) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=82)  # type: ignore[attr-defined]
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} - wsss</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; }}
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1400px; padding: 1.2rem; }}
h1 {{ font-size: 1.3rem; margin: 0; }} p {{ margin: .3rem 0 .8rem; opacity: .75; }}
.key {{ display: inline-block; margin: 0 .9rem .3rem 0; white-space: nowrap; }}
.key i {{ display: inline-block; width: .9em; height: .9em; border-radius: 2px; margin-right: .35em; vertical-align: -1px; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 410px), 1fr)); gap: 1rem; margin-top: 1rem; }}
figure {{ align-self: start; margin: 0; border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }}
.pair {{ display: grid; grid-template-columns: 1fr 1fr; gap: 2px; align-items: center; }}
.pair img {{ width: 100%; max-height: 20rem; object-fit: contain; display: block; }}
figcaption {{ padding: .5rem .7rem .7rem; font-size: .85rem; overflow-wrap: anywhere; }}
</style>
<h1>{title}</h1><p>{facts}</p><div>{legend}</div><ul>{failed}</ul><main>{cards}</main></html>
"""
