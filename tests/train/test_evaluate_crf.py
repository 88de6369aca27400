"""Refinement by a CRF: asked for, said, and never with a photograph of another size."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from wsss.errors import StoreError, WsssError
from wsss.train.evaluate_crf import find_photographs, read_photograph_of, refine

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
    refined = json.loads(wsss("eval", "predicted", "truth", "--classes", "dog, cat", "--crf", "images", "--json").out)
    assert plain["crf"] is None
    assert "10 steps" in refined["crf"]
    assert plain["miou"] < 0.85 < 0.95 < refined["miou"]
    assert "refined by DenseCRF" in wsss("eval", "predicted", "truth", "--classes", "dog, cat", "--crf", "images").out


def test_without_the_package(scene: np.ndarray, wsss: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("pydensecrf"):
            raise ModuleNotFoundError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    answer = wsss("eval", "predicted", "truth", "--classes", "dog, cat", "--crf", "images")
    assert answer.code == 1
    assert "--crf: needs pydensecrf" in answer.err
    assert "pip install 'wsss[crf]'" in answer.err
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
    with pytest.raises(StoreError, match=r"--crf .*images/a\.png: "):
        read_photograph_of(path, scene, Path("predicted/a.png"))
