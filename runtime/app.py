"""A page that labels an uploaded photograph and shows tags, boxes, masks and the label map, through gradio (extra ``app``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..classes import palette
from ..errors import WsssError
from .labeler import Labeler
from .results import Result

if TYPE_CHECKING:
    import gradio

Annotated = tuple[np.ndarray, list[tuple[Any, str]]]
"""A picture (H, W, 3) uint8 RGB and its annotations: a box (x0, y0, x1, y1) or a mask (H, W) bool, with its words."""


def page_of(labeler: Labeler) -> gradio.Blocks:
    """The page. Raises ModuleNotFoundError: gradio is not installed."""
    import gradio

    colors = {name: "#" + bytes(palette()[label].tolist()).hex() for label, name in enumerate(labeler.names, 1)}

    def label(pixels: np.ndarray | None) -> tuple[object, ...]:
        if pixels is None:
            return ({}, None, None, None, [])
        try:
            return shown(labeler.label(pixels))
        except WsssError as error:
            raise gradio.Error(str(error)) from None

    with gradio.Blocks(title="wsss") as page:
        gradio.Markdown(f"# wsss\n{len(labeler.names)} classes: {', '.join(labeler.names)}")
        with gradio.Row():
            with gradio.Column(scale=1):
                photograph = gradio.Image(type="numpy", label="Photograph", image_mode="RGB")
                tags = gradio.Label(label="Classes that the photograph contains")
            with gradio.Column(scale=2):
                with gradio.Tab("Label map"):
                    picture = gradio.Image(label="0 background, colors of the classes, void white")
                with gradio.Tab("Boxes"):
                    boxes = gradio.AnnotatedImage(label="Boxes and their scores", color_map=colors)
                with gradio.Tab("Masks"):
                    masks = gradio.AnnotatedImage(label="SAM's mask of each box, and the IoU that SAM predicts", color_map=colors)
                table = gradio.Dataframe(headers=["class", "box score", "mask IoU", "pixels"], label="Objects", interactive=False)
        photograph.change(label, photograph, [tags, picture, boxes, masks, table])
    return page


def shown(result: Result) -> tuple[dict[str, float], np.ndarray, Annotated, Annotated, list[list[object]]]:
    """What the page shows of a result: tags, the label map over the photograph, boxes, masks, and a row for each object."""
    names = [f"{name} {score:.2f}" for name, score in zip(result.classes, result.scores, strict=True)]
    boxes = [(tuple(round(edge) for edge in box), name) for box, name in zip(result.boxes.tolist(), names, strict=True)]
    quality = [f"{name} {value:.2f}" for name, value in zip(result.classes, result.quality, strict=True)]
    masks = [(mask.astype(np.float32), name) for mask, name in zip(result.masks, quality, strict=True)] if result.runs else []
    rows = [
        [name, round(float(score), 3), round(float(value), 3), int(mask.sum())]
        for name, score, value, mask in zip(result.classes, result.scores, result.quality, result.masks, strict=True)
    ]
    return result.tags, np.asarray(result.picture()), (result.pixels, boxes), (result.pixels, masks), rows
