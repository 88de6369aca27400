"""What TensorRT-RTX compiles for this GPU while it runs, kept beside the plan so that the next start finds it.

The file is ours around TensorRT's own: a mark, the sha256 of the rest, the rest. TensorRT checks that it belongs to this
version, GPU and driver; the hash keeps damaged bytes away from its parser. A cache is never worth an error: one that
cannot be read or written is said in the log and done without.
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
    """The cache of a plan."""
    return plan.with_name(f"{plan.name}.kernels")


def load_kernels(path: Path, cache: Any) -> None:
    """Fills an ``IRuntimeCache`` from a file, if there is a fitting one."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("%s: compiled kernels not read: %s", path, error.strerror)
        return
    body = data[len(MARK) + 32 :]
    if data[: len(MARK)] != MARK or data[len(MARK) : len(MARK) + 32] != hashlib.sha256(body).digest():
        log.warning("%s: compiled kernels are damaged and compiled again", path)
    elif not cache.deserialize(body):
        log.warning("%s: compiled kernels are of another GPU, driver or TensorRT-RTX, and compiled again", path)


def save_kernels(path: Path, cache: Any) -> None:
    """Writes an ``IRuntimeCache``, unless the file holds the same: whole or not at all."""
    body = bytes(cache.serialize())
    data = MARK + hashlib.sha256(body).digest() + body
    try:
        if not body or (path.is_file() and path.read_bytes() == data):
            return
        write_atomically(path, data)
    except OSError as error:
        log.warning("%s: compiled kernels not kept: %s", path, error.strerror)
