"""A small Grounding-DINO."""

from __future__ import annotations

import transformers


def toy(
    window: int = 4, depths: tuple[int, ...] = (1, 2, 1), encoder_layers: int = 2, queries: int = 20
) -> transformers.GroundingDinoForObjectDetection:
    """Two layers of each kind at most; four levels and shifted windows, as in the official configurations."""
    backbone = transformers.SwinConfig(
        embed_dim=16,
        depths=list(depths),
        num_heads=[1, 2, 2][: len(depths)],
        window_size=window,
        drop_path_rate=0.0,
        out_indices=[len(depths) - 1, len(depths)],
    )
    text = transformers.BertConfig(
        vocab_size=1100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    sizes = {"encoder_layers": encoder_layers, "encoder_ffn_dim": 64, "decoder_layers": 2, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.GroundingDinoConfig(
        backbone_config=backbone, text_config=text, d_model=64, num_queries=queries, **sizes, **heads
    )
    return transformers.GroundingDinoForObjectDetection(config)
