"""Refine label maps, or a network's probabilities, by a fully connected CRF before scoring, if requested; the output says so.

Papers publish scores with and without it, by Krähenbühl & Koltun, arXiv:1210.5644, and give it the probabilities of a segmenter.
Label maps have none. On hard labels the CRF removes thin objects: true VOC masks shifted by 6 px fall from 89.7 to 77.7 mIoU (24
images); as probabilities, blurred by 4 px, to 88.1.
"""

from __future__ import annotations

import numpy as np

from ...errors import WsssError
from ...extras import install_line

STEPS, CONFIDENCE = 10, 0.7
SMOOTH = {"sxy": 3, "compat": 3}
ALIKE = {"sxy": 50, "srgb": 5, "compat": 10}
"""Of label maps: steps, confidence in the labels, and both kernels: IRNet, misc/imutils.py, ``crf_inference_label``."""
SMOOTH_SOFT = {"sxy": 1, "compat": 3}
ALIKE_SOFT = {"sxy": 67, "srgb": 3, "compat": 4}
"""Of probabilities: both kernels of DeepLab (github.com/kazuto1011/deeplab-pytorch 3a634f2, configs/voc12.yaml)."""
LEAST = 1e-5
"""Smallest probability: that of pydensecrf's ``unary_from_softmax``."""


def _kernels(smooth: dict[str, int], alike: dict[str, int]) -> str:
    return f"kernels {' and '.join(', '.join(f'{key} {value}' for key, value in kernel.items()) for kernel in (smooth, alike))}"


SAID = f"DenseCRF on hard labels ({STEPS} steps, confidence {CONFIDENCE}, {_kernels(SMOOTH, ALIKE)}, as IRNet)"
SAID_SOFT = f"DenseCRF on probabilities ({STEPS} steps, {_kernels(SMOOTH_SOFT, ALIKE_SOFT)}, as DeepLab)"


def check_crf() -> None:
    """Raises WsssError if pydensecrf is not installed."""
    try:
        import pydensecrf.densecrf  # noqa: F401
    except ImportError:
        raise WsssError(
            "--crf: needs pydensecrf, which is not installed",
            hint=f"{install_line('crf')}; compiling it needs a C++ compiler and Python 3.12 or older",
        ) from None


def refine(label_map: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """The most probable label of each pixel, among the labels of the map.

    Args:
        label_map: (H, W) uint8; void (255) is unknown and gets a label too.
        pixels: (H, W, 3) uint8 RGB, the photograph.

    Returns:
        (H, W) uint8; ``label_map`` itself if it has fewer than two labels.
    """
    from pydensecrf.utils import unary_from_labels

    labels = np.unique(label_map[label_map != 255])
    if len(labels) < 2:
        return label_map
    numbered = np.where(label_map == 255, 0, np.searchsorted(labels, label_map) + 1)  # 0: unknown
    unary = unary_from_labels(numbered, len(labels), gt_prob=CONFIDENCE, zero_unsure=True)
    return labels[_best(unary, pixels, SMOOTH, ALIKE)].astype(np.uint8)


def refine_probabilities(probabilities: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """The most probable label of each pixel, from the probabilities of a segmenter.

    Args:
        probabilities: (C, H, W) floating point, background first.
        pixels: (H, W, 3) uint8 RGB, the photograph.

    Returns:
        (H, W) uint8.
    """
    unary = -np.log(np.clip(probabilities, LEAST, 1, dtype=np.float32)).reshape(len(probabilities), -1)
    return _best(unary, pixels, SMOOTH_SOFT, ALIKE_SOFT).astype(np.uint8)


def _best(unary: np.ndarray, pixels: np.ndarray, smooth: dict[str, int], alike: dict[str, int]) -> np.ndarray:
    """(H, W) index of the best row of the refined energies, from (C, H * W)."""
    from pydensecrf.densecrf import DenseCRF2D

    height, width = pixels.shape[:2]
    crf = DenseCRF2D(width, height, len(unary))
    crf.setUnaryEnergy(np.ascontiguousarray(unary))
    crf.addPairwiseGaussian(**smooth)
    crf.addPairwiseBilateral(**alike, rgbim=np.array(pixels, order="C"))  # a copy: a read-only array is not accepted
    return np.argmax(crf.inference(STEPS), axis=0).reshape(height, width)
