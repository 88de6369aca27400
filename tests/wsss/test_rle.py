"""Masks as runs, and COCO's compressed form: the same as pycocotools', and safe to read from strangers."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from wsss.rle import MaskRuns, runs_of, spans_of

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools, by numpy 2


def masks() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    large = np.zeros((3000, 40), bool)
    large[100:2900, 3:30] = True
    return [
        np.zeros((4, 3), bool),
        np.ones((4, 3), bool),
        np.ones((1, 1), bool),
        np.zeros((1, 1), bool),
        np.pad(np.ones((4, 2), bool), ((0, 0), (1, 1))),  # one run over two columns
        large,
        ~large,
        *(random.random(shape) < share for shape in ((1, 9), (9, 1), (12, 9), (70, 130)) for share in (0.02, 0.5, 0.98)),
    ]


@pytest.mark.parametrize("mask", masks(), ids=lambda mask: f"{mask.shape} {mask.mean():.2f}")
def test_the_counts_are_those_of_pycocotools(mask: np.ndarray) -> None:
    coco = pytest.importorskip("pycocotools.mask", reason="needs pycocotools")
    runs = MaskRuns.of(mask)
    expected = coco.encode(np.asfortranarray(mask, np.uint8))
    assert runs.counts() == expected["counts"].decode()
    again = MaskRuns.from_counts(expected["counts"].decode(), mask.shape)
    assert np.array_equal(again.spans, runs.spans)
    assert again.area() == coco.area(expected)
    assert np.array_equal(coco.decode({"size": list(mask.shape), "counts": runs.counts()}), mask)


@pytest.mark.parametrize("mask", masks(), ids=lambda mask: f"{mask.shape} {mask.mean():.2f}")
def test_a_mask_survives_its_runs(mask: np.ndarray) -> None:
    runs = MaskRuns.of(mask)
    assert np.array_equal(runs.mask(), mask)
    assert runs.area() == mask.sum()
    assert (runs.spans[1:, 0] > runs.spans[:-1, 1]).all()
    if mask.any():
        y, x = np.nonzero(mask)
        top, left, bottom, right = runs.bounds()
        assert (top, left, bottom, right) == (y.min(), x.min(), y.max() + 1, x.max() + 1)
        assert np.array_equal(runs.crop(), mask[top:bottom, left:right])


def test_a_crop_has_the_runs_of_the_whole_mask() -> None:
    whole = np.zeros((12, 9), bool)
    whole[2:9, 3:8] = np.random.default_rng(0).random((7, 5)) < 0.6
    whole[:, 8] = whole[0, 7] = True
    for top, left, bottom, right in ((0, 3, 12, 9), (0, 0, 12, 9)):
        crop = MaskRuns.of(whole[top:bottom, left:right], top=top, left=left, size=whole.shape)
        assert np.array_equal(crop.spans, MaskRuns.of(whole).spans)


@pytest.mark.parametrize(
    ("counts", "problem"),
    [
        ("", "not compressed counts"),
        ("\n", "not compressed counts"),
        ("é", "not compressed counts"),
        ("0\u65e5", "not compressed counts"),
        ("p", "not compressed counts"),
        ("T", "not compressed counts"),  # goes on, and ends
        ("P" * 20 + "0", "too long"),
        ("<0", "has no pixel"),
        ("O=", "has no pixel"),  # -1
        (";", "do not have the 12 pixels"),
        ("=", "do not have the 12 pixels"),
        ("15", "do not have the 12 pixels"),
        ("0PPPPPP1" * 9, "do not have the 12 pixels|has no pixel"),
        ("PPPPPPP7" * 3, "do not have the 12 pixels"),
    ],
)
def test_counts_that_are_no_mask_are_refused(counts: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        MaskRuns.from_counts(counts, (4, 3))


def test_sums_that_overflow_are_refused() -> None:
    """Differences that add up: the counts themselves grow without limit, and their sum may come back to the image's pixels."""
    for text in ("PPPPPPP7" * 4000, "1" + "PPPPPPP7" * 4000, "1" * 100_000):
        with pytest.raises(ValueError):
            MaskRuns.from_counts(text, (4, 3))


def test_any_text_is_a_mask_or_is_refused() -> None:
    random = np.random.default_rng(1)
    taken = 0
    for _ in range(20_000):
        text = random.integers(48, 112, random.integers(1, 6)).astype(np.uint8).tobytes().decode()
        try:
            runs = MaskRuns.from_counts(text, (4, 3))
        except ValueError:
            continue
        taken += 1
        assert runs.area() == runs.mask().sum() <= 12
        assert MaskRuns.of(runs.mask()).counts() == runs.counts()
    assert taken > 50


def test_a_mask_of_a_huge_image_takes_the_memory_of_its_text() -> None:
    """A file of ten bytes cannot make its reader take the 179 megabytes of a mask."""
    size = (13_000, 13_000)
    text = MaskRuns(size, np.array([[0, 13_000 * 13_000]])).counts()
    tracemalloc.start()
    runs = MaskRuns.from_counts(text, size)
    assert (runs.area(), runs.bounds()) == (13_000 * 13_000, (0, 0, *size))
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def mask_of(text: str) -> np.ndarray:
    return np.array([[sign != "." for sign in line] for line in text.split()])


@pytest.mark.parametrize("text", ["....", "1111 1111", "1..1 1.11", "...1 1..."])
def test_spans_are_runs_of_the_rows_end_to_end(text: str) -> None:
    mask = mask_of(text)
    flat = np.zeros(mask.size, int)
    spans = spans_of(mask)
    assert (spans[1:, 0] > spans[:-1, 1]).all()
    for start, stop in spans:
        flat[start:stop] += 1
    assert np.array_equal(flat, mask.ravel())


def test_spans_of_a_crop_are_those_in_the_image() -> None:
    whole = np.zeros((6, 9), bool)
    whole[1:4, 2:9] = np.random.default_rng(0).random((3, 7)) < 0.5
    assert np.array_equal(spans_of(whole[1:4, 2:9], top=1, left=2, stride=9), spans_of(whole))


def test_runs_end_with_their_row() -> None:
    row, start, stop, value = runs_of(np.array([[1, 1, 2], [2, 2, 2]], np.uint8))
    assert (row.tolist(), start.tolist(), stop.tolist(), value.tolist()) == ([0, 0, 1], [0, 2, 0], [2, 3, 3], [1, 2, 2])
