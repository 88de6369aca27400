"""How photographs are predicted at test time. Imports no torch, so that the command line starts fast."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...errors import UsageError

MAX_SCALES = 16
LEAST_WINDOW_PX = 16


@dataclass(frozen=True, kw_only=True)
class Inference:
    """Test-time settings."""

    scales: tuple[float, ...] = (1.0,)
    """Factors by which a photograph is resized; the probabilities are averaged."""
    flip: bool = False
    """Also use the mirrored photograph at each scale."""
    window: int = 0
    """Side of a sliding window, pixels of the resized photograph; 0: the whole photograph at once."""
    stride: int = 0
    """Distance between windows, pixels; 0: two thirds of the window (mmsegmentation's configurations: 341 for 512)."""
    crf: bool = False
    """Refine the averaged probabilities by a DenseCRF."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.scales) <= MAX_SCALES or not all(
            math.isfinite(scale) and 0.1 <= scale <= 8 for scale in self.scales
        ):
            given = ", ".join(f"{scale:g}" for scale in self.scales)
            raise UsageError(
                f"--scales: expected 1 to {MAX_SCALES} factors of 0.1 to 8, got {given}",
                hint="--scales 0.5,0.75,1,1.25,1.5,1.75",
            )
        if self.window and self.window < LEAST_WINDOW_PX:
            raise UsageError(f"--window: expected at least {LEAST_WINDOW_PX} pixels, got {self.window}", hint="--window 512")
        if self.stride and not self.window:
            raise UsageError("--stride is the distance between windows: it needs --window", hint=f"--window {2 * self.stride}")
        if not 0 <= self.stride <= self.window:
            raise UsageError(
                f"--stride: expected 1 to {self.window} pixels, the window's side, got {self.stride}",
                hint=f"--stride {max(2 * self.window // 3, 1)}",
            )

    def __str__(self) -> str:
        parts = [f"scale{'s' if len(self.scales) > 1 else ''} {' '.join(f'{scale:g}' for scale in self.scales)}"]
        parts += ["mirrored"] if self.flip else []
        parts += [f"windows of {self.window} px every {self.step} px"] if self.window else []
        return ", ".join(parts)

    @property
    def step(self) -> int:
        """The distance between windows, pixels."""
        return self.stride or max(2 * self.window // 3, 1)


def parse_scales(text: str | None) -> tuple[float, ...]:
    """Parse ``0.5,1,1.5``; None is (1.0,). Raises UsageError for anything else."""
    if text is None:
        return (1.0,)
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--scales: expected numbers with commas, got {text[:60]!r}", hint="--scales 0.75,1,1.25") from None
