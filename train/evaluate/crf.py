"""Refine label maps by a fully connected CRF before scoring, if requested; the output then says so.

Papers publish scores with and without it. Krähenbühl & Koltun, arXiv:1210.5644, through pydensecrf. Label maps have no
probabilities, and on hard labels the CRF removes thin objects: true VOC masks shifted by 6 px fell from 89.4 to 77.6 mIoU (24
images).
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...errors import ImageError, StoreError, WsssError
from ...extras import install_line
from ...photographs import SUFFIXES, read_photograph
from .files import plain_name

STEPS, CONFIDENCE = 10, 0.7
SMOOTH = {"sxy": 3, "compat": 3}
ALIKE = {"sxy": 50, "srgb": 5, "compat": 10}
"""Steps, confidence in the labels, and both kernels: IRNet, misc/imutils.py, ``crf_inference_label``."""
SAID = (
    f"DenseCRF on hard labels ({STEPS} steps, confidence {CONFIDENCE}, kernels "
    f"{' and '.join(', '.join(f'{key} {value}' for key, value in kernel.items()) for kernel in (SMOOTH, ALIKE))}, as IRNet)"
)


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
    from pydensecrf.densecrf import DenseCRF2D
    from pydensecrf.utils import unary_from_labels

    labels = np.unique(label_map[label_map != 255])
    if len(labels) < 2:
        return label_map
    numbered = np.where(label_map == 255, 0, np.searchsorted(labels, label_map) + 1)  # 0: unknown
    height, width = label_map.shape
    crf = DenseCRF2D(width, height, len(labels))
    crf.setUnaryEnergy(unary_from_labels(numbered, len(labels), gt_prob=CONFIDENCE, zero_unsure=True))
    crf.addPairwiseGaussian(**SMOOTH)
    crf.addPairwiseBilateral(**ALIKE, rgbim=np.array(pixels, order="C"))  # a copy: a read-only array is not accepted
    return labels[np.argmax(crf.inference(STEPS), axis=0)].reshape(height, width).astype(np.uint8)


def read_photograph_of(path: Path, label_map: np.ndarray, label_path: Path) -> np.ndarray:
    """Read the photograph (H, W, 3) uint8 of a label map. Raises StoreError if it is unreadable or of another size."""
    try:
        pixels = read_photograph(path.parent, path.name).pixels
    except ImageError as error:
        raise StoreError(f"--crf {path}: {error.message}") from None
    if pixels.shape[:2] != label_map.shape:
        raise StoreError(
            f"{label_path}: is {label_map.shape[1]} x {label_map.shape[0]} pixels, its photograph {path} is "
            f"{pixels.shape[1]} x {pixels.shape[0]}"
        )
    return pixels


def find_photographs(folder: Path, names: tuple[str, ...]) -> tuple[Path, ...]:
    """Paths of the photographs of label maps, below ``folder`` or its ``JPEGImages/``. Raises WsssError if one is missing."""
    inside = folder / "JPEGImages" if (folder / "JPEGImages").is_dir() else folder
    if not inside.is_dir():
        raise WsssError(f"--crf {folder}: expected the folder of the photographs, found nothing")
    found = {}
    for path in sorted(_walk(inside)):
        name = unicodedata.normalize("NFC", path.relative_to(inside).as_posix())
        found[name] = path  # in a label store, the label of a.jpg is `a.jpg.png` if there is an a.webp too
        found.setdefault(plain_name(name), path)
    if missing := [name for name in names if name not in found]:
        raise WsssError(
            f"--crf {folder}: has no photograph of {len(missing)} of {len(names)} label maps, for example {missing[0]}"
        )
    return tuple(found[name] for name in names)


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(root, name) for name in files if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."))
