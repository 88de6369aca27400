"""The books of a run on a cluster: who has which image, what is dealt again, and what an image is blamed for."""

from __future__ import annotations

import pytest

from wsss.runtime.ray_desk import Desk
from wsss.runtime.stream import Task


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def tasks(*numbers: int) -> list[Task]:
    return [Task(number, f"{number}.png", f"{number}.png") for number in numbers]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def desk(clock: Clock) -> Desk:
    return Desk(8, patience=60, silent=30, clock=clock)


def test_an_empty_run_ends(desk: Desk) -> None:
    assert desk.take((0, 0)) is None
    desk.end()
    assert desk.take((0, 0)) == []
    assert desk.open() == (0, False)


def test_tasks_are_taken_only_so_far_ahead_of_the_oldest(desk: Desk) -> None:
    assert desk.put(tasks(0, 1, 2, 3))
    assert desk.put(tasks(4, 5, 6, 7))
    assert not desk.put(tasks(8, 9))
    desk.done([4, 5, 6, 7, 1])
    assert not desk.put(tasks(8, 9)), "0 is not done"
    desk.done([0])
    assert desk.put(tasks(8, 9))
    assert desk.open() == (4, True)


def test_a_reader_sent_again_is_given_the_same(desk: Desk) -> None:
    desk.put(tasks(0, 1))
    desk.put(tasks(2, 3))
    assert desk.take((0, 0)) == desk.take((0, 0)) == tasks(0, 1)
    desk.done([0])
    assert desk.take((0, 0)) == tasks(0, 1), "its rows must be those that it made before"
    assert desk.take((0, 1)) == tasks(2, 3)
    desk.done([1])
    assert desk.take((0, 0)) == []


def test_what_is_out_too_long_is_dealt_again_to_the_idle(desk: Desk, clock: Clock) -> None:
    desk.put(tasks(0, 1))
    desk.put(tasks(2, 3))
    desk.take((0, 0))
    clock.now = 50
    desk.take((0, 1))
    desk.done([1])
    assert desk.take((0, 2)) is None
    clock.now = 61
    assert desk.take((0, 2)) == tasks(0)
    assert desk.take((0, 3)) is None
    clock.now = 111
    assert desk.take((0, 3)) == tasks(2, 3)
    clock.now = 61 + 119
    assert desk.take((0, 4)) is None, "twice as patient"
    clock.now = 61 + 120
    assert desk.take((0, 4)) == tasks(0)


def test_each_image_is_in_one_hand_and_counts_once(desk: Desk) -> None:
    desk.put(tasks(0, 1, 2))
    desk.hello("a", "a1", "host")
    desk.hello("b", "b1", "host")
    assert desk.begin("a1", [0, 1]) == (False, [], {})
    assert desk.begin("b1", [0, 1, 2]) == (False, [0, 1], {})
    assert desk.done([0, 1]) == ([0, 1], [], False)
    assert desk.done([1, 2]) == ([2], [], False), "more may come"
    desk.end()
    assert desk.done([]) == ([], [], True)
    assert desk.begin("b1", [0, 2]) == (False, [0, 2], {})


def test_images_of_a_dead_labeler_are_suspect(desk: Desk) -> None:
    desk.put(tasks(0, 1, 2))
    desk.hello("a", "a1", "host")
    desk.begin("a1", [0, 1])
    assert desk.hello("a", "a2", "host") == 0, "the dead one's seat is free"
    assert desk.begin("a2", [0, 1, 2]) == (False, [], {0: 1, 1: 1})
    desk.put_back("a2", [0, 1, 2])
    desk.begin("a2", [1])
    desk.hello("a", "a3", "host")
    assert desk.begin("a3", [0, 1]) == (False, [], {0: 1, 1: 2}), "only what it had in hand"
    assert desk.done([0])[1] == ["the labeler on host died; another one goes on with its images"] * 2
    assert desk.done([1])[1] == []


def test_images_of_a_silent_labeler_go_to_others_and_are_not_blamed(desk: Desk, clock: Clock) -> None:
    desk.put(tasks(0, 1))
    desk.hello("a", "a1", "host")
    desk.hello("b", "b1", "host")
    desk.begin("a1", [0])
    clock.now = 29
    assert desk.begin("b1", [0]).leave == [0]
    desk.beat("a1")
    clock.now = 58
    assert desk.begin("b1", [0]).leave == [0]
    clock.now = 59
    assert desk.begin("b1", [0]) == (False, [], {})


def test_labelers_of_a_host_have_seats_of_their_own(desk: Desk) -> None:
    assert [desk.hello(name, name, "host") for name in "abc"] == [0, 1, 2]
    assert desk.hello("d", "d", "other") == 0
    assert desk.hello("b", "b2", "host") == 1


def test_a_stop_leaves_what_is_in_no_hand(desk: Desk) -> None:
    desk.put(tasks(0, 1))
    desk.put(tasks(2, 3))
    desk.hello("a", "a1", "host")
    desk.take((0, 0))
    desk.begin("a1", [0])
    assert not desk.beat("a1")
    desk.stop()
    assert desk.beat("a1")
    assert desk.begin("a1", [1]).stopped
    assert desk.take((0, 1)) == []


def test_a_new_round_deals_all_that_is_not_done_and_blames_nobody(desk: Desk) -> None:
    desk.put(tasks(0, 1))
    desk.put(tasks(2, 3))
    desk.hello("a", "a1", "host")
    desk.take((0, 0))
    desk.begin("a1", [0, 1])
    desk.done([1])
    desk.start_round()
    assert desk.take((1, 0)) == tasks(0)
    assert desk.take((1, 1)) == tasks(2, 3)
    desk.hello("b", "b1", "host")
    assert desk.begin("b1", [0]) == (False, [], {})
