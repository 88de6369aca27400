"""What every exporter offers, and the table of exporters.

A family (CLIP, Grounding-DINO, SAM) is one function, ``prepare``: official weights in, `Prepared` out. The rest of the
way (tracing, sharing weights, the parity gate, the manifest) is the same for all and lives in `exporting`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
from torch import nn

from ..errors import UsageError
from ..spec import AxisRange, GraphSpec, Precision, Preprocess, TensorSpec

Sampling = Literal["grid-sample", "gather", "plugin"]
COARSER = 4.0
"""Tolerances of bfloat16, with its 8 bits, over those of float16, with its 11: measured, errors are eight times as large."""
Feeds = dict[str, np.ndarray]
"""Host arrays by tensor name."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line may change about an export."""

    batch: AxisRange | None = None
    """Range of the free row axis (images, phrases, boxes); None takes the family's own."""
    sizes: tuple[tuple[int, int], ...] = ()
    """(height, width) canvases; empty takes the family's own."""
    precision: Precision = "fp32"
    """Of the graphs' arithmetic."""
    sampling: Sampling | None = None
    """How Grounding-DINO reads between feature cells, see `grounding_dino_layers.sampler`; None takes GridSample."""
    measured: bool = False
    """In half precision, the precision doctor finds which nodes stay FP32, instead of those that the modules mark."""


Measure = Callable[[Feeds, Feeds, str], tuple[float, float]]
"""(outputs, their reference, name of one) to an error without unit and the largest difference in the output's unit. What it
needs to recognize a tie stands in the reference under ``NAME.``, see `Graph.reference`."""


def relative_error(got: Feeds, want: Feeds, name: str) -> tuple[float, float]:
    """Norm of the difference over the norm of the reference; largest absolute difference."""
    # Infinities are legitimate where the reference has the same (logits of padded tokens).
    equal = got[name] == want[name]
    mine, its = (np.where(equal, 0, each).astype(np.float64) for each in (got[name], want[name]))
    scale = float(np.linalg.norm(np.where(np.isfinite(want[name]), want[name], 0).astype(np.float64)))
    return float(np.linalg.norm(mine - its)) / max(scale, 1e-12), float(np.abs(mine - its).max(initial=0.0))


def gap_of_choices(got: Feeds, want: Feeds, name: str) -> tuple[float, float]:
    """For outputs that name the largest of some values (a label map): how far the chosen values lie apart where choices differ.

    The reference holds the values as ``NAME.values``, floating point (rows, choices, ...); the outputs are (rows, ...).

    Returns:
        The largest gap over the root mean square of the values, and in their unit: 0 where all choices agree, the size of a
        rounding error where only ties differ, infinite for a choice that does not exist.
    """
    values = want[f"{name}.values"].astype(np.float64)
    choices = [each[name].astype(np.int64)[:, None] for each in (got, want)]
    if any(((each < 0) | (each >= values.shape[1])).any() for each in choices):
        return np.inf, np.inf
    mine, its = (np.take_along_axis(values, each, axis=1) for each in choices)
    gap = float(np.abs(mine - its).max(initial=0.0))
    return gap / max(float(np.sqrt(np.square(values).mean())), 1e-12), gap


def share_impossible(got: Feeds, want: Feeds, name: str) -> tuple[float, float]:
    """For outputs that name things: the share of entries that are none of the reference's ``NAME.options`` (options, ...),
    which hold each entry's right name and those that are as right within rounding; the same again."""
    share = float((want[f"{name}.options"] != got[name]).all(axis=0).mean())
    return share, share


def miscount(got: Feeds, want: Feeds, name: str) -> tuple[float, float]:
    """For counts: how far they lie outside of the reference's ``NAME.range``, (2, ...) lowest and highest within rounding; over
    the largest count, and itself."""
    lowest, highest = want[f"{name}.range"]
    outside = float(np.maximum(lowest - got[name], got[name] - highest).max(initial=0))
    return max(outside, 0.0) / max(float(highest.max(initial=0)), 1.0), max(outside, 0.0)


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far an output may lie from its reference, per row."""

    relative: float
    """Most of the measure's error."""
    absolute: float | None = None
    """Largest difference, in the output's unit; None does not look."""
    measure: Measure = relative_error
    """What the error is."""
    why: str
    """Where the number comes from."""

    def coarser(self) -> Tolerance:
        """The same in bfloat16."""
        absolute = None if self.absolute is None else COARSER * self.absolute
        why = f"{COARSER:g} times that of float16 ({self.why}), as bfloat16 rounds eight times as coarsely"
        return replace(self, relative=COARSER * self.relative, absolute=absolute, why=why)

    def __str__(self) -> str:
        absolute = "" if self.absolute is None else f", absolute <= {self.absolute:g}"
        return f"{self.measure.__name__.replace('_', ' ')} <= {self.relative:g}{absolute}: {self.why}"


def take_rows(feeds: Feeds, rows: Sequence[int]) -> Feeds:
    """The given rows of feeds whose every tensor leads with the row axis."""
    return {name: array[list(rows)] for name, array in feeds.items()}


@dataclass(frozen=True, kw_only=True)
class InHalf:
    """A graph's contract in half precision, where it differs."""

    io: frozenset[str] = frozenset()
    """Floating-point inputs and outputs that are float16: what travels between engines. The others stay float32."""
    tolerance: Mapping[str, Tolerance]
    """Per output, against the same FP32 reference."""
    reference: Callable[[float], Callable[[Feeds, Feeds], Feeds]] | None = None
    """Another way to the reference, where ties are wider in half: from how wide they may be, as a multiple of those in
    float16. None takes the graph's own."""


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
    The graph's outputs are there to resolve ties alone (see ``ties``); most families ignore them. Beside the outputs it may
    hold arrays ``NAME.WHAT`` by which the measure of output NAME tells ties from errors (`gap_of_choices`)."""
    take: Callable[[Feeds, Sequence[int]], Feeds] = take_rows
    """(feeds, row numbers) to the feeds of these rows."""
    tolerance: Mapping[str, Tolerance]
    """Per output; every output but ``ties`` must have one."""
    ties: str | None = None
    """An int64 output holding choices between near-equal values (top-k) that the other outputs follow. The reference takes
    the graph's choice, after checking that it was a near tie, so that ranks swapped by rounding do not count as errors."""
    half: InHalf | None = None
    """What changes when the graph is lowered to half precision; None: it computes in float32 always."""
    whole: bool = False
    """The entries of ``row_axis`` depend on each other (masks competing for pixels): the gate compares whole calls, each
    with feeds of its own, instead of rows."""

    def spec(self, file: str, opset: int) -> GraphSpec:
        """The contract as the manifest stores it."""
        return GraphSpec(file=file, inputs=self.inputs, outputs=self.outputs, axes=dict(self.axes), opset=opset)

    def at(self, precision: Precision) -> Graph:
        """The same graph with the contract of a precision.

        In fp16 and bf16: float16 where `InHalf` says so, its tolerance, the FP32 reference.
        """
        if self.half is None or precision == "fp32":
            return self
        half, sample, is_fp16 = self.half, self.sample, precision == "fp16"
        reference = half.reference(1.0 if is_fp16 else COARSER) if half.reference else self.reference

        def rounded(feeds: Feeds) -> Feeds:
            return {name: value.astype(np.float16) if name in half.io else value for name, value in feeds.items()}

        def widened(feeds: Feeds) -> Feeds:
            return {name: value.astype(np.float32) if name in half.io else value for name, value in feeds.items()}

        def narrow(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
            return tuple(replace(spec, dtype="float16") if spec.name in half.io else spec for spec in specs)

        return replace(
            self,
            inputs=narrow(self.inputs),
            outputs=narrow(self.outputs),
            sample=lambda rows, seed: rounded(sample(rows, seed)),
            reference=lambda feeds, found: reference(widened(feeds), widened(found)),
            tolerance=half.tolerance if is_fp16 else {name: each.coarser() for name, each in half.tolerance.items()},
        )


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
    """A family by name; only what that one needs is imported. Raises UsageError naming those there are."""
    modules = {"clip": "clip.family", "grounding-dino": "grounding_dino.family", "sam": "sam", "segmenter": "segmenter"}
    if name not in modules:
        raise UsageError(f"--model: expected one of {', '.join(modules)} or all, got {name!r}")
    found: Family = importlib.import_module(f"wsss.export.{modules[name]}").FAMILY
    return found
