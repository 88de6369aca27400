"""What crosses from export to runtime: tensors, graphs, manifests and the bundle folder.

A *bundle* is a folder with one sub-folder a model; a model's folder holds its graphs (``*.onnx``), their weights,
its tokenizer and ``manifest.json``. This module alone reads and writes that file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

from .errors import BundleError, SpecError

FORMAT = 1
DType = Literal["float32", "float16", "uint8", "int64", "bool"]
Precision = Literal["fp32", "fp16", "bf16"]
Flavour = Literal["trt", "trt-rtx"]
"""TensorRT, and TensorRT for RTX: the same API in two libraries."""
Resize = Literal["squash", "longest", "shorter", "short-longest", "none"]
MODELS = ("clip", "grounding-dino", "sam")
"""Models of the labelling chain, in data-flow order; each is a folder of a bundle."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A named input or output of a graph.

    An int fixes an axis, a name leaves it free: ``("batch", 1024, 1024, 3)``.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: DType

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}({', '.join(map(str, self.shape))})"


@dataclass(frozen=True, slots=True)
class AxisRange:
    """Fewest, usual and most of a free axis: TensorRT's min, opt and max."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise SpecError(
                f"a free axis must rise from 1, got min={self.min}, opt={self.opt}, max={self.max}",
                hint="give --batch as MIN OPT MAX, for example --batch 1 8 16",
            )


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How a photograph becomes a graph's ``pixels``: resized on the host, normalised and masked inside the graph."""

    resize: Resize
    """squash: to the canvas, aspect lost. longest: longest side to ``longest_px``. short-longest: short side to
    ``short_px`` unless the longest would pass ``longest_px``. shorter: shorter side to ``short_px``, the longer one to four
    times that at most. none: as it is. With the last two, one too large for every canvas is read in tiles."""
    longest_px: int
    short_px: int = 0
    filter: Literal["bilinear", "bicubic"]
    canvases: tuple[tuple[int, int], ...]
    """(height, width) sizes a graph exists for; a photograph goes on the smallest that holds it, top left."""
    mean: tuple[float, float, float]
    """RGB mean on the 0-255 scale. Already inside the graph; recorded for readers."""
    std: tuple[float, float, float]
    """RGB standard deviation on the 0-255 scale. Already inside the graph; recorded for readers."""
    colour: Literal["RGB"] = "RGB"
    source: str
    """Where the numbers come from."""


@dataclass(frozen=True, kw_only=True)
class ParityRow:
    """One comparison of the gate: one output, at one batch size, one row."""

    output: str
    batch: int
    row: int
    against: Literal["reference", "alone"]
    """reference: the official module. alone: the same graph's result for this row at batch 1."""
    error: float
    """Norm of the difference over the norm of the reference."""
    worst: float
    """Largest absolute difference, in the output's own unit."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The parity gate's verdict on one graph; present only when passed."""

    engine: str
    reference: str
    tolerance: Mapping[str, str]
    rows: tuple[ParityRow, ...]

    def worst(self, output: str) -> ParityRow:
        """The row of one output with the largest relative error."""
        return max((row for row in self.rows if row.output == output), key=lambda row: row.error)


@dataclass(frozen=True, kw_only=True)
class PlanSpec:
    """A TensorRT engine built from one graph: its file, and everything it is bound to. Another of any of these is refused."""

    file: str
    sha256: str
    flavour: Flavour
    graph_sha256: str
    """Of the ONNX file it was built from."""
    weights_sha256: str
    """Of the weights beside it."""
    precision: Precision
    axes: Mapping[str, AxisRange]
    """The optimisation profile: range of every free axis, within the graph's."""
    builder: str
    """Version of the library that built it, the only one that may run it."""
    target: str
    """The GPU it was built on, or the compute capabilities it was built for ahead of time."""
    driver: str | None = None
    """CUDA driver it was built with; None when built ahead of time."""
    seconds: float
    """Building took this long."""
    parity: Parity | None = None
    """The gate's verdict on this engine, run on a GPU; without it the engine is not used."""


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """One graph of a model: its file, its contract and its proof."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: Mapping[str, AxisRange]
    opset: int
    precision: Precision = "fp32"
    """Of the arithmetic, outside of ``islands``."""
    islands: Mapping[str, int] = field(default_factory=dict)
    """Why nodes of a half-precision graph stay FP32, and how many for each reason."""
    parity: Parity | None = None
    plans: Mapping[str, PlanSpec] = field(default_factory=dict)
    """TensorRT engines of this graph by flavour."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that the runtime needs to know of one exported model."""

    family: str
    variant: str
    precision: Precision = "fp32"
    """Asked for; each graph says what stays FP32 (`GraphSpec.islands`)."""
    preprocess: Preprocess
    graphs: Mapping[str, GraphSpec]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What only this family needs (logit scale, templates, thresholds); documented in its exporter."""
    tokenizer: str | None = None
    """File name of a `tokenizers` JSON in this folder."""
    weights: Mapping[str, str]
    """``source`` as typed and ``sha256`` of the file (or of the seeded values)."""
    tools: Mapping[str, str]
    """Versions of what made it."""
    files: Mapping[str, str] = field(default_factory=dict)
    """sha256 of every other file of the folder; checked before use."""
    format: int = FORMAT

    def identity(self) -> str:
        """A hash of what this model computes: its files and the settings around them."""
        told = {"files": dict(self.files), "settings": dict(self.settings), "preprocess": dataclasses.asdict(self.preprocess)}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Model:
    """An exported model on disk: its folder and what its manifest says."""

    folder: Path
    manifest: Manifest

    def path(self, graph: str) -> Path:
        """Path of a graph's ONNX file."""
        return self.folder / self.graph(graph).file

    def graph(self, name: str) -> GraphSpec:
        """A graph's spec. Raises BundleError naming the graphs there are."""
        try:
            return self.manifest.graphs[name]
        except KeyError:
            raise BundleError(
                f"{self.folder}: has no graph {name!r}, only {', '.join(self.manifest.graphs)}",
                hint=f"export it again: wsss export --model {self.manifest.family} --bundle {self.folder.parent}",
            ) from None


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder of exported models."""

    folder: Path

    def models(self) -> list[str]:
        """Names of the models here, sorted."""
        return sorted(path.parent.name for path in self.folder.glob("*/manifest.json") if not path.parent.name.startswith("."))

    def model(self, name: str) -> Model:
        """One model, its files checked against the hashes of its manifest.

        Raises:
            BundleError: the bundle lacks it, or a file is missing, changed or outside the folder.
        """
        folder = self.folder / name
        if not (folder / "manifest.json").is_file():
            there = ", ".join(self.models()) or "no models"
            raise BundleError(
                f"{self.folder}: this run needs the model {name!r}, the bundle has {there}",
                hint=f"wsss export --model {name} --bundle {self.folder}",
            )
        manifest = read_manifest(folder)
        for file, expected in manifest.files.items():
            check_file(folder, file, expected)
        used = {graph.file for graph in manifest.graphs.values()} | ({manifest.tokenizer} if manifest.tokenizer else set())
        for file in sorted(used - manifest.files.keys()):
            raise BundleError(
                f"{folder / 'manifest.json'}: uses {file!r} without its sha256 in `files`", hint="export the model again"
            )
        return Model(folder, manifest)


def open_bundle(folder: Path) -> Bundle:
    """The bundle in ``folder``. Raises BundleError when there is none."""
    bundle = Bundle(folder)
    if not folder.is_dir():
        raise BundleError(f"{folder}: expected a bundle folder, found nothing", hint=f"wsss export --model all --bundle {folder}")
    if not bundle.models():
        raise BundleError(
            f"{folder}: expected a bundle (MODEL/manifest.json), found no model in it",
            hint=f"wsss export --model all --bundle {folder}",
        )
    return bundle


def check_file(folder: Path, name: str, expected: str, *, again: str = "export the model again") -> None:
    """Raises BundleError, with the hint ``again``, unless ``folder/name`` is a plain file with the sha256 ``expected``."""
    path = folder / name
    if name in ("", "..") or Path(name).name != name or path.is_symlink():
        raise BundleError(f"{folder / 'manifest.json'}: names {name!r}, expected a plain file of its own folder", hint=again)
    if not path.is_file():
        raise BundleError(f"{path}: named by the manifest but missing", hint=again)
    got = sha256_of(path)
    if got != expected:
        raise BundleError(
            f"{path}: its sha256 is {got[:12]}..., the manifest says {expected[:12]}...: changed or truncated", hint=again
        )


def sha256_of(path: Path) -> str:
    """sha256 of a file, hex. Remembered while size and modification time stay."""
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes ``folder/manifest.json`` atomically."""
    text = json.dumps(dataclasses.asdict(manifest), indent=1, ensure_ascii=False)
    temporary = folder / ".manifest.json.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / "manifest.json")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of one model's folder. Raises BundleError naming the file and the field."""
    path = folder / "manifest.json"
    again = "export the model again, or take the wsss version that wrote it"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(f"{path}: expected a JSON manifest, {error}", hint=again) from None
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        came = told.get("format") if isinstance(told, dict) else type(told).__name__
        raise BundleError(f"{path}: expected manifest format {FORMAT}, got {came}", hint=again)
    try:
        return _manifest_from_json(told)
    except (KeyError, TypeError, ValueError, AttributeError, SpecError) as error:
        raise BundleError(f"{path}: not a valid manifest: {type(error).__name__} {error}", hint=again) from None


def _manifest_from_json(told: dict[str, Any]) -> Manifest:
    pre = dict(told["preprocess"])
    pre["canvases"] = tuple((int(h), int(w)) for h, w in pre["canvases"])
    pre["mean"], pre["std"] = tuple(pre["mean"]), tuple(pre["std"])
    graphs = {name: _graph_from_json(graph) for name, graph in told["graphs"].items()}
    strings = [told.get("tokenizer") or "", *(graph.file for graph in graphs.values()), *dict(told["files"]).values()]
    if not isinstance(told["files"], dict) or not all(isinstance(each, str) for each in strings):
        raise TypeError("files, graphs and tokenizer must be named by strings")
    return Manifest(**{**told, "preprocess": Preprocess(**pre), "graphs": graphs, "settings": dict(told["settings"])})


def _graph_from_json(told: dict[str, Any]) -> GraphSpec:
    return GraphSpec(
        file=told["file"],
        inputs=tuple(_tensors_from_json(told["inputs"])),
        outputs=tuple(_tensors_from_json(told["outputs"])),
        axes={name: AxisRange(**axis) for name, axis in told["axes"].items()},
        opset=told["opset"],
        precision=told.get("precision", "fp32"),
        islands=dict(told.get("islands", {})),
        parity=_parity_from_json(told.get("parity")),
        plans={name: _plan_from_json(plan) for name, plan in told.get("plans", {}).items()},
    )


def _plan_from_json(told: dict[str, Any]) -> PlanSpec:
    axes = {name: AxisRange(**axis) for name, axis in told["axes"].items()}
    plan = PlanSpec(**{**told, "axes": axes, "parity": _parity_from_json(told.get("parity"))})
    if not all(isinstance(each, str) for each in (plan.file, plan.sha256, plan.graph_sha256, plan.weights_sha256)):
        raise TypeError("plans must be named by strings")
    return plan


def _parity_from_json(told: dict[str, Any] | None) -> Parity | None:
    return None if told is None else Parity(**{**told, "rows": tuple(ParityRow(**row) for row in told["rows"])})


def _tensors_from_json(told: list[dict[str, Any]]) -> Iterator[TensorSpec]:
    for tensor in told:
        yield TensorSpec(tensor["name"], tuple(tensor["shape"]), cast(DType, tensor["dtype"]))
