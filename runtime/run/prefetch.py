"""Prefetching in threads, through bounded queues and within a memory budget.

Threads instead of processes, because Pillow and the engines release the interpreter lock: decoding, resizing and PNG encoding of
VOC-size photographs get 1.8 to 1.9 times as fast from one core to two either way (`benchmarks/studies/speed/host_path.py`), and
threads share arrays without copying.
"""

from __future__ import annotations

import heapq
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class BoundedQueue(Generic[T]):
    """A bounded queue from one producer thread to one consumer thread; either may end it."""

    def __init__(self, depth: int) -> None:
        self._items: deque[T] = deque()
        self._depth = depth
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self._error: BaseException | None = None

    def put(self, item: T) -> bool:
        """Wait for room and add an item; False when the consumer has closed the queue."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._depth)
            if not self._closed:
                self._items.append(item)
                self._changed.notify_all()
            return not self._closed

    def end(self, error: BaseException | None = None) -> None:
        """Called by the producer: no more items; the consumer raises ``error``, if there is one, after the last item."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def close(self) -> None:
        """Called by the consumer: it takes no more items."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._items)
                if not self._items:
                    if self._error:
                        raise self._error
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item


def prefetched(
    source: Generator[T, None, None], depth: int = 1, *, on_close: Callable[[], None] = lambda: None
) -> Generator[T, None, None]:
    """Yield the items of a generator that runs in its own thread, up to ``depth`` items ahead.

    Closing this generator ends the thread and closes the source. Errors of the source are raised here.

    Args:
        on_close: called when this generator closes; must wake the source if it is waiting for something.
    """
    queue: BoundedQueue[T] = BoundedQueue(depth)

    def work() -> None:
        error: BaseException | None = None
        try:
            with closing(source):
                for item in source:
                    if not queue.put(item):
                        break
        except BaseException as caught:
            error = caught
        queue.end(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from queue
    finally:
        queue.close()
        on_close()
        thread.join()


class PriorityThreadPool:
    """A thread pool that runs the most urgent job first, and equally urgent jobs in the order of submission."""

    def __init__(self, count: int) -> None:
        self._waiting: list[tuple[int, int, Future[Any], Callable[[], Any]]] = []
        self._changed = threading.Condition()
        self._submitted, self._closed = 0, False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, urgency: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Submit a job; the higher the number, the more urgent."""
        future: Future[T] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("closed")
            self._submitted += 1
            job: Callable[[], Any] = partial(work, *args, **kwargs)
            heapq.heappush(self._waiting, (-urgency, self._submitted, future, job))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Cancel the waiting jobs, whose futures raise CancelledError, and end the threads."""
        with self._changed:
            self._closed = True
            for _, _, future, _ in self._waiting:
                future.cancel()
                future.set_running_or_notify_cancel()
            self._waiting.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                _, _, future, work = heapq.heappop(self._waiting)
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            del future, work  # otherwise this thread would keep a photograph in memory until its next job


class Budget:
    """Limits the bytes in use at once; one thread takes, any thread gives back."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._changed = threading.Condition()
        self._closed = False

    def fits(self, amount: int) -> bool:
        """Whether ``take`` would return at once. More than the whole budget fits while nothing else is in use."""
        return self._closed or self._used == 0 or self._used + amount <= self._limit

    def take(self, amount: int) -> None:
        """Wait until that many bytes are free, and take them."""
        with self._changed:
            self._changed.wait_for(lambda: self.fits(amount))
            self._used += amount

    def give(self, amount: int) -> None:
        """Give bytes back."""
        with self._changed:
            self._used -= amount
            self._changed.notify_all()

    def close(self) -> None:
        """End all waiting; from now on everything fits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
