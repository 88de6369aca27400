"""The trained segmenter: a run of ``wsss train`` as one graph for each canvas, from pixels to label map and confidence.

Photographs have the scale of the training: the original size, or one shorter side for all. A photograph goes on the smallest
canvas that holds it, and a larger one is read in overlapping tiles. Settings of the manifest (all read by the runtime):

- ``classes``: names by label value from 1; label 0 is background.
- ``overlap_px``: overlap of neighboring tiles; a pixel is read from the tile whose edge is farther away.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UsageError, WeightsError
from ..spec import AxisRange, Preprocess, TensorSpec, sha256_of
from ..train.checkpoint import RECORD, RunRecord, load_run, weights_file
from ..train.model import Segmenter, build_segmenter
from .family import DISTINCT, Family, Feeds, Graph, InHalf, Options, Prepared, Tolerance, gap_of_choices
from .precision.lowering import Fp32
from .rewrites import MEAN, STD, normalize_in_fp32, normalized
from .verify import padded_photographs, photograph
from .weights import random_seed, spread, weights_record

BATCH = AxisRange(1, 4, 8)
RANDOM_CLASSES = 20
"""Number of classes of ``random:SEED`` weights, that of PASCAL VOC."""
RANDOM_CROP = 512


def prepare(variant: str, weights: str, options: Options) -> Prepared:
    """A trained segmenter ready to be traced.

    Args:
        variant: ``trained`` for a run's folder, which records its architecture; ARCHITECTURE/ENCODER for ``random:SEED``, for
            example ``segformer/b0``.
        weights: the folder of a run (``wsss train --out``), or ``random:SEED``.
        options: canvases and the range of images per call. By default, the canvases on which the training photographs fit as a
            whole. Older runs do not record them, and neither do those of larger photographs: for them, a square of the training
            crop, or, if all photographs have the same shorter side, that side by 1.5 times that side, landscape and portrait.

    Raises:
        UsageError: an unknown architecture, or a canvas that the network does not support.
        WeightsError: the folder is not a run, or the run is damaged.
    """
    seed = random_seed(weights)
    if seed is None:
        if variant != "trained":
            raise UsageError(
                f"--variant: a run records its architecture; expected trained, got {variant!r}", hint="leave --variant out"
            )
        folder = Path(weights).expanduser()
        segmenter, record = load_run(folder)
        # One hash of the weights and the record: both change what is computed.
        both = sha256_of(weights_file(folder)) + sha256_of(folder / RECORD)
        source = {"source": str(folder), "sha256": hashlib.sha256(both.encode()).hexdigest()}
    else:
        segmenter, record = _random(variant, seed)
        source = weights_record(weights, None, segmenter)
    canvases = tuple(sorted(options.sizes or _canvases(record), key=lambda canvas: canvas[0] * canvas[1]))
    for canvas in canvases:
        if any(length % record.multiple_of for length in canvas):
            raise UsageError(
                f"--size {canvas[0]}x{canvas[1]}: {record.architecture} needs sides that are multiples of {record.multiple_of}"
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
        weights=source,
    )


def _canvases(record: RunRecord) -> tuple[tuple[int, int], ...]:
    def rounded_up(px: int) -> int:
        return -(-px // record.multiple_of) * record.multiple_of

    if record.canvases:
        return record.canvases
    if not record.shorter_px:
        return ((rounded_up(record.crop),) * 2,)
    short, long = rounded_up(record.shorter_px), rounded_up(-(-record.shorter_px * 3 // 2))  # cameras make 4:3 and 3:2
    return (short, long), (long, short)


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
    """Set the statistics of batch norms from their inputs, as training does: with mean 0 and variance 1 random layers diverge.

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
        self.normalize = normalize_in_fp32(record.mean, record.std)
        self.decide = Fp32(_decide, why="the softmax and the largest of its values")

    def forward(self, pixels: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """The label of the largest logit (B, H, W) uint8, and its probability (B, H, W) uint8, where 255 means 1."""
        # Zero is the mean color, with which training pads.
        label_and_confidence: tuple[Tensor, Tensor] = self.decide(self.segmenter(normalized(pixels, size, self.normalize)))
        return label_and_confidence


def _decide(logits: Tensor) -> tuple[Tensor, Tensor]:
    probability, label = logits.softmax(dim=1).max(dim=1)
    return label.to(torch.uint8), (probability * 255).round().to(torch.uint8)


def image_graph(segmenter: Segmenter, record: RunRecord, canvas: tuple[int, int], batch: AxisRange) -> Graph:
    """Graph ``image-HxW``, see `LabelGraph`. Reference: the trained module on one normalized, padded photograph."""
    height, width = canvas
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (record.mean, record.std))

    @torch.inference_mode()
    def reference(feeds: Feeds, _: Feeds) -> Feeds:
        bottom, right = (int(length) for length in feeds["size"][0])
        photo = torch.from_numpy(feeds["pixels"][0, :bottom, :right].copy()).permute(2, 0, 1)
        image = torch.zeros(1, 3, height, width)
        image[0, :, :bottom, :right] = (photo - mean) / std
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
        sample=partial(padded_photographs, canvas),
        distinct=DISTINCT,
        reference=reference,
        tolerance=tolerances(2e-3, 2e-3),
        half=InHalf(tolerance=tolerances(3e-2, 1e-2)),
    )


def _official(variant: str) -> str:
    raise WeightsError(
        "--weights: the segmenter has no official weights; give the folder of a training run",
        hint="wsss export --model segmenter --weights RUN   (wsss train STORE --images DIR --out RUN makes one)",
    )


FAMILY = Family(name="segmenter", variants=("trained",), default="trained", prepare=prepare, official=_official)
