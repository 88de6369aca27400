"""The resizing graph: the pixels of Pillow, for photographs of any size, on canvases and as views."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wsss.engines.ort import OrtEngine
from wsss.errors import ParityError
from wsss.export import resize
from wsss.export.family import Feeds
from wsss.export.resize import Resize, resize_graph, shares
from wsss.export.to_onnx import WeightFile, export_onnx
from wsss.export.verify import gate
from wsss.frame import frame_for
from wsss.runtime.tag import view_windows
from wsss.spec import AxisRange, Precision, Preprocess

PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
COMMON = {"mean": (0, 0, 0), "std": (1, 1, 1), "source": "test"}
CLIP = Preprocess(resize="squash", longest_px=224, filter="bicubic", canvases=((224, 224),), **COMMON)  # type: ignore[arg-type]
SAM = Preprocess(resize="longest", longest_px=256, filter="bilinear", canvases=((256, 256),), **COMMON)  # type: ignore[arg-type]
VIEWS = AxisRange(1, 2, 3)


def photo_of(pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([pixels, np.full((*pixels.shape[:2], 1), 77, np.uint8)], axis=2)


def resized(preprocess: Preprocess, pixels: np.ndarray, windows: list[tuple[int, int, int, int]], size: tuple[int, int]) -> Feeds:
    """The windows, by the module and by two calls of Pillow, rows first and columns first."""
    module = Resize(preprocess.canvases[0], preprocess.filter)
    rows = len(windows)
    found = {}
    for columns_first in (False, True):
        out = module(
            torch.from_numpy(photo_of(pixels)),
            torch.tensor(windows),
            torch.tensor([size] * rows),
            torch.tensor([columns_first] * rows),
        )
        found[f"got {columns_first}"] = out.numpy()
        found[f"want {columns_first}"] = np.stack(
            [
                resize.by_pillow(photo_of(pixels), window, size, columns_first, preprocess.canvases[0], preprocess.filter)
                for window in windows
            ]
        )
    return found


SIZES = [(1, 1), (1, 300), (300, 1), (2, 3), (224, 224), (256, 256), (375, 500), (333, 500), (427, 640), (320, 480), (100, 101)]


@pytest.mark.parametrize("height, width", SIZES)
def test_bilinear_pixels_are_exactly_pillows(height: int, width: int) -> None:
    """White noise, which has exact halves between gray levels at simple ratios, for example 320 to 256."""
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    size = frame_for(SAM, height, width).valid
    found = resized(SAM, pixels, [(0, height, 0, width), (height // 3, height, 0, width // 2 + 1)], size)
    for order in (False, True):
        assert np.array_equal(found[f"got {order}"], found[f"want {order}"])


@pytest.mark.parametrize("height, width", [*SIZES, (1501, 1999)])
def test_bicubic_pixels_are_pillows_to_a_gray_level(height: int, width: int) -> None:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = resized(CLIP, pixels, view_windows(height, width, (1, 2)), (224, 224))
    for order in (False, True):
        share, worst = resize.share_of_other_levels(
            {"pixels": found[f"got {order}"]}, {"pixels": found[f"want {order}"]}, "pixels"
        )
        assert worst <= 1
        assert share <= 1e-3


def test_a_large_photograph_is_pillows() -> None:
    """With 70 pixels under the filter, sums need more bits."""
    pixels = np.random.default_rng(0).integers(0, 256, (3000, 700, 3), dtype=np.uint8)
    found = resized(SAM, pixels, [(0, 3000, 0, 700)], (43, 10))
    for order in (False, True):
        assert np.array_equal(found[f"got {order}"], found[f"want {order}"])


def test_the_edge_of_a_window_does_not_mix_with_what_is_around_it() -> None:
    pixels = np.zeros((300, 300, 3), np.uint8)
    pixels[100:200, 50:250] = 200
    for preprocess, size in ((CLIP, (224, 224)), (SAM, (30, 256))):
        found = resized(preprocess, pixels, [(100, 200, 50, 250)], size)
        got = found["got False"][0]
        assert (got[: size[0], : size[1]] == 200).all()
        assert not got[size[0] :].any()
        assert not got[:, size[1] :].any()


def test_shares_are_rounded_quotients() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 8192, (200, 50)).astype(np.int32)
    values[rng.random(values.shape) < 0.5] = 0
    values[0] = 0
    high, low = (half.numpy().astype(np.int64) for half in shares(torch.from_numpy(values)))
    total = np.maximum(values.sum(axis=1, keepdims=True), 1).astype(np.int64)
    want = (values.astype(np.int64) * 2**23 + total) // (2 * total)
    assert np.abs(2048 * high + low - want).max() <= 1, "a quotient within float32's rounding of a half may go either way"
    assert (2048 * high + low == want).mean() > 0.999
    assert np.abs(low).max() <= 2048


@pytest.mark.parametrize("preprocess", [CLIP, SAM], ids=["bicubic", "bilinear"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_exported_graph_passes_the_gate(preprocess: Preprocess, precision: Precision, tmp_path: Path) -> None:
    """Also in half precision: gray levels are computed in float32."""
    graph = resize_graph(preprocess, preprocess.canvases[0], views=VIEWS).at(precision)
    reasons, _ = export_onnx(graph, tmp_path / "resize.onnx", WeightFile(tmp_path / "weights.data"), precision=precision)
    engine = OrtEngine(tmp_path / "resize.onnx", graph.spec("resize.onnx", 18))
    parity = gate(graph, engine, engine_name="ort", reference_name="Pillow", where="test")
    assert parity.worst("pixels").worst <= (0 if preprocess is SAM else 1)
    assert bool(reasons) == (precision == "fp16")


def test_the_gate_notices_another_filter(tmp_path: Path) -> None:
    graph = resize_graph(CLIP, (224, 224), views=VIEWS)
    wrong = resize_graph(SAM, (224, 224), views=VIEWS)
    export_onnx(wrong, tmp_path / "resize.onnx", WeightFile(tmp_path / "weights.data"))
    engine = OrtEngine(tmp_path / "resize.onnx", wrong.spec("resize.onnx", 18))
    with pytest.raises(ParityError, match="share of other levels"):
        gate(graph, engine, engine_name="ort", reference_name="Pillow", where="test")


def test_photographs_are_pillows(photographs: list[Path]) -> None:
    """Of 71 photographs of PASCAL VOC, a few: `benchmarks/studies/parity/resize_graph.py` compares all."""
    for path in photographs[::24]:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        height, width = pixels.shape[:2]
        for preprocess, windows in ((SAM, [(0, height, 0, width)]), (CLIP, view_windows(height, width, (1, 2)))):
            found = resized(preprocess, pixels, windows, frame_for(preprocess, height, width).valid)
            for order in (False, True):
                difference = np.abs(found[f"got {order}"].astype(int) - found[f"want {order}"])
                assert difference.max() <= (0 if preprocess is SAM else 1)
                assert (difference == 0).mean() >= 0.999


def test_the_documents_say_which_photographs_the_host_resizes() -> None:
    root = Path(__file__).resolve().parents[2]
    for name in ("ARCHITECTURE.md", "docs/tensorrt.md"):
        assert f"with a side above {resize.SIDE_PX.max:,} pixels" in (root / name).read_text(encoding="utf-8"), name


def test_samples_have_windows_that_do_not_fill_the_canvas() -> None:
    feeds = resize.sample_windows(SAM, (256, 256), 5, 0)
    assert [(size < 256).any() for size in feeds["size"][1:]] == [False, True, False, True]
