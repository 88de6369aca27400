"""What this process may use of the machine: cores and memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

UNKNOWN = 1 << 62
"""Bytes: as many as any process can take."""


def cores() -> int:
    """Number of cores in this process's CPU affinity, or of the machine where the system has no affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_bytes(root: Path = Path("/")) -> int:
    """Bytes of host memory that this process may still take: what Linux reports as available, within the limits of its control
    groups; `UNKNOWN` where the system does not say.

    A control group counts cached files as used memory, but Linux frees them on demand, so that they count as free here.

    Args:
        root: the folder of ``proc`` and ``sys``.
    """
    free = [UNKNOWN]
    with suppress(OSError, ValueError, IndexError):
        free.append(1024 * int((root / "proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]))
    for group, limit, used in _groups(root):
        with suppress(OSError, ValueError):
            left = int((group / limit).read_text()) - int((group / used).read_text())
            files = [line.split()[1] for line in _lines(group / "memory.stat") if re.match("(in)?active_file ", line)]
            free.append(left + sum(map(int, files)))
    return max(min(free), 0)


def _groups(root: Path) -> Iterator[tuple[Path, str, str]]:
    """The control groups of memory that this process is in, and those above them: folder, and the files of limit and use."""
    tops = {
        "": (root / "sys/fs/cgroup", "memory.max", "memory.current"),
        "memory": (root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    }
    yield from tops.values()
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        for controller in set(controllers.split(",")) & tops.keys():
            top, limit, used = tops[controller]
            inner = path.strip("/").split("/")
            yield from ((top.joinpath(*inner[:depth]), limit, used) for depth in range(1, len(inner) + 1) if inner != [""])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
