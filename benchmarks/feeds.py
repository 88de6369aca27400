"""Inputs for any graph of a bundle, made from its manifest alone: neither torch nor weights are needed.

Values are what the graph meets in use (pixels with a photograph's spectrum are not needed to time it): photographs that
fill their canvas, phrases and captions of real length, boxes spread over the canvas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import WsssError
from ..spec import AxisRange, GraphSpec, Model, TensorSpec

Feeds = dict[str, np.ndarray]
UNITS = {"batch": "images", "phrases": "phrases", "boxes": "boxes", "picked": "masks"}
"""The axis whose entries are counted, and what one entry is called. The first one that a graph has counts."""
BOXES_AN_IMAGE = 8
"""Of a decoder call: that many boxes share an embedding, as far as the range of images allows."""
TILE_PX = 500
"""Rows and columns of a fused photograph, as far as the engine takes them: VOC photographs have 500 x 375."""
PHRASE_TOKENS = 4
"""Of a class name and its dot. A caption has the number of tokens that its axis calls usual."""
WORDS = (1_040, 1_090)
"""Tokens that are words in BERT's vocabulary and in the small model's of 1,100: above the special ones and the signs."""
PIECES = (1, 256)
"""Tokens that are pieces of words in every vocabulary of CLIP."""


@dataclass(frozen=True, slots=True)
class Load:
    """One call of a graph."""

    rows: int
    unit: str
    lengths: Mapping[str, int]
    """Length of every free axis."""


def row_axis(spec: GraphSpec, axes: Mapping[str, AxisRange]) -> str:
    """The axis that counts. Raises WsssError when the graph has none that is known."""
    for axis in UNITS:
        if axis in axes:
            return axis
    raise WsssError(f"{spec.file}: none of its axes {', '.join(axes) or '(none)'} counts images, phrases, boxes or masks")


def load_of(spec: GraphSpec, axes: Mapping[str, AxisRange], rows: int) -> Load:
    """The lengths of all axes when the counted one has ``rows`` entries.

    Args:
        axes: the engine's ranges, which may be narrower than the graph's.
    """
    counted = row_axis(spec, axes)
    wanted = {counted: rows, "images": -(-rows // BOXES_AN_IMAGE), "masks": rows, "height": TILE_PX, "width": TILE_PX}
    wanted["length"] = PHRASE_TOKENS
    lengths = {axis: min(max(wanted.get(axis, range_.opt), range_.min), range_.max) for axis, range_ in axes.items()}
    unit = UNITS[counted] if (counted, spec.inputs[0].name) != ("batch", "tokens") else "prompts"
    return Load(rows, unit, lengths)


def feeds_for(model: Model, graph: str, load: Load, *, seed: int = 0) -> Feeds:
    """One array for each input.

    Raises:
        WsssError: an input that no rule is known for.
    """
    spec, rng = model.graph(graph), np.random.default_rng(seed)
    made: Feeds = {}
    for tensor in spec.inputs:
        maker = _MAKERS.get(tensor.name)
        if maker is None:
            raise WsssError(f"{model.folder.name}/{graph}: nobody knows what to feed to {tensor}")
        shape = tuple(axis if isinstance(axis, int) else load.lengths[axis] for axis in tensor.shape)
        array = maker(_Wanted(model, spec, tensor, shape, load, rng))
        made[tensor.name] = np.array(np.broadcast_to(array, shape), dtype=tensor.dtype, order="C")
    return made


@dataclass(frozen=True, slots=True)
class _Wanted:
    model: Model
    spec: GraphSpec
    tensor: TensorSpec
    shape: tuple[int, ...]
    load: Load
    rng: np.random.Generator

    def setting(self, name: str) -> int:
        return int(self.model.manifest.settings[name])


def _pixels(want: _Wanted) -> np.ndarray:
    return want.rng.integers(0, 256, want.shape, dtype=np.uint8)


def _canvas(want: _Wanted) -> np.ndarray:
    """(batch, 2): every photograph fills its canvas."""
    pixels = next(tensor for tensor in want.spec.inputs if tensor.name == "pixels")
    return np.array(pixels.shape[1:3])


def _tokens(want: _Wanted) -> np.ndarray:
    """CLIP: start, words, end, padding. Grounding-DINO: words and a dot in each row."""
    settings, (rows, length) = want.model.manifest.settings, want.shape
    if "dot" in settings:
        tokens = want.rng.integers(*WORDS, (rows, length))
        tokens[:, -1] = want.setting("dot")
        return tokens
    tokens = np.full((rows, length), want.setting("pad"))
    words = min(8, length - 2)
    tokens[:, 0] = max(int(settings.get("start", -1)), 0)
    tokens[:, 1 : 1 + words] = want.rng.integers(*PIECES, (rows, words))
    tokens[:, 1 + words] = want.setting("end")
    return tokens


def _phrase_number(want: _Wanted) -> np.ndarray:
    """(batch, tokens): [CLS], phrases of `PHRASE_TOKENS`, [SEP]."""
    tokens = want.shape[1]
    inner = 1 + np.arange(tokens - 2) // PHRASE_TOKENS
    return np.concatenate([[0], inner, [inner.max(initial=0) + 1]])


def _position(want: _Wanted) -> np.ndarray:
    """(batch, tokens): each token's place in its phrase."""
    return np.concatenate([[0], np.arange(want.shape[1] - 2) % PHRASE_TOKENS, [0]])


def _normal(want: _Wanted) -> np.ndarray:
    return want.rng.normal(size=want.shape)


def _boxes(want: _Wanted) -> np.ndarray:
    """(boxes, 4): xyxy in pixels of SAM's canvas."""
    side = want.model.manifest.preprocess.canvases[0][0]
    extent = want.rng.uniform(0.1, 0.6, (want.shape[0], 2)) * side
    corner = want.rng.uniform(0, 1, extent.shape) * (side - extent)
    return np.concatenate([corner, corner + extent], axis=1)


def _image_of_box(want: _Wanted) -> np.ndarray:
    return np.arange(want.shape[0]) % want.load.lengths["images"]


def _upsampling(want: _Wanted) -> np.ndarray:
    """(length, side): each row a weighted mean of two neighbors, as linear upsampling has it."""
    length, side = want.shape
    at = np.linspace(0, side - 1, length)
    low = np.minimum(at.astype(int), side - 2)
    matrix = np.zeros(want.shape)
    matrix[np.arange(length), low], matrix[np.arange(length), low + 1] = 1 - (at - low), at - low
    return matrix


_MAKERS: dict[str, Callable[[_Wanted], np.ndarray]] = {
    "pixels": _pixels,
    "size": _canvas,
    "tokens": _tokens,
    "mask": lambda want: np.ones(1),
    "text": _normal,
    "phrase": _phrase_number,
    "position": _position,
    "embedding": _normal,
    "boxes": _boxes,
    "image": _image_of_box,
    "logits": _normal,
    "pick": lambda want: np.arange(want.shape[0]) % want.load.lengths["masks"],
    "score": lambda want: want.rng.uniform(0.3, 1, want.shape),
    "label": lambda want: want.rng.integers(1, 21, want.shape),
    "rows": _upsampling,
    "columns": _upsampling,
    "margin": lambda want: np.full(1, 0.1),
}
