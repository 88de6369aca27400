"""Small detectors of both official classes."""

from __future__ import annotations

from typing import Any

import transformers

from wsss.export.mini import HEADS_OF_THEIR_OWN


def toy(
    window: int = 4, depths: tuple[int, ...] = (1, 2, 1), encoder_layers: int = 2, queries: int = 20
) -> transformers.GroundingDinoForObjectDetection:
    """Two layers of each kind at most; four levels and shifted windows, as in the official configurations."""
    return transformers.GroundingDinoForObjectDetection(
        transformers.GroundingDinoConfig(**_sizes(window, depths, encoder_layers, queries))
    )


def mm_toy(depths: tuple[int, ...] = (1, 2, 1), all_stages: bool = False) -> transformers.MMGroundingDinoForObjectDetection:
    """A MM-Grounding-DINO of the same sizes; with ``all_stages``, features from the first stage on, as in ``mm_large``."""
    sizes = _sizes(4, depths, 2, 20)
    if all_stages:
        stages = list(range(1, len(depths) + 1))
        sizes["backbone_config"] = transformers.SwinConfig(**{**_swin(4, depths), "out_indices": stages})
    return transformers.MMGroundingDinoForObjectDetection(transformers.MMGroundingDinoConfig(**sizes, **HEADS_OF_THEIR_OWN))


def _swin(window: int, depths: tuple[int, ...]) -> dict[str, Any]:
    return {
        "embed_dim": 16,
        "depths": list(depths),
        "num_heads": [1, 2, 2][: len(depths)],
        "window_size": window,
        "drop_path_rate": 0.0,
        "out_indices": [len(depths) - 1, len(depths)],
    }


def _sizes(window: int, depths: tuple[int, ...], encoder_layers: int, queries: int) -> dict[str, Any]:
    text = transformers.BertConfig(
        vocab_size=1100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    sizes = {"encoder_layers": encoder_layers, "encoder_ffn_dim": 64, "decoder_layers": 2, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    backbone = transformers.SwinConfig(**_swin(window, depths))
    return {"backbone_config": backbone, "text_config": text, "d_model": 64, "num_queries": queries, **sizes, **heads}
