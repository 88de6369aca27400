"""The trained segmenter: a run of ``wsss train`` as one graph for each canvas, label map and confidence computed inside.

A photograph keeps the scale it was trained on at: its own, or one shorter side for all. It goes on the smallest canvas that
holds it, and a larger one is read in overlapping tiles. Settings of the manifest (all read by the runtime):

- ``classes``: names by label value from 1; label 0 is background.
- ``overlap_px``: how far neighboring tiles reach into each other; a pixel is read from the tile whose edge is farther.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UsageError, WeightsError
from ..spec import AxisRange, Preprocess, TensorSpec, sha256_of
from ..train.checkpoint import RECORD, RunRecord, load_run, weights_file
from ..train.model import Segmenter, build_segmenter
from .family import Family, Feeds, Graph, InHalf, Options, Prepared, Tolerance, gap_of_choices
from .precision.lowering import Fp32
from .rewrites import Normalize
from .sam import MEAN, STD
from .verify import photograph
from .weights import random_seed, spread, weights_record

BATCH = AxisRange(1, 4, 8)
RANDOM_CLASSES = 20
"""Of ``random:SEED`` weights: as PASCAL VOC."""
RANDOM_CROP = 512


def prepare(variant: str, weights: str, options: Options) -> Prepared:
    """A trained segmenter ready to be traced.

    Args:
        variant: ``trained`` for a run's folder, which says what it is; for ``random:SEED`` ARCHITECTURE/ENCODER, for
            example ``segformer/b0``.
        weights: the folder of a run (``wsss train --out``), or ``random:SEED``.
        options: canvases (default: one square of the training crop; where all photographs have the same shorter side, that
            by one and a half of it, lying and standing) and the range of images a call.

    Raises:
        UsageError: an unknown architecture, or a canvas that the network cannot take.
        WeightsError: no run, or one that is damaged.
    """
    seed = random_seed(weights)
    if seed is None:
        if variant != "trained":
            raise UsageError(f"--variant: a run says what it is; expected trained or none, got {variant!r}")
        folder = Path(weights).expanduser()
        segmenter, record = load_run(folder)
        told = _record_of(folder)
    else:
        segmenter, record = _random(variant, seed)
        told = weights_record(weights, None, segmenter)
    canvases = tuple(sorted(options.sizes or _canvases(record), key=lambda canvas: canvas[0] * canvas[1]))
    for canvas in canvases:
        if any(length % record.multiple_of for length in canvas):
            raise UsageError(
                f"--size {canvas[0]}x{canvas[1]}: {record.architecture} takes sides that are multiples of {record.multiple_of}"
            )
    return Prepared(
        variant=variant if seed is not None else f"{record.architecture}/{record.encoder}",
        graphs=[partial(image_graph, segmenter, record, canvas, options.batch or BATCH) for canvas in canvases],
        preprocess=Preprocess(
            resize="shorter" if record.shorter_px else "none",
            longest_px=max(max(canvas) for canvas in canvases),
            short_px=record.shorter_px,
            filter="bilinear",
            canvases=canvases,
            mean=record.mean,
            std=record.std,
            source=f"{RECORD} of the run: {record.source}",
        ),
        settings={"classes": list(record.classes), "overlap_px": min(min(canvas) for canvas in canvases) // 4},
        weights=told,
    )


def _canvases(record: RunRecord) -> tuple[tuple[int, int], ...]:
    def rounded_up(px: int) -> int:
        return -(-px // record.multiple_of) * record.multiple_of

    if not record.shorter_px:
        return ((rounded_up(record.crop),) * 2,)
    short, long = rounded_up(record.shorter_px), rounded_up(-(-record.shorter_px * 3 // 2))  # cameras make 4:3 and 3:2
    return (short, long), (long, short)


def _record_of(folder: Path) -> dict[str, str]:
    """One hash for a run's weights and its record: either changes what is computed."""
    both = sha256_of(weights_file(folder)) + sha256_of(folder / RECORD)
    return {"source": str(folder), "sha256": hashlib.sha256(both.encode()).hexdigest()}


def _random(variant: str, seed: int) -> tuple[Segmenter, RunRecord]:
    architecture, slash, encoder = variant.partition("/")
    if not slash:
        raise UsageError(f"--variant: expected ARCHITECTURE/ENCODER, got {variant!r}", hint="--variant deeplabv3plus/resnet50")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        segmenter = build_segmenter(architecture, encoder, {}, RANDOM_CLASSES + 1).eval()
    spread(segmenter, seed)
    _settle_statistics(segmenter, seed)
    record = RunRecord(
        architecture=architecture,
        encoder=encoder,
        options={},
        classes=tuple(f"class {number}" for number in range(1, RANDOM_CLASSES + 1)),
        mean=MEAN,
        std=STD,
        crop=RANDOM_CROP,
        multiple_of=segmenter.multiple_of,
        steps=0,
        preset="none",
        source=f"random values from seed {seed}",
        init={},
        store="",
        images=0,
        tools={},
    )
    return segmenter, record


@torch.no_grad()
def _settle_statistics(segmenter: Segmenter, seed: int) -> None:
    """Give batch norms the statistics of what reaches them, as training does: with 0 and 1 random layers explode.

    Computed in float64, so that the weights of a seed are the same on every processor and with any number of threads.
    """
    norms = [module for module in segmenter.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    rng = np.random.default_rng(seed)
    pixels = torch.from_numpy(np.stack([photograph(rng, 256, 256) for _ in range(4)])).permute(0, 3, 1, 2)
    values = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    if norms:
        segmenter.double()(values.double())
    segmenter.float().eval()


class LabelGraph(nn.Module):
    """Photographs (B, H, W, 3) uint8 RGB and their valid (height, width) (B, 2) to label maps and confidence."""

    def __init__(self, segmenter: nn.Module, record: RunRecord) -> None:
        super().__init__()
        self.segmenter = segmenter
        self.normalize = Fp32(Normalize(record.mean, record.std), why="half would lose part of a pixel's step")
        self.decide = Fp32(_decide, why="the softmax and the largest of its values")

    def forward(self, pixels: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W) uint8 label of the largest logit, and (B, H, W) uint8 its probability, 255 is one."""
        rows = torch.arange(pixels.shape[1], device=pixels.device)[None, :, None] < size[:, 0, None, None]
        columns = torch.arange(pixels.shape[2], device=pixels.device)[None, None, :] < size[:, 1, None, None]
        # Zero is the mean color: what the training pads with.
        values = torch.where((rows & columns)[..., None], self.normalize(pixels), 0.0).permute(0, 3, 1, 2)
        decided: tuple[Tensor, Tensor] = self.decide(self.segmenter(values))
        return decided


def _decide(logits: Tensor) -> tuple[Tensor, Tensor]:
    probability, label = logits.softmax(dim=1).max(dim=1)
    return label.to(torch.uint8), (probability * 255).round().to(torch.uint8)


def image_graph(segmenter: Segmenter, record: RunRecord, canvas: tuple[int, int], batch: AxisRange) -> Graph:
    """Graph ``image-HxW``: see `LabelGraph`. Reference: the trained module itself on one normalized, padded photograph."""
    height, width = canvas
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (record.mean, record.std))

    def sample(rows: int, seed: int) -> Feeds:
        rng = np.random.default_rng(seed)
        pixels = rng.integers(0, 256, (rows, height, width, 3), dtype=np.uint8)
        size = np.array([(height, width)] * rows, dtype=np.int64)
        for row in range(rows):
            if row % 3 < 2:
                size[row, row % 3] = rng.integers(size[row, row % 3] // 2, size[row, row % 3])
            tall, wide = (int(length) for length in size[row])
            pixels[row, :tall, :wide] = photograph(rng, tall, wide)
        return {"pixels": pixels, "size": size}

    @torch.inference_mode()
    def reference(feeds: Feeds, _: Feeds) -> Feeds:
        tall, wide = (int(length) for length in feeds["size"][0])
        image = torch.zeros(1, 3, height, width)
        image[0, :, :tall, :wide] = (torch.from_numpy(feeds["pixels"][0, :tall, :wide].copy()).permute(2, 0, 1) - mean) / std
        logits = segmenter(image)
        best, label = logits.softmax(dim=1).max(dim=1)
        return {
            "label_map": label.to(torch.uint8).numpy(),
            "label_map.values": logits.numpy(),
            "confidence": (best * 255).round().to(torch.uint8).numpy(),
        }

    def tolerances(tie: float, relative: float) -> dict[str, Tolerance]:
        return {
            "label_map": Tolerance(relative=tie, measure=gap_of_choices, why="logits that are equal within rounding"),
            "confidence": Tolerance(relative=relative, why="rounding, and a step of 1/255"),
        }

    return Graph(
        name=f"image-{height}x{width}",
        module=LabelGraph(segmenter, record),
        inputs=(TensorSpec("pixels", ("batch", height, width, 3), "uint8"), TensorSpec("size", ("batch", 2), "int64")),
        outputs=(
            TensorSpec("label_map", ("batch", height, width), "uint8"),
            TensorSpec("confidence", ("batch", height, width), "uint8"),
        ),
        axes={"batch": batch},
        row_axis="batch",
        sample=sample,
        reference=reference,
        tolerance=tolerances(2e-3, 2e-3),
        half=InHalf(tolerance=tolerances(3e-2, 1e-2)),
    )


def _official(variant: str) -> str:
    raise WeightsError(
        "--weights: the segmenter is one that you trained; give the folder of its run",
        hint="wsss export --model segmenter --weights RUN   (wsss train STORE --images DIR --out RUN makes one)",
    )


VARIANTS: Sequence[str] = ("trained",)
FAMILY = Family(name="segmenter", variants=tuple(VARIANTS), default="trained", prepare=prepare, official=_official)
