"""Photographs and a class list in, semantic-segmentation pseudo-labels out (arXiv 2405.06586)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import WsssError

__version__ = "0.1.0"
__all__ = ["Labeler", "PseudoLabels", "WsssError", "__version__"]

if TYPE_CHECKING:
    from .batch import PseudoLabels
    from .runtime.labeler import Labeler


def __getattr__(name: str) -> object:
    """Load ``Labeler`` and ``PseudoLabels`` on first use, so that ``import wsss`` stays fast."""
    if name == "Labeler":
        from .runtime.labeler import Labeler

        return Labeler
    if name == "PseudoLabels":
        from .batch import PseudoLabels

        return PseudoLabels
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
