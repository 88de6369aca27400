"""The parts of TensorRT's engine that are ours, on a real GPU with networks of PyTorch: memory, streams, graphs and threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch: pip install 'wsss[export]'")
pytest.importorskip("cuda.bindings", reason="needs cuda-bindings: pip install 'wsss[trt-rtx]'")

import torch

from wsss.engines.tensors import Gathered
from wsss.engines.trt import TrtEngine
from wsss.spec import AxisRange, GraphSpec, TensorSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a torch for CUDA"),
]
WIDTH = 512


def affine(inputs: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
    torch.mul(inputs["x"], 2.0, out=out)
    out.add_(1.0)


def slow(inputs: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
    """As `affine`, after work that keeps the GPU busy."""
    torch.mul(inputs["x"], 2.0, out=out)
    for _ in range(200):
        out.mul_(1.0)
    out.add_(1.0)


@pytest.fixture
def opener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Opens an engine of a network, and closes it."""
    from . import torch_gpu

    gpu = torch_gpu.TorchGpu()
    monkeypatch.setattr("wsss.engines.trt.load_modules", lambda flavour: (gpu.tensorrt, gpu.runtime))
    axes = {"batch": AxisRange(1, 8, 32)}
    inputs, outputs = (TensorSpec("x", ("batch", WIDTH), "float32"),), (TensorSpec("y", ("batch", WIDTH), "float32"),)
    with ExitStack() as opened:

        def open_network(launch: torch_gpu.Launch, **options: Any) -> TrtEngine:
            name = f"{launch.__name__}-{len(gpu.plans)}"
            network = torch_gpu.TorchNetwork(
                inputs, outputs, axes, lambda feeds: {}, activations_bytes=32 * WIDTH * 4, launch=launch
            )
            gpu.plans[name.encode()] = network
            (tmp_path / f"{name}.plan").write_bytes(name.encode())
            spec = GraphSpec(file="graph.onnx", inputs=inputs, outputs=outputs, axes=axes, opset=18)
            return opened.enter_context(TrtEngine(tmp_path / f"{name}.plan", spec, flavour="trt", **options))

        yield open_network
    assert not gpu.faults


def values(batch: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_every_call_computes_its_own_feeds(opener: Any, cuda_graphs: bool) -> None:
    engine = opener(slow, cuda_graphs=cuda_graphs)
    for turn in range(60):
        x = values(1 + turn % 4, turn)
        np.testing.assert_allclose(np.asarray(engine({"x": x})["y"]), 2 * x + 1, rtol=1e-6)
    assert engine.cuda_graphs == (4 if cuda_graphs else 0)


def test_engines_are_chained_on_the_gpu_and_share_their_activations(opener: Any) -> None:
    first, second = opener(slow), opener(affine)
    kept, gathered, expected = [], Gathered(), []
    for turn in range(40):
        x = values(8, turn)
        y = second({"x": first({"x": x})["y"]})["y"]
        if turn % 5 == 0:
            kept.append((y.clone(), x))
        gathered.add(y)
        expected.append(4 * x + 3)
    for clone, x in kept:
        np.testing.assert_allclose(np.asarray(clone), 4 * x + 3, rtol=1e-5)
    for found, want in zip(gathered.arrays(), expected, strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-5)
    assert first.cuda_graphs == second.cuda_graphs == 1


def test_threads_get_what_they_asked_for(opener: Any) -> None:
    engines = [opener(slow), opener(affine)]
    wrong: list[str] = []

    def work(number: int) -> None:
        for turn in range(50):
            x = values(1 + turn % 8, 100 * number + turn)
            found = np.asarray(engines[number]({"x": x})["y"])
            if not np.allclose(found, 2 * x + 1, rtol=1e-5):
                wrong.append(f"thread {number}, turn {turn}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_torch_reads_outputs_in_place_and_feeds_its_own(opener: Any) -> None:
    engine = opener(affine)
    for turn in range(5):
        x = torch.from_numpy(values(4, turn)).cuda() * 1.0
        y = torch.as_tensor(engine({"x": x})["y"], device="cuda")
        torch.testing.assert_close((y * 1.0).cpu(), (2 * x + 1).cpu())


def test_the_memory_comes_back(opener: Any) -> None:
    free = torch.cuda.mem_get_info()[0]
    for _ in range(5):
        engine = opener(affine)
        engine({"x": values(32, 0)})
        engine.close()
    assert torch.cuda.mem_get_info()[0] >= free - (64 << 20)
