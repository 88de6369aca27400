"""Labels of exported segmenters beside those of validation, on whole photographs of any size.

    python -m wsss.benchmarks.studies.parity.segmenter_photographs FOLDER

FOLDER has real photographs and true masks (JPEGImages/, SegmentationClass/). Each network is trained on them for a few steps, and
exported with its default canvases, and with one square of the training crop, on which photographs are read in tiles. ONNX Runtime
labels all photographs with both, as `wsss label` does. Their labels are compared with validation's, which puts
whole photographs on the same canvases, and with the truth.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ....batch import Boxes, Labels
from ....classes import parse_classes
from ....engines.ort import OrtEngine
from ....export.exporting import export_model
from ....export.family import Options
from ....export.segmenter import FAMILY
from ....photographs import read_photograph
from ....runtime.trained_segmenter import SegmenterStage, no_masks
from ....spec import AxisRange, Bundle
from ....store.local import read_label
from ....train.args import Config, config_from
from ....train.checkpoint import load_run
from ....train.evaluate.metrics import mean_iou
from ....train.loop import train
from ....train.presets import preset
from ....train.validate import whole_image_logits
from ...confusion import total_confusion
from ..harness import RESULTS, about, log, read_result, study_parser, write_result
from ..quality.voc_pairs import store_of_masks

NETWORKS = {"deeplabv3plus/mobilenet_v2": 1e-3, "segformer/b0": 3e-4}
"""The networks, with the learning rate of their short training."""
CROP = 128


def trained(folder: Path, work: Path, name: str, steps: int) -> tuple[Path, Config]:
    """A run of a few steps, with a larger weight for rare classes, so that its predictions vary."""
    architecture, _, encoder = name.partition("/")
    store_of_masks(folder / "JPEGImages", folder / "SegmentationClass", work / "store", parse_classes("voc"))
    data = {
        "shorter_px": 0,
        "crop": CROP,
        "largest_share": 1.0,
        "batch": 8,
        "scale": [0.25, 0.75],
        "balance": "weights",
        "validation_share": 0.0,
    }
    config = config_from(
        {**preset("mini"), "model": {"architecture": architecture, "encoder": encoder}},
        {"data": data, "optimizer": {"steps": steps, "warm_up": 5, "rate": NETWORKS[name]}},
    )
    run = work / name.replace("/", "-")
    train(work / "store", folder / "JPEGImages", run, config, log=log, watch=lambda now: log(str(now)))
    return run, config


def labels_of(stage: SegmenterStage, folder: Path, names: list[str]) -> Iterator[np.ndarray]:
    """The label maps of an exported segmenter."""
    nothing = Labels(np.zeros((1, 20), np.float32), np.zeros((1, 20), np.bool_))
    for name in names:
        photo = read_photograph(folder / "JPEGImages", f"{name}.jpg")
        yield stage([photo], nothing, Boxes.none(), no_masks([photo], Boxes.none())).label_maps[0]


def measure(folder: Path, work: Path, name: str, steps: int) -> dict[str, Any]:
    """Share of equal pixels, and mIoU against the truth, of a network's exports and of validation."""
    run, config = trained(folder, work, name, steps)
    segmenter, _ = load_run(run)
    names = sorted(path.stem for path in (folder / "SegmentationClass").glob("*.png"))
    truth = [read_label(folder / "SegmentationClass" / f"{each}.png") for each in names]
    with torch.inference_mode():
        whole = [
            whole_image_logits(
                segmenter, read_photograph(folder / "JPEGImages", f"{each}.jpg").pixels, config.data, torch.device("cpu")
            )
            .argmax(dim=0)
            .to(torch.uint8)
            .numpy()
            for each in names
        ]

    def miou(maps: list[np.ndarray]) -> float:
        return round(mean_iou(total_confusion(zip(truth, maps, strict=True), segmenter.classes - 1)), 4)

    found: dict[str, Any] = {"steps": steps, "photographs": len(names), "validation": {"miou": miou(whole)}}
    for kind, sizes in (("default canvases", ()), ("one crop, in tiles", ((CROP, CROP),))):
        bundle = work / f"{run.name}-{kind.replace(', ', '-').replace(' ', '-')}"
        options = Options(batch=AxisRange(1, 1, 2), sizes=sizes)
        export_model(FAMILY, variant="trained", weights=str(run), bundle=bundle, options=options, log=log, gate=not sizes)
        model = Bundle(bundle).model("segmenter")
        stage = SegmenterStage(
            model,
            lambda canvas, model=model: OrtEngine(  # type: ignore[misc]
                model.folder / model.graph(f"image-{canvas[0]}x{canvas[1]}").file, model.graph(f"image-{canvas[0]}x{canvas[1]}")
            ),
        )
        maps = list(labels_of(stage, folder, names))
        same, pixels = (
            sum(int(each) for each in column)
            for column in zip(*(((a == b).sum(), a.size) for a, b in zip(maps, whole, strict=True)), strict=True)
        )
        found[kind] = {
            "canvases": len(model.manifest.preprocess.canvases),
            "pixels_as_validation": round(same / pixels, 5),
            "miou": miou(maps),
        }
        log(f"{name}, {kind}: {found[kind]}, validation {found['validation']}")
    return found


def main() -> None:
    parser = study_parser(__spec__, __doc__, out=RESULTS / "segmenter-photographs.json", work="build/segmenter-photographs")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--network", action="append", choices=list(NETWORKS), help="default: all")
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    result = read_result(arguments.out) | about()
    for name in arguments.network or NETWORKS:
        result[name] = measure(arguments.folder, arguments.work, name, arguments.steps)
        write_result(arguments.out, result)


if __name__ == "__main__":
    main()
