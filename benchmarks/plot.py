"""Plots of bench reports, drawn with Pillow: the rate of each graph and of the chain beside the machine's maximum, and curves of
the chain's rate over its load."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..errors import WsssError

WIDTH_PX, LEFT_PX, RIGHT_PX, TOP_PX, BAR_PX, GAP_PX = 1400, 420, 190, 110, 22, 12
COLUMNS, PANEL_PX = 3, (480, 300)
INK, FAINT, REACHED, BOUND = (30, 30, 34), (120, 120, 128), (38, 104, 166), (214, 224, 236)


def write_plot(path: Path, report: Mapping[str, Any]) -> None:
    """Draw the rate of each graph and batch size, and of the chain, as bars on a log axis, over paler ones for the bounds.

    Raises:
        WsssError: the file cannot be written, or its ending is not that of an image format.
    """
    rows = [{**row, "name": f"{row['model']}/{row['graph']}, {row['batch']} {row['unit']}"} for row in report["graphs"]]
    if chain := report["chain"]:
        rows.append({**chain, "name": f"the chain, {chain['batch']} images together, {chain['boxes_an_image']:g} boxes an image"})
    height = TOP_PX + len(rows) * (BAR_PX + GAP_PX) + 40
    image = Image.new("RGB", (WIDTH_PX, height), "white")
    draw = ImageDraw.Draw(image)
    small, large = ImageFont.load_default(15), ImageFont.load_default(22)
    host = report["machine"]
    where = next((gpu["name"] for gpu in host["gpus"]), None) if report["device"] != "cpu" else None
    draw.text((20, 18), f"{report['bundle']} in {report['engine']} on {where or host['processor']}", INK, large)
    draw.text(
        (20, 52), "entries a second (dark), and the maximum by the machine's best matrix product and copy (pale)", FAINT, small
    )

    limits = [bound for row in rows if (bound := rate_of_bound(row))]
    rates = [row["per_second"] for row in rows]
    low = math.floor(math.log10(min(rates)))
    high = max(math.ceil(math.log10(max([*rates, *limits]))), low + 1)

    def x_of(rate: float) -> float:
        share = (math.log10(rate) - low) / (high - low)
        return LEFT_PX + share * (WIDTH_PX - LEFT_PX - RIGHT_PX)

    for power in range(low, high + 1):
        x = x_of(10.0**power)
        draw.line([(x, TOP_PX - 6), (x, height - 34)], (225, 225, 230))
        draw.text((x, height - 28), f"{10.0**power:g}", FAINT, small, anchor="ma")
    for number, row in enumerate(rows):
        top = TOP_PX + number * (BAR_PX + GAP_PX)
        draw.text((LEFT_PX - 12, top + BAR_PX / 2), row["name"], INK, small, anchor="rm")
        bound = rate_of_bound(row)
        if bound:
            draw.rectangle([LEFT_PX, top, x_of(bound), top + BAR_PX], BOUND)
        draw.rectangle([LEFT_PX, top + 4, max(x_of(row["per_second"]), LEFT_PX + 1), top + BAR_PX - 4], REACHED)
        share = f", {100 * row['share_of_bound']:.0f} %" if row["share_of_bound"] is not None else ""
        at = x_of(max(bound or 0, row["per_second"])) + 8
        draw.text((at, top + BAR_PX / 2), f"{row['per_second']:.4g}/s{share}", INK, small, anchor="lm")
    _save(image, path)


def write_curves(path: Path, report: Mapping[str, Any]) -> None:
    """Draw a panel for each curve of a scaling report: images a second over its values, which are evenly spaced.

    Raises:
        WsssError: as `write_plot`.
    """
    curves = report["curves"]
    rows = -(-len(curves) // COLUMNS)
    image = Image.new("RGB", (COLUMNS * PANEL_PX[0] + 40, rows * PANEL_PX[1] + 100), "white")
    draw = ImageDraw.Draw(image)
    host = report["machine"]
    where = next((gpu["name"] for gpu in host["gpus"]), None) if report["device"] != "cpu" else None
    title = f"{report['bundle']} in {report['engine']} on {where or host['processor']}: images a second"
    draw.text((20, 18), title, INK, ImageFont.load_default(22))
    for number, curve in enumerate(curves):
        corner = (20 + number % COLUMNS * PANEL_PX[0], 80 + number // COLUMNS * PANEL_PX[1])
        _draw_curve(draw, corner, curve)
    _save(image, path)


def _draw_curve(draw: ImageDraw.ImageDraw, corner: tuple[int, int], curve: Mapping[str, Any]) -> None:
    small, points = ImageFont.load_default(14), curve["points"]
    left, top = corner[0] + 20, corner[1] + 44
    width, height = PANEL_PX[0] - 60, PANEL_PX[1] - 110
    highest = max(point["per_second"] for point in points)
    draw.text((left, corner[1]), curve["what"], INK, ImageFont.load_default(17))
    draw.line([(left, top + height), (left + width, top + height)], FAINT)
    step = width / len(points)
    places = [
        (left + (number + 0.5) * step, top + height * (1 - point["per_second"] / highest)) for number, point in enumerate(points)
    ]
    draw.line(places, REACHED, 3)
    for (x, y), point in zip(places, points, strict=True):
        draw.line([(x, y), (x, top + height)], BOUND)
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], REACHED)
        draw.text((x, y - 10), f"{point['per_second']:.3g}", INK, small, anchor="mb")
        draw.text((x, top + height + 6), point["shown"].replace(" x ", "\nx "), FAINT, small, anchor="ma", align="center")


def _save(image: Image.Image, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    except (OSError, ValueError) as error:
        raise WsssError(f"{path}: cannot be written: {error}", hint="--plot FILE.png") from None


def rate_of_bound(row: Mapping[str, Any]) -> float | None:
    """Maximum rate of the machine in entries a second; None where it is not known."""
    return None if not row["share_of_bound"] else float(row["per_second"] / row["share_of_bound"])
