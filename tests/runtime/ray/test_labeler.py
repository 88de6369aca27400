"""What the labelers on a Ray cluster share: cores of a machine, and how often a call was begun."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("ray", reason="needs ray: pip install 'wsss[ray]'")

from wsss.runtime.ray.cluster import _silent
from wsss.runtime.ray.labeler import Control, _pin


def test_labelers_of_one_machine_have_cores_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {2, 3, 5, 7}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: taken.append(cores), raising=False)
    for seat in range(3):
        _pin(seat, 2)
    assert taken == [{2, 3}, {5, 7}, {2, 3}], "a labeler more than there is room for shares them"


def test_a_labeler_keeps_its_seat_and_machines_count_their_own() -> None:
    control = Control()
    asked = [("one", "a"), ("one", "b"), ("other", "c"), ("one", "a")]
    assert [control.seat(host, actor) for host, actor in asked] == [0, 1, 0, 0]


def test_what_ray_writes_to_stderr_while_it_starts_is_discarded(capfd: pytest.CaptureFixture[str]) -> None:
    with _silent():
        os.write(2, b"noise")
    os.write(2, b"said")
    assert capfd.readouterr().err == "said"


def test_calls_that_end_are_not_counted() -> None:
    control = Control()
    assert [control.begin("7/8"), control.begin("7/8"), control.begin("15/8")] == [0, 1, 0]
    control.end("7/8")
    assert control.begin("7/8") == 0
