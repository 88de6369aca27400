"""Settings of a training, grouped by the code that reads them. Imports no torch, so that the command line starts fast.

A configuration is a preset (`wsss.train.presets`), overridden by a TOML file, overridden by typed flags:

    [data]
    crop = 321            # on the command line: --crop 321, or --set data.crop=321
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from ..errors import UsageError
from ..reading.documents import parse_toml, read_toml

Value = str | int | float | bool | list[int] | list[float]
Tables = Mapping[str, Any]
"""A configuration in the form of TOML: ``{"seed": 0, "data": {"crop": 321}}``; settings may be missing."""

MAX_PARTS = 4
"""Parts of a setting's name: the depth of the tables."""
Architecture = Literal[
    "deeplabv2", "deeplabv3plus", "upernet", "unet", "smp-segformer", "segformer", "mask2former", "vit", "eomt"
]
SET_PREDICTORS, TRANSFORMERS_OF_TIMM = ("mask2former", "eomt"), ("vit", "eomt")
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""RGB on the 0-255 scale, as torchvision's ImageNet models were trained (torchvision/transforms/_presets.py)."""


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """The network and its initial weights."""

    architecture: Architecture = "deeplabv3plus"
    """segmentation-models-pytorch: deeplabv3plus, upernet, unet, smp-segformer. transformers: segformer, mask2former.
    deeplabv2: our own, a segmentation-models-pytorch encoder with the paper's head. vit: a vision transformer of timm, such as
    DINOv2 or DINOv3, with a linear head on its last layers. eomt: one with the queries of a set predictor in its last blocks."""
    encoder: str = "resnet101"
    """An encoder of segmentation-models-pytorch; b0 to b5 for segformer; swin-tiny, -small, -base or -large for
    mask2former; a model of timm for vit and eomt, such as vit_small_patch14_dinov2."""
    freeze_encoder: bool = False
    """Train only what is not the encoder, which then runs as in evaluation."""
    options: Mapping[str, Value] = field(default_factory=dict)
    """Further arguments of the architecture's constructor, for example ``encoder_output_stride = 8``."""
    init: str = "none"
    """``none`` (random, from the seed), ``hub:NAME`` (downloaded: a weight set of segmentation-models-pytorch such as
    imagenet, a weight set of timm such as lvd142m for vit and eomt, or a model name for transformers), a weights file, or the
    folder of another run."""
    new_head: bool = False
    """Start the classification layers at random if the given weights have other classes."""
    batch_norm: Literal["train", "frozen", "fixed", "sync"] = "train"
    """train: statistics of each process's batch. frozen: those of the initial weights, while scale and shift are trained.
    fixed: those of the initial weights, and their scale and shift. sync: statistics over all processes (torch's SyncBatchNorm;
    GPUs only)."""
    batch_norm_momentum: float = 0.0
    """Weight of a batch in the running statistics of the encoder's batch norms; 0: as the encoder is built, mostly 0.1."""

    def __post_init__(self) -> None:
        _within("model.batch_norm_momentum", self.batch_norm_momentum, 0, 1)
        if self.batch_norm == "fixed" and self.init == "none":
            raise UsageError(
                "model.batch_norm = fixed: random weights have no statistics that could stay as they are",
                hint="--set model.batch_norm=train, or initial weights (--init)",
            )


@dataclass(frozen=True, kw_only=True)
class DataArgs:
    """Images, crops and augmentation."""

    crop: int = 512
    """Side of the square training crop, pixels."""
    largest_share: float = 1.0
    """A crop in which one label covers more than this share is drawn again, up to ten times, to avoid crops of background
    only (mmsegmentation's ``cat_max_ratio``, 0.75 there)."""
    batch: int = 16
    """Images per optimizer step, over all processes and forward passes together."""
    accumulate: int = 1
    """Forward passes per step on each process."""
    shorter_px: int = 0
    """Every image is first resized so that its shorter side has this many pixels and its longer one at most four times as many,
    in training and inference (mmsegmentation's ``Resize`` with ``keep_ratio``), so that object sizes vary less.
    0: images keep their own scale."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest factor, drawn uniformly, by which an image is resized before the crop, after ``shorter_px``."""
    scales: tuple[float, ...] = ()
    """Factors of which one is drawn instead, for example [0.5, 0.75, 1.0]; empty: any factor of ``scale``."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Random changes of brightness, contrast, saturation and hue, each applied with probability 0.5 (mmsegmentation's
    ``PhotoMetricDistortion``): the largest brightness that is added, as a share of 255; the largest deviation of the factors of
    contrast and saturation from 1; and the largest turn of the hue, as a share of the circle."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """RGB on the 0-255 scale, subtracted from the pixels."""
    std: tuple[float, float, float] = IMAGENET_STD
    """RGB on the 0-255 scale, by which the pixels are divided."""
    balance: Literal["none", "weights", "sampling"] = "none"
    """Handling of rare classes. weights: weights 1 / log(1.02 + share of pixels) in the loss (ENet, arXiv:1606.02147, section
    5.2). sampling: images of rare classes are drawn more often, by LVIS's repeat factors (arXiv:1908.03195, appendix B.1)."""
    sampling_threshold: float = 0.05
    """Share of images with a class below which ``sampling`` repeats them."""
    validation_share: float = 0.05
    """Share of the store's images held out of the training to choose the best weights; selected by a hash of their path."""
    validation_limit: int = 500
    """Largest number of images held out."""

    def __post_init__(self) -> None:
        _at_least("data.crop", self.crop, 16)
        _at_least("data.batch", self.batch, 1)
        _at_least("data.accumulate", self.accumulate, 1)
        _at_least("data.shorter_px", self.shorter_px, 0)
        _at_least("data.validation_limit", self.validation_limit, 1)
        _within("data.flip", self.flip, 0, 1)
        _within("data.largest_share", self.largest_share, 0.1, 1)
        _within("data.sampling_threshold", self.sampling_threshold, 0, 1)
        _within("data.validation_share", self.validation_share, 0, 0.9)
        low, high = self.scale
        if not 0 < low <= high <= 8:
            raise UsageError(
                f"data.scale: expected [smallest, largest] with 0 < smallest <= largest <= 8, got {[low, high]}",
                hint="--set data.scale=[0.5, 2.0]",
            )
        if not all(0 < factor <= 8 for factor in self.scales):
            raise UsageError(
                f"data.scales: expected factors above 0 and at most 8, got {reprlib.repr(list(self.scales))}",
                hint="--set data.scales=[0.5, 1.0, 1.5]",
            )
        if min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise UsageError(
                f"data.jitter: expected four numbers >= 0, the hue at most 0.5, got {list(self.jitter)}",
                hint="--set data.jitter=[0.5, 0.5, 0.5, 0.1]",
            )
        if min(self.std) <= 0:
            raise UsageError(
                f"data.std: expected positive numbers, got {list(self.std)}", hint="--set data.std=[58.4, 57.1, 57.4]"
            )


@dataclass(frozen=True, kw_only=True)
class LossArgs:
    """The loss; `wsss.train.loss` cites the papers."""

    kind: Literal["cross-entropy", "bootstrapped", "symmetric", "generalized", "hard", "masks"] = "cross-entropy"
    """bootstrapped, symmetric and generalized: for wrong labels. hard: cross-entropy of hard pixels alone, for clean labels.
    masks: the set loss, for mask2former and eomt only."""
    confidence: Literal["off", "box", "pixel"] = "off"
    """What weights the loss of a pixel. off: nothing. box: the rank of the label store's confidence in its class in that image.
    pixel: the rank of the pixel's own, from wsss label --confidence. Earlier versions had true for box and false for off."""
    confidence_floor: float = 0.1
    """Smallest such weight."""
    bootstrap: float = 0.8
    """bootstrapped: weight of the label; the rest is the weight of the network's own prediction."""
    symmetric: tuple[float, float] = (1.0, 1.0)
    """symmetric: weights of the cross-entropy and of the reverse cross-entropy."""
    generalized: float = 0.7
    """generalized: its q. Towards 0 it is the cross-entropy; 1 is the mean absolute error, which wrong labels affect least."""
    hard: float = 0.7
    """hard: pixels to whose label the network gives a higher probability have no loss."""
    region: Literal["none", "dice", "lovasz"] = "none"
    """A loss of the overlap of each image's regions that is added."""
    region_weight: float = 1.0
    """Its weight."""
    teacher: float = 0.0
    """Leave out pixels for whose label the running average of the weights (``optimizer.average``) prefers another with at least
    this probability, for example 0.9; 0: none."""
    teacher_from: int = 1000
    """Step from which on it does."""

    def __post_init__(self) -> None:
        _within("loss.confidence_floor", self.confidence_floor, 0.0, 1)
        _within("loss.bootstrap", self.bootstrap, 0, 1)
        _within("loss.generalized", self.generalized, 0.01, 1)
        _within("loss.hard", self.hard, 0.01, 1)
        _within("loss.region_weight", self.region_weight, 0, 100)
        _within("loss.teacher", self.teacher, 0, 1)
        _at_least("loss.teacher_from", self.teacher_from, 0)
        if min(self.symmetric) < 0 or max(self.symmetric) == 0:
            raise UsageError(
                f"loss.symmetric: expected two numbers >= 0 that are not both 0, got {list(self.symmetric)}",
                hint="--set loss.symmetric=[1.0, 1.0]",
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerArgs:
    """Optimizer, learning rate schedule and duration."""

    kind: Literal["sgd", "adamw"] = "sgd"
    steps: int = 20_000
    """Number of optimizer steps."""
    rate: float = 1e-3
    """Peak learning rate of the encoder."""
    head_factor: float = 10.0
    """Factor of the learning rate of all other layers."""
    layer_decay: float = 1.0
    """Factor of the learning rate from each layer of a vision transformer to the one before (BEiT, arXiv:2106.08254, appendix
    H), for example 0.75."""
    head_bias_factor: float = 1.0
    """Further factor of the learning rate of their biases (DeepLab v2: 2); biases of norms are not meant."""
    momentum: float = 0.9
    """SGD's momentum; AdamW's first beta."""
    weight_decay: float = 1e-4
    """Decay of the weights in units of the learning rate, except for those of ``no_decay``."""
    no_decay: Literal["auto", "none", "vectors", "encoder-norms", "norms-and-embeddings", "head-biases"] = "auto"
    """Parameters without weight decay. auto: vectors under adamw, none under sgd. vectors: all with one axis, such as biases and
    norms. encoder-norms: norms of the encoder (SegFormer). norms-and-embeddings: norms, embeddings and tables of positions
    (Mask2Former). head-biases: biases outside the encoder, except those of norms (DeepLab v2)."""
    schedule: Literal["poly", "cosine"] = "poly"
    schedule_every: int = 1
    """Steps between two changes of the scheduled rate (DeepLab v2: 10)."""
    power: float = 0.9
    """poly: rate x (1 - step / steps) ^ power (ParseNet, arXiv:1506.04579)."""
    warm_up: int = 0
    """Steps in which the rate rises linearly, from a millionth (mmsegmentation's ``warmup_ratio``)."""
    encoder_warm_up: int = 0
    """Steps, after ``warm_up``, in which that of the encoder does. Before, it is zero, so that a random head does not spoil the
    encoder (EoMT, arXiv:2503.19108). 0: ``warm_up`` is for both."""
    clip_norm: float = 0.0
    """Largest norm of the gradient; 0: not clipped."""
    average: float = 0.0
    """Decay of a running average of the weights, which then replaces them in the result, for example 0.999; 0: no average."""
    precision: Precision = "fp32"
    """Precision of the forward pass (bf16 and fp16: autocast); weights, loss and optimizer stay float32. fp16 scales the loss.
    tf32: matrix products of a GPU round their factors to 10 bits. PyTorch lets convolutions do so in fp32 too."""

    def __post_init__(self) -> None:
        _at_least("optimizer.steps", self.steps, 1)
        _at_least("optimizer.warm_up", self.warm_up, 0)
        _at_least("optimizer.schedule_every", self.schedule_every, 1)
        _within("optimizer.rate", self.rate, 1e-12, 1e3)
        _within("optimizer.layer_decay", self.layer_decay, 0.01, 1)
        _within("optimizer.head_factor", self.head_factor, 1e-6, 1e6)
        _within("optimizer.head_bias_factor", self.head_bias_factor, 1e-6, 1e6)
        _within("optimizer.momentum", self.momentum, 0, 0.9999)
        _within("optimizer.weight_decay", self.weight_decay, 0, 10)
        _within("optimizer.power", self.power, 0, 10)
        _within("optimizer.clip_norm", self.clip_norm, 0, 1e6)
        _within("optimizer.average", self.average, 0, 0.999999)
        _at_least("optimizer.encoder_warm_up", self.encoder_warm_up, 0)
        if (total := self.warm_up + self.encoder_warm_up) >= self.steps:
            both = " + optimizer.encoder_warm_up" if self.encoder_warm_up else ""
            raise UsageError(
                f"optimizer.warm_up{both}: expected less than {self.steps} steps, got {total}",
                hint="lower it, or raise --steps",
            )


@dataclass(frozen=True, kw_only=True)
class MachineArgs:
    """Settings that change the speed but not the result: a run may be continued with other values."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int = -1
    """Processes that load images, per training process. -1: as many as it has cores, at most 8; 0: it loads them itself."""
    channels_last: bool = True
    """Memory order of images and kernels: faster convolutions on most machines."""
    compile: bool = False
    """Use torch.compile: a slow start, then faster steps."""
    cudnn_benchmark: bool = True
    """Let cuDNN time its kernels in the first step, and take the fastest. Two runs may then differ by rounding on a GPU."""
    checkpoint_seconds: float = 180.0
    """Time between checkpoints; 0: one every step."""
    log_steps: int = 20
    """Steps between two points of the curve."""
    tensorboard: bool = False
    """Also write the curve for TensorBoard (``pip install tensorboard``)."""

    def __post_init__(self) -> None:
        _at_least("machine.workers", self.workers, -1)
        _at_least("machine.log_steps", self.log_steps, 1)
        _within("machine.checkpoint_seconds", self.checkpoint_seconds, 0, 1e9)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The complete configuration, as written to a run's ``config.json``."""

    preset: str = ""
    source: str = ""
    """Source of the preset's numbers."""
    seed: int = 0
    """Seed of the random weights, the order of the images, their augmentation and dropout."""
    validation_steps: int = 1000
    """Steps between two validations."""
    model: ModelArgs = field(default_factory=ModelArgs)
    data: DataArgs = field(default_factory=DataArgs)
    loss: LossArgs = field(default_factory=LossArgs)
    optimizer: OptimizerArgs = field(default_factory=OptimizerArgs)
    machine: MachineArgs = field(default_factory=MachineArgs)

    def __post_init__(self) -> None:
        _at_least("seed", self.seed, 0)
        _at_least("validation_steps", self.validation_steps, 1)
        is_masks = self.model.architecture in SET_PREDICTORS
        if is_masks != (self.loss.kind == "masks"):
            kinds = "masks" if is_masks else "cross-entropy, bootstrapped, symmetric, generalized or hard"
            raise UsageError(
                f"loss.kind: expected {kinds} for {self.model.architecture}, got {self.loss.kind}",
                hint=f"--set loss.kind={'masks' if is_masks else 'cross-entropy'}",
            )
        if is_masks and self.loss.region != "none":
            raise UsageError(
                f"loss.region = {self.loss.region}: the loss of masks has a dice loss of its own", hint="--set loss.region=none"
            )
        if self.loss.teacher and not self.optimizer.average:
            raise UsageError(
                "loss.teacher: needs a running average of the weights, whose predictions are compared with the labels",
                hint="--set optimizer.average=0.999",
            )
        if self.optimizer.layer_decay < 1 and self.model.architecture not in TRANSFORMERS_OF_TIMM:
            raise UsageError(
                f"optimizer.layer_decay: only vit and eomt have layers one after another, got {self.model.architecture}",
                hint="--set optimizer.layer_decay=1",
            )
        if is_masks and self.data.balance == "weights":
            raise UsageError("data.balance = weights: the loss of masks has no class weights", hint="--set data.balance=sampling")


def deciding(config: Config) -> dict[str, Any]:
    """The part of a configuration that decides the weights: all but ``machine``, as JSON values."""
    settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    del settings["machine"]
    return settings


def config_from(*layers: Tables) -> Config:
    """Merge layers into a configuration; later layers override earlier ones, key by key.

    ``model.options`` of the first layer, a preset, are dropped if the later ones give another architecture.

    Raises:
        UsageError: an unknown table or key (names the closest match), a value of the wrong type, or a contradiction.
    """
    first = dict(layers[0]) if layers else {}
    above: dict[str, Any] = {}
    for layer in layers[1:]:
        above = _merged(above, layer)
    was, now = first.get("model"), above.get("model")
    if (
        isinstance(was, Mapping)
        and isinstance(now, Mapping)
        and now.get("architecture", was.get("architecture")) != was.get("architecture")
    ):
        first["model"] = {key: value for key, value in was.items() if key != "options"}
    built: Config = _built(Config, _merged(first, above), "")
    return built


def read_config(path: Path) -> dict[str, Any]:
    """Read the tables of ``--config``. Raises UsageError if it is not a TOML file."""
    return read_toml(path, where=f"--config {path}", error=UsageError)


def typed(assignment: str) -> dict[str, Any]:
    """Parse ``data.crop=321`` into tables. A value that is not TOML is a string.

    Raises:
        UsageError: there is no ``=``.
    """
    key, equals, text = assignment.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {assignment}: expected TABLE.KEY=VALUE", hint="for example --set data.crop=321")
    parts = key.strip().split(".")
    if len(parts) > MAX_PARTS:
        raise UsageError(f"--set {key[:60]}: expected TABLE.KEY, got {len(parts)} parts", hint="for example --set data.crop=321")
    try:
        document = parse_toml(f"value = {text}", "--set", error=UsageError)
        tables: Any = document["value"] if len(document) == 1 else text.strip()
    except UsageError:
        tables = text.strip()
    for part in reversed(parts):
        tables = {part: tables}
    return dict(tables)


def _merged(below: Tables, above: Tables) -> dict[str, Any]:
    both = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], Mapping) and isinstance(above[key], Mapping):
            both[key] = _merged(below[key], above[key])
    return both


def _built(kind: type[Any], settings: Tables, prefix: str) -> Any:
    hints = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    for key in settings:
        if key not in known:
            near = get_close_matches(key[:60], known, 1)
            raise UsageError(
                f"there is no setting {prefix}{key[:60]}",
                hint=f"did you mean {prefix}{near[0]}?" if near else f"settings: {', '.join(prefix + name for name in known)}",
            )
    return kind(**{key: _value(value, hints[key], prefix + key) for key, value in settings.items()})


def of_this_version(key: str, value: Any) -> Any:
    """A setting's value as this version names it, for example ``box`` for ``loss.confidence = true`` of earlier ones."""
    return ("box" if value else "off") if key == "loss.confidence" and isinstance(value, bool) else value


def _value(value: Any, hint: Any, key: str) -> Any:
    """Check a value against a field's type; ints are accepted for floats, lists for tuples."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    value = of_this_version(key, value)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UsageError(f"{key}: expected a table [{key}], got {reprlib.repr(value)}", hint=f"--set {key}.NAME=VALUE")
        return _built(typing.cast(type[Any], hint), value, f"{key}.")
    if origin is Literal:
        if value not in inner:
            raise UsageError(
                f"{key}: expected one of {', '.join(inner)}, got {reprlib.repr(value)}", hint=f"--set {key}={inner[0]}"
            )
        return value
    if origin is tuple and inner[-1] is Ellipsis:
        if not isinstance(value, list | tuple):
            raise UsageError(f"{key}: expected numbers as [a, b, c], got {reprlib.repr(value)}", hint=f"--set {key}=[0.5, 1.0]")
        return tuple(_value(item, inner[0], key) for item in value)
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(inner):
            raise UsageError(
                f"{key}: expected {len(inner)} numbers as [a, b], got {reprlib.repr(value)}",
                hint=f"--set {key}=[{', '.join('1.0' for _ in inner)}]",
            )
        return tuple(_value(item, part, key) for item, part in zip(value, inner, strict=True))
    if origin is not None:  # Mapping[str, Value]
        if not isinstance(value, Mapping):
            raise UsageError(f"{key}: expected a table [{key}], got {reprlib.repr(value)}", hint=f"--set {key}.NAME=VALUE")
        for name, option in value.items():
            if not _is_plain(option):
                raise UsageError(
                    f"{key}.{name[:60]}: expected a string, numbers, or true or false, got {reprlib.repr(option)}",
                    hint="give an argument of the architecture's constructor",
                )
        return dict(value)
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise UsageError(f"{key}: expected {_KINDS[hint]} of at most 64 bits", hint="give a smaller one")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise UsageError(f"{key}: expected {_KINDS[hint]}, got {reprlib.repr(value)}", hint=f"--set {key}={_EXAMPLES[hint]}")
    return value


def _is_plain(value: Any, depth: int = 3) -> bool:
    if isinstance(value, Mapping | list):
        inner = list(value.values()) if isinstance(value, Mapping) else value
        return depth > 0 and all(_is_plain(item, depth - 1) for item in inner)
    return isinstance(value, str | bool) or (isinstance(value, int | float) and abs(value) < 1 << 63)  # false for NaN


_EXAMPLES: dict[type, str] = {int: "8", float: "0.5", bool: "true", str: "TEXT"}
_KINDS: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def _at_least(key: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"{key}: expected at least {least}, got {value}", hint=f"--set {key}={least}")


def _within(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UsageError(f"{key}: expected {low:g} to {high:g}, got {value:g}", hint=f"--set {key}={high:g}")
