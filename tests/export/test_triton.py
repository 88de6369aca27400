"""A bundle as a model repository of Triton: its files, its configurations by Triton's own schema, and the client of the docs."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from wsss.batch import Boxes, Photograph
from wsss.engines.opening import open_graph
from wsss.errors import BundleError, UsageError
from wsss.export.triton import config_of, row_axis, write_repository
from wsss.runtime.bundles import MINI
from wsss.runtime.segment import MaskPredictor
from wsss.spec import AxisRange, Bundle, GraphSpec, Parity, PlanSpec, TensorSpec

DOCS = Path(__file__).parents[2] / "docs" / "triton.md"
TYPES = {"TYPE_FP32": np.float32, "TYPE_FP16": np.float16, "TYPE_UINT8": np.uint8, "TYPE_INT64": np.int64, "TYPE_BOOL": np.bool_}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("triton") / "repository"
    names = write_repository(Bundle(MINI), out)
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    return out


def parsed(text: str) -> Any:
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs tritonclient")
    from google.protobuf import text_format

    return text_format.Parse(text, schema.ModelConfig())


def test_configurations_fit_the_graphs(repository: Path) -> None:
    """The shapes and types that Triton would compare with the ONNX file, which ONNX Runtime tells."""
    for folder in repository.iterdir():
        config = parsed((folder / "config.pbtxt").read_text())
        assert (config.name, config.backend) == (folder.name, "onnxruntime")
        session = onnxruntime.InferenceSession(str(folder / "1" / "model.onnx"))
        for tensors, nodes in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
            assert {tensor.name for tensor in tensors} == {node.name for node in nodes}
            for tensor in tensors:
                node = next(node for node in nodes if node.name == tensor.name)
                dims = [-1 if isinstance(side, str) or side is None else side for side in node.shape]
                assert list(tensor.dims) == dims[config.max_batch_size > 0 :], (folder.name, tensor.name)
                assert dims[0] == -1 or not config.max_batch_size
                type_ = type(tensor).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[tensor.data_type].name
                kinds = {"float": "float32", "float16": "float16"}
                kind = node.type.removeprefix("tensor(").removesuffix(")")
                assert np.dtype(TYPES[type_]).name == kinds.get(kind, kind)


def test_requests_are_joined_along_independent_rows_only(repository: Path) -> None:
    joined = {
        path.parent.name: int(re.findall(r"max_batch_size: (\d+)", path.read_text())[0])
        for path in repository.glob("*/config.pbtxt")
    }
    assert {name for name, most in joined.items() if not most} == {"sam_decoder", "sam_fuse"}
    assert joined["sam_encoder"] == Bundle(MINI).model("sam").graph("encoder").axes["batch"].max
    assert "dynamic_batching { preferred_batch_size: [ 8 ] }" in (repository / "sam_encoder" / "config.pbtxt").read_text()
    assert "dynamic_batching" not in (repository / "sam_decoder" / "config.pbtxt").read_text()


def test_an_axis_alone_is_no_batch() -> None:
    outputs = (TensorSpec("y", ("batch",), "float32"),)
    spec = GraphSpec(file="x", inputs=(TensorSpec("x", ("batch", 3), "float32"),), outputs=outputs, axes={}, opset=18)
    assert row_axis(spec) is None
    assert row_axis(replace(spec, outputs=(TensorSpec("y", ("batch", 1), "float32"),))) == "batch"
    assert row_axis(replace(spec, inputs=(*spec.inputs, TensorSpec("z", ("other", 2), "int64")))) is None
    assert 'output { name: "y" data_type: TYPE_FP32 dims: [ -1 ] }' in config_of("x", spec, "onnxruntime")


def test_weights_are_copied(repository: Path) -> None:
    """onnx refuses weights with several names, and would refuse the bundle's."""
    for folder in repository.iterdir():
        onnx.load(folder / "1" / "model.onnx")
    onnx.load(MINI / "sam" / "encoder.onnx")


def test_a_repository_is_replaced_and_nothing_else(repository: Path, tmp_path: Path) -> None:
    (repository / "sam_fuse" / "stale").touch()
    write_repository(Bundle(MINI), repository)
    assert not (repository / "sam_fuse" / "stale").exists()
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(UsageError, match="has something else than a model repository"):
        write_repository(Bundle(MINI), tmp_path)
    assert (tmp_path / "photo.jpg").exists()


# ---- TensorRT engines ----

RANGE = {"batch": AxisRange(1, 2, 4)}


def plan(target: str, *, parity: bool = True) -> PlanSpec:
    return PlanSpec(
        file=f"{target}.plan",
        sha256="0",
        flavour="trt",
        graph_sha256="0",
        weights_sha256="0",
        precision="fp16",
        axes=RANGE,
        builder="10.14",
        target=target,
        driver="580",
        seconds=1.0,
        parity=Parity(engine="trt", reference="r", tolerance={}, rows=()) if parity else None,
    )


@pytest.mark.parametrize(
    ("plans", "gpu", "found"),
    [
        ([plan("NVIDIA L4")], None, "NVIDIA L4"),
        ([plan("NVIDIA L4"), plan("NVIDIA A100")], "a100", "NVIDIA A100"),
        ([plan("NVIDIA L4"), plan("NVIDIA A100")], None, "--gpu: expected one of NVIDIA A100, NVIDIA L4, got nothing"),
        ([plan("NVIDIA L4")], "H100", "--gpu: expected one of NVIDIA L4, got H100, which fits none"),
        ([plan("NVIDIA L4", parity=False)], None, "its engine has not passed the parity gate"),
        ([], None, "has no engine of the full TensorRT"),
    ],
)
def test_engines_are_taken_that_were_proven_on_the_gpu(
    tmp_path: Path, plans: list[PlanSpec], gpu: str | None, found: str
) -> None:
    spec = GraphSpec(
        file="image.onnx",
        inputs=(TensorSpec("x", ("batch", 3), "float16"),),
        outputs=(TensorSpec("y", ("batch", 2), "float16"),),
        axes=RANGE,
        opset=18,
        plans={each.key: each for each in plans},
    )
    for each in plans:
        (tmp_path / each.file).write_text(each.target)
    model = SimpleNamespace(folder=tmp_path, graph=lambda _: spec, manifest=SimpleNamespace(graphs={"image": spec}))
    bundle = SimpleNamespace(models=lambda: ["clip"], model=lambda _: model)
    out = tmp_path / "out"
    if found.startswith("NVIDIA"):
        write_repository(bundle, out, backend="tensorrt", gpu=gpu)  # type: ignore[arg-type]
        assert (out / "clip_image" / "1" / "model.plan").read_text() == found
        assert 'backend: "tensorrt"' in (out / "clip_image" / "config.pbtxt").read_text()
        return
    with pytest.raises((UsageError, BundleError), match=re.escape(found)) as error:
        write_repository(bundle, out, backend="tensorrt", gpu=gpu)  # type: ignore[arg-type]
    assert error.value.hint and not out.exists()


def test_bfloat16_is_not_for_onnxruntime(tmp_path: Path) -> None:
    spec = replace(Bundle(MINI).model("sam").graph("encoder"), precision="bf16")
    model = SimpleNamespace(
        path=lambda _: Path("encoder.onnx"), graph=lambda _: spec, manifest=SimpleNamespace(graphs={"encoder": spec})
    )
    bundle = SimpleNamespace(models=lambda: ["sam"], model=lambda _: model)
    with pytest.raises(BundleError, match="is in bf16"):
        write_repository(bundle, tmp_path / "out")  # type: ignore[arg-type]


# ---- the client of docs/triton.md ----


class Server:
    """A client whose server is the repository in ONNX Runtime; it refuses what Triton would refuse."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository

    def infer(self, name: str, inputs: list[Any]) -> SimpleNamespace:
        config = parsed((self.repository / name / "config.pbtxt").read_text())
        feeds: Mapping[str, np.ndarray] = {each.name: each.value for each in inputs}
        for tensor in config.input:
            shape = feeds[tensor.name].shape[config.max_batch_size > 0 :]
            assert all(want in (-1, got) for want, got in zip(tensor.dims, shape, strict=True))
        session = onnxruntime.InferenceSession(str(self.repository / name / "1" / "model.onnx"))
        out = dict(zip([each.name for each in session.get_outputs()], session.run(None, dict(feeds)), strict=True))
        return SimpleNamespace(as_numpy=out.__getitem__)


class InferInput:
    def __init__(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        self.name, self.shape, self.dtype = name, shape, dtype

    def set_data_from_numpy(self, value: np.ndarray) -> None:
        assert value.shape == self.shape and self.dtype in ("UINT8", "INT64", "FP32", "BOOL")
        self.value = value


def test_the_client_of_the_docs_segments_as_the_runtime_does(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    utilities = pytest.importorskip("tritonclient.utils", reason="needs tritonclient")
    fake = ModuleType("tritonclient.grpc")
    names = {"InferInput": InferInput, "InferenceServerClient": lambda _: Server(repository)}
    vars(fake).update(names, np_to_triton_dtype=utilities.np_to_triton_dtype)
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", fake)
    monkeypatch.setattr(sys.modules["tritonclient"], "grpc", fake, raising=False)
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    made: dict[str, Any] = {"BUNDLE": MINI}
    exec(compile(code, str(DOCS), "exec"), made)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    photo = Photograph(name="a", pixels=pixels)
    xyxy = np.array([[5, 5, 40, 50], [20, 10, 80, 55]], np.float32)
    boxes = Boxes(xyxy, np.ones(2, np.float32), np.ones(2, np.int64), np.zeros(2, np.int64))
    sam = Bundle(MINI).model("sam")
    local = MaskPredictor(sam, open_graph(sam, "encoder", "ort"), open_graph(sam, "decoder", "ort"))
    got, want = made["segment"]([photo], boxes), local([photo], boxes)
    np.testing.assert_allclose(np.asarray(got.logits[0]), np.asarray(want.logits[0]), atol=1e-3)
    np.testing.assert_allclose(got.quality, want.quality, atol=1e-5)
