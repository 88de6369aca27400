"""The protocol of a format's writer, and code that several writers share."""

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
    """Something that a format cannot represent; reported when ``count`` is not 0."""

    count: int
    what: str

    def __str__(self) -> str:
        return f"{self.count:,} {self.what}"


class Writer(Protocol):
    """Writes one format. Created by an `OpenWriter`."""

    def add(self, item: Labeled) -> Path:
        """Write one image's labels; return the path in the folder where its photograph belongs."""

    def finish(self) -> list[Loss]:
        """Write what depends on all images; return what the format could not represent."""


OpenWriter = Callable[[Path, tuple[str, ...], tuple[str, ...], ExitStack], Writer]
"""Takes the folder, the names of the classes (label 1 first), those of the splits, and the stack that closes its files."""


def save_indexed(path: Path, values: np.ndarray) -> None:
    """Write (H, W) uint8 as an 8-bit palette PNG with VOC's colors. Raises FileExistsError if the file exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    image.putpalette(palette().tobytes())
    with path.open("xb") as file:
        image.save(file, format="PNG")
