"""Find the photographs of label maps by name."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ...errors import ImageError, StoreError, WsssError
from ...photographs import SUFFIXES, read_photograph
from .files import plain_name

VOC_PHOTOGRAPHS = "JPEGImages"
"""Sub-folder of the photographs in VOC's layout."""


def folder_of_photographs(folder: Path) -> Path:
    """The folder that names are below: ``JPEGImages/`` if the folder has one, otherwise the folder itself."""
    inside = folder / VOC_PHOTOGRAPHS
    return inside if inside.is_dir() else folder


def find_photographs(folder: Path, names: Sequence[str], flag: str = "--images") -> tuple[Path, ...]:
    """Paths of the photographs of label maps, below ``folder`` or its ``JPEGImages/``.

    Args:
        names: names of label maps (`wsss.train.evaluate.files.LabelMaps`): ``a`` or ``a.jpg`` for a photograph ``a.jpg``.
        flag: the flag or argument that the folder was given with, for messages.

    Raises:
        WsssError: there is no such folder, or it lacks a photograph.
    """
    inside = folder_of_photographs(folder)
    found = photographs_by_name(inside, flag)
    if missing := [name for name in names if name not in found]:
        raise WsssError(
            f"{flag} {folder}: has no photograph of {len(missing)} of {len(names)} label maps, for example {missing[0]}",
            hint="photographs and label maps are matched by their path below the two folders; --list chooses some of them",
        )
    return tuple(found[name] for name in names)


def photographs_by_name(inside: Path, flag: str) -> dict[str, Path]:
    """The photographs of a folder and its sub-folders, by their path below it with and without the suffix.

    Raises:
        WsssError: there is no such folder; ``flag`` is named in the message.
    """
    if not inside.is_dir():
        raise WsssError(f"{flag} {inside}: expected the folder of the photographs, found nothing")
    found: dict[str, Path] = {}
    for path in sorted(_walk(inside)):
        name = unicodedata.normalize("NFC", path.relative_to(inside).as_posix())
        found[name] = path  # in a label store, the label of a.jpg is `a.jpg.png` if there is an a.webp too
        found.setdefault(plain_name(name), path)
    return found


def read_photograph_of(path: Path, label_map: np.ndarray, label_path: Path) -> np.ndarray:
    """Read the photograph (H, W, 3) uint8 of a label map. Raises StoreError if it is unreadable or of another size."""
    try:
        pixels = read_photograph(path.parent, path.name).pixels
    except ImageError as error:
        raise StoreError(f"{path}: {error.message}") from None
    if pixels.shape[:2] != label_map.shape:
        raise StoreError(
            f"{label_path}: is {label_map.shape[1]} x {label_map.shape[0]} pixels, its photograph {path} is "
            f"{pixels.shape[1]} x {pixels.shape[0]}"
        )
    return pixels


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(root, name) for name in files if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."))
