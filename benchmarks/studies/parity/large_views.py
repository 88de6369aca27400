"""CLIP's views of large photographs against Pillow's: ``python -m wsss.benchmarks.studies.parity.large_views --images FOLDER``.

Photographs of a folder are put side by side to pictures of 3, 12 and 24 million pixels, since photographs of that size are not at
hand, and enlarged ones would lack details. Values of `results/large-views.json`, for each size:

``blocks``
    (down, across) pixels of which the means are taken.
``worst``, ``within_one``
    Largest difference of a value from Pillow's in gray levels, and the share of the values that differ by one or less, of five
    views of 224 x 224 pixels.
``cosine``, ``probability``
    Smallest cosine of an embedding with that of Pillow's views, and largest difference of a class's probability: the small CLIP
    of ``mini``, whose views have 96 pixels.
``ms``, ``pillow_ms``
    CPU time for the five views.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from .... import __version__
from ....batch import Photograph
from ....engines.engine import Engine
from ....engines.opening import open_graph
from ....photographs import read_photograph
from ....pixels.pictures import picture_of
from ....runtime import tag
from ....runtime.bundles import MINI
from ....runtime.chain import Chain
from ....runtime.tag import resized_views, shortest_sides, view_windows
from ....spec import open_bundle
from ..harness import RESULTS, study_parser, write_result

RESULT = RESULTS / "large-views.json"
SIZES = ((1500, 2000), (3000, 4000), (2999, 4001), (4123, 3011), (4000, 6000))
SIDE, ROW_PX = 224, 330


def put_together(photographs: list[np.ndarray], size: tuple[int, int], seed: int) -> np.ndarray:
    """Photographs side by side, in rows of 330 pixels, until a picture (H, W, 3) uint8 of this size is full."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((*size, 4), np.uint8)
    for top in range(0, size[0], ROW_PX):
        left = 0
        while left < size[1]:
            part = photographs[rng.integers(len(photographs))][: min(ROW_PX, size[0] - top), : size[1] - left]
            picture[top : top + len(part), left : left + part.shape[1], :3] = part
            left += part.shape[1]
    return picture[..., :3]


@contextmanager
def samples(count: float) -> Iterator[None]:
    """Another `wsss.runtime.tag.SAMPLES`; infinity gives Pillow's views."""
    usual, tag.SAMPLES = tag.SAMPLES, count  # type: ignore[assignment]
    try:
        yield
    finally:
        tag.SAMPLES = usual


def views(pixels: np.ndarray, side: int, levels: tuple[int, ...]) -> np.ndarray:
    """The views (V, S, S, 3) uint8."""
    windows = view_windows(pixels.shape[0], pixels.shape[1], levels)
    out = np.zeros((len(windows), side, side, 3), np.uint8)
    return resized_views(picture_of(pixels), windows, (side, side), "bicubic", out)


def milliseconds(work: Callable[[], object]) -> float:
    """Median CPU time of five calls in this thread."""
    times = []
    for _ in range(5):
        begun = time.thread_time()
        work()
        times.append(time.thread_time() - begun)
    return 1000 * float(np.median(times))


def measure(pixels: np.ndarray, chain: Chain, clip: Engine, levels: tuple[int, ...]) -> dict[str, Any]:
    """All values for one picture."""
    side = clip.inputs["pixels"].shape[1]
    assert isinstance(side, int)
    photo = Photograph(name="x", pixels=pixels)

    def outcome() -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        rows = [np.asarray(clip({"pixels": view[None]})["embedding"]) for view in views(pixels, side, levels)]
        made, score = views(pixels, SIDE, (1, 2)).astype(int), chain.tag([photo]).score
        return made, np.concatenate(rows), score, milliseconds(lambda: views(pixels, SIDE, (1, 2)))

    got = outcome()
    with samples(np.inf):
        want = outcome()
    difference = np.abs(got[0] - want[0])
    shortest = shortest_sides(view_windows(*photo.shape, (1, 2)))
    return {
        "blocks": [max(int(length / (tag.SAMPLES * SIDE)), 1) for length in shortest],
        "worst": int(difference.max()),
        "within_one": round(float((difference <= 1).mean()), 5),
        "cosine": round(float((got[1] * want[1]).sum(axis=1).min()), 6),
        "probability": round(float(np.abs(got[2] - want[2]).max()), 4),
        "ms": round(got[3], 1),
        "pillow_ms": round(want[3], 1),
    }


def main() -> None:
    """Run the command line of the module."""
    parser = study_parser(__spec__, __doc__, out=RESULT)
    parser.add_argument("--images", type=Path, required=True, help="folder of photographs, 330 pixels or higher")
    given = parser.parse_args()
    paths = sorted(given.images.glob("*.jpg"))
    photographs = [read_photograph(path.parent, path.name).pixels for path in paths]
    chain = Chain.open("mini", classes="mini", engine="ort", device="cpu", until="tag")
    model = open_bundle(MINI).model("clip")
    clip, levels = open_graph(model, "image", "ort", device="cpu"), tuple(model.manifest.settings["views"])
    result: dict[str, Any] = {"version": __version__, "pillow": PIL.__version__, "photographs": len(paths)}
    for number, size in enumerate(SIZES):
        result[f"{size[1]} x {size[0]}"] = measure(put_together(photographs, size, number), chain, clip, levels)
    write_result(given.out, result)


if __name__ == "__main__":
    main()
