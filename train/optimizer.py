"""Optimizer and learning rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .args import OptimizerArgs
from .model import Segmenter


def rate_at(step: int, args: OptimizerArgs) -> float:
    """The encoder's learning rate at a step, counted from 0: a linear warm-up times a poly or cosine decay to zero."""
    done = step / args.steps
    decay = (1 - done) ** args.power if args.schedule == "poly" else 0.5 * (1 + math.cos(math.pi * done))
    return args.rate * min(1.0, (step + 1) / (args.warm_up + 1)) * decay


def is_constant(args: OptimizerArgs) -> bool:
    """Whether the rate of a step does not depend on the number of steps, so that a finished run can be continued to more."""
    return args.schedule == "poly" and args.power == 0


def optimizer_for(segmenter: Segmenter, args: OptimizerArgs) -> Optimizer:
    """Create an optimizer with up to four parameter groups: encoder or head, with or without weight decay.

    Under adamw biases, norms and other vectors have no weight decay (SegFormer's and Swin's configurations); under sgd all
    parameters have (DeepLab's). A group's ``factor`` multiplies the scheduled rate.
    """
    encoder = segmenter.encoder_parameters()
    parameters_of: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in segmenter.parameters():
        factor = 1.0 if parameter in encoder else args.head_factor
        decay = 0.0 if args.kind == "adamw" and parameter.ndim <= 1 else args.weight_decay
        parameters_of.setdefault((factor, decay), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "factor": factor, "weight_decay": decay} for (factor, decay), parameters in parameters_of.items()
    ]
    if args.kind == "adamw":
        return torch.optim.AdamW(groups, lr=args.rate, betas=(args.momentum, 0.999))
    return torch.optim.SGD(groups, lr=args.rate, momentum=args.momentum)


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of every group to ``rate`` times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
