"""``docs/example.png``: held-out scenes beside the labels that the bundle ``mini`` gave them.

Each class has the color that its name says.

The scenes are the demo's first ones that show at least three classes. For example::

    python -m wsss.benchmarks.studies.example_picture --out docs/example.png
"""

from __future__ import annotations

import colorsys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...mini import scenes
from ...overlay import overlay
from ...photographs import read_photograph
from ...runtime.chain import Chain
from ...runtime.run.label_folder import label_folder
from ...store.local import read_label, read_records
from ..demo import SEED
from .harness import study_parser

COLUMNS, ROWS = 3, 2
DRAWN = 120
"""Scenes labeled, to choose from."""
TILE, GAP, LINE = (200, 150), 6, 24
TEXTURES = {"striped": (130, 130, 130), "checkered": (0, 0, 0), "dotted": (110, 60, 20)}
"""Colors of the classes that are named for a texture."""


def class_colors() -> np.ndarray:
    """(256, 3) uint8 RGB: the middle of the range that a class is drawn in; background is black."""
    colors = np.zeros((256, 3), np.uint8)
    for label, name in enumerate(scenes.CLASSES, 1):
        word = name.split()[0]
        if word in TEXTURES:
            colors[label] = TEXTURES[word]
        else:
            (hue, _), saturation, value = scenes._COLORS[word]
            colors[label] = np.multiply(colorsys.hsv_to_rgb(hue / 360, sum(saturation) / 2, sum(value) / 2), 255)
    return colors


def main() -> None:
    parser = study_parser(__spec__, __doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        picture(Path(folder)).save(arguments.out, optimize=True)


def picture(folder: Path) -> Image.Image:
    """The picture, made from scenes and a label store in ``folder``."""
    scenes.write_scenes(folder, DRAWN, seed=SEED)
    labeler = Chain.open("mini", classes="mini")
    label_folder(labeler, folder / "images", folder / "store")
    colors = class_colors()
    tiles: list[tuple[np.ndarray, np.ndarray]] = []
    for record in read_records(folder / "store"):
        if len(record["classes"]) >= 3 and record["width"] > record["height"] and len(tiles) < COLUMNS * ROWS:
            pixels = read_photograph(folder / "images", record["path"]).pixels
            label_map = read_label(folder / "store" / "labels" / record["label"])
            tiles.append((pixels, overlay(pixels, label_map, strength=0.9, colors=colors)))
    pair = 2 * TILE[0] + GAP
    width, height = COLUMNS * pair + (COLUMNS - 1) * 3 * GAP, ROWS * (TILE[1] + GAP)
    sheet = Image.new("RGB", (width, height + 2 * LINE), "white")
    for number, images in enumerate(tiles):
        left, top = number % COLUMNS * (pair + 3 * GAP), number // COLUMNS * (TILE[1] + GAP)
        for side, pixels in enumerate(images):
            tile = Image.fromarray(pixels).resize(TILE, Image.Resampling.LANCZOS)
            sheet.paste(tile, (left + side * (TILE[0] + GAP), top))
    _draw_legend(ImageDraw.Draw(sheet), colors, height, width)
    return sheet


def _draw_legend(pen: ImageDraw.ImageDraw, colors: np.ndarray, top: int, width: int) -> None:
    font = ImageFont.load_default(size=15)
    step = width // 6
    for label, name in enumerate(scenes.CLASSES, 1):
        x, y = (label - 1) % 6 * step, top + (label - 1) // 6 * LINE + 3
        pen.rectangle((x, y, x + 16, y + 16), fill=tuple(colors[label].tolist()), outline=(120, 120, 120))
        pen.text((x + 23, y - 1), name, fill="black", font=font)


if __name__ == "__main__":
    main()
