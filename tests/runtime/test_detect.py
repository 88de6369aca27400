"""Detection: captions laid out as the reference lays them out, scores by span, suppression, long class lists."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from wsss.batch import MAX_BOXES, Boxes, Labels
from wsss.classes import class_list, parse_classes
from wsss.engines.fake import FakeEngine
from wsss.errors import ClassError, UsageError, WsssError
from wsss.frame import Frame
from wsss.runtime.chain import Chain, Rules
from wsss.runtime.detect import (
    NEGATIVE,
    Caption,
    Detector,
    Phrase,
    box_iou,
    boxes_from_logits,
    chosen,
    join_phrases,
    split_phrases,
    suppress,
)
from wsss.runtime.text import tokenize_phrases
from wsss.spec import SCORE_RULES, Model, ScoreRule

from ..conftest import WORDS, Feeds

if TYPE_CHECKING:
    from ..conftest import World

CLS, SEP, DOT, MARK = 101, 102, 1012, 1029  # BERT's [CLS] [SEP] . ?


def phrase(label: int, *ids: int) -> Phrase:
    """A phrase whose features are its token ids, the dot included."""
    return Phrase(label, np.array(ids, np.float32)[:, None], max(len(ids) - 1, 1))


# ---- captions ----


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A small WordPiece with BERT's ids of the special tokens."""
    words = [
        "dog",
        "cat",
        "potted",
        "plant",
        "fire",
        "hydrant",
        "tv",
        "monitor",
        "taxi",
        "zebra",
        "##s",
        "##van",
        "mini",
        "hair",
        "##dr",
        "##ier",
    ]
    vocab = {"[UNK]": 100, "[CLS]": CLS, "[SEP]": SEP, ".": DOT, "?": MARK, **{word: 2000 + i for i, word in enumerate(words)}}
    made = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
    return made


@pytest.mark.parametrize(
    "classes",
    [
        ["dog"],
        ["dog", "cat"],
        ["potted plant", "dog", "fire hydrant"],
        ["minivan", "tv monitors", "hairdrier", "dogs"],
        ["zebra", "kangaroo", "potted plants taxi"],
        ["dog"] * 12,
    ],
)
def test_captions_are_the_references(tokenizer: Tokenizer, classes: list[str]) -> None:
    """Token by token: ids, sub-sentence mask and restarting positions as transformers makes them from the caption."""
    torch = pytest.importorskip("torch")
    dino = pytest.importorskip("transformers.models.grounding_dino.modeling_grounding_dino")
    ids = [CLS, *tokenizer.encode(" . ".join(classes) + " .", add_special_tokens=False).ids, SEP]
    mask, position = dino.generate_masks_with_special_tokens_and_transfer_map(
        torch.tensor([ids]), torch.tensor(dino.SPECIAL_TOKENS)
    )
    parts = [phrase(n, *tokenizer.encode(name, add_special_tokens=False).ids, DOT) for n, name in enumerate(classes, 1)]
    caption = join_phrases(phrase(0, CLS), parts, phrase(0, SEP))
    assert caption.text[:, 0].tolist() == ids
    assert np.array_equal(caption.phrase[:, None] == caption.phrase, mask[0].numpy())
    assert np.array_equal(caption.position, position[0].numpy())
    for label, start, stop in caption.spans:
        assert tokenizer.decode(ids[start:stop]).replace(" ##", "") == tokenizer.decode(
            tokenizer.encode(classes[label - 1]).ids
        ).replace(" ##", "")
        assert ids[stop] == DOT


@pytest.mark.parametrize(
    ("lengths", "budget", "groups"),
    [
        ([], 8, []),
        ([6], 8, [[6]]),
        ([2, 2, 2], 8, [[2, 2, 2]]),
        ([2, 2, 2, 2], 8, [[2, 2, 2], [2]]),
        ([3, 3, 3], 8, [[3, 3], [3]]),
        ([6, 2, 6], 8, [[6], [2], [6]]),
        ([3] * 100, 256, [[3] * 84, [3] * 16]),
    ],
)
def test_phrases_split_within_the_budget(lengths: list[int], budget: int, groups: list[list[int]]) -> None:
    phrases = [Phrase(number, np.zeros((length, 1), np.float32), length - 1) for number, length in enumerate(lengths, 1)]
    split = split_phrases(phrases, budget)
    assert [[len(each) for each in group] for group in split] == groups
    assert [each.label for group in split for each in group] == list(range(1, len(lengths) + 1)), "in order, none lost"
    for group in split:
        assert len(join_phrases(phrase(0, CLS), group, phrase(0, SEP)).text) <= budget


# ---- scores ----

FRAME = Frame(image=(100, 200), valid=(50, 100), canvas=(64, 128))
CAPTION = join_phrases(phrase(0, CLS), [phrase(3, 11, 12, DOT), phrase(5, 13, DOT), phrase(3, 14, DOT)], phrase(0, SEP))
MIDDLE = [0.5, 0.5, 0.2, 0.4]  # (80, 30, 120, 70) of 200 x 100


def logit(probability: float) -> float:
    return float(np.log(probability / (1 - probability)))


def detect(
    tokens: dict[int, float], box: list[float] = MIDDLE, threshold: float = 0.3, pad: int = 0, rule: ScoreRule = "mean"
) -> Boxes:
    """One query with these probabilities at these tokens, 0.01 elsewhere, -inf on padding."""
    logits = np.full((1, len(CAPTION.text) + pad), logit(0.01), np.float32)
    logits[0, len(CAPTION.text) :] = -np.inf
    for token, probability in tokens.items():
        logits[0, token] = logit(probability)
    return boxes_from_logits(logits, np.array([box], np.float32), CAPTION, FRAME, 4, rule=rule, threshold=threshold)


def test_spans_leave_the_dot_and_the_special_tokens_out() -> None:
    assert CAPTION.spans == ((3, 1, 3), (5, 4, 5), (3, 6, 7))
    assert CAPTION.phrase.tolist() == [0, 1, 1, 1, 2, 2, 3, 3, 4]
    assert CAPTION.position.tolist() == [0, 0, 1, 2, 0, 1, 0, 1, 0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("pad", [0, 5])
@pytest.mark.parametrize(
    ("tokens", "label", "score"),
    [
        ({}, None, 0),
        ({0: 0.9, 3: 0.9, 5: 0.9, 7: 0.9, 8: 0.9}, None, 0),  # [CLS], dots and [SEP] name nothing
        ({1: 0.9, 2: 0.5}, 3, 0.7),  # the mean over a phrase's tokens
        ({1: 0.9}, 3, 0.455),
        ({1: 0.5}, None, 0),  # a maximum would have passed
        ({4: 0.4}, 5, 0.4),
        ({1: 0.6, 2: 0.6, 4: 0.7}, 5, 0.7),  # the best class
        ({6: 0.8}, 3, 0.8),  # by its other wording
        ({1: 0.9, 2: 0.9, 6: 0.4}, 3, 0.9),  # wordings are not averaged
    ],
)
def test_a_query_takes_the_class_whose_tokens_it_matches_best(
    tokens: dict[int, float], label: int | None, score: float, pad: int
) -> None:
    found = detect(tokens, pad=pad)
    assert found.label.tolist() == ([] if label is None else [label])
    if label is not None:
        assert found.score[0] == pytest.approx(score, abs=1e-5)
        assert found.image.tolist() == [4]
        assert np.allclose(found.xyxy_image, [[80, 30, 120, 70]], atol=1e-4)
    assert [a.dtype for a in (found.xyxy_image, found.score, found.label, found.image)] == ["f4", "f4", "i8", "i8"]


@pytest.mark.parametrize(
    ("tokens", "label", "score"),
    [
        ({}, None, 0),
        ({0: 0.9, 3: 0.9, 5: 0.9, 7: 0.9, 8: 0.9}, None, 0),  # [CLS], dots and [SEP] name nothing
        ({1: 0.9, 2: 0.5}, 3, 0.9),  # the largest of a phrase's tokens
        ({1: 0.5}, 3, 0.5),  # a mean would not have passed
        ({1: 0.6, 2: 0.6, 4: 0.7}, 5, 0.7),  # the best class
        ({1: 0.8, 4: 0.7}, 3, 0.8),  # of which a mean would have taken the other
    ],
)
def test_the_rule_max_takes_the_largest_token_score_as_predict_does(
    tokens: dict[int, float], label: int | None, score: float
) -> None:
    found = detect(tokens, rule="max")
    assert found.label.tolist() == ([] if label is None else [label])
    if label is not None:
        assert found.score[0] == pytest.approx(score, abs=1e-5)


def test_the_threshold_itself_passes() -> None:
    score = float(detect({4: 0.5}).score[0])
    assert len(detect({4: 0.5}, threshold=score)) == 1
    assert len(detect({4: 0.5}, threshold=np.nextafter(np.float32(score), np.float32(1)))) == 0


@pytest.mark.parametrize(
    ("box", "kept"),
    [
        ([0.5, 0.5, 0.004, 0.5], 0),
        ([0.5, 0.5, 0.005, 0.5], 1),
        ([0.5, 0.5, 0.006, 0.5], 1),
        ([1.2, 0.5, 0.3, 0.5], 0),
        ([0, 0, 0.1, 0.1], 1),
        ([0.5, 0.5, 0, 0], 0),
    ],
)
def test_boxes_thinner_than_a_pixel_are_dropped(box: list[float], kept: int) -> None:
    assert len(detect({4: 0.9}, box)) == kept


# ---- suppression ----

WIDE, SHIFTED, APART = [0, 0, 100, 100], [0, 0, 100, 90], [200, 0, 300, 100]  # IoU 0.9 and 0


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        pytest.param([], [], id="none"),
        pytest.param([(WIDE, 0.5, 1, 0)], [0], id="one"),
        pytest.param([(WIDE, 0.5, 1, 0), (SHIFTED, 0.9, 1, 0)], [1], id="same class: the better"),
        pytest.param([(WIDE, 0.5, 1, 0), (APART, 0.9, 1, 0)], [1, 0], id="same class, apart: both, best first"),
        pytest.param([(WIDE, 0.5, 1, 0), (SHIFTED, 0.9, 2, 0)], [1], id="two classes above `across`"),
        pytest.param([(WIDE, 0.5, 1, 0), ([0, 0, 100, 70], 0.9, 2, 0)], [1, 0], id="two classes below `across`"),
        pytest.param([(WIDE, 0.5, 1, 0), ([0, 0, 100, 70], 0.9, 1, 0)], [1], id="same class, same overlap"),
        pytest.param([(WIDE, 0.5, 1, 0), ([0, 0, 100, 50], 0.9, 1, 0)], [1, 0], id="an IoU of the limit itself stays"),
        pytest.param([(WIDE, 0.9, 1, 0), (WIDE, 0.8, 1, 1), (WIDE, 0.7, 1, 2)], [0, 1, 2], id="images never meet"),
        pytest.param([(WIDE, 0.8, 1, 1), (WIDE, 0.9, 1, 0), (SHIFTED, 0.9, 1, 1)], [1, 2], id="sorted by image"),
        pytest.param(
            [(WIDE, 0.9, 1, 0), ([0, 0, 100, 60], 0.8, 1, 0), ([0, 0, 100, 36], 0.7, 1, 0)],
            [0, 2],
            id="the suppressed suppress nobody",
        ),
        pytest.param([(WIDE, 0.9, 1, 0), (WIDE, 0.9, 2, 0)], [0], id="a tie: the first"),
    ],
)
def test_suppression(rows: list[tuple[list[float], float, int, int]], kept: list[int]) -> None:
    xyxy, score, label, image = zip(*rows, strict=True) if rows else ([], [], [], [])
    boxes = Boxes(
        np.array(xyxy, np.float32).reshape(-1, 4),
        np.array(score, np.float32),
        np.array(label, np.int64),
        np.array(image, np.int64),
    )
    found = boxes.keep(suppress(boxes, 0.5, 0.8))
    want = boxes.keep(np.array(kept, np.int64))
    for field in ("xyxy_image", "score", "label", "image"):
        assert np.array_equal(getattr(found, field), getattr(want, field))


ALL, ONE, TWO, NEAR = (
    [0, 0, 100, 40],
    [0, 0, 40, 40],
    [60, 0, 100, 40],
    [-2, 0, 41, 41],
)  # `ALL` holds ONE, TWO; NEAR is ONE again


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        pytest.param([(ALL, 0.5, 1, 0), (ONE, 0.9, 1, 0), (TWO, 0.8, 1, 0)], [1, 2], id="holds two better ones of its class"),
        pytest.param([(ALL, 0.95, 1, 0), (ONE, 0.9, 1, 0), (TWO, 0.8, 1, 0)], [0, 1, 2], id="is better itself"),
        pytest.param([(ALL, 0.85, 1, 0), (ONE, 0.9, 1, 0), (TWO, 0.8, 1, 0)], [1, 0, 2], id="only one is better"),
        pytest.param([(ALL, 0.5, 1, 0), (ONE, 0.9, 1, 0), (NEAR, 0.8, 1, 0)], [1, 0], id="two boxes of one object are one"),
        pytest.param([(ALL, 0.5, 1, 0), (ONE, 0.9, 2, 0), (TWO, 0.8, 2, 0)], [1, 2, 0], id="two of another class"),
        pytest.param([(ALL, 0.5, 1, 1), (ONE, 0.9, 1, 0), (TWO, 0.8, 1, 0)], [1, 2, 0], id="two in another image"),
        pytest.param([([0, 0, 100, 91], 0.5, 1, 0), (ONE, 0.9, 1, 0)], [1], id="nearly the whole photograph, one better"),
        pytest.param([([0, 0, 100, 89], 0.5, 1, 0), (ONE, 0.9, 1, 0)], [1, 0], id="not nearly the whole"),
        pytest.param([([0, 0, 100, 91], 0.5, 1, 0), (ONE, 0.9, 2, 0)], [1, 0], id="the better one is of another class"),
        pytest.param([([0, 0, 100, 91], 0.5, 1, 0)], [0], id="the whole photograph alone"),
    ],
)
def test_boxes_that_enclose_several_objects_are_dropped(rows: list[tuple[list[float], float, int, int]], kept: list[int]) -> None:
    xyxy, score, label, image = zip(*rows, strict=True)
    boxes = Boxes(np.array(xyxy, np.float32), np.array(score, np.float32), np.array(label), np.array(image))
    assert suppress(boxes, 0.5, 0.8, [(100, 100), (100, 100)]).tolist() == kept
    assert len(suppress(boxes, 0.5, 0.8)) >= len(kept), "without sizes they stay"


def test_a_threshold_before_suppression_keeps_what_a_threshold_after_it_keeps() -> None:
    """A box depends on better ones only. `wsss tune` and long lists of candidates rely on it."""
    rng = np.random.default_rng(3)
    low = rng.uniform(0, 60, (60, 2))
    xyxy = np.concatenate([low, low + rng.uniform(10, 60, (60, 2))], axis=1).astype(np.float32)
    boxes = Boxes(xyxy, rng.uniform(0, 1, 60).astype(np.float32), rng.integers(1, 3, 60), np.sort(rng.integers(0, 2, 60)))
    options = {"nms": 0.4, "nms_across": 0.6, "enclosing": False}
    for threshold in (0.2, 0.5, 0.8):
        early = chosen(boxes, [(100, 100)] * 2, threshold, **options)
        late = chosen(boxes, [(100, 100)] * 2, 0.0, **options)
        assert early.tolist() == [row for row in late.tolist() if boxes.score[row] >= np.float32(threshold)]
        assert 0 < len(early) < len(boxes)


def test_an_image_keeps_at_most_its_best_boxes() -> None:
    count = MAX_BOXES + 2
    left = 2 * np.arange(count, dtype=np.float32)
    xyxy = np.stack([left, left * 0, left + 1, left * 0 + 1], axis=1)
    score = np.linspace(0.1, 0.9, count, dtype=np.float32)
    boxes = Boxes(xyxy, score, np.ones(count, np.int64), np.zeros(count, np.int64))
    found = boxes.keep(suppress(boxes, 0.5, 0.8))
    assert found.score.tolist() == score[:1:-1].tolist()


def test_iou() -> None:
    one = np.float32([[0, 0, 10, 10]])
    many = np.float32([[0, 0, 10, 10], [0, 0, 10, 5], [10, 0, 20, 10], [5, 5, 15, 15], [20, 20, 30, 30]])
    assert box_iou(one, many)[0] == pytest.approx([1, 0.5, 0, 25 / 175, 0])
    assert box_iou(one, np.zeros((0, 4), np.float32)).shape == (1, 0)


# ---- the stage ----


def detector(world: World, classes: object = None, tiles: int = 1, **settings: object) -> Detector:
    model = world.model("grounding-dino")
    model = Model(model.folder, replace(model.manifest, settings={**model.manifest.settings, **settings}))
    return Detector(
        model,
        world.engine("grounding-dino", "text"),
        lambda canvas: world.engine("grounding-dino", f"image-{canvas[0]}x{canvas[1]}"),
        classes or world.classes,  # type: ignore[arg-type]
        tiles=tiles,
    )


def tags(*present: list[int]) -> Labels:
    """The 1-based classes of each image."""
    score = np.zeros((len(present), 5), np.float32)
    for row, labels in enumerate(present):
        score[row, [label - 1 for label in labels]] = 1
    return Labels(score, score > 0)


def test_images_without_a_class_are_not_looked_at(world: World) -> None:
    stage = detector(world)
    photos = [world.photo(30, 40, red=(0, 0, 20, 20))] * 2
    assert len(stage([], tags())) == 0
    assert len(stage(photos, tags([], []))) == 0
    assert not any(world.rows("grounding-dino", f"image-{h}x{w}") for h, w in ((32, 48), (48, 32)))
    found = stage(photos, tags([], [1]))
    assert (found.label.tolist(), found.image.tolist()) == ([1], [1])
    assert world.rows("grounding-dino", "image-32x48") == [1]


def test_only_the_classes_asked_for_are_found(world: World) -> None:
    photo = world.photo(32, 48, red=(0, 0, 20, 20), green=(20, 4, 48, 32))
    found = detector(world)([photo, photo, photo], tags([1, 2, 3], [2], [3]))
    assert list(zip(found.image.tolist(), found.label.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 2)]
    assert np.allclose(found.xyxy_image[2], [20, 4, 48, 32], atol=1e-3)


def test_images_of_different_canvases_keep_their_order(world: World) -> None:
    lying, upright = world.photo(60, 90, red=(9, 6, 60, 30)), world.photo(90, 60, blue=(30, 60, 60, 90))
    found = detector(world)([upright, lying, upright, lying, upright], tags([3], [1], [3], [1], [3]))
    assert found.image.tolist() == [0, 1, 2, 3, 4]
    assert found.label.tolist() == [3, 1, 3, 1, 3]
    assert np.allclose(found.xyxy_image, [[30, 60, 60, 90], [9, 6, 60, 30]] * 2 + [[30, 60, 60, 90]], atol=3)
    assert world.rows("grounding-dino", "image-48x32") == [2, 1]
    assert world.rows("grounding-dino", "image-32x48") == [2]


def test_a_canvas_without_a_photograph_is_not_opened(world: World) -> None:
    stage = Chain.open(world.bundle, classes=world.classes, until="detect")
    opened = set(world.engines)
    assert not any(graph.startswith("image-") for _, graph in opened)
    stage.detect([world.photo(60, 90, red=(9, 6, 60, 30))], tags([1]))
    assert set(world.engines) - opened == {("grounding-dino", "image-32x48")}


def test_padding_is_the_share_of_the_canvases_that_is_no_photograph(world: World) -> None:
    stage = detector(world)
    assert stage.padding() == 0
    stage([world.photo(32, 36, red=(0, 0, 9, 9))], tags([1]))
    assert stage.padding() == 1 - (32 * 36) / (32 * 48)
    stage([world.photo(42, 32, red=(0, 0, 9, 9)), world.photo(20, 20)], tags([1], []))
    assert stage.padding() == 1 - (32 * 36 + 42 * 32) / (2 * 32 * 48), "what is not looked at does not count"


def test_tiles_find_what_is_too_small_in_the_whole(world: World) -> None:
    """Three pixels of 288 are half a pixel of the canvas, and one pixel of a tile's."""
    photo = world.photo(192, 288, red=(150, 63, 153, 66))
    assert not len(detector(world)([photo], tags([1])))
    found = detector(world, tiles=3)([photo], tags([1]))
    assert np.abs(found.xyxy_image - [150, 63, 153, 66]).max() <= 3 and len(found)
    assert world.rows("grounding-dino", "image-32x48") == [1, 2, 2, 2, 2, 2], "the photograph, and again with 3 x 3 tiles"


def test_an_object_is_whole_in_a_tile_or_seen_in_the_whole_photograph(world: World) -> None:
    """Boxes end in no seam: an object that tiles cut is found once, as large as it is."""
    rng = np.random.default_rng(7)
    stage = detector(world, tiles=2)
    for _ in range(40):
        height, width = rng.integers(60, 200, 2).tolist()
        y0, x0 = (int(rng.integers(0, length - 12)) for length in (height, width))
        y1, x1 = (int(rng.integers(low + 9, length + 1)) for low, length in ((y0, height), (x0, width)))
        found = stage([world.photo(height, width, red=(x0, y0, x1, y1))], tags([1])).xyxy_image
        pixel = max(height, width) / 32  # of the canvas
        assert len(found), "every object is found"
        assert np.abs(found - [x0, y0, x1, y1]).max() <= pixel + 1


def test_tiles_of_several_photographs_stay_apart(world: World) -> None:
    lying = world.photo(96, 144, red=(9, 6, 20, 16), blue=(100, 70, 112, 82))
    upright = world.photo(144, 96, blue=(50, 100, 62, 112))
    stage = detector(world, tiles=2)
    for photos, labels in (([lying, upright], ([1, 3], [3])), ([upright, lying], ([3], [1, 3]))):
        found = stage(photos, tags(*labels))
        for number, photo in enumerate(photos):
            alone = stage([photo], tags(labels[number]))
            rows = found.image == number
            np.testing.assert_array_equal(found.xyxy_image[rows], alone.xyxy_image)
            np.testing.assert_array_equal(found.label[rows], alone.label)


def test_tiles_are_cut_from_the_photograph_alone(world: World) -> None:
    """Each look has the pixels of its window, and its size."""
    stage = detector(world, tiles=2)
    seen: list[tuple[int, int]] = []
    engines = [world.engine("grounding-dino", f"image-{height}x{width}") for height, width in ((32, 48), (48, 32))]
    for engine in engines:
        answer = engine.script
        engine.script = lambda feeds, answer=answer: (seen.extend(map(tuple, feeds["size"].tolist())), answer(feeds))[1]
    stage([world.photo(90, 120, red=(9, 6, 40, 30)), world.photo(90, 120)], tags([1], []))
    assert seen == [(32, 42)] * 5, "90 x 120 and its windows of 60 x 80; not the photograph without a class"


@pytest.mark.parametrize("count", [0, 9, -1])
def test_tiles_and_views_out_of_range(count: int) -> None:
    with pytest.raises(UsageError, match=f"--tiles: expected 1 to 8, got {count}"):
        Rules(tiles=count)
    with pytest.raises(UsageError, match=f"--views: expected 1 to 8, got {count}"):
        Rules(views=count)


@pytest.mark.parametrize("given", [{"boxes": "x"}, {"model": "segmenter"}])
def test_tiles_need_a_detector(world: World, given: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="--tiles: Grounding-DINO is not asked"):
        Chain.open(world.bundle, classes=world.classes, rules=Rules(tiles=2), **given)  # type: ignore[arg-type]


def test_text_is_embedded_once_per_phrase_and_run(world: World) -> None:
    stage = detector(world)
    assert world.rows("grounding-dino", "text") == [2, 2, 1], "[CLS], [SEP] and three phrases"
    stage([world.photo(32, 48, red=(0, 0, 9, 9))] * 5, tags(*[[1, 2, 3]] * 5))
    assert len(world.rows("grounding-dino", "text")) == 3


def test_captions_do_not_depend_on_the_order_of_the_list(world: World) -> None:
    """Which phrases share a caption changes their scores; five classes take two."""
    names = ["red", "grass", "sky", "photo", "blue"]
    captions = []
    for order in (names, names[::-1], [*names[2:], *names[:2]]):
        engine = world.engine("grounding-dino", "image-32x48")
        answer, seen = engine.script, list[frozenset[int]]()
        engine.script = lambda feeds, answer=answer, seen=seen: (
            seen.extend(frozenset(row.argmax(axis=1)[row.any(axis=1)].tolist()) for row in feeds["text"]),
            answer(feeds),
        )[1]
        detector(world, class_list(order))([world.photo(32, 48, red=(0, 0, 20, 20))], tags([1, 2, 3, 4, 5]))
        engine.script = answer
        captions.append(set(seen))
    assert captions[0] == captions[1] == captions[2] and len(captions[0]) == 2


def test_a_list_beyond_the_budget_is_split_and_merged(world: World) -> None:
    """Eight tokens hold three phrases; five classes take two passes, and every phrase occurs exactly once an image."""
    classes = class_list(["red", "grass", "sky", "photo", "blue"])
    photo = world.photo(32, 48, red=(0, 0, 20, 20), blue=(24, 4, 48, 32))
    stage = detector(world, classes)
    engine = world.engine("grounding-dino", "image-32x48")
    captions: list[np.ndarray] = []
    answer = engine.script
    engine.script = lambda feeds: (captions.extend(feeds["text"]), answer(feeds))[1]
    found = stage([photo, photo], tags([1, 2, 3, 4, 5], [5]))
    assert list(zip(found.image.tolist(), found.label.tolist(), strict=True)) == [(0, 1), (0, 5), (1, 5)]
    assert all(len(caption) <= 8 for caption in captions)
    tokens = [token for caption in captions for token in caption.argmax(axis=1)[caption.any(axis=1)].tolist()]
    assert sorted(tokens) == sorted([*(1, 4, 10, 5, 3), 3, *[6, 7] * 3, *[8] * 6])
    assert len(captions) == 3


def test_a_name_longer_than_a_caption_is_refused(world: World) -> None:
    with pytest.raises(WsssError, match="--classes: a name takes 7 tokens, a caption holds 6"):
        detector(world, class_list(["red", "red green blue grass photo sky"]))


def test_a_name_of_nothing_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its score would be the mean of no token, NaN, and win every query."""
    silent = Tokenizer(WordPiece({"[UNK]": 0, "red": 1}, unk_token="[UNK]"))
    silent.normalizer, silent.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
    monkeypatch.setattr("wsss.runtime.detect.open_tokenizer", lambda model: silent)
    with pytest.raises(WsssError, match="holds nothing that the detector's tokenizer can read"):
        detector(world, class_list(["red", "\u200d"]))


@pytest.fixture
def bert(monkeypatch: pytest.MonkeyPatch) -> None:
    """The detector's text part with BERT's normalizing: lower case, no accents, Chinese characters one by one."""
    words = ("[UNK]", "red", "cafe", "cat", "##s", "中")
    made = Tokenizer(WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
    monkeypatch.setattr("wsss.runtime.detect.open_tokenizer", lambda model: made)


@pytest.mark.parametrize(
    ("name", "word"),
    [("猫", "猫"), ("red 猫", "猫"), ("🐶", "🐶"), ("x" * 101, "x" * 101), ("red dog", "dog"), ("cat: 狗", "狗")],
)
def test_a_word_that_the_tokenizer_does_not_know_is_refused(world: World, bert: None, name: str, word: str) -> None:
    """All of them are [UNK]: one and the same phrase, whose boxes would all go to the first class."""
    with pytest.raises(ClassError, match=f"--classes: .* does not know '{word}'") as caught:
        detector(world, class_list(["red", name]))
    assert '{"prompts": [' in caught.value.hint


def test_a_name_of_another_script_is_kept_with_an_english_phrase(world: World, bert: None, tmp_path: Path) -> None:
    with pytest.raises(ClassError) as caught:
        detector(world, class_list(["猫"]))
    example = caught.value.hint.partition("for example ")[2]
    assert json.loads(example) == {"猫": {"prompts": ["cat"], "phrases": ["cat"]}}
    (tmp_path / "classes.json").write_text(example, encoding="utf-8")
    assert detector(world, parse_classes(str(tmp_path / "classes.json")))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("red\n猫", "does not know '猫'"),
        ("café\ncafe", "have the same tokens in the detector's tokenizer"),
        ("red " * 8, "a name takes 9 tokens"),
        ("red\n!cat\n!cafe\n!cats\n!中", "the negatives take"),
    ],
)
def test_a_message_about_classes_names_their_file(world: World, bert: None, tmp_path: Path, lines: str, message: str) -> None:
    (file := tmp_path / "names.txt").write_text(lines, encoding="utf-8")
    with pytest.raises(ClassError, match=message) as caught:
        detector(world, parse_classes(str(file)))
    assert caught.value.message.startswith(f"--classes {file}: ")


@pytest.mark.parametrize("names", [["café", "cafe"], ["cats", "càts"], ["red", "cat: réd"]])
def test_classes_of_the_same_tokens_are_refused(world: World, bert: None, names: list[str]) -> None:
    with pytest.raises(ClassError, match="have the same tokens in the detector's tokenizer") as caught:
        detector(world, class_list(names))
    assert all(repr(name.partition(":")[0]) in caught.value.message for name in names)


def test_a_tokenizers_own_truncation_hides_no_long_name(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    cutting = Tokenizer(WordPiece({"[UNK]": 0, "red": 1}, unk_token="[UNK]"))
    cutting.normalizer, cutting.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
    cutting.enable_truncation(3)
    monkeypatch.setattr("wsss.runtime.detect.open_tokenizer", lambda model: cutting)
    with pytest.raises(ClassError, match="a name takes 9 tokens, a caption holds 6"):
        detector(world, class_list(["red " * 8]))


def test_caption_of_one_phrase_is_padded_to_the_engines_least(world: World) -> None:
    detector(world)([world.photo(32, 48, red=(0, 0, 9, 9))], tags([1]))
    assert world.engine("grounding-dino", "image-32x48").calls[0]["text"] == (1, 4, 16)
    assert isinstance(CAPTION, Caption)


# ---- negatives ----


@pytest.mark.parametrize("rule", SCORE_RULES)
def test_a_query_whose_best_phrase_is_a_negative_is_no_box(rule: ScoreRule) -> None:
    parts = [phrase(3, 11, DOT), phrase(NEGATIVE, 12, DOT), phrase(NEGATIVE, 13, DOT)]
    caption = join_phrases(phrase(0, CLS), parts, phrase(0, SEP))
    assert [label for label, _, _ in caption.spans] == [3, NEGATIVE, NEGATIVE]
    wins, loses, far = (np.full(len(caption.text), logit(0.01), np.float32) for _ in range(3))
    wins[caption.spans[0][1]], wins[caption.spans[1][1]] = logit(0.6), logit(0.5)
    loses[caption.spans[0][1]], loses[caption.spans[2][1]] = logit(0.6), logit(0.7)
    far[caption.spans[1][1]] = logit(0.9)
    boxes = np.array([MIDDLE] * 3, np.float32)
    found = boxes_from_logits(np.stack([wins, loses, far]), boxes, caption, FRAME, 0, rule=rule, threshold=0.3)
    assert found.label.tolist() == [3] and found.score[0] == pytest.approx(0.6)


def test_negatives_are_in_every_caption(world: World) -> None:
    """They take their tokens from the classes' room, and are not asked for alone."""
    texts: list[np.ndarray] = []

    def engine_of(canvas: tuple[int, int]) -> FakeEngine:
        engine = world.engine("grounding-dino", f"image-{canvas[0]}x{canvas[1]}")

        def watched(feeds: Feeds) -> Feeds:
            texts.extend(feeds["text"])
            return {name: np.asarray(value) for name, value in engine(feeds).items()}

        return FakeEngine(world.model("grounding-dino").graph(f"image-{canvas[0]}x{canvas[1]}"), watched)

    detector = Detector(
        world.model("grounding-dino"),
        world.engine("grounding-dino", "text"),
        engine_of,
        class_list(["red", "green", "blue", "!grass", "!sky"]),
    )
    photos = [world.photo(32, 32, red=(0, 0, 9, 9)), world.photo(32, 32, green=(0, 0, 9, 9)), world.photo(32, 32)]
    present = np.array([[True, False, False], [True, True, True], [False, False, False]])
    detector(photos, Labels(present.astype(np.float32), present))
    words = [{name for name, number in WORDS.items() if number in text.argmax(axis=1)} for text in texts]  # one-hot
    assert words and all({"grass", "sky"} <= seen for seen in words)
    assert set().union(*words) >= {"red", "green", "blue"} and all(seen & {"red", "green", "blue"} for seen in words)


def test_negatives_that_leave_no_room_are_refused(tokenizer: Tokenizer) -> None:
    classes = class_list(["fire hydrant", "!dog", "!cat", "!potted plant"])
    assert tokenize_phrases(tokenizer, classes, 9) == ([[[2004, 2005]]], [[2000], [2001], [2002, 2003]])
    with pytest.raises(ClassError, match="negatives take 7 tokens of every caption, which holds 9; the longest class takes 3"):
        tokenize_phrases(tokenizer, classes, 8)


def test_a_negative_that_only_clip_can_read_is_told(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("wsss").propagate = True
    assert tokenize_phrases(tokenizer, class_list(["dog", "!kangaroo", "!cat"]), 20) == ([[[2000]]], [[2001]])
    assert "only CLIP reads the negative 'kangaroo': the detector's tokenizer does not know 'kangaroo'" in caplog.text


def test_a_negative_that_is_a_class_to_the_detector_is_refused() -> None:
    with pytest.raises(ClassError, match="'television' is a negative and a wording of the class 'tv'"):
        class_list(["tv: television", "!television"])
