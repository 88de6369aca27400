"""PyTorch as an engine: runs the module that a graph was exported from eagerly."""

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
    """A torch module with the contract of its graph.

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
        # Copied, because the caller may write to its arrays.
        tensors = [torch.from_numpy(np.array(feeds[name])).to(self._device) for name in self.inputs]
        # The module computes in float32, also if inputs of a half-precision graph are float16.
        inputs = [each.float() if each.dtype == torch.float16 else each for each in tensors]
        try:
            result = self._module(*inputs)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"eager: {error}") from None
        outputs = (result,) if isinstance(result, torch.Tensor) else tuple(result)
        # Not strict: a module has later outputs that a bundle of an earlier version lacks.
        return {
            name: value.cpu().numpy().astype(spec.dtype, copy=False)
            for (name, spec), value in zip(self.outputs.items(), outputs, strict=False)
        }
