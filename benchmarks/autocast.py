"""PyTorch on a GPU with half-precision products: the last resort of a machine without TensorRT and ONNX Runtime's CUDA provider.

It tells what the GPU can do with a graph's arithmetic, not what our engines do: it is timed, never used for labels.
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
    """The module that a graph was traced from, under autocast to float16; takes and gives tensors of torch.

    Args:
        device: a torch device, ``cuda:0``.

    Raises:
        WsssError: the model has no such graph, or its weights are gone.
    """

    def __init__(self, model: Model, graph: str, device: str) -> None:
        self.inputs, self.outputs, self.axes = contract(model.graph(graph))
        made = (make() for make in prepare_again(model.manifest).graphs)
        module = next((each.module for each in made if each.name == graph), None)
        if module is None:
            raise WsssError(f"{model.folder.name}/{graph}: its exporter makes no such graph")
        self._module, self._device = module.eval().to(device), torch.device(device)

    @torch.inference_mode()
    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        with torch.autocast(self._device.type, torch.float16):
            answer = self._module(*(feeds[name] for name in self.inputs))
        return dict(zip(self.outputs, (answer,) if isinstance(answer, torch.Tensor) else answer, strict=True))

    def resident(self, feeds: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], Callable[[Mapping[str, Any]], None]]:
        """Feeds on the device, and how to wait for outputs."""
        tensors = {name: torch.from_numpy(array).to(self._device) for name, array in feeds.items()}
        tensors = {name: each.float() if each.dtype == torch.float16 else each for name, each in tensors.items()}

        def wait(outputs: Mapping[str, Any]) -> None:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)

        return tensors, wait
