"""Threads that work ahead: in order, bounded, ended from either side, errors passed on."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from concurrent.futures import CancelledError

import numpy as np
import pytest

from wsss.runtime.canvas import together
from wsss.runtime.run.prefetch import Budget, PriorityThreadPool, prefetched


def counting(made: list[int], count: int = 100) -> Generator[int, None, None]:
    for number in range(count):
        made.append(number)
        yield number


def test_all_items_in_order_through_several_threads() -> None:
    made: list[int] = []
    squares = prefetched((number * number for number in prefetched(counting(made), 3)), 2)
    assert list(squares) == [number * number for number in range(100)]


def test_no_more_is_made_than_fits() -> None:
    made: list[int] = []
    items = prefetched(counting(made), 4)
    assert next(items) == 0
    time.sleep(0.05)
    assert len(made) <= 1 + 4 + 1, "one taken, four waiting, one in hand"
    items.close()


def test_closing_ends_the_threads_and_the_source() -> None:
    before, closed = threading.active_count(), threading.Event()

    def source() -> Generator[int, None, None]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    items = prefetched(prefetched(source()))
    assert next(items) == 1
    items.close()
    assert closed.wait(1)
    assert threading.active_count() == before


def test_an_error_comes_after_the_items_before_it() -> None:
    def source() -> Generator[int, None, None]:
        yield 1
        raise ValueError("broken")

    items = prefetched(prefetched(source()))
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken"):
        next(items)


def test_a_source_that_exits_leaves_nobody_waiting() -> None:
    def source() -> Generator[int, None, None]:
        yield 1
        raise SystemExit("broken")

    seen: list[object] = []

    def read() -> None:
        try:
            for item in prefetched(source()):
                seen.append(item)
        except SystemExit as error:
            seen.append(str(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(timeout=10)
    assert seen == [1, "broken"]


def test_closing_frees_a_source_that_waits() -> None:
    free = threading.Event()

    def source() -> Generator[int, None, None]:
        yield 1
        free.wait()
        yield 2

    items = prefetched(source(), on_close=free.set)
    assert next(items) == 1
    items.close()
    assert free.is_set()


def test_a_budget_is_kept_and_what_is_larger_comes_alone() -> None:
    budget, taken = Budget(10), list[str]()
    budget.take(6)
    assert budget.fits(4)
    assert not budget.fits(5)

    def large() -> None:
        budget.take(100)
        taken.append("large")

    thread = threading.Thread(target=large)
    thread.start()
    time.sleep(0.02)
    assert taken == []
    budget.give(6)
    thread.join()
    assert taken == ["large"]
    assert not budget.fits(1)
    budget.close()
    assert budget.fits(1)


def test_rows_side_by_side_are_stacked_without_a_copy() -> None:
    batch = np.arange(6 * 3 * 2, dtype=np.uint8).reshape(6, 3, 2)
    for rows in ([batch[1:2], batch[2:3], batch[3:4]], [batch[1:3], batch[3:4]], [batch[1][None], batch[2:4]], [batch[1:4]]):
        assert np.array_equal(together(rows), batch[1:4])
        assert np.shares_memory(together(rows), batch)
        assert len(rows) == 1 or not np.asarray(together(rows)).flags.writeable
    for apart in (
        [batch[2:3], batch[1:2]],
        [batch[0:1], batch[2:3]],
        [batch[0:1], batch[0:1]],
        [batch[0:2], batch[1:3]],
        [batch[0:1].copy(), batch[1:2]],
        [batch[0:2, :1], batch[2:4, :1]],
    ):
        assert np.array_equal(together(apart), np.concatenate(apart))
        assert not np.shares_memory(together(apart), batch)
    for unlike in ([batch[0].reshape(1, 3, 2), batch[1].reshape(1, 2, 3)], [batch[0:1], batch[1:2, :2]]):
        with pytest.raises(ValueError, match="must match exactly"):
            together(unlike)


def test_hands_do_the_most_urgent_first_and_then_what_came_first() -> None:
    hands, gate, done = PriorityThreadPool(1), threading.Event(), list[str]()
    hands.submit(0, gate.wait)
    futures = [hands.submit(urgency, done.append, name) for urgency, name in ((0, "c"), (2, "a"), (0, "d"), (1, "b"))]
    gate.set()
    for future in futures:
        future.result(timeout=5)
    hands.close()
    assert done == ["a", "b", "c", "d"]


def test_hands_pass_errors_on_and_drop_what_waits_when_closed() -> None:
    hands, gate = PriorityThreadPool(1), threading.Event()
    broken = hands.submit(0, lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        broken.result(timeout=5)
    hands.submit(0, gate.wait)
    waiting = hands.submit(0, lambda: 1)
    closing = threading.Thread(target=hands.close)
    closing.start()
    with pytest.raises(CancelledError):
        waiting.result(timeout=5)
    gate.set()
    closing.join()
    with pytest.raises(RuntimeError):
        hands.submit(0, lambda: 1)
