"""EoMT equals transformers' classes with the same weights, and its masks end as in the official code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import EomtConfig, EomtDinov3Config, EomtDinov3ForUniversalSegmentation, EomtForUniversalSegmentation

from wsss.errors import UsageError
from wsss.train.model import build_segmenter
from wsss.train.networks.eomt import EoMT, masked_share

WIDTH, HEADS, DEPTH, SIDE, QUERIES, CLASSES = 48, 3, 5, 96, 7, 4
ENCODERS = {"dinov2": "vit_small_patch14_reg4_dinov2", "dinov3": "vit_small_patch16_dinov3_qkvb"}
OPTIONS = {"depth": DEPTH, "embed_dim": WIDTH, "num_heads": HEADS, "queries": QUERIES, "blocks": 3}


def ours(encoder: str, **options: Any) -> EoMT:
    network = build_segmenter("eomt", ENCODERS[encoder], {**OPTIONS, "img_size": SIDE, **options}, CLASSES).network
    assert isinstance(network, EoMT)
    return network


def theirs(encoder: str) -> Any:
    """The official network with random weights that differ in every tensor."""
    shared = {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "image_size": SIDE,
        "patch_size": 16,
        "num_blocks": 3,
        "num_queries": QUERIES,
        "num_labels": CLASSES,
    }
    torch.manual_seed(0)
    network: Any
    if encoder == "dinov2":
        network = EomtForUniversalSegmentation(EomtConfig(**shared))
    else:  # without the random scale of its positions in training
        config = EomtDinov3Config(**shared, intermediate_size=4 * WIDTH, layer_norm_eps=1e-5, pos_embed_rescale=None)
        network = EomtDinov3ForUniversalSegmentation(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            is_gain = parameter.ndim == 1 and not name.endswith("bias")
            parameter.copy_(is_gain + torch.randn(parameter.shape) * (0.2 if parameter.ndim > 1 else 0.3))
    return network


NAMES = {
    "embeddings.cls_token": "encoder.cls_token",
    "embeddings.register_tokens": "encoder.reg_token",
    "embeddings.patch_embeddings.": "encoder.patch_embed.proj.",
    "projection.": "",
    "embeddings.position_embeddings.weight": "encoder.pos_embed",
    "query.": "q.",
    "class_predictor.": "class_head.",
    "mask_head.fc1": "mask_head.0",
    "mask_head.fc2": "mask_head.2",
    "mask_head.fc3": "mask_head.4",
    "upscale_block.block.": "upscale.",
    "layernorm2d": "norm",
    "layernorm.": "encoder.norm.",
    "layers.": "encoder.blocks.",
    "attention.out_proj": "attn.proj",
    "attention.o_proj": "attn.proj",
    "up_proj": "fc1",
    "down_proj": "fc2",
}
"""Names of transformers, and those of the network (of timm and the official code), replaced one after another."""


def with_weights_of(official: Any, network: EoMT) -> EoMT:
    """Copy the official network's weights. Every tensor of both is used."""
    scales = ("gamma_1", "gamma_2") if hasattr(network.encoder, "rope") else ("ls1.gamma", "ls2.gamma")
    given: dict[str, Tensor] = {}
    for name, value in official.state_dict().items():
        for there, here in [*NAMES.items(), ("layer_scale1.lambda1", scales[0]), ("layer_scale2.lambda1", scales[1])]:
            name = name.replace(there, here)
        given[name] = value[None] if name == "encoder.pos_embed" else value
    del given["attn_mask_probs"], given["criterion.empty_weight"]
    for number in range(DEPTH):
        block = f"encoder.blocks.{number}."
        parts = {each: [given.pop(f"{block}attention.{part}_proj.{each}", None) for part in "qkv"] for each in ("weight", "bias")}
        given[f"{block}attn.qkv.weight"] = torch.cat(parts["weight"])
        if parts["bias"][1] is None:
            given[f"{block}attn.q_bias"], _, given[f"{block}attn.v_bias"] = parts["bias"]
        else:
            given[f"{block}attn.qkv.bias"] = torch.cat(parts["bias"])
    network.load_state_dict(given)
    return network


def compared(official: Any, network: EoMT, *, training: bool, canvas: tuple[int, int] = (SIDE, SIDE)) -> int:
    """Compare the predictions of every layer, and return their number."""
    pixels = torch.randn(2, 3, *canvas)
    found: list[tuple[Tensor, Tensor]] = []
    predict = type(official).predict
    official.predict = lambda x: found.append(predict(official, x)[::-1]) or predict(official, x)
    with torch.inference_mode():
        official.train(training)(pixel_values=pixels)
        mine = network.train(training)(pixels)
    assert len(mine) == len(found)
    for (classes, masks), (their_classes, their_masks) in zip(mine, found, strict=True):
        for one, other in ((classes, their_classes), (masks, their_masks)):
            assert one.shape == other.shape and float(other.std()) > 0.1
            assert float((one - other).abs().max()) < 1e-5 * float(other.abs().max())
    return len(mine)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_it_computes_what_the_official_network_does(encoder: str) -> None:
    official = theirs(encoder)
    network = with_weights_of(official, ours(encoder))
    official.attn_mask_probs.zero_()
    network.anneal(1.0)
    assert compared(official, network, training=False) == 1, "no masks, no predictions between"
    official.attn_mask_probs.fill_(1)
    network.anneal(0.0)
    assert compared(official, network, training=True) == 4, "one before each block with queries, and the last"
    assert compared(official, network, training=False) == 4, "a run that was stopped early is validated with its masks"


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_masks_matter_and_are_neither_full_nor_empty(encoder: str) -> None:
    """Otherwise the test above would say nothing about them."""
    network = with_weights_of(theirs(encoder), ours(encoder)).eval()
    pixels = torch.randn(1, 3, SIDE, SIDE)
    with torch.inference_mode():
        network.anneal(0.0)
        masked = network(pixels)
        network.anneal(1.0)
        (open_,) = network(pixels)
    assert float((masked[-1][1] - open_[1]).abs().max()) > 0.01 * float(open_[1].abs().max())
    share = float((F.interpolate(masked[0][1], (6, 6), mode="bilinear") > 0).float().mean())
    assert 0.05 < share < 0.95


# ---- the masks' end ----


def test_queries_lose_their_masks_block_by_block() -> None:
    """Steps of configs/dinov2/ade20k/semantic/eomt_large_512.yaml of tue-mps/eomt 7bd19dd, in a training of 39,120 steps."""
    network = ours("dinov3", blocks=4)
    starts, ends = (6520, 13040, 19560, 26080), (13040, 19560, 26080, 32600)
    for step in (0, 1, 6519, 6520, 6521, 9780, 13039, 13040, 20000, 32599, 32600, 39120):
        network.anneal(step / 39_120)
        want = []
        for start, end in zip(starts, ends, strict=True):  # training/lightning_module.py:199
            progress = (step - start) / (end - start)
            want.append(1.0 if step < start else 0.0 if step >= end else (1.0 - progress) ** 0.9)
        assert network.probability.tolist() == pytest.approx(want, abs=1e-6)
        assert network.masked == [round(QUERIES * each) for each in want]


def test_shares_of_a_configuration_with_dinov3() -> None:
    """Its first block begins at step 0, and not all follow each other."""
    network = ours("dinov3", annealing=[0.0, 0.2, 0.3, 0.5, 0.5, 1.0])
    network.anneal(0.4)
    assert network.probability.tolist() == pytest.approx([0, 0.5**0.9, 1])
    assert masked_share(1.0, 0.5, 1.0) == 0


def test_a_share_of_the_queries_is_masked() -> None:
    """In training by chance, and other queries in every image; in evaluation the first ones."""
    network = ours("dinov3", queries=1000)
    nothing = torch.full((2, 1000, 24, 24), -1.0)
    network.anneal(network.annealing[1][0] + 0.5 * (network.annealing[1][1] - network.annealing[1][0]))
    tokens, share = 1000 + 5 + 36, 0.5**0.9
    for training in (True, False):
        network.train(training)
        allowed = [network._attention_mask(nothing, number, (6, 6), tokens) for number in range(3)]
        assert all(mask.shape == (2, 1, tokens, tokens) and mask.dtype == torch.bool for mask in allowed)
        assert all(bool(mask[:, :, 1000:].all() and mask[..., :1005].all()) for mask in allowed), "only queries, only patches"
        found = [(~mask[:, 0, :1000, 1005:]).float().mean(dim=(1, 2)) for mask in allowed]
        assert found[0].tolist() == [0, 0] and found[2].tolist() == [1, 1]
        assert found[1].tolist() == pytest.approx([share, share], abs=0.05 if training else 1e-6 + 5e-4)
    assert (~allowed[1][0, 0, :1000, 1005]).tolist() == [query < network.masked[1] for query in range(1000)]


def test_a_mask_is_that_of_the_query_and_a_row_of_its_image() -> None:
    network = ours("dinov2").eval()
    network.anneal(0.0)
    logits = torch.randn(2, QUERIES, 24, 32)
    allowed = network._attention_mask(logits, 0, (6, 8), QUERIES + 5 + 48)[:, 0, :QUERIES, -48:].unflatten(2, (6, 8))
    assert torch.equal(allowed, F.interpolate(logits, (6, 8), mode="bilinear") > 0)


def test_stride_of_the_masks_and_sizes() -> None:
    """Four pixels for each, with patches of 8, 16 or 32, on canvases of any shape."""
    for patch in (8, 16, 32):
        segmenter = build_segmenter("eomt", ENCODERS["dinov2"], {**OPTIONS, "img_size": 64, "patch_size": patch}, CLASSES).eval()
        assert segmenter.multiple_of == patch and segmenter.queries == QUERIES
        with torch.inference_mode():
            ((classes, masks),) = segmenter.outputs(torch.randn(1, 3, 64, 96))
        assert classes.shape == (1, QUERIES, CLASSES + 1) and masks.shape == (1, QUERIES, 16, 24)


@pytest.mark.parametrize(
    ("encoder", "options", "said"),
    [
        ("resnet18", {}, "cannot be built"),
        ("swin_tiny_patch4_window7_224", {}, "cannot be built"),
        (ENCODERS["dinov2"], {**OPTIONS, "patch_size": 14}, "patch_size: expected a power of 2 from 8 on, got 14"),
        (ENCODERS["dinov3"], {**OPTIONS, "blocks": 6}, "1 to 5 blocks, got 7 and 6"),
        (ENCODERS["dinov3"], {**OPTIONS, "annealing": [0.5, 0.25]}, "annealing: expected 3 pairs of rising shares"),
        ("vit_small_patch16_rope_mixed_224", {"depth": 4}, "whose blocks all have the same positions"),
    ],
)
def test_what_cannot_be_built_is_named(encoder: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build_segmenter("eomt", encoder, options, CLASSES)
