"""Grounding-DINO: a text graph, and an image graph for each canvas.

The official classes are transformers'. Settings of the manifest (read by the runtime):

- ``cls``, ``sep``, ``dot``, ``pad``: token ids. A caption is [CLS], the pieces of each phrase and a dot, [SEP].
- ``max_tokens``: most tokens of a caption, with [CLS] and [SEP]; the reference truncates silently.
- ``score_rule``: how the score of a class follows from those of its tokens (`wsss.spec.ScoreRule`). ``max`` is ``predict()``
  (groundingdino/util/inference.py); ``mean``, without the dot, is the COCO evaluation (demo/test_ap_on_coco.py: a
  span-normalized map).
- ``box_thresholds``: lowest score of a box, by rule. For the maximum, 0.3 is the official number (README.md). For the mean there
  is none: the evaluation has no threshold.
- ``queries``: boxes per photo, before any threshold or suppression.
- ``sampling``: how deformable attention reads between cells (`layers.sampler`); not read by the runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
)

from ...errors import ParityError, UsageError
from ...spec import AxisRange, Preprocess, ScoreRule, TensorSpec
from .. import canvases as canvas_template
from .. import mini
from ..canvases import tracing_canvas
from ..family import DISTINCT, Family, Feeds, Graph, InHalf, Options, Prepared, Sampling, Template, Tolerance
from ..resize import resize_graphs
from ..verify import photograph
from .graphs import MEAN, STD, Detector, ImageGraph, TextGraph, lengths_of, level_shapes, other_numbers
from .layers import MMDET_MARGIN, OFFICIAL_MARGIN, TRANSFORMERS_MARGIN, Margin, inverse_sigmoid
from .weights import DEFAULT, MM_BACKBONES, OFFICIAL, bert_tokenizer, load

CLS, SEP, DOT, PAD = 101, 102, 1012, 0
"""Ids of bert-base-uncased; transformers splits captions by these numbers (SPECIAL_TOKENS in its model)."""
ANY_WORD = 104
"""The id of an ordinary word; the gate rebuilds captions with it."""
MAX_TOKENS = 256
"""max_text_len of the official configurations (groundingdino/config)."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Input sizes, batch and box settings of a variant."""

    canvases: tuple[tuple[int, int], ...]
    short_px: int
    longest_px: int
    batch: AxisRange
    box_thresholds: Mapping[ScoreRule, float]
    """Lowest score of a box; the first rule is the default."""
    margin: Margin
    """Of ``inverse_sigmoid``, with which the weights were trained."""
    source: str


FULL = Frame(
    canvases=((800, 1088), (1088, 800), (1024, 1024), (800, 1344), (1344, 800)),
    short_px=800,
    longest_px=1333,
    batch=AxisRange(1, 4, 8),
    box_thresholds={"max": 0.3},
    margin=OFFICIAL_MARGIN,
    source="GroundingDINO, groundingdino/util/inference.py, load_image",
)
MM = replace(
    FULL,
    margin=MMDET_MARGIN,
    box_thresholds={"mean": 0.3},  # mmdetection's demo/image_demo.py; its scores are means
    source="mmdetection, configs/mm_grounding_dino, test_pipeline",
)
MINI = Frame(
    canvases=((192, 192), (144, 256), (256, 144)),
    short_px=144,
    longest_px=256,
    batch=AxisRange(1, 8, 16),
    box_thresholds={"max": 0.5, "mean": 0.5},  # best F1 on held-out scenes
    margin=TRANSFORMERS_MARGIN,
    source="mini/train_detector.py: the official rule on smaller sides",
)

MM_MINI = replace(MINI, margin=MMDET_MARGIN, box_thresholds=MM.box_thresholds)

BEST_QUERIES = 100
TRACED_SIDE = 800
"""The canvas that is traced for all canvases has sides of at least so many px; on smaller ones the numbers of windows of the last
stage are among the small numbers of the model."""


def score_difference(got: Feeds, want: Feeds, name: str) -> tuple[float, float]:
    """Largest difference of the scores, the sigmoids of the logits; returned twice, as it has no unit."""
    scores, expected = (1 / (1 + np.exp(-each[name].astype(np.float64))) for each in (got, want))
    worst = float(np.abs(scores - expected).max(initial=0.0))
    return worst, worst


def best_boxes_apart(got: Feeds, want: Feeds, name: str) -> tuple[float, float]:
    """Largest 1 - IoU of the boxes (B, Q, 4) of the queries with the best scores; largest difference of a coordinate."""
    best = np.argsort(-want["logits"].max(axis=2), axis=1, kind="stable")[:, :BEST_QUERIES, None]
    boxes, expected = (np.take_along_axis(each[name].astype(np.float64), best, 1) for each in (got, want))
    low = np.maximum(boxes[..., :2] - boxes[..., 2:] / 2, expected[..., :2] - expected[..., 2:] / 2)
    high = np.minimum(boxes[..., :2] + boxes[..., 2:] / 2, expected[..., :2] + expected[..., 2:] / 2)
    intersection = (high - low).clip(min=0).prod(-1)
    iou = intersection / (boxes[..., 2:].prod(-1) + expected[..., 2:].prod(-1) - intersection).clip(min=1e-12)
    return float(1 - iou.min()), float(np.abs(boxes - expected).max())


TEXT_TOLERANCE = Tolerance(relative=2e-5, why="float32 rounding of 12 BERT layers; measured 1.3e-6 with seeded weights")
LOGITS_TOLERANCE = Tolerance(
    relative=1e-4, absolute=1e-3, why="float32 rounding through all layers; measured 4e-6 and 1e-4 at full size"
)
BOXES_TOLERANCE = Tolerance(relative=1e-4, absolute=1e-3, why="float32 rounding through all layers; measured 4e-7 at full size")
HALF_TEXT_TOLERANCE = Tolerance(relative=5e-3, why="rounding to 11 bits through 12 BERT layers")
HALF_LOGITS_TOLERANCE = Tolerance(relative=0.01, measure=score_difference, why="scores change by 0.01 at most")
HALF_BOXES_TOLERANCE = Tolerance(relative=0.02, measure=best_boxes_apart, why="boxes of the 100 best queries: IoU >= 0.98")
TIE, HALF_TIE = 1e-4, 2e-2
"""Scores of two cells count as tied when they differ by less than this share of the largest score: rounding changes them
by 1e-6 of it (in half, by 1e-3), and only ranks of scores that close can swap."""


def prepare(variant: str, weights: str, options: Options) -> Prepared:
    """Grounding-DINO ready to be traced.

    Args:
        variant: one of `FAMILY`. ``mm_mini`` has no trained weights.
        weights: an official ``.pth`` (mmdetection's for ``mm_*``), a folder of the Hugging Face hub, a known name,
            ``random:SEED``; ``mini`` for the mini weights of the package.
        options: canvases, batch range, and how deformable attention samples.

    Raises:
        UsageError: no such variant. WeightsError: the weights or the vocabulary are missing or do not fit.
    """
    if variant not in FAMILY.variants:
        raise UsageError(f"--variant: expected one of {', '.join(FAMILY.variants)}, got {variant!r}")
    small = variant.endswith("mini")
    build: Callable[[], Detector] = partial(build_official, variant)
    if small:
        build = mini.build_grounding_dino_mini if variant == "mini" else mini.build_mm_grounding_dino_mini
    model, record, path = load(build, variant, weights)
    tokenizer = mini.grounding_dino_mini_tokenizer() if small else bert_tokenizer(path)
    frame = {"mini": MINI, "mm_mini": MM_MINI, "swin_t": FULL, "swin_b": FULL}.get(variant, MM)
    return assemble(model, variant, frame, options, tokenizer=tokenizer, record=record)


def assemble(
    model: Detector,
    variant: str,
    frame: Frame,
    options: Options,
    *,
    tokenizer: object,
    record: dict[str, str],
) -> Prepared:
    """The graphs, preprocessing and settings of any model of the official class."""
    canvases = tuple(sorted(options.sizes or frame.canvases, key=lambda canvas: canvas[0] * canvas[1]))
    batch = options.batch or frame.batch
    graphs: list[Callable[[], Graph]] = [partial(text_graph, model)]
    # TensorRT's kernels that gather never write the samples; its GridSample has one type for all.
    sampling = options.sampling or ("gather" if options.for_tensorrt else "grid-sample")
    graphs += image_graphs(model, canvases, batch, frame.margin, sampling, options.for_tensorrt)
    preprocess = Preprocess(
        resize="short-longest",
        short_px=min(frame.short_px, *(min(canvas) for canvas in canvases)),
        longest_px=min(frame.longest_px, max(max(canvas) for canvas in canvases)),
        filter="bilinear",
        canvases=canvases,
        mean=MEAN,
        std=STD,
        source=frame.source,
    )
    return Prepared(
        variant=variant,
        graphs=[*graphs, *(resize_graphs(preprocess) if options.for_tensorrt else ())],
        preprocess=preprocess,
        settings={
            "cls": CLS,
            "sep": SEP,
            "dot": DOT,
            "pad": PAD,
            "max_tokens": min(MAX_TOKENS, model.config.max_text_len),
            "score_rule": next(iter(frame.box_thresholds)),
            "box_thresholds": dict(frame.box_thresholds),
            "queries": model.config.num_queries,
            "sampling": sampling,
        },
        tokenizer=tokenizer,  # type: ignore[arg-type]
        weights=record,
    )


def build_official(variant: str) -> Detector:
    """A model in the official configuration of a variant, randomly initialized."""
    if variant not in OFFICIAL:
        return _build_mm(variant.partition("_")[2])
    backbone = transformers.SwinConfig(**OFFICIAL[variant], drop_path_rate=0.0, out_indices=[2, 3, 4])
    return GroundingDinoForObjectDetection(GroundingDinoConfig(backbone_config=backbone, text_config=transformers.BertConfig()))


def _build_mm(size: str) -> MMGroundingDinoForObjectDetection:
    levels = [1, 2, 3, 4] if size == "large" else [2, 3, 4]  # feature maps of the backbone; another one is made from the last
    backbone = transformers.SwinConfig(**MM_BACKBONES[size], drop_path_rate=0.0, out_indices=levels)
    config = MMGroundingDinoConfig(
        backbone_config=backbone,
        text_config=transformers.BertConfig(),
        num_feature_levels=len(levels) + 1,
        **mini.HEADS_OF_THEIR_OWN,
    )
    return MMGroundingDinoForObjectDetection(config)


# ---- the text graph ----


def text_graph(model: Detector) -> Graph:
    """Graph ``text``, see `TextGraph`. Reference: the official features of the phrase inside a longer caption."""
    return Graph(
        name="text",
        module=TextGraph(model),
        inputs=(TensorSpec("tokens", ("phrases", "length"), "int64"), TensorSpec("mask", ("phrases", "length"), "bool")),
        outputs=(TensorSpec("features", ("phrases", "length", model.config.d_model), "float32"),),
        axes={"phrases": AxisRange(1, 16, 64), "length": AxisRange(1, 8, MAX_TOKENS)},
        row_axis="phrases",
        sample=partial(_sample_phrases, model.config.text_config.vocab_size),
        reference=partial(_official_phrase, model),
        distinct=8,  # phrases, [CLS] and [SEP] among them
        tolerance={"features": TEXT_TOLERANCE},
        half=InHalf(io=frozenset({"features"}), tolerance={"features": HALF_TEXT_TOLERANCE}),
    )


def _sample_phrases(vocabulary: int, rows: int, seed: int) -> Feeds:
    rng = np.random.default_rng(seed)
    phrases = [_random_phrase(rng, vocabulary, most=5) for _ in range(rows)]
    for row, special in ((1, CLS), (2, SEP)):
        if row < rows:
            phrases[row] = [special]
    tokens, mask = np.full((rows, 6), PAD, np.int64), np.zeros((rows, 6), np.bool_)
    for row, phrase in enumerate(phrases):
        tokens[row, : len(phrase)], mask[row, : len(phrase)] = phrase, True
    return {"tokens": tokens, "mask": mask}


def _random_phrase(rng: np.random.Generator, vocabulary: int, *, most: int) -> list[int]:
    words = [identifier for identifier in range(ANY_WORD, vocabulary) if identifier not in (DOT, 1029)]
    return [*rng.choice(words, size=rng.integers(1, most + 1)).tolist(), DOT]


@torch.no_grad()
def _official_phrase(model: Detector, feeds: Feeds, outputs: Feeds) -> Feeds:
    """The official model's features of one phrase in the middle of a caption of three."""
    phrase = feeds["tokens"][0][feeds["mask"][0]].tolist()
    before, after = [ANY_WORD, ANY_WORD + 1, DOT], [ANY_WORD + 2, DOT]
    if phrase in ([CLS], [SEP]):
        caption = [CLS, *before, *after, SEP]
        at = 0 if phrase == [CLS] else len(caption) - 1
    else:
        caption = [CLS, *before, *phrase, *after, SEP]
        at = 1 + len(before)
    features = np.zeros_like(outputs["features"])
    features[0, : len(phrase)] = official_text_features(model, torch.tensor([caption]))[0, at : at + len(phrase)].numpy()
    return {"features": features}


def official_text_features(model: Detector, tokens: Tensor) -> Tensor:
    """(B, T, D) features of whole captions (B, T) int64, with transformers' mask and BERT."""
    from transformers.models.grounding_dino import modeling_grounding_dino as official

    mask, position = official.generate_masks_with_special_tokens_and_transfer_map(tokens, model.model.special_tokens)
    hidden = model.model.text_backbone(tokens, mask[:, None], torch.zeros_like(tokens), position).last_hidden_state
    features: Tensor = model.model.text_projection(hidden)
    return features


# ---- the image graphs ----


def image_graphs(
    model: Detector,
    canvases: Sequence[tuple[int, int]],
    batch: AxisRange,
    margin: Margin,
    sampling: Sampling,
    two_products: bool,
) -> list[Callable[[], Graph]]:
    """The `image_graph` of each canvas; several whose sides are multiples of Swin's patches share one trace."""
    patch = model.config.backbone_config.patch_size
    one = partial(image_graph, model, batch=batch, margin=margin, sampling=sampling, two_products=two_products)
    alone = [partial(one, canvas) for canvas in canvases]
    if len(canvases) == 1 or any(side % patch for canvas in canvases for side in canvas):
        return [*alone]
    lengths = partial(lengths_of, model)
    traced = tracing_canvas(lengths, other_numbers(model), start=TRACED_SIDE, multiple_of=patch)
    if traced is None:
        return [*alone]
    shared = canvas_template.Template(lengths, traced)

    def template_graph() -> Graph:
        def sample(rows: int, seed: int) -> Feeds:
            return _sample_photos(model, canvases[0], rows, seed) | {"pixels": np.zeros((rows, *traced, 3), np.uint8)}

        return replace(one(traced), sample=sample)  # only shapes count in tracing, and random photographs so large take minutes

    def make(canvas: tuple[int, int]) -> Graph:
        return replace(one(canvas), template=Template(shared=shared, canvas=canvas, graph=template_graph))

    return [partial(make, canvas) for canvas in canvases]


def image_graph(
    model: Detector,
    canvas: tuple[int, int],
    batch: AxisRange,
    margin: Margin = OFFICIAL_MARGIN,
    sampling: Sampling = "grid-sample",
    two_products: bool = False,
) -> Graph:
    """Graph ``image-HxW``, see `ImageGraph`. Reference: `official_detections`."""
    height, width = canvas
    queries, channels = model.config.num_queries, model.config.d_model
    return Graph(
        name=f"image-{height}x{width}",
        module=ImageGraph(model, canvas, margin, sampling, two_products),
        inputs=(
            TensorSpec("pixels", ("batch", height, width, 3), "uint8"),
            TensorSpec("size", ("batch", 2), "int64"),
            TensorSpec("text", ("batch", "tokens", channels), "float32"),
            TensorSpec("phrase", ("batch", "tokens"), "int64"),
            TensorSpec("position", ("batch", "tokens"), "int64"),
        ),
        outputs=(
            TensorSpec("logits", ("batch", queries, "tokens"), "float32"),
            TensorSpec("boxes", ("batch", queries, 4), "float32"),
            TensorSpec("query", ("batch", queries), "int64"),
        ),
        axes={"batch": batch, "tokens": AxisRange(4, 32, MAX_TOKENS)},
        row_axis="batch",
        sample=partial(_sample_photos, model, canvas),
        distinct=DISTINCT,
        reference=partial(official_detections, model, margin),
        tolerance={"logits": LOGITS_TOLERANCE, "boxes": BOXES_TOLERANCE},
        ties="query",
        half=InHalf(
            io=frozenset({"text"}),
            tolerance={"logits": HALF_LOGITS_TOLERANCE, "boxes": HALF_BOXES_TOLERANCE},
            reference=lambda scale: partial(official_detections, model, margin, tie=scale * HALF_TIE),
        ),
    )


def _sample_photos(model: Detector, canvas: tuple[int, int], rows: int, seed: int) -> Feeds:
    """Photos of different sizes with different captions, and noise outside the photo, which the graph must ignore.

    Row 1 fills the canvas. Of the others one side has an `edge_lengths` (or is the canvas's), the other a margin.
    """
    rng = np.random.default_rng(seed)
    captions = [
        [[CLS], *(_random_phrase(rng, model.config.text_config.vocab_size, most=3) for _ in range(2 + row % 3)), [SEP]]
        for row in range(rows)
    ]
    pixels = rng.integers(0, 256, (rows, *canvas, 3), dtype=np.uint8)
    size = np.zeros((rows, 2), np.int64)
    shapes = level_shapes(model.config, canvas)
    edges = [edge_lengths(canvas[axis], [shape[axis] for shape in shapes]) or [canvas[axis]] for axis in range(2)]
    for row in range(rows):
        size[row] = canvas if row == 1 else np.floor(np.array(canvas) * rng.uniform(0.6, 0.98))
        if row != 1:
            axis = row // 2 % 2
            size[row, axis] = edges[axis][(row // 4 + row % 2) % len(edges[axis])]
        height, width = size[row]
        pixels[row, :height, :width] = photograph(rng, int(height), int(width))
    return {"pixels": pixels, "size": size, **caption_feeds(captions, partial(_features, TextGraph(model).eval()))}


def edge_lengths(length: int, cells: Sequence[int]) -> list[int]:
    """Sides of a photograph, px, longest first, whose outer cells on some level have their centers at exactly 0.01 and 0.99.

    These are the limits of proposals (`graphs.EDGE`); the centers of 50, and of 150, cells lie on them.

    Args:
        length: the canvas's side, px. cells: its cells on each level.
    """
    return sorted({count * length // most for most in cells for count in (50, 150) if count <= most}, reverse=True)


def caption_feeds(captions: list[list[list[int]]], features: Callable[[list[int]], np.ndarray]) -> Feeds:
    """``text``, ``phrase`` and ``position`` of captions given as lists of sub-sentences ([CLS] and [SEP] among them).

    Args:
        features: (length, D) float32 of one sub-sentence's tokens.
    """
    length = max(sum(map(len, caption)) for caption in captions)
    phrase = np.full((len(captions), length), -1, np.int64)
    position = np.zeros_like(phrase)
    text: np.ndarray | None = None
    for row, caption in enumerate(captions):
        start = 0
        for number, tokens in enumerate(caption):
            stop = start + len(tokens)
            values = features(tokens)
            text = np.zeros((*phrase.shape, values.shape[1]), np.float32) if text is None else text
            text[row, start:stop], phrase[row, start:stop] = values, number
            position[row, start:stop] = np.arange(len(tokens))
            start = stop
    assert text is not None
    return {"text": text, "phrase": phrase, "position": position}


@torch.no_grad()
def _features(graph: TextGraph, tokens: list[int]) -> np.ndarray:
    features: np.ndarray = graph(torch.tensor([tokens]), torch.ones(1, len(tokens), dtype=torch.bool))[0].numpy()
    return features


@torch.no_grad()
def official_detections(model: Detector, margin: Margin, feeds: Feeds, outputs: Feeds, *, tie: float = TIE) -> Feeds:
    """Result of the official forward pass for one photo, with the queries that the graph chose.

    The caption is rebuilt with arbitrary words, because only its structure matters: the fed features replace BERT's.

    Args:
        margin: of ``inverse_sigmoid``, instead of transformers' values.
        tie: share of the largest score by which tied scores may differ.

    Raises:
        ParityError: the graph's queries are not the official top of the scores, near ties aside.
    """
    pixels, mask = official_pixels(feeds)
    tokens = caption_tokens(feeds["phrase"])
    text = torch.from_numpy(feeds["text"])
    scores: list[Tensor] = []

    def force_queries(_module: nn.Module, _inputs: object, logits: Tensor) -> Tensor | None:
        if scores:  # the second call, which is only for training, scores the chosen queries
            return None
        scores.append(logits.amax(-1))
        query = torch.from_numpy(outputs["query"])
        check_near_tie(scores[0][0], query[0], tie)
        ranks = torch.arange(query.shape[1], 0, -1, dtype=logits.dtype)[None]
        return torch.full_like(logits, -1.0).scatter(1, query[..., None], ranks[..., None])

    margins = [margin[0]]
    hooks = [
        model.model.register_forward_hook(lambda *_: margins.append(margin[1])),  # what follows are the last boxes
        model.model.text_projection.register_forward_hook(lambda *_: text),
        model.model.encoder_output_class_embed.register_forward_hook(force_queries),
    ]
    try:
        with mock.patch("torch.special.logit", lambda values, eps: inverse_sigmoid(values, margins[-1])):
            out = model(pixel_values=pixels, pixel_mask=mask, input_ids=tokens, attention_mask=(tokens != PAD).long())
    finally:
        for hook in hooks:
            hook.remove()
    logits = out.logits[..., : tokens.shape[1]]
    return {"logits": logits.numpy(), "boxes": out.pred_boxes.numpy(), "query": outputs["query"]}


def official_pixels(feeds: Feeds) -> tuple[Tensor, Tensor]:
    """The official processor's (1, 3, H, W) float32 pixels, normalized and then zero-padded, and (1, H, W) int64 mask."""
    height, width = feeds["size"][0]
    photo = torch.from_numpy(feeds["pixels"][:1, :height, :width]).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    _, whole_height, whole_width, _ = feeds["pixels"].shape
    pixels, mask = torch.zeros(1, 3, whole_height, whole_width), torch.zeros(1, whole_height, whole_width, dtype=torch.int64)
    pixels[:, :, :height, :width], mask[:, :height, :width] = (photo / 255 - mean) / std, 1
    return pixels, mask


def caption_tokens(phrase: np.ndarray) -> Tensor:
    """(1, T) int64, a caption with the sub-sentences numbered in ``phrase`` (1, T): arbitrary words, and each phrase's dot."""
    numbers = phrase[0].tolist()
    tokens = [ANY_WORD if number == following else DOT for number, following in zip(numbers, [*numbers[1:], -1], strict=True)]
    last = sum(number >= 0 for number in numbers) - 1
    tokens[0], tokens[last], tokens[last + 1 :] = CLS, SEP, [PAD] * (len(numbers) - last - 1)
    return torch.tensor([tokens])


def check_near_tie(scores: Tensor, query: Tensor, tie: float = TIE) -> None:
    """Raise ParityError unless ``query`` (Q,) are the cells of the Q highest ``scores`` (N,), except for near ties."""
    best = scores.topk(len(query)).values
    gap = float((scores[query] - best).abs().max())
    allowed = tie * float(best.abs().max())
    if len(query.unique()) != len(query) or not gap <= allowed:
        raise ParityError(
            f"output 'query': scores of the chosen cells differ by {gap:.3g} from the best, near ties by up to {allowed:.3g}"
        )


FAMILY = Family(
    name="grounding-dino",
    variants=(
        *OFFICIAL,
        *(f"{family}_{size}" for family in ("mm", "llmdet") for size in MM_BACKBONES),
        "mini",
        "mm_mini",
    ),
    default="swin_t",
    prepare=prepare,
    official=lambda variant: DEFAULT.get(variant, variant),
)
