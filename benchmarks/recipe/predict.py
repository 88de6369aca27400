"""A trained PyTorch segmenter as a labeler, so that its predictions form a label store: resumable and with all settings.

``wsss label --model segmenter`` does the same with an exported graph. Here predictions follow the usual test protocol: whole
photographs, optionally averaged over scales and mirror images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ...batch import Boxes, Images, Labels, Masks, PseudoLabels
from ...classes import class_list
from ...runtime.chain import Chain
from ...runtime.trained_segmenter import no_boxes, no_masks, scores
from ...spec import sha256_of
from ...train.args import DataArgs
from ...train.checkpoint import load_run, weights_file
from ...train.run import DTYPES, autocast
from ...train.validate import averaged_probabilities


class TrainedStage:
    """Label maps and confidence from a run's best weights, one photograph at a time.

    Args:
        run: folder of ``wsss train``. precision: of the forward pass, fp32, bf16 or fp16.
        scales, flip: see `averaged_probabilities`.

    Raises:
        WeightsError: the folder holds no run, or a damaged one.
    """

    def __init__(self, run: Path, *, precision: str, scales: Sequence[float], flip: bool, device: torch.device) -> None:
        segmenter, self.record = load_run(run)
        self._segmenter = segmenter.to(device)
        self._args = DataArgs(mean=self.record.mean, std=self.record.std, shorter_px=self.record.shorter_px)
        self._dtype, self._device, self._scales, self._flip = DTYPES[precision], device, tuple(scales), flip

    @torch.inference_mode()
    def __call__(self, images: Images, labels: Labels, boxes: Boxes, masks: Masks) -> PseudoLabels:
        maps, confidence = [], []
        for photo in images:
            with autocast(self._device, self._dtype):
                mean = averaged_probabilities(
                    self._segmenter, photo.pixels, self._args, self._device, scales=self._scales, flip=self._flip
                )
            probability, label = mean.max(dim=0)
            maps.append(label.to(torch.uint8).cpu().numpy())
            confidence.append((probability * 255).round().to(torch.uint8).cpu().numpy())
        nothing = np.zeros(0, np.int64)
        names = [photo.name for photo in images]
        labels = scores(maps, confidence, len(self.record.classes))
        return PseudoLabels(names, maps, labels, Boxes.none(), np.zeros(0, np.float32), nothing, nothing, confidence)


def trained_labeler(run: Path, *, precision: str = "fp32", scales: Sequence[float] = (1.0,), flip: bool = False) -> Chain:
    """A labeler that uses a run's segmenter alone. Raises WeightsError as `TrainedStage`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stage = TrainedStage(run, precision=precision, scales=scales, flip=flip, device=device)
    classes = class_list(stage.record.classes)
    settings = {
        "engine": f"torch, {precision}",
        "rules": {"scales": list(scales), "flip": flip},
        "models": {"segmenter": sha256_of(weights_file(run))},
    }

    def no_labels(images: Images) -> Labels:
        shape = len(images), len(classes)
        return Labels(np.zeros(shape, np.float32), np.zeros(shape, np.bool_))

    return Chain(classes, tag=no_labels, detect=no_boxes, segment=no_masks, fuse=stage, settings=settings)
