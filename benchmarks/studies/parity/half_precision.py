"""Half-precision graphs against the official FP32 modules on real photographs, in mixed batches.

    python -m wsss.benchmarks.studies.parity.half_precision VOC_PAIRS --bundle build/half

Exports SAM, CLIP and Grounding-DINO in FP16 unless ``--bundle`` holds them, feeds photographs two at a time as the runtime
prepares them, and compares each row with the official module at batch 1, by the measures of the parity gate.
``benchmarks/results/half-precision.json`` keeps, for each graph and output, the worst row, and is written as it grows: a
second run goes on where the first was stopped.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ....classes import parse_classes
from ....engines.ort import OrtEngine
from ....errors import BundleError
from ....export.exporting import export_model, tool_versions
from ....export.family import Feeds, Graph, Options, Prepared, family
from ....export.grounding_dino import family as grounding_dino
from ....export.precision.work import float32_share
from ....frame import frame_for
from ....photographs import read_photograph
from ....runtime.canvas import on_canvas
from ....runtime.text import open_tokenizer
from ....spec import AxisRange, Bundle, Model, Precision
from ..harness import RESULTS, read_result, study_parser, write_result
from .sam_official import boxes_of

RESULT = RESULTS / "half-precision.json"
MODELS = {"clip": "ViT-B-16", "sam": "vit_b", "grounding-dino": "swin_t"}
CANVAS = (800, 1344)
BATCH = AxisRange(1, 2, 2)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the module."""
    parser = study_parser(__spec__, __doc__)
    parser.add_argument("voc", type=Path, help="folder with JPEGImages/ and Annotations/ (VOC XML)")
    parser.add_argument("--bundle", type=Path, default=Path("build/half"))
    parser.add_argument("--weights", default="random:0", help="of all three models")
    parser.add_argument("--precision", default="fp16", choices=["fp16"])
    parser.add_argument("--model", action="append", choices=list(MODELS), help="default: all")
    parser.add_argument("--count", type=int, default=8, help="photographs, the first landscapes by name that have boxes")
    options = parser.parse_args(arguments)
    names = [path.stem for path in sorted((options.voc / "Annotations").glob("*.xml"))]
    names = [name for name in names if _is_landscape(options.voc, name)][: options.count]
    for model in options.model or MODELS:
        measure_model(model, options.bundle, options.weights, options.precision, options.voc, names)
    print(json.dumps({key: told["worst"] for key, told in read_result(RESULT).items()}, indent=1))


def measure_model(name: str, bundle: Path, weights: str, precision: Precision, voc: Path, photographs: Sequence[str]) -> None:
    """All photographs through the graphs of one model; rows already in the results are left out."""
    model = _exported(name, bundle, weights, precision)
    sizes = model.manifest.preprocess.canvases if name == "grounding-dino" else ()
    prepared = family(name).prepare(MODELS[name], weights, Options(sizes=sizes))
    for make in prepared.graphs:
        graph = make().at(precision)
        feeds_of = _FEEDS.get((name, graph.name.partition("-")[0]))
        if feeds_of is None:
            continue
        key = f"{name}/{graph.name} {precision}"
        told = read_result(RESULT).get(key, {"rows": {}})
        left = [photograph for photograph in photographs if photograph not in told["rows"]]
        engine = OrtEngine(model.path(graph.name), model.graph(graph.name)) if left else None
        for start in range(0, len(left), 2):
            assert engine is not None
            pair = left[start : start + 2]
            feeds = feeds_of(model, prepared, voc, pair)
            found = {output: np.array(value) for output, value in engine(feeds).items()}
            for number, photograph in enumerate(pair):
                told["rows"][photograph] = _compare(graph, feeds, found, number)
                print(f"{key} {photograph}: {told['rows'][photograph]}", file=sys.stderr, flush=True)
            if "float32_share" not in told:
                told["float32_share"] = round(float32_share(model.path(graph.name), graph.take(feeds, [0])), 4)
            _save(key, told, model, graph)
        del graph, engine
        gc.collect()


def _compare(graph: Graph, feeds: Feeds, found: Feeds, number: int) -> dict[str, float]:
    """The worst of a photograph's rows (its boxes, in SAM's decoder), for each output of a graph."""
    rows = np.flatnonzero(feeds["image"] == number) if "image" in feeds else [number]
    worst: dict[str, float] = {}
    for row in rows:
        mine = {output: value[row : row + 1] for output, value in found.items()}
        want = graph.reference(graph.take(feeds, [int(row)]), mine)
        for output, allowed in graph.tolerance.items():
            error, largest = allowed.measure(mine, want, output)
            worst[output] = max(worst.get(output, 0.0), largest if output == "quality" else error)
    return worst


# ---- feeds, made as the runtime makes them ----


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
        boxes.append(np.stack([frame.xyxy_model_from_image(each) for each in some.xyxy_image]))
        images.append(some.image)
    return {"embedding": embedding, "boxes": np.concatenate(boxes), "image": np.concatenate(images)}


def _clip_pixels(model: Model, prepared: Prepared, voc: Path, names: Sequence[str]) -> Feeds:
    return {"pixels": _on_canvases(model, voc, names)["pixels"]}


def _detector_feeds(model: Model, prepared: Prepared, voc: Path, names: Sequence[str]) -> Feeds:
    text, settings = OrtEngine(model.path("text"), model.graph("text")), model.manifest.settings
    tokenizer, classes = open_tokenizer(model), parse_classes("voc").names

    def features(tokens: list[int]) -> np.ndarray:
        return np.array(text({"tokens": np.array([tokens]), "mask": np.ones((1, len(tokens)), np.bool_)})["features"])[0]

    captions = []
    for name in names:  # two to five classes, other ones for every photograph
        first = sum(name.encode())
        phrases = [classes[(first + step) % len(classes)] for step in range(2 + first % 4)]
        pieces = [[*tokenizer.encode(phrase, add_special_tokens=False).ids, settings["dot"]] for phrase in phrases]
        captions.append([[settings["cls"]], *pieces, [settings["sep"]]])
    caption = grounding_dino.caption_feeds(captions, features)
    return {**_on_canvases(model, voc, names), **caption, "text": caption["text"].astype(np.float16)}


_FEEDS: dict[tuple[str, str], Callable[[Model, Prepared, Path, Sequence[str]], Feeds]] = {
    ("sam", "encoder"): _sam_pixels,
    ("sam", "decoder"): _sam_boxes,
    ("clip", "image"): _clip_pixels,
    ("grounding-dino", "image"): _detector_feeds,
}


def _on_canvases(model: Model, voc: Path, names: Sequence[str]) -> Feeds:
    photographs = [read_photograph(voc / "JPEGImages", f"{name}.jpg") for name in names]
    frames = [frame_for(model.manifest.preprocess, *photograph.shape) for photograph in photographs]
    pixels = [
        on_canvas(each.pixels, frame, model.manifest.preprocess.filter) for each, frame in zip(photographs, frames, strict=True)
    ]
    return {"pixels": np.stack(pixels), "size": np.array([frame.valid for frame in frames], np.int64)}


def _is_landscape(voc: Path, name: str) -> bool:
    height, width = read_photograph(voc / "JPEGImages", f"{name}.jpg").shape
    return 1.2 < width / height < 1.6


# ---- model and results ----


def _exported(name: str, bundle: Path, weights: str, precision: Precision) -> Model:
    options = Options(batch=BATCH, precision=precision, sizes=(CANVAS,) if name == "grounding-dino" else ())
    try:
        model = Bundle(bundle).model(name)
        if (model.manifest.precision, model.manifest.weights["source"]) == (precision, weights):
            return model
    except BundleError:
        pass
    export_model(
        family(name),
        variant=MODELS[name],
        weights=weights,
        bundle=bundle,
        options=options,
        log=lambda line: print(line, file=sys.stderr),
    )
    return Bundle(bundle).model(name)


def _save(key: str, told: dict[str, Any], model: Model, graph: Graph) -> None:
    told["worst"] = {output: max(row[output] for row in told["rows"].values()) for output in graph.tolerance}
    told["measures"] = {output: allowed.measure.__name__ for output, allowed in graph.tolerance.items()}
    told |= {"photographs": len(told["rows"]), "variant": model.manifest.variant, "weights": dict(model.manifest.weights)}
    told |= {"fp32_nodes": dict(model.graph(graph.name).fp32_nodes), "tools": tool_versions(), "cores": os.cpu_count()}
    write_result(RESULT, {**read_result(RESULT), key: told})


if __name__ == "__main__":
    main()
