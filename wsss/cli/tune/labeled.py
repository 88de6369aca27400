"""What the commands share: labeled photographs, and the evidence of a chain about them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import UsageError
from ...progress import end_progress
from ..common import counter, log

if TYPE_CHECKING:
    import numpy as np

    from ...batch import Photograph
    from ...runtime.chain import Chain
    from ...runtime.tune.evidence import Evidence

FEW = 10
"""Fewer labeled photographs than this decide by chance."""
PhotosArgument = Annotated[str, typer.Argument(metavar="PHOTOS", help="Folder of the photographs.")]
ListFlag = Annotated[
    str | None, typer.Option("--list", metavar="FILE", help="Only the photographs of this list: one name per line.")
]
FoldsFlag = Annotated[int, typer.Option(min=2, help="Parts of the photographs, each left out once to estimate the gain.")]


@dataclass(frozen=True)
class Labeled:
    """Photographs with true label maps."""

    folder: Path
    names: tuple[str, ...]
    photographs: dict[str, Path]
    truth: dict[str, Path]

    def read(self, name: str) -> Photograph:
        """The photograph of a name, called as ``wsss label`` calls it."""
        from ...photographs import read_photograph

        path = self.photographs[name]
        return read_photograph(self.folder, path.relative_to(self.folder).as_posix())

    def label_map(self, name: str) -> np.ndarray:
        """Its true label map (H, W) uint8."""
        from ...train.evaluate.files import read_label_map

        return read_label_map(self.truth[name])


def labeled_photographs(photos: str, truth: str, names: str | None, classes: Sequence[str]) -> Labeled:
    """The photographs that have a true label map, or those of a list.

    Raises:
        WsssError: a label map without a photograph, or a label store of other classes.
    """
    from ...classes import cleaned
    from ...train.evaluate.files import find_label_maps, read_list
    from ...train.evaluate.photographs import find_photographs, folder_of_photographs

    true = find_label_maps(Path(truth))
    if true.classes is not None and list(map(cleaned, true.classes)) != list(map(cleaned, classes)):
        raise UsageError(
            f"TRUTH {truth}: a label store of {len(true.classes)} classes that are not those of --classes",
            hint="labels are compared by their number: give the list that the store was made with, in its order",
        )
    listed = read_list(Path(names), true) if names else tuple(true.paths)
    paths = find_photographs(Path(photos), [true.images.get(name, name) for name in listed], "PHOTOS")
    if len(listed) < FEW:
        log(f"warning: {len(listed)} photographs are very few: settings may fit them by chance", logging.WARNING)
    folder = folder_of_photographs(Path(photos))
    return Labeled(folder, listed, dict(zip(listed, paths, strict=True)), {name: true.paths[name] for name in listed})


def evidence_of(chain: Chain, labeled: Labeled) -> Evidence:
    """Run the models on labeled photographs. Raises WsssError."""
    from ...runtime.tune.evidence import Evidence

    found = Evidence(chain, labeled.names, labeled.read, labeled.label_map, progress=counter("photographs"))
    end_progress()
    return found
