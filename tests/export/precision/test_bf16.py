"""bfloat16 graphs: what their float32 form computes, the gate on it, and TensorRT-RTX compiling them."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from wsss.errors import ParityError
from wsss.export.exporting import export_model, verify_model
from wsss.export.family import Options, Tolerance, family
from wsss.export.precision import lowering as precision
from wsss.export.precision.bf16 import write_bf16_emulation
from wsss.export.precision.lowering import lower
from wsss.export.to_engine import BuildOptions, build_plans
from wsss.spec import AxisRange, open_bundle

BF16 = Options(batch=AxisRange(1, 2, 4), precision="bf16")


def silent(line: str) -> None: ...


def brain(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def test_every_result_is_rounded_as_bfloat16_is(tmp_path: Path) -> None:
    text = """g (float[N, 4] x, int64[2] shape) => (float[M, 4] y) <float[4] w = {1.1, -2.3, 3.7, 0.3}> {
        [product] a = Mul(x, w)
        [power] b = Exp(a)
        [filled] c = ConstantOfShape <value = float[1] {0.3}> (shape)
        [moved] d = Concat <axis = 0> (b, c)
        [rooted] e = Sqrt(d)
        [wide] f = Add(e, w)
        [last] y = Mul(f, w)
    }"""
    model = ir.from_proto(onnx.parser.parse_model('<ir_version: 10, opset_import: ["": 18]>\n' + text))
    lower(model, "bf16", {"wide"}, {"x": "float32", "y": "float32"})
    ir.save(model, tmp_path / "g.onnx")
    (tmp_path / "wide").mkdir()
    path = write_bf16_emulation(tmp_path / "g.onnx", tmp_path / "wide")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    (y,) = session.run(None, {"x": x, "shape": np.array([2, 4])})

    exact, w = np.array([1.1, -2.3, 3.7, 0.3], np.float32), brain(np.array([1.1, -2.3, 3.7, 0.3], np.float32))
    b = brain(np.exp(brain(brain(x) * w)))
    d = np.concatenate([b, brain(np.full((2, 4), 0.3, np.float32))])
    want = brain(brain(brain(np.sqrt(d)) + exact) * w)
    np.testing.assert_array_equal(y, want)


def test_a_tolerance_is_coarser_and_says_so() -> None:
    tolerance = Tolerance(relative=0.01, absolute=0.5, why="of logits").coarser()
    assert (tolerance.relative, tolerance.absolute) == (0.04, 2.0)
    assert tolerance.why == "4 times that of float16 (of logits), as bfloat16 rounds eight times as coarsely"
    assert Tolerance(relative=0.01, why="x").coarser().absolute is None


def test_a_model_in_bfloat16_is_gated_verified_and_compiled(tmp_path: Path) -> None:
    export_model(family("sam"), variant="mini", weights="mini", bundle=tmp_path, options=BF16, log=silent)
    model = open_bundle(tmp_path).model("sam")
    assert model.manifest.precision == "bf16"
    for graph in model.manifest.graphs.values():
        assert graph.precision == "bf16" and graph.parity is not None
        assert "bfloat16 rounded in float32" in graph.parity.engine
    verdict = verify_model(model, None, silent)
    assert 1e-3 < verdict["encoder"].worst("embedding").error < 2e-2, "float16 has 6e-4"
    assert verdict == {name: graph.parity for name, graph in model.manifest.graphs.items()}
    built = build_plans(model, BuildOptions(flavour="trt-rtx"), silent)
    assert all(graph.plans["trt-rtx"].precision == "bf16" for graph in built.manifest.graphs.values())


def test_the_gate_looks_at_the_numbers_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = precision._rounded
    monkeypatch.setattr(precision, "_rounded", lambda values, half: exact(np.where(values > 0, 1.1, 1.0) * values, half))
    with pytest.raises(ParityError, match="sam encoder: output 'embedding'"):
        export_model(family("sam"), variant="mini", weights="mini", bundle=tmp_path, options=BF16, log=silent)
    assert not list(tmp_path.iterdir())
