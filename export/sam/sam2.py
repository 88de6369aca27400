"""SAM 2.1 (arXiv:2408.00714) on images, from transformers' ``Sam2Model``: other graphs for the same role in the chain.

It differs from SAM in three ways. The encoder passes three tensors to the decoder. Photographs are resized to a square without
keeping their aspect ratio, so that there is no padding, and mask logits are resized to the photograph in one step. Where the
mask of the first token is not stable, the decoder returns the best of three others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from segment_anything.modeling.transformer import TwoWayTransformer
from torch import Tensor, nn
from transformers import Sam2Config, Sam2ImageProcessor, Sam2Model

from ...errors import WeightsError
from ...spec import AxisRange, Preprocess, TensorSpec
from ..family import DISTINCT, Feeds, Graph, InHalf, Options, Prepared, Tolerance
from ..precision.lowering import Fp32
from ..resize import resize_graphs
from ..rewrites import MEAN, STD
from ..verify import photograph
from ..weights import Download, find_weights, load_exactly, random_seed, read_checkpoint, spread, weights_record
from . import fuse
from .decoder import (
    BOXES,
    CHOSEN,
    COUNTS,
    HALF_TIE,
    IMAGES,
    MASKS,
    MULTIMASK,
    STABILITY,
    TIE,
    CornerWaves,
    Upscale,
    best_of,
    chosen_mask,
    images_per_call,
    in_pixels,
    sample_boxes,
    stability,
    stability_range,
    take_boxes,
)
from .hiera import TENSORS, Hiera, in_cells
from .two_way import TwoWay

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "sam2.1_tiny": {},
    "sam2.1_small": {"blocks_per_stage": [1, 2, 11, 2], "global_attention_blocks": [7, 10, 13]},
    "sam2.1_base_plus": {
        "hidden_size": 112,
        "embed_dim_per_stage": [112, 224, 448, 896],
        "num_attention_heads_per_stage": [2, 4, 8, 16],
        "blocks_per_stage": [2, 3, 16, 3],
        "global_attention_blocks": [12, 16, 20],
        "window_positional_embedding_background_size": [14, 14],
    },
    "sam2.1_large": {
        "hidden_size": 144,
        "embed_dim_per_stage": [144, 288, 576, 1152],
        "num_attention_heads_per_stage": [2, 4, 8, 16],
        "blocks_per_stage": [2, 6, 36, 4],
        "window_size_per_stage": [8, 4, 16, 8],
        "global_attention_blocks": [23, 33, 43],
    },
    "sam2.1_mini": {
        "hidden_size": 16,
        "embed_dim_per_stage": [16, 32, 64, 128],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "blocks_per_stage": [1, 1, 2, 1],
        "window_size_per_stage": [8, 4, 6, 3],
        "global_attention_blocks": [3],
    },
}
"""Settings of Hiera (``Sam2HieraDetConfig``) that are not those of ``tiny``, from sam2/configs/sam2.1/*.yaml. The last one is
for tests, and has random weights only."""
SIDES = {"sam2.1_mini": 128}
"""Pixels of the canvas's side, if not 1024."""
WIDTHS = {"sam2.1_mini": 64}
"""Channels of the embedding, if not 256."""
BATCHES = {"sam2.1_base_plus": AxisRange(1, 2, 4), "sam2.1_large": AxisRange(1, 2, 4)}
"""Images per encoder call, if not 1 to 8."""

_URL = "https://dl.fbaipublicfiles.com/segment_anything_2/092824/"
# sha256 as in micro-sam (micro_sam/v2/util.py), among others.
DOWNLOADS = {
    "sam2.1_tiny": Download(_URL + "sam2.1_hiera_tiny.pt", "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69"),
    "sam2.1_small": Download(_URL + "sam2.1_hiera_small.pt", "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38"),
    "sam2.1_base_plus": Download(
        _URL + "sam2.1_hiera_base_plus.pt", "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5"
    ),
    "sam2.1_large": Download(_URL + "sam2.1_hiera_large.pt", "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318"),
}


def prepare(variant: str, weights: str, options: Options) -> Prepared:
    """SAM 2.1 ready to be traced.

    Args:
        variant: one of `VARIANTS`.
        weights: an official ``.pt``, a safetensors file of ``facebook/sam2.1-hiera-*`` or its folder, the name of a variant
            (downloaded) or ``random:SEED``.
        options: ``batch`` is the range of images per encoder call.

    Raises:
        WeightsError: a checkpoint that is missing, damaged or of another variant.
    """
    model, record = load(variant, weights)
    batch = options.batch or BATCHES.get(variant, AxisRange(1, 4, 8))
    side, grid = model.prompt_encoder.input_image_size, model.prompt_encoder.image_embedding_size[0]
    preprocess = Preprocess(
        resize="squash",
        longest_px=side,
        filter="bilinear",
        canvases=((side, side),),
        mean=MEAN,
        std=STD,
        source="sam2/utils/transforms.py (SAM2Transforms), transformers image_processing_sam2.py",
    )
    return Prepared(
        variant=variant,
        graphs=(
            partial(encoder_graph, model, batch),
            partial(decoder_graph, model, images_per_call(batch)),
            partial(fuse.fuse_graph, preprocess, logits_side=4 * grid, masks=MASKS),
            *(resize_graphs(preprocess) if options.for_tensorrt else ()),
        ),
        preprocess=preprocess,
        settings={"logits_side": 4 * grid},
        weights=record,
    )


# ---- weights ----


def build(variant: str) -> Sam2Model:
    """The official class in eval mode, with transformers' initial weights."""
    hiera = {"model_type": "sam2_hiera_det_model", **VARIANTS[variant]}
    side, width = SIDES.get(variant, 1024), WIDTHS.get(variant, 256)
    channels = hiera.get("embed_dim_per_stage", [96, 192, 384, 768])
    config = Sam2Config(
        vision_config={
            "backbone_config": hiera,
            "backbone_channel_list": channels[::-1],
            "backbone_feature_sizes": [[side // stride] * 2 for stride in (4, 8, 16)],
            "fpn_hidden_size": width,
        },
        prompt_encoder_config={"hidden_size": width, "image_size": side},
        mask_decoder_config={"hidden_size": width, "mlp_dim": 8 * width, "iou_head_hidden_dim": width},
    )
    return Sam2Model(config).eval().requires_grad_(False)


def load(variant: str, weights: str) -> tuple[Sam2Model, dict[str, str]]:
    """Load the official module in eval mode, with the `weights_record` for the manifest. Raises WeightsError."""
    seed = random_seed(weights)
    if seed is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build(variant)
            for module in model.modules():  # transformers' initial weights are so small that all logits are about 0
                if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                    module.reset_parameters()
        spread(model, seed)
        _sharpen(model)
        return model, weights_record(weights, None, model)
    path = find_weights(weights, DOWNLOADS, model="sam")
    state = image_part(read_checkpoint(path))
    with torch.device("meta"):
        model = build(variant)
    actual = variant_of(state)
    if actual not in (None, variant):
        raise WeightsError(f"{path}: expected SAM {variant}, the file holds SAM {actual}", hint=f"--variant {actual}")
    load_exactly(model, state, path=path, what=f"SAM {variant}", assign=True)
    return model, weights_record(weights, path, model)


SHARPER = 16.0
"""Factor of the last layers of seeded weights. Trained logits reach 20; without it those of the first mask are all so near 0 that
no mask is stable, and the best of the others is the same for all boxes."""


@torch.no_grad()
def _sharpen(model: Sam2Model) -> None:
    heads = (*model.mask_decoder.output_hypernetworks_mlps, model.mask_decoder.iou_prediction_head)
    for head in heads:
        head.proj_out.weight.mul_(SHARPER)


def variant_of(state: Mapping[str, Tensor]) -> str | None:
    """The variant with the width and depth of a state dict; None for no known variant."""
    table = state.get("vision_encoder.backbone.pos_embed")
    if table is None or table.ndim != 4:
        return None
    depth = len({name.split(".")[3] for name in state if name.startswith("vision_encoder.backbone.blocks.")})
    known = {
        (each.get("hidden_size", 96), sum(each.get("blocks_per_stage", [1, 2, 7, 2]))): name for name, each in VARIANTS.items()
    }
    return known.get((table.shape[1], depth))


RENAMED = (
    (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
    (r"^image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
    (
        r"^sam_prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix",
        "prompt_encoder.shared_embedding.positional_embedding",
    ),
    (r"^sam_(prompt_encoder|mask_decoder)\.", r"\1."),
    (r"^no_mem_embed$", "no_memory_embedding"),
    (r"patch_embed\.proj\.", "patch_embed.projection."),
    (r"\.mlp\.layers\.0\.", ".mlp.proj_in."),
    (r"\.mlp\.layers\.1\.", ".mlp.proj_out."),
    (r"(mlps\.\d|_head)\.layers\.0\.", r"\1.proj_in."),
    (r"(mlps\.\d|_head)\.layers\.1\.", r"\1.layers.0."),
    (r"(mlps\.\d|_head)\.layers\.2\.", r"\1.proj_out."),
    (r"\.norm(\d|_final_attn)\.", r".layer_norm\1."),
    (r"\.out_proj\.", ".o_proj."),
    (r"output_upscaling\.0\.", "upscale_conv1."),
    (r"output_upscaling\.1\.", "upscale_layer_norm."),
    (r"output_upscaling\.3\.", "upscale_conv2."),
    (r"mask_downscaling\.0\.", "mask_embed.conv1."),
    (r"mask_downscaling\.1\.", "mask_embed.layer_norm1."),
    (r"mask_downscaling\.3\.", "mask_embed.conv2."),
    (r"mask_downscaling\.4\.", "mask_embed.layer_norm2."),
    (r"mask_downscaling\.6\.", "mask_embed.conv3."),
)
"""Names in facebookresearch/sam2 that are others in transformers."""
VIDEO = re.compile(
    r"^(memory_attention|memory_encoder|mask_downsample|obj_ptr_proj|obj_ptr_tpos_proj)\."
    r"|^(maskmem_tpos_enc|no_mem_pos_enc|no_obj_ptr|no_obj_embed_spatial)$"
)
"""Parts of facebookresearch/sam2 that only videos need."""
FREQUENCIES = ("prompt_encoder.shared_embedding.positional_embedding", "shared_image_embedding.positional_embedding")
"""One matrix, of which facebookresearch/sam2 has one copy, and files of transformers one or two."""


def image_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``Sam2Model`` in a checkpoint of facebookresearch/sam2 or of transformers, without those for videos."""
    if any(name.startswith("image_encoder.trunk.") for name in state):
        state = _renamed({name: value for name, value in state.items() if not VIDEO.search(name)})
    ignored = re.compile("|".join(Sam2Model._keys_to_ignore_on_load_unexpected))
    image = {name: value for name, value in state.items() if not ignored.search(name)}
    for name, other in (FREQUENCIES, FREQUENCIES[::-1]):
        if other in image:
            image.setdefault(name, image[other])
    return image


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        for old, new in RENAMED:
            name = re.sub(old, new, name)
        renamed[name] = value
    points = [f"prompt_encoder.point_embeddings.{number}.weight" for number in range(4)]
    if all(name in renamed for name in points):
        renamed["prompt_encoder.point_embed.weight"] = torch.cat([renamed.pop(name) for name in points])
    return renamed


# ---- modules ----


class Decoder(nn.Module):
    """`hiera.TENSORS` of I images, boxes (N, 4), each box's image (N,) and `MULTIMASK` (N,) to logits (N, L, L), predicted IoU
    (N,), which of the four masks was taken (N,), and its stability score (N,).

    ``Sam2PromptEncoder`` and ``Sam2MaskDecoder`` for boxes of several images, with the transformer of SAM's decoder (`TwoWay`).
    """

    tokens: Tensor
    corners: Tensor
    padding: Tensor
    no_mask: Tensor
    places: Tensor

    def __init__(self, official: Sam2Model) -> None:
        super().__init__()
        prompt, decoder = official.prompt_encoder, official.mask_decoder
        self.transformer = TwoWay(as_sam(decoder))
        activation = decoder.activation
        self.upscale = Upscale(
            nn.Sequential(decoder.upscale_conv1, decoder.upscale_layer_norm, activation, decoder.upscale_conv2, activation)
        )
        self.mask_heads, self.quality_head = decoder.output_hypernetworks_mlps, decoder.iou_prediction_head
        waves = CornerWaves(prompt.shared_embedding.positional_embedding, prompt.input_image_size)
        self.waves = Fp32(waves, why="large phases: half precision has no digits left for the fraction of a turn")
        self.least = decoder.dynamic_multimask_stability_thresh
        self.first_stability = Fp32(partial(stability, delta=decoder.dynamic_multimask_stability_delta), why=COUNTS)
        self.stability = Fp32(stability, why=COUNTS)
        self.register_buffer("corners", prompt.point_embed.weight[2:4])
        self.register_buffer("padding", prompt.not_a_point_embed.weight)  # follows the corners, as in the original code
        self.register_buffer(
            "tokens", torch.cat([decoder.obj_score_token.weight, decoder.iou_token.weight, decoder.mask_tokens.weight])
        )
        self.register_buffer("no_mask", prompt.no_mask_embed.weight)
        self.register_buffer("places", official.get_image_wide_positional_embeddings().flatten(2).transpose(1, 2))  # (1, G^2, D)

    def forward(
        self,
        embedding: Tensor,
        features_8: Tensor,
        features_4: Tensor,
        boxes: Tensor,
        image: Tensor,
        multimask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = boxes.shape[0]
        prompt = self.waves(boxes) + self.corners  # (N, 2, D)
        tokens = torch.cat([self.tokens.expand(rows, -1, -1), prompt, self.padding.expand(rows, 1, -1)], dim=1)
        hidden, cells = self.transformer(embedding + self.no_mask, self.places, tokens, image)
        weights = torch.stack([head(hidden[:, 2 + number]) for number, head in enumerate(self.mask_heads)], dim=1)
        finer = features_8.index_select(0, image), features_4.index_select(0, image)
        logits = weights @ self.upscale.channels(cells, finer).transpose(1, 2)  # (N, 4, L^2)
        quality = self.quality_head(hidden[:, 1])  # (N, 4)
        first = self.first_stability(logits[:, 0]) >= self.least
        if multimask is not None:
            first = first & ~multimask
        token = torch.where(first, 0, 1 + quality[:, 1:].argmax(dim=1))
        taken = torch.arange(rows, device=token.device) * weights.shape[1] + token
        logits = logits.flatten(0, 1).index_select(0, taken)  # (N, L^2)
        return in_pixels(logits), quality.flatten().index_select(0, taken), token, self.stability(logits)


def as_sam(decoder: nn.Module) -> TwoWayTransformer:
    """The transformer of a ``Sam2MaskDecoder`` in segment_anything's class, which is the same; parameters are shared."""
    config, official = decoder.config, decoder.transformer
    with torch.device("meta"):
        same = TwoWayTransformer(
            depth=config.num_hidden_layers,
            embedding_dim=config.hidden_size,
            num_heads=config.num_attention_heads,
            mlp_dim=config.mlp_dim,
            attention_downsample_rate=config.attention_downsample_rate,
        )
    names = {"layer_norm": "norm", "proj_in": "lin1", "proj_out": "lin2", "o_proj": "out_proj"}
    state = {re.sub("|".join(names), lambda found: names[found[0]], name): value for name, value in official.state_dict().items()}
    same.load_state_dict(state, assign=True)
    return same.eval().requires_grad_(False)


# ---- graphs ----


def encoder_graph(official: Sam2Model, batch: AxisRange) -> Graph:
    """Graph ``encoder``, see `Hiera`. Reference: ``Sam2ImageProcessor`` without resizing and ``get_image_embeddings``."""
    side = official.prompt_encoder.input_image_size
    shapes = shapes_of(official)
    normalize = Sam2ImageProcessor(do_resize=False)

    @torch.inference_mode()
    def reference(feeds: Feeds, _: Feeds) -> Feeds:
        pixels = normalize(torch.from_numpy(feeds["pixels"][0]).permute(2, 0, 1), return_tensors="pt").pixel_values
        fine, half, embedding = (maps.permute(0, 2, 3, 1) for maps in official.get_image_embeddings(pixels))
        grid = embedding.shape[1]
        maps = (embedding.flatten(1, 2), in_cells(half, grid), in_cells(fine, grid))
        return {name: each.numpy() for name, each in zip(TENSORS, maps, strict=True)}

    def sample(rows: int, seed: int) -> Feeds:
        rng = np.random.default_rng(seed)
        return {"pixels": np.stack([photograph(rng, side, side) for _ in range(rows)])}

    why = "float32 sums in another order through up to 48 blocks"
    half = "rounding to 11 bits through up to 48 blocks"
    return Graph(
        name="encoder",
        module=Hiera(official),
        inputs=(TensorSpec("pixels", ("batch", side, side, 3), "uint8"),),
        outputs=tuple(TensorSpec(name, ("batch", *shape), "float32") for name, shape in shapes.items()),
        axes={"batch": batch},
        row_axis="batch",
        sample=sample,
        distinct=DISTINCT,
        reference=reference,
        tolerance=dict.fromkeys(TENSORS, Tolerance(relative=1e-4, why=why)),
        half=InHalf(io=frozenset(TENSORS), tolerance=dict.fromkeys(TENSORS, Tolerance(relative=1e-2, why=half))),
    )


def shapes_of(official: Sam2Model) -> dict[str, tuple[int, ...]]:
    """Shapes of `TENSORS` for one image."""
    width, grid = official.hidden_dim, official.prompt_encoder.image_embedding_size[0]
    return dict(zip(TENSORS, ((grid**2, width), (grid**2, 4, width // 4), (grid**2, 16, width // 8)), strict=True))


def decoder_graph(official: Sam2Model, images: AxisRange, boxes: AxisRange = BOXES) -> Graph:
    """Graph ``decoder``, see `Decoder`. Reference: ``Sam2PromptEncoder`` and ``Sam2MaskDecoder``, one box at a time."""
    side, grid, width = (
        official.prompt_encoder.input_image_size,
        official.prompt_encoder.image_embedding_size[0],
        official.hidden_dim,
    )
    maps = {
        name: (width // share, size * grid, size * grid) for name, share, size in zip(TENSORS, (1, 4, 8), (1, 2, 4), strict=True)
    }

    def sample(rows: int, seed: int) -> Feeds:
        feeds = sample_boxes(side, maps, images.max, rows, seed)
        count = len(feeds["embedding"])
        # Only strong features give stable masks; every other one of them, by strength, has `MULTIMASK`.
        rank = np.random.default_rng(seed).permutation(count)
        contrast = np.exp(np.linspace(-1, 1.5, count))[rank]
        feeds["multimask"] = (count - rank[feeds["image"]]) % 2 == 0
        for name in TENSORS:
            scale = contrast if name != "embedding" else np.ones(count)
            values = feeds[name] * scale[:, None, None, None].astype(np.float32)
            cells = in_cells(torch.from_numpy(values).permute(0, 2, 3, 1), grid)
            feeds[name] = (cells[:, :, 0] if name == "embedding" else cells).contiguous().numpy()
        return feeds

    why = "float32 sums in another order"
    return Graph(
        name="decoder",
        module=Decoder(official),
        inputs=(
            *(TensorSpec(name, ("images", *shape), "float32") for name, shape in shapes_of(official).items()),
            TensorSpec("boxes", ("boxes", 4), "float32"),
            TensorSpec("image", ("boxes",), "int64"),
            MULTIMASK,
        ),
        outputs=(
            TensorSpec("logits", ("boxes", 4 * grid, 4 * grid), "float32"),
            TensorSpec("quality", ("boxes",), "float32"),
            *CHOSEN,
        ),
        axes={"images": images, "boxes": boxes},
        row_axis="boxes",
        sample=sample,
        reference=partial(official_mask, official, TIE),
        take=take_boxes,
        distinct=IMAGES + 1,  # boxes, of so many images less one
        tolerance={
            "logits": Tolerance(relative=1e-4, why=why),
            "quality": Tolerance(relative=math.inf, absolute=5e-5, why=f"{why}; one number in 0..1, which may be 0"),
            "stability": STABILITY,
        },
        ties="token",
        half=InHalf(
            io=frozenset({*TENSORS, "logits"}),
            tolerance={
                "logits": Tolerance(
                    relative=1e-2, why="rounding to 11 bits through two layers of attention; masks move by < 0.5 %"
                ),
                "quality": Tolerance(relative=math.inf, absolute=1e-2, why="predicted IoU, ranks masks"),
                "stability": STABILITY,
            },
            reference=lambda scale: partial(official_mask, official, scale * HALF_TIE),
        ),
    )


@torch.inference_mode()
def official_mask(official: Sam2Model, tie: float, feeds: Feeds, outputs: Feeds) -> Feeds:
    """The official mask of one box. Of masks that are as good within rounding, it takes the graph's.

    Args:
        tie: share of the largest logit, and of the predicted IoU's range, by which values may differ.

    Raises:
        ParityError: the graph took a mask that the official rule does not, near ties aside.
    """
    decoder = official.mask_decoder
    maps = [maps_of(feeds[name][feeds["image"]]) for name in TENSORS]
    sparse, dense = official.prompt_encoder(None, None, torch.from_numpy(feeds["boxes"])[None], None)
    rule, seen = decoder._dynamic_multimask_via_stability, []

    def spied(logits: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((logits[0, 0], quality[0, 0]))
        return rule(logits, quality)

    with mock.patch.object(decoder, "_dynamic_multimask_via_stability", spied):
        decoder(
            image_embeddings=maps[0],
            image_positional_embeddings=official.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
            high_resolution_features=[maps[2], maps[1]],
        )
    logits, quality = seen[0]
    multimask = "multimask" in feeds and bool(feeds["multimask"][0])
    allowed = best_of(quality, tie) if multimask else right_tokens(decoder, logits, quality, tie)
    return chosen_mask(logits, quality, allowed, tie, outputs)


def right_tokens(decoder: nn.Module, logits: Tensor, quality: Tensor, tie: float) -> list[int]:
    """The masks that the official rule takes of logits (4, L, L) and predicted IoUs (4,), each of which may be off by ``tie``."""
    worst, best = stability_range(logits[0], tie, decoder.dynamic_multimask_stability_delta)
    least = decoder.dynamic_multimask_stability_thresh
    return [0] * (best >= least) + best_of(quality, tie) * (worst < least)


def maps_of(cells: np.ndarray) -> Tensor:
    """(1, G^2, D) or (1, G^2, pixels, C) in the order of cells to maps (1, C, S, S)."""
    grid, pixels = math.isqrt(cells.shape[1]), cells.shape[2] if cells.ndim == 4 else 1
    halvings = [2] * ((pixels.bit_length() - 1) // 2)
    split = torch.from_numpy(cells).reshape(grid, grid, *(side for side in halvings for _ in range(2)), -1)
    levels = range(1 + len(halvings))
    rows, columns = [2 * level for level in levels], [2 * level + 1 for level in levels]
    side = grid * 2 ** len(halvings)
    return split.permute(-1, *rows, *columns).reshape(1, -1, side, side)
