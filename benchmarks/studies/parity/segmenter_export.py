"""Exported segmenters at their real size against the trained module.

FOLDER has real photographs and true masks (JPEGImages/, SegmentationClass/). Each network is shortly trained on them, rare
classes weighed up, so that its answers are decided and differ from place to place; exported at 512 x 512 in FP32 and FP16
through the gate; and run by ONNX Runtime on batches of four photographs. Every row is compared with the module in PyTorch
on that photograph alone. TensorRT-RTX then builds the FP16 graph, where it is installed.
"""

from __future__ import annotations

import sys
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
from ..harness import RESULTS, about, read_result, study_parser, write_result
from ..quality.voc_pairs import store_of_masks

RESULT = RESULTS / "segmenter-export.json"
NETWORKS = {"deeplabv3plus/resnet50": 1e-3, "segformer/b0": 3e-4}
"""With the learning rate of their short training."""
BATCH, CANVAS = 4, (512, 512)
LEAST: dict[Precision, float] = {"fp32": 0.9999, "fp16": 0.998}
"""Share of a photograph's pixels whose label must be the module's."""


def measure(folder: Path, work: Path, name: str, *, steps: int, photographs: int) -> dict[str, Any]:
    """Agreement of one network's graphs with its module, and the build of its engine."""
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
    train(work / "store", folder / "JPEGImages", run, config, log=_log, watch=lambda now: _log(str(now)))
    paths = sorted((folder / "JPEGImages").glob("*.jpg"))
    paths = paths[:: max(1, len(paths) // photographs)][:photographs]
    told: dict[str, Any] = {"steps": steps, "photographs": len(paths)}
    for precision in LEAST:
        options = Options(batch=AxisRange(1, 2, BATCH), sizes=(CANVAS,), precision=precision)
        bundle = work / f"{run.name}-{precision}"
        manifest = export_model(FAMILY, variant="trained", weights=str(run), bundle=bundle, options=options, log=_log)
        spec = manifest.graphs[f"image-{CANVAS[0]}x{CANVAS[1]}"]
        graph = FAMILY.prepare("trained", str(run), options).graphs[0]()
        engine = OrtEngine(bundle / "segmenter" / spec.file, spec)
        told[precision] = {
            **_agreement(graph, engine, folder / "JPEGImages", paths),
            "least_allowed": LEAST[precision],
            "gate": {name: spec.parity.worst(name).error for name in spec.parity.tolerance} if spec.parity else None,
            "fp32_nodes": sum(spec.fp32_nodes.values()),
        }
        _log(f"{name} {precision}: {told[precision]}")
    told["trt-rtx"] = _built(work / f"{run.name}-fp16")
    return told


def _agreement(graph: Graph, engine: OrtEngine, folder: Path, paths: list[Path]) -> dict[str, Any]:
    """Share of equal labels of each row, worst and mean, over batches of `BATCH` photographs."""
    shares, confidence, labels = [], 0.0, set()
    for start in range(0, len(paths), BATCH):
        pixels, size = np.zeros((BATCH, *CANVAS, 3), np.uint8), np.zeros((BATCH, 2), np.int64)
        for row in range(BATCH):
            photo = read_photograph(folder, paths[(start + row) % len(paths)].name).pixels[: CANVAS[0], : CANVAS[1]]
            size[row] = photo.shape[:2]
            pixels[row, : photo.shape[0], : photo.shape[1]] = photo
        found = {name: np.array(value) for name, value in engine({"pixels": pixels, "size": size}).items()}
        for row in range(BATCH):
            want = graph.reference({"pixels": pixels[row : row + 1], "size": size[row : row + 1]}, {})
            seen = slice(0, size[row, 0]), slice(0, size[row, 1])
            mine, its = found["label_map"][row][seen], want["label_map"][0][seen]
            shares.append(float((mine == its).mean()))
            steps = found["confidence"][row][seen].astype(int) - want["confidence"][0][seen].astype(int)
            confidence = max(confidence, float(np.abs(steps).max() / 255))
            labels |= set(np.unique(its).tolist())
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
    model = build_plans(Bundle(bundle).model("segmenter"), BuildOptions(flavour="trt-rtx"), _log)
    plan = next(iter(model.manifest.graphs.values())).plans["trt-rtx"]
    size = (model.folder / plan.file).stat().st_size
    return {"tensorrt_rtx": version, "seconds": round(plan.seconds, 1), "megabytes": round(size / 1e6, 1)}


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = study_parser(__spec__, __doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--network", action="append", choices=list(NETWORKS), help="default: all")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--photographs", type=int, default=12)
    parser.add_argument("--work", type=Path, default=Path("build/segmenter-export"), help="kept, so that a second call goes on")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    told: dict[str, Any] = read_result(arguments.out)
    told |= {**about(), "torch": torch.__version__, "onnxruntime": metadata.version("onnxruntime")}
    for name in arguments.network or NETWORKS:
        told[name] = measure(arguments.folder, arguments.work, name, steps=arguments.steps, photographs=arguments.photographs)
        write_result(arguments.out, told)


if __name__ == "__main__":
    main()
