"""Ten faults of the kind that TensorRT engines have in the field, each planted in a trained small model: the gate catches all.

With the tolerances of half precision, the wider ones: what passes those would pass everywhere. Sources: `FP16 overflow`
segment-anything#540, `nearest` TensorRT#4646, `swapped rows` TensorRT#4813 and #4853, `stale text` GroundingDINO#294,
`truncated text` the tokenizer's silent cut at 256.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn import functional

from wsss.engines.eager import EagerEngine
from wsss.errors import ParityError
from wsss.export import grounding_dino_layers, verify
from wsss.export.family import Feeds, Graph, Options, family
from wsss.spec import AxisRange

CANVAS = (192, 192)
BATCH = AxisRange(1, 2, 3)


@lru_cache
def graphs(model: str) -> Mapping[str, Graph]:
    """The half-precision graphs of a trained mini model; the modules compute in float32."""
    sizes = (CANVAS,) if model == "grounding-dino" else ()
    prepared = family(model).prepare("mini", "mini", Options(batch=BATCH, sizes=sizes))
    made = (make() for make in prepared.graphs)
    return {graph.name: graph.at("fp16") for graph in made}


class Spoiled:
    """The right engine, with something done to what goes in or comes out."""

    def __init__(self, graph: Graph, feeds: Callable[[Feeds], Feeds] = dict, outputs: Callable[[Feeds], Feeds] = dict) -> None:
        self.engine = EagerEngine(graph.module, graph.spec("x", 18))
        self.inputs, self.outputs, self.axes = self.engine.inputs, self.engine.outputs, self.engine.axes
        self._feeds, self._outputs = feeds, outputs

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> Feeds:
        return self._outputs(dict(self.engine(self._feeds(dict(feeds)))))


def judge(graph: Graph, engine: Spoiled) -> None:
    verify.gate(graph, engine, engine_name="eager", reference_name="official", where=graph.name)


def changed(name: str, change: Callable[[np.ndarray], np.ndarray], feeds: Feeds) -> Feeds:
    return {**feeds, name: change(feeds[name]).astype(feeds[name].dtype)}


class Stale:
    """Text features that the call before left in the buffer, as far as they reach."""

    def __init__(self) -> None:
        self.last: np.ndarray | None = None

    def __call__(self, feeds: Feeds) -> Feeds:
        text = feeds["text"].copy()
        if self.last is not None:
            rows = min(len(text), len(self.last))
            text[:rows] = self.last[:rows]
        self.last = feeds["text"]
        return {**feeds, "text": text}


GDINO, ENCODER, DECODER = ("grounding-dino", "image-192x192"), ("sam", "encoder"), ("sam", "decoder")
FAULTS: dict[str, tuple[tuple[str, str], Callable[[], dict[str, Callable[[Feeds], Feeds]]]]] = {
    "rows swapped": (DECODER, lambda: {"outputs": lambda out: {name: value[::-1].copy() for name, value in out.items()}}),
    "wrong mean": (ENCODER, lambda: {"feeds": partial(changed, "pixels", lambda pixels: np.minimum(pixels, 251) + 4)}),
    "missing padding mask": (GDINO, lambda: {"feeds": partial(changed, "size", lambda size: np.full_like(size, CANVAS[0]))}),
    "blue first": (ENCODER, lambda: {"feeds": partial(changed, "pixels", lambda pixels: pixels[..., ::-1].copy())}),
    "half a pixel off": (DECODER, lambda: {"feeds": partial(changed, "boxes", lambda boxes: boxes - 0.5)}),
    "stale text": (GDINO, lambda: {"feeds": Stale()}),
    "clipped logits": (DECODER, lambda: {"outputs": partial(changed, "logits", lambda logits: logits.clip(-8, 8))}),
    "FP16 overflow": (ENCODER, lambda: {"outputs": partial(changed, "embedding", lambda e: np.where(e == e.max(), np.inf, e))}),
    "truncated text": (
        GDINO,
        lambda: {"feeds": partial(changed, "phrase", lambda phrase: np.where(np.arange(phrase.shape[1]) < 6, phrase, -1))},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_gate_catches(fault: str) -> None:
    (model, name), spoil = FAULTS[fault]
    graph = graphs(model)[name]
    with pytest.raises(ParityError):
        judge(graph, Spoiled(graph, **spoil()))


def test_the_gate_catches_nearest_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    model, name = GDINO
    graph = graphs(model)[name]
    engine = Spoiled(graph)
    right = engine.engine

    def nearest(feeds: Mapping[str, np.ndarray]) -> Feeds:
        # transformers samples through another name, so the reference stays right
        with mock.patch.object(grounding_dino_layers.functional, "grid_sample", partial(_nearest, functional.grid_sample)):
            return dict(right(feeds))

    monkeypatch.setattr(engine, "engine", nearest)
    with pytest.raises(ParityError):
        judge(graph, engine)


def _nearest(sample: Callable[..., torch.Tensor], *arguments: torch.Tensor, **options: object) -> torch.Tensor:
    return sample(*arguments, **{**options, "mode": "nearest"})


@pytest.mark.parametrize(("model", "name"), [GDINO, ENCODER, DECODER])
def test_the_gate_lets_the_right_one_pass(model: str, name: str) -> None:
    graph = graphs(model)[name]
    judge(graph, Spoiled(graph))


def test_all_rows_of_the_samples_differ() -> None:
    for (model, name), _ in FAULTS.values():
        feeds = graphs(model)[name].sample(3, verify.SEED)
        for value in feeds.values():
            if len(value) == 3 and value.ndim > 1 and value.dtype != np.int64:
                assert not torch.equal(*(torch.from_numpy(value[row].copy()) for row in (0, 2)))
