"""Work in several processes, with results in the order of the tasks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from ...errors import WsssError

Task = TypeVar("Task")
Result = TypeVar("Result")


def in_processes(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Generator[Result]:
    """Yield the results in the order of the tasks; at most two tasks per worker are pending.

    Args:
        function: importable by its name, or a ``partial`` of such a function.

    Raises:
        WsssError: a worker was killed. Errors of the function are raised here.
    """
    # Spawned processes: a fork would inherit locks held by the caller's threads.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_initialize_worker)
    waiting: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            with _deferred_interrupts():  # a worker may be started here
                waiting.append(pool.submit(function, task))
            if len(waiting) == 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise WsssError("a worker process was killed, perhaps for lack of memory", hint="try --workers 1") from None
    finally:
        pool.shutdown(cancel_futures=True)  # waits for running tasks, well under a second


def _initialize_worker() -> None:
    """Ignore Ctrl-C in a worker, since its parent handles it, and end the worker when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def exit_with_parent() -> None:
        if parent:
            parent.join()
            os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


@contextmanager
def _deferred_interrupts() -> Iterator[None]:
    """Defer Ctrl-C to the end of the block; processes started in it inherit the mask and never receive it."""
    # Only the main thread receives Ctrl-C; Windows has no signal mask.
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield
        return
    received = []
    before = signal.signal(signal.SIGINT, lambda *_: received.append(True))  # another thread may receive it
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
        if received:
            signal.raise_signal(signal.SIGINT)
