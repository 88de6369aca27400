"""The kernels that TensorRT-RTX compiles for this GPU while it runs, saved beside the plan for the next start, now and then and
when the engine is closed.

The file holds a mark, the sha256 of TensorRT's data, and the data. TensorRT checks that they match its version, the GPU and
the driver; the hash keeps damaged bytes away from its parser. A cache that cannot be read or written is not an error: the log
reports it, and the kernels are compiled again.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from ..files import write_atomically

log = logging.getLogger(__name__)

MARK = b"wsss-rtx-kernels1"


def cache_beside(plan: Path) -> Path:
    """Path of a plan's cache."""
    return plan.with_name(f"{plan.name}.kernels")


def load_kernels(path: Path, cache: Any) -> None:
    """Fill an ``IRuntimeCache`` from a file, if there is one that matches."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("%s: the compiled kernels cannot be read: %s", path, error.strerror)
        return
    body = data[len(MARK) + 32 :]
    if data[: len(MARK)] != MARK or data[len(MARK) : len(MARK) + 32] != hashlib.sha256(body).digest():
        log.warning("%s: the compiled kernels are damaged and will be compiled again", path)
    elif not cache.deserialize(body):
        log.warning("%s: the compiled kernels are for another GPU, driver or TensorRT-RTX and will be compiled again", path)


def save_kernels(path: Path, cache: Any) -> None:
    """Write an ``IRuntimeCache`` atomically, unless the file already holds the same."""
    body = bytes(cache.serialize())
    data = MARK + hashlib.sha256(body).digest() + body
    try:
        if not body or (path.is_file() and path.read_bytes() == data):
            return
        write_atomically(path, data)
    except OSError as error:
        log.warning("%s: the compiled kernels cannot be saved: %s", path, error.strerror)
