"""The models with official weights, and what has been proven of each: for `wsss models`, without loading any of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

PROVEN = Path(__file__).with_name("proven.json")
"""Written from the result files of ``benchmarks/results`` by ``python -m wsss.benchmarks.studies.tables``."""
Figures = dict[str, Any]
"""Measured values of one kind of proof, by what was measured."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A variant of a model."""

    role: Literal["labels", "boxes", "masks", "instances"]
    """What it finds. One model for instances takes the place of those for boxes and masks."""
    model: str
    variant: str
    parameters: float
    """Millions."""
    work: float
    """Giga multiply-adds of matrix products and convolutions for an image: of a view in CLIP, on a canvas of 800 x 1088 in
    Grounding-DINO, of the image encoder in SAM."""
    license: str
    weights: str
    """The default of ``--weights``."""
    publisher: str
    same_network: str = ""
    """The variant whose graphs this one's equal, but for the weights."""

    def proven(self) -> dict[str, Figures]:
        """What was measured of the graphs: ``fp32`` and ``fp16`` against the official module on photographs, and ``trt-rtx``."""
        found: dict[str, dict[str, Figures]] = json.loads(PROVEN.read_text(encoding="utf-8"))
        return found.get(f"{self.model} {self.same_network or self.variant}", {})


_OPENAI = ("MIT", "openai", "OpenAI, by open_clip")
_WEBLI = ("Apache-2.0", "webli", "Google, by open_clip")
_PE = ("Apache-2.0", "meta", "Meta, by open_clip")
_MOBILE = ("Apple AMLR", "dfndr2b", "Apple, by open_clip; for research")


def _clip(variant: str, parameters: float, work: float, source: tuple[str, str, str]) -> Entry:
    license, weights, publisher = source
    return Entry(
        role="labels",
        model="clip",
        variant=variant,
        parameters=parameters,
        work=work,
        license=license,
        weights=weights,
        publisher=publisher,
    )


def _dino(variant: str, parameters: float, work: float, weights: str, publisher: str, same_network: str = "") -> Entry:
    return Entry(
        role="boxes",
        model="grounding-dino",
        variant=variant,
        parameters=parameters,
        work=work,
        license="Apache-2.0",
        weights=weights,
        publisher=publisher,
        same_network=same_network,
    )


def _sam(variant: str, parameters: float, work: float) -> Entry:
    return Entry(
        role="masks",
        model="sam",
        variant=variant,
        parameters=parameters,
        work=work,
        license="Apache-2.0",
        weights=variant,
        publisher="Meta",
    )


_IDEA, _OPENMMLAB, _ISEE = "IDEA Research", "OpenMMLab, mmdetection", "iSEE-Laboratory, Hugging Face hub"
ENTRIES = (
    _clip("ViT-B-32", 151.3, 4.4, _OPENAI),
    _clip("ViT-B-16", 149.6, 17.6, _OPENAI),
    _clip("ViT-L-14", 427.6, 81.0, _OPENAI),
    _clip("ViT-L-14-336", 427.9, 191.0, _OPENAI),
    _clip("ViT-B-16-SigLIP2", 375.2, 17.7, _WEBLI),
    _clip("ViT-SO400M-16-SigLIP2-384", 1136.0, 259.5, _WEBLI),
    _clip("PE-Core-B-16", 447.7, 17.8, _PE),
    _clip("PE-Core-L-14-336", 671.1, 192.2, _PE),
    _clip("MobileCLIP2-S0", 74.8, 2.4, _MOBILE),
    _clip("MobileCLIP2-S2", 99.2, 7.8, _MOBILE),
    _clip("MobileCLIP2-B", 149.8, 17.7, _MOBILE),
    _clip("MobileCLIP2-L-14", 427.6, 81.0, _MOBILE),
    _dino("swin_t", 172.3, 339.0, "swint_ogc", _IDEA),
    _dino("swin_b", 232.3, 562.0, "swinb_cogcoor", _IDEA),
    _dino("mm_tiny", 172.9, 339.0, "mm_grounding_dino_tiny_o365v1_goldg_v3det", _OPENMMLAB),
    _dino("mm_base", 233.0, 562.0, "mm_grounding_dino_base_o365v1_goldg_v3det", _OPENMMLAB),
    _dino("mm_large", 343.1, 1672.9, "mm_grounding_dino_large_o365v2_oiv6_goldg", _OPENMMLAB),
    _dino("llmdet_tiny", 172.9, 339.0, "llmdet_tiny", _ISEE, same_network="mm_tiny"),
    _dino("llmdet_base", 233.0, 562.0, "llmdet_base", _ISEE, same_network="mm_base"),
    _dino("llmdet_large", 343.1, 1672.9, "llmdet_large", _ISEE, same_network="mm_large"),
    _sam("vit_b", 93.7, 486.0),
    _sam("vit_l", 312.3, 1492.8),
    _sam("vit_h", 641.1, 2980.5),
    _sam("sam2.1_tiny", 31.4, 146.3),
    _sam("sam2.1_small", 38.5, 180.2),
    _sam("sam2.1_base_plus", 73.3, 323.9),
    _sam("sam2.1_large", 216.9, 912.5),
    Entry(
        role="instances",
        model="sam3",
        variant="sam3",
        parameters=840.4,
        work=2806.7,
        license="SAM License",
        weights="facebook/sam3",
        publisher="Meta, after an agreement",
    ),
)
