"""Optimizer and learning rate schedule. docs/presets.md compares both with the sources of the presets."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .args import OptimizerArgs
from .model import Segmenter

WARM_UP_START = 1e-6
"""Share of the scheduled rate at the first step of a warm-up: ``warmup_ratio`` of SegFormer's configurations."""
NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm)
TABLES = ("relative_position_bias_table", "position_embeddings")
"""Names of the positions' parameters in transformers' Swin."""


def rate_at(step: int, args: OptimizerArgs, *, is_head: bool = False) -> float:
    """The rate at a step, counted from 0: a linear warm-up times a poly or cosine decay to zero.

    It is the encoder's. That of the head, but for its factor, differs where ``encoder_warm_up`` lets the encoder wait.
    """
    done = (step - step % args.schedule_every) / args.steps
    decay = (1 - done) ** args.power if args.schedule == "poly" else 0.5 * (1 + math.cos(math.pi * done))
    start, length = (0, args.warm_up) if is_head or not args.encoder_warm_up else (args.warm_up, args.encoder_warm_up)
    if step < start:
        return 0.0
    rise = WARM_UP_START + (1 - WARM_UP_START) * (step - start) / length if step < start + length else 1.0
    return args.rate * rise * decay


def is_constant(args: OptimizerArgs) -> bool:
    """Whether the rate of a step does not depend on the number of steps, so that a finished run can be continued to more."""
    return args.schedule == "poly" and args.power == 0


def optimizer_for(segmenter: Segmenter, args: OptimizerArgs) -> Optimizer:
    """Create an optimizer with a parameter group for each combination of learning rate and weight decay.

    A group's ``factor`` multiplies the scheduled rate: 1 for the encoder's last layer, ``layer_decay`` from each layer to the one
    before, ``head_factor`` for all outside the encoder. Parameters that are not trained are in no group.
    """
    encoder = _encoder_factors(segmenter.encoder(), args.layer_decay)
    parameters_of: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for module in segmenter.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            is_head = parameter not in encoder
            factor = args.head_factor if is_head else encoder[parameter]
            if is_head and _is_bias(name, module):
                factor *= args.head_bias_factor
            decay = args.weight_decay if _decays(parameter, name, module, is_head, args) else 0.0
            parameters_of.setdefault((factor, decay, is_head), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "factor": factor, "weight_decay": decay, "is_head": is_head}
        for (factor, decay, is_head), parameters in parameters_of.items()
    ]
    if args.kind == "adamw":
        return torch.optim.AdamW(groups, lr=args.rate, betas=(args.momentum, 0.999), fused=True)
    # the fused kernel, when it skips an overflown first step, leaves the momentum uninitialized
    return torch.optim.SGD(groups, lr=args.rate, momentum=args.momentum, fused=args.precision != "fp16")


def _encoder_factors(encoder: nn.Module, layer_decay: float) -> dict[nn.Parameter, float]:
    """The factor of each parameter of the encoder; its last layer, and the norm after it, have 1."""
    parameters = dict(encoder.named_parameters())
    if layer_decay == 1:
        return dict.fromkeys(parameters.values(), 1.0)
    from timm.models import group_parameters

    layers: dict[str, int] = group_parameters(encoder, encoder.group_matcher(coarse=False), reverse=True)
    last = max(layer for name, layer in layers.items() if name.startswith("blocks."))
    return {parameter: layer_decay ** max(last - layers[name], 0) for name, parameter in parameters.items()}


def _is_bias(name: str, module: nn.Module) -> bool:
    return name.endswith("bias") and not isinstance(module, NORMS)


def _decays(parameter: nn.Parameter, name: str, module: nn.Module, is_head: bool, args: OptimizerArgs) -> bool:
    """Whether a parameter has weight decay, by ``args.no_decay``."""
    rule = args.no_decay
    if rule == "auto":
        rule = "vectors" if args.kind == "adamw" else "none"
    if rule == "vectors":
        return parameter.ndim > 1
    if rule == "encoder-norms":
        return is_head or not isinstance(module, NORMS)
    if rule == "norms-and-embeddings":
        return not isinstance(module, (*NORMS, nn.Embedding)) and name not in TABLES
    return rule == "none" or not (is_head and _is_bias(name, module))


def set_rates(optimizer: Optimizer, step: int, args: OptimizerArgs) -> None:
    """Set the learning rate of every group to that of a step, times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate_at(step, args, is_head=group["is_head"]) * group["factor"]
