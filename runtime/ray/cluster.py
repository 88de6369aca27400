"""Joining a Ray cluster, and what Ray Data is told. See `on_ray`."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.data import DataContext

from ...errors import UsageError, WsssError


def connect(address: str | None, log: Callable[[str], None]) -> None:
    """Joins a cluster: the one at this address, or of RAY_ADDRESS, or that runs on this machine, or a new one on it.

    Raises:
        WsssError: no cluster is where one was named.
    """
    asked = address or os.environ.get("RAY_ADDRESS") or "auto"
    if asked.startswith("ray://"):
        raise UsageError(
            f"--ray-address {asked}: wsss must run on a node of the cluster, not as a client of it",
            hint="ray job submit --address http://HEAD:8265 -- wsss label ... --on ray",
        )
    # Its C++ side prints errors into this process's stderr that are none, about the restarts of Ray Data's own actors.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        _check_listens(asked)
        with _silent():
            ray.init(address=asked, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        if asked != "auto":
            raise WsssError(
                f"--ray-address {asked}: no Ray cluster answers: {last_line(error)}", hint="`ray status` on its head node"
            ) from None
        log("Ray: no cluster found; one is started on this machine")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # reports over the network, which nobody asked for
        with _silent():
            ray.init(address="local", include_dashboard=False, **quiet)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing on stderr, also not from C++, which says there that it was told to be quiet. Failures come as exceptions."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def _check_listens(address: str) -> None:
    """Raises OSError or ValueError where nothing listens: Ray itself would ask for ever."""
    if address not in ("auto", "local"):
        host, _, port = address.rpartition(":")
        if not port.isdecimal():
            raise ValueError("expected HOST:PORT")
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


@contextlib.contextmanager
def pipeline_settings() -> Iterator[None]:
    """The settings of Ray Data that a pipeline takes with it."""
    context = DataContext.get_current()
    wanted = {
        "enable_progress_bars": False,
        "max_errored_blocks": -1,  # images whose call was lost are labeled one by one
        "max_consecutive_actor_init_deaths": 10,
        "execution_no_progress_timeout_s": -1,  # the cluster may grow late: the user is warned
    }
    before = {name: getattr(context, name) for name in wanted if hasattr(context, name)}
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"ray\.data")  # that a short run does not fill the pool
    for name in before:
        setattr(context, name, wanted[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def free() -> str:
    """What nobody uses, in words."""
    free = ray.available_resources()
    return f"{free.get('GPU', 0):g} GPUs and {free.get('CPU', 0):g} cores"


def last_line(error: BaseException) -> str:
    """Of an error's message, where Ray puts the cause."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
