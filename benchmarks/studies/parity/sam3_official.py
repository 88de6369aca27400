"""Compare our SAM 3 with transformers' ``Sam3Model`` and ``Sam3Processor`` on real photographs.

    python -m wsss.benchmarks.studies.parity.sam3_official VOC_PAIRS --side 336 --precision fp32 --bundle build/sam3

Photographs go through our graphs in pairs, with the phrases of both in the same calls; the official model gets one photograph and
one phrase at a time. Phrases are the classes of the annotation, and one that is not there. Compared are the logits, presence and
boxes of all queries, and the best masks at the photograph's size, resized as logits (facebookresearch/sam3) on both sides;
transformers' own rule, which resizes probabilities, is compared with that. Both get pixels resized by Pillow;
how far torchvision's are from these, which the official processors use, is measured too.

Weights are seeded unless given. ``--side`` gives photographs fewer pixels than 1008 x 1008: all parameters take part, in a ninth
of the work at 336. ``benchmarks/results/sam3-official.json`` has an entry for each side and precision, with a row for each
photograph; a second run continues where the first was stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import Sam3ImageProcessor, Sam3Model

from wsss.batch import Tensor
from wsss.classes import class_list, named_list
from wsss.engines.ort import OrtEngine
from wsss.export.exporting import tool_versions
from wsss.export.family import Options
from wsss.export.sam3 import weights as sam3
from wsss.export.sam3.concept import Detector, Outline
from wsss.export.sam3.graphs import shapes_of
from wsss.export.sam3.vision import Vision, grid_of
from wsss.frame import frame_for
from wsss.photographs import read_photograph
from wsss.runtime.canvas import on_canvas
from wsss.runtime.chain import ConstantTags
from wsss.runtime.concept import InstanceFinder, Phrase, embed_phrases
from wsss.runtime.given.voc import read_voc_xml
from wsss.runtime.text import open_tokenizer
from wsss.spec import AxisRange, Model

from ..harness import (
    RESULTS,
    about,
    exported_model,
    folder_megabytes,
    log,
    peak_memory_bytes,
    read_result,
    study_parser,
    write_result,
)

RESULT = RESULTS / "sam3-official.json"
ABSENT = "giraffe"
"""A phrase of every photograph; none of PASCAL VOC's classes."""
CLASSES = (1, 20, 80)
"""How many classes a photograph is searched for, whose costs are measured."""
BEST = 4
"""Masks that are compared for each phrase: of the queries with the best scores."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line of the module."""
    parser = study_parser(__spec__, __doc__)
    parser.add_argument("voc", type=Path, help="folder with JPEGImages/ and Annotations/ (VOC XML)")
    parser.add_argument("--variant", default="sam3", choices=list(sam3.CONFIGS))
    parser.add_argument("--side", type=int, help="of the canvas in pixels, a multiple of the patches; default: the variant's")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "fp16"])
    parser.add_argument("--weights", default="random:0")
    parser.add_argument("--bundle", type=Path, default=Path("build/sam3"))
    parser.add_argument("--batch", type=int, nargs=3, default=(1, 2, 2), metavar=("MIN", "OPT", "MAX"), help="of the export")
    parser.add_argument("--count", type=int, default=8, help="number of photographs, the first by name that have boxes")
    options = parser.parse_args(arguments)
    own_size = work(options.variant)
    if options.side:
        backbone = {"model_type": "sam3_vit_model", "image_size": options.side}
        sam3.CONFIGS[options.variant] = {"vision_config": {"backbone_config": backbone}}
    begun = time.monotonic()
    given = Options(batch=AxisRange(*options.batch), precision=options.precision)
    model = exported_model("sam3", options.variant, options.weights, options.bundle, given)
    exported = {"seconds": round(time.monotonic() - begun), "peak_gb": round(peak_memory_bytes() / 1e9, 1)}
    official, _ = sam3.load(options.variant, options.weights)
    names = [path.stem for path in sorted((options.voc / "Annotations").glob("*.xml"))][: options.count]
    key = f"{options.variant} {model.manifest.preprocess.longest_px} {options.precision}"
    entry = {**_entry(model, key, exported), "work": own_size}
    left = [name for name in names if name not in entry["photographs"]]
    for start in range(0, len(left), 2):
        for name, row in compare(model, official, options.voc, left[start : start + 2]).items():
            entry["photographs"][name] = row
            log(f"{key} {name}: {row}")
        entry["summary"] = summary(entry["photographs"])
        write_result(RESULT, {**read_result(RESULT), key: entry})
    if "classes" not in entry:
        entry["classes"] = {str(count): cost_of(model, options.voc, names[:2], count) for count in CLASSES}
        write_result(RESULT, {**read_result(RESULT), key: entry})
    print(json.dumps(entry["summary"]))


def work(variant: str) -> dict[str, float]:
    """Giga multiply-adds of the graphs at the variant's own size: vision of an image, the others of a phrase, with one mask."""
    with torch.device("meta"):
        official = sam3.build(variant)
    shapes, tokens = shapes_of(official), official.config.text_config.max_position_embeddings
    grid, config = grid_of(official), official.config.detr_decoder_config
    side, width = official.config.vision_config.backbone_config.image_size, config.hidden_size
    zeros = partial(torch.zeros, device="meta")
    number = zeros(1, dtype=torch.int64)
    cells, queries = zeros(1, grid**2, width), zeros(1, config.num_queries, width)
    text, mask = zeros(1, tokens, width), zeros(1, tokens, dtype=torch.bool)
    maps = [zeros(1, *shapes[name]) for name in ("features_2x", "features_4x")]
    jobs: dict[str, tuple[torch.nn.Module, tuple[torch.Tensor, ...]]] = {
        "vision": (Vision(official), (zeros(1, side, side, 3, dtype=torch.uint8),)),
        "detector": (Detector(official), (cells, text, mask, number)),
        "outline": (Outline(official), (cells, queries, *maps, number, number, number[None], number)),
    }
    found = {}
    for name, (module, inputs) in jobs.items():
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            module.to("meta")(*inputs)
        found[name] = round(counter.get_total_flops() / 2e9, 1)
    return found


def cost_of(model: Model, voc: Path, names: Sequence[str], count: int) -> dict[str, Any]:
    """Calls, and seconds for a photograph, of some photographs together that are searched for the first classes of COCO."""
    photographs = [read_photograph(voc / "JPEGImages", f"{name}.jpg") for name in names]
    classes = class_list(named_list("coco").phrases[number][0] for number in range(count))
    engines = {name: _Timed(OrtEngine(model.path(name), model.graph(name))) for name in ("text", "vision", "detector", "outline")}
    text, vision, detector, outline = engines.values()
    finder = InstanceFinder(model, text, vision, detector, outline, classes, decides=True)
    found = finder(photographs, ConstantTags(classes, True)(photographs))
    return {
        "photographs": len(names),
        "instances": len(found),
        "calls": {name: engine.calls for name, engine in engines.items()},
        "seconds": {name: round(engine.seconds / len(names), 2) for name, engine in engines.items() if name != "text"},
        "text_seconds": round(engines["text"].seconds, 2),
    }


class _Timed:
    """An engine that counts its calls and their seconds."""

    def __init__(self, engine: OrtEngine) -> None:
        self._engine, self.calls, self.seconds = engine, 0, 0.0
        self.inputs, self.outputs, self.axes = engine.inputs, engine.outputs, engine.axes

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        begun = time.monotonic()
        out = self._engine(feeds)
        self.calls, self.seconds = self.calls + 1, self.seconds + time.monotonic() - begun
        return out


def compare(model: Model, official: Sam3Model, voc: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Rows of the result file, by photograph. All photographs go through our graphs together."""
    photographs = [read_photograph(voc / "JPEGImages", f"{name}.jpg") for name in names]
    frames = [frame_for(model.manifest.preprocess, *photograph.shape) for photograph in photographs]
    pixels = np.stack([on_canvas(photo.pixels, frame, "bilinear") for photo, frame in zip(photographs, frames, strict=True)])
    things = [read_voc_xml(voc / "Annotations" / f"{name}.xml").boxes for name in names]
    words = [[*dict.fromkeys(thing.name for thing in some), ABSENT] for some in things]
    engines = {name: OrtEngine(model.path(name), model.graph(name)) for name in ("text", "vision", "detector", "outline")}
    phrases = embed_phrases(model, engines["text"], class_list(tuple(dict.fromkeys(word for some in words for word in some))))
    known = dict(zip(dict.fromkeys(word for some in words for word in some), phrases, strict=True))
    tokenizer = open_tokenizer(model)
    tokens = {word: tokenizer.encode(word).ids for word in known}
    rows = [(number, word) for number, some in enumerate(words) for word in some]
    begun = time.monotonic()
    features = {name: np.array(value) for name, value in engines["vision"]({"pixels": pixels}).items()}
    vision_seconds = (time.monotonic() - begun) / len(names)
    begun = time.monotonic()
    ours = [row for start in range(0, len(rows), 8) for row in _ours(engines, features, rows[start : start + 8], known)]
    row_seconds = (time.monotonic() - begun) / len(rows)
    found: dict[str, dict[str, Any]] = {}
    normalize = Sam3ImageProcessor(do_resize=False)
    for number, (name, photograph) in enumerate(zip(names, photographs, strict=True)):
        begun = time.monotonic()
        with torch.inference_mode():
            inputs = normalize(torch.from_numpy(pixels[number]).permute(2, 0, 1), return_tensors="pt").pixel_values
            vision = official.get_vision_features(inputs)
        official_seconds = time.monotonic() - begun
        side = {"height": pixels.shape[1], "width": pixels.shape[2]}
        theirs = Sam3ImageProcessor(size=side)(photograph.pixels, return_tensors="pt").pixel_values
        pairs = [
            _difference(row, _theirs(official, vision, tokens[word], known[word].mask), photograph.shape)
            for (of, word), row in zip(rows, ours, strict=True)
            if of == number
        ]
        found[name] = {
            "phrases": len(pairs),
            **{key: max(pair[key] for pair in pairs) for key in ("logits", "presence", "scores", "boxes")},
            **{key: min(pair[key] for pair in pairs) for key in ("worst_iou", "worst_iou_of_probabilities", "box_iou")},
            "mean_mask_share": float(np.mean([pair["mask_share"] for pair in pairs])),
            "gray_levels_of_resizing": round(float((theirs - inputs).abs().max()) * 127.5, 2),
            "vision_seconds": round(vision_seconds, 1),
            "phrase_seconds": round(row_seconds, 1),
            "official_vision_seconds": round(official_seconds, 1),
        }
    return found


def _ours(
    engines: Mapping[str, OrtEngine],
    features: Mapping[str, np.ndarray],
    rows: Sequence[tuple[int, str]],
    known: Mapping[str, Phrase],
) -> list[dict[str, np.ndarray]]:
    """Our outputs for rows of a photograph's number and a phrase, and the mask logits of each row's best queries."""
    image = np.array([number for number, _ in rows], np.int64)
    out: dict[str, Tensor] = engines["detector"](
        {
            "embedding": features["embedding"],
            "text": np.stack([known[word].features for _, word in rows]),
            "mask": np.stack([known[word].mask for _, word in rows]),
            "image": image,
        }
    )
    kept = {name: np.array(value) for name, value in out.items()}
    best = np.argsort(-kept["logits"], axis=1, kind="stable")[:, :BEST]
    masks = []
    for start in range(0, len(rows), 4):
        some = np.arange(start, min(start + 4, len(rows)))
        made = engines["outline"](
            {
                **{name: kept[name] for name in ("encoded", "queries")},
                **{name: features[name] for name in ("features_2x", "features_4x")},
                "row": some,
                "image": image[some],
                "query": some[:, None] * kept["logits"].shape[1] + best[some],
                "pick": np.arange(len(some) * BEST),
            }
        )
        logits = np.array(made["logits"], np.float32)
        masks += list(logits.reshape(len(some), BEST, *logits.shape[1:]))
    return [
        {**{name: kept[name][row] for name in ("logits", "presence", "boxes")}, "best": best[row], "masks": masks[row]}
        for row in range(len(rows))
    ]


@torch.inference_mode()
def _theirs(official: Sam3Model, vision: Any, tokens: Sequence[int], mask: np.ndarray) -> dict[str, np.ndarray]:
    inputs = {"input_ids": torch.tensor([tokens]), "attention_mask": torch.from_numpy(mask)[None].long()}
    text = official.get_text_features(**inputs)  # what ``forward`` gets when it is given tokens
    found = official(vision_embeds=vision, text_embeds=text, attention_mask=inputs["attention_mask"])
    presence = found.presence_logits[0, 0]
    return {
        "logits": found.pred_logits[0].numpy(),
        "presence": presence.numpy(),
        "boxes": found.pred_boxes[0].numpy(),
        "masks": found.pred_masks[0].numpy(),
    }


def _difference(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], size: tuple[int, int]) -> dict[str, float]:
    def scores(row: Mapping[str, np.ndarray]) -> np.ndarray:
        return 1 / (1 + np.exp(-row["logits"])) / (1 + np.exp(-row["presence"]))

    def at_size(values: np.ndarray) -> np.ndarray:
        return F.interpolate(torch.from_numpy(values)[None], size, mode="bilinear", align_corners=False)[0].numpy()

    low = theirs["masks"][ours["best"]]
    masks, expected = at_size(ours["masks"]) > 0, at_size(low) > 0
    by_probability = at_size(1 / (1 + np.exp(-low))) > 0.5
    return {
        **{name: float(np.abs(ours[name] - theirs[name]).max()) for name in ("logits", "presence", "boxes")},
        "scores": float(np.abs(scores(ours) - scores(theirs)).max()),
        "box_iou": min(_box_iou(*pair) for pair in zip(ours["boxes"], theirs["boxes"], strict=True)),
        "worst_iou": min(_iou(*pair) for pair in zip(masks, expected, strict=True)),
        "worst_iou_of_probabilities": min(_iou(*pair) for pair in zip(by_probability, expected, strict=True)),
        "mask_share": float(expected.mean()),
    }


def _iou(one: np.ndarray, other: np.ndarray) -> float:
    union = int((one | other).sum())
    return float((one & other).sum() / union) if union else 1.0


def _box_iou(one: np.ndarray, other: np.ndarray) -> float:
    shared = float(np.clip(np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]), 0, None).prod())
    union = sum(float((box[2:] - box[:2]).prod()) for box in (one, other)) - shared
    return shared / union if union > 0 else 1.0


def summary(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The worst of all photographs, and median seconds."""
    values = list(rows.values())
    return {
        "photographs": len(values),
        "phrases": sum(row["phrases"] for row in values),
        **{
            name: max(row[name] for row in values)
            for name in ("logits", "presence", "scores", "boxes", "gray_levels_of_resizing")
        },
        **{name: min(row[name] for row in values) for name in ("worst_iou", "worst_iou_of_probabilities", "box_iou")},
        **{
            f"median_{name}": float(np.median([row[name] for row in values]))
            for name in ("vision_seconds", "phrase_seconds", "official_vision_seconds")
        },
    }


def _entry(model: Model, key: str, exported: Mapping[str, float]) -> dict[str, Any]:
    manifest = model.manifest
    known = read_result(RESULT).get(key)
    reports = {name: spec.parity for name, spec in manifest.graphs.items() if spec.parity}
    worst = {name: {output: report.worst(output).error for output in report.tolerance} for name, report in reports.items()}
    if known and known["model"] == manifest.identity():
        return {**known, "gate_error": worst}
    return {
        "model": manifest.identity(),
        "weights": dict(manifest.weights),
        "export": dict(exported),
        "gate_error": worst,
        "megabytes": folder_megabytes(model.folder),
        "tools": tool_versions(),
        **about(),
        "photographs": {},
    }


if __name__ == "__main__":
    main()
