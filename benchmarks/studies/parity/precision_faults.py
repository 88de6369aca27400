"""Six planted faults that break a plain FP16 graph, and how the search for FP32 nodes repairs each.

    python -m wsss.benchmarks.studies.parity.precision_faults

A fault is a change to weights: the graphs are those of the bundle ``mini`` (one is traced from a tiny model), and only their
numbers change. ``benchmarks/results/precision-faults.json`` has for each fault the error before and after, the nodes kept in
FP32 with their reasons, and their share of the multiply-adds; and the same for the unchanged graphs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import numpy as np
import onnx_ir as ir
import torch
from segment_anything.modeling import Sam

from wsss.export.exporting import tool_versions
from wsss.export.family import Feeds, Tolerance
from wsss.export.grounding_dino.family import (
    CLS,
    DOT,
    HALF_BOXES_TOLERANCE,
    HALF_LOGITS_TOLERANCE,
    HALF_TEXT_TOLERANCE,
    SEP,
    caption_feeds,
)
from wsss.export.mini import build_sam_mini, clip_mini_tokenizer, grounding_dino_mini_tokenizer
from wsss.export.precision.instrumentation import Session, insert, open_copy
from wsss.export.precision.search import Diagnosis, diagnose
from wsss.export.sam.family import encoder_graph, sample_photographs
from wsss.export.to_onnx import trace
from wsss.export.verify import photograph
from wsss.export.weights import spread
from wsss.runtime.bundles import MINI
from wsss.spec import AxisRange

from ..harness import RESULTS, log, write_result

RESULT = RESULTS / "precision-faults.json"
CANVAS = (192, 192)
CAPTION = ("red disc.", "blue box.", "striped star.")
CLASSES = ("disc", "box", "star", "heart", "ring", "arrow")
SAM_TOLERANCE = Tolerance(relative=5e-3, why="as the gate: masks move by < 0.1 %")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A graph with its feeds and tolerances."""

    name: str
    model: ir.Model
    feeds: list[Feeds]
    tolerance: Mapping[str, Tolerance]
    float16: frozenset[str] = frozenset()
    choices: tuple[str, ...] = ()

    def diagnose(self, *, runs: int = 200, threads: int = 0, log: Callable[[str], None] = lambda line: None) -> Diagnosis:
        """Search the nodes that must stay FP32."""
        return diagnose(
            self.model,
            self.feeds,
            self.tolerance,
            float16=self.float16,
            choices=self.choices,
            runs=runs,
            threads=threads,
            log=log,
        )


# ---- unchanged graphs ----


def sam_encoder() -> Case:
    """The mini SAM encoder on a landscape and a portrait photograph."""
    return Case(
        name="sam encoder",
        model=open_copy(MINI / "sam" / "encoder.onnx"),
        feeds=_rows(sample_photographs(256, 2, 1)),
        tolerance={"embedding": SAM_TOLERANCE},
        float16=frozenset({"embedding"}),
    )


def detector_text() -> Case:
    """The text graph of the mini Grounding-DINO on phrases, [CLS], and a row without tokens, as padding makes them."""
    tokenizer = grounding_dino_mini_tokenizer()
    phrases = [tokenizer.encode(phrase, add_special_tokens=False).ids for phrase in CAPTION] + [[CLS], []]
    tokens = np.zeros((len(phrases), max(map(len, phrases))), np.int64)
    for row, phrase in enumerate(phrases):
        tokens[row, : len(phrase)] = phrase
    mask = np.arange(tokens.shape[1]) < np.array([len(phrase) for phrase in phrases])[:, None]
    return Case(
        name="grounding-dino text",
        model=open_copy(MINI / "grounding-dino" / "text.onnx"),
        feeds=[{"tokens": tokens, "mask": mask}],
        tolerance={"features": HALF_TEXT_TOLERANCE},
        float16=frozenset({"features"}),
    )


def detector_image() -> Case:
    """The image graph of the mini Grounding-DINO, on captions encoded by its text graph."""
    tokenizer = grounding_dino_mini_tokenizer()
    sentences = [[CLS], *(tokenizer.encode(phrase, add_special_tokens=False).ids for phrase in CAPTION), [SEP]]
    assert all(phrase[-1] == DOT for phrase in sentences[1:-1])
    with Session(open_copy(MINI / "grounding-dino" / "text.onnx")) as text:

        def features(phrase: list[int]) -> np.ndarray:
            return text({"tokens": np.array([phrase]), "mask": np.ones((1, len(phrase)), np.bool_)})["features"][0]

        captions = [caption_feeds([[*sentences[:last], [SEP]]], features) for last in (4, 3)]
    rng = np.random.default_rng(12)  # chosen so that errors stay at four tenths of the tolerance on any processor
    sizes = [(CANVAS[0], 150), (170, CANVAS[1])]
    feeds = []
    for caption, (height, width) in zip(captions, sizes, strict=True):
        pixels = np.zeros((1, *CANVAS, 3), np.uint8)
        pixels[0, :height, :width] = photograph(rng, height, width)
        feeds.append({"pixels": pixels, "size": np.array([[height, width]]), **caption})
    return Case(
        name="grounding-dino image",
        model=open_copy(MINI / "grounding-dino" / f"image-{CANVAS[0]}x{CANVAS[1]}.onnx"),
        feeds=feeds,
        tolerance={"logits": HALF_LOGITS_TOLERANCE, "boxes": HALF_BOXES_TOLERANCE},
        float16=frozenset({"text"}),
        choices=("query",),
    )


def clip_logits(scale: float = 100.0) -> Case:
    """The mini CLIP's image graph, followed by the input of its softmax: ``exp(logit_scale) * image . text``.

    The exported graph ends with the embedding, and the runtime multiplies; in the published CLIP (openai/CLIP, ``forward``) the
    model does.
    """
    tokens = np.array([clip_mini_tokenizer().encode(f"a photo of a {name}.").ids for name in CLASSES])
    with Session(open_copy(MINI / "clip" / "text.onnx")) as text:
        classes = text({"tokens": tokens})["embedding"]
    model = open_copy(MINI / "clip" / "image.onnx")
    graph = model.graph
    embedding = graph.outputs[0]
    product = insert(None, graph, "MatMul", [embedding, _weight(graph, "classes", classes.T)])
    factor = insert(None, graph, "Exp", [_weight(graph, "logit_scale", np.array(np.log(scale), np.float32))])
    logits = insert(None, graph, "Mul", [product, factor])
    logits.name, logits.type, logits.shape = "logits", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", len(CLASSES)])
    graph.outputs[0] = logits
    rng = np.random.default_rng(1)
    return Case(
        name="clip logits",
        model=model,
        feeds=[{"pixels": photograph(rng, 96, 96)[None]} for _ in range(3)],
        tolerance={"logits": Tolerance(relative=1e-2, measure=probability_difference, why="probabilities within a hundredth")},
    )


def probability_difference(got: Feeds, expected: Feeds, name: str) -> tuple[float, float]:
    """The largest difference of the softmax over the last axis, and of the logits."""

    def probabilities(logits: np.ndarray) -> np.ndarray:
        raised = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
        return raised / raised.sum(axis=-1, keepdims=True)

    difference = np.abs(probabilities(got[name]) - probabilities(expected[name])).max()
    return float(difference), float(np.abs(got[name].astype(np.float64) - expected[name]).max())


# ---- planted faults ----


def residual_stream() -> Case:
    """Channel 7 of a few tokens grows in every block through an MLP neuron, past 65,504, like the massive activations of trained
    ViTs (arXiv:2402.17762)."""
    case = sam_encoder()
    graph = case.model.graph
    # Four tokens start with a large value, so that this channel dominates them after the norm before the MLP.
    change(graph.initializers["pos_embed"], partial(_put, at=(0, [3, 12, 20, 27], [5, 9, 22, 16], 7), what=2e4))
    for block in range(4):
        bias = graph.initializers[f"blocks.{block}.mlp.lin1.bias"]
        # After the norm such a channel is 9 to 10 and an ordinary one at most 4: the neuron is active for the former alone.
        change(graph.initializers[f"blocks.{block}.norm2.weight"], partial(_put, at=7, what=1.0))
        change(matrix_before(bias), partial(_put, at=(slice(None), 0), what=4 * np.eye(96)[7]))
        change(bias, partial(_put, at=0, what=-30.0))
        out = matrix_before(graph.initializers[f"blocks.{block}.mlp.lin2.bias"])
        change(out, partial(_put, at=0, what=2500 * np.eye(96)[7]))
    return replace(case, name="residual stream beyond 65,504 in the SAM encoder")


def norm_variance() -> Case:
    """The neck's convolution is scaled by 300, which its norm undoes; but the published LayerNorm2d squares the values first."""
    with mock.patch("wsss.export.sam.family.with_channel_norms", lambda layers: layers), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        toy = toy_sam()
        spread(toy, 1)
        toy.image_encoder.neck[0].weight.mul_(300.0)
        graph = encoder_graph(toy, AxisRange(1, 2, 3))
        model = trace(graph)
    return Case(
        name="LayerNorm variance overflow",
        model=model,
        feeds=_rows(sample_photographs(toy.image_encoder.img_size, 2, 1)),
        tolerance={"embedding": SAM_TOLERANCE},
        float16=frozenset({"embedding"}),
    )


def fusion_logits() -> Case:
    """One channel of each head adds 106,000 to every logit between cells and tokens, which does not change the softmax."""
    case = detector_image()
    graph = case.model.graph
    layer = "core.encoder.layers.0.fusion_layer.attn"
    for name, value in (("vision_proj", 1000.0), ("text_proj", 600.0)):
        bias = graph.initializers[f"{layer}.{name}.bias"]
        assert bias.shape is not None
        first = slice(0, None, int(bias.shape[0]) // 4)  # of four heads
        change(matrix_before(bias), partial(_put, at=(slice(None), first), what=0.0))
        change(bias, partial(_put, at=first, what=value))
    return replace(case, name="attention logits overflow in Grounding-DINO's fusion layers")


def box_refinement() -> Case:
    """Boxes of two pixels: the spacing of float16 between 0.5 and 1 is a tenth of a pixel, and so is the error of 1 - x."""
    case = detector_image()
    graph = case.model.graph
    for head in ("core.encoder_output_bbox_embed.layers.2", "box_heads.1.layers.2"):
        bias = graph.initializers[f"{head}.bias"]
        change(matrix_before(bias), partial(_multiply, by=0.1))
        change(bias, partial(_multiply, by=0.1))
    change(
        graph.initializers["core.encoder_output_bbox_embed.layers.2.bias"],
        partial(_put, at=slice(2, 4), what=-1.5),
    )
    return replace(case, name="inverse-sigmoid cancellation in Grounding-DINO's box refinement")


def masked_softmax() -> Case:
    """The mask is the smallest float32, as in transformers: a row without tokens becomes -inf everywhere, then NaN."""
    case = detector_text()
    for value in case.model.graph.initializers.values():
        constant = value.const_value
        if constant is not None and constant.size == 1 and constant.numpy().item() == -1e4:
            change(value, lambda mask: mask.fill(np.finfo(np.float32).min))
    return replace(case, name="softmax with large negative masks")


def logit_scale() -> Case:
    """A logit scale of 90,000, as from a training without a limit."""
    relative = Tolerance(relative=5e-3, why="embeddings of cosine 0.9995 and better")
    return replace(clip_logits(90_000.0), name="CLIP logit scale", tolerance={"logits": relative})


UNHARMED = (sam_encoder, detector_text, detector_image, clip_logits)
FAULTS = (residual_stream, norm_variance, fusion_logits, box_refinement, masked_softmax, logit_scale)


def toy_sam() -> Sam:
    """SAM of two blocks on 64 pixels, randomly initialized."""
    build = build_sam_mini(side_px=64)
    build.image_encoder.blocks = build.image_encoder.blocks[1:3]  # one with windows, the global one
    return build.eval().requires_grad_(False)


def change(value: ir.Value, by: Callable[[np.ndarray], object]) -> None:
    """Change a weight's numbers in place."""
    assert value.const_value is not None, value.name
    numbers = value.const_value.numpy().copy()
    by(numbers)
    value.const_value = ir.Tensor(numbers, name=value.name)


def _put(numbers: np.ndarray, *, at: object, what: object) -> None:
    numbers[at] = what  # type: ignore[call-overload]


def _multiply(numbers: np.ndarray, *, by: float) -> None:
    numbers *= by


def matrix_before(bias: ir.Value) -> ir.Value:
    """The weights (in, out) of the linear layer with this bias."""
    found = {_factor(use.node, bias) for use in bias.uses()}  # a layer that is used twice counts once
    assert len(found) == 1, bias.name
    return found.pop()


def _factor(adds: ir.Node, bias: ir.Value) -> ir.Value:
    (product,) = [value.producer() for value in adds.inputs if value is not None and value is not bias]
    assert product is not None and product.op_type == "MatMul", bias.name
    weights = product.inputs[1]
    assert weights is not None and weights.const_value is not None, bias.name
    return weights


def _weight(graph: ir.Graph, name: str, numbers: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(numbers.shape))
    value.const_value = ir.Tensor(numbers.copy(), name=name)
    graph.register_initializer(value)
    return value


def _rows(feeds: Feeds) -> list[Feeds]:
    count = len(next(iter(feeds.values())))
    return [{name: values[row : row + 1] for name, values in feeds.items()} for row in range(count)]


# ---- results ----


def main() -> None:
    """Run the command line of the module."""
    result: dict[str, dict[str, object]] = {"tools": {**tool_versions()}, "unharmed": {}, "faults": {}}
    partial_file = RESULT.with_suffix(".partial")
    for kind, makers in (("unharmed", UNHARMED), ("faults", FAULTS)):
        for make in makers:
            case = make()
            begun = time.monotonic()
            found = case.diagnose(log=log)
            result[kind][case.name] = row(found) | {"seconds": round(time.monotonic() - begun, 1)}
            log(f"{case.name}: {found.report()}")
            write_result(partial_file, result)
    partial_file.replace(RESULT)


def row(found: Diagnosis) -> dict[str, object]:
    """The part of a diagnosis that is written to the results."""
    return {
        "before": {name: _number(error) for name, (error, _) in found.before.items()},
        "after": {name: _number(error) for name, (error, _) in found.after.items()},
        "allowed": dict(found.tolerance),
        "kept": [{"node": node.name, "op": node.op, "reason": node.reason, "peak": node.peak} for node in found.kept],
        "nodes": found.nodes,
        "share_of_multiply_adds": round(found.share, 5),
        "trials": found.runs,
    }


def _number(error: float) -> float | str:
    return error if math.isfinite(error) else str(error)


if __name__ == "__main__":
    main()
