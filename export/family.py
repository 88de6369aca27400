"""What every exporter offers, and the table of exporters.

A family (CLIP, Grounding-DINO, SAM) is one function, ``prepare``: official weights in, `Prepared` out. The rest of the
way (tracing, sharing weights, the parity gate, the manifest) is the same for all and lives in `exporting`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import nn

from ..errors import UsageError
from ..spec import AxisRange, GraphSpec, Preprocess, TensorSpec

Feeds = dict[str, np.ndarray]
"""Host arrays by tensor name."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line may change about an export."""

    batch: AxisRange | None = None
    """Range of the free row axis (images, phrases, boxes); None takes the family's own."""
    sizes: tuple[tuple[int, int], ...] = ()
    """(height, width) canvases; empty takes the family's own."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far an output may lie from its reference, per row."""

    relative: float
    """Norm of the difference over the norm of the reference."""
    absolute: float | None = None
    """Largest absolute difference, in the output's unit; None does not look."""
    labels: bool = False
    """The output names things (a label map): ``relative`` is the share of entries that may differ."""
    why: str
    """Where the number comes from."""

    def __str__(self) -> str:
        if self.labels:
            return f"share of differing entries <= {self.relative:g}: {self.why}"
        absolute = "" if self.absolute is None else f", absolute <= {self.absolute:g}"
        return f"relative <= {self.relative:g}{absolute}: {self.why}"


def take_rows(feeds: Feeds, rows: Sequence[int]) -> Feeds:
    """The given rows of feeds whose every tensor leads with the row axis."""
    return {name: array[list(rows)] for name, array in feeds.items()}


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One graph on its way out: the module to trace, its contract, and the official computation it must equal."""

    name: str
    module: nn.Module
    """Takes the inputs in order, returns a tensor or a tuple in the order of ``outputs``."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: Mapping[str, AxisRange]
    row_axis: str
    """The free axis whose entries are independent rows ("batch", "boxes"): what the gate varies."""
    sample: Callable[[int, int], Feeds]
    """(rows, seed) to feeds in which every row differs: pixels, valid sizes, captions, boxes."""
    reference: Callable[[Feeds, Feeds], Feeds]
    """(feeds of one row, the graph's outputs for them) to what the official implementation computes at batch 1.
    The graph's outputs are there to resolve ties alone (see ``ties``); most families ignore them."""
    take: Callable[[Feeds, Sequence[int]], Feeds] = take_rows
    """(feeds, row numbers) to the feeds of these rows."""
    tolerance: Mapping[str, Tolerance]
    """Per output; every output but ``ties`` must have one."""
    ties: str | None = None
    """An int64 output holding choices between near-equal values (top-k). The reference takes the graph's choice, after
    checking that it was a near tie, so that ranks swapped by rounding do not count as errors."""
    whole: bool = False
    """The entries of ``row_axis`` depend on each other (masks competing for pixels): the gate compares whole calls, each
    with feeds of its own, instead of rows."""

    def spec(self, file: str, opset: int) -> GraphSpec:
        """The contract as the manifest stores it."""
        return GraphSpec(file=file, inputs=self.inputs, outputs=self.outputs, axes=dict(self.axes), opset=opset)


class SavesTokenizer(Protocol):
    """The part of ``tokenizers.Tokenizer`` that an export needs."""

    def save(self, path: str, pretty: bool = True) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A loaded model, ready to be traced graph by graph."""

    variant: str
    graphs: Sequence[Callable[[], Graph]]
    """Made one at a time: a big model's wrappers need not all be in memory together."""
    preprocess: Preprocess
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: SavesTokenizer | None = None
    weights: Mapping[str, str]
    """``source`` as typed and ``sha256`` of the file (or of the seeded values)."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One exporter."""

    name: str
    variants: tuple[str, ...]
    """Names shown to the user; CLIP takes any that open_clip knows."""
    default: str
    prepare: Callable[[str, str, Options], Prepared]
    """(variant, weights, options) to the prepared model. ``weights`` is a path, a known name or ``random:SEED``."""
    official: Callable[[str], str]
    """The known name of a variant's official weights: what ``--weights`` is when it is not typed."""


def family(name: str) -> Family:
    """A family by name. Raises UsageError naming those there are."""
    from . import clip, grounding_dino, sam

    table = {each.name: each for each in (clip.FAMILY, grounding_dino.FAMILY, sam.FAMILY)}
    if name not in table:
        raise UsageError(f"--model: expected one of {', '.join(table)} or all, got {name!r}")
    return table[name]
