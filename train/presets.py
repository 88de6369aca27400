"""Published training schedules with their sources, in the format of a ``--config`` file. Imports no torch.

docs/presets.md compares every value with its source, and names the reason of every difference.
"""

from __future__ import annotations

import tomllib
from typing import Any

from ..errors import UsageError

_DEEPLABV2 = """
[model]
architecture = "deeplabv2"
encoder = "resnet101"
init = "hub:imagenet"
batch_norm = "fixed"

[data]
crop = 321
batch = 10
scales = [0.5, 0.75, 1.0, 1.25, 1.5]

[optimizer]
kind = "sgd"
rate = 2.5e-4
head_factor = 10
head_bias_factor = 2
momentum = 0.9
weight_decay = 5e-4
no_decay = "head-biases"
schedule = "poly"
schedule_every = 10
power = 0.9
"""

_TEXT = {
    "deeplabv2-voc": f"""
source = '''DeepLab, arXiv:1606.00915, section 4.1; github.com/kazuto1011/deeplab-pytorch 4219467, configs/voc12.yaml. \
Not as there: ImageNet weights for its COCO ones, no losses on smaller copies of the image; docs/presets.md has all differences'''
{_DEEPLABV2}
steps = 20_000
""",
    "deeplabv2-coco": f"""
source = '''github.com/kazuto1011/deeplab-pytorch 4219467, configs/cocostuff164k.yaml. Not as there: ImageNet weights for \
its COCO ones, no losses on smaller copies of the image; docs/presets.md has all differences'''
validation_steps = 5000
{_DEEPLABV2}
steps = 100_000
""",
    "deeplabv3plus-voc": """
source = '''DeepLabV3+, arXiv:1802.02611, section 4; github.com/VainF/DeepLabV3Plus-Pytorch 4e1087d, main.py. \
Not as there: the decoder of segmentation-models-pytorch, crop 512 for 513; docs/presets.md has all differences'''

[model]
architecture = "deeplabv3plus"
encoder = "resnet101"
init = "hub:imagenet"
batch_norm_momentum = 0.01

[model.options]
encoder_output_stride = 16
decoder_atrous_rates = [6, 12, 18]
decoder_aspp_separable = false
decoder_aspp_dropout = 0.1

[data]
crop = 512
batch = 16
scale = [0.5, 2.0]

[optimizer]
kind = "sgd"
steps = 30_000
rate = 1e-3
head_factor = 10
momentum = 0.9
weight_decay = 1e-4
no_decay = "none"
schedule = "poly"
power = 0.9
""",
    "segformer": """
source = '''SegFormer, arXiv:2105.15203, section 4.1; github.com/NVlabs/SegFormer 65fa8cf, \
local_configs/segformer/B2/segformer.b2.512x512.ade.160k.py. Not as there: 40,000 steps for 160,000; docs/presets.md has all \
differences'''

[model]
architecture = "segformer"
encoder = "b2"
init = "hub:nvidia/mit-b2"

[data]
shorter_px = 512
crop = 512
largest_share = 0.75
batch = 16
scale = [0.5, 2.0]
jitter = [0.12549, 0.5, 0.5, 0.1]  # 32 / 255, 0.5, 0.5, 18 / 180

[optimizer]
kind = "adamw"
steps = 40_000
warm_up = 1500
rate = 6e-5
head_factor = 10
weight_decay = 0.01
no_decay = "encoder-norms"
schedule = "poly"
power = 1.0
""",
    "mask2former": """
source = '''Mask2Former, arXiv:2112.01527, section 4; github.com/facebookresearch/Mask2Former 9b0651c, \
configs/ade20k/semantic-segmentation/swin/maskformer2_swin_tiny_bs16_160k.yaml. Not as there: 40,000 steps for 160,000 from \
COCO panoptic weights; docs/presets.md has all differences'''

[model]
architecture = "mask2former"
encoder = "swin-tiny"
init = "hub:facebook/mask2former-swin-tiny-coco-panoptic"
new_head = true

[data]
shorter_px = 512
crop = 512
batch = 16
scales = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0]
jitter = [0.12549, 0.5, 0.5, 0.1]  # 32 / 255, 0.5, 0.5, 18 / 180

[loss]
kind = "masks"

[optimizer]
kind = "adamw"
steps = 40_000
rate = 1e-5
head_factor = 10
weight_decay = 0.05
no_decay = "norms-and-embeddings"
clip_norm = 0.01
schedule = "poly"
power = 0.9
""",
    "eomt": """
source = '''EoMT, arXiv:2503.19108; github.com/tue-mps/eomt 7bd19dd, configs/dinov2/ade20k/semantic/eomt_large_512.yaml. \
Not as there: DINOv2's base encoder for its large one, photographs of one shorter side; docs/presets.md has all differences'''

[model]
architecture = "eomt"
encoder = "vit_base_patch14_reg4_dinov2"
init = "hub:lvd142m"
options = { patch_size = 16, img_size = 512, queries = 100, blocks = 4 }

[data]
shorter_px = 512
crop = 512
batch = 16
scale = [0.5, 2.0]
jitter = [0.12549, 0.5, 0.5, 0.05]  # 32 / 255, 0.5, 0.5, 18 / 360

[loss]
kind = "masks"

[optimizer]
kind = "adamw"
steps = 39_120
warm_up = 500
encoder_warm_up = 1000
rate = 1e-4
head_factor = 1
layer_decay = 0.8
weight_decay = 0.05
no_decay = "none"
clip_norm = 0.01
schedule = "poly"
power = 0.9
""",
    "mini": """
source = "chosen here for the drawn scenes of wsss.mini, random weights and a CPU (benchmarks/studies/quality/stage_two.py)"
validation_steps = 600

[model]
architecture = "unet"
encoder = "tu-resnet10t"
options = { encoder_depth = 4, decoder_channels = [64, 48, 32, 16] }

[data]
shorter_px = 160
crop = 64
largest_share = 0.75
batch = 32
scale = [0.75, 1.35]
jitter = [0.1, 0.1, 0.1, 0.0]

[optimizer]
kind = "adamw"
steps = 2400
warm_up = 50
rate = 2e-3
head_factor = 1
weight_decay = 0.02
clip_norm = 1.0
schedule = "cosine"
average = 0.99

[machine]
workers = 1
""",
}

PRESETS: dict[str, dict[str, Any]] = {name: {"preset": name, **tomllib.loads(text)} for name, text in _TEXT.items()}
"""Tables for `wsss.train.args.config_from`, by name."""


def preset(name: str) -> dict[str, Any]:
    """The tables of a preset. Raises UsageError, which lists the presets, if there is no such preset."""
    if name not in PRESETS:
        raise UsageError(f"--preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
