"""The course of a training: a file of points, and a picture of them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from ..errors import WsssError
from ..labelstore import write_atomically

CURVE, PICTURE = "curve.jsonl", "curve.png"


def read_curve(folder: Path) -> list[dict[str, float]]:
    """A run's points: ``{"step", "loss", "rate", "seconds"}`` or ``{"step", "miou"}``. A last one cut by a crash is left out."""
    path = folder / CURVE
    points: list[dict[str, float]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            points.append(json.loads(line))
        except ValueError:
            break
    return points


class Writer:
    """Adds points to a run's curve; those after ``step`` are dropped, since they will come again."""

    def __init__(self, folder: Path, step: int, *, tensorboard: bool) -> None:
        kept = [point for point in read_curve(folder) if point["step"] <= step]
        write_atomically(folder / CURVE, "".join(json.dumps(point) + "\n" for point in kept).encode())
        self._file = (folder / CURVE).open("a", encoding="utf-8")
        self._board: Any = _board(folder, step) if tensorboard else None

    def add(self, step: int, **values: float) -> None:
        """One point."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Ends both files."""
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
    """Writes ``curve.png``: loss and learning rate, and below them the validation, where there was one."""
    from matplotlib.figure import Figure

    points = read_curve(folder)
    losses = [point for point in points if "loss" in point]
    scores = [point for point in points if "miou" in point]
    figure = Figure(figsize=(8, 6 if scores else 3.5), layout="constrained")
    panels = figure.subplots(2 if scores else 1, 1, squeeze=False, sharex=True)[:, 0]
    panels[0].plot([point["step"] for point in losses], [point["loss"] for point in losses], color="tab:blue", linewidth=1)
    panels[0].set_ylabel("loss")
    panels[0].set_ylim(bottom=0)
    rates = panels[0].twinx()
    rates.plot([point["step"] for point in losses], [point["rate"] for point in losses], color="tab:grey", linewidth=1)
    rates.set_ylabel("learning rate", color="tab:grey")
    rates.set_ylim(bottom=0)
    if scores:
        panels[1].plot([point["step"] for point in scores], [point["miou"] for point in scores], color="tab:green", marker=".")
        panels[1].set_ylabel("mIoU, images kept out")
        panels[1].grid(alpha=0.3)
    panels[-1].set_xlabel("step")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(folder / PICTURE, picture.getvalue())
    return folder / PICTURE
