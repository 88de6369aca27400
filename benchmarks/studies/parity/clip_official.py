"""Compare our CLIP, in mixed batches in ONNX Runtime, with open_clip on real photographs: same weights, same resizing.

    python -m wsss.benchmarks.studies.parity.clip_official PHOTOGRAPHS --variant ViT-B-16 --weights random:0

Exports the model. For every photograph it then compares the steps of the runtime (read, resize, image graph) with those of
open_clip (``image_transform`` in squash mode, ``encode_image`` at batch 1), and every VOC prompt likewise. Adds a row to
``benchmarks/results/clip-official.json``. Progress goes to stderr.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from tokenizers import Tokenizer

from wsss.classes import parse_classes
from wsss.engines.ort import OrtEngine
from wsss.export.clip import family as clip
from wsss.export.clip import weights as clip_weights
from wsss.export.exporting import export_model, tool_versions
from wsss.export.family import Options
from wsss.frame import frame_for
from wsss.photographs import read_photograph
from wsss.runtime.canvas import on_canvas
from wsss.spec import AxisRange, Bundle, Model

from ..harness import RESULTS, folder_megabytes, log, peak_memory_bytes, study_parser, write_result

RESULT = RESULTS / "clip-official.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line of the module."""
    parser = study_parser(__spec__, __doc__)
    parser.add_argument("photographs", type=Path, help="folder of JPEG files")
    parser.add_argument("--variant", default=clip.FAMILY.default)
    parser.add_argument("--weights", default="random:0")
    parser.add_argument("--count", type=int, default=24, help="number of photographs, the first by name")
    parser.add_argument("--batch", type=int, default=8, help="photographs, or prompts, in a call")
    parser.add_argument("--most", type=int, default=0, help="largest batch of the export and its gate; 0 takes the variant's")
    options = parser.parse_args(arguments)
    photographs = sorted(options.photographs.glob("*.jpg"))[: options.count]
    with tempfile.TemporaryDirectory() as folder:
        row = measure(options.variant, options.weights, photographs, Path(folder), batch=options.batch, most=options.most)
    rows = json.loads(RESULT.read_text()) if RESULT.is_file() else []
    rows = [old for old in rows if (old["variant"], old["weights"]) != (row["variant"], row["weights"])] + [row]
    write_result(RESULT, rows)


def measure(
    variant: str, weights: str, photographs: Sequence[Path], bundle: Path, *, batch: int, most: int = 0
) -> dict[str, Any]:
    """Export one variant into ``bundle`` and compare it with open_clip.

    Args:
        photographs: image files; a batch may mix sizes.
        batch: photographs, or prompts, in a call; at most the graph's largest batch.
        most: largest batch of the export and of its gate; 0 takes the variant's.

    Returns:
        Worst cosine over photographs and over prompts, largest difference, gate errors, seconds, megabytes.
    """
    begun = time.monotonic()
    options = Options(batch=AxisRange(1, min(8, most), most) if most else None)
    manifest = export_model(clip.FAMILY, variant=variant, weights=weights, bundle=bundle, options=options, log=log)
    export_seconds = time.monotonic() - begun
    model = Bundle(bundle).model("clip")
    ours, theirs, seconds = {}, {}, {}
    for name, (got, per_call) in {"image": _our_images(model, photographs, batch), "text": _our_prompts(model, batch)}.items():
        ours[name], seconds[name] = got, per_call
    official = clip_weights.load(variant, weights)
    theirs["image"] = _their_images(official, manifest.preprocess.canvases[0], photographs)
    theirs["text"] = _their_prompts(official)
    return {
        "variant": manifest.variant,
        "weights": weights,
        "photographs": len(photographs),
        "prompts": len(ours["text"]),
        "batch": batch,
        "worst_cosine": {name: _worst_cosine(ours[name], theirs[name]) for name in ours},
        "largest_difference": {name: float(np.abs(ours[name] - theirs[name]).max()) for name in ours},
        "gate_error": {
            name: {f"batch {row.batch} against {row.against}": row.error for row in graph.parity.rows}
            for name, graph in manifest.graphs.items()
            if graph.parity is not None
        },
        "export_and_gate_seconds": round(export_seconds, 1),
        "milliseconds_each": {name: round(1000 * value, 1) for name, value in seconds.items()},
        "megabytes": folder_megabytes(model.folder),
        "peak_memory_megabytes": round(peak_memory_bytes() / 1e6),
        "machine": f"{os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.0f}",
        "tools": tool_versions(),
    }


def _our_images(model: Model, photographs: Sequence[Path], batch: int) -> tuple[np.ndarray, float]:
    engine, preprocess = OrtEngine(model.path("image"), model.graph("image")), model.manifest.preprocess
    pixels = []
    for path in photographs:
        photo = read_photograph(path.parent, path.name)
        pixels.append(on_canvas(photo.pixels, frame_for(preprocess, *photo.shape), preprocess.filter))
    return _in_batches(engine, "pixels", np.stack(pixels), batch)


def _our_prompts(model: Model, batch: int) -> tuple[np.ndarray, float]:
    assert model.manifest.tokenizer is not None
    tokenizer = Tokenizer.from_file(str(model.folder / model.manifest.tokenizer))
    tokens = np.array([tokenizer.encode(prompt).ids for prompt in _prompts()], dtype=np.int64)
    return _in_batches(OrtEngine(model.path("text"), model.graph("text")), "tokens", tokens, batch)


def _in_batches(engine: OrtEngine, name: str, rows: np.ndarray, batch: int) -> tuple[np.ndarray, float]:
    """Embeddings of all rows, and seconds for a row, after one untimed call."""
    engine({name: rows[:batch]})
    begun = time.monotonic()
    parts = [np.array(engine({name: rows[start : start + batch]})["embedding"]) for start in range(0, len(rows), batch)]
    return np.concatenate(parts), (time.monotonic() - begun) / len(rows)


@torch.no_grad()
def _their_images(official: clip_weights.Loaded, size: tuple[int, int], photographs: Sequence[Path]) -> np.ndarray:
    recipe = official.recipe
    config = PreprocessCfg(size=size, mean=recipe.mean, std=recipe.std, interpolation=recipe.interpolation, resize_mode="squash")
    preprocess = image_transform_v2(config, is_train=False)
    model: Any = official.model
    rows = [model.encode_image(preprocess(Image.open(path))[None], normalize=True) for path in photographs]
    return torch.cat(rows).numpy()


@torch.no_grad()
def _their_prompts(official: clip_weights.Loaded) -> np.ndarray:
    tokenizer, model = open_clip.get_tokenizer(official.variant), official.model
    rows = [model.encode_text(tokenizer([prompt]), normalize=True) for prompt in _prompts()]
    return torch.cat(rows).numpy()


def _worst_cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The smallest cosine of a row, in float64: in float32 rounding alone costs 1e-7."""
    one, other = ours.astype(np.float64), theirs.astype(np.float64)
    cosine = (one * other).sum(axis=1) / (np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1))
    return float(cosine.min())


def _prompts() -> list[str]:
    """Every template with each prompt of VOC's classes and each background of CLIP-ES."""
    names = [name for prompts in parse_classes("voc").prompts for name in prompts]
    return [template.format(name) for template in clip.TEMPLATES for name in (*names, *clip.BACKGROUNDS)]


if __name__ == "__main__":
    main()
