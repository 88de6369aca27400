"""Load a segmenter's initial weights: none, a file, a published model, or another run. Records what was loaded.

A source must fill the complete network or its complete encoder; anything else is refused as a mistake.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError, WeightsError
from ..reading.checkpoints import read_checkpoint, reason
from ..spec import sha256_of
from .args import TRANSFORMERS_OF_TIMM, Config
from .model import Segmenter

Weights = Mapping[str, Tensor]
SHOWN = 4
"""Tensors listed in an error."""
_STRIPPED = ("", "module.", "model.", "network.", "backbone.", "encoder.")
_ADDED = ("", "encoder.", "encoder.model.", "segformer.", "segformer.encoder.", "model.pixel_level_module.encoder.")
"""Prefixes that are removed from, and added to, a file's names to match the network's."""
_WRAPPERS = ("state_dict", "model", "model_state", "model_state_dict")
_TRANSFORMERS = ("segformer", "mask2former")


@dataclass(frozen=True, kw_only=True)
class Initial:
    """The source of a network's initial weights."""

    source: str
    """``none``, or the given source."""
    sha256: str = ""
    """sha256 of the file, if the source is one."""
    loaded: int = 0
    """Number of the network's tensors that were loaded."""
    random: tuple[str, ...] = ()
    """Names of the network's tensors that stayed random, unless all did."""
    unused: tuple[str, ...] = ()
    """Names of the source's tensors that the network does not have."""

    def __str__(self) -> str:
        if self.source == "none":
            return "random weights"
        left = f", {len(self.random)} stay random (from {self.random[0]})" if self.random else ""
        unused = f", {len(self.unused)} of the source unused (from {self.unused[0]})" if self.unused else ""
        return f"weights of {self.source}: {self.loaded} tensors loaded{left}{unused}"


def load_initial(segmenter: Segmenter, config: Config, classes: tuple[str, ...]) -> Initial:
    """Load the weights of ``model.init`` into a random segmenter.

    Raises:
        WeightsError: the source is missing or unreadable, fills neither the network nor its encoder, or has other classes.
        UsageError: the published weights need another normalization than ``data.mean`` and ``data.std``.
    """
    args, init = config.model, config.model.init
    if init == "none":
        return Initial(source=init)
    name = init.removeprefix("hub:")
    sha256 = ""
    if args.architecture in _TRANSFORMERS and (init.startswith("hub:") or (Path(init) / "config.json").is_file()):
        for path in sorted(Path(init).glob("*.bin")):
            read_checkpoint(path, where=f"--init {path}")  # transformers compares no checksums
        weights = _from_transformers(segmenter, name)
    elif init.startswith("hub:") and args.architecture in TRANSFORMERS_OF_TIMM:
        weights = _from_timm(segmenter, config, name)
    elif init.startswith("hub:"):
        weights = _from_smp(config, name)
    elif Path(init).is_dir():
        weights, sha256 = _from_run(Path(init), config, classes)
    else:
        weights, sha256 = read_weights(Path(init)), sha256_of(Path(init))
        if args.architecture == "eomt":  # the official files, whose other names are the network's
            weights = {name.replace("network.encoder.backbone.", "network.encoder."): value for name, value in weights.items()}
    report = fill(segmenter, weights, init, new_head=args.new_head)
    return dataclasses.replace(report, sha256=sha256)


def fill(segmenter: Segmenter, weights: Weights, source: str, *, new_head: bool) -> Initial:
    """Copy weights into the network by name and shape.

    Raises:
        WeightsError: they fill neither the complete network nor its complete encoder; or they have other classes, unless
            ``new_head``.
    """
    target: dict[str, Tensor] = segmenter.network.state_dict()
    given = _renamed(weights, target)
    loaded = [name for name, value in given.items() if name in target and target[name].shape == value.shape]
    other_shape = [name for name, value in given.items() if name in target and target[name].shape != value.shape]
    labels = segmenter.classes, segmenter.classes + 1  # a set predictor has one more, for "no object"
    is_classes = all(target[name].shape[0] in labels and target[name].shape[1:] == given[name].shape[1:] for name in other_shape)
    if other_shape and not (new_head and is_classes):
        name = other_shape[0]
        raise WeightsError(
            f"{source}: {name} is {tuple(given[name].shape)}, {segmenter.classes} labels need {tuple(target[name].shape)}",
            hint="--set model.new_head=true starts the classification layers at random"
            if is_classes
            else "these are weights of another architecture or encoder",
        )
    if not_finite := [name for name in loaded if not given[name].isfinite().all()]:
        raise WeightsError(
            f"{source}: expected finite weights, got NaN or infinity in {_some(not_finite)}",
            hint="these are weights of a failed training, or a damaged file",
        )
    random = [name for name in _names(segmenter) if name not in loaded]
    encoder = _encoder_names(segmenter)
    head = [name for name in _names(segmenter) if name not in encoder]
    is_head_missing = new_head and all(name in head and target[name].shape[0] in labels for name in random)
    if random and random != head and not is_head_missing:
        raise WeightsError(
            f"{source}: fills {len(loaded)} of the network's {len(loaded) + len(random)} tensors, which is neither all of it "
            f"nor its encoder; missing {_some(random)}; it has {_some(list(weights))}",
            hint="give weights of this architecture, or of its encoder",
        )
    segmenter.network.load_state_dict({name: given[name] for name in loaded}, strict=False)
    unused = tuple(name for name in given if name not in target)
    return Initial(source=source, loaded=len(loaded), random=tuple(random), unused=unused)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors or PyTorch file without running pickled code. Raises WeightsError."""
    if not path.exists():
        raise WeightsError(f"--init {path}: no such file", hint="none, hub:NAME, a weights file, or the folder of a run")
    content: Any = read_checkpoint(path, where=f"--init {path}")
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(f"--init {path}: no tensors in it", hint="give a state dict: tensors by the network's names")
    return tensors


def _from_smp(config: Config, name: str) -> Weights:
    """Download an encoder's published weights with segmentation-models-pytorch."""
    from segmentation_models_pytorch.encoders import get_encoder, get_preprocessing_params

    encoder = config.model.encoder
    try:
        parameters = get_preprocessing_params(encoder, name)
        weights: Weights = get_encoder(encoder, weights=name).state_dict()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise WeightsError(
            f"hub:{name}: the weights of {encoder} cannot be downloaded: {reason(error)}",
            hint="needs an internet connection; offline, give --init a file of the encoder's weights, or none",
        ) from None
    _check_normalization(config, name, parameters["mean"] or (), parameters["std"] or ())
    return {f"encoder.{key}": value for key, value in weights.items()}


def _from_timm(segmenter: Segmenter, config: Config, name: str) -> Weights:
    """Download a vision transformer's published weights with timm, which resamples them to the network's patches and image."""
    import timm

    encoder, patches = config.model.encoder, segmenter.encoder().patch_embed
    sizes = {"patch_size": patches.patch_size, "img_size": patches.img_size}
    try:
        model = timm.create_model(f"{encoder}.{name}", pretrained=True, num_classes=0, **sizes)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise WeightsError(
            f"hub:{name}: the weights of {encoder} cannot be downloaded: {reason(error)}",
            hint="needs an internet connection; offline, give --init a file of the encoder's weights, or none",
        ) from None
    _check_normalization(config, name, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    weights: Weights = model.state_dict()
    return {f"encoder.{key}": value for key, value in weights.items()}


def _check_normalization(config: Config, name: str, mean: Sequence[float], std: Sequence[float]) -> None:
    """Raises UsageError unless the settings have the normalization of published weights, given in 0..1 (if it is)."""
    for key, given, published in (("mean", config.data.mean, mean), ("std", config.data.std, std)):
        expected = [255 * value for value in published]
        if expected and max(abs(a - b) for a, b in zip(expected, given, strict=True)) > 1:
            raise UsageError(
                f"data.{key}: {config.model.encoder} with {name} needs {(needed := [round(value, 2) for value in expected])}, "
                f"got {list(given)}",
                hint=f"--set data.{key}={needed}",
            )


def _from_transformers(segmenter: Segmenter, name: str) -> Weights:
    """The tensors of a Hugging Face model or a folder in that format, without those that transformers initialized."""
    from transformers.utils import logging

    kind = type(segmenter.network)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # `fill` reports missing tensors itself
    try:
        model, found = kind.from_pretrained(
            name, config=segmenter.network.config, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(
            f"hub:{name}: cannot be loaded: {reason(error)}",
            hint="needs an internet connection; offline, give --init a folder with config.json and model.safetensors, or none",
        ) from None
    finally:
        logging.set_verbosity(verbosity)
    weights: dict[str, Tensor] = dict(model.state_dict())
    for key in found["missing_keys"]:
        weights.pop(key, None)
    for key, shape, _ in found["mismatched_keys"]:
        weights[key] = torch.empty(shape, device="meta")
    weights |= {key: torch.empty(0, device="meta") for key in sorted(found["unexpected_keys"])}
    return weights


def _from_run(folder: Path, config: Config, classes: tuple[str, ...]) -> tuple[Weights, str]:
    """The best weights of another run. Raises WeightsError if its network or classes differ."""
    from .checkpoint import read_record, weights_file, weights_of

    record = read_record(folder)
    was = f"{record.architecture} {record.encoder}"
    if (record.architecture, record.encoder) != (config.model.architecture, config.model.encoder):
        raise WeightsError(
            f"--init {folder}: a {was}, this run trains a {config.model.architecture} {config.model.encoder}",
            hint=f"--set model.architecture={record.architecture} --set model.encoder={record.encoder}",
        )
    if record.classes != classes and not config.model.new_head:
        raise WeightsError(
            f"--init {folder}: was trained for {len(record.classes)} classes ({_some(record.classes)}), "
            f"the store has {len(classes)} ({_some(classes)})",
            hint="--set model.new_head=true starts the classification layers at random",
        )
    weights = weights_of(folder)
    if record.classes != classes:  # remove their layers even if the number of classes is the same
        labels = len(record.classes) + 1, len(record.classes) + 2
        weights = {name: value for name, value in weights.items() if value.ndim == 0 or value.shape[0] not in labels}
    return weights, sha256_of(weights_file(folder))


def _renamed(weights: Weights, target: Weights) -> Weights:
    """``weights`` with the change of prefix that matches most of the network's names."""

    def changed(strip: str, add: str) -> dict[str, Tensor]:
        return {add + name.removeprefix(strip): value for name, value in weights.items()}

    options = [changed(strip, add) for strip in _STRIPPED for add in _ADDED]
    return max(options, key=lambda option: sum(name in target and target[name].shape == option[name].shape for name in option))


def _names(segmenter: Segmenter) -> list[str]:
    """Names of the tensors that weights must fill; the batch counts of norms have no effect."""
    return [name for name in segmenter.network.state_dict() if not name.endswith("num_batches_tracked")]


def _encoder_names(segmenter: Segmenter) -> set[str]:
    encoder = segmenter.encoder_parameters()
    prefixes = {name.rpartition(".")[0] for name, value in segmenter.network.named_parameters() if value in encoder}
    return {name for name in _names(segmenter) if name.rpartition(".")[0] in prefixes}


def _some(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
