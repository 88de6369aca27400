"""What each option of SAM's masks gains and costs: ``python -m wsss.benchmarks.studies.quality.mask_options``.

Gains are differences of mIoU on hard drawn scenes of seven kinds and on plain ones, with 95 % intervals of a paired bootstrap
(`decision_rules`), of the models that come with wsss. The second pass, which is no option, is official: the decoder again, with
the box and the first pass's logits as a mask prompt. What of the small SAM the options need was trained with all other weights
fixed (`wsss.mini.train_sam_masks`).

Costs are CPU time of a box on one thread, of a decoder of SAM's size with random weights: of the exported graph, and for the
second pass of the official modules, beside that of their first pass.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from ....batch import Tensor
from ....engines.engine import Engine
from ....engines.ort import OrtEngine
from ....export.family import Graph
from ....export.sam import family as sam_family
from ....export.sam.decoder import stability
from ....export.to_onnx import WeightFile, export_onnx
from ....frame import frame_for
from ....mini.train_sam import load_sam_mini
from ....mini.train_sam_masks import predicted
from ....runtime.chain import Chain, Rules
from ....runtime.masks.regions import without_small_regions
from ....runtime.segment import MaskPredictor
from ....runtime.tune.evidence import Grid
from ....runtime.tune.outcomes import Outcomes, difference
from ....spec import AxisRange, Preprocess
from ..harness import RESULTS, about, log, read_result, set_threads, study_parser, write_result
from .decision_rules import HARD, evidence_of, interval_of, labeled_share

WEIGHTS = Path(__file__).parents[3] / "mini" / "weights" / "sam.safetensors"
OPENED: dict[str, dict[str, Any]] = {
    "best of three": {"multimask": True},
    "regions below 10 pixels": {"min_region": 10},
    "regions below 50 pixels": {"min_region": 50},
    "regions below 200 pixels": {"min_region": 200},
}
"""Rules with which the models run again."""
DECIDED: dict[str, dict[str, Any]] = {
    "stability score": {"stability_exponent": 1.0},
    "stability score squared": {"stability_exponent": 2.0},
    "stability score in place of predicted IoU": {"stability_exponent": 1.0, "quality_exponent": 0.0},
}
"""Rules that are decided from what the models found."""
ONLY = Grid(tag_threshold=(), score_rule=(), box_threshold=(), nms=(), nms_across=(), enclosing=())
"""Boxes are those of the defaults."""
SECOND = "second pass"
BOXES, REPEATS = 8, 12


class TwoPasses:
    """A decoder that decodes each box again, with its mask as a prompt, in the official modules."""

    def __init__(self, decoder: Engine, sam: Sam) -> None:
        self._decoder, self._sam = decoder, sam
        self.inputs, self.outputs, self.axes = decoder.inputs, decoder.outputs, decoder.axes

    @torch.inference_mode()
    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        first = self._decoder(feeds)
        given = {name: torch.from_numpy(np.array(feeds[name])) for name in ("embedding", "boxes", "image")}
        prompt = torch.from_numpy(np.array(first["logits"]))[:, None]
        logits, quality = predicted(self._sam, given["embedding"], given["boxes"], given["image"], prompt)
        again = {"logits": logits[:, 0], "quality": quality[:, 0], "stability": stability(logits[:, 0].flatten(1))}
        return {**first, **{name: value.numpy() for name, value in again.items()}}


def gains(work: Path, count: int) -> dict[str, Any]:
    """mIoU of the defaults, and what each option gains."""
    scenes = [(kind, seed) for kind in HARD for seed in range(count)]

    def outcomes_of(name: str, chain: Chain) -> Outcomes:
        return Outcomes(evidence_of(work, name, scenes, chain=chain, grid=ONLY))

    def opened(**changed: Any) -> Chain:
        return Chain.open("mini", classes="mini", engine="ort", rules=Rules(**changed))

    default = outcomes_of("default", opened())
    rules, empty = default.evidence.rules, np.array([kind == "empty" for kind, _ in scenes])
    base = default.matrices(rules)
    result: dict[str, Any] = {"scenes": len(scenes), "miou": round(default.miou(rules), 4), "options": {}}

    def add(name: str, matrices: np.ndarray) -> None:
        shown = round(labeled_share(matrices[empty]), 4)
        result["options"][name] = {**interval_of(difference(matrices, base)), "empty scenes with a label": shown}
        log(f"{name:42} {result['options'][name]}")

    for name, changed in OPENED.items():
        found = outcomes_of(name.replace(" ", "-"), opened(**changed))
        add(name, found.matrices(found.evidence.rules))
    twice = opened()
    stage = twice.segment.stage
    assert isinstance(stage, MaskPredictor)
    stage._decoder = TwoPasses(stage._decoder, load_sam_mini(WEIGHTS))
    found = outcomes_of("second-pass", twice)
    add(SECOND, found.matrices(found.evidence.rules))
    for name, changed in DECIDED.items():
        add(name, default.matrices(replace(rules, **changed)))
    return result


def decoder_of_full_size() -> Sam:
    """The prompt encoder and mask decoder of ``build_sam.py``, with random weights; it has no image encoder."""
    torch.manual_seed(0)
    prompt = PromptEncoder(256, (64, 64), (1024, 1024), mask_in_chans=16)
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, num_heads=8, mlp_dim=2048)
    decoder = MaskDecoder(num_multimask_outputs=3, transformer=transformer, transformer_dim=256)
    parts = {"prompt_encoder": prompt.eval(), "mask_decoder": decoder.eval()}
    for part in parts.values():
        part.requires_grad_(False)
    return cast(Sam, SimpleNamespace(image_encoder=SimpleNamespace(img_size=1024), **parts))


def milliseconds(call: Callable[[], object], rows: int) -> float:
    """The least CPU time of a row, of several calls."""
    call()
    taken = []
    for _ in range(REPEATS):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return round(1e3 * min(taken) / rows, 3)


@torch.inference_mode()
def costs() -> dict[str, float]:
    """Milliseconds of a box."""
    sam = decoder_of_full_size()
    graph = sam_family.decoder_graph(sam, AxisRange(1, 1, 8), AxisRange(1, BOXES, 64))
    feeds = graph.sample(BOXES, 0)
    with tempfile.TemporaryDirectory() as folder:
        engine = exported(graph, Path(folder))
        single, best = ({**feeds, "multimask": np.full(BOXES, multimask)} for multimask in (False, True))
        logits = np.array(engine(single)["logits"])
        found = {
            "decoder": milliseconds(lambda: engine(single), BOXES),
            "decoder, best of three": milliseconds(lambda: engine(best), BOXES),
        }
    flat = torch.from_numpy(logits).flatten(1)
    found["stability score"] = milliseconds(lambda: stability(flat), BOXES)
    side = Preprocess(
        resize="longest", longest_px=1024, filter="bilinear", canvases=((1024, 1024),), mean=(0, 0, 0), std=(1, 1, 1), source=""
    )
    frames = [frame_for(side, 375, 500)] * BOXES
    smooth = np.kron(np.random.default_rng(0).normal(0, 4, (BOXES, 16, 16)), np.ones((16, 16))).astype(np.float32)
    found["regions"] = milliseconds(lambda: without_small_regions(smooth.copy(), frames, 50), BOXES)
    embedding, boxes, image = (torch.from_numpy(feeds[name]) for name in ("embedding", "boxes", "image"))
    prompt = torch.from_numpy(logits)[:, None]
    found["official decoder"] = milliseconds(lambda: predicted(sam, embedding, boxes, image, None), BOXES)
    found["official decoder, mask prompt"] = milliseconds(lambda: predicted(sam, embedding, boxes, image, prompt), BOXES)
    return found


def exported(graph: Graph, folder: Path) -> OrtEngine:
    """A graph in ONNX Runtime on one thread."""
    export_onnx(graph, folder / f"{graph.name}.onnx", WeightFile(folder / "weights.data"))
    return OrtEngine(folder / f"{graph.name}.onnx", graph.spec(f"{graph.name}.onnx", 18), threads=1)


def main() -> None:
    parser = study_parser(__spec__, __doc__, out=RESULTS / "mask-options.json", work="build/mask-options", threads=True)
    parser.add_argument("--count", type=int, default=30, help="scenes of each kind")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    result = {**read_result(arguments.out), **about()}
    for name, part in (("gains", lambda: gains(arguments.work, arguments.count)), ("milliseconds of a box", costs)):
        result[name] = part()
        write_result(arguments.out, result)
    log(str(result["milliseconds of a box"]))


if __name__ == "__main__":
    main()
