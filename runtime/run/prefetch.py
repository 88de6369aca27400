"""Work done ahead of whoever needs it: in threads of its own, through bounded queues, within a budget of memory.

Threads, not processes: Pillow decodes, resizes and encodes, and engines compute, without the interpreter lock. Decoding,
the resizes and the PNG of VOC-size photographs scale 1.8 to 1.9 times from one core to two either way (see
`benchmarks/studies/speed/host_path.py`), and threads share their arrays for nothing.
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
    """A bounded queue from one thread to another; either side may end it."""

    def __init__(self, depth: int) -> None:
        self._items: deque[T] = deque()
        self._depth = depth
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self._error: BaseException | None = None

    def put(self, item: T) -> bool:
        """Waits for room; False when the other side wants nothing more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._depth)
            if not self._closed:
                self._items.append(item)
                self._changed.notify_all()
            return not self._closed

    def end(self, error: BaseException | None = None) -> None:
        """The giving side is done, or failed: then the taking side raises ``error`` after the last item."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def close(self) -> None:
        """The taking side wants nothing more."""
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
    """The items of a generator, made by a thread of their own, up to ``depth`` ahead.

    Closing it ends the thread and closes the source. What the source raises is raised here.

    Args:
        on_close: frees the source from whatever it may be waiting for, which nobody wants any more.
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
    """Threads that do the most urgent of what is waiting first, and of equally urgent work what came first."""

    def __init__(self, count: int) -> None:
        self._waiting: list[tuple[int, int, Future[Any], Callable[[], Any]]] = []
        self._changed = threading.Condition()
        self._asked, self._closed = 0, False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, urgency: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Has it done; more urgent work has the higher number."""
        future: Future[T] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("closed")
            self._asked += 1
            job: Callable[[], Any] = partial(work, *args, **kwargs)
            heapq.heappush(self._waiting, (-urgency, self._asked, future, job))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Drops what is waiting, so that whoever waits for it gets CancelledError, and ends the threads."""
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
            del future, work  # or this thread would keep a photograph until its next work


class Budget:
    """Bytes that may be in use at once; one thread takes, any thread gives back."""

    def __init__(self, most: int) -> None:
        self._most, self._used = most, 0
        self._changed = threading.Condition()
        self._closed = False

    def fits(self, amount: int) -> bool:
        """Would ``take`` return at once? What is larger than the whole budget fits while nothing else is in use."""
        return self._closed or self._used == 0 or self._used + amount <= self._most

    def take(self, amount: int) -> None:
        """Waits until that much is free."""
        with self._changed:
            self._changed.wait_for(lambda: self.fits(amount))
            self._used += amount

    def give(self, amount: int) -> None:
        """Gives back what was taken."""
        with self._changed:
            self._used -= amount
            self._changed.notify_all()

    def close(self) -> None:
        """Lets everyone through."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
