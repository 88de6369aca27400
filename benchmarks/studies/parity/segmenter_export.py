"""Compare exported segmenters of real size with the trained module.

FOLDER has real photographs and true masks (JPEGImages/, SegmentationClass/). Each network is trained on them for a few steps with
a larger weight for rare classes, so that its predictions are certain and vary over the image. It is exported at 512 x 512 in FP32
and FP16 through the gate, and runs in ONNX Runtime on batches of four photographs. Every row is compared with the module in
PyTorch on that photograph alone. TensorRT-RTX then builds the FP16 graph, where it is installed.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ....classes import parse_classes
from ....engines.ort import OrtEngine
from ....export.exporting import export_model
from ....export.family import Graph, Options
from ....export.segmenter import FAMILY
from ....export.to_engine import BuildOptions, build_plans
from ....photographs import read_photograph
from ....spec import AxisRange, Bundle, Precision
from ....train.args import config_from
from ....train.loop import train
from ....train.presets import preset
from ..harness import RESULTS, about, log, read_result, study_parser, write_result
from ..quality.voc_pairs import store_of_masks

RESULT = RESULTS / "segmenter-export.json"
NETWORKS = {"deeplabv3plus/resnet50": 1e-3, "segformer/b0": 3e-4}
"""The networks, with the learning rate of their short training."""
BATCH, CANVAS = 4, (512, 512)
LEAST: dict[Precision, float] = {"fp32": 0.9999, "fp16": 0.998}
"""Minimum share of a photograph's pixels with the same label as in the module."""


def measure(folder: Path, work: Path, name: str, *, steps: int, photographs: int) -> dict[str, Any]:
    """Measure the agreement of a network's graphs with its module, and build its engine."""
    architecture, _, encoder = name.partition("/")
    store_of_masks(folder / "JPEGImages", folder / "SegmentationClass", work / "store", parse_classes("voc"))
    config = config_from(
        {**preset("mini"), "model": {"architecture": architecture, "encoder": encoder}},
        {
            "data": {
                "shorter_px": 0,
                "crop": 128,
                "largest_share": 1.0,
                "batch": 8,
                "scale": [0.25, 0.75],
                "balance": "weights",
                "validation_share": 0.0,
            },
            "optimizer": {"steps": steps, "warm_up": 5, "rate": NETWORKS[name]},
        },
    )
    run = work / name.replace("/", "-")
    train(work / "store", folder / "JPEGImages", run, config, log=log, watch=lambda now: log(str(now)))
    paths = sorted((folder / "JPEGImages").glob("*.jpg"))
    paths = paths[:: max(1, len(paths) // photographs)][:photographs]
    result: dict[str, Any] = {"steps": steps, "photographs": len(paths)}
    for precision in LEAST:
        options = Options(batch=AxisRange(1, 2, BATCH), sizes=(CANVAS,), precision=precision)
        bundle = work / f"{run.name}-{precision}"
        manifest = export_model(FAMILY, variant="trained", weights=str(run), bundle=bundle, options=options, log=log)
        spec = manifest.graphs[f"image-{CANVAS[0]}x{CANVAS[1]}"]
        graph = FAMILY.prepare("trained", str(run), options).graphs[0]()
        engine = OrtEngine(bundle / "segmenter" / spec.file, spec)
        result[precision] = {
            **_agreement(graph, engine, folder / "JPEGImages", paths),
            "least_allowed": LEAST[precision],
            "gate": {name: spec.parity.worst(name).error for name in spec.parity.tolerance} if spec.parity else None,
            "fp32_nodes": sum(spec.fp32_nodes.values()),
        }
        log(f"{name} {precision}: {result[precision]}")
    result["trt-rtx"] = _built(work / f"{run.name}-fp16")
    return result


def _agreement(graph: Graph, engine: OrtEngine, folder: Path, paths: list[Path]) -> dict[str, Any]:
    """Worst and mean share of equal labels of a row, over batches of `BATCH` photographs."""
    shares, confidence, labels = [], 0.0, set()
    for start in range(0, len(paths), BATCH):
        pixels, size = np.zeros((BATCH, *CANVAS, 3), np.uint8), np.zeros((BATCH, 2), np.int64)
        for row in range(BATCH):
            photo = read_photograph(folder, paths[(start + row) % len(paths)].name).pixels[: CANVAS[0], : CANVAS[1]]
            size[row] = photo.shape[:2]
            pixels[row, : photo.shape[0], : photo.shape[1]] = photo
        found = {name: np.array(value) for name, value in engine({"pixels": pixels, "size": size}).items()}
        for row in range(BATCH):
            expected = graph.reference({"pixels": pixels[row : row + 1], "size": size[row : row + 1]}, {})
            seen = slice(0, size[row, 0]), slice(0, size[row, 1])
            exported_map, module_map = found["label_map"][row][seen], expected["label_map"][0][seen]
            shares.append(float((exported_map == module_map).mean()))
            steps = found["confidence"][row][seen].astype(int) - expected["confidence"][0][seen].astype(int)
            confidence = max(confidence, float(np.abs(steps).max() / 255))
            labels |= set(np.unique(module_map).tolist())
    return {
        "rows": len(shares),
        "worst_row": min(shares),
        "mean": float(np.mean(shares)),
        "confidence_furthest": round(confidence, 4),
        "labels_that_appear": len(labels),
    }


def _built(bundle: Path) -> dict[str, Any] | str:
    try:
        version = metadata.version("tensorrt_rtx")
    except metadata.PackageNotFoundError:
        return "not installed"
    model = build_plans(Bundle(bundle).model("segmenter"), BuildOptions(flavour="trt-rtx"), log)
    plan = next(iter(model.manifest.graphs.values())).plan_for("trt-rtx")
    assert plan is not None
    size = (model.folder / plan.file).stat().st_size
    return {"tensorrt_rtx": version, "seconds": round(plan.seconds, 1), "megabytes": round(size / 1e6, 1)}


def main() -> None:
    parser = study_parser(__spec__, __doc__, out=RESULT, work="build/segmenter-export")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--network", action="append", choices=list(NETWORKS), help="default: all")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--photographs", type=int, default=12)
    arguments = parser.parse_args()
    result = read_result(arguments.out)
    result |= {**about(), "torch": torch.__version__, "onnxruntime": metadata.version("onnxruntime")}
    for name in arguments.network or NETWORKS:
        result[name] = measure(arguments.folder, arguments.work, name, steps=arguments.steps, photographs=arguments.photographs)
        write_result(arguments.out, result)


if __name__ == "__main__":
    main()
