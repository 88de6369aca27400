"""The state of a training, and the training step."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..batch import VOID
from ..errors import UsageError, WsssError
from .args import SET_PREDICTORS, Config
from .checkpoint import Progress, restore_last, save_last
from .data import Batch, normalized, step_seed
from .distributed import World
from .loss import Criterion
from .model import Segmenter
from .optimizer import optimizer_for, set_rates

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST_SCALE = 2.0**-10
"""Smallest scale of an fp16 loss. It starts at 2**16 and is halved at every overflow; below this the gradient is not finite."""
SHOWN = 16
"""Files of a batch listed in an error."""


class Pass(nn.Module):
    """A forward pass with its loss, the module that DistributedDataParallel wraps."""

    mean: Tensor
    std: Tensor

    def __init__(self, segmenter: Segmenter, criterion: Criterion, config: Config) -> None:
        super().__init__()
        self.segmenter, self.criterion = segmenter, criterion
        self.dtype, self.memory_format = DTYPES[config.optimizer.precision], memory_format(config)
        self.register_buffer("mean", torch.tensor(config.data.mean), persistent=False)
        self.register_buffer("std", torch.tensor(config.data.std), persistent=False)

    def pixels(self, batch: Batch) -> Tensor:
        """The network's input, (B, 3, crop, crop) float32."""
        return normalized(batch.pixels, self.mean, self.std).contiguous(memory_format=self.memory_format)

    def forward(self, batch: Batch, divisors: Tensor) -> Tensor:
        pixels = self.pixels(batch)
        with autocast(pixels.device, self.dtype):
            outputs = self.segmenter.outputs(pixels)
        return self.criterion(outputs, batch.label, batch.confidence, divisors)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to a dtype; disabled for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@contextmanager
def kernels_for(config: Config, device: torch.device) -> Iterator[None]:
    """The choice of a GPU's kernels during a training step, as ``machine.cudnn_benchmark`` and ``optimizer.precision`` have it.

    PyTorch's own choice outside of it: in a validation, every image has another size, and cuDNN would time kernels for each.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    torch.backends.cudnn.benchmark = config.machine.cudnn_benchmark
    torch.set_float32_matmul_precision("high" if config.optimizer.precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before[0]
        torch.set_float32_matmul_precision(before[1])


def is_emulated(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device has no instructions for a dtype, so that convolutions take ten times as long as in float32 or longer."""
    if device.type != "cpu" or dtype == torch.float32:
        return False
    if not torch.backends.mkldnn.is_available():
        return True
    kernels = torch.ops.mkldnn
    return not (kernels._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else kernels._is_mkldnn_fp16_supported())


class _Loss(NamedTuple):
    """The loss of a step that was not read yet."""

    total: Tensor
    """Over all processes."""
    own: Tensor
    """Of this process."""
    items: list[int]
    """The items of this process."""


@dataclass(kw_only=True)
class Run:
    """Weights, their running average, optimizer and progress."""

    config: Config
    world: World
    segmenter: Segmenter
    average: Segmenter | None
    """The running average of the weights, in evaluation mode."""
    forward_pass: nn.Module
    """`Pass`, or its distributed wrapper."""
    criterion: Criterion
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    names: Sequence[str]
    """Of the training items, for error messages."""
    _unread: list[_Loss] = field(default_factory=list)

    @classmethod
    def begin(cls, segmenter: Segmenter, criterion: Criterion, config: Config, world: World, names: Sequence[str]) -> Run:
        """Start a training from these weights, at step 0, on the world's device.

        Raises:
            UsageError: synchronized batch norm without GPUs.
        """
        segmenter = segmenter.to(world.device, memory_format=memory_format(config))
        if config.model.batch_norm == "sync":
            if world.device.type != "cuda":
                raise UsageError("model.batch_norm = sync needs GPUs", hint="--set model.batch_norm=frozen, or train")
            if world.size > 1:
                segmenter = nn.SyncBatchNorm.convert_sync_batchnorm(segmenter)
        average = copy.deepcopy(segmenter).eval().requires_grad_(False) if config.optimizer.average else None
        if isinstance(criterion, nn.Module):
            criterion.to(world.device)
        optimizer = optimizer_for(segmenter, config.optimizer)
        forward_pass: nn.Module = Pass(segmenter, criterion, config).to(world.device)
        if config.machine.compile:
            forward_pass.compile()  # not the network: validation, where every image has another size, runs it as it is
        if world.size > 1:
            for parameter in _unused_parameters(segmenter, world.device):
                parameter.requires_grad_(False)
            # a batch with only void leaves a set predictor's masks without a gradient
            forward_pass = DistributedDataParallel(forward_pass, find_unused_parameters=bool(segmenter.queries))
        run = cls(
            config=config,
            world=world,
            segmenter=segmenter,
            average=average,
            forward_pass=forward_pass,
            criterion=criterion,
            optimizer=optimizer,
            scaler=torch.amp.GradScaler(world.device.type, enabled=config.optimizer.precision == "fp16"),
            progress=Progress(),
            names=names,
        )
        run._tell_step()
        return run

    @property
    def result_segmenter(self) -> Segmenter:
        """The weights that are validated and saved: the average if there is one."""
        return self.average or self.segmenter

    def restore(self, folder: Path) -> None:
        """Restore the folder's last checkpoint."""
        network = self.average.network if self.average else None
        self.progress = restore_last(folder, self.segmenter.network, network, self.optimizer)
        if self.progress.scaler:
            self.scaler.load_state_dict(self.progress.scaler)
        self._tell_step()

    def save(self, folder: Path) -> None:
        """Write the checkpoint that `restore` reads. The losses must be settled."""
        self.progress.scaler = self.scaler.state_dict()
        network = self.average.network if self.average else None
        save_last(folder, self.segmenter.network, network, self.optimizer, self.progress)

    def advance(self, parts: Sequence[Batch]) -> None:
        """Run one optimizer step and update the average. The step's loss stays on the device until `settle`.

        Args:
            parts: the batches of the step's forward passes in this process, on its device.

        Raises:
            WsssError: an fp16 gradient overflows at any scale.
        """
        args, step = self.config.optimizer, self.progress.step
        set_rates(self.optimizer, step, args)
        self.set_training()
        if self.config.loss.teacher and step >= self.config.loss.teacher_from:
            parts = [self._without_contradicted(part) for part in parts]
        divisors = self.world.total(sum_of([self.criterion.weights(part.label, part.confidence) for part in parts]))
        total = torch.zeros((), device=self.world.device)
        for number, part in enumerate(parts):
            torch.manual_seed(step_seed(self.config.seed, step, number, self.world.rank))
            # gradients are exchanged once per step; DDP divides them by the number of processes, hence the factor
            is_deferred = isinstance(self.forward_pass, DistributedDataParallel) and number < len(parts) - 1
            with self.forward_pass.no_sync() if is_deferred else nullcontext():
                loss = self.forward_pass(part, divisors)
                torch.autograd.backward(self.scaler.scale(loss * self.world.size))
            total += loss.detach()
        if args.clip_norm:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.segmenter.parameters(), args.clip_norm, foreach=True)
            if not self.scaler.is_enabled():  # the scaler skips a step whose gradient is not finite
                total = torch.where(norm.isfinite(), total, norm)
        items = [row for part in parts for row in part.item.tolist()]
        self._step_optimizer(items)
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self._tell_step()
        self._average()
        self._unread.append(_Loss(self.world.total(total.clone()), total, items))

    @torch.no_grad()
    def _without_contradicted(self, batch: Batch) -> Batch:
        """The batch without the labels that the running average of the weights contradicts, see `LossArgs.teacher`."""
        assert self.average is not None
        single = self.forward_pass.module if isinstance(self.forward_pass, DistributedDataParallel) else self.forward_pass
        assert isinstance(single, Pass)
        pixels = single.pixels(batch)
        with autocast(pixels.device, DTYPES[self.config.optimizer.precision]):
            logits = self.average(pixels)
        probability, predicted = logits.float().softmax(dim=1).max(dim=1)
        contradicted = (predicted != batch.label) & (probability >= self.config.loss.teacher)
        return dataclasses.replace(batch, label=batch.label.masked_fill(contradicted, VOID))

    def settle(self) -> None:
        """Read the losses of the steps since the last call into ``progress.recent``, which waits for the device.

        Raises:
            WsssError: a loss, or a gradient that was to be clipped, is not finite; names the files of its batch.
        """
        unread, self._unread = self._unread, []
        if not unread:
            return
        values = torch.stack([each.total for each in unread]).tolist()
        for step, (value, each) in enumerate(zip(values, unread, strict=True), self.progress.step - len(unread) + 1):
            if not math.isfinite(value):
                where = "in the batch of another process" if math.isfinite(float(each.own)) else self._files_of(each.items)
                what = "the loss or its gradient" if self.config.optimizer.clip_norm else "the loss"
                raise self._not_finite(step, f"{what} is {value}", where)
        self.progress.recent += values

    def _files_of(self, items: Sequence[int]) -> str:
        more = f"\n  and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
        return "in the batch of\n  " + "\n  ".join(self.names[row] for row in items[:SHOWN]) + more

    def check(self) -> None:
        """Read the losses as `settle` does. Raises WsssError if one of them, or a weight, is not finite."""
        self.settle()
        finite = torch.stack([parameter.isfinite().all() for parameter in self.segmenter.parameters()])
        if not finite.all():
            raise self._not_finite(self.progress.step, "the weights are not finite", "after a gradient that was not finite")

    def _step_optimizer(self, items: Sequence[int]) -> None:
        if not self.scaler.is_enabled():
            self.optimizer.step()
            return
        before = self.scaler.get_scale()  # waits for the device, as every step with a scaler does
        self.scaler.step(self.optimizer)
        self.scaler.update()
        after = self.scaler.get_scale()
        self.progress.left_out += after < before
        if after < SMALLEST_SCALE:
            raise self._not_finite(self.progress.step + 1, "the gradient overflows at any scale", self._files_of(items))

    def set_training(self) -> None:
        """Switch to training mode; frozen batch norms, and a frozen encoder, stay in evaluation mode."""
        self.segmenter.train()
        if self.config.model.batch_norm in ("frozen", "fixed"):
            for module in self.segmenter.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        if self.config.model.freeze_encoder:
            self.segmenter.encoder().eval()

    def _tell_step(self) -> None:
        """Set what changes with the training to its state at the step, from which it follows: no checkpoint has it."""
        for segmenter in (self.segmenter, self.average):
            if segmenter is not None:
                segmenter.at_step(self.progress.step, self.config.optimizer.steps)

    @torch.no_grad()
    def _average(self) -> None:
        if self.average is None:
            return
        step = self.progress.step
        decay = min(self.config.optimizer.average, (1 + step) / (10 + step))  # shorter at first, because early weights are bad
        kept, values = self.average.network.state_dict().values(), self.segmenter.network.state_dict().values()
        pairs = list(zip(kept, values, strict=True))
        torch._foreach_lerp_(*map(list, zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)), 1 - decay)
        for count, value in pairs:
            if not count.is_floating_point():
                count.copy_(value)

    def _not_finite(self, step: int, problem: str, where: str) -> WsssError:
        return WsssError(
            f"step {step}: {problem}, {where}",
            hint="a smaller optimizer.rate, a longer optimizer.warm_up, or --set optimizer.precision=fp32; the last checkpoint "
            "is intact; the same command continues from it",
        )


def _unused_parameters(segmenter: Segmenter, device: torch.device) -> list[nn.Parameter]:
    """Parameters that no output depends on (some encoders have a stage that is never called). DDP would wait for them."""
    segmenter.eval()  # keeps batch statistics unchanged
    outputs = segmenter(torch.zeros(1, 3, 64, 64, device=device))
    parameters = [parameter for parameter in segmenter.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(outputs.sum(), parameters, allow_unused=True)
    return [parameter for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is None]


def memory_format(config: Config) -> torch.memory_format:
    """The memory format of images and kernels."""
    return torch.channels_last if config.machine.channels_last else torch.contiguous_format


def sum_of(values: Sequence[Tensor]) -> Tensor:
    """The sum of equal-shaped tensors."""
    return torch.stack(list(values)).sum(dim=0)


def check_divisible(config: Config, multiple_of: int, world: World) -> None:
    """Raises UsageError if crop or batch is not divisible as required."""
    crop, batch, parts = config.data.crop, config.data.batch, world.size * config.data.accumulate
    if crop % multiple_of:
        lower = crop // multiple_of * multiple_of
        raise UsageError(
            f"data.crop: {config.model.architecture} takes multiples of {multiple_of}, got {crop}",
            hint=f"--crop {lower}" if lower else f"--crop {multiple_of}",
        )
    if batch % parts:
        raise UsageError(
            f"data.batch: {batch} images do not divide into {world.size} processes x {config.data.accumulate} forward passes",
            hint=f"--batch {max(batch // parts, 1) * parts}",
        )
    norms = config.model.batch_norm == "train" and config.model.architecture not in ("segformer", *SET_PREDICTORS)
    if norms and batch // parts == 1:
        raise UsageError(
            "data.batch: one image per forward pass is too few for batch statistics",
            hint=f"--batch {2 * parts}, fewer data.accumulate, or --set model.batch_norm=frozen",
        )
