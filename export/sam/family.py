"""SAM (arXiv:2304.02643) from the segment_anything package, and by variant SAM 2.1 (`sam2`): image encoder, box decoder and the
fusing graph.

The host only resizes the pixels: normalizing, zeroing the padding and gathering each box's image embedding are part of the
graphs. Boxes of different images share a decoder call, which the official decoder does not support.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from segment_anything import build_sam_vit_b, build_sam_vit_h, build_sam_vit_l
from segment_anything.modeling import Sam
from torch import Tensor, nn

from ...errors import UsageError, WeightsError
from ...spec import AxisRange, Preprocess, TensorSpec
from ..family import DISTINCT, Family, Feeds, Graph, InHalf, Options, Prepared, Tolerance
from ..mini import build_sam_mini
from ..precision.lowering import Fp32
from ..resize import resize_graphs
from ..rewrites import MEAN, STD, SamBlock, normalize_in_fp32, normalized, with_channel_norms
from ..verify import padded_photographs
from ..weights import Download, find_weights, load_exactly, random_seed, read_checkpoint, spread, weights_record
from . import fuse, sam2
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
    cells_of,
    chosen_mask,
    images_per_call,
    sample_boxes,
    stability,
    take_boxes,
)
from .two_way import TwoWay

BUILDERS: Mapping[str, Callable[[], Sam]] = {
    "vit_b": build_sam_vit_b,
    "vit_l": build_sam_vit_l,
    "vit_h": build_sam_vit_h,
    "mini": build_sam_mini,
}
BATCHES = {
    "vit_b": AxisRange(1, 4, 8),
    "vit_l": AxisRange(1, 2, 4),
    "vit_h": AxisRange(1, 2, 4),
    "mini": AxisRange(1, 8, 16),
}
"""Images per encoder call."""
_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
# The hex digits in the file names are MD5; these sha256 are published by micro-sam (models/pretrained), among others.
DOWNLOADS = {
    "vit_b": Download(_URL + "sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"),
    "vit_l": Download(_URL + "sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"),
    "vit_h": Download(_URL + "sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"),
}


def prepare(variant: str, weights: str, options: Options) -> Prepared:
    """SAM ready to be traced.

    Args:
        variant: ``vit_b``, ``vit_l``, ``vit_h`` or ``mini``, or one of `sam2.VARIANTS`.
        weights: an official ``.pth``, a safetensors file of the same names, the name of a variant (downloaded), ``mini``
            (inside the package) or ``random:SEED``.
        options: ``batch`` is the range of images per encoder call.

    Raises:
        UsageError: an unknown variant, or sizes, which SAM does not support.
        WeightsError: a checkpoint that is missing, damaged or of another variant.
    """
    if variant not in FAMILY.variants:
        raise UsageError(f"--variant: expected one of {', '.join(FAMILY.variants)}, got {variant!r}")
    if options.sizes:
        raise UsageError("--size: SAM has one fixed input size and takes no others", hint="leave --size out")
    if variant in sam2.VARIANTS:
        return sam2.prepare(variant, weights, options)
    sam, record = load(variant, weights)
    batch = options.batch or BATCHES[variant]
    return prepared_from(sam, variant=variant, weights=record, batch=batch, for_tensorrt=options.for_tensorrt)


def prepared_from(
    sam: Sam,
    *,
    variant: str,
    weights: Mapping[str, str],
    batch: AxisRange,
    boxes: AxisRange = BOXES,
    for_tensorrt: bool = False,
) -> Prepared:
    """The graphs, preprocessing and settings of a loaded SAM of any size; ``weights`` is `weights_record`.

    Args:
        for_tensorrt: attention of one width (`SamBlock`), and the graphs that resize photographs on a GPU.
    """
    side, logits_side = sam.image_encoder.img_size, 4 * sam.prompt_encoder.image_embedding_size[0]
    preprocess = Preprocess(
        resize="longest",
        longest_px=side,
        filter="bilinear",
        canvases=((side, side),),
        mean=_three(sam.pixel_mean),
        std=_three(sam.pixel_std),
        source="segment_anything build_sam.py and utils/transforms.py (ResizeLongestSide.apply_image)",
    )
    return Prepared(
        variant=variant,
        graphs=(
            partial(encoder_graph, sam, batch, one_width=for_tensorrt),
            partial(decoder_graph, sam, images_per_call(batch), boxes),
            partial(fuse.fuse_graph, preprocess, logits_side=logits_side, masks=MASKS),
            *(resize_graphs(preprocess) if for_tensorrt else ()),
        ),
        preprocess=preprocess,
        settings={"logits_side": logits_side},
        weights=weights,
    )


def load(variant: str, weights: str) -> tuple[Sam, dict[str, str]]:
    """Load the official module in eval mode, with the `weights_record` for the manifest. Raises WeightsError."""
    build = BUILDERS[variant]
    seed = random_seed(weights)
    if seed is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sam = build().eval().requires_grad_(False)
        spread(sam, seed)
        return sam, weights_record(weights, None, sam)
    path = find_weights(weights, DOWNLOADS, model="sam")
    state = read_checkpoint(path)
    actual = variant_of(state)
    if actual not in (None, variant):
        raise WeightsError(f"{path}: expected SAM {variant}, the file holds SAM {actual}", hint=f"--variant {actual}")
    with torch.device("meta"):
        sam = build().eval().requires_grad_(False)
    load_exactly(sam, state, path=path, what=f"SAM {variant}", assign=True)
    # No checkpoint contains these, and they are empty after building on the meta device.
    sam.pixel_mean, sam.pixel_std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return sam, weights_record(weights, path, sam)


def variant_of(state: Mapping[str, Tensor]) -> str | None:
    """The variant with the width and depth of a state dict; None for no known variant."""
    table = state.get("image_encoder.pos_embed")
    if table is None or table.ndim != 4:
        return None
    depth = len({name.split(".")[2] for name in state if name.startswith("image_encoder.blocks.")})
    shapes = {(1024, 768, 12): "vit_b", (1024, 1024, 24): "vit_l", (1024, 1280, 32): "vit_h"}
    return shapes.get((16 * table.shape[1], table.shape[3], depth))


class Encoder(nn.Module):
    """Photographs (B, S, S, 3) uint8 RGB and their valid (height, width) (B, 2) to embeddings (B, D, G, G)."""

    def __init__(self, sam: Sam, *, one_width: bool = False) -> None:
        super().__init__()
        vit = sam.image_encoder
        self.patch_embed, self.pos_embed, self.neck = vit.patch_embed, vit.pos_embed, with_channel_norms(vit.neck)
        self.blocks = nn.ModuleList(SamBlock(block, vit.pos_embed.shape[1], one_width=one_width) for block in vit.blocks)
        self.normalize = normalize_in_fp32(sam.pixel_mean.flatten().tolist(), sam.pixel_std.flatten().tolist())

    def forward(self, pixels: Tensor, size: Tensor) -> Tensor:
        x = self.patch_embed(normalized(pixels, size, self.normalize)) + self.pos_embed  # (B, G, G, C)
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))


class Decoder(nn.Module):
    """Embeddings (I, D, G, G), boxes (N, 4), each box's image (N,) and `MULTIMASK` (N,) to logits (N, L, L), predicted IoU (N,),
    which of the four masks was taken (N,), and its stability score (N,).

    ``PromptEncoder`` and ``MaskDecoder.predict_masks`` for boxes of several images, with `TwoWay`. The mask is chosen by its
    predicted IoU before any is upscaled, so that only one is. Box corners are embedded without the in-place writes of
    ``_embed_boxes`` (ScatterND).
    """

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        prompt, decoder = sam.prompt_encoder, sam.mask_decoder
        self.transformer, self.upscale = TwoWay(decoder.transformer), Upscale(decoder.output_upscaling)
        self.mask_heads, self.quality_head = decoder.output_hypernetworks_mlps, decoder.iou_prediction_head
        self.stability = Fp32(stability, why=COUNTS)
        waves = CornerWaves(prompt.pe_layer.positional_encoding_gaussian_matrix, sam.image_encoder.img_size)
        self.waves = Fp32(waves, why="large phases: half precision has no digits left for the fraction of a turn")
        self.register_buffer("corners", torch.cat([prompt.point_embeddings[2].weight, prompt.point_embeddings[3].weight]))
        self.register_buffer("tokens", torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]))
        self.register_buffer("no_mask", prompt.no_mask_embed.weight.reshape(1, -1, 1, 1))
        self.register_buffer("places", cells_of(prompt.get_dense_pe()))  # (1, G^2, D)

    def forward(
        self, embedding: Tensor, boxes: Tensor, image: Tensor, multimask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        prompt = self.waves(boxes) + self.corners  # (N, 2, D)
        tokens = torch.cat([self.tokens.expand(boxes.shape[0], -1, -1), prompt], dim=1)
        hidden, keys = self.transformer(cells_of(embedding + self.no_mask), self.places, tokens, image)
        quality = self.quality_head(hidden[:, 0])  # (N, 4)
        token = 1 + quality[:, 1:].argmax(dim=1)
        token = torch.zeros_like(token) if multimask is None else torch.where(multimask, token, 0)
        weights = torch.stack([head(hidden[:, 1 + number]) for number, head in enumerate(self.mask_heads)], dim=1)
        taken = torch.arange(boxes.shape[0], device=token.device) * weights.shape[1] + token
        logits = self.upscale(keys, weights.flatten(0, 1).index_select(0, taken))
        return logits, quality.flatten().index_select(0, taken), token, self.stability(logits.flatten(1))


def encoder_graph(sam: Sam, batch: AxisRange, *, one_width: bool = False) -> Graph:
    """Graph ``encoder``, see `Encoder` and `SamBlock`. Reference: ``Sam.preprocess`` and ``image_encoder`` of one image."""
    side, channels, grid = sam.image_encoder.img_size, sam.prompt_encoder.embed_dim, sam.prompt_encoder.image_embedding_size[0]

    @torch.inference_mode()
    def reference(feeds: Feeds, _: Feeds) -> Feeds:
        height, width = feeds["size"][0]
        image = torch.from_numpy(feeds["pixels"][0, :height, :width].copy()).permute(2, 0, 1)
        return {"embedding": sam.image_encoder(sam.preprocess(image)[None]).numpy()}

    return Graph(
        name="encoder",
        module=Encoder(sam, one_width=one_width),
        inputs=(TensorSpec("pixels", ("batch", side, side, 3), "uint8"), TensorSpec("size", ("batch", 2), "int64")),
        outputs=(TensorSpec("embedding", ("batch", channels, grid, grid), "float32"),),
        axes={"batch": batch},
        row_axis="batch",
        sample=partial(sample_photographs, side),
        distinct=DISTINCT,
        reference=reference,
        tolerance={"embedding": Tolerance(relative=1e-4, why="float32 sums in another order through up to 32 blocks")},
        half=InHalf(
            io=frozenset({"embedding"}),
            tolerance={
                "embedding": Tolerance(relative=5e-3, why="rounding to 11 bits through up to 32 blocks; masks move by < 0.1 %")
            },
        ),
    )


def decoder_graph(sam: Sam, images: AxisRange, boxes: AxisRange) -> Graph:
    """Graph ``decoder``, see `Decoder`. Reference: the official prompt encoder and mask decoder, one box at a time."""
    side, channels, grid = sam.image_encoder.img_size, sam.prompt_encoder.embed_dim, sam.prompt_encoder.image_embedding_size[0]

    why = "float32 sums in another order"
    return Graph(
        name="decoder",
        module=Decoder(sam),
        inputs=(
            TensorSpec("embedding", ("images", channels, grid, grid), "float32"),
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
        sample=partial(sample_boxes, side, {"embedding": (channels, grid, grid)}, images.max),
        reference=partial(official_mask, sam, TIE),
        take=take_boxes,
        distinct=IMAGES + 1,  # boxes, of so many images less one
        tolerance={
            "logits": Tolerance(relative=1e-4, why=why),
            "quality": Tolerance(relative=math.inf, absolute=1e-5, why=f"{why}; one number, which may be 0"),
            "stability": STABILITY,
        },
        ties="token",
        half=InHalf(
            io=frozenset({"embedding", "logits"}),
            tolerance={
                "logits": Tolerance(
                    relative=1e-2, why="rounding to 11 bits through two layers of attention; masks move by < 0.5 %"
                ),
                "quality": Tolerance(relative=math.inf, absolute=1e-2, why="predicted IoU, ranks masks"),
                "stability": STABILITY,
            },
            reference=lambda scale: partial(official_mask, sam, scale * HALF_TIE),
        ),
    )


@torch.inference_mode()
def official_mask(sam: Sam, tie: float, feeds: Feeds, outputs: Feeds) -> Feeds:
    """The official mask of one box. Of masks that are as good within rounding, it takes the graph's, see `chosen_mask`."""
    sparse, dense = sam.prompt_encoder(points=None, boxes=torch.from_numpy(feeds["boxes"]), masks=None)
    logits, quality = sam.mask_decoder.predict_masks(
        image_embeddings=torch.from_numpy(feeds["embedding"][feeds["image"]]),
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
    )
    multimask = "multimask" in feeds and bool(feeds["multimask"][0])
    return chosen_mask(logits[0], quality[0], best_of(quality[0], tie) if multimask else [0], tie, outputs)


def sample_photographs(side: int, rows: int, seed: int) -> Feeds:
    """Encoder feeds: landscape, portrait and square photographs on a canvas of ``side`` pixels."""
    return padded_photographs((side, side), rows, seed)


def _three(values: Tensor) -> tuple[float, float, float]:
    red, green, blue = (round(float(value), 4) for value in values.flatten())
    return red, green, blue


FAMILY = Family(
    name="sam",
    variants=(*BUILDERS, *sam2.VARIANTS),
    default="vit_b",
    prepare=prepare,
    official=lambda variant: variant,
)
