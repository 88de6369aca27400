"""Every architecture behind the same interface, built offline."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from wsss.errors import UsageError
from wsss.train.args import LossArgs, ModelArgs, OptimizerArgs
from wsss.train.model import SEGFORMER, SWIN, Segmenter, build_from, build_segmenter, criterion_for
from wsss.train.networks.vit import VisionTransformer
from wsss.train.optimizer import optimizer_for, rate_at, set_rates

TINY_SWIN = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "deeplabv2": ("resnet18", {}),
    "deeplabv3plus": ("resnet18", {"decoder_channels": 16}),
    "upernet": ("resnet18", {"decoder_channels": 16}),
    "unet": ("mobilenet_v2", {"decoder_channels": [16, 16, 8, 8, 8]}),
    "smp-segformer": ("mit_b0", {"decoder_segmentation_channels": 16}),
    "segformer": ("b0", {"depths": [1, 1, 1, 1], "decoder_hidden_size": 16}),
    "vit": ("vit_small_patch16_dinov3", {"depth": 4, "embed_dim": 48, "num_heads": 3}),
    "eomt": ("vit_small_patch16_dinov3", {"depth": 4, "embed_dim": 48, "num_heads": 3, "queries": 10, "blocks": 3}),
    "mask2former": (
        "swin-tiny",
        {
            "backbone": TINY_SWIN,
            "hidden_dim": 32,
            "feature_size": 32,
            "mask_feature_size": 32,
            "encoder_layers": 1,
            "decoder_layers": 3,
            "num_queries": 10,
            "dim_feedforward": 32,
            "encoder_feedforward_dim": 32,
            "num_attention_heads": 2,
        },
    ),
}
"""Small enough for a second each."""


def small(architecture: str, classes: int = 5) -> Segmenter:
    torch.manual_seed(0)
    return build_segmenter(architecture, *SHAPES[architecture], classes)


@pytest.mark.parametrize("architecture", SHAPES)
def test_logits_come_at_the_size_of_the_input(architecture: str) -> None:
    segmenter = small(architecture).eval()
    pixels = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        logits = segmenter(pixels)
        alone = segmenter(pixels[1:])
    assert logits.shape == (2, 5, 64, 96) and logits.dtype == torch.float32
    torch.testing.assert_close(logits[1:], alone, rtol=1e-3, atol=1e-4)
    assert 64 % segmenter.multiple_of == 0


@pytest.mark.parametrize("architecture", SHAPES)
def test_every_parameter_learns(architecture: str) -> None:
    """Its own loss reaches all of the network, and following it makes the loss smaller."""
    segmenter = small(architecture).train()
    pixels = torch.randn(2, 3, 64, 64)
    label = torch.zeros(2, 64, 64, dtype=torch.uint8)
    label[:, 16:48, 16:48], label[:, :8] = 3, 255
    confidence = torch.ones(2, 5)
    kind = "masks" if segmenter.queries else "cross-entropy"
    criterion = criterion_for(segmenter, LossArgs(kind=kind), None)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(segmenter.parameters(), lr=1e-3)
    losses = []
    for step in range(5):
        torch.manual_seed(1)
        loss = criterion(segmenter.outputs(pixels), label, confidence, criterion.weights(label, confidence))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        if step == 0:
            without = [name for name, parameter in segmenter.named_parameters() if parameter.grad is None]
            assert not [name for name in without if ".swin.layernorm." not in name], "which transformers builds and never calls"
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_the_random_weights_follow_from_the_seed() -> None:
    args = ModelArgs(architecture="unet", encoder="mobilenet_v2", options=SHAPES["unet"][1])
    torch.manual_seed(5)
    stream = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = (build_from(args, 5, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(torch.rand(1), stream), "the caller's random stream is where it was"


def test_batch_norms_of_a_run() -> None:
    """``fixed`` takes scale and shift out of the training; the momentum is the encoder's alone."""
    settings: dict[str, Any] = {"architecture": "deeplabv3plus", "encoder": "resnet18", "init": "hub:imagenet"}

    def norms(**more: Any) -> dict[str, torch.nn.BatchNorm2d]:
        network = build_from(ModelArgs(**settings, **more), 5, 1).network
        return {name: each for name, each in network.named_modules() if isinstance(each, torch.nn.BatchNorm2d)}

    assert {each.momentum for each in norms().values()} == {0.1}
    assert all(each.momentum == (0.01 if "encoder" in name else 0.1) for name, each in norms(batch_norm_momentum=0.01).items())
    for kind in ("train", "frozen", "fixed"):
        trained = {value.requires_grad for each in norms(batch_norm=kind).values() for value in each.parameters()}
        assert trained == {kind != "fixed"}


def test_a_run_before_the_options_of_its_preset_is_the_same_network() -> None:
    """The record of such a run has no options: segmentation-models-pytorch's own numbers."""
    decoder = small("deeplabv3plus").network.decoder
    aspp = decoder.aspp[0]
    assert [branch[0][0].dilation for branch in aspp.convs[1:4]] == [(12, 12), (24, 24), (36, 36)], "separable: a pair each"
    assert aspp.project[3].p == 0.5


def test_masks_are_probabilities() -> None:
    """The shares of MaskFormer's semantic inference, and their order."""
    segmenter = small("mask2former").eval()
    with torch.inference_mode():
        pixels = torch.randn(1, 3, 64, 64)
        logits = segmenter(pixels)
        answer = segmenter.network(pixel_values=pixels)
    masks = torch.nn.functional.interpolate(answer.masks_queries_logits, (64, 64), mode="bilinear").sigmoid()
    shares = torch.einsum("bqc,bqhw->bchw", answer.class_queries_logits.softmax(-1)[..., :-1], masks)
    torch.testing.assert_close(logits.softmax(1), shares / shares.sum(1, keepdim=True))


def test_the_official_sizes() -> None:
    """Millions of parameters of SegFormer's table 1 (encoders) and of Mask2Former's models."""
    with torch.device("meta"):
        millions = {
            name: sum(p.numel() for p in build_segmenter("segformer", name, {}, 150).encoder_parameters()) / 1e6
            for name in SEGFORMER
        }
        swin = {
            name: sum(p.numel() for p in build_segmenter("mask2former", name, {}, 150).encoder_parameters()) / 1e6
            for name in ("swin-tiny", "swin-large")
        }
    assert millions == pytest.approx({"b0": 3.4, "b1": 13.1, "b2": 24.2, "b3": 44.0, "b4": 60.8, "b5": 81.4}, abs=1.1)
    assert swin == pytest.approx({"swin-tiny": 27.5, "swin-large": 195.0}, rel=0.02)
    assert set(SWIN) == {"swin-tiny", "swin-small", "swin-base", "swin-large"}


def test_a_head_of_swin_has_32_channels() -> None:
    """Which no number of parameters shows (arXiv:2103.14030, section 3.3)."""
    for name, options in SWIN.items():
        width, heads = options["embed_dim"], options["num_heads"]
        assert isinstance(width, int) and heads == [width * 2**stage // 32 for stage in range(4)], name


def test_the_linear_head_starts_as_dinov2s() -> None:
    """Linear evaluation code of facebookresearch/dinov2: weights of standard deviation 0.01, no bias."""
    head = VisionTransformer(torch.nn.Identity(), 256, 21).head
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.05) and not head.bias.any()


@pytest.mark.parametrize(
    ("architecture", "encoder", "options"),
    [("unet", "resnet19", {}), ("segformer", "b7", {}), ("mask2former", "swin-giant", {}), ("unet", "resnet18", {"no_such": 1})],
)
def test_what_cannot_be_built_is_named(architecture: str, encoder: str, options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=rf"{architecture} with encoder '{encoder}'.*cannot be built") as caught:
        build_segmenter(architecture, encoder, options, 5)
    assert "resnet101" in caught.value.hint


# ---- how fast each part learns ----


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        ("poly", (0, 50, 75, 99), (1.0, 0.5**0.9, 0.25**0.9, 0.01**0.9)),
        ("cosine", (0, 50, 75), (1.0, 0.5, 0.5 * (1 - 0.5**0.5))),
    ],
)
def test_schedules(schedule: Any, steps: tuple[int, ...], expected: tuple[float, ...]) -> None:
    args = OptimizerArgs(rate=2e-3, steps=100, schedule=schedule, power=0.9)
    assert [rate_at(step, args) for step in steps] == pytest.approx([2e-3 * value for value in expected])


def test_the_warm_up_rises_to_the_schedule() -> None:
    args = OptimizerArgs(rate=1.0, steps=1000, schedule="poly", power=1.0, warm_up=10)
    assert [rate_at(step, args) for step in (0, 5, 10)] == pytest.approx([1e-6, 0.5000005 * 0.995, 0.99])


def test_the_encoder_waits_for_the_heads_warm_up() -> None:
    segmenter = small("vit")
    args = OptimizerArgs(
        kind="adamw", rate=1.0, steps=100, power=0, head_factor=2, layer_decay=0.5, warm_up=10, encoder_warm_up=20
    )
    optimizer = optimizer_for(segmenter, args)
    head, last = segmenter.network.head.weight, segmenter.network.encoder.blocks[-1].mlp.fc1.weight
    found = []
    for step in (5, 9, 10, 20, 30, 99):
        set_rates(optimizer, step, args)
        rate = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        found += [rate[head], rate[last]]
    assert found == pytest.approx([1, 0, 1.8, 0, 2, 0, 2, 0.5, 2, 1, 2, 1], abs=1e-5)


def test_a_schedule_in_stairs() -> None:
    args = OptimizerArgs(rate=1.0, steps=100, schedule="poly", power=1.0, schedule_every=10)
    assert [rate_at(step, args) for step in (0, 9, 10, 19, 99)] == pytest.approx([1.0, 1.0, 0.9, 0.9, 0.1])


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_groups_by_rate_and_decay(kind: Any) -> None:
    segmenter = small("deeplabv2")
    args = OptimizerArgs(kind=kind, rate=0.5, head_factor=10, weight_decay=0.01)
    optimizer = optimizer_for(segmenter, args)
    set_rates(optimizer, 0, args)
    told = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    named = dict(segmenter.network.named_parameters())
    assert len(told) == len(named)
    vector = 0.0 if kind == "adamw" else 0.01
    assert told[id(named["encoder.conv1.weight"])] == (0.5, 0.01)
    assert told[id(named["encoder.bn1.weight"])] == (0.5, vector)
    assert told[id(named["branches.0.weight"])] == (5.0, 0.01)
    assert told[id(named["branches.0.bias"])] == (5.0, vector)


@pytest.mark.parametrize(
    ("no_decay", "without"),
    [
        ("none", ()),
        ("vectors", ("encoder.bn1.weight", "encoder.bn1.bias", "branches.0.bias")),
        ("encoder-norms", ("encoder.bn1.weight", "encoder.bn1.bias")),
        ("norms-and-embeddings", ("encoder.bn1.weight", "encoder.bn1.bias")),
        ("head-biases", ("branches.0.bias",)),
    ],
)
def test_parameters_without_decay(no_decay: Any, without: tuple[str, ...]) -> None:
    segmenter = small("deeplabv2")
    decay = _decay_of(segmenter, OptimizerArgs(no_decay=no_decay, weight_decay=0.01))
    names = ("encoder.conv1.weight", "encoder.bn1.weight", "encoder.bn1.bias", "branches.0.weight", "branches.0.bias")
    assert {name for name in names if decay[name] == 0} == set(without)


def test_embeddings_and_tables_without_decay() -> None:
    """Mask2Former has four kinds of learned positions and queries; the pixel decoder's is a bare parameter and decays."""
    decay = _decay_of(small("mask2former"), OptimizerArgs(no_decay="norms-and-embeddings", weight_decay=0.01))
    positions = [name for name in decay if name.rpartition(".")[0].endswith(("embedder", "features", "level_embed"))]
    positions += [name for name in decay if name.endswith(".level_embed")]
    tables = [name for name in decay if name.endswith("relative_position_bias_table")]
    assert len(tables) == 4 and not any(decay[name] for name in tables)
    assert {name: decay[name] for name in positions} == {
        "model.pixel_level_module.decoder.level_embed": 0.01,
        "model.transformer_module.queries_embedder.weight": 0.0,
        "model.transformer_module.queries_features.weight": 0.0,
        "model.transformer_module.level_embed.weight": 0.0,
    }
    assert {value for name, value in decay.items() if name.endswith("in_proj_bias")} == {0.01}, "biases decay"


def _decay_of(segmenter: Segmenter, args: OptimizerArgs) -> dict[str, float]:
    groups = optimizer_for(segmenter, args).param_groups
    told = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    return {name: told[id(parameter)] for name, parameter in segmenter.network.named_parameters()}


def test_biases_of_the_head_and_what_is_not_trained() -> None:
    segmenter = build_from(ModelArgs(architecture="deeplabv2", encoder="resnet18", init="hub:imagenet", batch_norm="fixed"), 5, 1)
    groups = optimizer_for(segmenter, OptimizerArgs(head_factor=10, head_bias_factor=2)).param_groups
    named = {id(parameter): name for name, parameter in segmenter.network.named_parameters()}
    told = {named[id(parameter)]: group["factor"] for group in groups for parameter in group["params"]}
    assert told["encoder.conv1.weight"] == 1 and told["branches.0.weight"] == 10 and told["branches.0.bias"] == 20
    assert not [name for name in told if ".bn" in name or "downsample.1" in name]


def test_the_head_of_segformer_drops_complete_channels() -> None:
    segmenter = small("segformer").train()
    assert isinstance(segmenter.network.decode_head.dropout, torch.nn.Dropout2d)
    assert segmenter.network.decode_head.dropout.p == 0.1


# ---- vision transformers ----


@pytest.mark.parametrize(("encoder", "patch"), [("vit_small_patch14_dinov2", 14), ("vit_small_patch16_dinov3", 16)])
def test_a_vision_transformer_has_a_label_for_each_patch(encoder: str, patch: int) -> None:
    """Its head is DINOv2's linear one: batch norm and 1 x 1 convolution on the tokens of the last four layers."""
    segmenter = build_segmenter("vit", encoder, {"depth": 5, "embed_dim": 48, "num_heads": 3}, 5).eval()
    assert segmenter.multiple_of == patch
    pixels = torch.randn(1, 3, 4 * patch, 6 * patch)
    with torch.inference_mode():
        coarse = segmenter.network(pixels)
        _, layers = segmenter.encoder().forward_intermediates(pixels, norm=True)  # type: ignore[operator]
        by_hand = segmenter.network.head(segmenter.network.norm(torch.cat(layers[-4:], dim=1)))  # type: ignore[operator]
    assert coarse.shape == (1, 5, 4, 6)
    torch.testing.assert_close(coarse, by_hand)


def test_the_stride_of_a_hybrid_is_that_of_its_tokens() -> None:
    segmenter = build_segmenter("vit", "vit_tiny_r_s16_p8_224", {"depth": 4}, 3)
    assert segmenter.multiple_of == 32, "its convolutions have 4, its patches 8"


def test_layers_learn_slower_towards_the_input() -> None:
    segmenter = small("vit")
    optimizer = optimizer_for(segmenter, OptimizerArgs(kind="adamw", layer_decay=0.5, head_factor=3))
    factor = {parameter: group["factor"] for group in optimizer.param_groups for parameter in group["params"]}
    found = {name: factor[parameter] for name, parameter in segmenter.network.named_parameters()}
    assert [found[f"encoder.blocks.{layer}.mlp.fc1.weight"] for layer in range(4)] == [0.125, 0.25, 0.5, 1]
    assert found["encoder.patch_embed.proj.weight"] == 0.0625
    assert found["encoder.norm.weight"] == 1 and found["head.weight"] == 3
    plain = optimizer_for(segmenter, OptimizerArgs(kind="adamw", head_factor=3))
    assert {group["factor"] for group in plain.param_groups} == {1, 3}


def test_a_model_that_is_no_vision_transformer() -> None:
    with pytest.raises(UsageError, match="vit with encoder 'resnet18' .* cannot be built") as caught:
        build_segmenter("vit", "resnet18", {}, 3)
    assert "a vision transformer of timm" in caught.value.hint
    with pytest.raises(UsageError, match="expected a plain vision transformer, whose layers have one size"):
        build_segmenter("vit", "swin_tiny_patch4_window7_224", {}, 3)
    with pytest.raises(UsageError, match="layers: expected 1 to 3, got 4"):
        build_segmenter("vit", "vit_small_patch16_dinov3", {"depth": 3, "embed_dim": 48, "num_heads": 3}, 3)


def test_the_decoder_of_segformer_has_the_width_of_the_paper() -> None:
    """arXiv:2105.15203, table 6: C = 256 for B0 and B1, 768 for the others."""
    widths = {name: config["decoder_hidden_size"] for name, config in SEGFORMER.items()}
    assert widths == {"b0": 256, "b1": 256, **dict.fromkeys(("b2", "b3", "b4", "b5"), 768)}
