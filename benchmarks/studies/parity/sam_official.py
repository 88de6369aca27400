"""Compare our SAM with SamPredictor on real photographs: same weights, same boxes, masks at original size.

    python -m wsss.benchmarks.studies.parity.sam_official VOC_PAIRS --variant vit_b --weights random:0 --bundle build/official

Exports the model unless ``--bundle`` holds it. Photographs then run two at a time as in the runtime (one encoder call, the boxes
of both in one decoder call, ONNX Runtime), and one at a time through ``set_image`` and ``predict(box, multimask_output=False)``.
Each row is written to ``benchmarks/results/sam-official.json`` at once: a second run continues where the first was stopped.
"""

from __future__ import annotations

import json
import os
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from segment_anything import SamPredictor

from wsss.batch import Boxes, Masks
from wsss.engines.ort import OrtEngine
from wsss.export.exporting import tool_versions
from wsss.export.family import Options
from wsss.export.sam import family as sam
from wsss.photographs import read_photograph
from wsss.runtime.segment import MaskPredictor
from wsss.spec import AxisRange, Model

from ...confusion import mask_iou
from ..harness import RESULTS, exported_model, folder_megabytes, log, study_parser, write_result

RESULT = RESULTS / "sam-official.json"
BOXES_EACH = 8
"""Maximum number of boxes of a photograph."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line of the module."""
    parser = study_parser(__spec__, __doc__)
    parser.add_argument("voc", type=Path, help="folder with JPEGImages/ and Annotations/ (VOC XML)")
    parser.add_argument("--variant", default=sam.FAMILY.default)
    parser.add_argument("--weights", default="random:0")
    parser.add_argument("--bundle", type=Path, default=Path("build/official"))
    parser.add_argument("--count", type=int, default=24, help="number of photographs, the first by name that have boxes")
    options = parser.parse_args(arguments)
    model = find_model(options.bundle, options.variant, options.weights)
    predictor = SamPredictor(sam.load(options.variant, options.weights)[0])
    names = [path.stem for path in sorted((options.voc / "Annotations").glob("*.xml"))][: options.count]
    results = _stored_results(model)
    left = [name for name in names if name not in results["photographs"]]
    for start in range(0, len(left), 2):
        for name, row in measure(model, predictor, options.voc, left[start : start + 2]):
            results["photographs"][name] = row
            log(f"{name}: {row}")
        _save(results)
    print(json.dumps(summary(results["photographs"])))


def find_model(bundle: Path, variant: str, weights: str) -> Model:
    """The exported SAM in ``bundle``, exported now unless it is there with these weights."""
    options = Options(batch=AxisRange(1, 2, 4))  # the gate at the default of 8 takes 10 GB and twice the time
    return exported_model("sam", variant, weights, bundle, options)


def measure(model: Model, predictor: SamPredictor, voc: Path, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Compare the masks of the annotated boxes of some photographs, which run through our engines in one batch.

    Args:
        predictor: with the weights that ``model`` was exported from.
        voc: folder with ``JPEGImages`` and ``Annotations``.
        names: stems of the photographs.

    Yields:
        The name and the row of each photograph: boxes, worst mask IoU, differing and compared pixels, seconds of both.
    """
    photographs = [read_photograph(voc / "JPEGImages", f"{name}.jpg") for name in names]
    boxes = Boxes.join([boxes_of(voc / "Annotations" / f"{name}.xml", number) for number, name in enumerate(names)])
    begun = time.monotonic()
    masks = mask_predictor(model)(photographs, boxes)
    ours_seconds = (time.monotonic() - begun) / len(names)
    for number, (name, photograph) in enumerate(zip(names, photographs, strict=True)):
        rows = np.flatnonzero(boxes.image == number)
        begun = time.monotonic()
        predictor.set_image(photograph.pixels)
        theirs = [predictor.predict(box=boxes.xyxy_image[row], multimask_output=False)[:2] for row in rows]
        their_seconds = time.monotonic() - begun
        ours = [mask_of(model, masks, int(row), number) for row in rows]
        pairs = [(mask, official[0]) for mask, (official, _) in zip(ours, theirs, strict=True)]
        quality = [abs(masks.quality[row] - predicted_iou[0]) for row, (_, predicted_iou) in zip(rows, theirs, strict=True)]
        yield (
            name,
            {
                "boxes": len(rows),
                "worst_iou": min(mask_iou(*pair) for pair in pairs),
                "pixels_that_differ": int(sum((one != other).sum() for one, other in pairs)),
                "pixels": int(sum(one.size for one, _ in pairs)),
                "mean_mask_share": float(np.mean([other.mean() for _, other in pairs])),
                "quality_difference": float(max(quality)),
                "seconds": round(ours_seconds, 2),
                "official_seconds": round(their_seconds, 2),
            },
        )


def mask_predictor(model: Model) -> MaskPredictor:
    """The runtime's SAM stage on ONNX Runtime."""
    return MaskPredictor(model, *(OrtEngine(model.path(name), model.graph(name)) for name in ("encoder", "decoder")))


def boxes_of(annotation: Path, image: int) -> Boxes:
    """The first boxes of a VOC annotation, in 0-based pixels with an exclusive far corner."""
    objects = ElementTree.parse(annotation).getroot().findall("object/bndbox")[:BOXES_EACH]
    corners = [[float(box.findtext(side) or "nan") for side in ("xmin", "ymin", "xmax", "ymax")] for box in objects]
    xyxy = np.array(corners, np.float32).reshape(-1, 4) - np.array([1, 1, 0, 0], np.float32)
    count = len(xyxy)
    return Boxes(xyxy, np.ones(count, np.float32), np.ones(count, np.int64), np.full(count, image))


def mask_of(model: Model, masks: Masks, row: int, image: int) -> np.ndarray:
    """(H, W) bool: the mask of box ``row`` at the size of photograph ``image``, to which the box belongs."""
    frame = masks.frames[image]
    assert frame is not None
    side = int(model.manifest.settings["logits_side"])
    logits = np.asarray(masks.logits[masks.part[row]])[masks.row[row]]
    upsampled: np.ndarray = frame.mask_rows(side) @ logits @ frame.mask_columns(side).T
    return upsampled > 0


def summary(rows: dict[str, Any]) -> dict[str, Any]:
    """Totals over all photographs: number, boxes, worst IoU, share of differing pixels, median seconds."""
    values = list(rows.values())
    return {
        "photographs": len(values),
        "boxes": sum(row["boxes"] for row in values),
        "worst_iou": min(row["worst_iou"] for row in values),
        "share_of_pixels_that_differ": sum(row["pixels_that_differ"] for row in values) / sum(row["pixels"] for row in values),
        "quality_difference": max(row["quality_difference"] for row in values),
        "median_seconds": float(np.median([row["seconds"] for row in values])),
        "median_official_seconds": float(np.median([row["official_seconds"] for row in values])),
    }


def _stored_results(model: Model) -> dict[str, Any]:
    manifest = model.manifest
    if RESULT.is_file():
        results: dict[str, Any] = json.loads(RESULT.read_text())
        if results["model"] == manifest.identity():
            return results
    gate = {name: {row.output: row.error for row in spec.parity.rows} for name, spec in manifest.graphs.items() if spec.parity}
    return {
        "model": manifest.identity(),
        "variant": manifest.variant,
        "weights": dict(manifest.weights),
        "gate_error": gate,
        "megabytes": folder_megabytes(model.folder),
        "tools": tool_versions(),
        "cores": os.cpu_count(),
        "photographs": {},
    }


def _save(results: dict[str, Any]) -> None:
    results["summary"] = summary(results["photographs"])
    write_result(RESULT, results)


if __name__ == "__main__":
    main()
