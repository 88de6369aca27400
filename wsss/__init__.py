"""Photographs and a class list in, semantic-segmentation pseudo-labels out (arXiv 2405.06586)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["Labeler", "PseudoLabels", "WsssError", "__version__"]

# In a checkout the folders `export/`, `engines/`, ... stand beside this one instead of inside it.
_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "pyproject.toml").is_file():
    __path__.append(str(_CHECKOUT))

from .errors import WsssError  # noqa: E402  (needs no mapped folder, and is the name users catch)

if TYPE_CHECKING:
    from .batch import PseudoLabels
    from .runtime.labeler import Labeler


def __getattr__(name: str) -> object:
    """Loads ``Labeler`` and ``PseudoLabels`` on first use, so that ``import wsss`` stays instant."""
    if name == "Labeler":
        from .runtime.labeler import Labeler

        return Labeler
    if name == "PseudoLabels":
        from .batch import PseudoLabels

        return PseudoLabels
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
