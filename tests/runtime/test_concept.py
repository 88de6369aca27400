"""SAM 3's stage: one encoding a photograph, shared calls, masks of what is there only. Scripted engines find colors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from wsss.batch import Boxes, Labels, Photograph
from wsss.classes import class_list
from wsss.engines.fake import FakeEngine
from wsss.errors import ClassError, NotANumber, WsssError
from wsss.export.mini import CLIP_MINI_CONTEXT, clip_mini_tokenizer
from wsss.runtime.concept import InstanceFinder, Instances, KnownMasks
from wsss.spec import AxisRange, GraphSpec, Manifest, Model, Preprocess, TensorSpec

COLORS = ("red", "green", "blue")
SIDE, GRID, QUERIES = 8, 4, 3
LENGTH = CLIP_MINI_CONTEXT
Feeds = Mapping[str, np.ndarray]


def spec(inputs: dict[str, tuple[object, ...]], outputs: dict[str, tuple[object, ...]], **axes: int) -> GraphSpec:
    """Tensors by name, whose last entry is the dtype; axes by their largest length."""

    def tensors(named: dict[str, tuple[object, ...]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name, shape[:-1], shape[-1]) for name, shape in named.items())  # type: ignore[arg-type]

    ranges = {name: AxisRange(1, 1, most) for name, most in axes.items()}
    return GraphSpec(file="x.onnx", inputs=tensors(inputs), outputs=tensors(outputs), axes=ranges, opset=18)


MAPS: dict[str, tuple[object, ...]] = {
    "features_2x": ("images", 3, 2 * GRID, 2 * GRID, "float32"),
    "features_4x": ("images", 3, 4 * GRID, 4 * GRID, "float32"),
}
GRAPHS = {
    "text": spec(
        {"tokens": ("phrases", LENGTH, "int64"), "mask": ("phrases", LENGTH, "bool")},
        {"features": ("phrases", LENGTH, 3, "float32")},
        phrases=2,
    ),
    "vision": spec(
        {"pixels": ("batch", SIDE, SIDE, 3, "uint8")},
        {"embedding": ("batch", GRID**2, 3, "float32")} | {name: ("batch", *shape[1:]) for name, shape in MAPS.items()},
        batch=2,
    ),
    "detector": spec(
        {
            "embedding": ("images", GRID**2, 3, "float32"),
            "text": ("phrases", LENGTH, 3, "float32"),
            "mask": ("phrases", LENGTH, "bool"),
            "image": ("phrases", "int64"),
        },
        {
            "logits": ("phrases", QUERIES, "float32"),
            "presence": ("phrases", "float32"),
            "boxes": ("phrases", QUERIES, 4, "float32"),
            "queries": ("phrases", QUERIES, 3, "float32"),
            "encoded": ("phrases", GRID**2, 3, "float32"),
        },
        images=2,
        phrases=4,
    ),
    "outline": spec(
        {"encoded": ("phrases", GRID**2, 3, "float32"), "queries": ("phrases", QUERIES, 3, "float32")}
        | MAPS
        | {"row": ("outlined", "int64"), "image": ("outlined", "int64"), "query": ("outlined", "slots", "int64")}
        | {"pick": ("boxes", "int64")},
        {"logits": ("boxes", 4 * GRID, 4 * GRID, "float32")},
        images=2,
        phrases=4,
        outlined=2,
        slots=2,
        boxes=4,
    ),
}


def read_phrases(feeds: Feeds) -> Feeds:
    """A color in every token that counts: that of the phrase's first word."""
    ids = {clip_mini_tokenizer().encode(color).ids[1]: number for number, color in enumerate(COLORS)}
    features = np.zeros((*feeds["tokens"].shape, 3), np.float32)
    for row, (tokens, mask) in enumerate(zip(feeds["tokens"], feeds["mask"], strict=True)):
        assert mask.sum() == (tokens == tokens.max()).argmax() + 1  # up to the end mark
        if tokens[1] in ids:
            features[row, mask, ids[tokens[1]]] = 1
    return {"features": features}


def see(feeds: Feeds) -> Feeds:
    """Which colors are in each cell."""
    pixels = feeds["pixels"].reshape(-1, GRID, SIDE // GRID, GRID, SIDE // GRID, 3).max(axis=(2, 4)) > 127
    cells = pixels.reshape(len(pixels), GRID**2, 3).astype(np.float32)
    fine = {name: np.zeros((len(cells), *shape[1:-1]), np.float32) for name, shape in MAPS.items()}  # type: ignore[arg-type]
    for maps in fine.values():
        maps += np.arange(1, len(cells) + 1)[:, None, None, None]  # the image's place in the call
    return {"embedding": cells, **fine}


def detect(feeds: Feeds) -> Feeds:
    """Query 1 finds all cells of the color, query 2 the same with a lower score, query 0 nothing."""
    rows = len(feeds["image"])
    out = {
        name: np.zeros((rows, *each.shape[1:]), np.float32) for name, each in ((t.name, t) for t in GRAPHS["detector"].outputs)
    }  # type: ignore[arg-type]
    out["presence"] = np.full(rows, -10, np.float32)
    out["logits"] -= 10
    for row, image in enumerate(feeds["image"]):
        color = feeds["text"][row][feeds["mask"][row]].mean(axis=0)
        there = (feeds["embedding"][image] @ color > 0.5).reshape(GRID, GRID)
        if not there.any():
            continue
        y, x = np.nonzero(there)
        box = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) / GRID
        out["boxes"][row] = box
        out["logits"][row, 1:], out["presence"][row] = (4, 3), 4
        out["encoded"][row, :, 0] = there.ravel()
        out["encoded"][row, :, 1] = image + 1
        out["queries"][row] = np.arange(QUERIES)[:, None]
    return out


def outline(feeds: Feeds) -> Feeds:
    """The cells of the row: 5 inside and -5 outside; the query's number is in the corner."""
    made = []
    for pick in feeds["pick"]:
        entry, slot = divmod(int(pick), feeds["query"].shape[1])
        row, query = int(feeds["row"][entry]), int(feeds["query"][entry, slot])
        assert query // QUERIES == row
        assert feeds["features_4x"][feeds["image"][entry]].max() == feeds["encoded"][row, 0, 1]  # of this row's image
        cells = feeds["encoded"][row, :, 0].reshape(GRID, GRID).repeat(4, 0).repeat(4, 1)
        mask = 10 * cells - 5
        mask[0, 0] = feeds["queries"].reshape(-1, 3)[query, 0] - 100
        made.append(mask)
    return {"logits": np.array(made, np.float32)}


SCRIPTS = {"text": read_phrases, "vision": see, "detector": detect, "outline": outline}


@pytest.fixture
def model(tmp_path: Path) -> Model:
    clip_mini_tokenizer().save(str(tmp_path / "tokenizer.json"))
    end = max(clip_mini_tokenizer().encode("red").ids)
    preprocess = Preprocess(
        resize="squash",
        longest_px=SIDE,
        filter="bilinear",
        canvases=((SIDE, SIDE),),
        mean=(0, 0, 0),
        std=(1, 1, 1),
        source="",
    )
    settings = {"context_length": LENGTH, "pad": 0, "end": end, "queries": QUERIES, "box_threshold": 0.5, "logits_side": 4 * GRID}
    manifest = Manifest(
        family="sam3",
        variant="fake",
        preprocess=preprocess,
        graphs=GRAPHS,
        settings=settings,
        tokenizer="tokenizer.json",
        weights={},
        tools={},
    )
    return Model(tmp_path, manifest)


class Finder:
    """The stage with engines that record their calls."""

    def __init__(self, model: Model, *classes: str, **settings: object) -> None:
        self.classes = class_list(classes or COLORS)
        self.engines = {name: FakeEngine(GRAPHS[name], script) for name, script in SCRIPTS.items()}
        engines = (self.engines[name] for name in ("text", "vision", "detector", "outline"))
        self.stage = InstanceFinder(model, *engines, self.classes, **settings)  # type: ignore[arg-type]
        self.segment = KnownMasks(model)

    def __call__(self, photos: list[Photograph], present: np.ndarray | None = None) -> tuple[Instances, Labels]:
        there = np.ones((len(photos), len(self.classes)), bool) if present is None else present
        labels = Labels(there.astype(np.float32), there.copy())
        found = self.stage(photos, labels)
        assert isinstance(found, Instances)
        return found, labels

    def rows(self, graph: str, name: str) -> list[int]:
        return [call[name][0] for call in self.engines[graph].calls]


def photo(**colors: tuple[int, int, int, int]) -> Photograph:
    """Black, (16, 32), with rectangles (x0, y0, x1, y1) in eighths of its sides."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    for color, (x0, y0, x1, y1) in colors.items():
        pixels[2 * y0 : 2 * y1, 4 * x0 : 4 * x1, COLORS.index(color)] = 255
    return Photograph(name="x.png", pixels=pixels)


TWO = photo(red=(0, 0, 4, 4), green=(4, 4, 8, 8))
ONE = photo(blue=(2, 2, 6, 6))
NONE = photo()


def test_boxes_and_masks_are_those_of_the_photograph(model: Model) -> None:
    finder = Finder(model)
    found, labels = finder([TWO, ONE, NONE])
    assert found.image.tolist() == [0, 0, 1] and found.label.tolist() == [1, 2, 3]
    np.testing.assert_allclose(found.xyxy_image, [[0, 0, 16, 8], [16, 8, 32, 16], [8, 4, 24, 12]])
    np.testing.assert_allclose(found.score, (1 / (1 + np.exp(-4.0))) ** 2, rtol=1e-6)
    masks = finder.segment([TWO, ONE, NONE], found)
    assert masks.frames[2] is None and masks.quality.tolist() == [1, 1, 1]
    assert masks.part[0] == masks.part[1], "of one call"
    for row in range(3):
        x0, y0, x1, y1 = (found.xyxy_image[row] / [2, 1, 2, 1]).astype(int)  # of the logits' 16 x 16 pixels
        mask = np.asarray(masks.logits[masks.part[row]])[masks.row[row]]
        want = np.zeros((16, 16), bool)
        want[y0:y1, x0:x1] = True
        assert ((mask > 0) == want)[1:, 1:].all()
        assert mask[0, 0] == 1 - 100  # the first query, of the two with the same box
    assert labels.present.all(), "CLIP decided"


def test_a_photograph_is_encoded_once_and_phrases_of_several_share_a_call(model: Model) -> None:
    finder = Finder(model)
    finder([TWO, ONE, TWO])
    assert finder.rows("vision", "pixels") == [2, 1]
    assert finder.rows("detector", "text") == [4, 2, 3]  # six phrases of two photographs, three of one
    assert finder.rows("text", "tokens") == [2, 1]


def test_only_phrases_that_are_asked_for_are_looked_for(model: Model) -> None:
    finder = Finder(model)
    present = np.array([[False, False, False], [True, False, True]])
    found, _ = finder([ONE, TWO], present)
    assert found.label.tolist() == [1] and found.image.tolist() == [1]
    assert finder.rows("vision", "pixels") == [1] and finder.rows("detector", "text") == [2]
    assert finder.rows("outline", "row") == [1], "a class that is not there costs no mask"
    finder = Finder(model)
    assert len(finder([TWO], np.zeros((1, 3), bool))[0]) == 0
    assert finder.engines["vision"].calls == []


def test_the_order_of_photographs_does_not_matter(model: Model) -> None:
    photos = [TWO, NONE, ONE, TWO, ONE]
    one, _ = Finder(model)(photos)
    other, _ = Finder(model)(photos[::-1])
    assert (one.image == np.sort(one.image)).all()
    back = np.lexsort((other.label, 4 - other.image))
    assert (4 - other.image[back]).tolist() == one.image.tolist() and other.label[back].tolist() == one.label.tolist()
    np.testing.assert_array_equal(other.xyxy_image[back], one.xyxy_image)


def test_it_decides_about_the_classes_if_nobody_else_does(model: Model) -> None:
    _, labels = Finder(model, decides=True)([TWO, NONE])
    assert labels.present.tolist() == [[True, True, False], [False, False, False]]
    np.testing.assert_allclose(labels.score, 1 / (1 + np.exp(-np.array([[4, 4, -10], [-10, -10, -10]]))), rtol=1e-5)


def test_the_threshold_is_of_the_product(model: Model) -> None:
    best, second = (1 / (1 + np.exp(-4.0))) ** 2, 1 / (1 + np.exp(-4.0)) / (1 + np.exp(-3.0))
    everything = {"nms": 1.0, "nms_across": 1.0}
    assert len(Finder(model, threshold=best + 1e-6, **everything)([ONE])[0]) == 0
    assert len(Finder(model, threshold=best - 1e-6, **everything)([ONE])[0]) == 1
    found, _ = Finder(model, threshold=second - 1e-6, **everything)([ONE])
    np.testing.assert_allclose(found.score, [best, second], rtol=1e-6)
    finder = Finder(model, threshold=0.0, **everything)
    found, _ = finder([ONE])  # nothing is left out but boxes without an area
    assert len(found) == 3
    (call,) = finder.engines["outline"].calls
    assert call["query"] == (2, 2), "one row twice, as it has more queries than slots"


def test_calls_have_no_more_rows_than_the_graph_takes(model: Model) -> None:
    finder = Finder(model, threshold=0.96)  # one query of each phrase
    found, _ = finder([photo(red=(0, 0, 2, 2), green=(2, 2, 4, 4), blue=(4, 4, 6, 6))])
    assert found.label.tolist() == [1, 2, 3]
    assert finder.rows("outline", "row") == [2, 1] and finder.rows("outline", "pick") == [2, 1]


def test_synonyms_are_one_class_and_negatives_take_boxes(model: Model) -> None:
    finder = Finder(model, "thing: red, green", "blue")
    found, _ = finder([TWO, ONE])
    assert found.label.tolist() == [1, 1, 2]
    finder = Finder(model, "thing: red, green", "blue", "!red disc")
    with_negative, _ = finder([TWO])
    assert with_negative.label.tolist() == [1, 1], "a negative that is no better takes nothing"
    lower = np.array([[4.0, 3.0]])

    def better_negative(feeds: Feeds) -> Feeds:
        out = dict(detect(feeds))
        longer = feeds["mask"].sum(axis=1) > 3  # the negative's
        out["logits"][~longer, 1:] -= lower
        return out

    finder = Finder(model, "red", "green", "!red disc", threshold=0.0, nms=0.5)
    finder.engines["detector"].script = better_negative
    found, labels = finder([TWO])
    assert found.label.tolist() == [2]
    assert labels.score.shape == (1, 2)


def test_halves_of_a_batch_keep_their_masks(model: Model) -> None:
    found, _ = Finder(model)([TWO, ONE])
    half = found.keep(found.image == 1)
    assert half.label.tolist() == [3]
    mask = np.asarray(half.logits[half.part[0]])[half.row[0]]
    assert (mask[1:, 1:] > 0).sum() == 64


@pytest.mark.parametrize("output", ["logits", "presence", "boxes"])
def test_results_that_are_nan_are_refused(model: Model, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflowing(feeds: Feeds) -> Feeds:
        found = detect(feeds)
        found[output][feeds["image"] == 1] = np.nan
        return found

    monkeypatch.setitem(SCRIPTS, "detector", overflowing)
    Finder(model)([ONE])
    with pytest.raises(NotANumber, match="^sam3/detector: its output is NaN for photograph 2 of a batch"):
        Finder(model)([ONE, TWO])


def test_boxes_of_others_have_no_masks(model: Model) -> None:
    with pytest.raises(WsssError, match="SAM 3 gives the masks of what it finds itself"):
        KnownMasks(model)([ONE], Boxes(np.ones((1, 4), np.float32), np.ones(1, np.float32), np.ones(1, int), np.zeros(1, int)))


def test_classes_that_are_equal_once_cut_are_refused(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    long = "red " * LENGTH
    with pytest.raises(ClassError, match="have the same tokens in SAM 3's tokenizer"):
        Finder(model, f"{long}disc", f"{long}ring")
    assert f"SAM 3 reads only {LENGTH} tokens and cuts the end of 2 prompts" in caplog.text


def test_the_bundles_threshold_counts_unless_another_is_given(model: Model) -> None:
    assert Finder(model).stage.threshold == 0.5 and Finder(model, threshold=0.2).stage.threshold == 0.2
    other = Model(model.folder, replace(model.manifest, settings={**model.manifest.settings, "box_threshold": 0.9999}))
    assert len(Finder(other)([ONE])[0]) == 0
