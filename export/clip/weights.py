"""open_clip models from official weights: names, hub folders, single files, seeded values.

Facts that a state dict does not contain (QuickGELU, mean and standard deviation) come from open_clip's table of pretrained
tags, or from the ``open_clip_config.json`` beside the file. Without them, OpenAI's weights would get the wrong activation.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
import re
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from torch import Tensor, nn

from ...errors import UsageError, WeightsError
from ...reading.documents import parse_json, read_bytes
from ...spec import sha256_of
from .. import weights as checkpoints

HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Weights of an open_clip folder on the Hugging Face hub, preferred first (open_clip/constants.py)."""
FOLDER_FILES = (*HUB_FILES, "model.safetensors", "pytorch_model.bin")
CONFIG = "open_clip_config.json"
MAX_CONFIG = 1 << 20
"""Bytes; published files have a few hundred."""
LOGIT_SCALE = 100.0
"""Value at which training of CLIP clips it and ends (arXiv:2103.00020, section 2.5); used for seeded models."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Facts about weights that a state dict does not contain."""

    quick_gelu: bool
    mean: tuple[float, float, float]
    """RGB, on the 0-1 scale."""
    std: tuple[float, float, float]
    """RGB, on the 0-1 scale."""
    interpolation: str
    """Filter of the resize, ``bicubic`` or ``bilinear``."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """An open_clip model with its weights, in evaluation mode."""

    model: nn.Module
    """``CLIP``, ``CustomTextCLIP`` or ``CoCa``."""
    variant: str
    """The architecture in open_clip's spelling, ``-quickgelu`` included where it was forced."""
    recipe: Recipe
    record: Mapping[str, str]
    """Source and sha256, for the manifest."""


def load(variant: str, weights: str) -> Loaded:
    """Load an open_clip model by name.

    Args:
        variant: a name of ``open_clip.list_models()``; ``ViT-B/16`` means ``ViT-B-16``.
        weights: a file or folder, a pretrained tag of this variant (``openai``, ``laion2b_s34b_b88k``), ``random:SEED``.

    Raises:
        UsageError: no such variant; lists the closest names.
        WeightsError: no such weights, no network, a damaged file, or one of another architecture.
    """
    variant = known_variant(variant)
    seed = checkpoints.random_seed(weights)
    if seed is not None:
        recipe = recipe_of(variant, {})
        model = seeded(partial(build, variant), seed)
        return Loaded(model=model, variant=variant, recipe=recipe, record=checkpoints.weights_record(weights, None, model))
    path, config, pinned = _find(variant, weights)
    recipe = recipe_of(variant, config)
    if recipe.quick_gelu and not open_clip.get_model_config(variant).get("quick_gelu", False):
        variant = f"{variant}-quickgelu" if f"{variant}-quickgelu" in open_clip.list_models() else variant
    model = build(variant, quick_gelu=recipe.quick_gelu)
    load_checkpoint(model, path, variant=variant)
    record = checkpoints.weights_record(weights, path, model) | ({"pinned": pinned} if pinned else {})
    return Loaded(model=model, variant=variant, recipe=recipe, record=record)


def known_variant(name: str) -> str:
    """open_clip's spelling of a variant. Raises UsageError that lists the closest names."""
    variant = name.replace("/", "-").replace("@", "-")
    names = open_clip.list_models()
    if variant in names:
        return variant
    by_lower = {each.lower(): each for each in names}
    if variant.lower() in by_lower:
        return by_lower[variant.lower()]
    close = [by_lower[each] for each in difflib.get_close_matches(variant.lower(), by_lower, n=4, cutoff=0.4)]
    raise UsageError(
        f"--variant: open_clip {open_clip.__version__} has no model {name!r}",
        hint=f"close names: {', '.join(close or ['ViT-B-32', 'ViT-B-16', 'ViT-L-14', 'ViT-L-14-336'])}; or mini",
    )


def official_tag(variant: str) -> str:
    """The pretrained tag that is taken by default: OpenAI's weights where there are some, else the first in open_clip's table."""
    tags: list[str] = list_pretrained_tags_by_model(known_variant(variant))
    return "openai" if "openai" in tags or not tags else tags[0]


def build(variant: str, *, quick_gelu: bool = False) -> nn.Module:
    """Build open_clip's model, float32 on the CPU in evaluation mode, randomly initialized.

    Raises:
        WeightsError: a tower is defined on the Hugging Face hub, which cannot be reached.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # open_clip warns that weights are missing; they are loaded later
    try:
        model = open_clip.create_model(variant, load_weights=False, pretrained_text=False, force_quick_gelu=quick_gelu)
    except OSError as error:  # transformers cannot fetch the configuration of a text tower
        raise WeightsError(
            f"--variant {variant}: its text tower is defined on the Hugging Face hub: {first_line(error)}",
            hint="run once with a network, or use a variant that open_clip defines, for example ViT-B-16",
        ) from None
    finally:
        logging.disable(disabled)
    module: nn.Module = model.eval()
    return module


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model with weights from a seed, spread as trained ones are (`spread`), in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build().eval()
    spread(model, seed)
    return model


@torch.no_grad()
def spread(model: nn.Module, seed: int) -> None:
    """`weights.spread`, with the logit scale of a trained CLIP."""
    checkpoints.spread(model, seed)
    if getattr(model, "logit_bias", None) is None:  # SigLIP's initial scale and bias belong together
        scale = model.logit_scale
        assert isinstance(scale, Tensor)
        scale.fill_(math.log(LOGIT_SCALE))


def recipe_of(variant: str, config: Mapping[str, Any]) -> Recipe:
    """The recipe of weights of a variant.

    Args:
        config: the tag's entry in open_clip's table, or the flattened ``open_clip_config.json``; may be empty. Missing values
            are those of the variant's tags if these agree (SigLIP's mean), else OpenAI's.
    """
    tags = [get_pretrained_cfg(variant, tag) for tag in list_pretrained_tags_by_model(variant)]

    def value(name: str, default: Any) -> Any:
        agreed = {tag[name] for tag in tags if name in tag}
        return config.get(name, agreed.pop() if len(agreed) == 1 else default)

    return Recipe(
        quick_gelu=bool(config.get("quick_gelu", open_clip.get_model_config(variant).get("quick_gelu", False))),
        mean=tuple(value("mean", open_clip.OPENAI_DATASET_MEAN)),
        std=tuple(value("std", open_clip.OPENAI_DATASET_STD)),
        interpolation="bilinear" if value("interpolation", "bicubic") == "bilinear" else "bicubic",
    )


def load_checkpoint(model: nn.Module, path: Path, *, variant: str) -> None:
    """Load an open_clip state dict from a file into ``model``; all its keys must match.

    Raises:
        WeightsError: damaged, a TorchScript archive, of another format or architecture.
    """
    instructions = _manual_download(variant)
    if _is_torchscript(path):
        raise WeightsError(
            f"{path}: a TorchScript archive (OpenAI's original release); reading it would run the code inside",
            hint=f"use the same weights as safetensors: {instructions}",
        )
    state = checkpoints.read_checkpoint(path)
    if any(name.startswith("vision_model.") for name in state):
        raise WeightsError(f"{path}: the format of transformers' CLIPModel, expected open_clip's", hint=instructions)
    if all(name.startswith("module.") for name in state):  # saved from a DistributedDataParallel
        state = {name.removeprefix("module."): value for name, value in state.items()}
    expected = model.state_dict()
    state = convert_state_dict(model, state)
    if "positional_embedding" in state and "positional_embedding" not in expected:
        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):  # () in some releases, (1,) in others
        if name in state and name in expected and state[name].numel() == 1:
            state[name] = state[name].reshape(expected[name].shape)
    for name in ("text.transformer.embeddings.position_ids", "input_resolution", "context_length", "vocab_size"):
        if name not in expected:
            state.pop(name, None)
    checkpoints.load_exactly(model, state, path=path, what=f"CLIP {variant}")


def _find(variant: str, weights: str) -> tuple[Path, Mapping[str, Any], str]:
    """The weights file, the entry of its tag or its config, and `Download.pinned` of a download (empty for a file)."""
    path = Path(weights).expanduser()
    if path.is_dir():
        path = checkpoints.file_in(path, FOLDER_FILES)
    if path.exists():
        return path, _config_beside(path, variant), ""
    tag = get_pretrained_cfg(variant, weights)
    if not tag:
        tags = ", ".join(list_pretrained_tags_by_model(variant)) or "none for this variant"
        raise WeightsError(
            f"--weights {weights}: no such file, and open_clip knows no weights of that name for {variant}",
            hint=f"give a path, random:SEED, or one of: {tags}",
        )
    path, pinned = _download(tag, variant)
    return path, tag, pinned


def _config_beside(path: Path, variant: str) -> Mapping[str, Any]:
    """The recipe in ``open_clip_config.json`` beside a weights file, {} without one.

    Raises:
        WeightsError: it describes another architecture; the shapes of weights do not show, for example, the number of heads.
    """
    config = path.parent / CONFIG
    if not config.is_file():
        return {}
    hint = f"use the {CONFIG} that was published with the weights, or remove it"
    data = read_bytes(config, hint=hint, error=WeightsError, max_bytes=MAX_CONFIG)
    record = parse_json(data, str(config), hint=hint, error=WeightsError)
    model, recipe = (record.get(key) for key in ("model_cfg", "preprocess_cfg")) if isinstance(record, dict) else (None, None)
    recipe = {} if recipe is None else recipe
    towers = [model.get(part, {}) for part in ("vision_cfg", "text_cfg")] if isinstance(model, dict) else []
    if not isinstance(model, dict) or not isinstance(recipe, dict) or not all(isinstance(tower, dict) for tower in towers):
        raise WeightsError(f"{config}: expected open_clip's model_cfg and preprocess_cfg", hint=hint)
    official = open_clip.get_model_config(variant)
    clashes = [
        f"{section}{name} {value!r:.80} instead of {expected[name]!r}"
        for section, part, expected in (
            ("", model, official),
            ("vision_cfg.", model.get("vision_cfg", {}), official["vision_cfg"]),
            ("text_cfg.", model.get("text_cfg", {}), official["text_cfg"]),
        )
        for name, value in part.items()
        if name in expected and isinstance(value, int | list) and not isinstance(value, bool) and value != expected[name]
    ]
    if clashes:
        raise WeightsError(f"{config}: not a {variant}: {'; '.join(clashes[:3])}", hint="check --variant")
    for name, least in (("mean", 0.0), ("std", 1e-3)):
        if name in recipe:
            value = recipe[name]
            numbers = isinstance(value, list) and [type(each) in (int, float) and least <= each <= 1 for each in value]
            if numbers != [True] * 3:
                raise WeightsError(f"{config}: {name}: expected three numbers in {least:g}..1, got {value!r}"[:300], hint=hint)
            recipe[name] = tuple(value)
    for part, name, allowed, words in (
        (recipe, "interpolation", ["bicubic", "bilinear", "random"], "bicubic, bilinear or random"),  # random: in training
        (model, "quick_gelu", [True, False], "true or false"),
    ):
        if name in part and part[name] not in allowed:
            raise WeightsError(f"{config}: {name}: expected {words}, got {part[name]!r}"[:300], hint=hint)
    return {**recipe, "quick_gelu": model.get("quick_gelu", False)}


def _download(tag: Mapping[str, Any], variant: str) -> tuple[Path, str]:
    """Download the file of a pretrained tag from the Hugging Face hub or the URL in open_clip's table; returns it with
    `Download.pinned`."""
    repository, _, file = str(tag.get("hf_hub", "")).rpartition("/")
    if not repository:
        url = str(tag["url"])
        # open_clip's releases have 8 digits in their file names, OpenAI's URLs have all digits as a folder.
        named = Path(url).stem.rpartition("-")[2] if "mlfoundations" in url else url.rsplit("/", 2)[-2]
        what = checkpoints.Download(url, named if re.fullmatch("[0-9a-f]{8}|[0-9a-f]{64}", named) else "")
        return checkpoints.download(what, model="clip"), what.pinned
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    names = _hub_files(file)
    for name in names:
        if isinstance(cached := try_to_load_from_cache(repository, name), str):
            return _hub_file(Path(cached), repository)
    failure: Exception | None = None
    try:
        _check_network(constants.ENDPOINT)
        for name in names:
            try:
                return _hub_file(Path(hf_hub_download(repository, name, library_name="wsss")), repository)
            except EntryNotFoundError as error:  # this repository only has the older file
                failure = error
    except (OSError, ValueError) as error:
        failure = error
    raise WeightsError(
        f"{names[0]} of {repository}: cannot be downloaded from the Hugging Face hub: {first_line(failure)}",
        hint=_manual_download(variant, repository, names[0]),
    )


def _hub_file(path: Path, repository: str) -> tuple[Path, str]:
    """Check a file of the hub's cache, where large files are named by their sha256; returns it with its `Download.pinned`."""
    expected = path.resolve().name
    if re.fullmatch("[0-9a-f]{64}", expected) and (got := sha256_of(path)) != expected:
        raise WeightsError(
            f"{path}: its sha256 is {got[:12]}..., the Hugging Face hub says {expected[:12]}...: changed or truncated",
            hint=f"delete {path.resolve()} and run again",
        )
    return path, f"no: revision {path.parent.name} of {repository}"


def _check_network(address: str) -> None:
    """Raise OSError at once without a network; the hub's client would retry for a minute."""
    with contextlib.suppress(urllib.error.HTTPError):  # the server answers, if only with an error
        urllib.request.urlopen(address, timeout=10).close()


def _hub_files(file: str) -> tuple[str, ...]:
    if not file:
        return HUB_FILES
    return (f"{Path(file).stem}.safetensors", file) if file.endswith((".bin", ".pth")) else (file,)


def _manual_download(variant: str, repository: str = "", file: str = HUB_FILES[0]) -> str:
    """Instructions to get weights of a variant by hand, as a folder that also contains their config."""
    if not repository:
        tags: Iterable[str] = list_pretrained_tags_by_model(variant)
        hubs = [str(get_pretrained_cfg(variant, tag).get("hf_hub", "")) for tag in sorted(tags, key=lambda tag: tag != "openai")]
        repository = next((hub.rpartition("/")[0] for hub in hubs if hub), "timm/vit_base_patch16_clip_224.openai")
    return (
        f"put {file} and {CONFIG} from https://huggingface.co/{repository}/tree/main into a folder and run: "
        f"wsss export --model clip --variant {variant} --weights FOLDER"
    )


def _is_torchscript(path: Path) -> bool:
    if path.suffix == ".safetensors" or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name or name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):  # reported when the file is read
        return False


def first_line(error: Exception | None) -> str:
    """The first line of an error's message, or its class without one."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
