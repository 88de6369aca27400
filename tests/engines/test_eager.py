"""PyTorch behind the same protocol."""

from __future__ import annotations

import numpy as np
import pytest

from wsss.errors import FeedError
from wsss.spec import GraphSpec

torch = pytest.importorskip("torch")
from wsss.engines.eager import EagerEngine  # noqa: E402  (needs torch)


class Double(torch.nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.noise = torch.nn.Dropout(0.9)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        double = self.noise(2 * x)
        x.zero_()
        return double, double.sum(dim=1) / 2


def test_values_in_the_order_of_the_contract(spec: GraphSpec) -> None:
    engine = EagerEngine(Double(), spec)
    x = np.array([[1, 2, 3], [4, 5, -6]], np.float32)
    out = engine({"x": x})
    assert list(out) == ["double", "total"]
    assert np.array_equal(out["double"], [[2, 4, 6], [8, 10, -12]]), "in evaluation mode: no dropout"
    assert np.array_equal(out["total"], [6, 3])
    assert np.array_equal(x, [[1, 2, 3], [4, 5, -6]]), "what was fed is not written to"
    assert np.array_equal(engine({"x": out["double"]})["double"], 2 * np.asarray(out["double"]))
    assert (engine.inputs["x"], engine.outputs["total"], dict(engine.axes)) == (spec.inputs[0], spec.outputs[1], spec.axes)


def test_wrong_feeds_are_refused(spec: GraphSpec) -> None:
    with pytest.raises(FeedError, match="eager: 'x' has batch=5"):
        EagerEngine(Double(), spec)({"x": np.zeros((5, 3), np.float32)})
