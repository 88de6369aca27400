"""What every study shares: its arguments, the record of the machine, and its result file."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from ... import __version__

RESULTS = Path(__file__).parents[1] / "results"


def study_parser(spec: ModuleSpec | None, doc: str | None) -> argparse.ArgumentParser:
    """The argument parser of a study, called with its ``__spec__`` and ``__doc__``."""
    prog = f"python -m {spec.name}" if spec else None
    return argparse.ArgumentParser(prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def about() -> dict[str, str]:
    """The version of wsss and the machine, for a result file."""
    processor = platform.processor() or platform.machine()
    return {"wsss": __version__, "machine": f"{processor}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}"}


def read_result(path: Path) -> dict[str, Any]:
    """What a study has written so far; empty when there is nothing."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def write_result(path: Path, result: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write a result file whole or not at all, and print it. Raises ValueError for a number that is not finite."""
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    print(text, end="")
