"""TensorRT played by PyTorch on a real GPU: CUDA itself, and networks that launch torch's kernels.

For GPUs on which no TensorRT is installed. Streams, events, CUDA graphs, pinned memory and addresses are real; a network
computes in the given stream, reads and writes at the given addresses, and passes its result through the activation memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import simulated_gpu as sim

Launch = Callable[[Mapping[str, Tensor], Tensor], None]
"""Computes one output from the inputs by name, into a tensor of the output's shape, without allocating memory."""


@dataclass
class TorchNetwork(sim.Network):
    """A network of one output."""

    launch: Launch = lambda inputs, out: None


class TorchGpu:
    """CUDA of this machine, and the part of TensorRT that the engine uses."""

    def __init__(self, device: int = 0) -> None:
        from cuda.bindings import runtime

        self.device, self.runtime, self.rtx, self.plugins = device, runtime, False, False
        self.plans: dict[bytes, sim.Network] = {}
        self.released: list[str] = []
        self.faults: list[str] = []
        self.memory: dict[int, Any] = {}
        self.tensorrt = sim.tensorrt_of(self)  # type: ignore[arg-type]
        self.tensorrt.Runtime.deserialize_cuda_engine = lambda runtime, data: TorchEngine(
            self,  # type: ignore[arg-type]
            self.plans[bytes(data)],
            runtime._logger,
        )


class TorchEngine(sim.Engine):
    """A plan of a `TorchNetwork`."""

    def create_execution_context(self, config: Any) -> Any:
        assert config == "user"
        return TorchContext(self._gpu, self._network, self._logger, 0)


class TorchContext(sim.Context):
    """Launches torch's kernels."""

    def execute_async_v3(self, stream: int) -> bool:
        network: Any = self._network
        (output,) = network.outputs
        inputs = {
            each.name: self._view(self._addresses[each.name], self._shapes[each.name], each.dtype) for each in network.inputs
        }
        shape = self.get_tensor_shape(output.name)
        out = self._view(self._addresses[output.name], shape, output.dtype)
        activations = self._view(self._memory[0], shape, output.dtype)
        assert math.prod(shape) * activations.element_size() <= self._memory[1]
        with torch.cuda.stream(torch.cuda.ExternalStream(stream, device=self._gpu.device)):  # type: ignore[attr-defined]
            network.launch(inputs, activations)
            out.copy_(activations)
        return True

    def _view(self, address: int, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Memory of the GPU as a tensor, without a copy."""
        kind = {"float32": "<f4", "float16": "<f2", "uint8": "|u1", "int64": "<i8", "bool": "|b1"}[dtype]
        interface = {"shape": shape, "typestr": kind, "data": (address, False), "strides": None, "version": 3}
        holder = type("Memory", (), {"__cuda_array_interface__": interface})()
        return torch.as_tensor(holder, device=f"cuda:{self._gpu.device}")  # type: ignore[attr-defined]
