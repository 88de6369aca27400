"""Compare our SAM 2.1 with transformers' ``Sam2Processor`` and ``Sam2Model`` on real photographs, as `sam_official` does for SAM.

    python -m wsss.benchmarks.studies.parity.sam2_official VOC_PAIRS --variant sam2.1_tiny --precision fp32 --bundle build/sam2

Beside masks and predicted IoUs, the encoder's tensors are compared. ``benchmarks/results/sam2-official.json`` has an entry for
each variant and precision, with a row for each photograph; a second run continues where the first was stopped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Sam2ImageProcessor, Sam2Model, Sam2Processor

from wsss.batch import Boxes
from wsss.export.exporting import tool_versions
from wsss.export.family import Options
from wsss.export.sam import sam2
from wsss.export.sam.hiera import TENSORS
from wsss.photographs import read_photograph
from wsss.spec import AxisRange, Model

from ..harness import RESULTS, about, exported_model, folder_megabytes, log, read_result, study_parser, write_result
from .sam_official import boxes_of, mask_predictor, measure, summary

RESULT = RESULTS / "sam2-official.json"


class Predictor:
    """transformers' classes with the interface of ``SamPredictor``."""

    def __init__(self, model: Sam2Model) -> None:
        side = model.prompt_encoder.input_image_size
        self._model = model
        self._processor = Sam2Processor(Sam2ImageProcessor(size={"height": side, "width": side}), target_size=side)
        self._image = np.zeros((1, 1, 3), np.uint8)
        self.embeddings: list[torch.Tensor] = []

    def set_image(self, image: np.ndarray) -> None:
        """Embed a photograph (H, W, 3) uint8 RGB."""
        self._image = image
        pixels = self._processor(images=image, return_tensors="pt").pixel_values
        self.embeddings = self._model.get_image_embeddings(pixels)

    @torch.inference_mode()
    def predict(self, *, box: np.ndarray, multimask_output: bool) -> tuple[np.ndarray, np.ndarray, None]:
        """Masks (1, H, W) bool and predicted IoU (1,) of a box in pixels of the photograph."""
        inputs = self._processor(images=self._image, input_boxes=[[box.tolist()]], return_tensors="pt")
        found = self._model(image_embeddings=self.embeddings, input_boxes=inputs.input_boxes, multimask_output=multimask_output)
        masks = self._processor.post_process_masks(found.pred_masks, inputs["original_sizes"])[0]
        return masks[0].numpy(), found.iou_scores[0, 0].numpy(), None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line of the module."""
    parser = study_parser(__spec__, __doc__)
    parser.add_argument("voc", type=Path, help="folder with JPEGImages/ and Annotations/ (VOC XML)")
    parser.add_argument("--variant", default="sam2.1_tiny", choices=list(sam2.VARIANTS))
    parser.add_argument("--precision", default="fp32", choices=["fp32", "fp16"])
    parser.add_argument("--weights", default="random:0")
    parser.add_argument("--bundle", type=Path, default=Path("build/sam2"))
    parser.add_argument("--batch", type=int, nargs=3, default=(1, 2, 2), metavar=("MIN", "OPT", "MAX"), help="of the export")
    parser.add_argument("--count", type=int, default=8, help="number of photographs, the first by name that have boxes")
    options = parser.parse_args(arguments)
    given = Options(batch=AxisRange(*options.batch), precision=options.precision)
    model = exported_model("sam", options.variant, options.weights, options.bundle, given)
    predictor = Predictor(sam2.load(options.variant, options.weights)[0])
    names = [path.stem for path in sorted((options.voc / "Annotations").glob("*.xml"))][: options.count]
    key = f"{options.variant} {options.precision}"
    entry = _entry(model, key)
    left = [name for name in names if name not in entry["photographs"]]
    for start in range(0, len(left), 2):
        pair = left[start : start + 2]
        cosines = tensors_of(model, predictor, options.voc, pair)
        for name, row in measure(model, predictor, options.voc, pair):
            entry["photographs"][name] = {**row, "cosine": cosines[name]}
            log(f"{key} {name}: {entry['photographs'][name]}")
        rows = entry["photographs"]
        worst = {name: min(row["cosine"][name] for row in rows.values()) for name in TENSORS}
        entry["summary"] = {**summary(rows), "worst_cosine": worst}
        write_result(RESULT, {**read_result(RESULT), key: entry})
    print(json.dumps(entry["summary"]))


def tensors_of(model: Model, predictor: Predictor, voc: Path, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Cosine of each of the encoder's tensors with the official one, by photograph; they are encoded in one batch."""
    photographs = [read_photograph(voc / "JPEGImages", f"{name}.jpg") for name in names]
    boxes = Boxes.join([boxes_of(voc / "Annotations" / f"{name}.xml", number) for number, name in enumerate(names)])
    embedded = mask_predictor(model).encode(photographs, boxes)
    found: dict[str, dict[str, float]] = {}
    for number, (name, photograph) in enumerate(zip(names, photographs, strict=True)):
        predictor.set_image(photograph.pixels)
        fine, half, whole = predictor.embeddings
        found[name] = {}
        for tensor, maps in zip(TENSORS, (whole, half, fine), strict=True):
            ours = sam2.maps_of(np.asarray(embedded.embeddings[0][tensor], np.float32)[number : number + 1]).double()
            cosine = torch.nn.functional.cosine_similarity(ours.flatten(), maps.double().flatten(), dim=0)
            found[name][tensor] = float(cosine)
    return found


def _entry(model: Model, key: str) -> dict[str, Any]:
    manifest = model.manifest
    known = read_result(RESULT).get(key)
    if known and known["model"] == manifest.identity():
        return dict(known)
    gates = {name: spec.parity for name, spec in manifest.graphs.items() if spec.parity}
    return {
        "model": manifest.identity(),
        "weights": dict(manifest.weights),
        "gate_error": {name: {row.output: gate.worst(row.output).error for row in gate.rows} for name, gate in gates.items()},
        "megabytes": folder_megabytes(model.folder),
        "tools": tool_versions(),
        **about(),
        "photographs": {},
    }


if __name__ == "__main__":
    main()
