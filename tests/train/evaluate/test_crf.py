"""Refinement by a CRF: asked for, said, and never with a photograph of another size."""

from __future__ import annotations

import builtins
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from wsss.errors import StoreError, WsssError
from wsss.extras import install_line
from wsss.train.evaluate.crf import ALIKE, ALIKE_SOFT, CONFIDENCE, SMOOTH, SMOOTH_SOFT, STEPS, refine, refine_probabilities
from wsss.train.evaluate.photographs import find_photographs, read_photograph_of

if TYPE_CHECKING:
    from ..conftest import Answer


@pytest.fixture
def scene(tmp_path: Path) -> np.ndarray:
    """(60, 80) truth of a bright square; on disk its photograph, and a prediction that is 3 pixels off, with a void strip."""
    truth = np.zeros((60, 80), np.uint8)
    truth[20:40, 20:60] = 2
    pixels = np.where(truth[..., None] == 2, (230, 200, 40), (20, 40, 90)).astype(np.uint8)
    predicted = np.roll(truth, 3, axis=1)
    predicted[28:32] = 255
    for folder, image in (("images", pixels), ("truth", truth), ("predicted", predicted)):
        (tmp_path / folder).mkdir()
        Image.fromarray(image).save(tmp_path / folder / "a.png")
    return truth


class ExactCRF:
    """The dense CRF of arXiv:1210.5644 in numpy, all pairs of pixels, with the interface of ``pydensecrf.densecrf.DenseCRF2D``.

    Mean field with Potts compatibility; kernels normalized symmetrically, as pydensecrf does unless asked otherwise.
    """

    def __init__(self, width: int, height: int, labels: int) -> None:
        self.width, self.height, self.labels = width, height, labels
        self.kernels: list[tuple[float, np.ndarray]] = []

    def setUnaryEnergy(self, energy: np.ndarray) -> None:
        assert energy.shape == (self.labels, self.width * self.height)
        self.unary = energy

    def addPairwiseGaussian(self, *, sxy: float, compat: float) -> None:
        self._add(self._places() / sxy, compat)

    def addPairwiseBilateral(self, *, sxy: float, srgb: float, rgbim: np.ndarray, compat: float) -> None:
        assert rgbim.shape == (self.height, self.width, 3) and rgbim.dtype == np.uint8 and rgbim.flags.c_contiguous
        self._add(np.hstack([self._places() / sxy, rgbim.reshape(-1, 3) / srgb]), compat)

    def _places(self) -> np.ndarray:
        return np.stack(np.mgrid[: self.height, : self.width], axis=-1).reshape(-1, 2).astype(float)

    def _add(self, features: np.ndarray, compat: float) -> None:
        kernel = np.exp(-0.5 * ((features[:, None] - features[None]) ** 2).sum(axis=-1))
        share = 1 / np.sqrt(kernel.sum(axis=1))
        self.kernels.append((compat, kernel * share[:, None] * share[None]))

    def inference(self, steps: int) -> np.ndarray:
        energy = -self.unary
        for _ in range(steps):
            probability = np.exp(energy - energy.max(axis=0))
            probability /= probability.sum(axis=0)
            energy = -self.unary + sum(compat * (probability @ kernel) for compat, kernel in self.kernels)
        return energy


def exact_unary(labels: np.ndarray, count: int, *, gt_prob: float, zero_unsure: bool) -> np.ndarray:
    """As ``pydensecrf.utils.unary_from_labels``: 0 is unknown, others are trusted with ``gt_prob``."""
    assert zero_unsure
    probability = np.full((count, labels.size), (1 - gt_prob) / (count - 1))
    for place, label in enumerate(labels.ravel()):
        probability[:, place] = 1 / count if label == 0 else probability[:, place]
        if label:
            probability[label - 1, place] = gt_prob
    return -np.log(probability)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact CRF in place of pydensecrf."""
    package = types.ModuleType("pydensecrf")
    for name, members in (("densecrf", {"DenseCRF2D": ExactCRF}), ("utils", {"unary_from_labels": exact_unary})):
        module = types.ModuleType(f"pydensecrf.{name}")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, f"pydensecrf.{name}", module)
    monkeypatch.setitem(sys.modules, "pydensecrf", package)


def small_scene() -> tuple[np.ndarray, np.ndarray]:
    """(10, 16) labels 3 and 7 with a void column and one wrong pixel, and a photograph whose edge lies a pixel further right."""
    labels = np.full((10, 16), 3, np.uint8)
    labels[:, 6:] = 7
    labels[:, 10] = 255
    labels[8, 1] = 7
    pixels = np.full((10, 16, 3), (20, 40, 90), np.uint8)
    pixels[:, 7:] = (230, 200, 40)
    return labels, pixels


def expected_scene() -> np.ndarray:
    return np.repeat(np.where(np.arange(16) < 7, 3, 7)[None], 10, axis=0)


def test_axes_and_constants_against_the_exact_crf(exact: None) -> None:
    labels, pixels = small_scene()
    found = refine(labels, pixels)
    assert found.dtype == np.uint8 and found.shape == (10, 16)
    assert np.array_equal(found, expected_scene())
    turned = refine(labels.T.copy(), pixels.transpose(1, 0, 2).copy())
    assert np.array_equal(turned, found.T), "rows and columns are alike"


def test_the_published_settings() -> None:
    """IRNet, misc/imutils.py, ``crf_inference_label``."""
    assert (STEPS, CONFIDENCE) == (10, 0.7)
    assert SMOOTH == {"sxy": 3, "compat": 3}
    assert ALIKE == {"sxy": 50, "srgb": 5, "compat": 10}


def soft(labels: np.ndarray, count: int) -> np.ndarray:
    """(count, H, W) probabilities that are lower near the edges: the mean over a square of 5 x 5 pixels."""
    one = np.pad(np.eye(count)[labels], ((2, 2), (2, 2), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(one, (5, 5), axis=(0, 1))
    return np.moveaxis(windows.mean(axis=(-2, -1)), -1, 0).astype(np.float32)


def thin_scene() -> tuple[np.ndarray, np.ndarray]:
    """(12, 24) truth: a block of label 1 with a thin arm, and a photograph whose arm has nearly the color of the background."""
    truth = np.zeros((12, 24), np.uint8)
    truth[3:9, 2:10] = 1
    truth[5:7, 10:22] = 1
    pixels = np.where(truth[..., None] == 1, (230, 200, 40), (20, 40, 90)).astype(np.uint8)
    pixels[5:7, 10:22] = (24, 43, 90)
    return truth, pixels


def test_probabilities_keep_what_hard_labels_lose(exact: None) -> None:
    """Where the network is sure, the CRF keeps a thin part that looks like its surroundings."""
    truth, pixels = thin_scene()
    probabilities = np.stack([truth == 0, truth == 1]).astype(np.float32)
    found = refine_probabilities(probabilities, pixels)
    assert found.dtype == np.uint8 and found.shape == truth.shape
    hard = refine(truth, pixels)
    assert (found != truth).sum() < 0.5 * (hard != truth).sum()
    turned = refine_probabilities(probabilities.transpose(0, 2, 1), pixels.transpose(1, 0, 2))
    assert np.array_equal(turned, found.T), "rows and columns are alike"


def test_where_the_network_is_unsure_the_edge_decides(exact: None) -> None:
    labels, pixels = small_scene()
    shifted = np.where(labels == 7, 1, 0)
    shifted[8, 1] = 0
    found = refine_probabilities(soft(shifted, 3), pixels)
    expected = np.where(expected_scene() == 7, 1, 0)
    assert (found != expected).mean() < 0.3 * (shifted != expected).mean()


def test_the_published_settings_of_probabilities(exact: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepLab's, as github.com/kazuto1011/deeplab-pytorch has them; probabilities of zero are no infinite energies."""
    assert (SMOOTH_SOFT, ALIKE_SOFT) == ({"sxy": 1, "compat": 3}, {"sxy": 67, "srgb": 3, "compat": 4})
    seen: list[Any] = []
    honest = ExactCRF.setUnaryEnergy
    monkeypatch.setattr(ExactCRF, "setUnaryEnergy", lambda self, energy: seen.append(energy) or honest(self, energy))
    monkeypatch.setattr(ExactCRF, "addPairwiseGaussian", lambda self, **given: seen.append(given))
    monkeypatch.setattr(ExactCRF, "addPairwiseBilateral", lambda self, *, rgbim, **given: seen.append(given))
    refine_probabilities(np.array([[[0.0, 1.0]], [[1.0, 0.0]]]), np.zeros((1, 2, 3), np.uint8))
    energy, *kernels = seen
    assert kernels == [SMOOTH_SOFT, ALIKE_SOFT]
    assert energy.dtype == np.float32 and energy.flags.c_contiguous
    np.testing.assert_allclose(energy, [[-np.log(1e-5), 0], [0, -np.log(1e-5)]], rtol=1e-5)


def test_the_package_agrees_with_the_exact_crf() -> None:
    pytest.importorskip("pydensecrf")
    assert np.array_equal(refine(*small_scene()), expected_scene())


def test_settings_reach_the_crf(exact: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(ExactCRF, "addPairwiseGaussian", lambda self, **given: seen.append(given))
    monkeypatch.setattr(ExactCRF, "addPairwiseBilateral", lambda self, *, rgbim, **given: seen.append(given))
    honest = ExactCRF.inference
    monkeypatch.setattr(ExactCRF, "inference", lambda self, steps: seen.append(steps) or honest(self, steps))
    refine(*small_scene())
    assert seen == [SMOOTH, ALIKE, STEPS]


def read(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def test_outlines_move_to_the_edges_and_void_is_filled(scene: np.ndarray, tmp_path: Path) -> None:
    pytest.importorskip("pydensecrf")
    predicted = read(tmp_path / "predicted" / "a.png")
    found = refine(predicted, read(tmp_path / "images" / "a.png"))
    assert found.dtype == np.uint8
    assert set(np.unique(found)) == {0, 2}
    assert (found != scene).mean() < 0.2 * (predicted != scene).mean()


@pytest.mark.parametrize("label_map", [[[0, 0]], [[3, 255]], [[255, 255]]])
def test_nothing_to_choose_from(label_map: list[list[int]]) -> None:
    pytest.importorskip("pydensecrf")
    given = np.array(label_map, np.uint8)
    assert np.array_equal(refine(given, np.zeros((1, 2, 3), np.uint8)), given)


def test_the_command_scores_higher_and_says_why(scene: np.ndarray, tmp_path: Path, wsss: Callable[..., Answer]) -> None:
    pytest.importorskip("pydensecrf")
    plain = json.loads(wsss("eval", "predicted", "truth", "--classes", "dog, cat", "--json").out)
    refined = json.loads(wsss("eval", "predicted", "truth", "--classes", "dog, cat", "--crf", "--images", "images", "--json").out)
    assert plain["crf"] is None
    assert "10 steps" in refined["crf"]
    assert plain["miou"] < 0.85 < 0.95 < refined["miou"]
    assert "refined by DenseCRF" in wsss("eval", "predicted", "truth", "--classes", "dog, cat", "--crf", "--images", "images").out


def test_without_the_package(scene: np.ndarray, wsss: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("pydensecrf"):
            raise ModuleNotFoundError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    answer = wsss("eval", "predicted", "truth", "--classes", "dog, cat", "--crf", "--images", "images")
    assert answer.code == 1
    assert "--crf: needs pydensecrf" in answer.err
    assert install_line("crf") in answer.err
    assert wsss("eval", "predicted", "truth", "--classes", "dog, cat").code == 0


def test_photographs_by_name(tmp_path: Path) -> None:
    for name in ("JPEGImages/a.jpg", "JPEGImages/sub/b.PNG", "JPEGImages/c.jpg", "JPEGImages/c.webp", "other/d.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    inside = tmp_path / "JPEGImages"
    assert find_photographs(tmp_path, ("sub/b", "a", "c.webp")) == (inside / "sub/b.PNG", inside / "a.jpg", inside / "c.webp")
    with pytest.raises(WsssError, match="has no photograph of 1 of 2 label maps, for example d"):
        find_photographs(tmp_path, ("a", "d"))
    with pytest.raises(WsssError, match="expected the folder of the photographs"):
        find_photographs(tmp_path / "nowhere", ("a",))


def test_a_photograph_of_another_size_or_none(scene: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "images" / "a.png"
    with pytest.raises(StoreError, match=r"a\.png: is 2 x 1 pixels, its photograph .*images/a\.png is 80 x 60"):
        read_photograph_of(path, np.zeros((1, 2), np.uint8), Path("predicted/a.png"))
    path.write_bytes(b"no")
    with pytest.raises(StoreError, match=r"images/a\.png: "):
        read_photograph_of(path, scene, Path("predicted/a.png"))
