"""Results of text graphs that are kept: the same numbers, the engine only for what is new, damage found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from wsss.engines.fake import FakeEngine
from wsss.errors import BundleError, FeedError, OutOfMemory
from wsss.files import cache_folder
from wsss.runtime.chain import Chain
from wsss.runtime.device import Device, cut_to_fit
from wsss.runtime.remembered import RememberedEngine
from wsss.runtime.tag import embed_prompts
from wsss.spec import Model

from ..conftest import Feeds, World

Make = Callable[..., RememberedEngine]
TOKENS = np.array([[1, 2, 9, 0], [1, 3, 9, 0]])


@pytest.fixture
def text(world: World) -> Model:
    return world.model("clip")


@pytest.fixture
def opened() -> list[str]:
    """A name for each engine that was opened."""
    return []


@pytest.fixture
def make(text: Model, opened: list[str]) -> Make:
    def make(model: Model = text, name: str = "ort", factor: float = 1.0) -> RememberedEngine:
        def open() -> FakeEngine:
            opened.append(name)
            return FakeEngine(
                model.graph("text"),
                lambda feeds: {"embedding": (factor * feeds["tokens"]).astype(np.float32)},
            )

        return RememberedEngine(model, "text", name, open)

    return make


def kept() -> list[Path]:
    return sorted((cache_folder() / "texts").iterdir())


def test_a_second_start_opens_no_engine(make: Make, opened: list[str]) -> None:
    first = np.asarray(make()({"tokens": TOKENS})["embedding"])
    again = np.asarray(make(factor=2)({"tokens": TOKENS})["embedding"])
    assert np.array_equal(first, again) and first.dtype == again.dtype == np.float32
    assert np.array_equal(first, TOKENS) and opened == ["ort"]


def test_other_tokens_engines_and_files_are_computed(make: Make, text: Model, opened: list[str]) -> None:
    make()({"tokens": TOKENS})
    assert np.array_equal(make(factor=2)({"tokens": TOKENS[:1]})["embedding"], 2 * TOKENS[:1])
    assert np.array_equal(make(factor=3)({"tokens": TOKENS[::-1]})["embedding"], 3 * TOKENS[::-1])
    assert np.array_equal(make(name="openvino", factor=4)({"tokens": TOKENS})["embedding"], 4 * TOKENS)
    files = {**text.manifest.files, "weights.data": "0" * 64}
    other = replace(text, manifest=replace(text.manifest, files=files))
    assert np.array_equal(make(other, factor=5)({"tokens": TOKENS})["embedding"], 5 * TOKENS)
    assert opened == ["ort", "ort", "ort", "openvino", "ort"] and len(kept()) == 5


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "another shape"])
def test_a_damaged_file_is_computed_again(make: Make, opened: list[str], damage: str) -> None:
    make()({"tokens": TOKENS})
    (path,) = kept()
    data = bytearray(path.read_bytes())
    if damage == "another shape":
        make()({"tokens": TOKENS[:1]})
        data = bytearray(next(other for other in kept() if other != path).read_bytes())
    elif damage == "changed":
        data[-1] ^= 1
    path.write_bytes(bytes(data[: {"cut": len(data) - 1, "empty": 0}.get(damage, len(data))]))
    before = len(opened)
    assert np.array_equal(make()({"tokens": TOKENS})["embedding"], TOKENS)
    assert len(opened) == before + 1
    make()({"tokens": TOKENS})
    assert len(opened) == before + 1, "and kept anew"


def test_without_a_place_it_computes(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, opened: list[str]) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("WSSS_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        assert np.array_equal(make()({"tokens": TOKENS})["embedding"], TOKENS)
    assert opened == ["ort", "ort"]


def test_calls_that_do_not_fit_in_memory_are_made_smaller(world: World, text: Model) -> None:
    """The chain asks again with fewer sentences, as the opened engine then says."""
    sizes: list[int] = []

    def script(feeds: Feeds) -> dict[str, np.ndarray]:
        sizes.append(len(feeds["tokens"]))
        if len(feeds["tokens"]) > 1:
            raise OutOfMemory("the cpu has no memory")
        return {"embedding": np.ones((1, 4), np.float32)}

    engine = RememberedEngine(text, "text", "ort", lambda: Device().engine(FakeEngine(text.graph("text"), script), "clip/text"))
    cut_to_fit(embed_prompts, text, engine, [("red",), ("green",)])
    assert sizes[0] > 1 and set(sizes[1:]) == {1}


def test_wrong_feeds_are_refused_as_by_the_engine(make: Make, opened: list[str]) -> None:
    with pytest.raises(FeedError, match="clip/text: expected"):
        make()({"tokens": TOKENS.astype(np.int32)})
    assert not opened


def test_kept_texts_need_the_proof_that_computing_them_would(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else texts of an unverified run would be read by runs that are not."""
    asked: list[str] = []

    def never(model: Model, graph: str) -> None:
        asked.append(f"{model.folder.name}/{graph}")
        raise BundleError("was never compared with PyTorch")

    monkeypatch.setattr("wsss.runtime.chain.open_graph", lambda model, graph, *_, **__: world.open_graph(model, graph))
    monkeypatch.setattr("wsss.runtime.chain.checked_proof", never)
    Chain.open(world.bundle, classes=world.classes, engine="openvino", unverified=True)
    before = len(kept())
    assert before and not asked
    with pytest.raises(BundleError, match="never compared"):
        Chain.open(world.bundle, classes=world.classes, engine="openvino")
    assert asked == ["clip/text"]
    monkeypatch.setattr("wsss.runtime.chain.checked_proof", lambda model, graph: None)
    Chain.open(world.bundle, classes=world.classes, engine="openvino")
    assert len(kept()) == 2 * before, "computed again, not those of the unverified run"
