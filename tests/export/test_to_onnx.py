"""Tracing keeps axes free and weights shared, and writes nothing of the machine it ran on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from wsss.errors import WsssError
from wsss.export.family import Feeds, Graph, Tolerance
from wsss.export.to_onnx import ALIGNMENT, OPSET, WeightFile, export_onnx
from wsss.spec import AxisRange, TensorSpec


def make_graph(module: nn.Module, name: str = "toy") -> Graph:
    def sample(rows: int, seed: int) -> Feeds:
        return {"x": np.random.default_rng(seed).normal(size=(rows, 32)).astype(np.float32)}

    def reference(feeds: Feeds, _: Feeds) -> Feeds:
        return {"y": module(torch.from_numpy(feeds["x"])).detach().numpy()}

    return Graph(
        name=name,
        module=module,
        inputs=(TensorSpec("x", ("batch", 32), "float32"),),
        outputs=(TensorSpec("y", ("batch", 32), "float32"),),
        axes={"batch": AxisRange(1, 2, 4)},
        row_axis="batch",
        sample=sample,
        reference=reference,
        tolerance={"y": Tolerance(relative=1e-5, why="test")},
    )


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rough, self.exact = nn.Linear(32, 32), nn.Linear(32, 32)
        self.exact.weight.data = self.exact.weight.data.half().float()

    def forward(self, x: Tensor) -> Tensor:
        return self.exact(torch.relu(self.rough(x)))


class Baked(nn.Module):
    """Holds the traced batch, as groundingdino-py's Swin does."""

    def forward(self, x: Tensor) -> Tensor:
        rows = int(x.shape[0])
        return x.reshape(rows, 2, 16).reshape(3, 32)


def test_equal_tensors_share_their_bytes(tmp_path: Path) -> None:
    store = WeightFile(tmp_path / "weights.data")
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 7, 5)).astype(np.float32)
    first, again, second = (store.add(ir.Tensor(value)) for value in (one, one.copy(), other))
    assert (first.offset, first.length) == (again.offset, again.length) == (0, 140)
    assert second.offset == 192 and second.offset % ALIGNMENT == 0
    np.testing.assert_array_equal(second.numpy(), other)
    assert (tmp_path / "weights.data").stat().st_size == 192 + 140


def test_two_graphs_share_weights_and_half_is_kept_only_where_exact(tmp_path: Path) -> None:
    store = WeightFile(tmp_path / "weights.data")
    module = TwoLayers().eval()
    sizes = []
    for name in ("a", "b"):
        export_onnx(make_graph(module, name), tmp_path / f"{name}.onnx", store)
        sizes.append((tmp_path / "weights.data").stat().st_size)
    assert sizes == [32 * 32 * (4 + 2)] * 2

    model = onnx.load(tmp_path / "b.onnx", load_external_data=False)
    external = {tensor.data_type for tensor in model.graph.initializer if tensor.external_data}
    assert external == {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
    assert {entry.version for entry in model.opset_import if entry.domain == ""} == {OPSET}
    feeds = make_graph(module).sample(4, 1)
    session = onnxruntime.InferenceSession(str(tmp_path / "b.onnx"))
    with torch.no_grad():
        want = module(torch.from_numpy(feeds["x"])).numpy()
    np.testing.assert_allclose(session.run(["y"], feeds)[0], want, rtol=1e-5, atol=1e-6)
    assert str(Path(__file__).parents[2]).encode() not in (tmp_path / "b.onnx").read_bytes()


def test_a_module_is_traced_in_evaluation_mode(tmp_path: Path) -> None:
    module = nn.Sequential(TwoLayers(), nn.Dropout(0.5)).train()
    export_onnx(make_graph(module), tmp_path / "x.onnx", WeightFile(tmp_path / "weights.data"))
    feeds = make_graph(module).sample(4, 1)
    with torch.no_grad():
        want = module.eval()(torch.from_numpy(feeds["x"])).numpy()
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"))
    np.testing.assert_allclose(session.run(["y"], feeds)[0], want, rtol=1e-5, atol=1e-6)


def test_a_baked_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises((WsssError, torch.onnx.errors.OnnxExporterError)):
        export_onnx(make_graph(Baked()), tmp_path / "x.onnx", WeightFile(tmp_path / "weights.data"))
