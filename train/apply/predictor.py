"""A run's segmenter: from photographs to label maps and confidence."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...cores import cores
from ...errors import WsssError
from ...spec import sha256_of
from ..args import DataArgs, Precision
from ..checkpoint import load_run, weights_file
from ..evaluate.crf import SAID_SOFT, check_crf, refine_probabilities
from ..evaluate.processes import in_processes
from ..run import DTYPES, autocast
from .inference import Inference
from .probabilities import averaged_probabilities

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """label: (H, W) uint8, the most probable label. confidence: (H, W) uint8, its probability, 255 is certain."""

    label: np.ndarray
    confidence: np.ndarray


class Predictor:
    """Predicts photographs with a run's best weights, one at a time.

    Args:
        run: folder of ``wsss train``.
        inference: test-time settings. device: auto takes a GPU if there is one. precision: of the forward pass.
        workers: processes that compute the CRF; None: one per core.

    Raises:
        WeightsError: the folder holds no run, or a damaged one. WsssError: no GPU, or no pydensecrf.
    """

    def __init__(
        self,
        run: Path,
        inference: Inference,
        *,
        device: Device = "auto",
        precision: Precision = "fp32",
        workers: int | None = None,
    ) -> None:
        if inference.crf:
            check_crf()
        if device == "cuda" and not torch.cuda.is_available():
            raise WsssError("--device cuda: PyTorch finds no GPU", hint="--device cpu")
        on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        self._device = torch.device("cuda" if on_gpu else "cpu")
        segmenter, self.record = load_run(run)
        self._segmenter = segmenter.to(self._device)
        self._args = DataArgs(mean=self.record.mean, std=self.record.std, shorter_px=self.record.shorter_px)
        self._inference, self._precision = inference, precision
        self._workers = workers or cores()
        self._sha256 = sha256_of(weights_file(run))

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the label maps, for the ``run.json`` of a label store."""
        rules = {**dataclasses.asdict(self._inference), "scales": list(self._inference.scales)}
        rules["crf"] = SAID_SOFT if self._inference.crf else None
        return {"engine": f"torch, {self._precision}", "rules": rules, "models": {"segmenter": self._sha256}}

    @torch.inference_mode()
    def probabilities(self, pixels: np.ndarray) -> Tensor:
        """(C, H, W) float32 on the device: averaged probabilities of one photograph (H, W, 3) uint8, without the CRF.

        Raises:
            WsssError: too little memory, or the network's output is NaN.
        """
        with _memory(pixels), autocast(self._device, DTYPES[self._precision]):
            mean = averaged_probabilities(self._segmenter, pixels, self._args, self._device, self._inference)
        if mean.isnan().any():
            raise WsssError("the network's output is not a number", hint="train again with --set optimizer.precision=fp32")
        return mean

    def predict(self, photographs: Iterable[np.ndarray]) -> Generator[Prediction]:
        """Yield the prediction of each photograph (H, W, 3) uint8, in order. The CRF runs in other processes.

        Photographs are taken from the iterable up to two per process before their predictions are yielded.
        """
        if not self._inference.crf:
            for pixels in photographs:
                probability, label = self.probabilities(pixels).max(dim=0)
                yield Prediction(label.to(torch.uint8).cpu().numpy(), _as_bytes(probability.cpu().numpy()))
            return
        tasks = ((self.probabilities(pixels).cpu().numpy(), np.ascontiguousarray(pixels)) for pixels in photographs)
        if self._workers == 1:
            yield from map(_refined, tasks)
        else:
            yield from in_processes(_refined, tasks, self._workers)


def _refined(task: tuple[np.ndarray, np.ndarray]) -> Prediction:
    probabilities, pixels = task
    label = refine_probabilities(probabilities, pixels)
    return Prediction(label, _as_bytes(np.take_along_axis(probabilities, label[None], axis=0)[0]))


def _as_bytes(probability: np.ndarray) -> np.ndarray:
    return np.asarray((probability * 255).round(), np.uint8)


@contextmanager
def _memory(pixels: np.ndarray) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in message:
            raise
        raise WsssError(
            f"too little memory for a photograph of {pixels.shape[1]} x {pixels.shape[0]} pixels: {message}",
            hint="--window 512 needs less, smaller --scales too",
        ) from None
