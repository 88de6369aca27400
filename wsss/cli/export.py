"""``wsss export``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from ..errors import UsageError
from ..extras import needs
from .common import by_model, log

if TYPE_CHECKING:
    from ..export.to_engine import BuildOptions
    from ..spec import Flavour


def export(
    model: Annotated[
        Literal["clip", "grounding-dino", "sam", "sam3", "all", "segmenter"],
        typer.Option(help="Model to export; all: the first three, which label images together; sam3: one for boxes and masks."),
    ],
    variant: Annotated[
        str | None,
        typer.Option(
            help="Architecture, for example vit_h, sam2.1_tiny, mm_tiny or ViT-L-14: wsss models. Default: the model's usual one."
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="File, folder, known name or random:SEED; MODEL=... for several models. Default: the official weights."
        ),
    ] = None,
    bundle: Annotated[str, typer.Option(help="Folder to export into.")] = "bundle",
    precision: Annotated[
        Literal["fp32", "fp16", "bf16", "auto"] | None,
        typer.Option(
            help="bf16: for TensorRT and OpenVINO, less exact, larger range. auto: fp16 where measured errors allow it. "
            "Default: fp16 for TensorRT, for OpenVINO bf16 where the processor computes in it, otherwise fp32."
        ),
    ] = None,
    fp32_accumulation: Annotated[
        bool,
        typer.Option(
            "--fp32-accumulation",
            help="fp16: add long matrix products in FP32 where TensorRT might add in FP16 (L4, RTX 4090). "
            "--precision auto measures whether they need it.",
        ),
    ] = False,
    engine: Annotated[
        Literal["auto", "onnx", "openvino", "trt", "trt-rtx"],
        typer.Option(
            help="onnx: ONNX Runtime. openvino: compared in OpenVINO too, for CPUs. trt-rtx also builds without a GPU. "
            "auto: TensorRT if this machine can run it, otherwise onnx."
        ),
    ] = "auto",
    batch: Annotated[
        tuple[int, int, int] | None, typer.Option(metavar="MIN OPT MAX", help="Images (boxes, phrases) per call.")
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(metavar="HxW", help="Canvas of Grounding-DINO or the segmenter; may be repeated.")
    ] = None,
    sampling: Annotated[
        Literal["grid-sample", "gather", "plugin"] | None,
        typer.Option(
            help="How Grounding-DINO samples features: grid-sample (default in fp32); gather (default in half precision, and "
            "for ONNX Runtime on a GPU); plugin, for the kernel of the full TensorRT."
        ),
    ] = None,
    workspace: Annotated[int, typer.Option(min=1, help="TensorRT: largest scratch memory per layer, MiB.")] = 8192,
    device: Annotated[int, typer.Option(min=0, metavar="N", help="TensorRT: the GPU to build and to verify on.")] = 0,
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="TensorRT: 0 builds fast, 5 searches longest. Default: the library's.")
    ] = None,
    hardware_compatible: Annotated[
        bool,
        typer.Option(
            "--hardware-compatible", help="The full TensorRT: one engine for all GPUs from Ampere on, slower than one for each."
        ),
    ] = False,
    compute_capability: Annotated[
        list[str] | None, typer.Option(metavar="SM", help="TensorRT-RTX: build for this GPU generation, sm89; may be repeated.")
    ] = None,
) -> None:
    """Export checkpoints to verified graphs and TensorRT engines.

    Each graph and engine is compared with the official implementation.
    """
    from ..spec import MODELS, AxisRange

    if sampling is not None and model not in ("grounding-dino", "all"):
        raise UsageError(f"--sampling: for grounding-dino only, got --model {model}", hint="omit --sampling")
    names = MODELS if model == "all" else (model,)
    with needs("export"):
        from ..export.exporting import export_model, standing_model
        from ..export.family import Options, family
        from ..export.to_engine import BuildOptions

    flavour = _flavour(engine)
    if hardware_compatible and flavour == "trt-rtx":
        raise UsageError(
            "--hardware-compatible is for the full TensorRT", hint="TensorRT-RTX engines run on several generations anyway"
        )
    if sampling is None and "grounding-dino" in names and flavour is None and _labels_with_ort_on_gpu(engine):
        sampling = "gather"
        log("grounding-dino: --sampling gather, because ONNX Runtime computes GridSample on the CPU")
    numbers = "fp16" if precision == "auto" else precision or _default_precision(engine, flavour)
    if fp32_accumulation and numbers != "fp16":
        raise UsageError(
            f"--fp32-accumulation: for fp16 only, got {numbers}", hint="add --precision fp16; fp32 and bf16 always add in FP32"
        )
    options = Options(
        batch=AxisRange(*batch) if batch else None,
        sizes=tuple(map(_size, size or ())),
        precision=numbers,
        sampling=sampling,
        measured=precision == "auto",
        fp32_accumulation=fp32_accumulation,
        for_cpu=engine == "openvino",
    )
    given = by_model(weights or [], names)
    for name in names:
        start = time.perf_counter()
        chosen = family(name)
        kind = variant or chosen.default
        if flavour and standing_model(Path(bundle), name, variant=variant, weights=given.get(name), options=options):
            log(f"{name}: the {options.precision} graphs in {bundle} are up to date, only engines are built")
        else:
            source = given.get(name) or chosen.official(kind)
            manifest = export_model(
                chosen,
                variant=kind,
                weights=source,
                bundle=Path(bundle),
                options=options,
                log=log,
                openvino=engine == "openvino",
            )
            reports = [graph.parity for graph in manifest.graphs.values() if graph.parity]
            reports += [proof.parity for graph in manifest.graphs.values() for proof in graph.openvino.values()]
            rows = [row for report in reports for row in report.rows]
            worst = max((row.error for row in rows), default=0.0)
            typer.echo(
                f"{Path(bundle) / name}: {kind}, {len(manifest.graphs)} graphs in {options.precision}, "
                f"worst error against the official module {worst:.1e}, {time.perf_counter() - start:.0f} s"
            )
        if flavour:
            how = BuildOptions(
                flavour=flavour,
                workspace_mib=workspace,
                capabilities=tuple(compute_capability or ()),
                device=device,
                optimization_level=optimization_level,
                hardware_compatible=hardware_compatible,
            )
            _build_engines(Path(bundle), name, how, given.get(name))


def _default_precision(engine: str, flavour: Flavour | None) -> Literal["fp32", "fp16", "bf16"]:
    if flavour:
        return "fp16"
    if engine != "openvino":
        return "fp32"
    from ..engines.openvino import computes_in_bf16, instructions

    if computes_in_bf16():
        log("in bf16, in which this processor computes (--precision fp32: exact, takes about 1.6 times as long)")
        return "bf16"
    log(f"in fp32: this processor ({instructions()}) does not compute in bf16")
    return "fp32"


def _flavour(engine: str) -> Flavour | None:
    """The flavour of TensorRT that ``--engine`` selects, None for ONNX only."""
    if engine in ("trt", "trt-rtx"):
        return cast("Flavour", engine)
    if engine in ("onnx", "openvino"):
        return None
    from ..engines.plan import best_flavour

    flavour = best_flavour()
    log(f"engine {flavour or 'onnx'}; wsss doctor says why no other" if flavour is None else f"engine {flavour}")
    return flavour


def _labels_with_ort_on_gpu(engine: str) -> bool:
    """Whether ``--engine auto`` of `wsss label` will take ONNX Runtime on this machine's GPU."""
    from ..engines.ort_library import cuda_trouble

    return engine == "auto" and cuda_trouble() is None


def _build_engines(bundle: Path, name: str, options: BuildOptions, weights: str | None) -> None:
    from ..engines.plan import plan_here, why_not_here
    from ..export.exporting import verify_plans
    from ..export.to_engine import build_plans
    from ..spec import open_bundle

    flavour = options.flavour
    model = build_plans(open_bundle(bundle).model(name), options, log)
    if reason := why_not_here(flavour, options.device):
        log(f"{name}: engines not verified: {reason}; on the machine that will use them: wsss verify {bundle}")
    else:
        verify_plans(model, flavour, weights, log, device=options.device)
    plans = [plan_here(graph, flavour, options.device) for graph in model.manifest.graphs.values()]
    total = sum(plan.seconds for plan in plans if plan is not None)
    typer.echo(f"{bundle / name}: {len(model.manifest.graphs)} {flavour} engines, built in {total:.0f} s")


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise UsageError(f"--size: expected HxW in pixels, got {text!r}", hint="--size 800x1344")
    return int(height), int(width)
