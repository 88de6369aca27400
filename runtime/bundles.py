"""Finds a bundle by its name: a folder, ``mini``, or ``hub:OWNER/NAME``."""

from __future__ import annotations

from pathlib import Path

from ..hub import download, is_on_hub
from ..spec import Bundle, open_bundle

MINI = Path(__file__).resolve().parent.parent / "mini" / "bundle"
"""The bundle shipped with the package, called ``mini``: small models of the same classes, trained on drawn scenes."""


def bundle_folder(name: str | Path) -> Path:
    """The folder of a bundle; downloads a bundle of the hub.

    Raises:
        BundleError, UsageError: as `wsss.hub.download`.
    """
    if isinstance(name, str) and is_on_hub(name):
        return download(name)
    return MINI if str(name) == "mini" else Path(name)


def find_bundle(name: str | Path) -> Bundle:
    """Open a bundle. Raises BundleError if there is none."""
    return open_bundle(bundle_folder(name))
