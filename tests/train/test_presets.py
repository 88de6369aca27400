"""docs/presets.md is true: its tables name what is built, and every difference from a source has a reason."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wsss.batch import VOID
from wsss.train import mask_loss
from wsss.train.args import Config, DataArgs, OptimizerArgs, config_from, typed
from wsss.train.checkpoint import load_run
from wsss.train.loop import train
from wsss.train.model import Segmenter, build_from, criterion_for
from wsss.train.networks import eomt
from wsss.train.optimizer import optimizer_for, rate_at
from wsss.train.presets import PRESETS, preset

from .conftest import TINY

PAGE = Path(__file__).parents[2] / "docs" / "presets.md"
Scenes = tuple[Path, Path]
Tables = Mapping[str, Mapping[str, "Row"]]


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    source: str
    there: str
    here: str
    why: str


def read_tables() -> Tables:
    """The rows of each preset, by setting. Those of deeplabv2-coco are the other's except where its table differs."""
    found: dict[str, dict[str, Row]] = {}
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        name, _, text = section.partition("\n")
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
        if lines:
            assert lines[0] == ["setting", "source", "there", "here", "why different"]
            found[name] = {cells[0]: Row(*cells[1:]) for cells in lines[2:]}
            assert len(found[name]) == len(lines) - 2, f"a setting stands twice in {name}"
    found["deeplabv2-coco"] = {**found["deeplabv2-voc"], **found["deeplabv2-coco"]}
    return found


TABLES = read_tables()


# ---- what is built ----


@dataclass(frozen=True)
class Built:
    """A preset's network with random weights and 20 classes, and its optimizer."""

    config: Config
    segmenter: Segmenter
    groups: Mapping[nn.Parameter, tuple[float, float]]
    """Learning rate and decay at the start, by parameter."""

    @property
    def network(self) -> Any:
        return self.segmenter.network

    @property
    def encoder(self) -> Any:
        return self.segmenter.encoder()


@cache
def built(name: str) -> Built:
    config = config_from(preset(name))
    segmenter = build_from(config.model, 21, 0)
    rate = rate_at(config.optimizer.warm_up, without_schedule(config.optimizer))
    groups = {
        parameter: (rate * group["factor"], group["weight_decay"])
        for group in optimizer_for(segmenter, config.optimizer).param_groups
        for parameter in group["params"]
    }
    return Built(config, segmenter, groups)


def without_schedule(args: OptimizerArgs) -> OptimizerArgs:
    return OptimizerArgs(rate=args.rate, warm_up=args.warm_up, steps=args.steps, power=0)


def kind_of(name: str, module: nn.Module) -> str:
    if isinstance(module, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm):
        return "norms"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if name == "relative_position_bias_table":
        return "position tables"
    return "biases" if name.endswith("bias") else "kernels"


def groups_of(each: Built) -> dict[str, str]:
    """Rate and decay of every parameter, by side and kind, in the words of the tables."""
    encoder = set(each.encoder.parameters())
    found: dict[str, set[tuple[float, float] | None]] = {}
    for module in each.segmenter.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = f"{'encoder' if parameter in encoder else 'head'} {kind_of(name, module)}"
            found.setdefault(kind, set()).add(each.groups.get(parameter))
    return {kind: in_words(groups) for kind, groups in found.items()}


def in_words(groups: set[tuple[float, float] | None]) -> str:
    trained = sorted(group for group in groups if group is not None)
    if not trained:
        return "not trained"
    assert len(trained) == len(groups)
    rates = sorted({f"{trained[0][0]:.3g}", f"{trained[-1][0]:.3g}"}, key=float)
    return f"rate {' to '.join(rates)}, decay {only(decay for _, decay in trained):g}"


def listed(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)


def modules(root: nn.Module, kind: type[Any]) -> list[Any]:
    return [each for each in root.modules() if isinstance(each, kind)]


def only(values: Any) -> Any:
    (value,) = set(values)
    return value


# data


def factors(data: DataArgs) -> str:
    return listed(data.scales) if data.scales else f"{data.scale[0]:g} to {data.scale[1]:g}"


def jitter(data: DataArgs) -> str:
    brightness, contrast, saturation, hue = data.jitter
    if not any(data.jitter):
        return "none"
    assert 255 * brightness == pytest.approx(round(255 * brightness), abs=1e-3)
    return f"{255 * brightness:.0f}/255, {contrast:g}, {saturation:g}, {180 * hue:g}/180"


def schedule(args: OptimizerArgs) -> str:
    every = f", every {args.schedule_every} steps" if args.schedule_every > 1 else ""
    return f"{args.schedule}, power {args.power:g}{every}"


def optimizer(each: Built) -> str:
    made = optimizer_for(each.segmenter, each.config.optimizer)
    group = made.param_groups[0]
    if isinstance(made, torch.optim.AdamW):
        return f"AdamW, betas {group['betas'][0]:g} and {group['betas'][1]:g}, epsilon {group['eps']:g}"
    assert isinstance(made, torch.optim.SGD) and not group["nesterov"] and not group["dampening"]
    return f"SGD, momentum {group['momentum']:g}"


def warm_up(each: Built) -> str:
    args = each.config.optimizer
    if not args.warm_up:
        return "none"
    text = f"{args.warm_up} steps from {rate_at(0, args, is_head=True) / args.rate:g}"
    if not (more := args.encoder_warm_up):
        return text
    assert rate_at(args.warm_up - 1, args) == 0 < rate_at(args.warm_up + 1, args)
    return f"{text} without the encoder, then {more} for it"


COMMON: dict[str, Callable[[Built], str]] = {
    "initial weights": lambda each: {
        "hub:imagenet": "ImageNet",
        "hub:nvidia/mit-b2": "ImageNet",
        "hub:facebook/mask2former-swin-tiny-coco-panoptic": "COCO panoptic",
        "hub:lvd142m": "DINOv2",
    }[each.config.model.init],
    "crop": lambda each: str(each.config.data.crop),
    "images in a step": lambda each: str(each.config.data.batch),
    "shorter side": lambda each: str(each.config.data.shorter_px or "the image's"),
    "factors of size": lambda each: factors(each.config.data),
    "flip": lambda each: f"{each.config.data.flip:g}",
    "largest share of a label": lambda each: f"{share:g}" if (share := each.config.data.largest_share) < 1 else "any",
    "color jitter": lambda each: jitter(each.config.data),
    "mean of the colors": lambda each: listed(each.config.data.mean),
    "deviation of the colors": lambda each: listed(each.config.data.std),
    "optimizer": optimizer,
    "schedule": lambda each: schedule(each.config.optimizer),
    "warm-up": warm_up,
    "steps": lambda each: str(each.config.optimizer.steps),
    "gradient": lambda each: f"norm at most {clip:g}" if (clip := each.config.optimizer.clip_norm) else "not clipped",
    "precision": lambda each: each.config.optimizer.precision,
}


# networks


def outputs(each: Built, side: int) -> Any:
    """Outputs for the loss of two images."""
    with torch.inference_mode():
        return each.segmenter.train().outputs(torch.randn(2, 3, side, side))


def losses(each: Built) -> str:
    made = outputs(each, 64)
    return "1" if isinstance(made, Tensor) else str(len(made))


def logit_size(each: Built) -> str:
    return f"{outputs(each, 64).shape[-1] / 64:g}"


def divisor(each: Built) -> str:
    """Of the loss of an image of which three quarters are void and the logits say nothing."""
    label = torch.full((1, 4, 4), VOID, dtype=torch.uint8)
    label[0, :2, :2] = 1
    criterion, confidence = criterion_for(each.segmenter, each.config.loss, None), torch.ones(1, 21)
    loss = float(criterion(torch.zeros(1, 21, 4, 4), label, confidence, criterion.weights(label, confidence)))
    return {4: "known pixels", 1: "all pixels"}[round(4 * loss / math.log(21), 3)]


def batch_norm(each: Built) -> str:
    trained = only(value.requires_grad for norm in modules(each.network, nn.BatchNorm2d) for value in norm.parameters())
    assert trained == (each.config.model.batch_norm != "fixed")
    return each.config.model.batch_norm


def momentum(each: Built, head: bool) -> str:
    inside = set(modules(each.encoder, nn.BatchNorm2d))
    return f"{only(norm.momentum for norm in modules(each.network, nn.BatchNorm2d) if (norm not in inside) == head):g}"


def first_weights(weight: Tensor) -> str:
    """Rule and distribution of a layer's first weights, with the deviation if it is that of no rule."""
    weight = weight.detach()
    fan_in, deviation = weight[0].numel(), float(weight.std())
    # values of a uniform distribution lie within sqrt(3) deviations of zero
    shape = "uniform" if float(weight.abs().max()) < 1.8 * deviation else "normal"
    for name, expected in (("Kaiming", math.sqrt(2 / fan_in)), ("PyTorch's", math.sqrt(1 / (3 * fan_in)))):
        if deviation == pytest.approx(expected, rel=0.02):
            return f"{name}, {shape}"
    return f"{shape}, {deviation:.1g}"


def dilations(stage: nn.Module) -> list[int]:
    return [block.conv2.dilation[0] for block in stage.children()]  # type: ignore[union-attr, index]


def stride_in(each: Built) -> str:
    block = each.encoder.layer2[0]
    return {(1, 2): "3 x 3 convolution", (2, 1): "first convolution"}[block.conv1.stride[0], block.conv2.stride[0]]


def output_stride(each: Built) -> str:
    with torch.inference_mode():
        return str(64 // each.encoder.eval()(torch.randn(1, 3, 64, 64))[-1].shape[-1])


def drop_path(each: Built) -> str:
    rates = [module.drop_prob for module in each.encoder.modules() if type(module).__name__.endswith("DropPath")]
    if not rates:
        return "none"
    assert rates == sorted(rates)
    return f"0 to {rates[-1]:g}"


RESNET: dict[str, Callable[[Built], str]] = {
    "blocks of the encoder": lambda each: listed(len(getattr(each.encoder, f"layer{stage}")) for stage in (1, 2, 3, 4)),
    "stride within a block": stride_in,
    "rounding of the pooling": lambda each: "up" if each.encoder.maxpool.ceil_mode else "down",
    "output stride": output_stride,
    "batch norm": batch_norm,
    "losses": losses,
    "size of the logits in the loss": logit_size,
    "divisor of the loss": divisor,
}

DEEPLABV2 = {
    **RESNET,
    "dilation of the last two stages": lambda each: listed(
        only(dilations(stage)) for stage in (each.encoder.layer3, each.encoder.layer4)
    ),
    "rates of the head": lambda each: listed(branch.dilation[0] for branch in each.network.branches),
    "first weights of the head": lambda each: only(
        first_weights(branch.weight) for branch in each.network.branches if not branch.bias.any()
    ),
}


def aspp(each: Built) -> Any:
    return each.network.decoder.aspp


def is_separable(layer: nn.Module) -> bool:
    return layer[0].groups == layer[0].in_channels  # type: ignore[index, union-attr, operator]


DEEPLABV3PLUS = {
    **RESNET,
    "dilation of the last stage": lambda each: listed(dilations(each.encoder.layer4)),
    "rates of the head": lambda each: listed(branch[0].dilation[0] for branch in aspp(each)[0].convs[1:4]),
    "convolutions of the rates": lambda each: only(
        "plain" if isinstance(branch[0], nn.Conv2d) and branch[0].groups == 1 else "separable"
        for branch in aspp(each)[0].convs[1:4]
    ),
    "dropout of the head": lambda each: f"{only(layer.p for layer in modules(each.network, nn.Dropout)):g}",
    "convolutions after the dropout": lambda each: str(
        sum(is_separable(layer) for layer in aspp(each)[1:] if isinstance(layer, nn.Sequential))
    ),
    "fusing convolution": lambda each: "separable" if is_separable(each.network.decoder.block2[0]) else "plain",
    "channels of the early features": lambda each: str(each.network.decoder.block1[0].out_channels),
    "corners in upsampling": lambda each: only(
        "aligned" if layer.align_corners else "not aligned" for layer in modules(each.network, nn.Upsample)
    ),
    "first weights of the head": lambda each: only(first_weights(branch[0].weight) for branch in aspp(each)[0].convs[1:4]),
    "first weights of the last layer": lambda each: first_weights(each.network.segmentation_head[0].weight),
    "momentum of the encoder's norms": lambda each: momentum(each, head=False),
    "momentum of the head's norms": lambda each: momentum(each, head=True),
}


def channel_dropout(each: Built) -> str:
    layer = each.network.decode_head.dropout
    return f"{layer.p:g}{' of the channels' if isinstance(layer, nn.Dropout2d) else ''}"


SEGFORMER: dict[str, Callable[[Built], str]] = {
    "widths of the encoder": lambda each: listed(each.network.config.hidden_sizes),
    "blocks of the encoder": lambda each: listed(each.network.config.depths),
    "drop path": drop_path,
    "epsilon of the blocks' norms": lambda each: f"{only(norm.eps for norm in modules(each.encoder, nn.LayerNorm)):g}",
    "width of the head": lambda each: str(each.network.decode_head.linear_fuse.out_channels),
    "dropout of the head": channel_dropout,
    "first weights of the head": lambda each: first_weights(each.network.decode_head.linear_fuse.weight),
    "batch norm": batch_norm,
    "momentum of the head's norms": lambda each: momentum(each, head=True),
    "losses": losses,
    "size of the logits in the loss": logit_size,
    "divisor of the loss": divisor,
}


def points(each: Built) -> str:
    return str(outputs(each, each.config.data.crop // 2)[-1][1][0, 0].numel() * 4)


def void_pixels(each: Built) -> str:
    """Whether the loss changes with the masks' logits at void pixels."""
    criterion, confidence = criterion_for(each.segmenter, each.config.loss, None), torch.ones(1, 21)
    label = torch.zeros(1, 16, 16, dtype=torch.uint8)
    label[:, 8:], label[:, :, 8:] = 1, VOID
    masks = torch.randn(1, 100, 4, 4)
    other = masks.clone()
    other[..., 2:] += 5
    found = [
        float(criterion(((torch.zeros(1, 100, 22), each_masks),), label, confidence, criterion.weights(label, confidence)))
        for each_masks in (masks, other)
    ]
    return "left out" if found[0] == found[1] else "outside every mask"


MASK2FORMER: dict[str, Callable[[Built], str]] = {
    "widths of the encoder": lambda each: listed(norm.weight.numel() for norm in each.encoder.hidden_states_norms.values()),
    "blocks of the encoder": lambda each: listed(len(stage.blocks) for stage in each.encoder.swin.encoder.layers),
    "window": lambda each: str(each.encoder.config.window_size),
    "drop path": drop_path,
    "layers of the pixel decoder": lambda each: str(len(each.network.model.pixel_level_module.decoder.encoder.layers)),
    "layers of the decoder": lambda each: str(len(each.network.model.transformer_module.decoder.layers)),
    "queries": lambda each: str(each.network.model.transformer_module.queries_features.num_embeddings),
    "widths of the decoders": lambda each: listed((each.network.config.feature_size, each.network.config.hidden_dim)),
    "inner widths of the decoders": lambda each: listed(
        (each.network.config.encoder_feedforward_dim, each.network.config.dim_feedforward)
    ),
    "dropout of the decoders": lambda each: f"{each.network.config.dropout:g}",
    "first weights of the last layer": lambda each: first_weights(each.network.class_predictor.weight),
    "losses": losses,
    "weights of class, mask, dice, no object": lambda each: listed(
        (mask_loss.CLASS_WEIGHT, mask_loss.MASK_WEIGHT, mask_loss.DICE_WEIGHT, mask_loss.NO_OBJECT_WEIGHT)
    ),
    "points of a mask in the loss": points,
    "void pixels": void_pixels,
    "longer side": lambda each: "at most 4 times the shorter",  # tests/test_frame.py
}


def masks_end(each: Built) -> str:
    steps = each.config.optimizer.steps
    return ", ".join(f"{steps * start:.0f} to {steps * end:.0f}" for start, end in each.network.annealing)


def layer_decay(each: Built) -> str:
    rates = [each.groups[block.mlp.fc1.weight][0] for block in each.encoder.blocks]
    return f"{only(round(before / after, 9) for before, after in pairwise(rates)):g}"


def queries_with_masks(each: Built) -> str:
    """Those whose attention differs from that of the other queries in the evaluation of a training's first half."""
    each.network.eval().anneal(1.25 / 6)
    allowed = each.network._attention_mask(torch.full((2, 100, 16, 16), -1.0), 0, (4, 4), 121)[:, 0, :100, -1]
    each.network.anneal(1.0)
    number = int((~allowed[0]).sum())
    assert 0 < number < 100
    return "the first ones" if not allowed[:, :number].any() else "random ones"


EOMT: dict[str, Callable[[Built], str]] = {
    "width of the encoder": lambda each: str(each.encoder.embed_dim),
    "blocks of the encoder": lambda each: str(len(each.encoder.blocks)),
    "patch": lambda each: str(only(each.encoder.patch_embed.patch_size)),
    "positions": lambda each: str(each.encoder.pos_embed.shape[1]),
    "drop path": drop_path,
    "blocks with queries": lambda each: str(each.network.blocks),
    "queries": lambda each: str(each.network.q.num_embeddings),
    "steps in which a block loses its masks": masks_end,
    "power of that loss": lambda each: f"{eomt.ANNEALING_POWER:g}",
    "queries with masks in validation": queries_with_masks,
    "upscaling blocks": lambda each: str(len(each.network.upscale)),
    "layers of the mask head": lambda each: str(len(modules(each.network.mask_head, nn.Linear))),
    "first weights of the last layer": lambda each: first_weights(each.network.class_head.weight),
    "first queries": lambda each: first_weights(each.network.q.weight),
    "layer decay": layer_decay,
    "losses": losses,
    "weights of class, mask, dice, no object": MASK2FORMER["weights of class, mask, dice, no object"],
    "points of a mask in the loss": points,
    "void pixels": void_pixels,
}

READ: dict[str, dict[str, Callable[[Built], str]]] = {
    "deeplabv2-voc": {**COMMON, **DEEPLABV2},
    "deeplabv2-coco": {**COMMON, **DEEPLABV2},
    "deeplabv3plus-voc": {**COMMON, **DEEPLABV3PLUS},
    "segformer": {**COMMON, **SEGFORMER},
    "mask2former": {**COMMON, **MASK2FORMER},
    "eomt": {**COMMON, **EOMT},
}


@pytest.mark.parametrize("name", READ)
def test_the_table_names_what_is_built(name: str) -> None:
    each = built(name)
    here = {setting: read(each) for setting, read in READ[name].items()}
    here |= groups_of(each)
    assert here == {setting: row.here for setting, row in TABLES[name].items()}


@pytest.mark.parametrize("name", READ)
def test_every_difference_has_a_reason(name: str) -> None:
    for setting, row in TABLES[name].items():
        place = r"`[\w./-]+\.(py|yaml):\d+`"
        assert re.fullmatch(rf"{place}(, {place})*", row.source), f"{name}, {setting}: the source is files and lines"
        assert (row.there == row.here) == (not row.why), f"{name}, {setting}"


def test_every_preset_has_a_table() -> None:
    assert set(TABLES) == set(READ) == set(PRESETS) - {"mini"}


def test_the_presets_of_deeplabv2_differ_in_their_steps() -> None:
    voc, coco = PRESETS["deeplabv2-voc"], PRESETS["deeplabv2-coco"]
    assert voc["optimizer"] | {"steps": 100_000} == coco["optimizer"]
    assert {key: voc[key] for key in ("model", "data")} == {key: coco[key] for key in ("model", "data")}


# ---- the schedule ----


def stairs(step: int, steps: int) -> float:
    """kazuto1011/deeplab-pytorch 4219467, libs/utils/lr_scheduler.py, as main.py:250 calls it: the step just done."""
    rate = 1.0
    for iteration in range(1, step + 1):
        if iteration % 10 == 0:
            rate = (1 - iteration / steps) ** 0.9
    return rate


def with_warm_up(step: int, steps: int) -> float:
    """mmcv 1.2.7, mmcv/runner/hooks/lr_updater.py:87 and 210."""
    regular = (1 - step / steps) ** 1.0
    return regular if step >= 1500 else regular * (1 - (1 - step / 1500) * (1 - 1e-6))


@pytest.mark.parametrize(
    ("name", "share", "steps"),
    [
        ("deeplabv2-voc", stairs, 20_000),
        ("deeplabv2-coco", stairs, 100_000),
        ("deeplabv3plus-voc", lambda step, steps: (1 - step / steps) ** 0.9, 30_000),
        ("segformer", with_warm_up, 40_000),
        ("mask2former", lambda step, steps: (1 - step / steps) ** 0.9, 40_000),
    ],
)
def test_the_rate_follows_the_source(name: str, share: Callable[[int, int], float], steps: int) -> None:
    args = config_from(preset(name)).optimizer
    chosen = [0, 1, 9, 10, 11, 749, 1499, 1500, steps // 2 - 1, steps // 2, steps - 10, steps - 1]
    assert [rate_at(step, args) for step in chosen] == pytest.approx(
        [args.rate * share(step, steps) for step in chosen], rel=1e-9
    )


def test_the_warm_ups_of_eomt_take_turns() -> None:
    """tue-mps/eomt 7bd19dd, training/two_stage_warmup_poly_schedule.py:27. There the decay begins after the warm-up; here at step
    0, which lowers the rate by the shares that the table gives."""
    args = config_from(preset("eomt")).optimizer
    for is_head, start, length, lower in ((True, 0, 500, 0.0115), (False, 500, 1000, 0.0346)):
        end = start + length
        for step in (0, 1, 250, 499, 500, 501, 1000, 1499):
            rise = 0.0 if step < start else min((step - start) / length, 1)
            decay = (1 - step / args.steps) ** 0.9
            assert rate_at(step, args, is_head=is_head) == pytest.approx(
                args.rate * rise * decay, rel=1e-6, abs=1.1e-6 * args.rate
            )
        for step in (end, 20_000, args.steps - 1):
            there = (1 - (step - end) / (args.steps - end)) ** 0.9
            assert rate_at(step, args, is_head=is_head) / (args.rate * there) == pytest.approx(1 - lower, abs=5e-5)


def test_the_least_rate_of_deeplabv3plus_would_matter_in_thirteen_steps() -> None:
    """The table says so. VainF/DeepLabV3Plus-Pytorch 4e1087d, utils/scheduler.py:11."""
    args = config_from(preset("deeplabv3plus-voc")).optimizer
    assert sum(rate_at(step, args) < 1e-6 for step in range(args.steps)) == 13
    assert sum(10 * rate_at(step, args) < 1e-6 for step in range(args.steps)) <= 1


# ---- besides the tables ----


def test_the_share_that_is_held_out_is_in_the_documentation() -> None:
    data = config_from().data
    said = f"{100 * data.validation_share:g} % of the store's images, at most {data.validation_limit},"
    for page in (PAGE, PAGE.with_name("training.md")):
        assert said in " ".join(page.read_text(encoding="utf-8").split()), page.name
    assert all("validation_share" not in tables.get("data", {}) for tables in PRESETS.values())
    assert all(config_from(tables).loss.confidence == "off" for tables in PRESETS.values()), "as in the sources"


def test_the_preset_of_the_drawn_scenes() -> None:
    config = config_from(preset("mini"))
    args, data = config.optimizer, config.data
    assert (args.steps, args.rate, args.head_factor, args.weight_decay, args.no_decay) == (2400, 2e-3, 1, 0.02, "auto")
    assert (args.schedule, args.warm_up, args.clip_norm, args.average) == ("cosine", 50, 1, 0.99)
    assert (data.crop, data.batch, data.scale, data.scales, config.validation_steps) == (64, 32, (0.75, 1.35), (), 600)


def test_fixed_batch_norms_stay_as_they_are(scenes: Scenes, tmp_path: Path) -> None:
    """Statistics, scale and shift; the convolutions learn."""
    first, second = ["optimizer.average=0", "optimizer.steps=2"], [f"model.init={tmp_path / 'first'}", "model.batch_norm=fixed"]
    train(*scenes, tmp_path / "first", config_from(TINY, *map(typed, first)))
    train(*scenes, tmp_path / "second", config_from(TINY, *map(typed, first + second)))
    start, end = (load_run(tmp_path / name)[0].network for name in ("first", "second"))
    norms = {name for name, module in start.named_modules() if isinstance(module, nn.BatchNorm2d)}
    after = end.state_dict()
    changed = {name for name, value in start.state_dict().items() if not torch.equal(value, after[name])}
    assert len(norms) > 10 and not [name for name in changed if name.rpartition(".")[0] in norms]
    assert {"encoder.features.0.0.weight", "segmentation_head.0.weight"} <= changed
