"""Against the official code (groundingdino-py): its checkpoint format and its numbers, at toy size; full size is slow."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch: pip install 'wsss[export]'")
pytest.importorskip(
    "groundingdino.models", reason="needs groundingdino-py: pip install --no-build-isolation groundingdino-py (after torch)"
)

import torch
import transformers

from wsss.benchmarks.studies.parity import grounding_dino_official as benchmark
from wsss.errors import WeightsError
from wsss.export.grounding_dino import family as grounding_dino
from wsss.export.grounding_dino import weights as grounding_dino_weights
from wsss.export.grounding_dino.graphs import ImageGraph, TextGraph
from wsss.export.mini import grounding_dino_mini_tokenizer
from wsss.export.weights import spread
from wsss.spec import AxisRange

CANVAS = (96, 128)
BACKBONE = {"embed_dim": 16, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4}
BERT = transformers.BertConfig(vocab_size=1100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
CAPTIONS = (["red disc", "dog"], ["potted plant", "blue striped box", "cat"])


def toy() -> transformers.GroundingDinoForObjectDetection:
    """transformers' model of the sizes of `official`, whose code has the width 256 written in."""
    sizes = {"encoder_layers": 2, "encoder_ffn_dim": 64, "decoder_layers": 2, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    backbone = transformers.SwinConfig(**BACKBONE, drop_path_rate=0.0, out_indices=[2, 3, 4])
    config = transformers.GroundingDinoConfig(backbone_config=backbone, text_config=BERT, num_queries=20, **sizes, **heads)
    return transformers.GroundingDinoForObjectDetection(config)


@pytest.fixture(scope="module")
def official() -> Any:
    torch.manual_seed(0)
    sizes = {"enc_layers": 2, "dec_layers": 2, "dim_feedforward": 64, "nheads": 4, "num_queries": 20}
    model = benchmark.official_model(BACKBONE, BERT, grounding_dino_mini_tokenizer(), **sizes)
    spread(model, 0)
    return model


@pytest.fixture(scope="module")
def checkpoint(official: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored as the released files are: under ``model``, names from a parallel wrapper, leftovers of training."""
    path = tmp_path_factory.mktemp("official") / "groundingdino_toy.pth"
    state = {f"module.{name}": value for name, value in official.state_dict().items()}
    state["module.label_enc.weight"] = torch.zeros(7, 256)
    state["module.bert.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save({"model": state}, path)
    return path


@pytest.fixture(scope="module")
def ours(checkpoint: Path) -> transformers.GroundingDinoForObjectDetection:
    return grounding_dino_weights.load(toy, "toy", str(checkpoint))[0]


@torch.no_grad()
def test_official_checkpoint_gives_official_numbers_in_a_mixed_batch(
    official: Any, ours: transformers.GroundingDinoForObjectDetection
) -> None:
    graph = grounding_dino.image_graph(ours, CANVAS, AxisRange(1, 2, 3))
    text, tokenizer = TextGraph(ours).eval(), grounding_dino_mini_tokenizer()

    def features(tokens: list[int]) -> np.ndarray:
        return np.asarray(text(torch.tensor([tokens]), torch.ones(1, len(tokens), dtype=torch.bool))[0])

    sentences = [
        [[101], *([*tokenizer.encode(name, add_special_tokens=False).ids, 1012] for name in names), [102]] for names in CAPTIONS
    ]
    feeds = graph.take(graph.sample(2, 3), [0, 1]) | grounding_dino.caption_feeds(sentences, features)
    module = ImageGraph(ours, CANVAS).eval()
    outputs = module(*(torch.from_numpy(feeds[spec.name]) for spec in graph.inputs))
    found = {spec.name: value.numpy() for spec, value in zip(graph.outputs, outputs, strict=True)}
    for row, names in enumerate(CAPTIONS):
        one = graph.take(feeds, [row])
        pixels, mask = grounding_dino.official_pixels(one)
        caption = " . ".join(names) + " ."
        theirs = benchmark.official_output(official, pixels, mask == 0, caption, torch.from_numpy(found["query"][row]))
        tokens = int((one["phrase"] >= 0).sum())
        np.testing.assert_allclose(found["logits"][row, :, :tokens], theirs["logits"][:, :tokens], atol=1e-4)
        np.testing.assert_allclose(found["boxes"][row], theirs["boxes"], atol=1e-5)
        assert np.isneginf(theirs["logits"][:, tokens:]).all()


def test_a_missing_official_key_is_named(checkpoint: Path, tmp_path: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)["model"]
    del state["module.transformer.decoder.layers.1.norm2.weight"]
    torch.save({"model": state}, tmp_path / "short.pth")
    with pytest.raises(WeightsError, match=r"1 missing \(model.decoder.layers.1.self_attn_layer_norm.weight\)"):
        grounding_dino_weights.load(toy, "toy", str(tmp_path / "short.pth"))
    whole = checkpoint.read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="cannot be read"):
        grounding_dino_weights.load(toy, "toy", str(tmp_path / "cut.pth"))


def test_the_official_swin_t_has_the_keys_that_were_counted() -> None:
    """938 keys (the trial's count), of which the state dict of transformers' model takes all but 14."""
    bert = transformers.BertConfig()
    names = benchmark.official_model(
        grounding_dino_weights.OFFICIAL["swin_t"], bert, grounding_dino_mini_tokenizer()
    ).state_dict()
    with torch.device("meta"):
        own = grounding_dino.build_official("swin_t")
    renamed = grounding_dino_weights.transformers_names(names, own)
    assert len(names) == 938
    assert renamed.keys() == own.state_dict().keys()
    assert all(renamed[name].shape == value.shape for name, value in own.state_dict().items())


def test_queries_are_paired_by_their_cells() -> None:
    """The same detections on a larger canvas differ in cell numbers alone."""
    rng = np.random.default_rng(0)
    bare = {"logits": rng.normal(size=(150, 4)), "boxes": rng.random((150, 4)), "query": rng.permutation(12 * 16)[:150]}
    rows, columns = np.divmod(bare["query"], 16)
    order = rng.permutation(150)
    ours = {"logits": bare["logits"][order], "boxes": bare["boxes"][order] + 0.01, "query": (rows * 20 + columns)[order]}
    effect = benchmark.padding_effect(ours, bare, (128, 160), (96, 128), 4)
    assert effect["shared"] == effect["shared_best"] == 1
    assert effect["boxes_largest"] == pytest.approx(0.01)
    assert effect["scores_largest"] == 0


@pytest.mark.slow
def test_full_size_on_real_photographs(photographs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Swin-T through its .pth, exported, in batches of three photographs and captions; 20 minutes or more on two cores."""
    vocabulary = photographs[0].parents[2] / "vocab" / "bert_base_uncased_vocab.txt"
    if not vocabulary.is_file():
        pytest.skip(f"needs {vocabulary}")
    monkeypatch.setenv("WSSS_BERT_VOCAB", str(vocabulary))
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path / "result.json")
    benchmark.main([str(photographs[0].parent), "--work", str(tmp_path), "--count", "21"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["photographs"] >= 20
    assert result["parity"]["logits"] <= 1e-3
    assert result["parity"]["boxes"] <= 1e-3


def test_settings_of_the_official_configuration_are_whole() -> None:
    settings = argparse.Namespace(**benchmark._official_settings())
    assert (settings.num_queries, settings.hidden_dim, settings.two_stage_type) == (900, 256, "standard")
