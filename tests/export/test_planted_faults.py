"""Faults of the kind that TensorRT engines have in the field, each planted in a small model: the gate catches all.

With the tolerances of float32 and with the wider ones of half. Eleven in trained models, and those that show in nothing but a
label map, one pixel among them, beside ties that must not count. Sources: `FP16 overflow`
segment-anything#540, `nearest` TensorRT#4646, `swapped rows` TensorRT#4813 and #4853, `stale text` GroundingDINO#294,
`truncated text` the tokenizer's silent cut at 256.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import cast
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from wsss.engines.eager import EagerEngine
from wsss.errors import ParityError
from wsss.export import segmenter, verify
from wsss.export.family import Feeds, Graph, Options, family
from wsss.export.grounding_dino import layers as grounding_dino_layers
from wsss.export.sam import fuse
from wsss.spec import AxisRange, Precision, Preprocess
from wsss.train.checkpoint import RunRecord
from wsss.train.model import Segmenter

CANVAS = (192, 192)
BATCH = AxisRange(1, 2, 3)
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")


@lru_cache
def graphs(model: str, precision: Precision) -> Mapping[str, Graph]:
    """The graphs of a trained mini model with the contract of a precision; the modules compute in float32."""
    sizes = (CANVAS,) if model == "grounding-dino" else ()
    prepared = family(model).prepare("mini", "mini", Options(batch=BATCH, sizes=sizes))
    made = (make() for make in prepared.graphs)
    return {graph.name: graph.at(precision) for graph in made}


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
    "predicted IoU off": (DECODER, lambda: {"outputs": partial(changed, "quality", lambda quality: quality + 0.02)}),
    "truncated text": (
        GDINO,
        lambda: {"feeds": partial(changed, "phrase", lambda phrase: np.where(np.arange(phrase.shape[1]) < 6, phrase, -1))},
    ),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_gate_catches(fault: str, precision: Precision) -> None:
    (model, name), spoil = FAULTS[fault]
    graph = graphs(model, precision)[name]
    with pytest.raises(ParityError):
        judge(graph, Spoiled(graph, **spoil()))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_gate_catches_nearest_sampling(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    model, name = GDINO
    graph = graphs(model, precision)[name]
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


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("model", "name"), [GDINO, ENCODER, DECODER])
def test_the_gate_lets_the_right_one_pass(model: str, name: str, precision: Precision) -> None:
    graph = graphs(model, precision)[name]
    judge(graph, Spoiled(graph))


# ---- in a label map alone ----


class Colors(nn.Module):
    """Logits (B, 4, H, W) of nothing, red, green and blue.

    Args:
        unseen: a label that loses everywhere.
        blue_over_green: None, or blue has the logit of green and so much more, and ties with it where that is nothing.
    """

    def __init__(self, unseen: int | None = None, blue_over_green: float | None = None) -> None:
        super().__init__()
        self.unseen, self.blue_over_green = unseen, blue_over_green

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        nothing, red, green, blue = torch.full_like(values[:, 0], 0.5), *(8 * values).unbind(1)
        if self.blue_over_green is not None:
            blue = green + self.blue_over_green
        logits = torch.stack([nothing, red, green, blue], dim=1)
        if self.unseen is not None:
            logits[:, self.unseen] = -1e3
        return logits


def segmenter_graph(precision: Precision, network: nn.Module) -> Graph:
    record = RunRecord(
        architecture="colors",
        encoder="none",
        options={},
        classes=("red", "green", "blue"),
        mean=(120.0, 120.0, 120.0),
        std=(60.0, 60.0, 60.0),
        crop=64,
        multiple_of=1,
        steps=0,
        preset="none",
        source="a test",
        init={},
        store="",
        images=0,
        tools={},
    )
    return segmenter.image_graph(cast("Segmenter", network), record, (48, 64), BATCH).at(precision)


def swapped_in_a_corner(label_map: np.ndarray) -> np.ndarray:
    """Red and green exchanged in 12 x 12 of 48 x 64 pixels."""
    corner = np.s_[..., :12, :12]
    label_map = label_map.copy()
    label_map[corner] = np.array([0, 2, 1, 3])[label_map[corner]]
    return label_map


def with_one_pixel_wrong(label_map: np.ndarray) -> np.ndarray:
    """The first pixel of the last row of a batch has the next label."""
    label_map = label_map.copy()
    label_map.reshape(len(label_map), -1)[-1, 0] += 1
    return label_map % 4


IN_LABEL_MAPS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "two classes swapped in a corner": swapped_in_a_corner,
    "one pixel to the right": lambda label_map: np.roll(label_map, 1, axis=2),
    "one pixel wrong": with_one_pixel_wrong,
    "a label that does not exist": lambda label_map: np.where(label_map == 3, 255, label_map),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("fault", IN_LABEL_MAPS)
def test_the_gate_catches_in_a_label_map(fault: str, precision: Precision) -> None:
    graph = segmenter_graph(precision, Colors())
    with pytest.raises(ParityError, match="'label_map'"):
        judge(graph, Spoiled(graph, outputs=partial(changed, "label_map", IN_LABEL_MAPS[fault])))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_gate_catches_a_class_that_is_never_chosen(precision: Precision) -> None:
    with pytest.raises(ParityError, match="'label_map'"):
        judge(segmenter_graph(precision, Colors()), Spoiled(segmenter_graph(precision, Colors(unseen=3))))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ties_in_a_label_map_are_none_of_its_faults(precision: Precision) -> None:
    """Green and blue tie in every pixel: a rounding error turns many over; half a logit is an error."""
    graph = segmenter_graph(precision, Colors(blue_over_green=0.0))
    feeds = graph.sample(1, verify.SEED)
    rounded = Spoiled(segmenter_graph(precision, Colors(blue_over_green=1e-5)))
    assert (graph.reference(feeds, {})["label_map"] != rounded(feeds)["label_map"]).any()
    judge(graph, rounded)
    with pytest.raises(ParityError, match="'label_map'"):
        judge(graph, Spoiled(segmenter_graph(precision, Colors(blue_over_green=0.5))))


def fuse_graph(precision: Precision) -> Graph:
    preprocess = Preprocess(
        resize="longest", longest_px=256, filter="bilinear", canvases=((256, 256),), mean=(0, 0, 0), std=(1, 1, 1), source="test"
    )
    return fuse.fuse_graph(preprocess, logits_side=64, masks=AxisRange(1, 4, 9)).at(precision)


def with_one_fused_pixel_wrong(label_map: np.ndarray) -> np.ndarray:
    label_map = label_map.copy()
    label_map[3, 5] = label_map[3, 5] % 4 + 1
    return label_map


IN_FUSED: dict[str, tuple[str, Callable[[Feeds], Feeds]]] = {
    "one pixel wrong": ("label_map", partial(changed, "label_map", with_one_fused_pixel_wrong)),
    "one pixel lower": ("label_map", partial(changed, "label_map", lambda label_map: np.roll(label_map, 1, axis=0))),
    "void is nobody's": ("label_map", partial(changed, "label_map", lambda label_map: np.where(label_map == 255, 0, label_map))),
    "a pixel too many inside": ("area", partial(changed, "area", lambda area: area + 1)),
    "a pixel too few inside": ("area", partial(changed, "area", lambda area: area - 1)),
    "won by the next mask": ("won", partial(changed, "won", lambda won: np.roll(won, 1))),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("fault", IN_FUSED)
def test_the_gate_catches_in_fused_masks(fault: str, precision: Precision) -> None:
    output, spoil = IN_FUSED[fault]
    graph = fuse_graph(precision)
    judge(graph, Spoiled(graph))
    with pytest.raises(ParityError, match=f"'{output}'"):
        judge(graph, Spoiled(graph, outputs=spoil))


def test_all_rows_of_the_samples_differ() -> None:
    for (model, name), _ in FAULTS.values():
        feeds = graphs(model, "fp16")[name].sample(3, verify.SEED)
        for value in feeds.values():
            if len(value) == 3 and value.ndim > 1 and value.dtype != np.int64:
                assert not torch.equal(*(torch.from_numpy(value[row].copy()) for row in (0, 2)))
