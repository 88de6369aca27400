"""Checkpoints, seeded weights and the tokenizer of SAM 3."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Sam3Config, Sam3Model

from ...errors import WeightsError
from .. import mini
from ..clip.tokenizer import tokenizer_from_open_clip
from ..weights import load_exactly, random_seed, read_checkpoint, spread, weights_record

NAME = "facebook/sam3"
"""The official weights, which the publisher gives to those who accept the SAM License."""
GATED = (
    f"accept the SAM License at https://huggingface.co/{NAME}, then: hf download {NAME} model.safetensors --local-dir sam3, and "
    "--weights sam3"
)
MINI = "sam3_mini"
_SMALL = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "num_layers": 2, "dropout": 0.0}
CONFIGS: dict[str, Mapping[str, Any]] = {
    "sam3": {},
    MINI: {
        "vision_config": {
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "image_size": 112,
                "window_size": 3,
                "global_attn_indexes": [1, 3],
                "pretrain_image_size": 42,
            },
            "fpn_hidden_size": 64,
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        },
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": mini.clip_mini_tokenizer().get_vocab_size(),
            "hidden_size": 48,
            "intermediate_size": 96,
            "projection_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": mini.CLIP_MINI_CONTEXT,
            "hidden_act": "gelu",
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        "geometry_encoder_config": {**_SMALL, "num_layers": 1},
        "detr_encoder_config": _SMALL,
        "detr_decoder_config": {**_SMALL, "num_queries": 24},
        "mask_decoder_config": {"hidden_size": 64, "num_attention_heads": 4},
    },
}
"""Settings that are not those of ``facebook/sam3`` (the defaults of ``Sam3Config``). The small one has random weights only; its
windows do not divide its image, so that they are padded."""


def build(variant: str) -> Sam3Model:
    """The official class in eval mode, with transformers' initial weights."""
    return Sam3Model(Sam3Config(**CONFIGS[variant])).eval().requires_grad_(False)


def load(variant: str, weights: str) -> tuple[Sam3Model, dict[str, str]]:
    """Load the official module in eval mode, with the `weights_record` for the manifest.

    Args:
        weights: a safetensors file of ``facebook/sam3`` in transformers' names, or its folder, or ``random:SEED``.

    Raises:
        WeightsError: a checkpoint that is missing, damaged, or of another model.
    """
    seed = random_seed(weights)
    if seed is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build(variant)
            for module in model.modules():  # transformers' initial weights are so small that all scores are alike
                if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                    module.reset_parameters()
        spread(model, seed)
        _sharpen(model)
        return model, weights_record(weights, None, model)
    path = Path(weights).expanduser()
    if not path.exists():
        what = "the publisher asks for an agreement first" if weights == NAME else "no such file or folder"
        raise WeightsError(f"--weights {weights}: {what}", hint=GATED)
    state = image_part(read_checkpoint(path))
    with torch.device("meta"):
        model = build(variant)
    load_exactly(model, state, path=path, what=f"SAM 3 ({variant})", assign=True)
    _fill_buffers(model, variant)
    return model, weights_record(weights, path, model)


def image_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``Sam3Model`` in a checkpoint, which may be that of the video model, with a tracker beside the detector.

    Raises:
        WeightsError: names of the original repository, which transformers has others for.
    """
    if any("vision_backbone.trunk." in name for name in state):
        raise WeightsError(
            "this checkpoint has the names of facebookresearch/sam3 (sam3.pt), expected those of transformers, model.safetensors",
            hint=GATED,
        )
    prefix = "detector_model."
    if any(name.startswith(prefix) for name in state):
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return {name: value for name, value in state.items() if not name.startswith(("tracker_model.", "tracker_neck."))}


def _fill_buffers(model: Sam3Model, variant: str) -> None:
    """Compute the values that no checkpoint contains, and that are empty after building on the meta device."""
    empty = {name: value for name, value in model.named_buffers() if value.is_meta}
    for name in empty:
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        if last == "position_ids" and hasattr(module, "precompute_positions"):
            value = module.precompute_positions(module.config, module.window_size)
        elif last == "position_ids":
            value = torch.arange(module.position_embedding.weight.shape[0])[None]
        elif last in ("inv_freq", "original_inv_freq"):
            value, _ = module.compute_axial_rope_parameters(module.config)
        else:
            raise AssertionError(name)
        setattr(module, last, value)


SHARPER = 12.0
"""Factor of the last layers of seeded weights, which otherwise give every query of every phrase nearly the same score."""


@torch.no_grad()
def _sharpen(model: Sam3Model) -> None:
    heads = (
        model.dot_product_scoring.query_proj,
        model.detr_decoder.presence_head.layer3,
        model.mask_decoder.mask_embedder.layers[2],
    )
    for head in heads:
        head.weight.mul_(SHARPER)
    model.detr_decoder.reference_points.weight.mul_(2)


def tokenizer_of(variant: str, context: int) -> Tokenizer:
    """CLIP's tokenizer, which SAM 3 uses: ``encode`` gives ``context`` ids."""
    if variant == MINI:
        return mini.clip_mini_tokenizer()
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer

    official = SimpleTokenizer(context_length=context)
    return tokenizer_from_open_clip(official, where=f"open_clip {open_clip.__version__}")
