"""Features of POSIX systems are not needed to import the command line, or to write and read a store."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

WITHOUT_POSIX = """
import os, signal, sys

for name in ("fcntl", "resource", "grp", "pwd", "termios"):
    sys.modules[name] = None
for name in ("O_NONBLOCK", "O_CLOEXEC", "O_NOFOLLOW", "O_DIRECTORY", "pread", "pwrite", "fork", "register_at_fork",
             "sched_getaffinity", "getuid", "geteuid", "mkfifo", "getloadavg"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGALRM", "SIGPIPE", "SIGCHLD"):
    if hasattr(signal, name):
        delattr(signal, name)
"""


def run(code: str, *arguments: str, cwd: Path) -> str:
    script = WITHOUT_POSIX + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "module",
    [
        "wsss.cli.main",
        "wsss.cli.label",
        "wsss.cli.demo",
        "wsss.cli.convert",
        "wsss.cli.report",
        "wsss.cli.eval",
        "wsss.store.local",
        "wsss.store.remote",
        "wsss.photographs",
        "wsss.runtime.run.label_folder",
        "wsss.runtime.run.workers",
        "wsss.runtime.convert.dataset",
        "wsss.runtime.report.page",
        "wsss.train.dataset.survey",
        "wsss.train.evaluate.run",
    ],
)
def test_it_imports(module: str, tmp_path: Path) -> None:
    run(f"import {module}", cwd=tmp_path)


def test_photographs_and_documents_are_read(tmp_path: Path) -> None:
    run(
        """
        from pathlib import Path
        from PIL import Image
        from wsss.reading.documents import read_json
        from wsss.photographs import read_photograph

        Image.new("RGB", (3, 2)).save("a.png")
        assert read_photograph(Path("."), "a.png").shape == (2, 3)
        Path("a.json").write_text("{}")
        assert read_json(Path("a.json")) == {}
        """,
        cwd=tmp_path,
    )


def test_a_store_is_refused_by_name_where_there_are_no_locks(tmp_path: Path) -> None:
    output = run(
        """
        from pathlib import Path
        from wsss.classes import class_list
        from wsss.errors import StoreError
        from wsss.store.local import LabelStore

        try:
            LabelStore(Path("store"), class_list(["dog"]), {})
        except StoreError as error:
            print(error)
        """,
        cwd=tmp_path,
    )
    assert "--out store: no locks here: this Python has no fcntl" in output


def test_windows_locks_are_exclusive_and_shards_are_refused(tmp_path: Path) -> None:
    """``msvcrt`` is replaced by a fake that follows its documentation: a locked byte raises EACCES for another handle."""
    output = run(
        """
        import errno, types
        from pathlib import Path

        taken = {}
        def locking(handle, mode, count):
            assert (mode, count) == (2, 1)
            file = os.fstat(handle).st_ino
            if taken.setdefault(file, handle) != handle:
                raise OSError(errno.EACCES, "Permission denied")
        sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)

        import wsss, numpy, PIL.Image  # imported as what it is: only the lock sees Windows
        here, sys.platform = sys.platform, "win32"
        import wsss.lock
        sys.platform = here

        from wsss.classes import class_list
        from wsss.errors import StoreError
        from wsss.store.local import LabelStore, read_records

        classes = class_list(["dog"])
        with LabelStore(Path("store"), classes, {}) as store:
            try:
                LabelStore(Path("store"), classes, {})
            except StoreError as error:
                print(error)
            store.write({"path": "a.jpg", "label": "a.png", "sha256": ""}, numpy.zeros((2, 3), numpy.uint8))
        assert [record["path"] for record in read_records(Path("store"))] == ["a.jpg"]
        sys.platform = "win32"
        try:
            LabelStore(Path("shared"), classes, {}, shard=(0, 2))
        except StoreError as error:
            print(error)
        """,
        cwd=tmp_path,
    )
    assert "another run writes to it: process" in output
    assert "--out shared: no locks here: Windows has no shared locks" in output
    assert "leave --shard out" in output
