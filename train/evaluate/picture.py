"""Plot a confusion matrix with Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...errors import WsssError

WHITE, INK, DARK = (255, 255, 255), (40, 40, 40), np.array([8, 48, 107])
_MAX_WITH_NUMBERS = 30


def write_confusion(matrix: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Plot the shares of each true class's pixels: rows are the truth, columns the prediction, the last one void.

    Args:
        matrix: (C + 1, C + 2) int64, see `metrics.confusion_matrix`. classes: the C names without background.
        path: the PNG file. Numbers are percentages, omitted if they round to 0 or if there are many classes.

    Raises:
        WsssError: the file cannot be written.
    """
    image = _draw(matrix, ("background", *classes))
    try:
        image.save(path, format="PNG")
    except OSError as error:
        raise WsssError(
            f"--png {path}: cannot be written: {error.strerror}", hint="give a file in a folder that exists"
        ) from None


def _draw(matrix: np.ndarray, names: Sequence[str]) -> Image.Image:
    with_numbers = len(names) <= _MAX_WITH_NUMBERS
    cell = 34 if with_numbers else 15
    font = ImageFont.load_default(13 if with_numbers else 11)
    columns = (*names, "void")
    margin = 14
    text_px = round(max(font.getlength(name) for name in columns)) + 10
    title_px = 24
    left, top = margin + title_px + text_px, margin + title_px + text_px
    width, height = left + cell * len(columns), top + cell * len(names)
    image = Image.new("RGB", (width + margin, height + margin), WHITE)
    draw = ImageDraw.Draw(image)
    totals = matrix.sum(axis=1, keepdims=True)
    share = matrix / np.maximum(totals, 1)
    for row, name in enumerate(names):
        draw.text((left - 8, top + (row + 0.5) * cell), name, INK, font, anchor="rm")
        for column in range(len(columns)):
            value = share[row, column]
            x, y = left + column * cell, top + row * cell
            # The square root makes confusions of 1 % visible.
            color = tuple(int(channel) for channel in np.round(255 + (DARK - 255) * value**0.5))
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), color if totals[row] else (235, 235, 235), (225, 225, 225))
            if with_numbers and round(100 * value):
                number = f"{100 * value:.0f}"
                draw.text((x + cell / 2, y + cell / 2), number, WHITE if value > 0.2 else INK, font, anchor="mm")
    draw.line((width - cell - 1, top, width - cell - 1, height), INK)  # separates void from the classes
    _draw_vertically(image, [(left + (column + 0.5) * cell, name) for column, name in enumerate(columns)], top - 8, font)
    draw.text((left + cell * len(columns) / 2, margin), "predicted", INK, font, anchor="ma")
    _draw_vertically(image, [(margin + 8, "truth, % of its pixels")], top + cell * len(names) // 2, font, anchor="mm")
    return image


def _draw_vertically(
    image: Image.Image,
    texts: list[tuple[float, str]],
    y: int,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    anchor: str = "lm",
) -> None:
    """Draw texts from bottom to top: ``lm`` starts at y, ``mm`` is centered there."""
    turned = image.transpose(Image.Transpose.ROTATE_270)
    draw = ImageDraw.Draw(turned)
    for x, text in texts:
        draw.text((image.height - 1 - y, x), text, INK, font, anchor=anchor)
    image.paste(turned.transpose(Image.Transpose.ROTATE_90))
