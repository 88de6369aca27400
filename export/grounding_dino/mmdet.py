"""Names of mmdetection's MM-Grounding-DINO checkpoints, as those of the official Grounding-DINO's."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_RENAMES: list[tuple[str, str]] = [
    (r"^backbone\.norm", "backbone.0.norm"),
    (r"^backbone\.patch_embed\.projection\.", "backbone.0.patch_embed.proj."),
    (r"^backbone\.patch_embed\.", "backbone.0.patch_embed."),
    (r"^backbone\.stages\.", "backbone.0.layers."),
    (r"^(backbone\.0\..*)\.attn\.w_msa\.", r"\1.attn."),
    (r"^(backbone\.0\..*)\.ffn\.layers\.0\.0\.", r"\1.mlp.fc1."),
    (r"^(backbone\.0\..*)\.ffn\.layers\.1\.", r"\1.mlp.fc2."),
    (r"^neck\.convs\.(\d+)\.conv\.", r"input_proj.\1.0."),
    (r"^neck\.convs\.(\d+)\.gn\.", r"input_proj.\1.1."),
    (r"^language_model\.language_backbone\.body\.model\.", "bert."),
    (r"^text_feat_map\.", "feat_map."),
    (r"^query_embedding\.", "transformer.tgt_embed."),
    (r"^memory_trans_fc\.", "transformer.enc_output."),
    (r"^memory_trans_norm\.", "transformer.enc_output_norm."),
    (r"^(level_embed$|encoder\.|decoder\.)", r"transformer.\1"),
    (r"\.(self_attn|cross_attn_text)\.attn\.", r".\1."),
    (r"^(transformer\..*)\.ffn\.layers\.0\.0\.", r"\1.linear1."),
    (r"^(transformer\..*)\.ffn\.layers\.1\.", r"\1.linear2."),
    (r"^(transformer\.encoder\..*)\.norms\.0\.", r"\1.norm1."),
    (r"^(transformer\.encoder\..*)\.norms\.1\.", r"\1.norm2."),
    # A decoder layer's norms are in the order of its parts here, and have other numbers in the official code.
    (r"^(transformer\.decoder\..*)\.norms\.0\.", r"\1.norm2."),
    (r"^(transformer\.decoder\..*)\.norms\.1\.", r"\1.catext_norm."),
    (r"^(transformer\.decoder\..*)\.norms\.2\.", r"\1.norm1."),
    (r"^(transformer\.decoder\..*)\.norms\.3\.", r"\1.norm3."),
    (r"\.cross_attn_text\.", ".ca_text."),
]
"""Applied in this order."""

_DROPPED = re.compile(r"^(dn_query_generator|ref_point_head|lmm|connector|region_connector|image_seperate)\.")
"""Of the training: denoising, LLMDet's language model, and a second name of ``decoder.ref_point_head``."""


def is_of_mmdet(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has mmdetection's names."""
    return any(name.startswith("neck.convs.") for name in state)


def official_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict, with the class heads and box heads as transformers' ``class_embed`` and ``bbox_embed``."""
    levels = len({name.split(".")[2] for name in state if name.startswith("neck.convs.")})
    heads = {int(name.split(".")[2]) for name in state if name.startswith("bbox_head.cls_branches.")}
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if _DROPPED.match(name):
            continue
        if extra := re.match(r"neck\.extra_convs\.(\d+)\.(.*)", name):
            name = f"neck.convs.{levels + int(extra[1])}.{extra[2]}"
        if head := re.match(r"bbox_head\.(cls|reg)_branches\.(\d+)\.(.*)", name):
            of_encoder = int(head[2]) == max(heads)  # the last head scores the encoder's cells
            kind = "class" if head[1] == "cls" else "bbox"
            place = f"transformer.enc_out_{kind}_embed." if of_encoder else f"{kind}_embed.{head[2]}."
            name = place + re.sub(r"^(\d)\.", lambda layer: f"layers.{int(layer[1]) // 2}.", head[3])  # between them are ReLUs
            value = value.reshape(()) if kind == "class" else value
        if ".downsample." in name:
            value = _quarters_first(value)
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def _quarters_first(value: Tensor) -> Tensor:
    """The last axis of a patch merging's weights, (4 C,), in Swin's order: a quarter of the cells after the other, columns first.

    mmdetection merges with ``torch.nn.Unfold``, whose order is channels, rows, columns.
    """
    by_cell = value.unflatten(-1, (-1, 2, 2))  # (..., C, row, column)
    return by_cell.movedim(-3, -1).transpose(-3, -2).flatten(-3)  # (..., column, row, C)
