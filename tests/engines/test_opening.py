"""From a name after ``--engine`` to an engine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from wsss.engines.opening import open_graph, resolve
from wsss.engines.ort import OrtEngine
from wsss.errors import BundleError, UsageError, WsssError
from wsss.spec import GraphSpec, Manifest, Model, Preprocess

if TYPE_CHECKING:
    from collections.abc import Mapping


@pytest.fixture
def model(onnx_file: Callable[..., Path], spec: GraphSpec) -> Model:
    graphs: Mapping[str, GraphSpec] = {"double": spec}
    preprocess = Preprocess(
        resize="squash", longest_px=3, filter="bilinear", canvases=((3, 3),), mean=(0, 0, 0), std=(1, 1, 1), source="test"
    )
    manifest = Manifest(family="sam", variant="test", preprocess=preprocess, graphs=graphs, weights={}, tools={})
    return Model(onnx_file().parent, manifest)


@pytest.mark.parametrize(("typed", "engine"), [("auto", "ort"), ("ort", "ort"), ("eager", "eager")])
def test_names(typed: str, engine: str) -> None:
    assert resolve(typed) == engine


@pytest.mark.parametrize("typed", ["", "ORT", "onnx", "tensorflow"])
def test_an_unknown_name_lists_the_known_ones(typed: str) -> None:
    with pytest.raises(UsageError, match=f"--engine: expected one of auto, ort, eager.*, got '{typed}'"):
        resolve(typed)


@pytest.mark.parametrize("engine", ["auto", "ort"])
def test_opens_a_graph_of_a_model(model: Model, engine: str) -> None:
    assert isinstance(open_graph(model, "double", engine), OrtEngine)


def test_a_graph_it_has_not(model: Model) -> None:
    with pytest.raises(BundleError, match="no graph 'triple', only double"):
        open_graph(model, "triple", "ort")


def test_eager_without_torch_says_what_to_install(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wsss.export.reference", raising=False)
    monkeypatch.delitem(sys.modules, "wsss.engines.eager", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(WsssError, match="--engine eager: needs torch") as caught:
        open_graph(model, "double", "eager")
    assert caught.value.hint == "pip install 'wsss[export]'"
