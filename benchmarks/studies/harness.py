"""What the studies share: arguments, exported models, parts in separate processes, memory, and result files."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import __version__
from ...files import write_atomically
from ..steps import log

if TYPE_CHECKING:
    from ...export.family import Options
    from ...spec import Model

__all__ = ["RESULTS", "about", "exported_model", "folder_megabytes", "log", "peak_memory_bytes", "read_result"]
__all__ += ["run_part", "set_threads", "study_parser", "write_result"]
RESULTS = Path(__file__).parents[1] / "results"


def study_parser(
    spec: ModuleSpec | None, doc: str | None, *, out: Path | None = None, work: str | None = None, threads: bool = False
) -> argparse.ArgumentParser:
    """The argument parser of a study, called with its ``__spec__`` and ``__doc__``.

    Args:
        out: default of ``--out``, the result file. work: default of ``--work``, a folder that a second run continues.
        threads: add ``--threads``, for `set_threads`.
    """
    prog = f"python -m {spec.name}" if spec else None
    parser = argparse.ArgumentParser(prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if out is not None:
        parser.add_argument("--out", type=Path, default=out, help="result file")
    if work is not None:
        parser.add_argument("--work", type=Path, default=Path(work), help="working folder; a second run continues there")
    if threads:
        parser.add_argument("--threads", type=int, default=2, help="CPU threads of PyTorch")
    return parser


def set_threads(count: int) -> None:
    """Limit PyTorch to ``count`` CPU threads."""
    import torch

    torch.set_num_threads(count)


def about() -> dict[str, str]:
    """The version of wsss and the machine, for a result file."""
    processor = platform.processor() or platform.machine()
    return {"wsss": __version__, "machine": f"{processor}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}"}


def exported_model(name: str, variant: str, weights: str, bundle: Path, options: Options) -> Model:
    """The model ``name`` in ``bundle``, exported now unless it is there with this variant, weights and options."""
    from ...export.exporting import export_model, standing_model
    from ...export.family import family
    from ...spec import Bundle

    standing = standing_model(bundle, name, variant=variant, weights=weights, options=options)
    if standing is None:
        export_model(family(name), variant=variant, weights=weights, bundle=bundle, options=options, log=log)
    return standing or Bundle(bundle).model(name)


def run_part(spec: ModuleSpec | None, *arguments: object, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run the study with ``__spec__`` in a separate process, and read the last line it prints as JSON.

    Args:
        env: variables to add to the environment.
    """
    assert spec is not None, "run the study with python -m"
    command = [sys.executable, "-m", spec.name, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **(env or {})})
    return dict(json.loads(done.stdout.splitlines()[-1]))


def peak_memory_bytes() -> int:
    """Peak resident memory of this process; Linux only.

    Not from getrusage, whose peak survives exec and may be that of the process that started this one.
    """
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert peak
    return 1024 * int(peak[1])


def folder_megabytes(folder: Path) -> float:
    """Size of the files in a folder in MB, with one decimal."""
    return round(sum(path.stat().st_size for path in folder.iterdir()) / 1e6, 1)


def read_result(path: Path) -> dict[str, Any]:
    """What a study has written so far; empty when there is nothing."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def write_result(path: Path, result: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write a result file whole or not at all, and print it. Raises ValueError for a number that is not finite."""
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())
    print(text, end="")
