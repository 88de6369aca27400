"""The graphs of SAM 3, with their feeds and official references."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Sam3ImageProcessor, Sam3Model
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput

from ...spec import AxisRange, TensorSpec
from ..family import DISTINCT, Feeds, Graph, InHalf, Tolerance
from ..verify import photograph
from .concept import Detector, Outline, Text
from .vision import TENSORS, Vision, grid_of

PHRASES = AxisRange(1, 16, 64)
"""Phrases per call of the text graph."""
ROWS = AxisRange(1, 4, 8)
"""Rows of an image and a phrase per call of the detector, whose attention over a full-size image takes 170 MB a row."""
OUTLINED = AxisRange(1, 2, 4)
"""Rows per call of the outline graph, each of which takes several maps of 85 MB."""
SLOTS = AxisRange(1, 8, 32)
"""Masks of a row per call."""
BOXES = AxisRange(1, 16, OUTLINED.max * SLOTS.max)
"""Masks per call."""
_ORDER = "float32 sums in another order"


# ---- text ----


def text_graph(official: Sam3Model) -> Graph:
    """Graph ``text``, see `Text`. Reference: ``get_text_features``."""
    config = official.config.text_config
    length, width = config.max_position_embeddings, official.text_projection.out_features

    def sample(rows: int, seed: int) -> Feeds:
        rng = np.random.default_rng(seed)
        tokens, mask = rng.integers(0, config.vocab_size, (rows, length)), _lengths(rng, rows, length)
        return {"tokens": np.where(mask, tokens, 0).astype(np.int64), "mask": mask}

    @torch.inference_mode()
    def reference(feeds: Feeds, _: Feeds) -> Feeds:
        tokens, mask = (torch.from_numpy(feeds[name]) for name in ("tokens", "mask"))
        features = official.get_text_features(input_ids=tokens, attention_mask=mask.long()).pooler_output
        return {"features": (features * mask[..., None]).numpy()}

    return Graph(
        name="text",
        module=Text(official),
        inputs=(TensorSpec("tokens", ("phrases", length), "int64"), TensorSpec("mask", ("phrases", length), "bool")),
        outputs=(TensorSpec("features", ("phrases", length, width), "float32"),),
        axes={"phrases": PHRASES},
        row_axis="phrases",
        sample=sample,
        distinct=8,
        reference=reference,
        tolerance={"features": Tolerance(relative=5e-5, why=f"{_ORDER} through 24 layers")},
        half=InHalf(
            io=frozenset({"features"}),
            tolerance={"features": Tolerance(relative=1e-2, why="rounding to 11 bits through 24 layers")},
        ),
    )


def _lengths(rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """Tokens that count, of phrases of 3 tokens to all: (rows, length) bool."""
    return np.arange(length) < rng.integers(3, length + 1, (rows, 1))


# ---- vision ----


def vision_graph(official: Sam3Model, batch: AxisRange) -> Graph:
    """Graph ``vision``, see `Vision`. Reference: ``Sam3ImageProcessor`` without resizing, ``get_vision_features``, and the first
    self-attention of ``Sam3DetrEncoder``."""
    side = official.config.vision_config.backbone_config.image_size
    normalize = Sam3ImageProcessor(do_resize=False)

    @torch.inference_mode()
    def reference(feeds: Feeds, _: Feeds) -> Feeds:
        pixels = normalize(torch.from_numpy(feeds["pixels"][0]).permute(2, 0, 1), return_tensors="pt").pixel_values
        found = official.get_vision_features(pixels)
        finest, finer, coarse = found.fpn_hidden_states[:3]
        cells, places = (maps.flatten(2).transpose(1, 2) for maps in (coarse, found.fpn_position_encoding[2]))
        layer = official.detr_encoder.layers[0]
        normed = layer.layer_norm1(cells)
        embedding = cells + layer.self_attn(normed + places, normed + places, normed)[0]
        return {name: each.numpy() for name, each in zip(TENSORS, (embedding, finer, finest), strict=True)}

    def sample(rows: int, seed: int) -> Feeds:
        rng = np.random.default_rng(seed)
        return {"pixels": np.stack([photograph(rng, side, side) for _ in range(rows)])}

    return Graph(
        name="vision",
        module=Vision(official),
        inputs=(TensorSpec("pixels", ("batch", side, side, 3), "uint8"),),
        outputs=tuple(TensorSpec(name, ("batch", *shape), "float32") for name, shape in shapes_of(official).items()),
        axes={"batch": batch},
        row_axis="batch",
        sample=sample,
        distinct=DISTINCT,
        reference=reference,
        tolerance=dict.fromkeys(TENSORS, Tolerance(relative=1e-4, why=f"{_ORDER} through 32 layers")),
        half=InHalf(
            io=frozenset(TENSORS),
            tolerance=dict.fromkeys(TENSORS, Tolerance(relative=2e-2, why="rounding to 11 bits through 32 layers")),
        ),
    )


def shapes_of(official: Sam3Model) -> dict[str, tuple[int, ...]]:
    """Shapes of `TENSORS` for one image."""
    grid, width = grid_of(official), official.config.vision_config.fpn_hidden_size
    return dict(zip(TENSORS, ((grid**2, width), (width, 2 * grid, 2 * grid), (width, 4 * grid, 4 * grid)), strict=True))


# ---- detector ----


def detector_graph(official: Sam3Model, images: AxisRange, rows: AxisRange = ROWS) -> Graph:
    """Graph ``detector``, see `Detector`. Reference: ``Sam3Model.forward``, which is given what the vision graph computes."""
    grid, length = grid_of(official), official.config.text_config.max_position_embeddings
    queries, width = official.config.detr_decoder_config.num_queries, official.config.detr_decoder_config.hidden_size

    def sample(count: int, seed: int) -> Feeds:
        rng = np.random.default_rng(seed)
        used = min(images.max, max(count - 1, 1))
        mask = _lengths(rng, count, length)
        text = rng.normal(size=(count, length, width)) * mask[..., None]
        return {
            "embedding": _smooth(rng, (used, width, grid, grid)).reshape(used, width, -1).transpose(0, 2, 1).copy(),
            "text": text.astype(np.float32),
            "mask": mask,
            "image": np.resize(rng.permutation(used), count).astype(np.int64),
        }

    def reference(feeds: Feeds, _: Feeds) -> Feeds:
        found = official_row(official, feeds)
        return {name: value.numpy() for name, value in found.items()}

    logits = {
        "logits": Tolerance(relative=2e-4, absolute=1e-3, why=f"{_ORDER} through 12 layers"),
        "presence": Tolerance(relative=math.inf, absolute=1e-3, why=f"{_ORDER}; one number, which may be 0"),
        "boxes": Tolerance(relative=1e-4, absolute=1e-3, why=_ORDER),
        "queries": Tolerance(relative=2e-4, why=_ORDER),
        "encoded": Tolerance(relative=1e-4, why=_ORDER),
    }
    return Graph(
        name="detector",
        module=Detector(official),
        inputs=(
            TensorSpec("embedding", ("images", grid**2, width), "float32"),
            TensorSpec("text", ("phrases", length, width), "float32"),
            TensorSpec("mask", ("phrases", length), "bool"),
            TensorSpec("image", ("phrases",), "int64"),
        ),
        outputs=(
            TensorSpec("logits", ("phrases", queries), "float32"),
            TensorSpec("presence", ("phrases",), "float32"),
            TensorSpec("boxes", ("phrases", queries, 4), "float32"),
            TensorSpec("queries", ("phrases", queries, width), "float32"),
            TensorSpec("encoded", ("phrases", grid**2, width), "float32"),
        ),
        axes={"images": images, "phrases": rows},
        row_axis="phrases",
        sample=sample,
        take=take_phrases,
        reference=reference,
        tolerance=logits,
        half=InHalf(
            io=frozenset({"embedding", "text", "queries", "encoded"}),
            tolerance={
                "logits": Tolerance(relative=0.01, measure=score_difference, why="scores change by 0.01 at most"),
                "presence": Tolerance(relative=0.01, measure=score_difference, why="probabilities change by 0.01 at most"),
                "boxes": Tolerance(relative=0.02, absolute=0.01, why="rounding to 11 bits through 12 layers"),
                "queries": Tolerance(relative=0.03, why="rounding to 11 bits through 12 layers"),
                "encoded": Tolerance(relative=0.01, why="rounding to 11 bits through 6 layers"),
            },
        ),
    )


def score_difference(got: Feeds, want: Feeds, name: str) -> tuple[float, float]:
    """Largest difference of the sigmoids; returned twice, as it has no unit."""
    scores, expected = (1 / (1 + np.exp(-each[name].astype(np.float64))) for each in (got, want))
    worst = float(np.abs(scores - expected).max(initial=0.0))
    return worst, worst


def _smooth(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Random maps (N, C, S, S) float32 that vary slowly, as a network's do, with some noise."""
    coarse = torch.from_numpy(rng.normal(size=(*shape[:2], 5, 5))).float()
    return (F.interpolate(coarse, shape[2:], mode="bilinear").numpy() + 0.3 * rng.normal(size=shape)).astype(np.float32)


def take_phrases(feeds: Feeds, rows: Sequence[int]) -> Feeds:
    """Select phrases, and only the images that they refer to."""
    used, image = np.unique(feeds["image"][list(rows)], return_inverse=True)
    phrases = {name: feeds[name][list(rows)] for name in ("text", "mask")}
    return {"embedding": feeds["embedding"][used], **phrases, "image": image.astype(np.int64)}


@torch.inference_mode()
def official_row(official: Sam3Model, feeds: Feeds) -> dict[str, Tensor]:
    """The outputs of `Detector` for one row, from ``Sam3Model.forward``."""
    grid = grid_of(official)
    coarse = torch.from_numpy(feeds["embedding"][feeds["image"]]).transpose(1, 2).unflatten(2, (grid, grid))
    finest, finer = (coarse.new_zeros(1, coarse.shape[1], side * grid, side * grid) for side in (4, 2))  # for masks only
    mask = torch.from_numpy(feeds["mask"])
    seen: dict[str, Tensor] = {}

    def hide_first_attention(_: Any, inputs: object, output: tuple[Tensor, object]) -> tuple[Tensor, object]:
        return torch.zeros_like(output[0]), output[1]  # the features have been through it

    def see_queries(_: Any, inputs: object, output: Tensor) -> None:
        seen["queries"] = output

    def see_encoded(_: Any, inputs: tuple[list[Tensor]]) -> None:
        seen["encoded"] = inputs[0][-1].flatten(2).transpose(1, 2)

    hooks = [
        official.detr_encoder.layers[0].self_attn.register_forward_hook(hide_first_attention),
        official.mask_decoder.mask_embedder.register_forward_hook(see_queries),
        official.mask_decoder.pixel_decoder.register_forward_pre_hook(see_encoded),
    ]
    try:
        found = official(
            vision_embeds=vision_of(official, (finest, finer, coarse)),
            text_embeds=BaseModelOutputWithPooling(pooler_output=torch.from_numpy(feeds["text"])),
            attention_mask=mask.long(),
        )
    finally:
        for hook in hooks:
            hook.remove()
    return {
        "logits": found.pred_logits,
        "presence": found.presence_logits[:, 0],
        "boxes": found.pred_boxes,
        **seen,
    }


def vision_of(official: Sam3Model, maps: Sequence[Tensor]) -> Sam3VisionEncoderOutput:
    """Maps of four, two and one pixels a cell, as ``get_vision_features`` returns them."""
    encode = official.vision_encoder.neck.position_encoding
    places = tuple(encode(each.shape, each.device, each.dtype) for each in maps)
    return Sam3VisionEncoderOutput(fpn_hidden_states=(*maps, maps[-1]), fpn_position_encoding=(*places, places[-1]))


# ---- outline ----


def outline_graph(official: Sam3Model, images: AxisRange, rows: AxisRange = ROWS) -> Graph:
    """Graph ``outline``, see `Outline`. Reference: ``Sam3PixelDecoder`` and the product of ``Sam3MaskDecoder`` for one mask."""
    grid, shapes = grid_of(official), shapes_of(official)
    queries, width = official.config.detr_decoder_config.num_queries, official.config.detr_decoder_config.hidden_size
    masks = official.mask_decoder

    def sample(count: int, seed: int) -> Feeds:
        rng = np.random.default_rng(seed)
        used = min(images.max, 2)
        some = min(rows.max, 3)
        outlined = min(some, OUTLINED.max)
        slots = min(-(-count // outlined) + 1, SLOTS.max)
        row = rng.permutation(some)[:outlined].astype(np.int64)
        query = np.stack([each * queries + rng.permutation(queries)[np.arange(slots) % queries] for each in row])
        return {
            "encoded": _smooth(rng, (some, width, grid, grid)).reshape(some, width, -1).transpose(0, 2, 1).copy(),
            "queries": rng.normal(size=(some, queries, width)).astype(np.float32),
            **{name: _smooth(rng, (used, *shapes[name])) for name in TENSORS[1:]},
            "row": row,
            "image": (row % used).astype(np.int64),
            "query": query.astype(np.int64),
            "pick": np.resize(rng.permutation(outlined * slots), count).astype(np.int64),
        }

    @torch.inference_mode()
    def reference(feeds: Feeds, _: Feeds) -> Feeds:
        (row, slot), image = divmod(int(feeds["pick"][0]), feeds["query"].shape[1]), int(feeds["image"][0])
        assert row == 0
        encoded = torch.from_numpy(feeds["encoded"][feeds["row"]]).transpose(1, 2).unflatten(2, (grid, grid))
        finer, finest = (torch.from_numpy(feeds[name][image : image + 1]) for name in TENSORS[1:])
        pixels = masks.instance_projection(masks.pixel_decoder([finest, finer, encoded]))
        query = torch.from_numpy(feeds["queries"]).flatten(0, 1)[int(feeds["query"][0, slot])]
        return {"logits": torch.einsum("c,bchw->bhw", query, pixels).numpy()}

    return Graph(
        name="outline",
        module=Outline(official),
        inputs=(
            TensorSpec("encoded", ("phrases", grid**2, width), "float32"),
            TensorSpec("queries", ("phrases", queries, width), "float32"),
            *(TensorSpec(name, ("images", *shapes[name]), "float32") for name in TENSORS[1:]),
            TensorSpec("row", ("outlined",), "int64"),
            TensorSpec("image", ("outlined",), "int64"),
            TensorSpec("query", ("outlined", "slots"), "int64"),
            TensorSpec("pick", ("boxes",), "int64"),
        ),
        outputs=(TensorSpec("logits", ("boxes", 4 * grid, 4 * grid), "float32"),),
        axes={"images": images, "phrases": rows, "outlined": OUTLINED, "slots": SLOTS, "boxes": BOXES},
        row_axis="boxes",
        sample=sample,
        take=take_masks,
        distinct=2 * OUTLINED.max + 1,
        reference=reference,
        tolerance={"logits": Tolerance(relative=1e-4, why=_ORDER)},
        half=InHalf(
            io=frozenset({"encoded", "queries", *TENSORS[1:], "logits"}),
            tolerance={"logits": Tolerance(relative=1e-2, why="rounding to 11 bits through two convolutions")},
        ),
    )


def take_masks(feeds: Feeds, rows: Sequence[int]) -> Feeds:
    """Select masks, and only the rows and the images that they need."""
    slots = feeds["query"].shape[1]
    of, slot = np.divmod(feeds["pick"][list(rows)], slots)
    outlined, of = np.unique(of, return_inverse=True)
    queries = feeds["queries"].shape[1]
    row, new_row = np.unique(feeds["row"][outlined], return_inverse=True)
    image, new_image = np.unique(feeds["image"][outlined], return_inverse=True)
    query = feeds["query"][outlined] % queries + queries * new_row[:, None]
    return {
        **{name: feeds[name][row] for name in ("encoded", "queries")},
        **{name: feeds[name][image] for name in TENSORS[1:]},
        "row": new_row.astype(np.int64),
        "image": new_image.astype(np.int64),
        "query": query.astype(np.int64),
        "pick": (of * slots + slot).astype(np.int64),
    }
