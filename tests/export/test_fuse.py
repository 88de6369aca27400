"""The fusing graph: upsampling as SAM does it, and who owns which pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam

from wsss.engines.ort import OrtEngine
from wsss.export.sam import fuse
from wsss.export.to_onnx import WeightFile, export_onnx
from wsss.frame import frame_for
from wsss.spec import AxisRange, Preprocess

SIDE, LOGITS = 1024, 256
PREPROCESS = Preprocess(
    resize="longest", longest_px=SIDE, filter="bilinear", canvases=((SIDE, SIDE),), mean=(0, 0, 0), std=(1, 1, 1), source="test"
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> OrtEngine:
    folder = tmp_path_factory.mktemp("fuse")
    graph = fuse.fuse_graph(PREPROCESS, logits_side=LOGITS, masks=AxisRange(1, 8, 16))
    export_onnx(graph, folder / "fuse.onnx", WeightFile(folder / "weights.data"))
    return OrtEngine(folder / "fuse.onnx", graph.spec("fuse.onnx", 18))


class Canvas:
    """The one thing ``Sam.postprocess_masks`` asks of its model."""

    class image_encoder:
        img_size = SIDE


@pytest.mark.parametrize(
    ("height", "width"),
    [(375, 500), (500, 333), (1, 7), (333, 1), (1024, 1024), (1023, 1025), (2001, 1501), (77, 1311), (256, 256), (4001, 3)],
)
def test_two_matrices_are_sams_two_resizes(height: int, width: int) -> None:
    logits = torch.from_numpy(np.random.default_rng(height).uniform(-20, 20, (1, 1, LOGITS, LOGITS))).float()
    frame = frame_for(PREPROCESS, height, width)
    want = Sam.postprocess_masks(Canvas(), logits, frame.valid, (height, width))[0, 0].numpy()
    got = frame.mask_rows(LOGITS) @ logits[0, 0].numpy() @ frame.mask_columns(LOGITS).T
    # White noise of +-20 is the worst case for an interpolation; without fused multiply-add the difference is up to 3e-4.
    assert np.abs(got - want).max() <= 1e-3


@pytest.mark.parametrize(
    ("z", "score", "label", "margin", "want"),
    [
        pytest.param([[0.0, -2.0, -50.0]], [0.8], [1], 0.1, [1 - 0.4, 1 - 0.8 * 0.1192, 1.0], id="background: below any claim"),
        pytest.param([[2.0, 50.0]], [0.6], [1], 0.1, [0.6 * 0.8808, 0.6], id="one mask: its value"),
        pytest.param([[50.0], [50.0]], [0.9, 0.4], [1, 2], 0.1, [0.5], id="a rival of another class"),
        pytest.param([[50.0], [50.0]], [0.9, 0.4], [1, 1], 0.1, [0.9], id="of the same class it is no rival"),
        pytest.param([[50.0], [50.0]], [0.9, 0.85], [1, 2], 0.1, [0.0], id="void"),
        pytest.param([[50.0], [-0.1]], [0.5, 0.9], [1, 2], 0.1, [0.5], id="a mask that does not claim is no rival"),
    ],
)
def test_confidence(z: list[list[float]], score: list[float], label: list[int], margin: float, want: list[float]) -> None:
    out = fuse.vote(torch.tensor(z)[:, None], torch.tensor(score), torch.tensor(label), torch.tensor([margin]))
    assert out[3].dtype == torch.uint8
    assert np.abs(out[3][0].numpy() / 255 - np.array(want)).max() <= 0.51 / 255


def voted(
    z: list[list[float]], score: list[float], label: list[int], margin: float = 0.1
) -> tuple[list[int], list[int], list[int]]:
    """`vote` on an image of one row; ``z`` is one list of logits a mask."""
    out = fuse.vote(torch.tensor(z)[:, None], torch.tensor(score), torch.tensor(label), torch.tensor([margin]))
    also = fuse.fused_by_sorting(np.array(z, np.float32)[:, None], np.array(score, np.float32), np.array(label), margin)
    for ours, theirs in zip(out, (also[name] for name in ("label_map", "area", "won", "confidence")), strict=True):
        assert ours.tolist() == theirs.tolist()
    return out[0][0].tolist(), out[1].tolist(), out[2].tolist()


@pytest.mark.parametrize(
    ("z", "score", "label", "margin", "want"),
    [
        pytest.param([[-1.0, -9.0, 0.0]], [0.9], [3], 0.1, ([0, 0, 0], [0], [0]), id="no claim, the edge included"),
        pytest.param([[5.0, -1.0, 1e-6]], [0.9], [3], 0.1, ([3, 0, 3], [2], [2]), id="one mask"),
        pytest.param([[4.0, 4.0], [4.0, -4.0]], [0.9, 0.5], [1, 2], 0.1, ([1, 1], [2, 1], [2, 0]), id="the better score"),
        pytest.param([[0.1, 9.0], [9.0, 0.1]], [0.8, 0.8], [1, 2], 0.1, ([2, 1], [2, 2], [1, 1]), id="the surer mask"),
        pytest.param([[4.0], [4.0]], [0.90, 0.85], [1, 2], 0.1, ([255], [1, 1], [0, 0]), id="within the margin"),
        pytest.param([[4.0], [4.0]], [0.90, 0.85], [1, 2], 0.05, ([1], [1, 1], [1, 0]), id="beyond the margin"),
        pytest.param([[4.0], [4.0]], [0.9, 0.9], [2, 1], 0.0, ([2], [1, 1], [1, 0]), id="a tie without margin: the first"),
        pytest.param([[4.0], [4.0]], [0.9, 0.9], [2, 2], 0.1, ([2], [1, 1], [1, 0]), id="a tie of one label: the first"),
        pytest.param(
            [[4.0], [4.0], [4.0]],
            [0.9, 0.88, 0.3],
            [2, 2, 7],
            0.1,
            ([2], [1, 1, 1], [1, 0, 0]),
            id="the rival is of another label",
        ),
        pytest.param([[4.0], [-4.0]], [0.5, 0.5], [1, 2], 1.0, ([1], [1, 0], [1, 0]), id="no rival, any margin"),
    ],
)
def test_who_owns_a_pixel(
    z: list[list[float]], score: list[float], label: list[int], margin: float, want: tuple[list[int], list[int], list[int]]
) -> None:
    assert voted(z, score, label, margin) == want


@pytest.mark.parametrize(
    ("z", "score", "label", "margin", "names", "area", "won"),
    [
        pytest.param([-4.0], [0.9], [3], 0.1, {0}, [(0, 0)], [(0, 0)], id="outside"),
        pytest.param([4.0], [0.9], [3], 0.1, {3}, [(1, 1)], [(1, 1)], id="inside"),
        pytest.param([5e-4], [0.9], [3], 0.1, {0, 3}, [(0, 1)], [(0, 1)], id="just inside"),
        pytest.param([-5e-4], [0.9], [3], 0.1, {0, 3}, [(0, 1)], [(0, 1)], id="just outside"),
        pytest.param([2e-3], [0.9], [3], 0.1, {3}, [(1, 1)], [(1, 1)], id="inside by more than rounding"),
        pytest.param([-2e-3], [0.9], [3], 0.1, {0}, [(0, 0)], [(0, 0)], id="outside by more than rounding"),
        pytest.param([5e-4, 4], [0.9, 0.3], [1, 2], 0.1, {1, 2}, [(0, 1), (1, 1)], [(0, 1), (0, 1)], id="an edge over another"),
        pytest.param(
            [5e-4, 4], [0.6, 0.3], [1, 2], 0.1, {2, 255}, [(0, 1), (1, 1)], [(0, 0), (0, 1)], id="an edge that contests"
        ),
        pytest.param([4, 4], [0.9, 0.81], [1, 2], 0.1, {1, 255}, [(1, 1)] * 2, [(0, 1), (0, 0)], id="at the margin"),
        pytest.param([4, 4], [0.9, 0.85], [1, 2], 0.1, {255}, [(1, 1)] * 2, [(0, 0)] * 2, id="within the margin"),
        pytest.param([4, 4], [0.9, 0.80], [1, 2], 0.1, {1}, [(1, 1)] * 2, [(1, 1), (0, 0)], id="beyond the margin"),
        pytest.param([4, 4], [0.9, 0.9], [2, 2], 0.1, {2}, [(1, 1)] * 2, [(0, 1)] * 2, id="two of one label"),
        pytest.param([4, 4], [0.9, 0.8], [2, 2], 0.1, {2}, [(1, 1)] * 2, [(1, 1), (0, 0)], id="the better of one label"),
        pytest.param([4, 4, 4], [0.9, 0.2, 0.3], [1, 2, 3], 0.1, {1}, [(1, 1)] * 3, [(1, 1), (0, 0), (0, 0)], id="three"),
    ],
)
def test_what_rounding_allows(
    z: list[float],
    score: list[float],
    label: list[int],
    margin: float,
    names: set[int],
    area: list[tuple[int, int]],
    won: list[tuple[int, int]],
) -> None:
    masks = np.array(z)[:, None, None], np.full(len(z), 1e-3), np.float32(score), np.array(label), margin
    fused = fuse.fused_by_sorting(masks[0], *masks[2:])["label_map"]
    ties = fuse.near_ties(*masks, fused)
    assert set(ties["label_map.options"].ravel().tolist()) == names
    assert list(zip(*ties["area.range"].tolist(), strict=True)) == area
    assert list(zip(*ties["won.range"].tolist(), strict=True)) == won


def test_rounding_grows_with_the_logits() -> None:
    """A sum that has a large term is rounded as that is: next to it, 0.05 may be on either side of the edge."""
    graph = fuse.fuse_graph(PREPROCESS, logits_side=LOGITS, masks=AxisRange(1, 8, 16))
    feeds = graph.sample(1, 1)
    feeds["logits"] = np.full_like(feeds["logits"], 0.05)
    for large, names in ((8, {1}), (2**14, {0, 1})):
        feeds["logits"][:, 0, 0], feeds["label"] = large, np.array([1])
        options = graph.reference(feeds, {})["label_map.options"]
        assert set(options[:, -1, -1].tolist()) == names


def test_rounding_decides_few_pixels_of_what_the_gate_feeds() -> None:
    """Or the gate would prove nothing."""
    graph = fuse.fuse_graph(PREPROCESS, logits_side=LOGITS, masks=AxisRange(1, 8, 16))
    for picked in (1, 2, 16):
        want = graph.reference(graph.sample(picked, 1), {})
        assert (want["label_map.options"] != want["label_map"]).any(axis=0).mean() < 1e-3
        lowest, highest = want["confidence.range"]
        assert (highest - lowest > 1.1).mean() < 1e-3
        assert (want["area.range"][1] - want["area.range"][0] < 1e-3 * want["label_map"].size).all()


def test_void_and_labels_occur_in_what_the_gate_feeds() -> None:
    graph = fuse.fuse_graph(PREPROCESS, logits_side=LOGITS, masks=AxisRange(1, 8, 16))
    feeds = graph.sample(16, 1)
    found = graph.reference(feeds, {})["label_map"]
    assert set(np.unique(found)) == {0, 1, 2, 3, 4, 255}


def test_some_masks_of_what_the_gate_feeds_are_not_picked() -> None:
    """Or a graph that ignored ``pick`` would pass."""
    feeds = fuse.fuse_graph(PREPROCESS, logits_side=LOGITS, masks=AxisRange(1, 8, 16)).sample(5, 1)
    assert len(feeds["logits"]) == 7
    assert feeds["pick"].tolist() != list(range(5))


@pytest.mark.parametrize("picked", [1, 5, 16])
def test_graph_equals_its_reference(engine: OrtEngine, picked: int) -> None:
    graph = fuse.fuse_graph(PREPROCESS, logits_side=LOGITS, masks=AxisRange(1, 8, 16))
    feeds = graph.sample(picked, 4)
    found = {name: np.asarray(value) for name, value in engine(feeds).items()}
    want = graph.reference(feeds, found)
    assert found["label_map"].dtype == np.uint8
    assert all(allowed.measure(found, want, name) == (0, 0) for name, allowed in graph.tolerance.items())
    assert found["won"].sum() == ((found["label_map"] > 0) & (found["label_map"] < 255)).sum()


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_chunks_of_rows_give_the_same_label_map(engine: OrtEngine, chunk: int) -> None:
    """But for ties: a product of fewer rows may round otherwise."""
    graph = fuse.fuse_graph(PREPROCESS, logits_side=LOGITS, masks=AxisRange(1, 8, 16))
    feeds = graph.sample(5, 9)
    rows = feeds["rows"]
    parts = [engine(feeds | {"rows": rows[start : start + chunk]}) for start in range(0, len(rows), chunk)]
    found = {count: np.sum([np.asarray(part[count]) for part in parts], axis=0) for count in ("area", "won")}
    found |= {each: np.concatenate([np.asarray(part[each]) for part in parts]) for each in ("label_map", "confidence")}
    want = graph.reference(feeds, found)
    assert all(allowed.measure(found, want, name) == (0, 0) for name, allowed in graph.tolerance.items())
