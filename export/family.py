"""The interface of an exporter, and the table of exporters.

A family (CLIP, Grounding-DINO, SAM) implements one function, ``prepare``: official weights to `Prepared`. The rest (tracing,
sharing weights, the parity gate, the manifest) is the same for all families and is in `exporting`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import DTypeLike
from torch import nn

from ..errors import UsageError
from ..spec import AxisRange, GraphSpec, Precision, Preprocess, TensorSpec
from . import canvases

Sampling = Literal["grid-sample", "gather", "plugin"]
DISTINCT = 3
"""`Graph.distinct` of the large image graphs."""
COARSER = 4.0
"""Ratio of the tolerances of bfloat16 (8 bits) to those of float16 (11 bits), whose measured errors differ by a factor of 8."""
Feeds = dict[str, np.ndarray]
"""Host arrays by tensor name."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Export settings that the command line can change."""

    batch: AxisRange | None = None
    """Range of the free row axis (images, phrases, boxes); None takes the family's default."""
    sizes: tuple[tuple[int, int], ...] = ()
    """(height, width) canvases; empty takes the family's default."""
    precision: Precision = "fp32"
    """Of the graphs' arithmetic."""
    sampling: Sampling | None = None
    """How Grounding-DINO reads between feature cells, see `grounding_dino.layers.sampler`; None takes GridSample."""
    measured: bool = False
    """In half precision, `precision.search` measures which nodes stay FP32, instead of taking those that the modules mark."""
    fp32_accumulation: bool = False
    """In fp16, the sums of all long matrix products are in FP32 on every GPU, see `precision.accumulation`."""
    for_cpu: bool = False
    """In half precision, the graphs take the form with the least work, as in FP32, instead of that which TensorRT fuses."""

    @property
    def for_tensorrt(self) -> bool:
        """Whether the graphs take the form that TensorRT compiles to fewer and faster kernels."""
        return self.precision != "fp32" and not self.for_cpu


Measure = Callable[[Feeds, Feeds, str], tuple[float, float]]
"""(outputs, their reference, name of one output) to a dimensionless error and the largest difference in the output's unit.
Arrays for recognizing ties are in the reference as ``NAME.WHAT``, see `Graph.reference`."""


def relative_error(got: Feeds, want: Feeds, name: str) -> tuple[float, float]:
    """Norm of the difference over the norm of the reference; largest absolute difference."""
    # Infinities are allowed where the reference has the same (logits of padded tokens).
    difference = np.zeros(got[name].shape)
    np.subtract(got[name], want[name], out=difference, where=got[name] != want[name], dtype=np.float64)
    scale = float(np.linalg.norm(np.where(np.isfinite(want[name]), want[name], 0).astype(np.float64)))
    return float(np.linalg.norm(difference)) / max(scale, 1e-12), float(np.abs(difference).max(initial=0.0))


def gap_of_choices(got: Feeds, want: Feeds, name: str) -> tuple[float, float]:
    """For outputs that are indices of a largest value (a label map): the difference of the chosen values where choices differ.

    The reference holds the values as ``NAME.values``, floating point (rows, choices, ...); the outputs are (rows, ...).

    Returns:
        The largest gap over the root mean square of the values, and the gap in their unit: 0 where all choices agree, the size
        of a rounding error where only ties differ, infinite for an index that does not exist.
    """
    values = want[f"{name}.values"].astype(np.float64)
    choices = [each[name].astype(np.int64)[:, None] for each in (got, want)]
    if any(((each < 0) | (each >= values.shape[1])).any() for each in choices):
        return np.inf, np.inf
    chosen, expected = (np.take_along_axis(values, each, axis=1) for each in choices)
    gap = float(np.abs(chosen - expected).max(initial=0.0))
    return gap / max(float(np.sqrt(np.square(values).mean())), 1e-12), gap


def share_impossible(got: Feeds, want: Feeds, name: str) -> tuple[float, float]:
    """For outputs that are labels: the share of entries that are none of the reference's ``NAME.options`` (options, ...),
    the labels that are correct within rounding; returned twice."""
    share = float((want[f"{name}.options"] != got[name]).all(axis=0).mean())
    return share, share


def miscount(got: Feeds, want: Feeds, name: str) -> tuple[float, float]:
    """For counts, and numbers that follow from counts or choices: the largest distance to the reference's ``NAME.range``,
    (2, ...) lowest and highest within rounding; relative to the largest, or to 1 if that is more, and absolute."""
    lowest, highest = want[f"{name}.range"]
    outside = float(np.maximum(lowest - got[name], got[name] - highest).max(initial=0))
    return max(outside, 0.0) / max(float(highest.max(initial=0)), 1.0), max(outside, 0.0)


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Largest allowed difference of an output from its reference, per row."""

    relative: float
    """Largest error of ``measure``."""
    absolute: float | None = None
    """Largest difference, in the output's unit; None does not check it."""
    measure: Measure = relative_error
    """Definition of the error."""
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
    """Select rows of feeds; the row axis is the first axis of every tensor."""
    return {name: array[list(rows)] for name, array in feeds.items()}


@dataclass(frozen=True, kw_only=True)
class InHalf:
    """The parts of a graph's contract that differ in half precision."""

    io: frozenset[str] = frozenset()
    """Floating-point inputs and outputs that are float16: tensors passed between engines. The others stay float32."""
    tolerance: Mapping[str, Tolerance]
    """Per output, against the same FP32 reference."""
    reference: Callable[[float], Callable[[Feeds, Feeds], Feeds]] | None = None
    """Makes a reference that accepts wider ties, from their width as a multiple of that in float16. None takes
    `Graph.reference`."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A graph to export: the module to trace, its contract, and the official computation that it must equal."""

    name: str
    module: nn.Module
    """Takes the inputs in order, returns a tensor or a tuple in the order of ``outputs``."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: Mapping[str, AxisRange]
    row_axis: str
    """The free axis whose entries are independent rows ("batch", "boxes"); the gate varies its length."""
    sample: Callable[[int, int], Feeds]
    """(rows, seed) to feeds in which every row differs: pixels, valid sizes, captions, boxes."""
    reference: Callable[[Feeds, Feeds], Feeds]
    """(feeds of one row, the graph's outputs for them) to the result of the official implementation at batch 1.
    The graph's outputs only serve to resolve ties (see ``ties``); most families ignore them. The result may also contain
    arrays ``NAME.WHAT`` by which the measure of output NAME tells ties from errors (`gap_of_choices`)."""
    take: Callable[[Feeds, Sequence[int]], Feeds] = take_rows
    """(feeds, row numbers) to the feeds of these rows, which may repeat."""
    distinct: int | None = None
    """How many different inputs the gate uses, repeated in its batches, where the computation of a row takes seconds; None:
    every row of the largest batch has its own."""
    tolerance: Mapping[str, Tolerance]
    """Per output; required for every output except ``ties``."""
    ties: str | None = None
    """An int64 output with choices between near-equal values (top-k) on which the other outputs depend. The reference takes
    the graph's choice, after checking that it was a near tie, so that ranks swapped by rounding do not count as errors."""
    half: InHalf | None = None
    """Changes for half precision; None: the graph always computes in float32."""
    whole: bool = False
    """Whether the entries of ``row_axis`` depend on each other (masks competing for pixels). If so, the gate compares whole
    calls, each with different feeds, instead of rows."""

    template: Template | None = None
    """The trace that it shares with the graphs of other canvases; None: it is traced alone."""

    def spec(self, file: str, opset: int) -> GraphSpec:
        """The contract as the manifest stores it."""
        return GraphSpec(file=file, inputs=self.inputs, outputs=self.outputs, axes=dict(self.axes), opset=opset)

    def as_exported(self, spec: GraphSpec) -> Graph:
        """The same graph as an earlier version exported it: with the axes of its ``spec``, and without the inputs and outputs
        that were added since."""
        has_inputs, has_outputs, sample = {each.name for each in spec.inputs}, {each.name for each in spec.outputs}, self.sample
        return replace(
            self,
            axes=spec.axes,
            inputs=tuple(each for each in self.inputs if each.name in has_inputs),
            outputs=tuple(each for each in self.outputs if each.name in has_outputs),
            sample=lambda rows, seed: {name: value for name, value in sample(rows, seed).items() if name in has_inputs},
            tolerance={name: each for name, each in self.tolerance.items() if name in has_outputs},
            ties=self.ties if self.ties in has_outputs else None,
        )

    def at(self, precision: Precision) -> Graph:
        """The same graph with the contract of a precision.

        In fp16 and bf16, the inputs and outputs of `InHalf.io` are float16, and the tolerance is that of `InHalf`.
        """
        if self.half is None or precision == "fp32":
            return self
        half, sample, is_fp16 = self.half, self.sample, precision == "fp16"
        reference = half.reference(1.0 if is_fp16 else COARSER) if half.reference else self.reference

        def io_as(dtype: DTypeLike, feeds: Feeds) -> Feeds:
            return {name: value.astype(dtype) if name in half.io else value for name, value in feeds.items()}

        def half_specs(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
            return tuple(replace(spec, dtype="float16") if spec.name in half.io else spec for spec in specs)

        return replace(
            self,
            inputs=half_specs(self.inputs),
            outputs=half_specs(self.outputs),
            sample=lambda rows, seed: io_as(np.float16, sample(rows, seed)),
            reference=lambda feeds, outputs: reference(io_as(np.float32, feeds), io_as(np.float32, outputs)),
            tolerance=half.tolerance if is_fp16 else {name: each.coarser() for name, each in half.tolerance.items()},
        )


@dataclass(frozen=True, kw_only=True)
class Template:
    """One trace for several canvases."""

    shared: canvases.Template
    canvas: tuple[int, int]
    """(height, width) of this graph."""
    graph: Callable[[], Graph]
    """The graph that is traced, on the canvas of ``shared``."""


class SavesTokenizer(Protocol):
    """The part of ``tokenizers.Tokenizer`` that the export uses."""

    def save(self, path: str, pretty: bool = True) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A loaded model, ready to be traced graph by graph."""

    variant: str
    graphs: Sequence[Callable[[], Graph]]
    """Called one at a time, so that the graphs of a large model are not all in memory at once."""
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
    """(variant) to the known name of its official weights: the default of ``--weights``."""


def family(name: str) -> Family:
    """Import a family by name. Raises UsageError that lists the known names."""
    modules = {name: f"{name.replace('-', '_')}.family" for name in ("clip", "grounding-dino", "sam", "sam3")}
    modules["segmenter"] = "segmenter"
    if name not in modules:
        raise UsageError(f"--model: expected one of {', '.join(modules)} or all, got {name!r}")
    exporter: Family = importlib.import_module(f"wsss.export.{modules[name]}").FAMILY
    return exporter
