"""Maximum compute rate and memory bandwidth of this machine, measured by a large matrix product and a large copy.

`Ceiling` in JSON: ``teraflops`` (two operations for a multiply-add, best of several products), ``gigabytes_per_second`` (read and
write together, best of several copies; None where it could not be measured) and ``how`` both were measured.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from ..engines.opening import open_graph
from ..engines.plan import MODULES, find_gpus
from ..errors import WsssError
from ..spec import GraphSpec, Manifest, Model, Precision, Preprocess, TensorSpec, sha256_of, write_manifest

CPU_SIDE, GPU_SIDE = 1536, 8192
"""Side of the matrices: larger ones do not give a higher rate."""
CPU_COPY_BYTES, GPU_COPY_BYTES = 128 << 20, 4 << 30
REPEATS = 5
GRAPH_SIDE, GRAPH_PRODUCTS = 4096, 16
"""Side and number of matrix products in the graph that is measured where torch is missing."""


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """Maximum compute rate and bandwidth in one precision."""

    teraflops: float | None
    gigabytes_per_second: float | None
    how: str
    """Library, precision and size of the measurement."""

    def bound_ms(self, multiply_adds: float, size_bytes: float) -> float | None:
        """Minimum time for these multiply-adds and bytes, the longer of the two; None where the compute rate is unknown."""
        times = [2 * multiply_adds / self.teraflops * 1e-9] if self.teraflops else []
        times += [size_bytes / self.gigabytes_per_second * 1e-6] if self.gigabytes_per_second else []
        return max(times) if self.teraflops else None


def measure_ceiling(engine: str, device: str, precision: Precision) -> Ceiling:
    """Measure the maximum of this machine for graphs of a precision.

    Args:
        engine: used to measure the product on a GPU when torch cannot.
        device: ``cpu`` or ``cuda:N``, from `wsss.engines.opening.choose`.
    """
    if device == "cpu":
        return _of_cpu(precision)
    index = int(device.partition(":")[2] or 0)
    if _torch_sees_cuda():
        return _by_torch(index, precision)
    copied = _gpu_copy(index)
    try:
        product, how = product_by_graph(engine, device, precision, GRAPH_SIDE, GRAPH_PRODUCTS), f"a graph of products in {engine}"
    except (WsssError, ImportError) as error:
        product, how = None, f"no matrix product: {error}".split("\n")[0]
    return Ceiling(teraflops=product, gigabytes_per_second=copied, how=f"{how}; cudaMemcpy")


def best_seconds(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """The shortest time of several runs, after one untimed run."""
    run()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return min(times)


def _of_cpu(precision: Precision) -> Ceiling:
    """In half precision the larger of torch's rate and that of float32, in which ONNX Runtime computes it."""
    product, how = _cpu_product(), "numpy, float32, all cores"
    if precision != "fp32" and importlib.util.find_spec("torch") is not None:
        half = _cpu_half_product(precision)
        if half > product:
            product, how = half, f"torch, {precision}, all cores"
    return Ceiling(teraflops=product, gigabytes_per_second=_cpu_copy(), how=f"{how}; one copy")


def _cpu_half_product(precision: Precision) -> float:
    torch = importlib.import_module("torch")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    one, other = (torch.randn(CPU_SIDE, CPU_SIDE).to(dtype) for _ in range(2))
    out = torch.empty_like(one)
    return 2 * CPU_SIDE**3 / best_seconds(lambda: torch.matmul(one, other, out=out)) * 1e-12


def _cpu_product() -> float:
    rng = np.random.default_rng(0)
    one, other = (rng.normal(size=(CPU_SIDE, CPU_SIDE)).astype(np.float32) for _ in range(2))
    out = np.empty_like(one)
    return 2 * CPU_SIDE**3 / best_seconds(lambda: np.matmul(one, other, out=out)) * 1e-12


def _cpu_copy() -> float:
    source, target = np.ones(CPU_COPY_BYTES, np.uint8), np.empty(CPU_COPY_BYTES, np.uint8)
    return 2 * CPU_COPY_BYTES / best_seconds(lambda: np.copyto(target, source)) * 1e-9


# ---- a GPU, through torch ----


def _torch_sees_cuda() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    return bool(importlib.import_module("torch").cuda.is_available())


def _by_torch(index: int, precision: Precision) -> Ceiling:
    torch = importlib.import_module("torch")
    device = torch.device("cuda", index)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    torch.backends.cuda.matmul.allow_tf32 = False  # as engines are built and ONNX Runtime is set
    one, other = (torch.randn(GPU_SIDE, GPU_SIDE, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(one)
    free = torch.cuda.mem_get_info(device)[0]
    size = min(GPU_COPY_BYTES, free // 8)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def timed(run: Callable[[], object], count: int) -> float:
        def many() -> None:
            for _ in range(count):
                run()
            torch.cuda.synchronize(device)

        return best_seconds(many) / count

    product = 2 * GPU_SIDE**3 / timed(lambda: torch.matmul(one, other, out=out), 10) * 1e-12
    copied = 2 * size / timed(lambda: target.copy_(source), 5) * 1e-9
    precision_name = str(dtype).removeprefix("torch.")
    return Ceiling(
        teraflops=product,
        gigabytes_per_second=copied,
        how=f"torch {torch.__version__}: {precision_name} {GPU_SIDE}^3, random; copy_",
    )


# ---- a GPU, without torch ----


def _gpu_copy(index: int) -> float | None:
    """GB/s of a copy within the GPU's memory with cuda-bindings, None where they are missing."""
    try:
        gpus = find_gpus()
        runtime = importlib.import_module("cuda.bindings.runtime")
    except (WsssError, ImportError):
        return None
    if index >= len(gpus):
        return None
    return copied_by(runtime, index, min(GPU_COPY_BYTES, gpus[index].memory_bytes // 16))


def copied_by(runtime: ModuleType, index: int, size_bytes: int) -> float:
    """GB/s, read and write together, of a copy of ``size_bytes`` by CUDA's runtime."""
    from ..engines.buffers import Block, Cuda, Stream

    cuda = Cuda(runtime, index)
    stream, source, target = Stream(cuda), Block(cuda, size_bytes), Block(cuda, size_bytes)

    def run() -> None:
        stream.copy(target.address, source.address, size_bytes, "device_to_device")
        stream.finish()

    try:
        return 2 * size_bytes / best_seconds(run) * 1e-9
    finally:
        stream.close()
        source.free()
        target.free()
        cuda.close()


def product_by_graph(engine: str, device: str, precision: Precision, side: int, products: int) -> float:
    """TFLOP/s of a graph of matrix products alone, on any engine.

    Raises:
        WsssError: the engine cannot be built or run. ImportError: onnx is missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = _product_model(Path(folder) / "product", precision, side, products)
        if engine in MODULES:
            from ..export.to_engine import BuildOptions, build_plans

            index = int(device.partition(":")[2] or 0)
            model = build_plans(model, BuildOptions(flavour=engine, device=index), lambda line: None)
        loaded = open_graph(model, "product", engine, device=device, unverified=True)
        feeds = {"scale": np.ones((1, 1), np.float32 if precision == "fp32" else np.float16)}
        seconds = best_seconds(lambda: np.asarray(loaded(feeds)["largest"]))  # the host waits for the result, one number
        return 2 * products * side**3 / seconds * 1e-12


def _product_model(folder: Path, precision: Precision, side: int, products: int) -> Model:
    from onnx import TensorProto, helper, numpy_helper, save

    kind, dtype = (TensorProto.FLOAT, np.float32) if precision == "fp32" else (TensorProto.FLOAT16, np.float16)
    # Scaled so that repeated products keep their magnitude.
    matrix = (np.random.default_rng(0).standard_normal((side, side), np.float32) / np.sqrt(side)).astype(dtype)
    nodes = [helper.make_node("Mul", ["matrix", "scale"], ["y0"])]
    nodes += [helper.make_node("MatMul", [f"y{n}", "matrix"], [f"y{n + 1}"]) for n in range(products)]
    nodes += [helper.make_node("ReduceMax", [f"y{products}"], ["largest"], keepdims=1)]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "product",
        [value("scale", kind, [1, 1])],
        [value("largest", kind, [1, 1])],
        [numpy_helper.from_array(matrix, "matrix")],
    )
    folder.mkdir()
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), folder / "product.onnx")
    name = "float32" if precision == "fp32" else "float16"
    spec = GraphSpec(
        file="product.onnx",
        inputs=(TensorSpec("scale", (1, 1), name),),  # type: ignore[arg-type]
        outputs=(TensorSpec("largest", (1, 1), name),),  # type: ignore[arg-type]
        axes={},
        opset=18,
        precision=precision,
    )
    manifest = Manifest(
        family="product",
        variant=f"{side}",
        precision=precision,
        preprocess=Preprocess(
            resize="squash", longest_px=1, filter="bilinear", canvases=(), mean=(0, 0, 0), std=(1, 1, 1), source="ceiling.py"
        ),
        graphs={"product": spec},
        weights={"source": "none", "sha256": ""},
        tools={},
        files={"product.onnx": sha256_of(folder / "product.onnx")},
    )
    write_manifest(folder, manifest)
    return Model(folder, manifest)
