"""PyTorch on a GPU with half-precision products, for machines without TensorRT and ONNX Runtime's CUDA provider.

It measures how fast the GPU computes a graph's operations, not our engines: it is timed, never used for labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ..engines.engine import contract
from ..errors import WsssError
from ..export.exporting import prepare_again
from ..spec import Model


class AutocastEngine:
    """The module from which a graph was traced, under autocast to float16; takes and returns torch tensors.

    Args:
        device: a torch device, ``cuda:0``.

    Raises:
        WsssError: the model has no such graph, or its weights are missing.
    """

    def __init__(self, model: Model, graph: str, device: str) -> None:
        self.inputs, self.outputs, self.axes = contract(model.graph(graph))
        graphs = (make() for make in prepare_again(model.manifest).graphs)
        module = next((candidate.module for candidate in graphs if candidate.name == graph), None)
        if module is None:
            raise WsssError(f"{model.folder.name}/{graph}: the exporter has no such graph")
        self._module, self._device = module.eval().to(device), torch.device(device)

    @torch.inference_mode()
    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        with torch.autocast(self._device.type, torch.float16):
            outputs = self._module(*(feeds[name] for name in self.inputs))
        return dict(zip(self.outputs, (outputs,) if isinstance(outputs, torch.Tensor) else outputs, strict=True))

    def resident(self, feeds: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], Callable[[Mapping[str, Any]], None]]:
        """Feeds on the device, and a function that waits for outputs."""
        tensors = {name: torch.from_numpy(array).to(self._device) for name, array in feeds.items()}
        tensors = {name: tensor.float() if tensor.dtype == torch.float16 else tensor for name, tensor in tensors.items()}

        def wait(outputs: Mapping[str, Any]) -> None:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)

        return tensors, wait
