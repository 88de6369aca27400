"""Published scores of weakly supervised segmentation, to print beside our own; each was measured by its authors.

mIoU in per cent. Methods differ in what they are told (image labels or nothing), in the segmenter and in its first weights,
each worth several points, hence these columns. Numbers as their papers' abstracts and tables give them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PublishedBaseline:
    """One row of the field's table; None where the paper has no number, or none that we know."""

    method: str
    told: str
    """What it is told about its training images."""
    network: str
    """What is scored, as far as its source says."""
    voc_val: float | None
    voc_test: float | None
    coco_val: float | None
    source: str


PUBLISHED_BASELINES = (
    PublishedBaseline(
        method="Chen & Sun",
        told="nothing",
        network="-",
        voc_val=74.0,
        voc_test=73.8,
        coco_val=54.6,
        source="arXiv:2310.13026, zero-shot SAM; the nearest fair rival",
    ),
    PublishedBaseline(
        method="Sun et al.",
        told="image labels",
        network="DeepLabV2 ResNet-101",
        voc_val=77.2,
        voc_test=77.1,
        coco_val=55.6,
        source="arXiv:2305.01586, SAM on image labels",
    ),
    PublishedBaseline(
        method="FMA-WSSS",
        told="image labels",
        network="Swin-L",
        voc_val=83.1,
        voc_test=81.6,
        coco_val=55.4,
        source="arXiv:2312.03585; an index of papers lists 82.6 for VOC val",
    ),
    PublishedBaseline(
        method="DS-CRF",
        told="image labels",
        network="DINOv3-L",
        voc_val=81.1,
        voc_test=81.0,
        coco_val=56.5,
        source="as its authors report",
    ),
    PublishedBaseline(
        method="WeCLIP+",
        told="image labels",
        network="frozen CLIP and DINO, one stage",
        voc_val=None,
        voc_test=83.9,
        coco_val=56.3,
        source="doi:10.1109/TPAMI.2025.3543191, abstract",
    ),
    PublishedBaseline(
        method="SAM 3, training-free",
        told="nothing",
        network="SAM 3 itself",
        voc_val=81.9,
        voc_test=None,
        coco_val=None,
        source="VOC21; asked for every class by name",
    ),
)
PAPER = (
    "The paper (arXiv:2405.06586, nothing told) reports pseudo-labels 9.55 and 40.87 points above CAM- and SAM-based ones; "
    "its thresholds, templates and schedule are not public."
)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as columns under a heading, the first row; numbers to the right, words to the left."""
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
    """A share of 1 in per cent with one decimal, as the field prints it; ``-`` for none."""
    return "-" if share is None else f"{100 * share:.1f}"


def rows_beside(dataset: str, ours: PublishedBaseline) -> list[tuple[str, ...]]:
    """The field's table for one data set (``voc`` or ``coco``) with our own row last, a heading first."""
    named = {"voc": ("voc_val", "voc_test"), "coco": ("coco_val",)}[dataset]
    titles = {"voc_val": "VOC val", "voc_test": "VOC test", "coco_val": "COCO val"}
    rows: list[tuple[str, ...]] = [("method", "told", "network", *(titles[name] for name in named), "source")]
    for each in (*PUBLISHED_BASELINES, ours):
        values = [getattr(each, name) for name in named]
        if each is ours or any(value is not None for value in values):
            cells = ["-" if value is None else f"{value:.1f}" for value in values]
            rows.append((each.method, each.told, each.network, *cells, each.source))
    return rows


def _is_number(cell: str) -> bool:
    return cell in ("", "-") or cell.replace(".", "", 1).isdecimal()
