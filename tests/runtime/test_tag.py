"""Tags: views cover the image, probabilities are the documented rules, prompts are averaged as CLIP's recipe says."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from wsss.classes import ClassList, class_list
from wsss.engines.fake import FakeEngine
from wsss.errors import BundleError, ClassError
from wsss.pixels.pictures import picture_of
from wsss.runtime.tag import Tagger, embed_prompts, resized_views, shortest_sides, view_windows
from wsss.runtime.text import open_tokenizer
from wsss.spec import AxisRange, GraphSpec, Model

if TYPE_CHECKING:
    from ..conftest import World


@pytest.fixture
def spoken(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Lets caplog hear what the command line would print."""
    monkeypatch.setattr(logging.getLogger("wsss"), "propagate", True)
    caplog.set_level(logging.INFO, "wsss")


def with_settings(model: Model, **settings: object) -> Model:
    manifest = replace(model.manifest, settings={**model.manifest.settings, **settings})
    return Model(model.folder, manifest)


def tagger(world: World, classes: ClassList | None = None, threshold: float | None = None, **settings: object) -> Tagger:
    model = with_settings(world.model("clip"), **settings)
    return Tagger(
        model, world.engine("clip", "image"), world.engine("clip", "text"), classes or world.classes, threshold=threshold
    )


@pytest.mark.parametrize(
    ("levels", "windows"),
    [
        ((), []),
        ((1,), [(0, 30, 0, 60)]),
        ((2,), [(0, 20, 0, 40), (0, 20, 20, 60), (10, 30, 0, 40), (10, 30, 20, 60)]),
    ],
)
def test_windows(levels: tuple[int, ...], windows: list[tuple[int, int, int, int]]) -> None:
    assert view_windows(30, 60, levels) == windows


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (2, 3), (7, 5), (375, 500)])
@pytest.mark.parametrize("level", [1, 2, 3, 4, 5, 7])
def test_windows_cover_the_image_and_stay_inside(size: tuple[int, int], level: int) -> None:
    seen = np.zeros(size, int)
    windows = view_windows(*size, (level,))
    for y0, y1, x0, x1 in windows:
        assert 0 <= y0 < y1 <= size[0]
        assert 0 <= x0 < x1 <= size[1]
        seen[y0:y1, x0:x1] += 1
    assert len(windows) == level**2
    assert seen.min() >= 1


def test_no_image_has_no_tags(world: World) -> None:
    labels = tagger(world)([])
    assert labels.score.shape == labels.present.shape == (0, 3)


def test_colors_are_seen(world: World) -> None:
    labels = tagger(world)([world.photo(30, 30), world.photo(40, 60, red=(0, 0, 30, 40), blue=(30, 0, 60, 40))])
    assert labels.present.tolist() == [[False, False, False], [True, False, True]]
    assert labels.score.dtype == np.float32


def test_the_best_view_counts(world: World) -> None:
    """A corner too small for the whole image resized to 8 px is seen by the view of that corner."""
    photo = world.photo(90, 90, red=(84, 84, 90, 90), green=(0, 0, 60, 60))
    assert tagger(world, views=[1])([photo]).present.tolist() == [[False, True, False]]
    assert tagger(world, views=[1, 3])([photo]).present.tolist() == [[True, True, False]]


class Embeddings:
    """CLIP as a table: image i has embedding ``rows[i]``, wording w has ``words[w]``."""

    def __init__(self, world: World, rows: np.ndarray, words: np.ndarray) -> None:
        def engine(graph: str, script: Callable[[Any], np.ndarray]) -> FakeEngine:
            spec = world.model("clip").graph(graph)
            return FakeEngine(wide(spec), lambda feeds: {"embedding": script(feeds).astype(np.float32)})

        def wide(spec: GraphSpec) -> GraphSpec:
            output = replace(spec.outputs[0], shape=("batch", rows.shape[1]))
            return replace(spec, outputs=(output,), axes={"batch": AxisRange(1, 2, 3)})

        self.image = engine("image", lambda feeds: rows[feeds["pixels"][:, 0, 0, 0]])
        self.text = engine("text", lambda feeds: words[feeds["tokens"][:, 0]])

    def scores(self, world: World, classes: ClassList, rule: str) -> np.ndarray:
        settings = {"templates": ["{}"], "views": [1], "logit_scale": 10.0, "logit_bias": -2.0}
        model = with_settings(world.model("clip"), rule=rule, **settings)
        photos = [world.photo(8, 8) for _ in range(4)]
        for number, photo in enumerate(photos):
            photo.pixels[:] = number
        return Tagger(model, self.image, self.text, classes)(photos).score


@pytest.mark.parametrize("rule", ["softmax", "background", "sigmoid"])
@pytest.mark.parametrize("spread", [0.3, 1.0, 12.0])
def test_probabilities_are_the_documented_rule(world: World, rule: str, spread: float) -> None:
    """Also where the similarities lie hundreds of nats apart. Words: red, green, blue are classes, grass and sky are not."""
    rng = np.random.default_rng(3)
    rows, words = spread * rng.normal(size=(4, 5)), rng.normal(size=(11, 5))
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    classes = class_list(["red", "green", "blue", "!sky"])
    found = Embeddings(world, rows, words).scores(world, classes, rule)
    logits = 10 * rows @ words[[1, 2, 3, 4, 10]].T  # ids of red, green, blue, grass, sky
    with np.errstate(over="ignore"):
        if rule == "softmax":
            shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
            want = shifted[:, :3] / shifted.sum(axis=1, keepdims=True)
        elif rule == "sigmoid":  # with the bias, and against the negative, sky, alone
            want = 1 / (1 + np.exp(logits[:, 4:] - logits[:, :3])) / (1 + np.exp(2 - logits[:, :3]))
        else:
            want = 1 / (1 + np.exp(logits[:, None, 3:] - logits[:, :3, None]).sum(axis=2))
    assert np.abs(found - want).max() <= 1e-4


@pytest.mark.parametrize("rule", ["softmax", "background"])
def test_without_backgrounds_the_classes_are_alone(world: World, rule: str) -> None:
    labels = tagger(world, class_list(["red"]), rule=rule, backgrounds=[])([world.photo(20, 20)])
    assert labels.score.tolist() == [[1.0]]


def test_a_sigmoid_needs_no_others(world: World) -> None:
    rows, words = np.array([[0.5], [0.0], [-0.5], [30.0]]), np.ones((11, 1))
    found = Embeddings(world, rows, words).scores(world, class_list(["red"]), "sigmoid")
    assert found[:, 0] == pytest.approx([1 / (1 + np.exp(-logit)) for logit in (3.0, -2.0, -7.0, 298.0)], abs=1e-6)


def test_a_background_that_is_a_class_is_left_out(world: World) -> None:
    with_grass = tagger(world, class_list(["red", "grass"]), views=[1])([world.photo(20, 20)])
    assert with_grass.present.tolist() == [[True, True]], "nothing is left to take the probability"


@pytest.mark.parametrize(("threshold", "present"), [(None, True), (0.5, True), (0.999999, False), (0.0, True), (1.0, False)])
def test_threshold(world: World, threshold: float | None, present: bool) -> None:
    labels = tagger(world, threshold=threshold)([world.photo(40, 40, red=(0, 0, 40, 40))])
    assert labels.present[0, 0] == present
    assert np.array_equal(labels.present, labels.score >= (0.5 if threshold is None else threshold))


def test_a_class_whose_score_is_the_threshold_is_present(world: World) -> None:
    photos = [world.photo(40, 40, red=(0, 0, 20, 20)), world.photo(40, 40, green=(0, 0, 30, 30))]
    score = tagger(world)(photos).score[0, 0]
    assert 0 < score < 1
    assert tagger(world, threshold=float(score))(photos).present[0, 0]
    assert not tagger(world, threshold=float(np.nextafter(score, np.float32(1))))(photos).present[0, 0]


def test_prompts_are_averaged_and_normalized_again(world: World) -> None:
    words = np.random.default_rng(0).normal(size=(11, 4)).astype(np.float32)
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    engine = FakeEngine(world.model("clip").graph("text"), lambda feeds: {"embedding": words[feeds["tokens"][:, 0]]})
    model = with_settings(world.model("clip"), templates=["{}", "photo {}"])  # the second one begins with `photo`
    found = embed_prompts(model, engine, [("red",), ("green", "blue")])
    want = np.stack([words[1] + words[5], words[2] + words[3] + 2 * words[5]])
    assert np.allclose(found, want / np.linalg.norm(want, axis=1, keepdims=True), atol=1e-6)
    assert [call["tokens"][0] for call in engine.calls] == [2, 2, 2], "chunks within the engine's range"


@pytest.mark.parametrize("value", [0, np.nan])
def test_a_prompt_without_an_embedding_is_refused(world: World, value: float) -> None:
    """Its class would never be found, and no other beside it."""

    def script(feeds: Any) -> dict[str, np.ndarray]:
        return {"embedding": np.where(feeds["tokens"][:, :1] == 2, value, np.ones((1, 4))).astype(np.float32)}

    model = with_settings(world.model("clip"), templates=["{}"])
    with pytest.raises(BundleError, match="its text graph gives no embedding for 'green'"):
        embed_prompts(model, FakeEngine(model.graph("text"), script), [("red",), ("green",)])


def test_a_long_prompt_is_cut_and_still_ends(world: World) -> None:
    seen: list[np.ndarray] = []

    def script(feeds: Any) -> dict[str, np.ndarray]:
        seen.extend(feeds["tokens"])
        return {"embedding": np.ones((len(feeds["tokens"]), 4), np.float32)}

    model = with_settings(world.model("clip"), templates=["{}"], pad=7)
    engine = FakeEngine(model.graph("text"), script)
    embed_prompts(model, engine, [("red green",), ("red green blue red green",)])
    assert [row.tolist() for row in seen] == [[1, 2, 7, 7], [1, 2, 3, 9]]


def test_a_prompt_that_is_cut_is_warned_of(world: World, caplog: pytest.LogCaptureFixture, spoken: None) -> None:
    tagger(world, class_list(["red", "green blue red green blue"]))
    assert "CLIP reads only 4 tokens and cuts the end of 2 prompts, for example 'photo green blue red green blue'" in caplog.text
    caplog.clear()
    tagger(world, class_list(["red", "green blue"]))
    assert not caplog.text


@pytest.mark.parametrize(
    ("names", "one", "other"),
    [
        (["ruby", "pearl"], "the class 'ruby'", "the class 'pearl'"),  # both unknown to this tokenizer
        (["red green blue grass", "red green blue sky"], "'red green blue grass'", "'red green blue sky'"),  # equal once cut
        (["ruby", "!pearl"], "the class 'ruby'", "the negative prompt 'pearl'"),
    ],
)
def test_classes_of_the_same_tokens_are_refused(world: World, names: list[str], one: str, other: str) -> None:
    with pytest.raises(ClassError, match="have the same tokens in CLIP's tokenizer") as caught:
        tagger(world, replace(class_list(names), where="--classes names.txt"))
    assert one in caught.value.message and other in caught.value.message
    assert caught.value.message.startswith("--classes names.txt: ")


def test_a_tokenizers_own_truncation_is_warned_of_too(
    world: World, caplog: pytest.LogCaptureFixture, spoken: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cutting = open_tokenizer(world.model("clip"))
    cutting.enable_truncation(4)
    monkeypatch.setattr("wsss.runtime.tag.open_tokenizer", lambda model: cutting)
    tagger(world, class_list(["red green blue red green"]))
    assert "cuts the end of 2 prompts" in caplog.text


def test_views_in_many_calls_give_what_one_call_gives(world: World) -> None:
    photos = [world.photo(40, 50, red=(0, 0, 20, 20)), world.photo(30, 30, blue=(10, 10, 30, 30)), world.photo(20, 60)]
    spec = world.model("clip").graph("image")
    script = world.engine("clip", "image").script
    answers = []
    for most in (1, 3, 64):
        engine = FakeEngine(replace(spec, axes={"batch": AxisRange(1, 1, most)}), script)
        answers.append(Tagger(world.model("clip"), engine, world.engine("clip", "text"), world.classes)(photos).score)
        assert max(call["pixels"][0] for call in engine.calls) == min(most, 15)
    assert np.array_equal(answers[0], answers[1])
    assert np.array_equal(answers[0], answers[2])


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (3, 2), (37, 50), (375, 500), (500, 333)])
@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
def test_views_of_a_photograph_are_pillows(size: tuple[int, int], filter: str) -> None:
    """The window alone, resized: its edge does not mix with the pixels around it."""
    pixels, side = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8), (96, 80)
    windows = view_windows(*size, (1, 2, 3))
    views = resized_views(picture_of(pixels), windows, side, filter, np.zeros((len(windows), *side, 3), np.uint8))
    chosen = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[filter]
    for view, (y0, y1, x0, x1) in zip(views, windows, strict=True):
        window = Image.fromarray(np.ascontiguousarray(pixels[y0:y1, x0:x1]))
        assert np.array_equal(view, np.asarray(window.resize(side[::-1], chosen)))


@pytest.mark.parametrize("size", [(1200, 1600), (1201, 1603), (640, 5000), (5003, 641)])
def test_views_of_a_large_photograph_are_nearly_pillows(size: tuple[int, int]) -> None:
    """From the means of blocks of pixels: within a gray level or two of Pillow's, and never shifted or mixed at the edges."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize(size[::-1], Image.Resampling.BICUBIC)
    pixels = (np.asarray(coarse).astype(int) + rng.integers(-25, 26, (*size, 3))).clip(0, 255).astype(np.uint8)
    windows, side = view_windows(*size, (1, 2)), (64, 64)
    views = resized_views(picture_of(pixels), windows, side, "bicubic", np.zeros((len(windows), *side, 3), np.uint8))
    for view, (y0, y1, x0, x1) in zip(views, windows, strict=True):
        window = Image.fromarray(np.ascontiguousarray(pixels[y0:y1, x0:x1]))
        difference = np.abs(view.astype(int) - np.asarray(window.resize(side, Image.Resampling.BICUBIC)))
        assert difference.max() <= 4
        assert (difference <= 1).mean() >= 0.99
    assert not np.array_equal(views[0], np.asarray(Image.fromarray(pixels).resize(side, Image.Resampling.BICUBIC)))


def test_the_shortest_sides_of_windows() -> None:
    assert shortest_sides([(2, 9, 0, 5), (0, 8, 30, 34)]) == (7, 4)
