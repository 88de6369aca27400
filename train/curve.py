"""Training curves: a file of points and a plot."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

from ..errors import WsssError
from ..files import write_atomically

CURVE, PICTURE = "curve.jsonl", "curve.png"
Point = dict[str, float | None]
"""``{"step", "loss", "rate", "seconds"}`` or ``{"step", "miou"}``; None for a missing value."""


def read_curve(folder: Path) -> list[Point]:
    """Read a run's points, up to the first invalid line (for example one cut by a crash). NaN of older runs becomes None."""
    path = folder / CURVE
    points: list[Point] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            point = json.loads(line, parse_constant=lambda _: None)
        except (ValueError, RecursionError):
            break
        if not isinstance(point, dict) or not isinstance(point.get("step"), int):
            break
        points.append({name: _finite(value) for name, value in point.items()})
    return points


def _finite(value: Any) -> float | None:
    """The value, or None for NaN and infinity, which JSON cannot represent."""
    return value if type(value) in (int, float) and math.isfinite(value) else None


class Writer:
    """Appends points to a run's curve. Existing points after ``step`` are removed, since they will be written again."""

    def __init__(self, folder: Path, step: int, *, tensorboard: bool) -> None:
        kept = [point for point in read_curve(folder) if (point["step"] or 0) <= step]
        write_atomically(folder / CURVE, "".join(json.dumps(point, allow_nan=False) + "\n" for point in kept).encode())
        self._file = (folder / CURVE).open("a", encoding="utf-8")
        self._board: Any = _board(folder, step) if tensorboard else None

    def add(self, step: int, **values: float | None) -> None:
        """Append a point; a value that is None or not finite becomes null."""
        point = {name: _finite(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **point}, allow_nan=False) + "\n")
        self._file.flush()
        if self._board:
            for name, value in point.items():
                if value is not None:
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board:
            self._board.close()


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise WsssError("machine.tensorboard: TensorBoard is not installed", hint="pip install tensorboard") from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


def draw(folder: Path) -> Path:
    """Write ``curve.png``: loss and learning rate, and below them the validation scores if there are any."""
    from matplotlib.figure import Figure

    points = read_curve(folder)
    losses = [point for point in points if point.get("loss") is not None and point.get("rate") is not None]
    scores = [point for point in points if point.get("miou") is not None]
    figure = Figure(figsize=(8, 6 if scores else 3.5), layout="constrained")
    panels = figure.subplots(2 if scores else 1, 1, squeeze=False, sharex=True)[:, 0]
    panels[0].plot(_column(losses, "step"), _column(losses, "loss"), color="tab:blue", linewidth=1)
    panels[0].set_ylabel("loss")
    panels[0].set_ylim(bottom=0)
    rates = panels[0].twinx()
    rates.plot(_column(losses, "step"), _column(losses, "rate"), color="tab:gray", linewidth=1)
    rates.set_ylabel("learning rate", color="tab:gray")
    rates.set_ylim(bottom=0)
    if scores:
        panels[1].plot(_column(scores, "step"), _column(scores, "miou"), color="tab:green", marker=".")
        panels[1].set_ylabel("mIoU, validation")
        panels[1].grid(alpha=0.3)
    panels[-1].set_xlabel("step")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(folder / PICTURE, picture.getvalue())
    return folder / PICTURE


def _column(points: list[Point], name: str) -> list[float]:
    return [value for point in points if (value := point[name]) is not None]
