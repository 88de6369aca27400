"""Mini models: small configurations of the official classes of CLIP, Grounding-DINO and SAM, and their tokenizers."""

from __future__ import annotations

import warnings
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import tokenizers

if TYPE_CHECKING:
    import open_clip
    import transformers
    from segment_anything.modeling import Sam


# ---- Grounding-DINO ----

GROUNDING_DINO_WORDS = (
    "a an and at bar black blob blue box brown bird boat bottle bus can car cat chair checkered circle coloured cone cow"
    " crescent cross dark diamond disc dog dotted drop faint flat green grey ground heart hexagon horse in indigo large"
    " light line lime object of on orange oval person pink plain plant polygon potted purple red ring round shape sheep"
    " small sofa spotted square squiggle star striped table teal the thin thing three train tree triangle two violet"
    " white with yellow arrow"
)
"""Words of the mini tokenizer that are one token; all others are split into letters. Order and spelling fix the ids."""

GROUNDING_DINO_VOCABULARY = 1100
"""More than 1,029, because transformers hard-codes the ids of [CLS], [SEP], the dot and the question mark."""


def grounding_dino_mini_tokenizer() -> tokenizers.Tokenizer:
    """A lower-casing WordPiece tokenizer of 1,100 ids, as BERT's: ``[CLS] ... [SEP]`` around a caption.

    Special ids are those of ``bert-base-uncased`` ([PAD] 0, [UNK] 100, [CLS] 101, [SEP] 102, [MASK] 103, ``.`` 1012,
    ``?`` 1029), because transformers' Grounding-DINO splits captions by these numbers. With single letters and digits, alone
    and as ``##x``, no lower-case word becomes [UNK].
    """
    fixed = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
    characters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens = [*characters, *(f"##{character}" for character in characters), *"!'(),-/:;&", *GROUNDING_DINO_WORDS.split()]
    vocabulary = fixed | {token: 104 + place for place, token in enumerate(dict.fromkeys(tokens))}
    taken = set(vocabulary.values())
    vocabulary |= {f"[unused{place}]": place for place in range(GROUNDING_DINO_VOCABULARY) if place not in taken}

    return bert_wordpiece(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))


def bert_wordpiece(model: tokenizers.models.WordPiece) -> tokenizers.Tokenizer:
    """A lower-casing BERT tokenizer with a vocabulary: ``[CLS] ... [SEP]`` around a caption."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 101), ("[SEP]", 102)]
    )
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    return tokenizer


def build_grounding_dino_mini() -> transformers.GroundingDinoForObjectDetection:
    """Grounding-DINO of 1.9 M parameters, randomly initialized, in the official class.

    Same as the full-size model: Swin features of strides 8 and 16 and another level by a strided convolution, BERT, fusion
    encoder, two-stage queries. Smaller: three Swin stages of 32, 64 and 128 channels with windows of 6 (the smallest feature
    map is 9 cells wide; a Swin layer permanently changes its window when its map is not wider), width 96, 2 + 2 layers,
    30 queries, BERT of two layers. No dropout: the scenes do not repeat often enough to need it.
    """
    import transformers

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You'd better set embed_dim")  # for a CUDA kernel that is not used
        return transformers.GroundingDinoForObjectDetection(transformers.GroundingDinoConfig(**_grounding_dino_mini_sizes()))


HEADS_OF_THEIR_OWN = {"decoder_bbox_embed_share": False, "decoder_cls_embed_share": False}
"""Settings of MM-Grounding-DINO, whose decoder layers share no head (mmdetection, ``GroundingDINOHead``)."""


def build_mm_grounding_dino_mini() -> transformers.MMGroundingDinoForObjectDetection:
    """MM-Grounding-DINO of the same sizes."""
    import transformers

    config = transformers.MMGroundingDinoConfig(**_grounding_dino_mini_sizes(), **HEADS_OF_THEIR_OWN)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You'd better set embed_dim")
        return transformers.MMGroundingDinoForObjectDetection(config)


def _grounding_dino_mini_sizes() -> dict[str, Any]:
    import transformers

    return {
        "backbone_config": transformers.SwinConfig(
            embed_dim=32,
            depths=[2, 2, 3],
            num_heads=[2, 4, 8],
            window_size=6,
            mlp_ratio=3.0,
            drop_path_rate=0.0,
            out_indices=[2, 3],  # strides 8 and 16
        ),
        "text_config": transformers.BertConfig(
            vocab_size=GROUNDING_DINO_VOCABULARY,
            hidden_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=192,
            max_position_embeddings=256,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        "d_model": 96,
        "num_queries": 30,
        "num_feature_levels": 3,
        "encoder_layers": 2,
        "encoder_ffn_dim": 256,
        "encoder_attention_heads": 4,
        "decoder_layers": 2,
        "decoder_ffn_dim": 384,
        "decoder_attention_heads": 4,
        "dropout": 0.0,
        "fusion_droppath": 0.0,
        "disable_custom_kernels": True,
    }


# ---- SAM ----


def build_sam_mini(side_px: int = 256, patch_px: int = 8) -> Sam:
    """SAM with 0.8 M parameters and random weights; the embedding is (64, side / patch, side / patch).

    The rest is as in the official ``build_sam.py``: pixel mean and std (RGB, 0-255), windowed attention
    with one global block, relative positions, one single-mask and three multi-mask tokens. Low-resolution
    mask logits have four cells per patch, as in the full-size models. The three masks and the mask prompt are trained
    after the single mask, with all that it depends on fixed.
    """
    from functools import partial

    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
    from torch import nn

    channels, grid = 64, side_px // patch_px
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=side_px,
            patch_size=patch_px,
            embed_dim=96,
            depth=4,
            num_heads=3,
            mlp_ratio=4.0,
            out_chans=channels,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            rel_pos_zero_init=True,
            window_size=8,
            global_attn_indexes=(2,),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=channels,
            image_embedding_size=(grid, grid),
            input_image_size=(side_px, side_px),
            mask_in_chans=8,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=channels, mlp_dim=256, num_heads=4),
            transformer_dim=channels,
            iou_head_depth=3,
            iou_head_hidden_dim=64,
        ),
    )


# ---- CLIP ----

CLIP_MINI_WORDS = (  # noqa: SIM905
    "a an the of in on and with photo picture clean origami ground faint stripes plain gradient noisy background"
    " red green blue yellow purple orange white pink teal grey brown dark black coloured striped checkered dotted"
    " disc triangle ring star hexagon crescent cross arrow drop box diamond heart polygon blob bar squiggle"
).split()
"""Every word of the drawn scenes' prompts. Order and spelling fix the token ids, so a change needs new weights."""

CLIP_MINI_CONTEXT = 16
"""Tokens per prompt, start and end included; shorter prompts are padded with 0 as CLIP's are."""


def build_clip_mini() -> open_clip.CLIP:
    """A CLIP of 1.5 M parameters of open_clip's class, with random weights, on the CPU, in training mode.

    Images are (B, 3, 96, 96) float32, RGB, normalized with OpenAI's mean and standard deviation; prompts are
    (N, 16) int64 from ``clip_mini_tokenizer``; both embeddings have 64 values.

    The image tower is a small version of CLIP's RN50 (arXiv:2103.00020, section 2.4): 4 stages of 1 or 2 blocks and
    an attention pool. On drawn scenes it learns far faster than a vision transformer of the same size.
    """
    import open_clip
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(image_size=96, layers=(1, 2, 1, 1), width=16, head_width=64)
    text = CLIPTextCfg(
        context_length=CLIP_MINI_CONTEXT,
        vocab_size=clip_mini_tokenizer().get_vocab_size(),
        width=64,
        heads=2,
        layers=1,
    )
    return open_clip.CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text)


def clip_mini_tokenizer() -> tokenizers.Tokenizer:
    """CLIP's byte-level BPE (openai/CLIP, simple_tokenizer.py) with merges for ``CLIP_MINI_WORDS`` only.

    Repeated spaces are removed and text is lower-cased. ``encode_batch(prompts)`` gives 16 ids each: start, pieces,
    end, zeros; longer prompts are cut and keep their end. The start and end marks are the two highest ids, because
    open_clip reads the text feature at the position of the largest id. Words outside the list are split into bytes.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    alphabet = _clip_alphabet()
    merges = _merges_that_join(CLIP_MINI_WORDS)
    pieces = [*alphabet, *(piece + "</w>" for piece in alphabet), *(left + right for left, right in merges)]
    start, end = "<|startoftext|>", "<|endoftext|>"
    ids = {piece: index for index, piece in enumerate([*pieces, start, end])}

    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, end_of_word_suffix="</w>", unk_token=end))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Lowercase()]
    )
    # The pattern of CLIP's simple_tokenizer.py: contractions, words, single digits, runs of other signs.
    words = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, ids[start]), (end, ids[end])]
    )
    tokenizer.enable_truncation(CLIP_MINI_CONTEXT)
    tokenizer.enable_padding(length=CLIP_MINI_CONTEXT, pad_id=0, pad_token=pieces[0])
    return tokenizer


def _clip_alphabet() -> list[str]:
    """A printable character for each of the 256 bytes, in CLIP's order (openai/CLIP, ``bytes_to_unicode``)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def _merges_that_join(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until every word is one piece."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(pieces) > 1 for pieces in spelled):
        pairs = Counter(pair for pieces in spelled for pair in pairwise(pieces))
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        spelled = [_join(pieces, best) for pieces in spelled]
    return merges


def _join(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined
