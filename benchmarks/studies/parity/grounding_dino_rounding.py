"""Run our Grounding-DINO in OpenVINO, which rounds in another way than PyTorch, and compare with the official module.

    python -m wsss.benchmarks.studies.parity.grounding_dino_rounding PHOTOGRAPHS --work DIR

One photograph on each canvas: 800 px high, 800 px wide, and square, so that the outer cells of 50 lie exactly on the limits of
proposals (`wsss.export.grounding_dino.graphs.EDGE`). The official module takes the graph's queries, as in the gate.
``below_the_last`` is how far below the lowest official query a query's score is, as a share of the largest score; where that is
0, the queries that are not shared are ties (all cells that are no proposals have the same score). The same for a graph without
the margin. Writes ``benchmarks/results/grounding-dino-rounding.json``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from PIL import Image
from torch import Tensor, nn

from wsss.engines.openvino import OpenVinoEngine
from wsss.export.exporting import tool_versions
from wsss.export.family import Feeds, Graph, Options, Prepared
from wsss.export.grounding_dino import family as grounding_dino
from wsss.export.grounding_dino.graphs import EDGE
from wsss.export.to_onnx import OPSET, WeightFile, export_onnx
from wsss.spec import AxisRange

from ..harness import RESULTS, about, log, read_result, study_parser, write_result

RESULT = RESULTS / "grounding-dino-rounding.json"
CASES = {
    "800 px high": ((800, 1344), (800, 1066)),
    "800 px wide": ((1344, 800), (1066, 800)),
    "square": ((1024, 1024), (800, 800)),
}
"""(height, width) of the canvas and of the photograph on it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line of the module."""
    parser = study_parser(__spec__, __doc__, out=RESULT, work="build/rounding")
    parser.add_argument("photographs", type=Path, help="folder of JPEG files")
    parser.add_argument("--weights", default="random:0")
    options = parser.parse_args(arguments)
    photographs = sorted(options.photographs.glob("*.jpg"))
    found = read_result(options.out)
    for number, (name, (canvas, size)) in enumerate(CASES.items()):
        if name in found:
            continue
        log(f"{name}: exporting")
        sizes = Options(sizes=(canvas,), batch=AxisRange(1, 1, 2))
        prepared = grounding_dino.prepare("swin_t", options.weights, sizes)
        photograph = np.asarray(Image.open(photographs[number]).convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR))
        found[name] = measure(prepared, canvas, photograph, options.work)
        write_result(options.out, {**found, "weights": options.weights, "tools": tool_versions(), **about()})


def measure(prepared: Prepared, canvas: tuple[int, int], photograph: np.ndarray, work: Path) -> dict[str, Any]:
    """Export one canvas into ``work``, and compare one photograph (H, W, 3) uint8, with and without the margin."""
    work.mkdir(parents=True, exist_ok=True)
    graph, path = prepared.graphs[1](), work / "graph.onnx"
    export_onnx(graph, path, WeightFile(work / "weights.data"))
    without = without_margin(path)
    feeds = graph.sample(1, 0)  # for its caption
    height, width = photograph.shape[:2]
    feeds["pixels"][0], feeds["size"][0] = 0, (height, width)
    feeds["pixels"][0, :height, :width] = photograph
    result: dict[str, Any] = {"canvas": canvas, "photograph": (height, width)}
    for name, file in {"with margin": path, "without": without}.items():
        log(f"{canvas}: {name}")
        outputs = OpenVinoEngine(file, graph.spec(file.name, OPSET))(feeds)
        result[name] = compared(graph, feeds, {key: np.asarray(value) for key, value in outputs.items()})
    return result


def without_margin(path: Path) -> Path:
    """A copy of a graph, beside it, that compares proposals with 0.01 and 0.99 exactly, as the official code does."""
    model = onnx.load(path, load_external_data=False)
    limits = {np.float32(0.01 + EDGE): np.float32(0.01), np.float32(0.99 - EDGE): np.float32(0.99)}
    replaced = []
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL and (value := onnx.numpy_helper.to_array(tensor)).size == 1:
            limit = limits.get(np.float32(value.item()))
            if limit is not None:
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.full_like(value, limit), tensor.name))
                replaced.append(limit)
    assert sorted(replaced) == sorted(limits.values())
    copy = path.with_name("without-margin.onnx")
    onnx.save(model, copy)
    return copy


def compared(graph: Graph, feeds: Feeds, got: Feeds) -> dict[str, Any]:
    """The difference to the official module with the graph's queries, and the queries that are not official ones."""
    scores: list[Tensor] = []
    model = graph.reference.args[0]  # type: ignore[attr-defined]  # of official_detections

    def keep(_module: nn.Module, _inputs: object, logits: Tensor) -> None:
        scores.append(logits[0].amax(-1))

    hook = model.model.encoder_output_class_embed.register_forward_hook(keep, prepend=True)
    try:
        want = graph.reference(feeds, got, tie=np.inf)  # type: ignore[call-arg]
    finally:
        hook.remove()
    official = scores[0].topk(got["query"].shape[1])
    lowest, unit = float(official.values[-1]), float(official.values.abs().max())
    query = torch.from_numpy(got["query"][0])
    other = query[~torch.isin(query, official.indices)]
    beyond = ((lowest - scores[0][other]) / unit).tolist()
    ranks = (scores[0][query] - official.values).abs() / unit

    def apart(name: str) -> float:
        ours, theirs = (1 / (1 + np.exp(-each[name])) if name == "logits" else each[name] for each in (got, want))
        return float(np.abs(ours - theirs).max())

    return {
        "queries": len(query),
        "shared": len(query) - len(other),
        "below_the_last": float(f"{max(beyond, default=0.0):.2g}"),
        "largest_gap_of_a_rank": float(ranks.max()),
        "near_tie": grounding_dino.TIE,
        "scores": apart("logits"),
        "boxes": apart("boxes"),
    }


if __name__ == "__main__":
    main()
