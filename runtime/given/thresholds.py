"""Reads and writes thresholds of single classes (``--tag-thresholds``): JSON or TOML, class name to a number in 0..1."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ...errors import UsageError, WsssError
from ...files import write_atomically
from ...reading.documents import read_json, read_toml, short

_FORM = '{"dog": 0.4, "potted plant": 0.55}; wsss calibrate writes such a file'


def read_thresholds(path: str | Path) -> dict[str, float]:
    """The lowest CLIP probability of each class that the file names.

    Raises:
        UsageError: cannot be read, not JSON or TOML, or a value that is not a number in 0..1.
    """
    path = Path(path)
    where = f"--tag-thresholds {path}"
    if path.suffix.lower() == ".toml":
        document: object = read_toml(path, error=UsageError)
    else:
        document = read_json(path, where=where, hint=_FORM)
    if not isinstance(document, dict) or not document:
        raise UsageError(f"{where}: expected an object of class names to numbers, got {short(document)}", hint=_FORM)
    for name, value in document.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise UsageError(f"{where}: {name[:200]!r}: expected a number in 0..1, got {short(value)}", hint=_FORM)
    return {name: float(value) for name, value in document.items()}


def write_thresholds(path: str | Path, thresholds: Mapping[str, float]) -> None:
    """Write the file that `read_thresholds` reads. Raises WsssError."""
    text = json.dumps({name: round(float(value), 4) for name, value in thresholds.items()}, indent=1, ensure_ascii=False)
    try:
        write_atomically(Path(path), f"{text}\n".encode())
    except OSError as error:
        raise WsssError(f"{path}: cannot be written: {error.strerror or error}", hint="give a file you may write") from None
