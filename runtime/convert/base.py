"""What a format's writer is, and what several of them share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from ...classes import palette
from .labeled import Labeled


@dataclass(frozen=True, slots=True)
class Loss:
    """Something of the store that a format cannot hold, said when ``count`` is not 0."""

    count: int
    what: str

    def __str__(self) -> str:
        return f"{self.count:,} {self.what}"


class Writer(Protocol):
    """Writes one format. Made by an `OpenWriter`."""

    def add(self, item: Labeled) -> Path:
        """Writes what is known of one image; returns where in the folder the photograph itself belongs."""

    def finish(self) -> list[Loss]:
        """Writes what can be written at the end only."""


OpenWriter = Callable[[Path, tuple[str, ...], tuple[str, ...], ExitStack], Writer]
"""Takes the folder, the names of the classes (label 1 first) and of the splits, and what closes the files it opens."""


def save_indexed(path: Path, values: np.ndarray) -> None:
    """Writes (H, W) uint8 as an 8-bit palette PNG with VOC's colors. Raises FileExistsError: there is one already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    image.putpalette(palette().tobytes())
    with path.open("xb") as file:
        image.save(file, format="PNG")
