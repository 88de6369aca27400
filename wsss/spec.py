"""The interface between export and runtime: tensor specs, graphs, manifests and the bundle folder.

A *bundle* is a folder with one sub-folder per model, which holds its graphs (``*.onnx``), their weights, its tokenizer and
``manifest.json``. Only this module reads and writes that file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from .errors import BundleError, SpecError
from .files import restore, write_atomically
from .reading.documents import parse_json, read_bytes
from .reading.onnx_files import external_files
from .reading.typed_json import checked

FORMAT = 1
DType = Literal["float32", "float16", "uint8", "int64", "bool"]
Precision = Literal["fp32", "fp16", "bf16"]
Flavour = Literal["trt", "trt-rtx"]
"""TensorRT, and TensorRT for RTX: the same API in two libraries."""
Resize = Literal["squash", "longest", "shorter", "short-longest", "none"]
ScoreRule = Literal["max", "mean"]
"""How the score of a detector's box follows from those of its phrase's tokens: the largest, as in Grounding-DINO's ``predict()``
(groundingdino/util/inference.py), or their mean, as in its COCO evaluation (demo/test_ap_on_coco.py)."""
SCORE_RULES: tuple[ScoreRule, ...] = ("max", "mean")
MODELS = ("clip", "grounding-dino", "sam")
"""Models of the labeling chain, in data-flow order; each is a folder of a bundle."""
CONCEPT = "sam3"
"""The model that takes the place of the last two, and with its presence score that of the first."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A named input or output of a graph.

    An axis is an int if its size is fixed, and a name if it is free: ``("batch", 1024, 1024, 3)``.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: DType

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}({', '.join(map(str, self.shape))})"


@dataclass(frozen=True, slots=True)
class AxisRange:
    """Smallest, usual and largest size of a free axis: TensorRT's min, opt and max."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise SpecError(
                f"expected 1 <= min <= opt <= max of a free axis, got min={self.min}, opt={self.opt}, max={self.max}",
                hint="give --batch as MIN OPT MAX, for example --batch 1 8 16",
            )


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How a photograph becomes a graph's ``pixels``: resized on the host, normalized and masked in the graph."""

    resize: Resize
    """squash: to the canvas, without keeping the aspect ratio. longest: longest side to ``longest_px``. short-longest: shorter
    side to ``short_px`` unless the longer one would exceed ``longest_px``. shorter: shorter side to ``short_px``, the longer one
    to at most four times that. none: not resized. With the last two, a photograph larger than every canvas is read in tiles."""
    longest_px: int
    short_px: int = 0
    filter: Literal["bilinear", "bicubic"]
    canvases: tuple[tuple[int, int], ...]
    """(height, width) sizes that have a graph; a photograph is placed at the top left of the smallest that holds it."""
    mean: tuple[float, float, float]
    """RGB mean on the 0-255 scale. Applied in the graph; recorded for information."""
    std: tuple[float, float, float]
    """RGB standard deviation on the 0-255 scale. Applied in the graph; recorded for information."""
    colour: Literal["RGB"] = "RGB"
    source: str
    """Source of the numbers."""


@dataclass(frozen=True, kw_only=True)
class ParityRow:
    """One comparison of the parity gate: a row of an output at a batch size."""

    output: str
    batch: int
    row: int
    against: Literal["reference", "alone"]
    """reference: the official module. alone: the same graph's result for this row at batch 1."""
    error: float
    """Norm of the difference over the norm of the reference."""
    worst: float
    """Largest absolute difference, in the output's unit."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The parity gate's result for a graph; exists only if the graph passed."""

    engine: str
    reference: str
    tolerance: Mapping[str, str]
    rows: tuple[ParityRow, ...]

    def worst(self, output: str) -> ParityRow:
        """The row of one output with the largest relative error."""
        return max((row for row in self.rows if row.output == output), key=lambda row: row.error)


AMPERE_OR_NEWER = "GPUs of compute capability 8.0 and newer"
"""`PlanSpec.target` of a hardware-compatible engine."""


@dataclass(frozen=True, kw_only=True)
class PlanSpec:
    """A TensorRT engine built from one graph: its file, and everything it depends on. Any mismatch is refused."""

    file: str
    sha256: str
    flavour: Flavour
    graph_sha256: str
    """sha256 of the ONNX file it was built from."""
    weights_sha256: str
    """sha256 of the ONNX file's weights."""
    precision: Precision
    axes: Mapping[str, AxisRange]
    """The optimization profile: range of every free axis, within the range of the graph."""
    builder: str
    """Version of the library that built it; no other version may run it."""
    target: str
    """The GPU it was built on, or the compute capabilities it was built for ahead of time."""
    driver: str | None = None
    """CUDA driver it was built, and compared, with; None if built ahead of time."""
    seconds: float
    """Build time."""
    fused_attentions: int | None = None
    """Attentions that were compiled to one kernel each, which never writes its map; None where the builder does not tell."""
    softmaxes_alone: int | None = None
    """Softmaxes that are kernels of their own, of attentions that were not fused among others; None likewise."""
    parity: Parity | None = None
    """The parity gate's result for this engine on a GPU; without it the engine is not used."""

    @property
    def key(self) -> str:
        """The name in `GraphSpec.plans`: its flavour, and the GPU that it was built on."""
        return self.flavour if self.driver is None else f"{self.flavour} on {self.target}"


@dataclass(frozen=True, kw_only=True)
class OpenVinoProof:
    """The parity gate's result for a graph in OpenVINO on one kind of processor."""

    version: str
    """Of OpenVINO; another version computes with other kernels."""
    processor: str
    """Its newest vector instructions, for example ``avx512_bf16``, by which OpenVINO chooses kernels."""
    seconds: float | None = None
    """Time of one call, with as many rows as the processor has cores; None for graphs that were not timed: those in bf16, which
    only OpenVINO runs, and canvases after the first."""
    ort_seconds: float | None = None
    """The same in ONNX Runtime, measured in turns."""
    parity: Parity


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """One graph of a model: its file, inputs, outputs and parity result."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: Mapping[str, AxisRange]
    opset: int
    precision: Precision = "fp32"
    """Of the arithmetic, outside of ``fp32_nodes``."""
    fp32_nodes: Mapping[str, int] = field(default_factory=dict)
    """Why nodes of a half-precision graph stay FP32, and how many for each reason."""
    fp32_accumulation: int = 0
    """Number of matrix products of a float16 graph that are added in FP32 on every GPU."""
    parity: Parity | None = None
    plans: Mapping[str, PlanSpec] = field(default_factory=dict)
    """TensorRT engines of this graph by `PlanSpec.key`. Those of version 0.1.0 are keyed by flavour alone."""
    openvino: Mapping[str, OpenVinoProof] = field(default_factory=dict)
    """Comparisons of OpenVINO's results with the official implementation, by `OpenVinoProof.processor`."""

    def plan_for(self, flavour: Flavour, gpu: str = "") -> PlanSpec | None:
        """The engine of a flavour that was built on the GPU of this name, else a hardware-compatible one, else any; or None."""
        plans = [plan for plan in self.plans.values() if plan.flavour == flavour]
        return min(plans, key=lambda plan: (plan.target != gpu, plan.target != AMPERE_OR_NEWER), default=None)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that the runtime needs to know about an exported model."""

    family: str
    variant: str
    precision: Precision = "fp32"
    """Requested precision; `GraphSpec.fp32_nodes` lists what stays FP32."""
    preprocess: Preprocess
    graphs: Mapping[str, GraphSpec]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of this family (logit scale, templates, thresholds); documented in its exporter."""
    tokenizer: str | None = None
    """File name of a `tokenizers` JSON in this folder."""
    weights: Mapping[str, str]
    """``source`` as typed, and ``sha256`` of the file (or of the seeded values)."""
    tools: Mapping[str, str]
    """Versions of the software that exported it."""
    files: Mapping[str, str] = field(default_factory=dict)
    """sha256 of every other file of the folder; checked before use."""
    format: int = FORMAT

    def identity(self) -> str:
        """A hash of everything that decides the model's results: its files, settings and preprocessing."""
        content = {"files": dict(self.files), "settings": dict(self.settings), "preprocess": dataclasses.asdict(self.preprocess)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Model:
    """An exported model on disk: its folder and manifest."""

    folder: Path
    manifest: Manifest

    def path(self, graph: str) -> Path:
        """Path of a graph's ONNX file."""
        return self.folder / self.graph(graph).file

    def graph(self, name: str) -> GraphSpec:
        """A graph's spec. Raises BundleError, which lists the graphs of the model."""
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
        """Names of the models in the bundle, sorted."""
        return sorted(path.parent.name for path in self.folder.glob("*/manifest.json") if not path.parent.name.startswith("."))

    def model(self, name: str) -> Model:
        """Open a model and check its files against the hashes of its manifest.

        Raises:
            BundleError: the model is missing, its manifest is invalid, or a file is missing, changed, outside the folder, or
            without a hash.
        """
        folder = self.folder / name
        restore(folder)
        if not (folder / "manifest.json").is_file():
            names = ", ".join(self.models()) or "no models"
            raise BundleError(
                f"{self.folder}: this run needs the model {name!r}, the bundle has {names}",
                hint=f"wsss export --model {name} --bundle {self.folder}",
            )
        manifest = read_manifest(folder)
        for file, expected in manifest.files.items():
            check_file(folder, file, expected)
        graphs = {graph.file for graph in manifest.graphs.values()}
        used = dict.fromkeys(graphs | ({manifest.tokenizer} if manifest.tokenizer else set()), "manifest.json")
        for graph in sorted(graphs & manifest.files.keys()):
            used |= dict.fromkeys(external_files(folder / graph), graph)
        for file in sorted(used.keys() - manifest.files.keys()):
            raise BundleError(
                f"{folder / used[file]}: uses {file!r} without its sha256 in `files` of the manifest",
                hint="export the model again",
            )
        return Model(folder, manifest)


def open_bundle(folder: Path) -> Bundle:
    """Open the bundle in ``folder``. Raises BundleError if there is none."""
    bundle = Bundle(folder)
    for old in folder.glob(".*.old-*"):  # left by an export that was killed while it replaced a model
        restore(folder / old.name[1:].rpartition(".old-")[0])
    if not folder.is_dir():
        raise BundleError(f"{folder}: expected a bundle folder, found nothing", hint=f"wsss export --model all --bundle {folder}")
    if not bundle.models():
        raise BundleError(
            f"{folder}: expected a bundle (MODEL/manifest.json), found no model in it",
            hint=f"wsss export --model all --bundle {folder}",
        )
    return bundle


def check_file(folder: Path, name: str, expected: str, *, again: str = "export the model again") -> None:
    """Raises BundleError, with the hint ``again``, unless ``folder/name`` is a file with the sha256 ``expected``.

    It may be a link to a file of the same folder, or, if the folder is below ``snapshots/``, to a file of the ``blobs/`` beside
    that, where the cache of the Hugging Face hub stores files under their hashes.
    """
    path = folder / name
    if name in ("", "..") or Path(name).name != name or "\\" in name or len(name.encode()) > 255:
        raise BundleError(f"{folder / 'manifest.json'}: names {name!r:.80}, expected a plain file of the same folder", hint=again)
    if path.is_symlink():
        _check_link(path, again)
    if not path.is_file():
        raise BundleError(f"{path}: listed in the manifest but missing", hint=again)
    try:
        got = sha256_of(path)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}", hint="make it readable") from None
    if got != expected:
        raise BundleError(
            f"{path}: its sha256 is {got[:12]}..., the manifest says {expected[:12]}...: changed or truncated", hint=again
        )


def _check_link(path: Path, again: str) -> None:
    try:
        target, folder = path.resolve(strict=True), path.parent.resolve()
    except (OSError, RuntimeError):  # RuntimeError: a loop of links
        raise BundleError(f"{path}: a link to {os.readlink(path)}, which does not exist", hint=again) from None
    caches = [above.parent / "blobs" for above in (folder, *folder.parents) if above.name == "snapshots"]
    if target.parent not in (folder, *caches):
        raise BundleError(
            f"{path}: a link to {target}, outside of {folder} and of a cache's `blobs` beside its `snapshots`",
            hint="copy the bundle with files in place of links: cp -rL BUNDLE COPY",
        )


def sha256_of(path: Path) -> str:
    """sha256 of a file, hex. Cached until the file's inode, size or times change."""
    status = path.stat()
    # rsync and tar set the modification time back; the time of the last inode change cannot be set.
    return _sha256(path, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))


@lru_cache(maxsize=1024)
def _sha256(path: Path, state: tuple[int, ...]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``folder/manifest.json`` atomically. Raises OSError."""
    text = json.dumps(dataclasses.asdict(manifest), indent=1, ensure_ascii=False)
    write_atomically(folder / "manifest.json", f"{text}\n".encode())


AGAIN = "export the model again, or use the version of wsss that wrote it"


def read_manifest(folder: Path) -> Manifest:
    """Read a model's manifest and check every field. Raises BundleError, which names the file and the field."""
    path = folder / "manifest.json"
    data = read_bytes(path, error=BundleError, hint=AGAIN, max_bytes=MAX_MANIFEST)
    record = parse_json(data, str(path), error=BundleError, hint=AGAIN)
    version = record.get("format") if isinstance(record, dict) else type(record).__name__
    if type(version) is not int or version != FORMAT:
        raise BundleError(f"{path}: expected manifest format {FORMAT}, got {version!s:.40}", hint=AGAIN)
    _rename_old_keys(record)
    try:
        manifest = checked(Manifest, record, "")
        _check_manifest(manifest)
    except SpecError as error:
        raise BundleError(f"{path}: not a valid manifest: {error.message}", hint=AGAIN) from None
    return manifest


def _rename_old_keys(record: dict[str, Any]) -> None:
    """Turns the key ``islands`` of a graph, which earlier versions wrote, into ``fp32_nodes``, in place."""
    graphs = record.get("graphs")
    for graph in graphs.values() if isinstance(graphs, dict) else ():
        if isinstance(graph, dict) and "islands" in graph and "fp32_nodes" not in graph:
            graph["fp32_nodes"] = graph.pop("islands")


MAX_MANIFEST = 1 << 24
"""Bytes. A model of the chain takes 20 kB, the longest parity report a few hundred kB."""
MAX_SIDE = 1 << 15
"""Pixels of a side of a canvas, or of a resized photograph."""
MAX_LENGTH = (1 << 31) - 1
"""Size of an axis: TensorRT's limit."""


def _check_manifest(manifest: Manifest) -> None:
    pre = manifest.preprocess
    if not manifest.graphs:
        raise SpecError("graphs: expected one or more, got none")
    if not pre.canvases or not all(1 <= side <= MAX_SIDE for canvas in pre.canvases for side in canvas):
        raise SpecError(f"preprocess.canvases: expected sizes of 1 to {MAX_SIDE} pixels, got {list(pre.canvases)!r:.80}")
    if not (1 <= pre.longest_px <= MAX_SIDE and 0 <= pre.short_px <= MAX_SIDE):
        raise SpecError(f"preprocess: expected sides of at most {MAX_SIDE} pixels, got {pre.longest_px} and {pre.short_px}")
    if min(pre.std) <= 0:
        raise SpecError(f"preprocess.std: expected numbers above 0, got {list(pre.std)}")
    for file, sha256 in manifest.files.items():
        _check_sha256(sha256, f"files.{file}")
    for name, graph in manifest.graphs.items():
        _check_graph(graph, f"graphs.{name}")
        required = {axis for tensor in graph.inputs for axis in tensor.shape if isinstance(axis, str)}
        required |= set(AXES.get((manifest.family, name.partition("-")[0]), ()))
        for axes in (graph.axes, *(plan.axes for plan in graph.plans.values())):
            if missing := sorted(required - axes.keys()):
                raise SpecError(f"graphs.{name}: expected the range of axis {missing[0]!r}, got those of {sorted(axes)!r:.80}")
    settings = dict(manifest.settings)
    for name, kind in SETTINGS.get(manifest.family, {}).items():
        if name not in settings:
            raise SpecError(f"settings: expected {name!r}, got {', '.join(settings) or 'none'}")
        checked(kind, settings[name], f"settings.{name}")
    if manifest.family == "grounding-dino":
        _check_scores(settings)


def _check_scores(settings: Mapping[str, Any]) -> None:
    """Raises SpecError unless the detector's settings have a rule of scores, and its threshold."""
    checked(ScoreRule, settings.get("score_rule", "mean"), "settings.score_rule")
    if not {"box_thresholds", "box_threshold"} & settings.keys():
        raise SpecError(f"settings: expected 'box_thresholds', got {', '.join(settings) or 'none'}")
    if "box_thresholds" in settings:
        checked(Mapping[ScoreRule, float], settings["box_thresholds"], "settings.box_thresholds")
    else:
        checked(float, settings["box_threshold"], "settings.box_threshold")
    rule, thresholds = box_thresholds(settings)
    if rule not in thresholds:
        raise SpecError(f"settings.box_thresholds: expected that of the rule {rule!r}, got {', '.join(thresholds) or 'none'}")


def box_thresholds(settings: Mapping[str, Any]) -> tuple[ScoreRule, dict[ScoreRule, float]]:
    """The rule of a detector's scores, and the lowest score of a box by rule: a threshold fits only the rule it belongs to.

    Bundles of earlier versions have one number, ``box_threshold``, which they applied to the mean.

    Args:
        settings: of the manifest of a ``grounding-dino``.
    """
    rule: ScoreRule = settings.get("score_rule", "mean")
    old = {rule: settings["box_threshold"]} if "box_threshold" in settings else {}
    return rule, {name: float(value) for name, value in settings.get("box_thresholds", old).items()}


SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "clip": {
        **dict.fromkeys(("context_length", "pad", "end"), int),
        **dict.fromkeys(("logit_scale", "threshold"), float),
        **dict.fromkeys(("templates", "backgrounds"), tuple[str, ...]),
        "views": tuple[int, ...],
    },
    "grounding-dino": dict.fromkeys(("cls", "sep", "dot", "pad", "max_tokens"), int),
    "sam": {"logits_side": int},
    "sam3": {**dict.fromkeys(("context_length", "pad", "end", "queries", "logits_side"), int), "box_threshold": float},
    "segmenter": {"overlap_px": int, "classes": tuple[str, ...]},
}
"""The `Manifest.settings` that the runtime requires, by family; the detector's rule and thresholds: `box_thresholds`."""
AXES: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("clip", "image"): ("batch",),
    ("clip", "text"): ("batch",),
    ("grounding-dino", "text"): ("phrases", "length"),
    ("grounding-dino", "image"): ("batch", "tokens"),
    ("sam", "encoder"): ("batch",),
    ("sam", "decoder"): ("images", "boxes"),
    ("sam", "fuse"): ("picked", "height", "width"),
    ("sam3", "text"): ("phrases",),
    ("sam3", "vision"): ("batch",),
    ("sam3", "detector"): ("images", "phrases"),
    ("sam3", "outline"): ("images", "phrases", "outlined", "slots", "boxes"),
    ("sam3", "fuse"): ("picked", "height", "width"),
    ("segmenter", "image"): ("batch",),
}
"""Axes whose ranges the runtime requires, by family and graph (without its canvas)."""


def _check_graph(graph: GraphSpec, where: str) -> None:
    if not graph.file.endswith(".onnx"):  # ONNX Runtime reads .ort files as another format, which is not checked here
        raise SpecError(f"{where}.file: expected a name that ends in .onnx, got {graph.file!r:.80}")
    for tensor in (*graph.inputs, *graph.outputs):
        if not all(1 <= axis <= MAX_LENGTH for axis in tensor.shape if isinstance(axis, int)):
            raise SpecError(f"{where}: expected axes of 1 to {MAX_LENGTH}, got {tensor}")
    for kind, tensors in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise SpecError(f"{where}.{kind}: expected unique names, got {', '.join(tensor.name for tensor in tensors)}")
    for axes in (graph.axes, *(plan.axes for plan in graph.plans.values())):
        if any(axis.max > MAX_LENGTH for axis in axes.values()):
            raise SpecError(f"{where}.axes: expected at most {MAX_LENGTH}, got {max(axis.max for axis in axes.values())}")
    for key, plan in graph.plans.items():
        if key not in (plan.key, plan.flavour):
            raise SpecError(f"{where}.plans.{key}: holds an engine of {plan.key}")


def _check_sha256(text: str, where: str) -> None:
    if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
        raise SpecError(f"{where}: expected a sha256 in hex, got {text!r:.80}")
