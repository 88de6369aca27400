"""Writes a bundle's graphs as a model repository of NVIDIA's Triton Inference Server.

    repository/sam_encoder/config.pbtxt
    repository/sam_encoder/1/model.onnx, and weights.data beside it; or model.plan

The names, types and shapes are those of the manifest. Where all inputs and outputs have the same free axis first, Triton joins
requests along it (dynamic batching), because the rows of such a graph do not depend on each other. Other graphs take their free
axes as they are (``max_batch_size: 0``). Schema: model_config.proto of triton-inference-server/common.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from ..errors import BundleError, UsageError, WsssError
from ..files import publishing
from ..reading.onnx_files import external_files
from ..spec import Bundle, GraphSpec, Model, PlanSpec, TensorSpec

_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "uint8": "TYPE_UINT8", "int64": "TYPE_INT64", "bool": "TYPE_BOOL"}
Backend = Literal["onnxruntime", "tensorrt"]


def write_repository(bundle: Bundle, out: Path, *, backend: Backend = "onnxruntime", gpu: str | None = None) -> list[str]:
    """Write all graphs of a bundle, and return the names of Triton's models.

    Args:
        out: the repository; replaced if it is one, otherwise it must not exist or be empty.
        backend: ``tensorrt`` takes the bundle's engines of the full TensorRT, which must have passed the parity gate.
        gpu: TensorRT: the GPU the engines were built on, as `nvidia-smi` names it, or a part of that; None takes the only one.

    Raises:
        UsageError: ``out`` has something else, or ``gpu`` fits no or several GPUs.
        BundleError: a graph has no engine that may be used, or is in bf16, which ONNX Runtime does not support.
        WsssError: ``out`` cannot be written.
    """
    _check_out(out)
    names = []
    try:
        with publishing(out) as building:
            for kind in bundle.models():
                model = bundle.model(kind)
                for graph, spec in model.manifest.graphs.items():
                    name = f"{kind}_{graph}"
                    (version := building / name / "1").mkdir(parents=True)
                    if backend == "tensorrt":
                        shutil.copyfile(model.folder / _plan_of(model, graph, gpu).file, version / "model.plan")
                    else:
                        _copy_onnx(model, graph, version)
                    (building / name / "config.pbtxt").write_text(config_of(name, spec, backend), encoding="utf-8")
                    names.append(name)
    except OSError as error:
        raise WsssError(f"--out {out}: cannot be written: {error.strerror or error}", hint="give another folder") from None
    return names


def config_of(name: str, spec: GraphSpec, backend: Backend) -> str:
    """A graph's ``config.pbtxt``."""
    rows = row_axis(spec)
    most = spec.axes[rows].max if rows else 0
    lines = [f'name: "{name}"', f'backend: "{backend}"', f"max_batch_size: {most}"]
    for field, tensors in (("input", spec.inputs), ("output", spec.outputs)):
        lines += [_tensor(field, tensor, batched=rows is not None) for tensor in tensors]
    if rows:
        lines.append(f"dynamic_batching {{ preferred_batch_size: [ {spec.axes[rows].opt} ] }}")
    return "\n".join(lines) + "\n"


def row_axis(spec: GraphSpec) -> str | None:
    """The free axis that all inputs and outputs have first, along which requests can be joined; None if there is none."""
    # Triton's tensors have an axis besides that of the batch.
    first = {tensor.shape[0] if len(tensor.shape) > 1 else None for tensor in (*spec.inputs, *spec.outputs)}
    axis, *others = first
    return axis if isinstance(axis, str) and not others else None


def _tensor(field: str, tensor: TensorSpec, *, batched: bool) -> str:
    dims = ", ".join(str(axis) if isinstance(axis, int) else "-1" for axis in tensor.shape[batched:])
    return f'{field} {{ name: "{tensor.name}" data_type: {_TYPES[tensor.dtype]} dims: [ {dims} ] }}'


def _copy_onnx(model: Model, graph: str, version: Path) -> None:
    spec, path = model.graph(graph), model.path(graph)
    if spec.precision == "bf16":
        raise BundleError(
            f"{path}: is in bf16, which ONNX Runtime does not support", hint="--backend tensorrt, or wsss export --precision fp16"
        )
    shutil.copyfile(path, version / "model.onnx")
    for file in sorted(external_files(path)):
        # Not a hard link: onnx refuses weights that have another name ("may indicate a hard link attack"), in the bundle too.
        shutil.copyfile(model.folder / file, version / file)


def _plan_of(model: Model, graph: str, gpu: str | None) -> PlanSpec:
    where = f"{model.folder / model.graph(graph).file}"
    plans = [plan for plan in model.graph(graph).plans.values() if plan.flavour == "trt"]
    fitting = [plan for plan in plans if gpu is None or gpu.casefold() in plan.target.casefold()]
    targets = ", ".join(sorted(plan.target for plan in plans))
    if not plans:
        raise BundleError(
            f"{where}: has no engine of the full TensorRT", hint="wsss export --engine trt, on the GPU of the server"
        )
    if len(fitting) != 1:
        got = "several" if fitting else "none"
        raise UsageError(
            f"--gpu: expected one of {targets}, got {gpu or 'nothing'}, which fits {got}", hint=f"--gpu '{plans[0].target}'"
        )
    if fitting[0].parity is None:
        raise BundleError(
            f"{where}: its engine has not passed the parity gate", hint="wsss verify BUNDLE --engine trt, on that GPU"
        )
    return fitting[0]


def _check_out(out: Path) -> None:
    if not out.exists() or (out.is_dir() and all(_is_model(path) for path in _entries(out))):
        return
    raise UsageError(f"--out {out}: has something else than a model repository", hint="give a new or an empty folder")


def _entries(out: Path) -> Iterator[Path]:
    return (path for path in out.iterdir() if not path.name.startswith("."))


def _is_model(path: Path) -> bool:
    return (path / "config.pbtxt").is_file() and (path / "1").is_dir()
