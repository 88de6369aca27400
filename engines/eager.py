"""PyTorch as an engine: the module a graph was exported from, run eagerly."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from ..batch import Tensor
from ..errors import OutOfMemory
from ..spec import GraphSpec
from .engine import check_feeds, contract


class EagerEngine:
    """A torch module held to a graph's contract.

    Args:
        module: takes the inputs in the order of ``spec.inputs``, returns a tensor or a tuple in the order of outputs.
        spec: the contract.
        device: a torch device, ``cpu`` or ``cuda:0``.
    """

    def __init__(self, module: nn.Module, spec: GraphSpec, *, device: str = "cpu") -> None:
        self._module = module.eval().to(device)
        self._device = device
        self.inputs, self.outputs, self.axes = contract(spec)

    @torch.inference_mode()
    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        check_feeds("eager", self.inputs, self.axes, feeds)
        # Copied: a torch tensor must not share memory with an array the caller may write to.
        tensors = [torch.from_numpy(np.array(feeds[name])).to(self._device) for name in self.inputs]
        # The module computes in float32 also where a half-precision graph's contract has float16 at its borders.
        whole = [each.float() if each.dtype == torch.float16 else each for each in tensors]
        try:
            answer = self._module(*whole)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"eager: {error}") from None
        outputs = (answer,) if isinstance(answer, torch.Tensor) else tuple(answer)
        return {
            name: value.cpu().numpy().astype(spec.dtype, copy=False)
            for (name, spec), value in zip(self.outputs.items(), outputs, strict=True)
        }
