"""Published scores of weakly supervised segmentation, printed beside our own; each was measured by its authors.

mIoU in percent. Methods differ in their supervision (image labels or nothing), in the segmenter and in its initial weights, each
worth several points, hence these columns. Numbers are those of the papers' abstracts and tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PublishedBaseline:
    """One row of the table; None where the paper has no number, or none that we know."""

    method: str
    supervision: str
    """What the method is given about its training images: ``nothing``, or ``image labels``."""
    network: str
    """The network that is scored, as far as the source states it."""
    voc_val: float | None
    voc_test: float | None
    coco_val: float | None
    source: str


PUBLISHED_BASELINES = (
    PublishedBaseline(
        method="Chen & Sun",
        supervision="nothing",
        network="-",
        voc_val=74.0,
        voc_test=73.8,
        coco_val=54.6,
        source="arXiv:2310.13026, zero-shot SAM; the most similar method",
    ),
    PublishedBaseline(
        method="Sun et al.",
        supervision="image labels",
        network="DeepLabV2 ResNet-101",
        voc_val=77.2,
        voc_test=77.1,
        coco_val=55.6,
        source="arXiv:2305.01586, SAM on image labels",
    ),
    PublishedBaseline(
        method="FMA-WSSS",
        supervision="image labels",
        network="Swin-L",
        voc_val=83.1,
        voc_test=81.6,
        coco_val=55.4,
        source="arXiv:2312.03585; an index of papers lists 82.6 for VOC val",
    ),
    PublishedBaseline(
        method="DS-CRF",
        supervision="image labels",
        network="DINOv3-L",
        voc_val=81.1,
        voc_test=81.0,
        coco_val=56.5,
        source="as its authors report",
    ),
    PublishedBaseline(
        method="WeCLIP+",
        supervision="image labels",
        network="frozen CLIP and DINO, one stage",
        voc_val=None,
        voc_test=83.9,
        coco_val=56.3,
        source="doi:10.1109/TPAMI.2025.3543191, abstract",
    ),
    PublishedBaseline(
        method="SAM 3, training-free",
        supervision="nothing",
        network="SAM 3 itself",
        voc_val=81.9,
        voc_test=None,
        coco_val=None,
        source="VOC21; prompted with every class name",
    ),
)
PAPER = (
    "The paper (arXiv:2405.06586, no supervision) reports pseudo-labels 9.55 and 40.87 points above CAM- and SAM-based ones; "
    "its thresholds, templates and schedule are not public."
)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as aligned columns, the first row as heading; numbers are right-aligned, words left-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    is_number = [all(_is_number(row[column]) for row in rows[1:]) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(row, widths, is_number, strict=True)
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def percent(share: float | None) -> str:
    """A share of 1 in percent with one decimal; ``-`` for None."""
    return "-" if share is None else f"{100 * share:.1f}"


def rows_beside(dataset: str, ours: PublishedBaseline) -> list[tuple[str, ...]]:
    """The table for one data set (``voc`` or ``coco``): the heading, the published rows, and our row."""
    columns = {"voc": ("voc_val", "voc_test"), "coco": ("coco_val",)}[dataset]
    titles = {"voc_val": "VOC val", "voc_test": "VOC test", "coco_val": "COCO val"}
    rows: list[tuple[str, ...]] = [("method", "supervision", "network", *(titles[name] for name in columns), "source")]
    for baseline in (*PUBLISHED_BASELINES, ours):
        values = [getattr(baseline, name) for name in columns]
        if baseline is ours or any(value is not None for value in values):
            cells = ["-" if value is None else f"{value:.1f}" for value in values]
            rows.append((baseline.method, baseline.supervision, baseline.network, *cells, baseline.source))
    return rows


def _is_number(cell: str) -> bool:
    return cell in ("", "-") or cell.replace(".", "", 1).isdecimal()
