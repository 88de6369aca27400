"""Published speeds of the models we export, printed beside our own. They were measured on other machines and pipelines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..spec import Manifest


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published figure."""

    family: str
    variant: str
    what: str
    per_second: float
    """Images a second."""
    machine: str
    source: str


FAST = "segment-anything-fast, experiments/results.csv (github.com/pytorch-labs/segment-anything-fast)"
PUBLISHED = (
    Published(family="sam", variant="vit_h", what="whole model, bf16, batch 8", per_second=23.6, machine="A100", source=FAST),
    Published(family="sam", variant="vit_h", what="whole model, int8, batch 8", per_second=25.0, machine="A100", source=FAST),
    Published(family="sam", variant="vit_b", what="whole model, bf16, batch 8", per_second=92.1, machine="A100", source=FAST),
    Published(
        family="sam",
        variant="vit_h",
        what="TensorRT FP16, about",
        per_second=11,
        machine="A100",
        source="reports of users, no paper",
    ),
    Published(
        family="grounding-dino",
        variant="swin_t",
        what="TensorRT FP16, about",
        per_second=27,
        machine="machine unknown",
        source="reports of users, no paper",
    ),
)


def published_for(manifests: Iterable[Manifest]) -> list[Published]:
    """The figures for exactly these models; none for other variants."""
    have = {(manifest.family, manifest.variant) for manifest in manifests}
    return [figure for figure in PUBLISHED if (figure.family, figure.variant) in have]
