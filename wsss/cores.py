"""How many cores this process may use."""

from __future__ import annotations

import os


def cores() -> int:
    """Cores of this process's affinity where the system has one, otherwise of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
