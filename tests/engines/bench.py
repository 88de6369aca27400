"""Engines on one simulated machine, for the tests of TensorRT's engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsss.engines.trt import TrtEngine
from wsss.spec import AxisRange, GraphSpec, TensorSpec

from . import simulated_gpu as sim

X = np.array([[1, 2, 3], [4, 5, -6]], np.float32)
AXES = {"batch": AxisRange(1, 2, 4)}


def tensors(axes: tuple[int | str, ...] = ("batch", 3), dtype: Any = "float32", *names: str) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, axes, dtype) for name in names)


class Bench:
    """Opens engines on one simulated machine."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._patch = folder, monkeypatch
        self.opened: list[TrtEngine] = []
        self.use(sim.Gpu())

    def use(self, gpu: Any) -> Any:
        self.gpu = gpu
        self._patch.setattr("wsss.engines.trt.load_modules", lambda flavour: (gpu.tensorrt, gpu.runtime))
        return gpu

    def plan(self, name: str, network: Any) -> Path:
        path = self.folder / f"{name}.plan"
        path.write_bytes(name.encode())
        self.gpu.plans[name.encode()] = network
        return path

    def open(
        self,
        name: str,
        function: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]],
        inputs: tuple[TensorSpec, ...] = tensors(("batch", 3), "float32", "x"),
        outputs: tuple[TensorSpec, ...] = tensors(("batch", 3), "float32", "y"),
        *,
        axes: Mapping[str, AxisRange] = AXES,
        flavour: Any = "trt",
        network: dict[str, Any] | None = None,
        **options: Any,
    ) -> TrtEngine:
        plan = self.plan(name, sim.Network(inputs, outputs, axes, function, **(network or {})))
        spec = GraphSpec(file="graph.onnx", inputs=inputs, outputs=outputs, axes=axes, opset=18)
        self.opened.append(TrtEngine(plan, spec, flavour=flavour, **options))
        return self.opened[-1]

    def count(self, call: str) -> int:
        return self.gpu.calls.count(call)


def nothing_left(gpu: Any) -> None:
    assert not gpu.faults
    assert not gpu.pinned and not gpu.graphs and not gpu.executables
    assert gpu.streams.keys() <= {sim.LEGACY}
    left = {base for base in gpu.memory if base not in gpu.__dict__.get("foreign", ())}
    assert not left, f"{len(left)} pieces of GPU memory leak"


def double(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"y": 2 * feeds["x"]}


def increment(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"y": feeds["x"] + 1}


def foreign(gpu: Any, values: np.ndarray, **options: Any) -> Any:
    tensor = sim.Foreign(gpu, values, **options)
    gpu.__dict__.setdefault("foreign", set()).add(tensor.address)
    return tensor
