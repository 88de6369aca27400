"""Segmenters with one interface: from pixels to logits of every class at the same size.

Networks come from segmentation-models-pytorch, transformers and `wsss.train.networks`, and are built without a download.
`wsss.train.weights` loads their initial weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from .args import LossArgs, ModelArgs, Value
from .loss import Criterion, Outputs, PixelLoss
from .networks.deeplabv2 import DeepLabV2
from .networks.vit import VisionTransformer

SMP = {"deeplabv3plus": "DeepLabV3Plus", "upernet": "UPerNet", "unet": "Unet", "smp-segformer": "Segformer"}

SEGFORMER: Mapping[str, Mapping[str, Value]] = {
    name: {"hidden_sizes": widths, "depths": list(depths), "decoder_hidden_size": 256 if name in ("b0", "b1") else 768}
    for name, widths, depths in (
        ("b0", [32, 64, 160, 256], (2, 2, 2, 2)),
        ("b1", [64, 128, 320, 512], (2, 2, 2, 2)),
        ("b2", [64, 128, 320, 512], (3, 4, 6, 3)),
        ("b3", [64, 128, 320, 512], (3, 4, 18, 3)),
        ("b4", [64, 128, 320, 512], (3, 8, 27, 3)),
        ("b5", [64, 128, 320, 512], (3, 6, 40, 3)),
    )
}
"""SegFormer, arXiv:2105.15203, table 6."""

SWIN: Mapping[str, Mapping[str, Value]] = {
    "swin-tiny": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
    "swin-small": {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
    "swin-base": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12},
    "swin-large": {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "window_size": 12},
}
"""Swin, arXiv:2103.14030, section 3.3; window sizes of Mask2Former's configurations."""


class Segmenter(nn.Module):
    """A network with C labels, background first.

    Args:
        network: the trained module; its state dict is the checkpoint.
        classes: number of labels with background, C.
        multiple_of: sides of ``pixels`` must be multiples of it.
        outputs_of: computes the network's outputs for the loss.
        logits_of: converts these outputs and (height, width) to (B, C, H, W) float logits.
        queries: number of masks that a set predictor gives per image; 0 for a network that labels pixels.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        classes: int,
        multiple_of: int,
        outputs_of: Callable[[nn.Module, Tensor], Outputs],
        logits_of: Callable[[Outputs, tuple[int, int]], Tensor],
        queries: int = 0,
    ) -> None:
        super().__init__()
        self.network = network
        self.classes, self.multiple_of, self.queries = classes, multiple_of, queries
        self._outputs_of, self._logits_of = outputs_of, logits_of
        self.canvases: tuple[tuple[int, int], ...] = ()
        """(height, width) of the run's canvases, on which whole photographs are put; empty: padded to ``multiple_of``."""

    def outputs(self, pixels: Tensor) -> Outputs:
        """The outputs for the loss, for (B, 3, H, W) float pixels."""
        return self._outputs_of(self.network, pixels)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits of every label at every pixel.

        Args:
            pixels: (B, 3, H, W) float, RGB, normalized; H and W multiples of ``multiple_of``.

        Returns:
            (B, C, H, W); their softmax is the probability of each label.
        """
        return self._logits_of(self.outputs(pixels), (pixels.shape[-2], pixels.shape[-1]))

    def at_step(self, step: int, steps: int) -> None:
        """Set what changes with the training to its state after ``step`` of ``steps`` steps: the attention masks of EoMT."""
        if hasattr(self.network, "anneal"):
            self.network.anneal(step / max(steps, 1))

    def encoder(self) -> nn.Module:
        """The encoder; all other layers are the head."""
        for path in ("encoder", "segformer", "model.pixel_level_module.encoder"):
            try:
                return self.network.get_submodule(path)
            except AttributeError:
                continue
        raise AssertionError("every network has an encoder")

    def encoder_parameters(self) -> set[nn.Parameter]:
        """The parameters of the encoder; all others have a ``head_factor`` times higher learning rate."""
        return set(self.encoder().parameters())


def build_segmenter(architecture: str, encoder: str, options: Mapping[str, Any], classes: int) -> Segmenter:
    """Build a segmenter with random weights. Needs no network connection.

    Args:
        options: further arguments of the architecture's constructor.
        classes: number of labels with background.

    Raises:
        UsageError: unknown encoder, or an option that the architecture does not have.
    """
    kinds = {"deeplabv2": _deeplabv2, "segformer": _segformer, "mask2former": _mask2former, "vit": _vit, "eomt": _eomt}
    try:
        return kinds.get(architecture, _smp)(architecture, encoder, dict(options), classes)
    except (TypeError, KeyError, ValueError, RuntimeError, NotImplementedError) as error:
        raise UsageError(
            f"{architecture} with encoder {encoder!r} and options {dict(options)} cannot be built: {error}",
            hint="model.encoder: a name of segmentation-models-pytorch such as resnet101, b0 to b5 for segformer, "
            "swin-tiny to swin-large for mask2former, a vision transformer of timm for vit and eomt",
        ) from None


def build_from(args: ModelArgs, classes: int, seed: int) -> Segmenter:
    """Build a run's segmenter with random weights from the seed. The caller's random state does not change.

    Scale and shift of ``fixed`` batch norms, and a frozen encoder, require no gradient.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        segmenter = build_segmenter(args.architecture, args.encoder, args.options, classes)
    if args.batch_norm_momentum:
        for norm in _batch_norms(segmenter.encoder()):
            norm.momentum = args.batch_norm_momentum
    if args.batch_norm == "fixed":
        for norm in _batch_norms(segmenter):
            norm.requires_grad_(False)
    if args.freeze_encoder:
        segmenter.encoder().requires_grad_(False)
    return segmenter


def _batch_norms(module: nn.Module) -> Iterator[nn.modules.batchnorm._BatchNorm]:
    return (each for each in module.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm))


def criterion_for(segmenter: Segmenter, args: LossArgs, class_weights: Tensor | None) -> Criterion:
    """The loss for a segmenter."""
    if segmenter.queries:
        from .mask_loss import MaskLoss

        return MaskLoss(args, segmenter.queries)
    return PixelLoss(args, class_weights)


def _call(network: nn.Module, pixels: Tensor) -> Outputs:
    return network(pixels)


def _upsampled(outputs: Outputs, size: tuple[int, int]) -> Tensor:
    assert isinstance(outputs, Tensor)
    return outputs if outputs.shape[-2:] == size else F.interpolate(outputs, size, mode="bilinear", align_corners=False)


def _at_input_size(coarse_logits: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Outputs]:
    """Upsample the network's coarse logits to the input's size, where the loss is computed."""
    return lambda network, pixels: _upsampled(coarse_logits(network, pixels), (pixels.shape[-2], pixels.shape[-1]))


def _check_known(constructor: Callable[..., object], options: Mapping[str, object]) -> None:
    """Raises TypeError for an option that ``**kwargs`` would accept without effect."""
    known = [
        name for name, parameter in inspect.signature(constructor).parameters.items() if parameter.kind != parameter.VAR_KEYWORD
    ]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"no option {unknown[0]!r}; options: {', '.join(known[1:])}")


# ---- segmentation-models-pytorch ----


def _smp(architecture: str, encoder: str, options: dict[str, Any], classes: int) -> Segmenter:
    import segmentation_models_pytorch as smp

    kind = getattr(smp, SMP[architecture])
    _check_known(kind.__init__, options)
    network = kind(encoder_name=encoder, encoder_weights=None, classes=classes, **options)
    return Segmenter(network, classes=classes, multiple_of=32, outputs_of=_call, logits_of=_upsampled)


def _deeplabv2(_: str, encoder: str, options: dict[str, Any], classes: int) -> Segmenter:
    from segmentation_models_pytorch.encoders import get_encoder

    trunk = get_encoder(encoder, weights=None, output_stride=8)
    network = DeepLabV2(trunk, trunk.out_channels[-1], classes, **options)
    outputs_of = _at_input_size(lambda network, pixels: network(pixels))
    return Segmenter(network, classes=classes, multiple_of=1, outputs_of=outputs_of, logits_of=_upsampled)


# ---- timm ----


def _vit(_: str, encoder: str, options: dict[str, Any], classes: int) -> Segmenter:
    layers = int(options.pop("layers", 4))
    trunk = _plain_transformer(encoder, options)
    if not 1 <= layers <= len(trunk.blocks):
        raise ValueError(f"layers: expected 1 to {len(trunk.blocks)}, got {layers}")
    network = VisionTransformer(trunk, trunk.embed_dim, classes, layers)
    outputs_of = _at_input_size(lambda network, pixels: network(pixels))
    stride = trunk.patch_embed.feat_ratio()  # of hybrids, with that of their convolutions
    return Segmenter(network, classes=classes, multiple_of=stride, outputs_of=outputs_of, logits_of=_upsampled)


def _eomt(_: str, encoder: str, options: dict[str, Any], classes: int) -> Segmenter:
    from .networks.eomt import EoMT

    own = {key: options.pop(key) for key in ("queries", "blocks", "annealing") if key in options}
    trunk = _plain_transformer(encoder, {"patch_size": 16, **options})  # of DINOv2 too, as in the official configurations
    if getattr(trunk, "rope_mixed", False) or not hasattr(trunk, "norm_pre"):
        raise ValueError("expected a vision transformer whose blocks all have the same positions")
    stride = trunk.patch_embed.feat_ratio()
    network = EoMT(trunk, stride, classes, **own)
    return Segmenter(
        network,
        classes=classes,
        multiple_of=stride,
        outputs_of=_call,
        logits_of=_logits_of_masks,
        queries=network.q.num_embeddings,
    )


def _plain_transformer(encoder: str, options: dict[str, Any]) -> Any:
    import timm

    trunk = timm.create_model(encoder, pretrained=False, num_classes=0, dynamic_img_size=True, **options)
    if not hasattr(trunk, "blocks"):  # Swin, for example
        raise ValueError("expected a plain vision transformer, whose layers have one size")
    return trunk


# ---- transformers ----


def _segformer(_: str, encoder: str, options: dict[str, Any], classes: int) -> Segmenter:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    _check_known(SegformerConfig.__init__, options)
    network = SegformerForSemanticSegmentation(SegformerConfig(num_labels=classes, **{**SEGFORMER[encoder], **options}))
    # complete channels, as in mmsegmentation's heads (decode_head.py), where transformers drops single values
    network.decode_head.dropout = nn.Dropout2d(network.config.classifier_dropout_prob)
    outputs_of = _at_input_size(lambda network, pixels: network(pixel_values=pixels).logits)
    return Segmenter(network, classes=classes, multiple_of=32, outputs_of=outputs_of, logits_of=_upsampled)


def _mask2former(_: str, encoder: str, options: dict[str, Any], classes: int) -> Segmenter:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin_options = {**SWIN[encoder], **options.pop("backbone", {})}
    _check_known(SwinConfig.__init__, swin_options)
    _check_known(Mask2FormerConfig.__init__, options)
    swin = SwinConfig(**swin_options, drop_path_rate=0.3, out_features=stages)
    network = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, num_labels=classes, **options))
    queries = network.config.num_queries
    return Segmenter(
        network, classes=classes, multiple_of=32, outputs_of=_mask_outputs, logits_of=_logits_of_masks, queries=queries
    )


def _mask_outputs(network: nn.Module, pixels: Tensor) -> Outputs:
    """Class logits (B, Q, C + 1) and mask logits (B, Q, h, w) after every decoder layer; in evaluation only the last layer."""
    outputs = network(pixel_values=pixels, output_auxiliary_logits=network.training)
    last = outputs.class_queries_logits, outputs.masks_queries_logits
    if not network.training:
        return (last,)
    return (*((layer["class_queries_logits"], layer["masks_queries_logits"]) for layer in outputs.auxiliary_logits), last)


def _logits_of_masks(outputs: Outputs, size: tuple[int, int]) -> Tensor:
    """Semantic inference of MaskFormer (arXiv:2107.06278, section 3.4), as logarithms so that softmax normalizes the scores."""
    assert isinstance(outputs, tuple)
    class_logits, mask_logits = outputs[-1]
    masks = F.interpolate(mask_logits, size, mode="bilinear", align_corners=False).sigmoid()
    classes = class_logits.softmax(dim=-1)[..., :-1]
    return torch.einsum("bqc,bqhw->bchw", classes, masks).clamp(min=1e-6).log()
