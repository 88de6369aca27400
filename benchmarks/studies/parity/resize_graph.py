"""The resizing graph in ONNX Runtime against Pillow: ``python -m wsss.benchmarks.studies.parity.resize_graph --images FOLDER``.

Every photograph of a folder, and noise of odd sizes, as CLIP ViT-B/16 (five views), Grounding-DINO and SAM take them, against the
one call of Pillow with which the host makes the same. Values of `results/resize-graph.json`, for each model, and there for the
photographs and for noise:

``pictures``, ``worst``
    Number of views or canvases, and their largest difference in gray levels.
``equal``
    Share of the values inside the photograph that are equal, of all and of the picture with the fewest.
``host_ms``
    CPU time of the host for a VOC photograph's inputs: all three models in Pillow, and decoding it, which is what remains.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from .... import __version__
from ....engines.machine import version_of
from ....engines.ort import OrtEngine
from ....export.resize import PARTS, WHOLE, resize_graph
from ....export.to_onnx import OPSET, WeightFile, export_onnx
from ....frame import frame_for
from ....photographs import decode, read_file
from ....pixels.pictures import order_of, picture_of, rgbx_of
from ....runtime.canvas import on_canvas
from ....runtime.tag import resized_views, view_windows
from ....spec import Preprocess
from ..harness import RESULTS, log, study_parser, write_result

RESULT = RESULTS / "resize-graph.json"
ODD = ((1, 1), (1, 300), (300, 1), (7, 5), (97, 389), (480, 640), (320, 480), (427, 640), (640, 427), (223, 225), (1201, 803))
"""Sizes (height, width) of noise; with 320 x 480, a tenth of the detector's values lie halfway between two gray levels."""


def _preprocess(**values: Any) -> Preprocess:
    return Preprocess(mean=(0, 0, 0), std=(1, 1, 1), source="as published", **values)


DETECTOR = ((1024, 1024), (800, 1344), (1344, 800))
MODELS = {
    "clip": _preprocess(resize="squash", longest_px=224, filter="bicubic", canvases=((224, 224),)),
    "grounding-dino": _preprocess(
        resize="short-longest",
        short_px=800,
        longest_px=1333,
        filter="bilinear",
        canvases=((1024, 1024), (800, 1344), (1344, 800)),
    ),
    "sam": _preprocess(resize="longest", longest_px=1024, filter="bilinear", canvases=((1024, 1024),)),
}


class Compared:
    """Differences so far."""

    def __init__(self) -> None:
        self.pictures = self.values = self.equal = self.worst = 0
        self.fewest = 1.0

    def add(self, got: np.ndarray, want: np.ndarray) -> None:
        """Compare two pictures (h, w, 3) uint8."""
        difference = np.abs(got.astype(int) - want)
        self.pictures += 1
        self.values += got.size
        self.equal += int((difference == 0).sum())
        self.worst = max(self.worst, int(difference.max()))
        self.fewest = min(self.fewest, float((difference == 0).mean()))

    def found(self) -> dict[str, Any]:
        """The values for the result."""
        equal = {"all": round(self.equal / self.values, 6), "fewest": round(self.fewest, 6)}
        return {"pictures": self.pictures, "worst": self.worst, "equal": equal}


def compare(engines: dict[tuple[int, int], OrtEngine], preprocess: Preprocess, photographs: Iterable[np.ndarray]) -> Compared:
    """Compare the graphs of a model with the host, on pixels (H, W, 3) uint8."""
    order, compared = order_of(), Compared()
    assert order is not None, "Pillow resizes the axes in an order that is not known"
    for pixels in photographs:
        height, width = pixels.shape[:2]
        frame = frame_for(preprocess, height, width)
        if preprocess.resize == "squash":
            windows = view_windows(height, width, (1, 2))
            out = np.zeros((len(windows), *frame.canvas, 3), np.uint8)
            want = resized_views(picture_of(pixels), windows, frame.canvas, preprocess.filter, out)
        else:
            windows = [(0, height, 0, width)]
            want = on_canvas(pixels, frame, preprocess.filter)[None]
        feeds = {
            "photo": rgbx_of(pixels),
            "window": np.array(windows, np.int64),
            "size": np.array([frame.valid] * len(windows), np.int64),
            "columns_first": np.array([order((y1 - y0, x1 - x0), frame.valid) for y0, y1, x0, x1 in windows]),
        }
        got = np.asarray(engines[frame.canvas](feeds)["pixels"])
        assert not got[:, frame.valid[0] :].any() and not got[:, :, frame.valid[1] :].any()
        for one, other in zip(got, want, strict=True):
            compared.add(*(each[: frame.valid[0], : frame.valid[1]] for each in (one, other)))
    return compared


def host_ms(path: Path) -> dict[str, float]:
    """CPU milliseconds for one photograph."""
    file = read_file(path.parent, path.name)
    pixels = decode(file).pixels

    def canvases() -> None:
        for name, preprocess in MODELS.items():
            frame = frame_for(preprocess, *pixels.shape[:2])
            if name != "clip":
                on_canvas(pixels, frame, preprocess.filter)
                continue
            windows = view_windows(pixels.shape[0], pixels.shape[1], (1, 2))
            resized_views(picture_of(pixels), windows, frame.canvas, preprocess.filter, np.zeros((5, *frame.canvas, 3), np.uint8))

    def median(work: Callable[[], object]) -> float:
        times = []
        for _ in range(20):
            begun = time.thread_time()
            work()
            times.append(time.thread_time() - begun)
        return round(1000 * float(np.median(times)), 2)

    return {"pillow": median(canvases), "decode": median(lambda: decode(file))}


def main() -> None:
    """Run the command line of the module."""
    parser = study_parser(__spec__, __doc__, out=RESULT)
    parser.add_argument("--images", type=Path, required=True, help="folder of photographs")
    given = parser.parse_args()
    paths = sorted(given.images.glob("*.jpg"))
    photographs = [decode(read_file(path.parent, path.name)).pixels for path in paths]
    noise = [np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8) for size in ODD]
    result: dict[str, Any] = {
        "version": __version__,
        "pillow": PIL.__version__,
        "onnxruntime": version_of("onnxruntime"),
        "photographs": len(paths),
        "host_ms": host_ms(paths[0]),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, preprocess in MODELS.items():
            engines = {}
            for canvas in preprocess.canvases:
                graph = resize_graph(preprocess, canvas, views=PARTS if name == "clip" else WHOLE)
                path = Path(folder) / f"{name}-{graph.name}.onnx"
                export_onnx(graph, path, WeightFile(path.with_suffix(".data")))
                engines[canvas] = OrtEngine(path, graph.spec(path.name, OPSET))
            log(name)
            result[name] = {
                "photographs": compare(engines, preprocess, photographs).found(),
                "noise": compare(engines, preprocess, noise).found(),
            }
    write_result(given.out, result)


if __name__ == "__main__":
    main()
