"""The same training from several seeds: how far a score moves by chance."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ...errors import WsssError
from ...files import write_atomically
from ..args import Config
from ..loop import Result, train

SEEDS = "seeds.json"


def train_seeds(
    store: Path, images: Path, out: Path, config: Config, *, seeds: int, log: Callable[[str], None], **given: Any
) -> tuple[Result, ...]:
    """Train from ``seeds`` seeds, starting with ``config.seed``, each in ``out/seed-K``, or continue where that stopped.

    Args:
        store, images, config, log, given: as of `train`.

    Returns:
        The result of each seed; ``seeds.json`` has them too.

    Raises:
        WsssError: as `train`, or ``out`` holds something else.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / f"seed-{config.seed}").is_dir():
        raise WsssError(f"--out {out}: the folder is not empty and has no seeds", hint="give a new or empty folder")
    results: list[Result] = []
    for seed in range(config.seed, config.seed + seeds):
        log(f"seed {seed}: {out / f'seed-{seed}'}")
        results.append(train(store, images, out / f"seed-{seed}", dataclasses.replace(config, seed=seed), log=log, **given))
        content = json.dumps([dataclasses.asdict(each) for each in results], indent=1, allow_nan=False) + "\n"
        write_atomically(out / SEEDS, content.encode())
    return tuple(results)


def spread(results: Sequence[Result]) -> str:
    """``mIoU 0.7012 +- 0.0051 (0.6950 to 0.7069) over 3 seeds``: mean, sample deviation, and range of the scores."""
    scores = [each.miou for each in results if each.miou is not None]
    if len(scores) < len(results):
        return f"{len(results) - len(scores)} of {len(results)} seeds have no score: no validation could score"
    deviation = f" +- {stdev(scores):.4f}" if len(scores) > 1 else ""
    return f"mIoU {mean(scores):.4f}{deviation} ({min(scores):.4f} to {max(scores):.4f}) over {len(scores)} seeds"
