"""`wsss label` as a long job: signals, shards, devices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from wsss.store.local import read_records

if TYPE_CHECKING:
    from ..conftest import Answer, World

    Run = Callable[..., Answer]


@pytest.fixture
def label(wsss: Run, world: World, photos: Path) -> Run:
    def run(*flags: str) -> Answer:
        return wsss("label", "photos", "--classes", "red, green, blue", "--bundle", world.bundle, "--out", "store", *flags)

    return run


def events_of(answer: Answer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in answer.out.splitlines()]


def test_events_are_objects_a_line_and_end_with_the_summary(label: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsss.cli.events.SECONDS", 0.0)
    (photos / "b\nad.jpg").write_bytes(b"no")
    (photos / "loop").symlink_to(photos)
    answer = label("--json", "--batch", "2")
    events = events_of(answer)
    kinds = [each["event"] for each in events]
    assert (answer.code, kinds[0], kinds[-1], kinds.count("failed")) == (1, "started", "finished", 1)
    assert (events[0]["store"], events[0]["engine"], events[0]["classes"]) == ("store", "ort", 3)
    failed = events[kinds.index("failed")]
    assert (failed["image"], "not a readable image" in failed["error"]) == ("b\nad.jpg", True)
    assert "loop" in events[kinds.index("warning")]["message"]
    progress = [each for each in events if each["event"] == "progress"]
    assert len(progress) >= 2
    assert [each["done"] for each in progress] == sorted(each["done"] for each in progress)
    assert (progress[-1]["images"], progress[-1]["done"], progress[-1]["seconds_left"]) == (6, 6, 0)
    assert (events[-1]["labelled"], events[-1]["failed"], events[-1]["stopped"]) == (5, 1, False)


def test_progress_events_come_at_a_sane_rate(label: Run, world: World, photos: Path) -> None:
    for extra in range(40):
        world.save(photos / f"{extra:02}.png", 30, 40, red=(2, 2, 20, 20))
    events = events_of(label("--json", "--batch", "1"))
    assert sum(each["event"] == "progress" for each in events) <= 2 + events[-1]["seconds"]


def test_an_error_is_an_event_too(label: Run, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mine.txt").touch()
    answer = label("--json")
    assert answer.code == 1
    last = events_of(answer)[-1]
    assert last["event"] == "error"
    assert "holds no label store" in last["message"]
    assert last["hint"]


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("debug", {"stages", "engine", "failed"}),
        ("info", {"engine", "failed"}),
        (None, {"failed"}),
        ("warning", {"failed"}),
        ("error", set()),
    ],
)
def test_levels_of_logs(label: Run, photos: Path, level: str | None, shown: set[str]) -> None:
    """Without a level: in a pipe, warnings only."""
    (photos / "bad.jpg").write_bytes(b"no")
    answer = label(*(["--log-level", level] if level else []))
    lines = {"stages": "fuse 0.", "engine": "engine ort, 3 classes", "failed": "failed: bad.jpg: "}
    assert {name for name, text in lines.items() if text in answer.err} == shown
    assert "5 labeled" in answer.out


def test_a_level_that_is_none(label: Run) -> None:
    answer = label("--log-level", "loud")
    assert answer.code == 2
    assert "'--log-level'" in answer.err and "'loud' is not one of 'debug', 'info', 'warning', 'error'" in answer.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_what_is_in_hand(
    label: Run, world: World, photos: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, tmp_path: Path
) -> None:
    for extra in range(40):
        world.save(photos / f"{extra:02}.png", 30, 40, red=(2, 2, 20, 20))
    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        sent: list[int] = []

        def once(_: object) -> None:
            if not sent:
                sent.append(1)
                os.kill(os.getpid(), number)

        patched.setattr("wsss.cli.events.show_progress", once)
        answer = label("--batch", "2")
    assert answer.code == 130
    assert "stopping after the current batches; press Ctrl-C again to stop now" in answer.err
    assert "Run the same command to continue." in answer.err
    done = len(list(read_records(tmp_path / "store")))
    assert 0 < done < 45
    assert signal.getsignal(number) == before
    assert f"{45 - done} labeled" in label().out


def test_a_second_signal_ends_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    code = """
import os, signal, time
from wsss.cli.label import stop_on_signals
with stop_on_signals() as stop:
    print("ready", flush=True)
    stop.wait()
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline().startswith("stopping after the current batches")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=50) == 130


def test_shards_share_a_store(label: Run, tmp_path: Path) -> None:
    summaries = [events_of(label("--shard", f"{number}/3", "--json"))[-1] for number in range(3)]
    assert sum(each["labelled"] for each in summaries) == 5
    assert sorted(path.name for path in (tmp_path / "store").glob("manifest*")) == ["manifest.jsonl"]
    assert events_of(label("--json"))[-1]["skipped"] == 5


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "-1/3", "1/0", "/", ""])
def test_a_shard_that_means_nothing(label: Run, text: str) -> None:
    answer = label("--shard", text)
    assert answer.code == 2
    assert f"--shard: expected I/N with I from 0 to N - 1, got {text!r}" in answer.err


@pytest.mark.parametrize("text", ["gpu", "0,", "0,cuda", "cuda:x", "-1"])
def test_devices_that_mean_nothing(label: Run, text: str) -> None:
    answer = label("--devices", text)
    assert answer.code == 2
    assert "--devices: expected numbers of GPUs or cpu, got" in answer.err


def test_one_device_needs_no_worker(label: Run) -> None:
    assert "5 labeled" in label("--devices", "cpu").out


def test_a_worker_that_cannot_start_is_one_message(label: Run) -> None:
    answer = label("--devices", "cpu,cpu")  # workers have no scripted engines, and the bundle's graphs are none
    assert answer.code == 1
    assert "Traceback" not in answer.err
    assert "ONNX Runtime cannot load it" in answer.err
