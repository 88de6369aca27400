"""Photographs and a class list in, semantic-segmentation pseudo-labels out (arXiv 2405.06586)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import WsssError

__version__ = "0.1.0"
__all__ = ["Detections", "Labeler", "Result", "Rules", "WsssError", "__version__"]

if TYPE_CHECKING:
    from .runtime.chain import Rules
    from .runtime.labeler import Labeler
    from .runtime.results import Detections, Result


def __getattr__(name: str) -> object:
    """Load the names of the labeling chain on first use, so that ``import wsss`` stays fast."""
    if name in ("Detections", "Labeler", "Result", "Rules"):
        from .runtime import chain, labeler, results

        return {"Detections": results.Detections, "Labeler": labeler.Labeler, "Result": results.Result, "Rules": chain.Rules}[
            name
        ]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
