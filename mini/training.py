"""What the three trainings share: progress lines, parameter groups, and files that are written whole or not at all."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn

from ..files import replacing, write_atomically
from .scenes import JPEG_QUALITY


def log(line: str) -> None:
    """Print a line of progress to stderr."""
    print(line, file=sys.stderr, flush=True)


def through_jpeg(pixels: np.ndarray, quality: int = JPEG_QUALITY) -> Image.Image:
    """(H, W, 3) uint8 RGB as a JPEG file gives it back."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality)
    image = Image.open(buffer)
    image.load()
    return image


def parameter_groups(*modules: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: weight decay for matrices and kernels, none for vectors and scalars."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]


def save_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        torch.save(state, file)


def rounded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as it is shipped: float16 on the CPU without shared memory; integer buffers keep their type."""
    return {
        name: (value.half() if value.is_floating_point() else value).cpu().contiguous().clone() for name, value in state.items()
    }


def save_weights(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a state dict in float16 as safetensors, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(rounded(state), metadata))
