"""Compare graphs with the official FP32 modules on real photographs, in mixed batches.

    python -m wsss.benchmarks.studies.parity.half_precision VOC_PAIRS --bundle build/half
    python -m wsss.benchmarks.studies.parity.half_precision VOC_PAIRS --bundle build/mm --model "grounding-dino mm_tiny" \\
        --precision fp32 --out benchmarks/results/mm-grounding-dino.json

Exports each model unless ``--bundle`` holds it, feeds photographs two at a time as the runtime does, and compares each row with
the official module at batch 1: in FP16 by the error measures of the parity gate, in FP32 by the largest difference. The result
file, ``benchmarks/results/half-precision.json``, has the worst row of each graph and output. It is written after every pair: a
second run continues where the first was stopped.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ....classes import parse_classes
from ....engines.ort import OrtEngine
from ....export.exporting import tool_versions
from ....export.family import Feeds, Graph, Options, Prepared, family
from ....export.precision.work import float32_share
from ....frame import frame_for
from ....photographs import read_photograph
from ....runtime.text import open_tokenizer
from ....spec import AxisRange, Model, Precision
from ..harness import RESULTS, exported_model, log, peak_memory_bytes, read_result, study_parser, write_result
from .grounding_dino_official import canvas_feeds, caption_feeds
from .sam_official import boxes_of

RESULT = RESULTS / "half-precision.json"
MODELS = {"clip": "ViT-B-16", "sam": "vit_b", "grounding-dino": "swin_t"}
"""Model to variant; for ``--model``, also "MODEL VARIANT"."""
CANVAS = (800, 1344)
BATCH = AxisRange(1, 2, 2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line of the module."""
    parser = study_parser(__spec__, __doc__)
    parser.add_argument("voc", type=Path, help="folder with JPEGImages/ and Annotations/ (VOC XML)")
    parser.add_argument("--bundle", type=Path, default=Path("build/half"))
    parser.add_argument("--weights", default="random:0", help="weights of each model")
    parser.add_argument("--precision", default="fp16", choices=["fp16", "fp32"])
    parser.add_argument("--model", action="append", help='one of the models, or "MODEL VARIANT"; default: all')
    parser.add_argument("--out", type=Path, default=RESULT, help="result file")
    parser.add_argument(
        "--count", type=int, default=8, help="number of photographs, the first landscapes by name that have boxes"
    )
    options = parser.parse_args(arguments)
    names = [path.stem for path in sorted((options.voc / "Annotations").glob("*.xml"))]
    names = [name for name in names if _is_landscape(options.voc, name)][: options.count]
    for model in options.model or MODELS:
        measure_model(model, options.bundle, options.weights, options.precision, options.voc, names, options.out)
    print(json.dumps({key: entry["worst"] for key, entry in read_result(options.out).items()}, indent=1))


def measure_model(
    model_and_variant: str, bundle: Path, weights: str, precision: Precision, voc: Path, photographs: Sequence[str], out: Path
) -> None:
    """Compare all photographs for the graphs of one model; rows already in the results are not measured again."""
    name, _, variant = model_and_variant.partition(" ")
    variant = variant or MODELS[name]
    options = Options(batch=BATCH, precision=precision, sizes=(CANVAS,) if name == "grounding-dino" else ())
    model = exported_model(name, variant, weights, bundle, options)
    sizes = model.manifest.preprocess.canvases if name == "grounding-dino" else ()
    prepared = family(name).prepare(variant, weights, Options(sizes=sizes))
    for make in prepared.graphs:
        graph = make().at(precision)
        feeds_of = _FEEDS.get((name, graph.name.partition("-")[0]))
        if feeds_of is None:
            continue
        key = f"{model_and_variant}/{graph.name} {precision}"
        entry = read_result(out).get(key, {"rows": {}})
        left = [photograph for photograph in photographs if photograph not in entry["rows"]]
        engine = OrtEngine(model.path(graph.name), model.graph(graph.name)) if left else None
        for start in range(0, len(left), 2):
            assert engine is not None
            pair = left[start : start + 2]
            feeds = feeds_of(model, prepared, voc, pair)
            found = {output: np.array(value) for output, value in engine(feeds).items()}
            for number, photograph in enumerate(pair):
                entry["rows"][photograph] = _compare(graph, feeds, found, number, precision)
                log(f"{key} {photograph}: {entry['rows'][photograph]}")
            if "float32_share" not in entry:
                entry["float32_share"] = round(float32_share(model.path(graph.name), graph.take(feeds, [0])), 4)
            _save(out, key, entry, model, graph, precision)
        del graph, engine
        gc.collect()


def _compare(graph: Graph, feeds: Feeds, found: Feeds, number: int, precision: Precision) -> dict[str, float]:
    """The worst error of a photograph's rows (its boxes, in SAM's decoder), for each output of a graph."""
    rows = np.flatnonzero(feeds["image"] == number) if "image" in feeds else [number]
    worst: dict[str, float] = {}
    for row in rows:
        got = {output: value[row : row + 1] for output, value in found.items()}
        expected = graph.reference(graph.take(feeds, [int(row)]), got)
        for output, tolerance in graph.tolerance.items():
            error, largest = tolerance.measure(got, expected, output)
            worst[output] = max(worst.get(output, 0.0), largest if output == "quality" or precision == "fp32" else error)
    return worst


# ---- feeds, as the runtime makes them ----


def _sam_pixels(model: Model, prepared: Prepared, voc: Path, names: Sequence[str]) -> Feeds:
    return _on_canvases(model, voc, names)


def _sam_boxes(model: Model, prepared: Prepared, voc: Path, names: Sequence[str]) -> Feeds:
    encoder = OrtEngine(model.path("encoder"), model.graph("encoder"))
    embedding = np.array(encoder(_on_canvases(model, voc, names))["embedding"])
    del encoder
    boxes, images = [], []
    for number, name in enumerate(names):
        frame = frame_for(model.manifest.preprocess, *read_photograph(voc / "JPEGImages", f"{name}.jpg").shape)
        some = boxes_of(voc / "Annotations" / f"{name}.xml", number)
        boxes.append(np.stack([frame.xyxy_model_from_image(xyxy) for xyxy in some.xyxy_image]))
        images.append(some.image)
    image = np.concatenate(images)
    multimask = np.arange(len(image)) % 2 == 1
    return {"embedding": embedding, "boxes": np.concatenate(boxes), "image": image, "multimask": multimask}


def _clip_pixels(model: Model, prepared: Prepared, voc: Path, names: Sequence[str]) -> Feeds:
    return {"pixels": _on_canvases(model, voc, names)["pixels"]}


def _detector_feeds(model: Model, prepared: Prepared, voc: Path, names: Sequence[str]) -> Feeds:
    text, classes = OrtEngine(model.path("text"), model.graph("text")), parse_classes("voc").names
    captions = []
    for name in names:  # two to five classes, different for each photograph
        first = sum(name.encode())
        captions.append([classes[(first + step) % len(classes)] for step in range(2 + first % 4)])
    caption = caption_feeds(model, text, open_tokenizer(model), captions)
    return {
        **_on_canvases(model, voc, names),
        **caption,
        "text": caption["text"].astype("float32" if model.manifest.precision == "fp32" else "float16"),
    }


_FEEDS: dict[tuple[str, str], Callable[[Model, Prepared, Path, Sequence[str]], Feeds]] = {
    ("sam", "encoder"): _sam_pixels,
    ("sam", "decoder"): _sam_boxes,
    ("clip", "image"): _clip_pixels,
    ("grounding-dino", "image"): _detector_feeds,
}


def _on_canvases(model: Model, voc: Path, names: Sequence[str]) -> Feeds:
    return canvas_feeds(model, [read_photograph(voc / "JPEGImages", f"{name}.jpg") for name in names])


def _is_landscape(voc: Path, name: str) -> bool:
    height, width = read_photograph(voc / "JPEGImages", f"{name}.jpg").shape
    return 1.2 < width / height < 1.6


# ---- results ----


def _save(out: Path, key: str, entry: dict[str, Any], model: Model, graph: Graph, precision: Precision) -> None:
    entry["worst"] = {output: max(row[output] for row in entry["rows"].values()) for output in graph.tolerance}
    measures = {output: tolerance.measure.__name__ for output, tolerance in graph.tolerance.items()}
    entry["measures"] = dict.fromkeys(measures, "largest difference") if precision == "fp32" else measures
    entry |= {"peak_memory_gb": round(peak_memory_bytes() / 1e9, 1)}
    entry |= {"photographs": len(entry["rows"]), "variant": model.manifest.variant, "weights": dict(model.manifest.weights)}
    entry |= {"fp32_nodes": dict(model.graph(graph.name).fp32_nodes), "tools": tool_versions(), "cores": os.cpu_count()}
    write_result(out, {**read_result(out), key: entry})


if __name__ == "__main__":
    main()
