"""What the page of `wsss app` shows, and that it is one where gradio is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from wsss.runtime.app import page_of, shown
from wsss.runtime.labeler import Labeler

if TYPE_CHECKING:
    from ..conftest import World


def test_tags_boxes_masks_and_a_row_for_each_object(world: World) -> None:
    pixels = world.scene(32, 48, red=(0, 0, 20, 20), blue=(24, 8, 48, 32))
    result = Labeler.open(world.bundle, classes=world.classes).label(pixels)
    tags, picture, (below, boxes), (under, masks), rows = shown(result)
    assert tags == result.tags and set(tags) == {"red", "blue"}
    assert picture.shape == (32, 48, 3) and (picture != pixels).any()
    assert below is under is pixels
    assert boxes == [((0, 0, 20, 20), "red 0.98"), ((24, 8, 48, 32), "blue 0.98")]
    for (mask, words), expected, row in zip(masks, result.masks, rows, strict=True):
        np.testing.assert_array_equal(mask, expected)
        assert words.split()[0] == row[0] and row[3] == expected.sum()


def test_nothing_found(world: World) -> None:
    result = Labeler.open(world.bundle, classes=world.classes).label(world.scene(32, 48, red=(0, 0, 1, 1))[:, ::-1] * 0 + 40)
    assert shown(result)[2:] == ((result.pixels, []), (result.pixels, []), [])


def test_without_gradio_the_command_says_what_to_install(wsss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gradio", None)
    answer = wsss("app", "--classes", "mini", "--bundle", "mini")
    assert answer.code == 1 and "this command needs gradio" in answer.err and "[app]" in answer.err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::DeprecationWarning")  # of gradio
def test_the_page_has_what_it_shows(world: World) -> None:
    pytest.importorskip("gradio", reason="needs gradio: pip install 'wsss[app]'")
    page = page_of(Labeler.open(world.bundle, classes=world.classes))
    labels = {block.label for block in page.blocks.values() if getattr(block, "label", None)}
    assert {"Photograph", "Boxes", "Masks", "Label map", "Objects"} <= labels
