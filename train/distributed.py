"""The processes of a training: one, or those that ``torchrun`` started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UsageError, WsssError
from .args import MachineArgs


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's rank, the number of processes, and its device."""

    rank: int
    size: int
    device: torch.device
    local_size: int = 1
    """Number of processes on this machine."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and logs."""
        return self.rank == 0

    def total(self, value: Tensor) -> Tensor:
        """Sum ``value`` over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def wait(self) -> None:
        """Wait until every process has called this."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined(args: MachineArgs) -> Iterator[World]:
    """Join the process group for the duration of a training.

    Raises:
        WsssError: a GPU is requested but missing, or there are fewer GPUs than processes. UsageError: invalid torchrun variables.
    """
    rank, size, local = _variable("RANK", 0), _variable("WORLD_SIZE", 1), _variable("LOCAL_RANK", 0)
    local_size = _variable("LOCAL_WORLD_SIZE", size)
    gpus = torch.cuda.device_count()
    kind = args.device if args.device != "auto" else ("cuda" if gpus else "cpu")
    if kind == "cuda" and not gpus:
        raise WsssError("--device cuda: PyTorch finds no GPU", hint="--device cpu, or install a driver and a CUDA build of torch")
    if kind == "cuda" and local_size > gpus:
        raise WsssError(
            f"torchrun started {local_size} processes on this machine, it has {gpus} GPU{'s' if gpus > 1 else ''}",
            hint=f"torchrun --nproc-per-node {gpus}; a GPU that is missing may be hidden by CUDA_VISIBLE_DEVICES "
            f"(now {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')})",
        )
    device = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        yield World(rank=0, size=1, device=device)
        return
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield World(rank=rank, size=size, device=device, local_size=local_size)
    finally:
        dist.destroy_process_group()


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise UsageError(f"environment variable {name}: expected a number set by torchrun, got {text!r}", hint=f"unset {name}")
    return int(text)
