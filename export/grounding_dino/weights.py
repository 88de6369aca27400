"""Weights and vocabulary of Grounding-DINO: official checkpoints with the parameter names of transformers' classes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor
from transformers import GroundingDinoConfig, MMGroundingDinoConfig, MMGroundingDinoForObjectDetection

from ...errors import WeightsError
from ...files import cache_folder
from ...reading.documents import parse_json, read_bytes
from ..mini import bert_wordpiece
from ..weights import (
    Download,
    download,
    find_weights,
    load_exactly,
    random_seed,
    read_checkpoint,
    spread,
    weights_record,
)
from . import mmdet
from .graphs import Detector

OFFICIAL: Mapping[str, Mapping[str, object]] = {
    "swin_t": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
    "swin_b": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12},
}
"""Backbones by variant (groundingdino/models/GroundingDINO/backbone/swin_transformer.py: swin_T_224_1k, swin_B_384_22k)."""
MM_BACKBONES: Mapping[str, Mapping[str, object]] = {
    "tiny": OFFICIAL["swin_t"],
    "base": OFFICIAL["swin_b"],
    "large": {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "window_size": 12},
}
"""Backbones of MM-Grounding-DINO and LLMDet by size (mmdetection, configs/mm_grounding_dino)."""

_RELEASES = "https://github.com/IDEA-Research/GroundingDINO/releases/download"
KNOWN = {
    "swint_ogc": Download(
        f"{_RELEASES}/v0.1.0-alpha/groundingdino_swint_ogc.pth",
        "3b3ca2563c77c69f651d7bd133e97139c186df06231157a64c507099c52bc799",
    ),
    "swinb_cogcoor": Download(
        f"{_RELEASES}/v0.1.0-alpha2/groundingdino_swinb_cogcoor.pth",
        "46270f7a822e6906b655b729c90613e48929d0f2bb8b9b76fd10a856f3ac6ab7",
    ),
}


def _of_openmmlab(folder: str, end: str) -> Download:
    """A checkpoint of mmdetection, whose name ends with the first eight digits of its sha256."""
    folder = f"grounding_dino_{folder}"
    address = f"https://download.openmmlab.com/mmdetection/v3.0/mm_grounding_dino/{folder}"
    return Download(f"{address}/{folder}{end}.pth", end[-8:])


KNOWN |= {
    "mm_grounding_dino_tiny_o365v1_goldg_v3det": _of_openmmlab("swin-t_pretrain_obj365_goldg_v3det", "_20231218_095741-e316e297"),
    "mm_grounding_dino_tiny_o365v1_goldg_grit_v3det": _of_openmmlab(
        "swin-t_pretrain_obj365_goldg_grit9m_v3det", "_20231204_095047-b448804b"
    ),
    "mm_grounding_dino_base_o365v1_goldg_v3det": Download(
        "https://download.openmmlab.com/mmdetection/v3.0/mm_grounding_dino/grounding_dino_swin-b_pretrain_obj365_goldg_v3det/"
        "grounding_dino_swin-b_pretrain_obj365_goldg_v3de-f83eef00.pth",
        "f83eef00",
    ),
    "mm_grounding_dino_base_all": _of_openmmlab("swin-b_pretrain_all", "-f9818a7c"),
    "mm_grounding_dino_large_o365v2_oiv6_goldg": _of_openmmlab("swin-l_pretrain_obj365_goldg", "-34dcdc53"),
    "mm_grounding_dino_large_all": _of_openmmlab("swin-l_pretrain_all", "-56d69e78"),
}
"""Named as on the Hugging Face hub (``openmmlab-community``)."""
KNOWN |= {
    name: Download(f"https://huggingface.co/iSEE-Laboratory/{name}/resolve/main/model.safetensors", "", f"{name}.safetensors")
    for name in ("llmdet_tiny", "llmdet_base", "llmdet_large")
}
"""Of the hub's newest revision: their publisher gives no hash."""
DEFAULT = {
    "swin_t": "swint_ogc",
    "swin_b": "swinb_cogcoor",
    "mm_tiny": "mm_grounding_dino_tiny_o365v1_goldg_v3det",
    "mm_base": "mm_grounding_dino_base_o365v1_goldg_v3det",
    "mm_large": "mm_grounding_dino_large_o365v2_oiv6_goldg",
}
"""Weights by variant, where their names differ. Of MM-Grounding-DINO, those that were not trained on COCO."""
VOCABULARY = Download(
    "https://huggingface.co/google-bert/bert-base-uncased/resolve/main/vocab.txt",
    "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
)


# ---- loading ----


def load(build: Callable[[], Detector], variant: str, weights: str) -> tuple[Detector, dict[str, str], Path | None]:
    """Load the model in evaluation mode; returns it with `weights_record` and the path of its weights (None if seeded).

    Args:
        build: makes the model of ``variant``, randomly initialized.
        weights: ``random:SEED``, a path, a known name, or ``mini``.

    Raises:
        WeightsError: the weights are missing, damaged, or of another architecture.
    """
    seed = random_seed(weights)
    if seed is not None:
        model = seeded(build, seed)
        return model, weights_record(weights, None, model), None
    path = find_weights(weights, KNOWN, model="grounding-dino", variant=variant)
    with torch.random.fork_rng(devices=[]):
        model = build()
    what = f"Grounding-DINO {variant}"
    if (path / "config.json").is_file():
        _check_config(path / "config.json", model.config, what)
    load_exactly(model, transformers_names(read_checkpoint(path), model), path=path, what=what)
    record = weights_record(weights, path, model)
    if record["source"] in KNOWN:
        record["pinned"] = KNOWN[weights].pinned
    return model.eval(), record, path


TEXT_GAIN = 1 / 8
"""Value to which training moves the gains of the last norm of the text, initially 1; see `seeded`."""

BIAS_SPREAD = 0.5
"""Largest difference of the bias of a seeded MM-Grounding-DINO's class head from the initial one, -4.6."""


@torch.no_grad()
def seeded(build: Callable[[], Detector], seed: int) -> Detector:
    """A model with the official initialization from ``seed``, then spread as trained weights are.

    A logit is the product of a query and a token, both with a norm of about 16 in 256 channels. Untrained, logits have a
    deviation of 13, from -46 to 55 (Swin-T, seed 0), and the focal loss on sigmoids makes them smaller in training: published
    ones are between -6.0 and -0.2 (grounding-dino-tiny, "a cat.", nine numbers in transformers' test), those of the small
    model trained here between -8.9 and -0.8. There the gains of the text's last norm went from 1 to 0.127, and all others
    stayed near 1. MM-Grounding-DINO, designed for training from scratch, divides by 16 (``log_scale="auto"``). With
    `TEXT_GAIN` the logits of six photographs have deviations of 1.7 to 3.2 and are between -7 and 11. Of MM-Grounding-DINO, only
    the biases of the class heads are spread, which initially are the same.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
    spread(model, seed)
    if isinstance(model, MMGroundingDinoForObjectDetection):
        heads = [*model.class_embed, model.model.encoder_output_class_embed]
        for head, shift in zip(heads, torch.linspace(-BIAS_SPREAD, BIAS_SPREAD, len(heads)), strict=True):
            head.bias.add_(shift)
        return model.eval()
    norm = model.model.encoder.layers[-1].text_enhancer_layer.layer_norm_after
    norm.weight.mul_(TEXT_GAIN)
    norm.bias.mul_(TEXT_GAIN)
    return model.eval()


_COMPARED: tuple[tuple[str | None, tuple[str, ...]], ...] = (
    ("backbone_config", ("model_type", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "out_indices")),
    ("text_config", ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")),
    (None, ("d_model", "num_queries", "num_feature_levels", "encoder_layers", "decoder_layers", "encoder_ffn_dim")),
    (None, ("encoder_attention_heads", "decoder_attention_heads", "two_stage", "embedding_init_target", "max_text_len")),
    (None, ("layer_norm_eps", "positional_embedding_temperature", "activation_function", "position_embedding_type")),
)
"""Settings that the shapes of weights do not show, by the part of the configuration that contains them."""
MAX_CONFIG = 1 << 20
"""Bytes; published files have ten thousand."""


def _check_config(path: Path, expected: GroundingDinoConfig | MMGroundingDinoConfig, what: str) -> None:
    hint = "use the config.json that was published with the weights"
    data = read_bytes(path, hint=hint, error=WeightsError, max_bytes=MAX_CONFIG)
    record = parse_json(data, str(path), hint=hint, error=WeightsError)
    # Only the compared settings: from a whole configuration, transformers would make lists as long as a number in it says.
    settings: dict[str, Any] = {}
    for part, names in _COMPARED:
        values = record if part is None or not isinstance(record, dict) else record.get(part) or {}
        if not isinstance(values, dict):
            raise WeightsError(f"{path}: expected the configuration of a Grounding-DINO, got {values!r:.80}", hint=hint)
        compared = {name: values[name] for name in (*names, "out_features") if name in values}
        settings |= compared if part is None else {part: compared} if values else {}
    try:
        config = type(expected).from_dict(settings)
    except Exception as error:  # transformers raises its own classes, and wrong types lead to many others
        raise WeightsError(f"{path}: expected the configuration of a Grounding-DINO: {error!s:.200}", hint=hint) from None
    faults = []
    for part, names in _COMPARED:
        for name in names:
            want, got = (getattr(getattr(each, part) if part else each, name, None) for each in (expected, config))
            want, got = (list(each) if isinstance(each, tuple) else each for each in (want, got))
            if want != got:
                faults.append(f"{part + '.' if part else ''}{name} {got!s:.80} instead of {want}")
    if faults:
        raise WeightsError(f"{path}: not the configuration of {what}: {'; '.join(faults[:4])}", hint="check --variant")


# ---- names ----

_RENAMES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    # official .pth, outside in
    (r"^backbone\.0\.norm(\d)\.", lambda m: f"model.backbone.conv_encoder.model.hidden_states_norms.stage{int(m[1]) + 1}."),
    (r"^backbone\.0\.patch_embed\.proj\.", "SWIN.embeddings.patch_embeddings.projection."),
    (r"^backbone\.0\.patch_embed\.norm\.", "SWIN.embeddings.norm."),
    (r"^backbone\.0\.layers\.", "SWIN.encoder.layers."),
    (r"^(SWIN.*\.blocks\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"^(SWIN.*\.blocks\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (r"^(SWIN.*)\.attn\.relative_position_bias_table$", r"\1.attention.relative_position_bias.relative_position_bias_table"),
    (r"^(SWIN.*)\.attn\.proj\.", r"\1.attention.o_proj."),
    (r"^(SWIN.*)\.attn\.(\w)\.", r"\1.attention.\2_proj."),
    (r"^input_proj\.", "model.input_proj_vision."),
    (r"^bert\.", "model.text_backbone."),
    (r"^feat_map\.", "model.text_projection."),
    (r"^transformer\.tgt_embed\.", "model.query_position_embeddings."),
    (r"^transformer\.enc_out_bbox_embed\.", "model.encoder_output_bbox_embed."),
    (r"^transformer\.encoder\.text_layers\.(\d+)\.", r"ENCODER.\1.text_enhancer_layer."),
    (r"^transformer\.encoder\.fusion_layers\.(\d+)\.", r"ENCODER.\1.fusion_layer."),
    (r"^transformer\.encoder\.layers\.(\d+)\.", r"ENCODER.\1.deformable_layer."),
    (r"^(ENCODER.*)text_enhancer_layer\.norm1\.", r"\1text_enhancer_layer.layer_norm_before."),
    (r"^(ENCODER.*)text_enhancer_layer\.norm2\.", r"\1text_enhancer_layer.layer_norm_after."),
    (r"^(ENCODER.*)deformable_layer\.norm1\.", r"\1deformable_layer.self_attn_layer_norm."),
    (r"^(ENCODER.*)deformable_layer\.norm2\.", r"\1deformable_layer.final_layer_norm."),
    (r"^(ENCODER.*)\.gamma_v$", r"\1.vision_param"),
    (r"^(ENCODER.*)\.gamma_l$", r"\1.text_param"),
    (r"^(ENCODER.*)\.layer_norm_v\.", r"\1.layer_norm_vision."),
    (r"^(ENCODER.*)\.layer_norm_l\.", r"\1.layer_norm_text."),
    (r"^(ENCODER.*)\.attn\.(values_|out_)?v_proj\.", r"\1.attn.\2vision_proj."),
    (r"^(ENCODER.*)\.attn\.(values_|out_)?l_proj\.", r"\1.attn.\2text_proj."),
    (r"^transformer\.decoder\.norm\.", "model.decoder.layer_norm."),
    (r"^transformer\.decoder\.ref_point_head\.", "model.decoder.reference_points_head."),
    (r"^transformer\.decoder\.layers\.", "DECODER."),
    # The official norms are numbered in the order in which they were added to the code, not in that of the layers.
    (r"^(DECODER\.\d+)\.norm1\.", r"\1.encoder_attn_layer_norm."),
    (r"^(DECODER\.\d+)\.norm2\.", r"\1.self_attn_layer_norm."),
    (r"^(DECODER\.\d+)\.norm3\.", r"\1.final_layer_norm."),
    (r"^(DECODER\.\d+)\.catext_norm\.", r"\1.encoder_attn_text_layer_norm."),
    (r"^(DECODER\.\d+)\.cross_attn\.", r"\1.encoder_attn."),
    (r"^(DECODER\.\d+)\.ca_text\.", r"\1.encoder_attn_text."),
    (r"^((?:ENCODER|DECODER).*)\.linear([12])\.", r"\1.fc\2."),
    (r"^transformer\.decoder\.bbox_embed\.", "model.decoder.bbox_embed."),
    (r"^transformer\.", "model."),
    (r"^ENCODER\.", "model.encoder.layers."),
    (r"^DECODER\.", "model.decoder.layers."),
    (r"^SWIN\.", "model.backbone.conv_encoder.model.swin."),
    (r"^model\.enc_out_class_embed\.", "model.encoder_output_class_embed."),
    # safetensors written by transformers 4, as on the hub
    (r"^(model\.backbone\.conv_encoder\.model)\.(encoder|embeddings)\.", r"\1.swin.\2."),
    (r"^(.*\.swin\..*)\.attention\.self\.(query|key|value)\.", lambda m: f"{m[1]}.attention.{m[2][0]}_proj."),
    (r"^(.*\.swin\..*)\.attention\.self\.relative", r"\1.attention.relative_position_bias.relative"),
    (r"^(.*\.swin\..*)\.attention\.output\.dense\.", r"\1.attention.o_proj."),
    (r"^(.*\.swin\..*)\.intermediate\.dense\.", r"\1.mlp.fc1."),
    (r"^(.*\.swin\..*\.blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
]
"""Applied in this order; names in capitals are placeholders for a prefix, replaced at the end."""

_DROPPED = re.compile(r"relative_position_index$|^bert\.pooler\.|position_ids$|^label_enc\.")
"""Buffers computed from the configuration, BERT's unused pooler, and the denoising labels of training."""


def transformers_names(state: Mapping[str, Tensor], model: Detector) -> dict[str, Tensor]:
    """Rename a checkpoint's tensors to the names of ``model``'s state dict.

    Supports the official ``.pth`` (938 keys of Swin-T, perhaps with the prefix ``module.``), those of mmdetection, files of
    transformers 4 and 5, and files without tied tensors. Unknown names stay; ``load_exactly`` reports them.
    """
    renamed: dict[str, Tensor] = {}
    state = mmdet.official_names(state) if mmdet.is_of_mmdet(state) else state
    for name, value in state.items():
        name = name.removeprefix("module.")
        if not _DROPPED.search(name):
            for part, values in _split(name, value):
                renamed[_renamed(part)] = values
    expected, found = model.state_dict(), dict(renamed)
    for name in expected.keys() - found.keys():
        if name.startswith("model.backbone.conv_encoder.model.swin.layernorm."):
            renamed[name] = expected[name]  # transformers builds Swin's final norm, which no feature map uses
        if head := re.fullmatch(r"(?:model\.decoder\.)?((?:bbox|class)_embed)\.(\d+)\.(.*)", name):
            # A head has two names, of which files have either; one head for all layers has only the first's.
            numbers = [head[2], "0"] if model.config.decoder_bbox_embed_share else [head[2]]
            names = [f"{owner}{head[1]}.{number}.{head[3]}" for number in numbers for owner in ("", "model.decoder.")]
            if source := next((each for each in names if each in found), None):
                renamed[name] = found[source]
    return renamed


def _split(name: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """Split Swin's ``qkv`` and torch's ``in_proj`` into the three stacked tensors that transformers stores separately."""
    for joined, parts in (
        (r"\.attn\.qkv\.", (".attn.q.", ".attn.k.", ".attn.v.")),
        (r"\.in_proj_", (".query.", ".key.", ".value.")),
    ):
        if re.search(joined, name) and value.shape[0] % 3 == 0:
            return [(re.sub(joined, part, name), each) for part, each in zip(parts, value.chunk(3), strict=True)]
    return [(name, value)]


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


# ---- vocabulary ----


def bert_tokenizer(weights: Path | None) -> tokenizers.Tokenizer:
    """The tokenizer of bert-base-uncased, which official checkpoints need and ``.pth`` files do not contain.

    Taken from ``$WSSS_BERT_VOCAB``, else from beside the weights (``tokenizer.json``, ``vocab.txt``), else downloaded once.

    Raises:
        WeightsError: it is not found and cannot be downloaded, or it is another vocabulary.
    """
    folder = weights if weights is None or weights.is_dir() else weights.parent
    places = [] if folder is None else [folder / "tokenizer.json", folder / "vocab.txt"]
    if os.environ.get("WSSS_BERT_VOCAB"):
        places.insert(0, Path(os.environ["WSSS_BERT_VOCAB"]))
        if not places[0].is_file():
            raise WeightsError(f"WSSS_BERT_VOCAB: no such file: {places[0]}", hint="give bert-base-uncased's vocab.txt")
    path = next((place for place in places if place.is_file()), None) or _downloaded_vocabulary()
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path)) if path.suffix == ".json" else wordpiece(path)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise WeightsError(f"{path}: expected the vocabulary of bert-base-uncased, {error}") from None
    ids = [tokenizer.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]", ".", "?")]
    if ids != [0, 101, 102, 1012, 1029] or tokenizer.get_vocab_size() != 30522:
        raise WeightsError(
            f"{path}: expected the 30,522 tokens of bert-base-uncased, got {tokenizer.get_vocab_size()} with other special ids",
            hint=f"bring {VOCABULARY.url}",
        )
    return tokenizer


def _downloaded_vocabulary() -> Path:
    try:
        return download(VOCABULARY, model="grounding-dino")
    except WeightsError as error:
        raise WeightsError(
            f"the vocabulary of bert-base-uncased is needed: {error.message}",
            hint=f"put {VOCABULARY.url} beside the weights or at {cache_folder() / VOCABULARY.file}, or set WSSS_BERT_VOCAB",
        ) from None


def wordpiece(vocabulary: Path) -> tokenizers.Tokenizer:
    """A lower-casing BERT tokenizer from a ``vocab.txt``, one token a line."""
    return bert_wordpiece(tokenizers.models.WordPiece.from_file(str(vocabulary), unk_token="[UNK]"))
