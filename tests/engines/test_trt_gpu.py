"""TensorRT's engine on a real GPU: the small SAM, built here from the shipped bundle, against ONNX Runtime on the CPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsss.engines.engine import Engine
from wsss.engines.ort import OrtEngine
from wsss.engines.plan import best_flavour, checked_plan, find_gpus
from wsss.engines.trt import TrtEngine
from wsss.errors import WsssError
from wsss.runtime.bundles import MINI
from wsss.spec import Model, open_bundle

pytestmark = pytest.mark.gpu
Open = Callable[..., TrtEngine]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The small SAM with plans for this machine."""
    try:
        gpus, flavour = find_gpus(), best_flavour()
    except WsssError as error:
        pytest.skip(f"{error.message}: {error.hint}")
    if not gpus:
        pytest.skip("needs an NVIDIA GPU with a working driver")
    if flavour is None:
        pytest.skip(f"needs a TensorRT that supports {gpus[0].name}: pip install 'wsss[trt]' or 'wsss[trt-rtx]'")
    from wsss.export.to_engine import BuildOptions, build_plans

    folder = tmp_path_factory.mktemp("bundle")
    shutil.copytree(MINI / "sam", folder / "sam")
    try:
        return build_plans(open_bundle(folder).model("sam"), BuildOptions(flavour=flavour), lambda line: None)
    except WsssError as error:
        pytest.skip(f"{flavour} cannot build for {gpus[0].name}: {error.message}")


@pytest.fixture
def open_trt(model: Model) -> Iterator[Open]:
    """Opens graphs in TensorRT, and closes them."""
    flavour = best_flavour()
    assert flavour is not None
    with ExitStack() as opened:

        def open_graph(graph: str, **options: Any) -> TrtEngine:
            path, spec = checked_plan(model, graph, flavour, find_gpus()[0], unverified=True)
            return opened.enter_context(TrtEngine(path, spec, flavour=flavour, **options))

        yield open_graph


def ort(model: Model, graph: str) -> OrtEngine:
    return OrtEngine(model.path(graph), model.graph(graph), threads=2)


def photographs(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Blobs of color, and the part of the canvas that they fill."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (count, 16, 16, 3), np.uint8)
    size = random.integers(128, 257, (count, 2), np.int64)
    return {"pixels": coarse.repeat(16, axis=1).repeat(16, axis=2), "size": size}


def difference(found: object, expected: object) -> float:
    """Norm of the difference over the norm of what is expected."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_every_batch_size_and_row(model: Model, open_trt: Open, cuda_graphs: bool) -> None:
    engine, reference = open_trt("encoder", cuda_graphs=cuda_graphs), ort(model, "encoder")
    feeds = photographs(engine.axes["batch"].max)
    expected = np.asarray(reference(feeds)["embedding"])
    for batch in range(1, engine.axes["batch"].max + 1):
        for _ in range(3):  # enqueued, captured, replayed
            found = np.asarray(engine({name: value[:batch] for name, value in feeds.items()})["embedding"])
            # Room for the 10 bits of TF32, which the builder is told not to use.
            assert max(difference(a, b) for a, b in zip(found, expected, strict=False)) < 1e-2
    assert engine.cuda_graphs == (engine.axes["batch"].max if cuda_graphs else 0)


def test_graphs_on_and_off_compute_the_same(open_trt: Open) -> None:
    on, off = open_trt("encoder"), open_trt("encoder", cuda_graphs=False)
    for turn in range(6):
        feeds = photographs(2, seed=turn)
        # TensorRT-RTX compiles other kernels for a graph than for the first calls.
        assert difference(on(feeds)["embedding"], off(feeds)["embedding"]) < 1e-2
    assert (on.cuda_graphs, off.cuda_graphs) == (1, 0)


def assert_fused(label_map: Any, feeds: dict[str, Any]) -> None:
    """That of NumPy in float64, but for pixels within rounding of an edge or the margin."""
    from wsss.export.sam.fuse import LOGIT_ROUNDING, fused_by_sorting, near_ties

    logits = np.asarray(feeds["logits"])[feeds["pick"]].astype(np.float64)
    z = feeds["rows"] @ logits @ feeds["columns"].T
    rounding = 4 * LOGIT_ROUNDING * np.abs(logits).max(axis=(1, 2))  # up to a hundred terms a pixel, where resizing has four
    masks = feeds["score"], feeds["label"], float(feeds["margin"][0])
    want = fused_by_sorting(z, *masks)["label_map"]
    assert (near_ties(z, rounding, *masks, want)["label_map.options"] == np.asarray(label_map)).any(axis=0).all()


def chain(encoder: Engine, decoder: Engine, fuse: Engine, turn: int) -> tuple[list[Any], Any, dict[str, Any]]:
    """Three photographs with nine boxes in two decoder calls; the first call's masks fused, with what; what stays is cloned."""
    random = np.random.default_rng(turn)
    embedding = encoder(photographs(3, seed=turn))["embedding"]
    logits = []
    for _ in range(2):
        corner = random.uniform(0, 100, (9, 2)).astype(np.float32)
        boxes = np.concatenate([corner, corner + random.uniform(20, 150, (9, 2)).astype(np.float32)], axis=1)
        image, multimask = np.arange(9) // 3, np.arange(9) % 2 == 1
        out = decoder({"embedding": embedding, "boxes": boxes, "image": image, "multimask": multimask})
        kept = out["logits"]
        logits.append(kept.clone() if hasattr(kept, "clone") else kept)
    side = logits[0].shape[1]
    linear = np.repeat(np.eye(side, dtype=np.float32), 2, axis=0)
    fed = {
        "logits": logits[0],
        "pick": np.arange(9),
        "score": np.linspace(0.5, 0.9, 9, dtype=np.float32),
        "label": np.arange(9) % 4 + 1,
        "margin": np.array([0.1], np.float32),
        "rows": linear,
        "columns": linear,
    }
    return logits, fuse(fed)["label_map"], fed


def test_the_chain_stays_on_the_gpu_and_agrees(model: Model, open_trt: Open) -> None:
    graphs = ("encoder", "decoder", "fuse")
    engines, references = [open_trt(graph) for graph in graphs], [ort(model, graph) for graph in graphs]
    for turn in range(4):
        before = [engine.copied["device_to_host"] for engine in engines]
        logits, label_map, fed = chain(*engines, turn=turn)
        assert [engine.copied["device_to_host"] for engine in engines] == before
        assert_fused(label_map, fed)
        wanted, _, _ = chain(*references, turn=turn)
        for found, want in zip(logits, wanted, strict=True):
            assert difference(found, want) < 2e-2
    assert engines[1].copied["host_to_device"] == 4 * 2 * 16 * (4 * 4 + 8), "boxes and image numbers, padded; no embedding"


def test_clones_and_host_arrays_survive_a_gpu_that_is_behind(open_trt: Open) -> None:
    encoder, fed = open_trt("encoder"), [photographs(8, seed=seed) for seed in range(8)]
    alone = [np.asarray(encoder(feeds)["embedding"]) for feeds in fed]
    clones = []
    scratch = {name: value.copy() for name, value in fed[0].items()}
    for feeds in fed:
        for name, value in feeds.items():
            scratch[name][:] = value
        clones.append(encoder(scratch)["embedding"].clone())
        scratch["pixels"][:] = 0
    for clone, expected in zip(clones, alone, strict=True):
        assert difference(clone, expected) < 1e-2


def test_pytorch_tensors_in_and_out_without_the_host(open_trt: Open) -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a torch with CUDA")
    encoder = open_trt("encoder")
    feeds = photographs(4)
    expected = np.asarray(encoder(feeds)["embedding"])
    encoder.copied.clear()
    stream = torch.cuda.Stream()
    slow = torch.randn(4096, 4096, device="cuda")
    for own in (torch.cuda.default_stream(), stream) * 3:
        with torch.cuda.stream(own):
            for _ in range(20):  # milliseconds of work before the pixels are there
                slow = slow @ slow * 1e-2
            pixels = torch.zeros(4, 256, 256, 3, dtype=torch.uint8, device="cuda")
            size = torch.zeros(4, 2, dtype=torch.int64, device="cuda")
            pixels.copy_(torch.from_numpy(feeds["pixels"]), non_blocking=True)
            size.copy_(torch.from_numpy(feeds["size"]), non_blocking=True)
            out = encoder({"pixels": pixels, "size": size})["embedding"].clone()
            pixels.zero_()  # after the engine has read
        assert difference(out, expected) < 1e-2
        there = torch.as_tensor(out, device="cuda")
        assert there.data_ptr() == out.block.address
        assert difference(there.cpu().numpy(), expected) < 1e-2
    assert encoder.copied["host_to_device"] == 0
    with pytest.raises(WsssError, match="contiguous"):
        encoder({"pixels": pixels.flip(1).transpose(1, 2), "size": size})


def test_pycuda_arrays(open_trt: Open) -> None:
    gpuarray = pytest.importorskip("pycuda.gpuarray", reason="needs pycuda: pip install 'wsss[pycuda]'")
    pytest.importorskip("pycuda.autoprimaryctx")
    encoder, feeds = open_trt("encoder"), photographs(2)
    expected = np.asarray(encoder(feeds)["embedding"])
    encoder.copied.clear()
    found = encoder({name: gpuarray.to_gpu(value) for name, value in feeds.items()})["embedding"]
    assert encoder.copied["host_to_device"] == 0
    assert difference(found, expected) < 1e-2


def test_fusing_tiles_of_many_sizes(model: Model, open_trt: Open) -> None:
    engine = open_trt("fuse")
    random = np.random.default_rng(1)
    for _ in range(40):
        height, width = (int(side) for side in random.integers(1, 200, 2))
        feeds = {
            "logits": random.normal(size=(3, 128, 128)).astype(np.float32),
            "pick": np.array([2, 0]),
            "score": np.array([0.9, 0.5], np.float32),
            "label": np.array([1, 2]),
            "margin": np.array([0.1], np.float32),
            "rows": random.uniform(size=(height, 128)).astype(np.float32) / 64,
            "columns": random.uniform(size=(width, 128)).astype(np.float32) / 64,
        }
        found = engine(feeds)
        assert found["label_map"].shape == (height, width)
        assert_fused(found["label_map"], feeds)


def test_activations_are_taken_for_the_calls_that_come(open_trt: Open) -> None:
    """Of the full TensorRT only if the engine was built with RUNTIME_ACTIVATION_RESIZE_10_10, as ours are."""
    engine = open_trt("encoder")
    arena = engine._contexts._arena
    assert arena.size_bytes == 0
    engine(photographs(1))
    small = arena.size_bytes
    engine(photographs(engine.axes["batch"].max))
    assert 0 < small < arena.size_bytes


def test_closing_returns_the_memory(open_trt: Open) -> None:
    from cuda.bindings import runtime

    def free_bytes() -> int:
        runtime.cudaDeviceSynchronize()
        return int(runtime.cudaMemGetInfo()[1])

    for turn in range(5):
        with open_trt("decoder") as engine:
            embedding = np.zeros((1, 64, 32, 32), np.float32)
            box = {"boxes": np.zeros((1, 4), np.float32), "image": np.zeros(1, np.int64), "multimask": np.zeros(1, bool)}
            for _ in range(3):
                engine({"embedding": embedding, **box})
        if turn == 1:
            settled = free_bytes()
    assert free_bytes() >= settled - (8 << 20), "CUDA itself keeps a little"


def test_tensorrt_rtx_keeps_its_kernels(model: Model, open_trt: Open) -> None:
    if best_flavour() != "trt-rtx":
        pytest.skip("the full TensorRT compiles nothing while it runs")
    engine = open_trt("encoder")
    engine(photographs(1))
    engine.close()
    (file,) = Path(model.folder).glob("encoder*.plan.kernels")
    assert file.stat().st_size > 1000
