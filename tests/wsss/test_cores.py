"""Memory that this process may still take, on a machine and within control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from wsss.cores import UNKNOWN, cores, free_bytes

MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    4000 kB\nCached: 1 kB\n"}
GROUP = "sys/fs/cgroup/"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        pytest.param({}, UNKNOWN, id="a system that does not say"),
        pytest.param({"proc/meminfo": "nonsense"}, UNKNOWN, id="nor here"),
        pytest.param(MEMINFO, 4000 << 10, id="no control groups"),
        pytest.param(
            {**MEMINFO, f"{GROUP}memory.max": "max\n", f"{GROUP}memory.current": "5\n"}, 4000 << 10, id="a group without a limit"
        ),
        pytest.param({f"{GROUP}memory.max": "3000\n", f"{GROUP}memory.current": "1000\n"}, 2000, id="a limit"),
        pytest.param(
            {
                f"{GROUP}memory.max": "3000\n",
                f"{GROUP}memory.current": "2900\n",
                f"{GROUP}memory.stat": "anon 7\ninactive_file 500\nactive_file 40\nfile 9\n",
            },
            640,
            id="cached files can be freed",
        ),
        pytest.param(
            {f"{GROUP}memory/memory.limit_in_bytes": "3000", f"{GROUP}memory/memory.usage_in_bytes": "3500"}, 0, id="version 1"
        ),
        pytest.param(
            {
                **MEMINFO,
                "proc/self/cgroup": "0::/a/b\n",
                f"{GROUP}a/memory.max": "3000\n",
                f"{GROUP}a/memory.current": "1500\n",
                f"{GROUP}a/b/memory.max": "max\n",
                f"{GROUP}a/b/memory.current": "7\n",
            },
            1500,
            id="the limit of a group above",
        ),
        pytest.param(
            {
                **MEMINFO,
                "proc/self/cgroup": "5:cpu:/\n4:memory:/job\n",
                f"{GROUP}memory/job/memory.limit_in_bytes": "1000",
                f"{GROUP}memory/job/memory.usage_in_bytes": "250",
            },
            750,
            id="a group of version 1",
        ),
    ],
)
def test_free_memory_is_what_the_machine_and_its_groups_leave(tmp_path: Path, files: dict[str, str], free: int) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert free_bytes(tmp_path) == free


def test_here_there_is_some_of_both() -> None:
    assert cores() >= 1 and free_bytes() > 1 << 20
