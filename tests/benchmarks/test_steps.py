"""Steps that succeed, fail, crash, hang, have nothing to do, build on each other, and are found again."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from wsss.benchmarks.steps import Record, Step, run_step, run_steps

WRITE = "import json, sys; json.dump({}, open(sys.argv[-1], 'w'))"


class Check:
    """A record in a folder, and steps that note that they ran."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = self.again()
        self.lines: list[str] = []

    def again(self, **identity: str) -> Record:
        self.record = Record(self.folder / "out" / "record.json", {"gpu": "x", **identity})
        return self.record

    def step(self, name: str, code: str = WRITE.format("1"), *, limit_s: float = 60, needs: tuple[str, ...] = ()) -> Step:
        note = f"open({str(self.folder / 'ran')!r}, 'a').write({name + ' '!r}); "
        return Step(name=name, command=[sys.executable, "-c", note + code], limit_s=limit_s, needs=needs)

    def run(self, *steps: Step, seconds: float = 60) -> list[str]:
        return run_steps(steps, self.record, ends=time.monotonic() + seconds, log=self.lines.append)

    @property
    def ran(self) -> list[str]:
        path = self.folder / "ran"
        return path.read_text().split() if path.is_file() else []

    @property
    def on_disk(self) -> dict[str, dict[str, object]]:
        steps: dict[str, dict[str, object]] = json.loads((self.folder / "out" / "record.json").read_text())["steps"]
        return steps


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(tmp_path)


def test_what_is_done_is_not_done_again(check: Check) -> None:
    assert check.run(check.step("a", WRITE.format("{'x': 1}")), check.step("b")) == []
    assert check.on_disk["a"]["status"] == "done" and check.on_disk["a"]["result"] == {"x": 1}
    check.again()
    check.run(check.step("a"), check.step("b"), check.step("c"))
    assert check.ran == ["a", "b", "c"]
    assert check.record.result("a") == {"x": 1}
    assert "a: done before" in check.lines


def test_a_failing_step_is_recorded_and_tried_again(check: Check) -> None:
    check.run(check.step("bad", "raise SystemExit('no such thing')"), check.step("good"))
    assert check.on_disk["bad"]["status"] == "failed"
    assert str(check.on_disk["bad"]["error"]).endswith("no such thing")
    assert check.on_disk["good"]["status"] == "done", "the others go on"
    check.run(check.step("bad"), check.step("good"))
    assert check.ran == ["bad", "good", "bad"]
    assert check.on_disk["bad"] == {"status": "done", "seconds": check.on_disk["bad"]["seconds"], "result": 1}


def test_a_result_with_a_failure_is_kept(check: Check) -> None:
    check.run(check.step("gate", WRITE.format("{'rows': 3}") + "; sys.exit(1)"))
    assert check.on_disk["gate"]["status"] == "failed" and check.on_disk["gate"]["result"] == {"rows": 3}


def test_a_crash_of_a_library_ends_its_step_alone(check: Check) -> None:
    check.run(check.step("crash", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"), check.step("after"))
    assert check.on_disk["crash"]["status"] == "failed" and "SIGSEGV" in str(check.on_disk["crash"]["error"])
    assert check.record.is_done("after")


def test_a_hanging_step_is_ended_with_its_children(check: Check, tmp_path: Path) -> None:
    child = f"import time; time.sleep(1.5); open({str(tmp_path / 'late')!r}, 'w')"
    start = f"import subprocess, time, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    hang = f"{start}; print('begun', flush=True); time.sleep(60)"
    entry = run_step(check.step("hang", hang), 0.7)
    assert entry["status"] == "timed out" and "begun" in entry["error"] and entry["seconds"] < 8
    time.sleep(2)
    assert not (tmp_path / "late").exists()


def test_nothing_to_do_is_no_failure(check: Check) -> None:
    check.run(check.step("tests", WRITE.format("{'left out': 'needs pytest'}")))
    assert check.on_disk["tests"]["status"] == "left out" and check.on_disk["tests"]["reason"] == "needs pytest"
    assert "result" not in check.on_disk["tests"]
    check.run(check.step("tests"))
    assert check.record.is_done("tests")


def test_what_needs_a_failed_step_is_left_out(check: Check) -> None:
    check.run(check.step("a", "raise SystemExit(1)"), check.step("b", needs=("a",)), check.step("c", needs=("b",)))
    assert check.ran == ["a"]
    assert check.on_disk["b"] == {"status": "left out", "reason": "needs a"}
    assert check.on_disk["c"]["status"] == "left out"
    check.run(check.step("a"), check.step("b", needs=("a",)), check.step("c", needs=("b",)))
    assert check.ran == ["a", "a", "b", "c"]


def test_a_lost_product_is_made_again_when_it_is_needed(check: Check, tmp_path: Path) -> None:
    product = tmp_path / "engines"

    def export() -> Step:
        step = check.step("export", f"open({str(product)!r}, 'w'); {WRITE.format('1')}")
        return Step(name=step.name, command=step.command, limit_s=60, product=product)

    check.run(export(), check.step("latency", needs=("export",)))
    product.unlink()
    check.run(export(), check.step("latency", needs=("export",)))
    assert check.ran == ["export", "latency"], "nobody needs it any more"
    check.run(export(), check.step("latency", needs=("export",)), check.step("chain", needs=("export",)))
    assert check.ran == ["export", "latency", "export", "chain"]


def test_no_step_begins_after_the_time(check: Check) -> None:
    late = check.run(check.step("a"), check.step("b", needs=("a",)), seconds=-1)
    assert late == ["a", "b"] and check.ran == []
    assert not (check.folder / "out" / "record.json").exists()
    late = check.run(check.step("slow", "import time; time.sleep(60)"), check.step("b"), seconds=0.7)
    assert late == ["slow", "b"]
    assert check.on_disk["slow"]["status"] == "timed out"


def test_a_step_that_takes_longer_than_its_own_limit_is_not_late(check: Check) -> None:
    assert check.run(check.step("slow", "import time; time.sleep(60)", limit_s=0.5)) == []
    assert check.on_disk["slow"]["status"] == "timed out"


def test_a_record_is_on_the_disk_before_it_replaces_the_last_one(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    synchronized: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synchronized.append(os.readlink(f"/proc/self/fd/{handle}")))
    check.record.enter("a", status="done")
    assert synchronized == [str(check.record.path.with_name(".record.json.tmp"))]


def test_results_of_something_else_are_begun_anew(check: Check) -> None:
    check.run(check.step("a"))
    check.again(driver="another")
    check.run(check.step("a"))
    assert check.ran == ["a", "a"]


def test_a_damaged_record_is_begun_anew(check: Check) -> None:
    check.run(check.step("a"))
    check.record.path.write_text('{"identity": ')
    check.again()
    assert not check.record.is_done("a")
    check.record.path.write_text("[]")
    assert not check.again().is_done("a")
