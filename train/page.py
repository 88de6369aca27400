"""Write a self-contained HTML page about a finished training: its curve, and predictions for some images."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from ..classes import palette
from ..files import write_atomically
from ..overlay import overlay, shrink
from .checkpoint import RunRecord
from .evaluate.report import Scores

PAGE = "report.html"
THUMBNAIL_PX = 320
Owner = Literal["store", "mask", "truth"]
"""Owner of the labels that a page shows."""
Shown = tuple[str, np.ndarray, np.ndarray, np.ndarray]
"""Name, pixels (H, W, 3), given label (H, W) and prediction (H, W), all uint8."""


def write_page(
    folder: Path,
    record: RunRecord,
    facts: list[tuple[str, str]],
    curve: Path,
    shown: Iterable[Shown],
    *,
    whose: Owner = "store",
    scores: Scores | None = None,
) -> Path:
    """Write ``report.html`` and return its path. The page can be viewed offline.

    Args:
        facts: names and values at the top of the page.
        curve: a PNG file. shown: images with their label and the segmenter's.
        whose: the owner of their labels. scores: for the table of classes.
    """
    path = folder / PAGE
    text = _PAGE.format(
        title=html.escape(folder.name),
        facts="".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts),
        curve=base64.b64encode(curve.read_bytes()).decode(),
        table="" if scores is None else _table(scores),
        whose=whose,
        legend=_legend(record.classes),
        cards="".join(_card(whose, *image) for image in shown),
    )
    write_atomically(path, text.encode())
    return path


def _table(scores: Scores) -> str:
    """The scores of each class, in percent."""
    rows = "".join(
        f"<tr><td>{html.escape(row['name'])}</td>"
        + "".join(f"<td>{_percent(row[key])}</td>" for key in ("iou", "precision", "recall", "boundary_iou"))
        + "</tr>"
        for row in scores["classes"]
    )
    mean = "".join(f"<td>{_percent(scores[key])}</td>" for key in ("miou", "precision", "recall", "boundary_miou"))
    heading = "<tr><th>validation</th><th>IoU %</th><th>precision %</th><th>recall %</th><th>boundary IoU %</th></tr>"
    return f"<table>{heading}{rows}<tr><td>mean of {scores['classes_seen']} that occur</td>{mean}</tr></table>"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _card(whose: str, name: str, pixels: np.ndarray, label: np.ndarray, predicted: np.ndarray) -> str:
    pictures = pixels, overlay(pixels, label), overlay(pixels, predicted)
    known = label != 255
    agreement = f"the {whose} labels no pixel of it"
    if known.any():
        agreement = f"agrees with the {whose} on {(label == predicted)[known].mean():.1%} of the pixels"
    images = "".join(f'<img loading="lazy" alt="" src="{_data_url(shrink(picture, THUMBNAIL_PX))}">' for picture in pictures)
    return f'<figure><div class="row">{images}</div><figcaption><b>{html.escape(name)}</b> {agreement}</figcaption></figure>'


def _legend(classes: tuple[str, ...]) -> str:
    colors = palette()
    return "".join(
        f'<span class="key"><i style="background:rgb({",".join(map(str, colors[label]))})"></i>{html.escape(name)}</span>'
        for label, name in enumerate(classes, 1)
    )


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} - wsss train</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; }}
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1400px; padding: 1.2rem; }}
h1 {{ font-size: 1.3rem; margin: 0 0 .6rem; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0 0 1rem; overflow-wrap: anywhere; }}
dt {{ opacity: .7; }} dd {{ margin: 0; }}
table {{ border-collapse: collapse; margin: .6rem 0; }}
th, td {{ padding: .1rem .8rem .1rem 0; text-align: right; }} th:first-child, td:first-child {{ text-align: left; }}
.curve {{ background: white; border-radius: 8px; max-width: 100%; }}
.key {{ display: inline-block; margin: 0 .9rem .3rem 0; white-space: nowrap; }}
.key i {{ display: inline-block; width: .9em; height: .9em; border-radius: 2px; margin-right: .35em; vertical-align: -1px; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 620px), 1fr)); gap: 1rem; margin-top: 1rem; }}
figure {{ align-self: start; margin: 0; border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }}
.row {{ display: grid; grid-template-columns: 1fr 1fr 1fr; gap: 2px; align-items: center; }}
.row img {{ width: 100%; max-height: 20rem; object-fit: contain; display: block; }}
figcaption {{ padding: .5rem .7rem .7rem; font-size: .85rem; overflow-wrap: anywhere; }}
</style>
<h1>{title}</h1><dl>{facts}</dl>
<img class="curve" alt="loss, learning rate and validation by step" src="data:image/png;base64,{curve}">
{table}
<p>Photograph, the {whose}'s label, the segmenter's.</p><div>{legend}</div><main>{cards}</main></html>
"""
