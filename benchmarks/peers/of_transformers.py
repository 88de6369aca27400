"""The chain of transformers' own classes: its CLIP and SAM have the official weights under other names.

The pipeline ``zero-shot-object-detection`` is not used: it runs the whole detector once for each class.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from ...batch import Photograph
from ...errors import WeightsError
from .eager import EagerChain, Encode, load_clip, load_official_sam, open_detector, prompts_of
from .job import Job

EQUAL = 1e-4
"""Largest relative difference (of norms) between a converted model and the official one: float32 sums in another order."""
_OF_CLIP = (
    (r"^class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^conv1\.weight$", "vision_model.embeddings.patch_embedding.weight"),
    (r"^positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^ln_pre\.", "vision_model.pre_layrnorm."),  # transformers' spelling
    (r"^ln_post\.", "vision_model.post_layernorm."),
    (r"^transformer\.resblocks\.(\d+)\.", r"vision_model.encoder.layers.\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
_OF_SAM = (
    (r"^image_encoder\.", "vision_encoder."),
    (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
    (r"^(vision_encoder)\.blocks\.", r"\1.layers."),
    (r"\.neck\.0\.", ".neck.conv1."),
    (r"\.neck\.1\.", ".neck.layer_norm1."),
    (r"\.neck\.2\.", ".neck.conv2."),
    (r"\.neck\.3\.", ".neck.layer_norm2."),
    (r"\.pe_layer\.positional_encoding_gaussian_matrix$", ".shared_embedding.positional_embedding"),
    (r"\.point_embeddings\.", ".point_embed."),
    (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
    (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
    (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
    (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
    (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
    (r"\.output_upscaling\.0\.", ".upscale_conv1."),
    (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output_upscaling\.3\.", ".upscale_conv2."),
    (r"(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.0\.", r"\1.proj_in."),
    (r"(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.1\.", r"\1.layers.0."),
    (r"(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.2\.", r"\1.proj_out."),
    (r"\.norm(\d|_final_attn)\.", r".layer_norm\1."),
)
"""Applied in order; the names of transformers' conversion script."""


def transformers_chain(job: Job) -> EagerChain:
    """The chain of transformers' CLIP, Grounding-DINO and SAM, which give the official results.

    A CLIP that is no vision transformer has no class there; open_clip computes it instead (``about["clip"]``).

    Raises:
        WeightsError: a converted model gives another result than the official one.
    """
    about: dict[str, Any] = {}
    clip = load_clip(job.model("clip"))
    prompts, encode = prompts_of(job, clip), _open_clip(clip)
    if hasattr(clip.visual, "transformer"):
        converted = clip_from_open_clip(clip)
        about["clip against open_clip"] = _check("CLIP", *_both_embeddings(encode, converted, clip.visual.image_size))
        encode = _of(converted)
    else:
        about["clip"] = "open_clip, as transformers has no CLIP with a ResNet"
    sam = load_official_sam(job.model("sam"))
    converted_sam = sam_from_official(sam)
    about["sam against segment_anything"] = _check("SAM", *_both_masks(sam, converted_sam))
    chain = EagerChain(job, encode, prompts, open_detector(job), TransformersSam(converted_sam), autocast=False)
    chain.about |= about
    return chain


def clip_from_open_clip(clip: Any) -> Any:
    """transformers' ``CLIPVisionModelWithProjection`` with the weights of open_clip's image tower, a vision transformer."""
    visual = clip.visual
    state: dict[str, Tensor] = {"visual_projection.weight": visual.proj.T}
    for name, value in visual.state_dict().items():
        if name == "proj":
            continue
        renamed = _renamed(name, _OF_CLIP)
        if ".in_proj_" in renamed:
            for part, values in zip("qkv", value.chunk(3), strict=True):
                state[renamed.replace(".in_proj_", f".{part}_proj.")] = values
        else:
            state[renamed] = value
    block = visual.transformer.resblocks[0]
    config = transformers.CLIPVisionConfig(
        hidden_size=visual.conv1.out_channels,
        intermediate_size=block.mlp.c_fc.out_features,
        projection_dim=visual.proj.shape[1],
        num_hidden_layers=len(visual.transformer.resblocks),
        num_attention_heads=block.attn.num_heads,
        image_size=visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size,
        patch_size=visual.conv1.kernel_size[0],
        hidden_act="quick_gelu" if type(block.mlp.gelu).__name__ == "QuickGELU" else "gelu",
    )
    return _loaded(transformers.CLIPVisionModelWithProjection(config), state)


def sam_from_official(sam: Any) -> Any:
    """transformers' ``SamModel`` with the weights of segment_anything's ``Sam``."""
    vit, prompt, decoder = sam.image_encoder, sam.prompt_encoder, sam.mask_decoder
    state = {_renamed(name, _OF_SAM): value for name, value in sam.state_dict().items() if not name.startswith("pixel_")}
    shared = "shared_embedding.positional_embedding"
    state["shared_image_embedding.positional_embedding"] = state[f"prompt_encoder.{shared}"]
    windows = [block.window_size for block in vit.blocks]
    layer = decoder.transformer.layers[0]
    config = transformers.SamConfig(
        vision_config=transformers.SamVisionConfig(
            hidden_size=vit.pos_embed.shape[-1],
            output_channels=vit.neck[0].out_channels,
            num_hidden_layers=len(vit.blocks),
            num_attention_heads=vit.blocks[0].attn.num_heads,
            image_size=vit.img_size,
            patch_size=vit.patch_embed.proj.kernel_size[0],
            mlp_dim=vit.blocks[0].mlp.lin1.out_features,
            window_size=max(windows),
            global_attn_indexes=[number for number, window in enumerate(windows) if window == 0],
            num_pos_feats=prompt.embed_dim // 2,
        ),
        prompt_encoder_config=transformers.SamPromptEncoderConfig(
            hidden_size=prompt.embed_dim,
            image_size=vit.img_size,
            patch_size=vit.patch_embed.proj.kernel_size[0],
            mask_input_channels=prompt.mask_downscaling[3].out_channels,
        ),
        mask_decoder_config=transformers.SamMaskDecoderConfig(
            hidden_size=decoder.transformer_dim,
            mlp_dim=layer.mlp.lin1.out_features,
            num_hidden_layers=len(decoder.transformer.layers),
            num_attention_heads=layer.self_attn.num_heads,
            iou_head_hidden_dim=decoder.iou_prediction_head.layers[0].out_features,
            iou_head_depth=len(decoder.iou_prediction_head.layers),
        ),
    )
    return _loaded(transformers.SamModel(config), state)


class TransformersSam:
    """``SamModel`` with ``SamImageProcessor``, and all boxes of a photograph in one call."""

    def __init__(self, model: Any) -> None:
        self._model = model
        side = model.config.vision_config.image_size
        self._processor = transformers.SamImageProcessor(size={"longest_edge": side}, pad_size={"height": side, "width": side})

    def __call__(self, photo: Photograph, xyxy: np.ndarray) -> tuple[Tensor, Tensor]:
        inputs = self._processor(images=photo.pixels, return_tensors="pt")
        sizes, resized = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        (height, width), (new_height, new_width) = photo.shape, (int(length) for length in resized[0])
        scale = torch.tensor([new_width / width, new_height / height] * 2, dtype=torch.float32)
        boxes = (torch.from_numpy(xyxy) * scale)[None]  # (1, N, 4)
        out = self._model(pixel_values=inputs["pixel_values"], input_boxes=boxes, multimask_output=False)
        logits = self._processor.post_process_masks([out.pred_masks[0]], sizes, resized, binarize=False)[0]
        return logits[:, 0], out.iou_scores[0, :, 0]


def _open_clip(clip: Any) -> Encode:
    return lambda pixels: clip.encode_image(pixels, normalize=True)


def _of(model: Any) -> Encode:
    return lambda pixels: F.normalize(model(pixel_values=pixels).image_embeds, dim=-1)


@torch.inference_mode()
def _both_embeddings(encode: Encode, converted: Any, side: Any) -> tuple[Tensor, Tensor]:
    side = side[0] if isinstance(side, tuple) else side
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    return _of(converted)(pixels), encode(pixels)


@torch.inference_mode()
def _both_masks(sam: Any, converted: Any) -> tuple[Tensor, Tensor]:
    """Low-resolution logits of two boxes on the same pixels."""
    side = sam.image_encoder.img_size
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[0.1, 0.2, 0.6, 0.7], [0.3, 0.1, 0.9, 0.8]]) * side
    sparse, dense = sam.prompt_encoder(points=None, boxes=boxes, masks=None)
    want, _ = sam.mask_decoder(
        image_embeddings=sam.image_encoder(pixels),
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    got = converted(pixel_values=pixels, input_boxes=boxes[None], multimask_output=False).pred_masks[0]
    return got, want


def _check(what: str, got: Tensor, want: Tensor) -> float:
    error = float((got - want).norm() / want.norm())
    if not error <= EQUAL:
        raise WeightsError(f"{what}: transformers' class differs from the official one by {error:.1e}, expected {EQUAL:.0e}")
    return float(f"{error:.1e}")


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _loaded(model: Any, state: dict[str, Tensor]) -> Any:
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)
