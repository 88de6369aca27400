"""Random inputs for any graph of a bundle, made from its manifest alone, without torch or weights.

They are like those of real use, except that pixels are noise: photographs that fill their canvas, phrases and captions of real
length, boxes spread over the canvas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import WsssError
from ..spec import AxisRange, GraphSpec, Model, TensorSpec

Feeds = dict[str, np.ndarray]
UNITS = {"batch": "images", "phrases": "phrases", "boxes": "boxes", "picked": "masks", "views": "views"}
"""Axes that can be a graph's batch, and the unit of their entries. The first one that a graph has is its batch."""
BOXES_AN_IMAGE = 8
"""Boxes that share an embedding in a decoder call, where the range of images allows it."""
TILE_PX = 500
"""Height and width of a fused photograph, where the engine supports them: VOC photographs have 500 x 375."""
PHOTO_PX = (375, 500)
"""Height and width of a photograph that the engine resizes."""
PHRASE_TOKENS = 4
"""Tokens of a class name with its dot. A caption has the usual length of its axis."""
WORDS = (1_040, 1_090)
"""Range of tokens that are words both in BERT's vocabulary and in the small model's of 1,100 tokens: above special tokens and
punctuation."""
PIECES = (1, 256)
"""Range of tokens that are parts of words in every vocabulary of CLIP."""


@dataclass(frozen=True, slots=True)
class Load:
    """The shape of one call of a graph."""

    rows: int
    """Batch size."""
    unit: str
    """What an entry of the batch is: images, prompts, phrases, boxes, masks or views."""
    lengths: Mapping[str, int]
    """Length of every free axis."""


def row_axis(spec: GraphSpec, axes: Mapping[str, AxisRange]) -> str:
    """The batch axis of a graph. Raises WsssError when it has none of `UNITS`."""
    for axis in UNITS:
        if axis in axes:
            return axis
    raise WsssError(f"{spec.file}: none of its axes {', '.join(axes) or '(none)'} counts images, phrases, boxes, masks or views")


def load_of(spec: GraphSpec, axes: Mapping[str, AxisRange], rows: int) -> Load:
    """The lengths of all axes for a batch of ``rows``.

    Args:
        axes: the engine's ranges, which may be narrower than the graph's.
    """
    counted = row_axis(spec, axes)
    preferred = {counted: rows, "images": -(-rows // BOXES_AN_IMAGE), "masks": rows, "height": TILE_PX, "width": TILE_PX}
    preferred |= {"length": PHRASE_TOKENS, "photo_height": PHOTO_PX[0], "photo_width": PHOTO_PX[1]}
    lengths = {axis: min(max(preferred.get(axis, range_.opt), range_.min), range_.max) for axis, range_ in axes.items()}
    unit = UNITS[counted] if (counted, spec.inputs[0].name) != ("batch", "tokens") else "prompts"
    return Load(rows, unit, lengths)


def feeds_for(model: Model, graph: str, load: Load, *, seed: int = 0) -> Feeds:
    """Make one array for each input.

    Raises:
        WsssError: there is no rule for an input.
    """
    spec, rng = model.graph(graph), np.random.default_rng(seed)
    feeds: Feeds = {}
    for tensor in spec.inputs:
        maker = _MAKERS.get(tensor.name)
        if maker is None:
            raise WsssError(f"{model.folder.name}/{graph}: there is no rule to make the input {tensor}")
        shape = tuple(axis if isinstance(axis, int) else load.lengths[axis] for axis in tensor.shape)
        array = maker(_Request(model, spec, tensor, shape, load, rng))
        feeds[tensor.name] = np.array(np.broadcast_to(array, shape), dtype=tensor.dtype, order="C")
    return feeds


@dataclass(frozen=True, slots=True)
class _Request:
    """The input to make, and the call that it is part of."""

    model: Model
    spec: GraphSpec
    tensor: TensorSpec
    shape: tuple[int, ...]
    load: Load
    rng: np.random.Generator

    def setting(self, name: str) -> int:
        return int(self.model.manifest.settings[name])


def _pixels(request: _Request) -> np.ndarray:
    return request.rng.integers(0, 256, request.shape, dtype=np.uint8)


def _canvas(request: _Request) -> np.ndarray:
    """(batch, 2) int64, height and width: every photograph fills its canvas."""
    pixels = next(tensor for tensor in (*request.spec.inputs, *request.spec.outputs) if tensor.name == "pixels")
    return np.array(pixels.shape[1:3])


def _tokens(request: _Request) -> np.ndarray:
    """CLIP: start, words, end, padding. Grounding-DINO: words and a dot in each row."""
    settings, (rows, length) = request.model.manifest.settings, request.shape
    if "dot" in settings:
        tokens = request.rng.integers(*WORDS, (rows, length))
        tokens[:, -1] = request.setting("dot")
        return tokens
    tokens = np.full((rows, length), request.setting("pad"))
    words = min(8, length - 2)
    tokens[:, 0] = max(int(settings.get("start", -1)), 0)
    tokens[:, 1 : 1 + words] = request.rng.integers(*PIECES, (rows, words))
    tokens[:, 1 + words] = request.setting("end")
    return tokens


def _phrase_number(request: _Request) -> np.ndarray:
    """(batch, tokens): [CLS], phrases of `PHRASE_TOKENS`, [SEP]."""
    tokens = request.shape[1]
    inner = 1 + np.arange(tokens - 2) // PHRASE_TOKENS
    return np.concatenate([[0], inner, [inner.max(initial=0) + 1]])


def _position(request: _Request) -> np.ndarray:
    """(batch, tokens): each token's position in its phrase."""
    return np.concatenate([[0], np.arange(request.shape[1] - 2) % PHRASE_TOKENS, [0]])


def _normal(request: _Request) -> np.ndarray:
    return request.rng.normal(size=request.shape)


def _boxes(request: _Request) -> np.ndarray:
    """(boxes, 4): xyxy in pixels of SAM's canvas."""
    side = request.model.manifest.preprocess.canvases[0][0]
    extent = request.rng.uniform(0.1, 0.6, (request.shape[0], 2)) * side
    corner = request.rng.uniform(0, 1, extent.shape) * (side - extent)
    return np.concatenate([corner, corner + extent], axis=1)


def _image_of_box(request: _Request) -> np.ndarray:
    return np.arange(request.shape[0]) % request.load.lengths["images"]


def _pick(request: _Request) -> np.ndarray:
    """(picked,) or (boxes,): masks of those that a call has, in order."""
    lengths = request.load.lengths
    return np.arange(request.shape[0]) % (lengths["masks"] if "masks" in lengths else lengths["outlined"] * lengths["slots"])


def _upsampling(request: _Request) -> np.ndarray:
    """(length, side): each row is a weighted mean of two neighbors, as in linear upsampling."""
    length, side = request.shape
    position = np.linspace(0, side - 1, length)
    low = np.minimum(position.astype(int), side - 2)
    matrix = np.zeros(request.shape)
    matrix[np.arange(length), low], matrix[np.arange(length), low + 1] = 1 - (position - low), position - low
    return matrix


def _whole(request: _Request) -> np.ndarray:
    """(views, 4): y0, y1, x0, x1 of the whole photograph."""
    return np.array([0, request.load.lengths["photo_height"], 0, request.load.lengths["photo_width"]])


_MAKERS: dict[str, Callable[[_Request], np.ndarray]] = {
    "pixels": _pixels,
    "size": _canvas,
    "photo": _pixels,
    "window": _whole,
    "columns_first": lambda request: np.zeros(1),
    "tokens": _tokens,
    "mask": lambda request: np.ones(1),
    "text": _normal,
    "phrase": _phrase_number,
    "position": _position,
    "embedding": _normal,
    "features_8": _normal,
    "features_4": _normal,
    "boxes": _boxes,
    "image": _image_of_box,
    "multimask": lambda request: np.zeros(1),
    "logits": _normal,
    "pick": _pick,
    "encoded": _normal,
    "queries": _normal,
    "features_2x": _normal,
    "features_4x": _normal,
    "row": lambda request: np.arange(request.shape[0]) % request.load.lengths["phrases"],
    "query": lambda request: request.rng.integers(0, request.setting("queries"), request.shape),
    "score": lambda request: request.rng.uniform(0.3, 1, request.shape),
    "label": lambda request: request.rng.integers(1, 21, request.shape),
    "rows": _upsampling,
    "columns": _upsampling,
    "margin": lambda request: np.full(1, 0.1),
}
