"""ONNX Runtime on a real GPU: the small models against the same runtime on the CPU."""

from __future__ import annotations

import numpy as np
import pytest

from wsss.benchmarks.feeds import feeds_for, load_of
from wsss.engines.ort import OrtEngine
from wsss.engines.ort_library import cuda_trouble
from wsss.runtime.bundles import MINI
from wsss.spec import open_bundle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda_trouble() is not None, reason="needs onnxruntime-gpu and a GPU: pip install 'wsss[gpu]'"),
]


@pytest.mark.parametrize("name", ["clip/image", "clip/text", "sam/encoder", "sam/decoder"])
def test_fp32_on_the_gpu_is_that_of_the_cpu(name: str) -> None:
    """TF32 has 10 bits, and would differ by 1e-3."""
    model, _, graph = name.partition("/")
    opened = open_bundle(MINI).model(model)
    spec = opened.graph(graph)
    feeds = feeds_for(opened, graph, load_of(spec, spec.axes, 2))
    here, there = (OrtEngine(opened.path(graph), spec, device=device)(feeds) for device in ("cuda", "cpu"))
    for output in there:
        found, expected = np.asarray(here[output], np.float64), np.asarray(there[output], np.float64)
        assert np.linalg.norm(found - expected) <= 2e-5 * np.linalg.norm(expected), output
