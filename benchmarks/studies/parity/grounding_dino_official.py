"""Compare our Grounding-DINO with the official code (groundingdino-py) on real photographs, with the same weights.

    python -m wsss.benchmarks.studies.parity.grounding_dino_official PHOTOGRAPHS --work DIR

Makes a checkpoint with the official code (random weights with the spread of trained ones; real weights with ``--weights``),
exports it, and runs ours in ONNX Runtime in batches that mix photographs and captions. The official model runs at batch 1, since
its results in a batch with different captions are wrong. Two comparisons:

- *parity*: the same padded pixels and mask. The official model uses our queries, after a check that they are near ties.
- *padding*: the effect of the canvas, against the official result on the photograph without padding. Queries are paired by
  their feature cell, which padding does not move.

The row of each photograph is kept in ``DIR/rows.jsonl`` and not measured again. The summary goes to
``benchmarks/results/grounding-dino-official.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn

from wsss.batch import Photograph
from wsss.classes import parse_classes
from wsss.engines.ort import OrtEngine
from wsss.export.exporting import tool_versions
from wsss.export.family import Feeds, Options
from wsss.export.grounding_dino import family as grounding_dino
from wsss.export.grounding_dino.graphs import level_shapes
from wsss.export.grounding_dino.weights import OFFICIAL, bert_tokenizer
from wsss.export.weights import spread
from wsss.frame import frame_for, resized
from wsss.photographs import read_photograph
from wsss.runtime.canvas import on_canvas
from wsss.spec import AxisRange, Model, Preprocess

from ..harness import RESULTS, exported_model, folder_megabytes, log, peak_memory_bytes, study_parser, write_result

RESULT = RESULTS / "grounding-dino-official.json"
BEST = 100
"""Number of queries with the highest scores that are also compared alone, since only they can become boxes."""


# ---- the official model ----


class BertAdapter(nn.Module):
    """Replaces groundingdino's ``BertModelWarper``, which calls methods that transformers 5 no longer has."""

    def __init__(self, bert_model: transformers.BertModel) -> None:
        super().__init__()
        self.config = bert_model.config
        self.embeddings, self.encoder, self.pooler = bert_model.embeddings, bert_model.encoder, bert_model.pooler

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, position_ids: Tensor
    ) -> dict[str, Tensor]:
        """As in the original wrapper: attention_mask (B, T, T) bool."""
        hidden = self.embeddings(input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids)
        mask = (~attention_mask)[:, None] * torch.finfo(hidden.dtype).min
        return {"last_hidden_state": self.encoder(hidden, attention_mask=mask).last_hidden_state}


def official_model(backbone: Mapping[str, Any], bert: transformers.BertConfig, tokenizer: Any, **changes: object) -> nn.Module:
    """groundingdino-py's model in its Swin-T configuration, randomly initialized, without network access.

    Args:
        backbone: sizes of its Swin, as in ``OFFICIAL``.
        bert: sizes of its text encoder.
        tokenizer: a `tokenizers.Tokenizer`.
        changes: changed configuration values, for smaller models.
    """
    from groundingdino.models.GroundingDINO import groundingdino as code
    from groundingdino.models.GroundingDINO.backbone import backbone as backbones
    from groundingdino.models.GroundingDINO.backbone.swin_transformer import SwinTransformer

    settings = {**_official_settings(), **changes}
    tokenizer_of_code = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    tokenizer_of_code.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]

    def swin(_name: str, *, pretrain_img_size: int, out_indices: tuple[int, ...], **_: object) -> nn.Module:
        return SwinTransformer(pretrain_img_size=pretrain_img_size, out_indices=out_indices, **backbone)

    with (
        mock.patch.object(code, "BertModelWarper", BertAdapter),
        mock.patch.object(code.get_tokenlizer, "get_tokenlizer", lambda _: tokenizer_of_code),
        mock.patch.object(code.get_tokenlizer, "get_pretrained_language_model", lambda _: transformers.BertModel(bert)),
        mock.patch.object(backbones, "build_swin_transformer", swin),
    ):
        model: nn.Module = code.build_groundingdino(argparse.Namespace(**settings))
    return model.eval()


def _official_settings() -> dict[str, Any]:
    import groundingdino.config.GroundingDINO_SwinT_OGC as config

    settings = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    return {**settings, "use_checkpoint": False, "use_transformer_ckpt": False}  # checkpointing saves memory in training only


@torch.no_grad()
def official_output(model: nn.Module, pixels: Tensor, padding: Tensor, caption: str, query: Tensor | None = None) -> Feeds:
    """The official forward pass of one photograph.

    Args:
        pixels: (1, 3, H, W) float32, normalized, zero in the padding.
        padding: (1, H, W) bool, True on padding.
        caption: phrases, each with its dot.
        query: (Q,) int64 feature cells to use as queries, checked to be near ties; None lets the model choose.

    Returns:
        ``logits`` (Q, 256) float32, ``boxes`` (Q, 4) float32, ``query`` (Q,) int64.
    """
    from groundingdino.util.misc import NestedTensor

    chosen: list[Tensor] = []

    def choose(_module: nn.Module, _inputs: object, logits: Tensor) -> Tensor | None:
        scores = logits[0].amax(-1)
        if query is None:
            chosen.append(scores.topk(model.num_queries).indices)
            return None
        grounding_dino.check_near_tie(scores, query)
        chosen.append(query)
        ranks = torch.arange(len(query), 0, -1, dtype=logits.dtype)
        return torch.full_like(logits, -1.0).scatter(1, query[None, :, None], ranks[None, :, None])

    hook = model.transformer.enc_out_class_embed.register_forward_hook(choose)
    try:
        out = model(NestedTensor(pixels, padding), captions=[caption])
    finally:
        hook.remove()
    result = {"logits": out["pred_logits"][0], "boxes": out["pred_boxes"][0], "query": chosen[0]}
    return {name: value.numpy() for name, value in result.items()}


def write_checkpoint(path: Path, variant: str, seed: int) -> None:
    """Write a checkpoint in the official format, of an official model with random weights."""
    torch.manual_seed(seed)
    model = official_model(OFFICIAL[variant], transformers.BertConfig(), bert_tokenizer(None))
    spread(model, seed)
    torch.save({"model": {f"module.{name}": value for name, value in model.state_dict().items()}}, path)


# ---- measuring ----


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line of the module."""
    parser = study_parser(__spec__, __doc__)
    parser.add_argument("photographs", type=Path, help="folder of JPEG files")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoint, bundle and finished rows")
    parser.add_argument("--variant", default="swin_t", choices=list(OFFICIAL))
    parser.add_argument("--weights", type=Path, help="an official .pth; default: random weights")
    parser.add_argument("--size", default="800x1344", help="HxW of the canvas; photographs that do not fit are left out")
    parser.add_argument("--count", type=int, default=24, help="number of photographs, the first by name")
    parser.add_argument("--batch", type=int, default=3, help="photographs in a call")
    options = parser.parse_args(arguments)
    height, width = map(int, options.size.split("x"))
    checkpoint, model = _exported(options.work, options.variant, options.weights, (height, width), options.batch)
    paths = [
        path for path in sorted(options.photographs.glob("*.jpg")) if _fits(path, model.manifest.preprocess, (height, width))
    ]
    rows = measure(model, checkpoint, paths[: options.count], options.work / "rows.jsonl", batch=options.batch)
    summary = summarize(rows, model)
    write_result(RESULT, summary)


def _fits(path: Path, preprocess: Preprocess, canvas: tuple[int, int]) -> bool:
    height, width = resized(preprocess, *read_photograph(path.parent, path.name).shape)
    return height <= canvas[0] and width <= canvas[1]


def _exported(work: Path, variant: str, weights: Path | None, canvas: tuple[int, int], batch: int) -> tuple[Path, Model]:
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = weights or work / f"groundingdino_{variant}_seed0.pth"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, variant, seed=0)
    options = Options(sizes=(canvas,), batch=AxisRange(1, min(2, batch), batch))
    return checkpoint, exported_model("grounding-dino", variant, str(checkpoint), work / "bundle", options)


def measure(model: Model, checkpoint: Path, paths: Sequence[Path], kept: Path, *, batch: int) -> list[dict[str, Any]]:
    """Measure a row for every photograph, in order; rows in the file ``kept`` are not measured again."""
    done = {row["photo"]: row for row in map(json.loads, kept.read_text().splitlines())} if kept.is_file() else {}
    canvas = model.manifest.preprocess.canvases[0]
    official = official_model(OFFICIAL[model.manifest.variant], transformers.BertConfig(), bert_tokenizer(checkpoint))
    state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["model"]
    official.load_state_dict({name.removeprefix("module."): value for name, value in state.items()}, strict=False)
    text = OrtEngine(model.path("text"), model.graph("text"))
    name = f"image-{canvas[0]}x{canvas[1]}"
    image = OrtEngine(model.path(name), model.graph(name))
    for start in range(0, len(paths), batch):
        group = paths[start : start + batch]
        if all(path.name in done for path in group):
            continue
        captions = [_caption(number) for number in range(start, start + len(group))]
        feeds = _feeds(model, text, group, captions)
        begun = time.monotonic()
        ours = {key: np.array(value) for key, value in image(feeds).items()}
        seconds = (time.monotonic() - begun) / len(group)
        for row, path in enumerate(group):
            if path.name in done:
                continue
            our_row = {key: value[row] for key, value in ours.items()}
            feeds_of_row = {key: value[row : row + 1] for key, value in feeds.items()}
            comparison = compare(official, feeds_of_row, ". ".join(captions[row]) + ".", our_row)
            done[path.name] = {"photo": path.name, "batch": len(group), "our_seconds": round(seconds, 2), **comparison}
            with kept.open("a") as file:
                file.write(json.dumps(done[path.name]) + "\n")
            log(json.dumps(done[path.name]))
    return [done[path.name] for path in paths]


def _caption(number: int) -> list[str]:
    """Two to five of VOC's classes, different for each photograph."""
    names = [name for name in parse_classes("voc").names if name != "background"]
    return [names[(3 * number + step) % len(names)] for step in range(2 + number % 4)]


def _feeds(model: Model, text: OrtEngine, paths: Sequence[Path], captions: Sequence[Sequence[str]]) -> Feeds:
    """The feeds of a batch, as the runtime makes them."""
    photographs = [read_photograph(path.parent, path.name) for path in paths]
    return {**canvas_feeds(model, photographs), **caption_feeds(model, text, bert_tokenizer(model.folder), captions)}


def canvas_feeds(model: Model, photographs: Sequence[Photograph]) -> Feeds:
    """Photographs on a model's canvases, as the runtime puts them: ``pixels`` (B, H, W, 3) uint8 and ``size`` (B, 2) int64."""
    preprocess = model.manifest.preprocess
    frames = [frame_for(preprocess, *photo.shape) for photo in photographs]
    pixels = [on_canvas(photo.pixels, frame, preprocess.filter) for photo, frame in zip(photographs, frames, strict=True)]
    return {"pixels": np.stack(pixels), "size": np.array([frame.valid for frame in frames], np.int64)}


def caption_feeds(model: Model, text: OrtEngine, tokenizer: Tokenizer, captions: Sequence[Sequence[str]]) -> Feeds:
    """Feeds of Grounding-DINO's image graph for captions of several phrases, with features from its text graph."""
    settings = model.manifest.settings

    def pieces(phrase: str) -> list[int]:
        return [*tokenizer.encode(phrase, add_special_tokens=False).ids, settings["dot"]]

    def features(tokens: list[int]) -> np.ndarray:
        feeds = {"tokens": np.array([tokens], np.int64), "mask": np.ones((1, len(tokens)), np.bool_)}
        return np.array(text(feeds)["features"])[0]

    sentences = [[[settings["cls"]], *map(pieces, caption), [settings["sep"]]] for caption in captions]
    return grounding_dino.caption_feeds(sentences, features)


def compare(official: nn.Module, feeds: Feeds, caption: str, ours: Feeds) -> dict[str, Any]:
    """Compare one photograph: parity on the same padded input, and the effect of the padding."""
    begun = time.monotonic()
    pixels, mask = grounding_dino.official_pixels(feeds)
    tokens = int((feeds["phrase"] >= 0).sum())
    padded = official_output(official, pixels, mask == 0, caption, torch.from_numpy(ours["query"]))
    seconds = time.monotonic() - begun
    height, width = feeds["size"][0]
    unpadded = official_output(official, pixels[:, :, :height, :width], mask[:, :height, :width] == 0, caption)
    parity = {
        "logits": float(np.abs(padded["logits"][:, :tokens] - ours["logits"][:, :tokens]).max()),
        "boxes": float(np.abs(padded["boxes"] - ours["boxes"]).max()),
        "largest_logit": float(np.abs(padded["logits"][:, :tokens]).max()),
    }
    return {
        "valid": [int(height), int(width)],
        "tokens": tokens,
        "parity": parity,
        "padding": padding_effect(ours, unpadded, tuple(pixels.shape[2:]), (int(height), int(width)), tokens),
        "official_seconds": round(seconds, 2),
    }


def padding_effect(
    ours: Feeds, unpadded: Feeds, canvas: tuple[int, ...], photo: tuple[int, int], tokens: int
) -> dict[str, float]:
    """Differences between our result on a canvas and the official one on the photograph without padding.

    Returns:
        ``shared``: share of the official queries, and of the best 100, that have the same cell as one of ours. For these:
        median and largest difference of the boxes (in 0..1 of the photograph) and of the scores after the sigmoid.
    """
    row_of_cell = {cell: row for row, cell in enumerate(_cells(ours["query"], canvas))}
    scores = {name: _scores(output["logits"][:, :tokens]) for name, output in (("ours", ours), ("unpadded", unpadded))}
    order = np.argsort(-scores["unpadded"].max(axis=1))
    cells = enumerate(_cells(unpadded["query"], photo))
    pairs = [(row, row_of_cell[cell]) for row, cell in cells if cell in row_of_cell]
    best = {int(row) for row in order[:BEST]}
    effect = {"shared": len(pairs) / len(order), "shared_best": sum(row in best for row, _ in pairs) / BEST}
    for name, some in (("", pairs), ("_best", [pair for pair in pairs if pair[0] in best])):
        theirs, our_rows = np.array(some, dtype=int).reshape(-1, 2).T
        for output, difference in (
            ("boxes", np.abs(unpadded["boxes"][theirs] - ours["boxes"][our_rows]).max(axis=1, initial=0)),
            ("scores", np.abs(scores["unpadded"][theirs] - scores["ours"][our_rows]).max(axis=1, initial=0)),
        ):
            effect[f"{output}{name}_median"] = float(np.median(difference)) if len(difference) else float("nan")
            effect[f"{output}{name}_largest"] = float(difference.max(initial=0))
    return effect


def _scores(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def _cells(query: np.ndarray, size: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """(level, row, column) of feature cells, which are numbered across all levels of an image of this size."""
    shapes = level_shapes(transformers.GroundingDinoConfig(), (size[0], size[1]))
    starts = np.cumsum([0, *(height * width for height, width in shapes)])
    for cell in query.tolist():
        level = int(np.searchsorted(starts, cell, side="right")) - 1
        row, column = divmod(cell - int(starts[level]), shapes[level][1])
        yield level, row, column


def summarize(rows: Sequence[Mapping[str, Any]], model: Model) -> dict[str, Any]:
    """Summarize all photographs: worst parity, mean effect of padding, and the rows."""
    padding = {name: float(np.nanmean([row["padding"][name] for row in rows])) for name in rows[0]["padding"]}
    return {
        "variant": model.manifest.variant,
        "canvas": model.manifest.preprocess.canvases[0],
        "weights": {**model.manifest.weights, "source": Path(model.manifest.weights["source"]).name},
        "photographs": len(rows),
        "parity": {name: max(row["parity"][name] for row in rows) for name in ("logits", "boxes", "largest_logit")},
        "padding_mean": padding,
        "gate_error": {
            name: {output: graph.parity.worst(output).error for output in graph.parity.tolerance}
            for name, graph in model.manifest.graphs.items()
            if graph.parity is not None
        },
        "seconds": {name: float(np.median([row[name] for row in rows])) for name in ("our_seconds", "official_seconds")},
        "megabytes": folder_megabytes(model.folder),
        "peak_memory_megabytes": round(peak_memory_bytes() / 1e6),
        "machine": f"{os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.0f}",
        "tools": tool_versions(),
        "rows": list(rows),
    }


if __name__ == "__main__":
    main()
