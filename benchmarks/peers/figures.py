"""From the seconds and findings of all contenders to the numbers of the result file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .contenders import CONTENDERS, OFFICIAL
from .job import STAGES
from .process import Seconds


def chain(seconds: Seconds) -> float:
    """CPU seconds of all stages."""
    return sum(seconds[stage] for stage in STAGES)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": _rounded(np.median(values)), "lowest": _rounded(min(values)), "highest": _rounded(max(values))}


def figures(measured: Mapping[str, Any], found: Path) -> dict[str, Any]:
    """The numbers of a contender.

    Args:
        measured: ``rounds`` and ``official_rounds``, CPU seconds by stage, round by round; perhaps ``mixed``, those of a batch
            in which most photographs have no wanted class; ``peak_bytes``, ``about``; or ``failed``.
        found: folder with what each contender found.
    """
    if "failed" in measured:
        return {"failed": measured["failed"]}
    rounds, official = measured["rounds"], measured["official_rounds"]
    numbers: dict[str, Any] = {
        "cpu_seconds": {stage: _rounded(np.median([each[stage] for each in rounds])) for stage in STAGES},
        "chain_cpu_seconds": spread([chain(each) for each in rounds]),
        "times_official": spread([chain(theirs) / chain(ours) for theirs, ours in zip(official, rounds, strict=True)]),
        "peak_gb": round(measured["peak_bytes"] / 1e9, 2),
        "quality": quality(found, measured["name"]),
        "about": measured["about"],
    }
    if mixed := measured.get("mixed"):
        numbers["mostly_empty"] = {
            "cpu_seconds": _rounded(chain(mixed)),
            "times_official": _rounded(np.median([chain(each) for each in official]) / chain(mixed)),
        }
    return numbers


def best_of_both(measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Our best contender beside the best peer: how many times the CPU seconds of ours the peer takes, round by round.

    Contenders that did not run at the same time are compared through the official chain, which ran in turns with both.
    """
    ran = {name: each for name, each in measured.items() if "failed" not in each}
    ratios = {
        name: [chain(theirs) / chain(own) for theirs, own in zip(each["official_rounds"], each["rounds"], strict=True)]
        for name, each in ran.items()
    }
    best: dict[str, str] = {}
    for kind, names in (
        ("ours", [name for name in ratios if CONTENDERS[name].engine]),
        ("peer", [name for name in ratios if not CONTENDERS[name].engine]),
    ):
        if not names:
            return {}
        best[kind] = max(names, key=lambda name: float(np.median(ratios[name])))
    pairs = zip(ratios[best["ours"]], ratios[best["peer"]], strict=False)
    return {**best, "times": spread([ours / peer for ours, peer in pairs])}


def quality(found: Path, name: str) -> dict[str, float]:
    """Differences from the official chain in FP32, the worst over all photographs that both labeled; {} for that chain.

    ``pixels_equal``
        Share of the pixels of the label maps, of all photographs together.
    ``score_difference``, ``score_difference_on_canvas``
        Largest difference of the best score of a class: from the chain as users run it, and from the official detector on the
        same padded canvas as ours.
    ``clip_cosine``
        Lowest cosine of a view's embeddings.
    """
    official, own = (_read(found / each) for each in (OFFICIAL, name))
    numbers = sorted(official.keys() & own.keys())
    if name == OFFICIAL or not numbers:
        return {}
    pairs = [(official[number], own[number]) for number in numbers]
    same = sum(int((theirs["label_map"] == ours["label_map"]).sum()) for theirs, ours in pairs)
    result = {
        "photographs": len(numbers),
        "pixels_equal": round(same / sum(theirs["label_map"].size for theirs, _ in pairs), 6),
        "score_difference": _rounded(max(_apart(theirs, ours) for theirs, ours in pairs)),
        "clip_cosine": round(min(float((t["embedding"] * o["embedding"]).sum(axis=-1).min()) for t, o in pairs), 7),
    }
    canvas = _read(found / "on-canvas")
    if CONTENDERS[name].engine and canvas:
        together = [(canvas[number], own[number]) for number in numbers if number in canvas]
        result["score_difference_on_canvas"] = _rounded(max(_apart(theirs, ours) for theirs, ours in together))
    return result


def _apart(theirs: Mapping[str, np.ndarray], ours: Mapping[str, np.ndarray]) -> float:
    return float(np.abs(theirs["score"] - ours["score"]).max())


def _read(folder: Path) -> dict[int, dict[str, np.ndarray]]:
    files = folder.glob("*.npz") if folder.is_dir() else ()
    return {int(path.stem): dict(np.load(path, allow_pickle=False)) for path in files}


def _rounded(value: Any) -> float:
    return float(f"{float(value):.4g}")
